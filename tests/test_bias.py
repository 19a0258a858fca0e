"""Each bias against its formula, written out once more in plain Python."""

import math
from dataclasses import replace

import pytest
import torch
from graphs import GRAPHS
from test_attend import biases, tensors

from attngraph import (
    Alibi,
    Beside,
    Causal,
    Disjoint,
    EdgeBias,
    EdgeList,
    Full,
    PerHead,
    Prefix,
    RelativeBias,
    Window,
    attend,
)
from attngraph.graph.positions import distance_offset
from attngraph.nn import Attention
from attngraph.nn.positions import Rotary


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
        out = attend(q, k, v, graph, bias=EdgeBias.of(graph, given), backend=backend)
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


SQUARE = [case for case in GRAPHS if 1 < case.n == case.m and case.graph.size[0] in (None, case.n)]


@pytest.mark.share(4)
@pytest.mark.parametrize("kind", ["alibi", "clipped", "buckets"])
@pytest.mark.parametrize("case", SQUARE, ids=lambda case: str(case.graph)[:60])
def test_rows_of_a_graph_keep_their_distances(case, kind):
    """The queries start … stop-1 of the whole, for decoding, partitions and devices: all backends, and nested."""
    n, heads = case.n, case.graph.heads or 4
    q, k, v = (side.detach() for side in tensors(n, n, heads=heads))
    bias, _ = biases(kind, case.graph, n, n, heads)
    whole = attend(q, k, v, case.graph, bias=bias, backend="reference")
    graph = case.graph.sized(n, n)
    for start, stop in ((0, n), (n // 3, n - 1), (n - 1, n)):
        rows = graph.rows(start, stop)
        for part in (rows, rows.rows(0, stop - start), rows & Full(), ~~rows, rows.sized(stop - start, n)):
            for backend in ("reference", "edges", "dense", "tiles", "rows", "auto"):
                out = attend(q[:, :, start:stop], k, v, part, bias=bias, backend=backend)
                torch.testing.assert_close(out, whole[:, :, start:stop], rtol=0, atol=1e-12)


def test_where_queries_stand():
    rows = Causal().rows(4, 6)
    places = {
        rows: 4, rows | Prefix(2): 4, rows.rows(1, 2): 5, rows.T: -4, Causal(): 0, Causal(2).rows(3, 4): 3,
        Beside(Full().sized(None, 3), Causal()): 3, PerHead([rows, rows & Prefix(1)]): 4,
        Disjoint([Causal().sized(2, 2), Full()]): 0,
    }  # fmt: skip
    for graph, place in places.items():
        n, m = graph.size[0] or 7, graph.size[1] or 10
        assert distance_offset(graph, n, m) == place, graph
    for graph, n, m in (
        (Causal(5), 1, 6), (Causal(5) & Window(3, 0), 1, 6),
        (Causal().rows(1, 2) | Causal().rows(2, 3), 1, 6), (Disjoint([Full().sized(2, 3), Full().sized(2, 2)]), 4, 5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="stand"):
            distance_offset(graph, n, m)
    assert distance_offset(Causal(1), 6, 6) == 0  # it looks ahead


def test_rotary_of_rows_turns_the_queries_where_they_stand():
    torch.manual_seed(0)
    layer, rotary, x = Attention(16, 2), Rotary(8)(torch.arange(9)), torch.randn(2, 9, 16)
    for graph in (Causal(), Full(), Window(3, 2)):
        whole = layer(x, graph, rotary=rotary)
        part = layer(x[:, 3:5], graph.sized(9, 9).rows(3, 5), x, rotary=rotary)
        torch.testing.assert_close(part, whole[:, 3:5])


@pytest.mark.share(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_bias", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["alibi", "clipped", "edges", "dense", "dense-keys"])
def test_a_bias_of_another_dtype_is_taken_in_the_precision_of_the_scores(kind, of_bias, dtype):
    graph, n = Causal() & Window(40, 0), 70
    q, k, v = (side.detach().to(dtype) for side in tensors(n, n))
    bias, values = biases(kind, graph, n, n)
    given = values.detach().to(of_bias)
    bias = given if isinstance(bias, torch.Tensor) else replace(bias, **{next(iter(vars(bias))): given})
    exact = (
        given.double() if isinstance(bias, torch.Tensor) else replace(bias, **{next(iter(vars(bias))): given.double()})
    )
    right = attend(q.double(), k.double(), v.double(), graph, bias=exact, backend="reference")
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for backend in ("reference", "edges", "dense", "tiles", "rows", "auto"):
        out = attend(q, k, v, graph, bias=bias, backend=backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), right, rtol=tolerance, atol=tolerance)
