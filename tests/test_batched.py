"""One graph for each entry of a batch: alone, in a padded batch and in a packed one, the same numbers."""

import pytest
import torch
from test_attend import BACKWARD, FORWARD

from attngraph import Alibi, Batched, Causal, Disjoint, EdgeBias, EdgeList, Empty, Full, Random, Window, attend, parse
from attngraph.models import Encoder
from attngraph.nn import TransformerConfig

GRAPHS = [Causal().sized(7, 7), Full().sized(3, 3), (Window(2, 1) | Random(2)).sized(11, 11), Full().sized(1, 1)]
N = 11


def sides(dtype=torch.float64):
    chance = torch.Generator().manual_seed(0)
    shapes = (4, 4, N, 6), (4, 2, N, 6), (4, 2, N, 5)
    return [torch.randn(shape, dtype=dtype, generator=chance).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", ["auto", "tiles", "rows", "edges", "dense", "reference"])
@pytest.mark.parametrize("bias", [None, "alibi", "dense", "edges"])
def test_a_graph_alone_in_a_padded_and_in_a_packed_batch_gives_the_same_numbers(backend, bias):
    batch, (q, k, v) = Batched(GRAPHS), sides()
    own = {"alibi": Alibi.geometric(4), "dense": torch.randn(4, 4, N, N, dtype=torch.float64)}.get(bias)
    counts = [graph.num_edges() for graph in GRAPHS]
    values = torch.randn(4, sum(counts), dtype=torch.float64)
    own = EdgeBias.sorted(values) if bias == "edges" else own
    out, lse = attend(q, k, v, batch, bias=own, backend=backend, return_lse=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
    for entry, graph in enumerate(GRAPHS):
        n = graph.size[0]
        alone = [side[entry : entry + 1, :, :n] for side in (q, k, v)]
        if bias == "dense":
            own_bias = own[entry : entry + 1, :, :n, :n]
        elif bias == "edges":
            own_bias = EdgeBias.sorted(values.split(counts, 1)[entry])
        else:
            own_bias = own
        out_alone, lse_alone = attend(*alone, graph, bias=own_bias, backend="reference", return_lse=True)
        torch.testing.assert_close(out[entry, :, :n], out_alone[0], rtol=0, atol=FORWARD)
        torch.testing.assert_close(lse[entry, :, :n], lse_alone[0], rtol=0, atol=FORWARD)
        (of_alone,) = torch.autograd.grad(out_alone.square().sum(), q)
        torch.testing.assert_close(gradient[entry], of_alone[entry], rtol=0, atol=BACKWARD)
        assert (out[entry, :, n:] == 0).all()
        assert (lse[entry, :, n:] == -torch.inf).all()
    assert torch.isfinite(gradient).all()


def test_weights_are_of_all_entries_one_after_the_other():
    batch, (q, k, v) = Batched(GRAPHS), sides()
    _, weights = attend(q, k, v, batch, return_weights=True)
    assert weights.shape == (1, 4, batch.num_edges())
    each = weights.split([graph.num_edges() for graph in GRAPHS], 2)
    for entry, graph in enumerate(GRAPHS):
        n = graph.size[0]
        alone = attend(*(side[entry : entry + 1, :, :n] for side in (q, k, v)), graph, return_weights=True)[1]
        torch.testing.assert_close(each[entry], alone, rtol=0, atol=FORWARD)
    received = attend(q, k, v, batch, return_weights=True, reduce="received")[1]
    assert received.shape == (4, 4, N)
    assert (received[1, :, 3:] == 0).all()


def test_padding_as_a_mask_is_the_same():
    """Full graphs of so many nodes are Full() with an attention_mask."""
    lengths = torch.tensor([4, 11, 7, 2])
    q, k, v = sides()
    mask = torch.arange(N) < lengths[:, None]
    masked = attend(q, k, v, Full(), attention_mask=mask)
    found = attend(q, k, v, Batched([Full().sized(n, n) for n in lengths.tolist()]))
    torch.testing.assert_close(found, masked * mask[:, None, :, None], rtol=0, atol=FORWARD)


def test_models_take_it():
    config = TransformerConfig(embed_dim=16, num_layers=2, num_heads=4, position="rotary")
    model = Encoder(config, vocab_size=9).double()
    tokens = torch.randint(9, (4, N))
    whole = model(tokens, Batched(GRAPHS))
    for entry, graph in enumerate(GRAPHS):
        n = graph.size[0]
        torch.testing.assert_close(whole[entry, :n], model(tokens[entry : entry + 1, :n], graph)[0], rtol=0, atol=1e-10)


def test_it_is_a_graph_and_text():
    batch = Batched(GRAPHS)
    assert parse(repr(batch)) == batch
    assert Batched(batch.graphs) == batch
    assert batch.size == (4 * N, 4 * N)
    assert batch.entry_size == (N, N)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_what_is_packed_already_is_a_batch_like_any_other(batch_size):
    batch, side_by_side = Batched(GRAPHS), Disjoint(Batched(GRAPHS).graphs)
    x = torch.randn(batch_size, 2, 4 * N, 4, dtype=torch.float64)
    wanted = attend(x, x, x, side_by_side, backend="reference")
    torch.testing.assert_close(attend(x, x, x, batch), wanted, rtol=0, atol=FORWARD)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Batched([Causal()]), "must know the size of each graph"),
        (
            lambda: attend(*sides(), Batched(GRAPHS[:3])),
            "one graph for each entry of the batch .got 3 for a batch of 4",
        ),
        (lambda: attend(*sides(), Batched([Full().sized(5, 5)] * 4)), "the 5 nodes of the largest graph"),
    ],
)
def test_bad_batches_are_told(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_lists_side_by_side_are_planned_as_one():
    lists = [EdgeList(torch.randint(n, (2, 3 * n)), n) for n in (5, 9, 1, 7)]
    for graph in (Batched(lists), Disjoint(lists), Disjoint([*lists, Empty().sized(2, 3)])):
        whole = graph.as_list()
        assert whole is not None
        assert whole.size == graph.size
        assert torch.equal(whole.edge_index(), graph.edge_index())
        assert torch.equal(whole.mask(), graph.mask())
    assert Disjoint([*lists, Causal().sized(2, 2)]).as_list() is None
