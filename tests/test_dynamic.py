"""Graphs that queries and keys choose: what is chosen, against a plain loop; what runs, against the resolved graph."""

import subprocess
import sys

import pytest
import torch

from attngraph import (
    Alibi,
    Blocks,
    BlockTopK,
    Causal,
    EdgeList,
    Full,
    Identity,
    PerHead,
    Prefix,
    Random,
    SoftCap,
    Strided,
    Temperature,
    TopK,
    Window,
    analysis,
    attend,
    from_dense,
    generate,
    parse,
    plan,
    record,
)
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

CHOSEN = [
    TopK(5),
    TopK(90),
    TopK(5) & Causal(),
    TopK(4) & Random(10),
    TopK(3) & Window(6, 0),
    (TopK(5) & Causal()) | Window(2, 0),
    Causal() & (TopK(4) | Window(2, 0)),
    ~TopK(3) & Causal(),
    Causal() - TopK(4),
    TopK(5) - Identity(),
    TopK(4) ^ Prefix(6),
    BlockTopK(8, 2),
    BlockTopK(8, 3, 8),
    BlockTopK(8, 3, 2),
    BlockTopK(8, 2, 4, causal=False),
    BlockTopK(7, 2, causal=False) & Window(20, 20),
    BlockTopK(8, 2) & Causal(),
    (BlockTopK(8, 2) & Window(20, 0)) | Prefix(2),
    TopK(3) & PerHead([Causal(), Full(), Window(3, 3), Prefix(5)]),
    PerHead([TopK(3), Window(2, 0), BlockTopK(4, 2), TopK(4) & Causal()]) & Causal(),
]
every = pytest.mark.parametrize("graph", CHOSEN, ids=str)


