"""Each bias against its formula, written out once more in plain Python."""

import math

import pytest
import torch

from attngraph import Alibi, Causal, EdgeBias, EdgeList, Prefix, RelativeBias, attend


def pairs(n, m):
    return torch.arange(n)[:, None], torch.arange(m)[None]


def test_alibi_is_minus_slope_times_distance():
    bias = Alibi(torch.tensor([0.5, 2.0])).at(*pairs(3, 4))
    for h, slope in enumerate((0.5, 2.0)):
        for i in range(3):
            for j in range(4):
                assert bias[h, i, j] == -slope * abs(i - j)
    assert Alibi.geometric(8).slopes.tolist() == [2.0**-h for h in range(1, 9)]


def test_clipped_offsets_share_the_last_column():
    table = torch.arange(10.0).view(2, 5)
    bias = RelativeBias(table).at(*pairs(6, 6))
    for h in range(2):
        for i in range(6):
            for j in range(6):
                assert bias[h, i, j] == table[h, max(-2, min(2, j - i)) + 2]


def t5_bucket(relative, bidirectional, buckets, max_distance):
    """Raffel et al. 2020 as mesh-tensorflow computes it: half of the buckets exact, the rest logarithmic."""
    first = 0
    distance = -relative
    if bidirectional:
        buckets //= 2
        if distance < 0:
            first, distance = buckets, -distance
    else:
        distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact))
    return first + min(far, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_are_t5s(bidirectional, buckets, max_distance):
    bias = RelativeBias(torch.zeros(1, buckets), max_distance, bidirectional)
    found = bias.bucket(torch.tensor(300), torch.arange(600))
    expected = [t5_bucket(j - 300, bidirectional, buckets, max_distance) for j in range(600)]
    wrong = [j - 300 for j in range(600) if found[j] != expected[j]]
    # At a bucket's very border the logarithm's rounding decides, in float32 as in T5.
    assert all(abs(found[j + 300] - expected[j + 300]) == 1 for j in wrong)
    assert len(wrong) <= 4
    assert found.max() < buckets


def test_edge_values_follow_the_edges():
    graph = EdgeList([[2, 0, 1], [0, 0, 1]], 3)
    given = torch.tensor([5.0, 0.0, 0.0])  # in the order in which the edges were given: 2 → 0 is heard far more
    q = k = torch.zeros(1, 3, 4)
    v = torch.eye(3)[None]
    for backend in ("reference", "edges", "dense"):
        out = attend(q, k, v, graph, bias=EdgeBias(given[graph.order]), backend=backend)
        weight = math.exp(5) / (1 + math.exp(5))
        torch.testing.assert_close(out[0, 0], torch.tensor([1 - weight, 0, weight]))


def test_a_bias_of_minus_infinity_removes_an_edge():
    """As masks of other libraries do; a query whose every edge is removed hears nobody."""
    q, k, v = torch.randn(3, 1, 4, 8, dtype=torch.float64)
    removed = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~(Causal() & Prefix(2)).mask(4, 4), -torch.inf)
    expected = attend(q, k, v, Causal() & Prefix(2), backend="reference")
    for backend in ("reference", "edges", "dense"):
        torch.testing.assert_close(attend(q, k, v, Causal(), bias=removed, backend=backend), expected)
    removed[1] = -torch.inf
    for backend in ("edges", "dense"):
        assert (attend(q, k, v, Causal(), bias=removed, backend=backend)[0, 1] == 0).all()


def test_slopes_are_a_tensor():
    with pytest.raises(TypeError, match=r"got int.: Alibi.geometric"):
        Alibi(4)