def sides(B=2, H=4, Hkv=4, N=50, M=50, D=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (B, H, N, D), (B, Hkv, M, D), (B, Hkv, M, D)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def results(graph, q, k, v, **options):
    """out, lse and the gradients of both."""
    out, lse = attend(q, k, v, graph, return_lse=True, **options)
    total = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    return out, lse, *torch.autograd.grad(total, (q, k, v))


# ------------------------------------------------------------------------------------------- what is chosen


def best(scores, count):
    """The keys with the highest scores, of equal ones the first, of a dict."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


def test_the_best_keys_are_chosen():
    q, k = torch.randint(-3, 4, (2, 30, 2)).double()  # with many equal scores
    allowed = Causal() & Window(20, 0)
    found = (TopK(4) & allowed).resolve(q, k)
    for i in range(30):
        scores = {j: float(q[i] @ k[j]) for j in range(max(0, i - 20), i + 1)}
        assert found.key[found.query == i].tolist() == sorted(best(scores, 4))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 2, 6])
def test_the_best_blocks_are_chosen(queries, causal):
    torch.manual_seed(0)
    q, k, n, block = *torch.randn(2, 32, 3).double(), 32, 6
    mask = BlockTopK(block, 3, queries, causal).resolve(q, k).mask(n, n)
    for first in range(0, n, queries):
        asked = q[first] if causal else q[first : first + queries].mean(0)
        own = first // block
        scores = {}
        for number in range(-(-n // block)):
            if number <= own or not causal:
                mean = k[number * block : (number + 1) * block].mean(0)
                scores[number] = torch.inf if number == own else float(asked @ mean)
        blocks = best(scores, 3)
        for i in range(first, min(first + queries, n)):
            heard = [j for j in range(n) if j // block in blocks and (j <= i or not causal)]
            assert mask[i].nonzero()[:, 0].tolist() == heard


def test_padding_is_not_chosen():
    q, k, _ = sides()
    mask = torch.arange(50) < torch.tensor([[40], [13]])
    for graph in (TopK(5), BlockTopK(8, 2, causal=False), BlockTopK(8, 50, 2, causal=False)):
        for b, length in ((0, 40), (1, 13)):
            own = graph.resolve(q[b, :, :length], k[b, :, :length]).mask()
            whole = graph.resolve(q[b : b + 1], k[b : b + 1], mask[b : b + 1]).mask()[:, :length]
            assert torch.equal(whole[..., :length], own)
            assert isinstance(graph, BlockTopK) or not whole[..., length:].any()


def test_nothing_of_the_future_decides_what_is_heard():
    q, k, _ = sides(B=1, H=1, Hkv=1)
    for graph in (BlockTopK(8, 2), BlockTopK(8, 2, 8), TopK(4) & Causal()):
        whole = graph.resolve(q[0, 0], k[0, 0]).mask()
        for length in (1, 9, 24, 37):
            start = graph.resolve(q[0, 0, :length], k[0, 0, :length]).mask()
            assert torch.equal(whole[:length, :length], start)


def test_large_choices_go_in_steps(monkeypatch):
    q, k, _ = sides(B=1, H=2, Hkv=2)
    whole = [graph.resolve(q, k) for graph in CHOSEN[:18]]
    monkeypatch.setattr("attngraph.graph.dynamic.SCORES_PER_STEP", 300)
    monkeypatch.setattr("attngraph.graph.dynamic.ROWS_PER_STEP", 7)
    for graph, expected in zip(CHOSEN, whole, strict=False):
        assert torch.equal(graph.resolve(q, k).mask(), expected.mask())


@pytest.mark.parametrize(
    "allowed",
    [Random(4), Causal() - Window(7, 0), ~Window(20, 20), Window(3, 3) ^ Window(2, 2), Strided(8)],
    ids=str,
)
@pytest.mark.parametrize("choice", [BlockTopK(4, 2), BlockTopK(4, 2, causal=False), BlockTopK(4, 2, 4)], ids=str)
def test_blocks_without_an_allowed_pair_are_not_chosen(choice, allowed):
    q, k = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    listed = from_dense(allowed.mask(64, 64))  # the same graph: the same choice
    found, expected = ((choice & each).resolve(q, k).mask(64, 64) for each in (allowed, listed))
    assert torch.equal(found, expected)
    within = allowed.mask(64, 64) & Causal().mask(64, 64) if choice.causal else allowed.mask(64, 64)
    if choice.queries == 1:
        assert torch.equal(found.any(1), within.any(1))


@pytest.mark.parametrize("most", [0, 3000, 4200, 1 << 24])
def test_blocks_are_listed_or_filled_up_whatever_lies_beside_them(monkeypatch, most):
    monkeypatch.setattr("attngraph.graph.dynamic.MOST_LISTED", most)
    q, k, v = sides(B=1, H=4)
    for graph in (BlockTopK(8, 2, 8) | BlockTopK(64, 1, 64), BlockTopK(6, 3, 2, causal=False) | BlockTopK(8, 2)):
        expected = attend(q, k, v, graph.resolve(q, k), backend="reference")
        torch.testing.assert_close(attend(q, k, v, graph), expected, atol=1e-12, rtol=1e-12)


def test_where_nothing_is_left_to_choose_nothing_is_filled_up():
    q, k, v = sides()
    for graph, known in ((BlockTopK(10_000, 1), Causal()), (TopK(100_000), Full()), (BlockTopK(8, 7), Causal())):
        assert torch.equal(attend(q, k, v, graph), attend(q, k, v, known))


# ------------------------------------------------------------------------------------------------ what runs


@every
@pytest.mark.parametrize("padded", [False, True])
def test_it_runs_as_what_it_resolves_to(graph, padded):
    torch.manual_seed(1)
    for shape in ({}, {"Hkv": 2}, {"B": 1, "H": 4}):
        q, k, v = sides(**shape)
        mask = torch.rand(len(q), 50) > 0.3 if padded else None
        resolved = graph.resolve(q, k, mask)
        found = results(graph, q, k, v, attention_mask=mask)
        expected = results(resolved, q, k, v, attention_mask=mask, backend="reference")
        for one, other, bound in zip(found, expected, (1e-12, 1e-12, 1e-10, 1e-10, 1e-10), strict=True):
            torch.testing.assert_close(one, other, atol=bound, rtol=bound)


@pytest.mark.parametrize("graph", [TopK(5), TopK(5) & Causal(), BlockTopK(8, 2), BlockTopK(8, 2, 4, causal=False)])
def test_of_other_numbers_of_keys(graph):
    for M in (1, 37, 64):
        q, k, v = sides(M=M)
        expected = attend(q, k, v, graph.resolve(q, k), backend="reference")
        torch.testing.assert_close(attend(q, k, v, graph), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"score": SoftCap(2.0)},
        {"score": Temperature(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64))},
        {"normalize": "sigmoid"},
        {"normalize": lambda scores: scores.exp()},
        {"bias": Alibi.geometric(4)},
        {"bias": torch.randn(4, 50, 50, dtype=torch.float64)},
        {"sinks": torch.randn(4, dtype=torch.float64)},
        {"scale": 0.3},
        {"scale": -0.3},
        {"score": "additive"},
        {"backend": "rows"},
        {"backend": "tiles"},
        {"backend": "edges"},
        {"backend": "reference"},
    ],
    ids=lambda options: "-".join(f"{name}={type(value).__name__}" for name, value in options.items()),
)
@pytest.mark.parametrize("graph", [TopK(5) & Causal(), BlockTopK(8, 2) | Prefix(3)], ids=str)
def test_with_the_options_of_attend(graph, options):
    q, k, v = sides()
    resolved = graph.resolve(q, k)
    expected = attend(q, k, v, resolved, **{**options, "backend": "reference"})
    torch.testing.assert_close(attend(q, k, v, graph, **options), expected, atol=1e-12, rtol=1e-12)


def test_its_weights_are_those_of_the_resolved_graph():
    q, k, v = sides()
    graph = TopK(5) & Causal()
    out, weights = attend(q, k, v, graph, return_weights=True)
    expected, own = attend(q, k, v, graph.resolve(q, k), return_weights=True)
    assert torch.equal(weights, own)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("graph", [TopK(5) & Causal(), BlockTopK(16, 2), BlockTopK(64, 2, 64)], ids=str)
def test_two_runs_and_any_number_of_threads_give_the_same_bits(graph):
    q, k, v = sides(N=200, M=200, dtype=torch.float32)
    threads = torch.get_num_threads()
    first = results(graph, q, k, v)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for one, other in zip(results(graph, q, k, v), first, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_dropout_and_its_gradient():
    q, k, v = sides()
    graph = TopK(20) & Causal()
    torch.manual_seed(3)
    first = results(graph, q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    again = results(graph, q, k, v, dropout_p=0.5)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    mean = sum(attend(q, k, v, graph, dropout_p=0.5).detach() for _ in range(300)) / 300
    assert (mean - attend(q, k, v, graph)).abs().mean() < 0.05


@every
def test_empty_sizes(graph):
    for sizes in ({"B": 0}, {"N": 0, "M": 0}, {"D": 0}):
        q, k, v = sides(**sizes)
        out = attend(q, k, v, graph)
        assert out.shape == q.shape
        out.sum().backward()


def test_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (side.detach().to(dtype) for side in sides())
        graph = TopK(5) & Causal()
        expected = attend(*(side.double() for side in (q, k, v)), graph.resolve(q, k))
        found = attend(q, k, v, graph)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("graph", [TopK(5) & Causal(), BlockTopK(8, 2) | Window(1, 0)], ids=str)
def test_compiled(graph):
    for options in ({}, {"attention_mask": torch.rand(2, 50) > 0.3}):
        q, k, v = sides(Hkv=2)
        torch.compiler.reset()
        compiled = torch.compile(lambda q, k, v: attend(q, k, v, graph, **options), fullgraph=True)  # noqa: B023
        one, other = compiled(q, k, v), attend(q, k, v, graph, **options)
        torch.testing.assert_close(one, other)
        pairs = zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (one, other)), strict=True)
        for gradient, expected in pairs:
            torch.testing.assert_close(gradient, expected)


def test_shapes_alone_and_derivatives_again():
    meta = torch.empty(2, 4, 50, 8, device="meta")
    assert attend(meta, meta, meta, TopK(3)).shape == meta.shape
    q, k, v = sides(B=1, H=2, Hkv=1, N=6, M=6, D=3)
    assert torch.autograd.gradgradcheck(lambda *given: attend(*given, TopK(3) & Causal()), (q, k, v))
    gradient = torch.func.grad(lambda q: attend(q, k.detach(), v.detach(), TopK(3)).square().sum())(q.detach())
    expected = torch.autograd.grad(attend(q, k, v, TopK(3)).square().sum(), q)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize("graph", [TopK(4) & Causal(), [Causal(), BlockTopK(4, 2) | Window(2, 0)]], ids=str)
def test_in_a_model(graph, position, tmp_path):
    torch.manual_seed(0)
    model = GPT(TransformerConfig(embed_dim=32, num_layers=2, num_heads=4, position=position), 17, graph=graph).eval()
    tokens = torch.randint(17, (3, 20))
    model(tokens).sum().backward()
    whole = model(tokens)
    for length in (5, 13):  # causal, also in what it chooses
        torch.testing.assert_close(model(tokens[:, :length]), whole[:, :length])
    mask = torch.arange(20) < torch.tensor([[20], [15], [8]])
    torch.testing.assert_close(model(tokens, attention_mask=mask)[1, :15], whole[1, :15])
    assert generate(model, tokens[:1, :4], 8, use_cache=False).shape == (1, 12)
    model.save(tmp_path)
    assert torch.equal(GPT.load(tmp_path).eval()(tokens), whole)
    with record(model) as recorded:
        model(tokens)
    edges, weights = recorded[1].of(head=1)  # the nodes of all entries, one after the other
    found = torch.zeros(60).index_add_(0, edges[1], weights)
    torch.testing.assert_close(found, torch.ones(60))
    assert recorded[1].edge_index.shape[1] == recorded[1].weights.shape[-1]


# --------------------------------------------------------------------------------------------- what is told


def test_what_it_is_expected_to_take():
    for graph in (TopK(32) & Causal(), BlockTopK(64, 8), PerHead([TopK(3), Window(2, 0)])):
        made = plan(graph, 512, heads=2)
        text = made.explain()
        assert text.startswith(f"{graph}, expected as ")
        assert "each call chooses by" in text
        assert str(graph) in repr(made)
        with pytest.raises(ValueError, match="attend with the graph itself"):
            attend(*torch.randn(3, 1, 2, 512, 64), made)


@every
def test_its_edges_are_refused_before_the_data(graph):
    for ask in (
        lambda: graph.num_edges(50, 50),
        lambda: graph.mask(50, 50),
        lambda: graph.edge_index(50, 50),
        lambda: analysis.leaks(graph, 50),
        lambda: graph.in_degrees(50),
    ):
        with pytest.raises(ValueError, match=r"not known before the data: graph\.resolve"):
            ask()


def test_operations_that_need_edges_are_refused():
    q, k, v = sides()
    for graph in (TopK(3).T, TopK(3) @ Causal(), Blocks(TopK(3), 2), TopK(3).rows(0, 50)):
        with pytest.raises(ValueError, match="around what `resolve` returns"):
            attend(q, k, v, graph)


def test_resolving_what_is_known_and_what_does_not_fit():
    q, k, _ = sides()
    assert Causal().resolve(q, k) == Causal()
    for wrong, match in (
        ((q, 3), "k must be a tensor"),
        ((q[:1], k), "one batch size"),
        ((q[:, :3], k[:, :2]), "multiple of k's"),
        ((q[0, 0, 0], k), "must have shape"),
        ((q, k, torch.ones(2, 49, dtype=torch.bool)), "attention_mask must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            TopK(3).resolve(*wrong)
    with pytest.raises(ValueError, match="same number"):
        (TopK(3) & EdgeList([[0], [0]], 3)).resolve(q, k)
    assert "graph.resolve" in TopK(3)._repr_html_()
    with pytest.raises(ValueError, match="divisor of block"):
        BlockTopK(8, 2, 3)


@every
def test_it_is_a_value(graph):
    assert parse(repr(graph)) == graph
    assert hash(parse(repr(graph))) == hash(graph)


PEAK = """
import torch
from attngraph import Causal, TopK, attend
q, k, v = torch.randn(3, 1, 1, 30_000, 8, requires_grad=True)
graph = TopK(4) & Causal()
attend(q[:, :, :500], k[:, :, :500], v[:, :, :500], graph).sum().backward()  # what comes with a first call
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = high()
attend(q, k, v, graph).sum().backward()
print(high() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_no_matrix_of_all_scores():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200 < 30_000**2 / 2**20 / 4  # MiB: a quarter of a bool of each pair
