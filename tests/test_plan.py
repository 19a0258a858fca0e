"""A plan cuts a graph into disjoint parts and never changes its meaning; it says what it does, and what it can't."""

import copy
import dataclasses
import gc
import pickle
import subprocess
import sys
from types import SimpleNamespace

import networkx
import pytest
import torch
from graphs import GRAPHS
from test_attend import BIASES, assert_equal, biases, results, tensors
from torch.testing import assert_close

from attngraph import (
    Alibi,
    Causal,
    Chunks,
    Costs,
    Documents,
    EdgeBias,
    EdgeList,
    Empty,
    Full,
    PerHead,
    Prefix,
    Random,
    Window,
    analysis,
    attend,
    cache,
    from_networkx,
    plan,
)
from attngraph.graph.base import at_size
from attngraph.graph.text import pack
from attngraph.planning.backends.base import INSTALLED
from attngraph.planning.call import Call
from attngraph.planning.edge_set import EdgeSet
from attngraph.planning.execution import attend_forward
from attngraph.planning.planner import Plan, planned
from attngraph.planning.reordering import typical_band
from attngraph.planning.steps import products

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
FREE = dict.fromkeys([name for name in vars(Costs()) if name != "source"], 0.0)
DEAR = {"masked_s_per_pair_dim": 1.0, "gather_s_per_edge": 1.0}
NO_TILES = Costs(**{**FREE, **DEAR, "tile_s_per_pair_dim": 1.0, "row_s_per_edge": 1e-12})
NO_ROWS = Costs(**DEAR, row_s_per_edge=1.0)
CUT = Costs(
    **{**FREE, **DEAR, "flash_s_per_pair_dim": 1.0, "tile_s_per_pair_dim": 1e-11, "row_s_per_edge": 1e-9}
)  # a tile is worth a few edges
MIXED = Window(20, 0) | Prefix(2) | Random(3)


@every
@pytest.mark.parametrize("costs", [NO_TILES, NO_ROWS, CUT], ids=["rows", "tiles", "cut"])
def test_every_plan_of_a_graph_computes_the_same(case, costs):
    heads = case.graph.heads or 4
    q, k, v = tensors(case.n, case.m, heads=heads)
    made = plan(case.graph, case.n, case.m, heads=heads, head_dim=4, costs=costs)
    expected = results(q, k, v, case.graph, None, None, "reference")
    assert_equal(results(q, k, v, made, None, None, "auto"), expected)
    assert made.edges == case.graph.num_edges(case.n, case.m)


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("graph", [MIXED, PerHead([Window(9, 0), MIXED, MIXED, Causal()])], ids=["mixed", "heads"])
def test_plans_of_several_parts_equal_the_reference_with_every_bias(graph, kind):
    n = 150
    q, k, v = tensors(n, n)
    bias, learned = biases(kind, graph, n, n)
    name = {"none": None, "edges": "edge", "edges-shared": "edge", "dense": "dense", "dense-keys": "dense"}
    made = plan(graph, n, n, heads=4, head_dim=4, costs=CUT, bias=name.get(kind, "offset"))
    assert len(made.parts) > 1 or kind.startswith("edges")
    assert_equal(results(q, k, v, made, bias, learned, "auto"), results(q, k, v, graph, bias, learned, "reference"))


@pytest.mark.parametrize("graph", [MIXED, Causal() | Random(2), Full() - Random(4)], ids=str)
def test_parts_are_disjoint_and_together_the_graph(graph):
    made = plan(graph, 300, 300, costs=CUT)
    masks = [part.layout.mask().long() for part in made.parts]
    assert torch.equal(sum(masks), graph.mask(300, 300).long())
    assert [part.edges for part in made.parts] == [int(mask.sum()) for mask in masks]


def test_causal_beside_stray_edges_runs_in_the_flash_kernel():
    graph, flash = (
        Causal() | Random(2),
        Costs(
            flash_s_per_pair_dim=1e-15,
            tile_s_per_pair_dim=1.0,
            masked_s_per_pair_dim=1.0,
            row_s_per_edge=1e-6,
            merge_s_per_result_dim=0,
        ),
    )
    made = plan(graph, 90, 90, heads=4, head_dim=4, costs=flash)
    assert [part.backend.name for part in made.parts] == ["dense", "rows"]
    q, k, v = tensors(90, 90)
    assert_equal(results(q, k, v, made, None, None, "auto"), results(q, k, v, graph, None, None, "reference"))
    assert made.edges == graph.num_edges(90, 90)


@pytest.mark.parametrize(
    "graph",
    [Documents([3, 5, 0, 3, 1, 40]), Causal() & Documents([3, 5, 3, 1, 40]), Chunks(5), Chunks(4) & Causal()],
    ids=str,
)
def test_packed_documents_run_in_the_flash_kernel(graph):
    made = plan(graph, 52, 52, heads=4, head_dim=4, backend="dense")
    assert sum(made.parts[0].layout.lengths) == 52
    assert made.parts[0].pairs <= made.edges <= 52**2
    q, k, v = tensors(52, 52)
    assert_equal(results(q, k, v, made, None, None, "auto"), results(q, k, v, graph, None, None, "reference"))
    cheap = plan(
        graph,
        52,
        52,
        heads=4,
        head_dim=4,
        costs=Costs(
            flash_s_per_pair_dim=0,
            tile_s_per_call=0,
            merge_s_per_result_dim=0,
            row_s_per_edge=1.0,
            tile_s_per_pair_dim=1.0,
        ),
    )
    assert [part.backend.name for part in cheap.parts] == ["dense"]


def test_many_heads_are_counted_without_a_list():
    graph = PerHead([Causal(), Window(3, 0), Full()])
    made = plan(graph, 200_000, 200_000, heads=3)
    each = [graph.of_head(h).num_edges(200_000, 200_000) for h in range(3)]
    assert made.edges == graph.num_edges(200_000, 200_000) == sum(each)
    assert made.edge_values == 200_000**2
    assert f"{sum(each):,} edges of all heads, 1 × {each[0]:,} + 1 × {each[1]:,}" in made.explain()
    assert analysis.cost(graph, 200_000, dim=96, heads=3).edges == sum(each)
    graph = PerHead([Causal(), Window(3, 4), EdgeList([[0, 9], [8, 0]], 10)])
    assert plan(graph, 10, 10, heads=3).edge_values == graph.edge_index(10, 10).shape[1]


def test_pytorch_runs_what_it_runs_as_fast():
    slower, faster = (
        Costs(flash_s_per_pair_dim=1.6e-11, tile_s_per_pair_dim=tile, tile_s_per_result_dim=0, tile_s_per_call=0)
        for tile in (1.6e-11, 1.4e-11)
    )
    for graph, costs, backend in ((Full(), slower, "dense"), (Full(), faster, "tiles"), (Causal(), slower, "tiles")):
        assert [part.backend.name for part in plan(graph, 2048, 2048, costs=costs).parts] == [backend]


def test_causal_with_a_bias_is_no_call_of_the_flash_kernel():
    made = plan(Causal(), 4096, 4096, heads=8, bias="offset", costs=Costs())
    assert [part.backend.name for part in made.parts] == ["tiles"]
    assert "with a mask" in plan(Causal(), 64, 64, bias="dense", backend="dense").explain()


@pytest.mark.parametrize("size", [(4, 4), (1000, 10), (1, 50), (0, 3)])
def test_causal_computes_as_many_pairs_as_it_has_edges(size):
    part = plan(Causal(), *size, backend="dense").parts[0]
    assert part.pairs == part.edges


def test_transforms_of_torch_func_reach_past_plans():
    q, k, v = torch.randn(3, 1, 8, 1024, 64)
    found = torch.func.grad(lambda q: attend(q, k, v, Causal()).sum())(q)
    wanted = q.clone().requires_grad_()
    attend(wanted, k, v, Causal()).sum().backward()
    assert_close(found, wanted.grad)


def test_other_documents_are_no_packed_ones():
    for graph in (
        Documents([3, 5]) | Causal(),
        Documents([3, 5]) & Window(2, 0),
        Chunks(5, offset=1),
        Causal(1) & Chunks(4),
    ):
        assert not plan(graph, 8, 8, backend="dense").parts[0].layout.lengths
    assert not plan(Chunks(4), 8, 9, backend="dense").parts[0].layout.lengths
    assert not plan(Chunks(4), 8, 8, backend="dense", bias="dense").parts[0].layout.lengths


def test_a_dense_part_outlives_the_text_of_its_graph():
    """A simplified graph with a listed part has no other owner than its plan, and its text can't be parsed."""
    edges = EdgeList(torch.randint(0, 40, (2, 300), generator=torch.Generator().manual_seed(0)), 40)
    graph = PerHead([Causal() & edges & Causal(2), Full(), Causal(), edges - Empty()])
    made = plan(graph, heads=4, head_dim=4, costs=Costs(masked_s_per_pair_dim=1e-15))
    gc.collect()
    assert {part.backend.name for part in made.parts} == {"dense"}
    q, k, v = tensors(40, 40)
    assert_equal(results(q, k, v, made, None, None, "auto"), results(q, k, v, graph, None, None, "reference"))


@pytest.mark.parametrize("backend", ["tiles", "rows"])
def test_a_bias_that_asks_for_no_gradient_costs_none(backend, monkeypatch):
    asked, backward = [], Plan.backward
    monkeypatch.setattr(Plan, "backward", lambda *given: (asked.append(given[-1]), backward(*given))[1])
    q, k, v = tensors(50, 50)
    attend(q, k, v, MIXED, bias=Alibi(torch.ones(4, dtype=torch.float64)), backend=backend).sum().backward()
    attend(
        q, k, v, MIXED, bias=Alibi(torch.ones(4, dtype=torch.float64, requires_grad=True)), backend=backend
    ).sum().backward()
    assert asked == [False, True]


@pytest.mark.slow
def test_float32_is_right_to_2e_6_of_the_largest_value():
    graph, n = MIXED | Causal() & Prefix(70), 700
    inputs = [side.float().detach().requires_grad_() for side in tensors(n, n, dim=32, value_dim=32)]
    wide = [side.detach().double().requires_grad_() for side in inputs]
    chance = torch.Generator().manual_seed(0)
    up, up_lse = (torch.randn(shape, generator=chance, dtype=torch.float64) for shape in ((2, 4, n, 32), (2, 4, n)))

    def found(sides, backend):
        out, lse = attend(*sides, graph, backend=backend, return_lse=True)
        loss = (out * up.to(out.dtype)).sum() + (lse * up_lse.to(out.dtype)).sum()
        return out, lse, *torch.autograd.grad(loss, sides)

    expected = found(wide, "reference")
    for backend in ("tiles", "rows", "auto"):
        for single, right in zip(found(inputs, backend), expected, strict=True):
            assert (single - right).abs().max() <= 2e-6 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    q, k, v = (side.detach().to(dtype).requires_grad_() for side in tensors(200, 200, dim=16, value_dim=16))
    for backend in ("tiles", "rows"):
        out, lse = attend(q, k, v, MIXED, backend=backend, return_lse=True)
        right = attend(q.float(), k.float(), v.float(), MIXED, backend="reference")
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert (out - right).abs().max() < 1.1 * torch.finfo(dtype).eps * right.abs().max()
        assert all(side.dtype == dtype for side in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", ["tiles", "rows", "auto"])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(backend):
    q, k, v = (side.float().detach().requires_grad_() for side in tensors(500, 500, dim=16, value_dim=16))
    runs = []
    for threads in (1, 2, 1, 3) if backend == "rows" else (1, 1):
        torch.set_num_threads(threads)
        runs.append(results(q, k, v, MIXED, None, None, backend))
    torch.set_num_threads(1)
    for out, lse, gradients in runs[1:]:
        for found, first in zip((out, lse, *gradients), (*runs[0][:2], *runs[0][2]), strict=True):
            assert torch.equal(found, first)


PLAIN = "", 0.3, "", 0.0, "softmax", 0.0  # bias, scale, transform and its value, normaliser, dropout


def test_the_operators_pass_opcheck():
    q, k, v = (side.float().detach().requires_grad_() for side in tensors(40, 40, dim=8, value_dim=8))
    for backend in ("tiles", "rows", "auto"):
        torch.library.opcheck(attend_forward, (q, k, v, *[None] * 6, *PLAIN, *pack(MIXED), backend))
    slopes = torch.randn(4, 79, requires_grad=True)
    seed, padding = torch.tensor(7), torch.rand(2, 40) < 0.8
    modified = "offset", 0.3, "softcap", 2.0, "sigmoid", 0.1
    sides, query = (q, k, v, slopes, *[None] * 3, padding, seed), MIXED.edge_index(40, 40)[1]
    torch.library.opcheck(attend_forward, (*sides, *modified, *pack(MIXED), "tiles"))
    features = [torch.randn(shape, requires_grad=True) for shape in ((1, len(query), 3), (4, 8, 3), (4, 8, 3))]
    torch.library.opcheck(attend_forward, (q, k, v, None, *features, None, None, *PLAIN, *pack(MIXED), "rows"))
    for weight, activation in ((None, ""), (torch.randn(4, 8, requires_grad=True), "tanh")):
        torch.library.opcheck(products, (q, k, weight, None, None, query, activation, 0.2, 0.3, *pack(MIXED)))
    torch.library.opcheck(products, (q, k, weight, *features[:2], query, "tanh", 0.2, 0.3, *pack(MIXED)))


@pytest.mark.parametrize("backend", ["tiles", "rows"])
def test_plans_compile_and_checkpoint(backend):
    from torch.utils.checkpoint import checkpoint

    q, k, v = (side.float().detach().requires_grad_() for side in tensors(70, 70, dim=8, value_dim=8))
    expected = results(q, k, v, MIXED, None, None, backend)

    def attention(q, k, v):
        return attend(q, k, v, MIXED, backend=backend)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected[0])
    gradients = torch.autograd.grad(checkpoint(attention, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    right = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(gradients, right, strict=True))


def test_reordering_finds_the_band_of_a_shuffled_grid():
    grid = networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(70, 70))
    shuffle = torch.randperm(4900, generator=torch.Generator().manual_seed(0)).tolist()
    graph = from_networkx(networkx.relabel_nodes(grid, dict(enumerate(shuffle))), nodelist=range(4900)).graph
    costs = Costs(
        row_s_per_edge=1e-8,
        row_s_per_edge_dim=0,
        tile_s_per_pair_dim=1e-13,
        tile_s_per_call=0,
        merge_s_per_result_dim=0,
    )
    made = plan(graph, costs=costs, heads=4, head_dim=4)
    assert made.parts[0].order is not None
    assert "reordered" in made.explain()
    q, k, v = tensors(4900, 4900, batch=1)
    assert_equal(results(q, k, v, made, None, None, "auto"), results(q, k, v, graph, None, None, "edges"))
    assert plan(graph, costs=costs, reorder=False).parts[0].order is None
    scattered = plan(graph, backend="tiles").parts[0]
    assert len(made.parts[0].layout.table.row) < len(scattered.layout.table.row) / 4


def test_scattered_edges_are_not_looked_at_in_all_tiles(monkeypatch):
    n = 6400
    key, query = torch.randint(n, (2, 16 * n), generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(EdgeSet, "tabulated", None)
        made = plan(EdgeList(torch.stack([key, query]), n), heads=8, head_dim=16)
    assert made.parts[0].backend.name == "rows"
    assert made.candidates["tiles (numba)"] == "too few edges in each of some rows of its tiles"
    near = EdgeList(torch.stack([query // 4 + key // 4 % 32, query // 4 + query % 64]).clamp(max=n - 1), n)
    assert isinstance(plan(near, heads=8, head_dim=16).candidates["tiles (numba)"], float)


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_band_of_a_graph_is_no_narrower_than_what_its_nodes_reach(shuffled):
    n, half = 600, 5
    place = torch.randperm(n) if shuffled else torch.arange(n)
    ring = Window(half, half).edge_index(n)
    start_of = lambda query: torch.searchsorted(query, torch.arange(n + 1))  # noqa: E731
    graph = EdgeList(place[ring], n)
    assert half - 1 <= typical_band(start_of(graph.query), graph.key) <= half  # floor(2r·5 / 2r), whatever the order
    random = EdgeList(torch.randint(n, (2, 16 * n)), n)
    assert typical_band(start_of(random.query), random.key) > n / 8


def test_explain_names_parts_costs_and_alternatives():
    graph = Window(256, 0) | Random(3)
    text = plan(graph, 4096, 4096, heads=8, costs=Costs()).explain()
    for word in ("tiles", "rows", "edges", "full", "masks", "GFLOP", "expected", "asked:", "dense", "the defaults"):
        assert word in text
    assert f"{graph.num_edges(4096, 4096):,} edges" in text


def test_auto_takes_the_cheapest_candidate():
    assert [part.backend.name for part in plan(Window(64, 0), 4096, 4096, costs=NO_TILES).parts] == ["rows"]
    assert [part.backend.name for part in plan(Window(64, 0), 4096, 4096, costs=NO_ROWS).parts] == ["tiles"]
    assert [part.backend.name for part in plan(Causal(), 4096, 4096, costs=Costs(tile_s_per_pair_dim=1e-10)).parts] == [
        "dense"
    ]
    dense = Costs(masked_s_per_pair_dim=1e-15, row_s_per_call=0, masked_s_per_call=0)
    assert [part.backend.name for part in plan(Window(64, 0), 4096, 4096, costs=dense).parts] == ["dense"]


def call_of(n, **options):
    return Call(n, n, 1, 1, 4, 4, torch.float32, torch.device("cpu"), **options)


def test_plans_are_made_once_and_the_cache_is_bounded(monkeypatch):
    cache.clear()
    first = planned(MIXED, call_of(80), "tiles")
    assert planned(Window(20, 0) | Prefix(2) | Random(3), call_of(80), "tiles") is first
    monkeypatch.setattr(cache.PLANS, "max_entries", 3)
    for width in range(8):
        planned(Window(width, 0), call_of(80), "tiles")
    assert cache.cache_info()["plans"].entries == 3
    monkeypatch.setattr(cache.PLANS, "max_bytes", 0)
    planned(MIXED, call_of(80), "tiles")
    assert cache.cache_info()["plans"].entries == 1
    cache.clear()
    assert cache.cache_info()["plans"].entries == 0


# ------------------------------------------------------------------------------------------------- bad input


def test_a_plan_for_other_tensors_is_told():
    made = plan(Window(4, 0), 30, 30, heads=2)
    q = torch.randn(2, 30, 8)
    assert attend(q, q, q, made).shape == (2, 30, 8)
    with pytest.raises(
        ValueError, match=r"made for 30 queries, 30 keys and 2 heads on cpu \(got 31, 31 and 2 on cpu\)"
    ):
        attend(*[torch.randn(2, 31, 8)] * 3, made)
    meta = q.to("meta")
    with pytest.raises(ValueError, match=r"on cpu .got 30, 30 and 2 on meta"):
        attend(meta, meta, meta, made)
    with pytest.raises(ValueError, match=r"a plan has chosen its backends: leave out backend='edges'"):
        attend(q, q, q, made, backend="edges")
    with pytest.raises(
        ValueError, match=r"no score='additive'\); plan\(…, score='additive'\), or attend with the graph"
    ):
        attend(q, q, q, plan(Window(4, 0), 30, 30, heads=2, backend="tiles"), score="additive")
    asked = {"score": lambda q_i, k_j: (q_i - k_j).sum(-1), "normalize": torch.tanh, "dropout_p": 0.1}
    with pytest.raises(ValueError, match=r"; plan\(…, score='a function', normalize='a function', dropout=True\), or"):
        attend(q, q, q, made, **asked)
    remade = plan(Window(4, 0), 30, 30, heads=2, score="a function", normalize="a function", dropout=True)
    assert attend(q, q, q, remade, **asked).shape == (2, 30, 8)
    with pytest.raises(ValueError, match=r"made for bias=None \(got one of kind 'edge'\): plan\(…, bias='edge'\)"):
        attend(q, q, q, made, bias=EdgeBias.sorted(torch.zeros(made.edges)))


def test_what_a_plan_cannot_be_is_told():
    with pytest.raises(ValueError, match="backend must be one of auto"):
        plan(Causal(), 4, 4, backend="flash")
    with pytest.raises(ValueError, match="graph has 2 heads"):
        plan(PerHead([Causal(), Full()]), 4, 4, heads=3)
    with pytest.raises(ValueError, match="give the missing number"):
        plan(Causal())
    with pytest.raises(ValueError, match="it runs on a CPU, not on mps"):
        plan(Window(3, 0), 8, 8, backend="rows", device="mps")
    with pytest.raises(
        ValueError,
        match="no score='additive'; backend='steps', 'edges' or 'reference' can",
    ):
        attend(*torch.randn(3, 1, 1, 4, 4), Causal(), score="additive", backend="tiles")


def test_an_edge_bias_of_another_length_is_told():
    q, k, v = tensors(20, 20)
    for backend in ("tiles", "rows"):
        with pytest.raises(ValueError, match="EdgeBias needs one value for each of the graph's"):
            attend(q, k, v, MIXED, bias=EdgeBias.sorted(torch.zeros(7, dtype=torch.float64)), backend=backend)


def test_memory_that_is_not_there_is_told_before_it_is_taken(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 29))
    q = torch.randn(1, 1 << 20, 1)
    with pytest.raises(MemoryError, match=r"GiB of memory are required .* GiB are available"):
        attend(q, q, q, Random(100), backend="rows")


def without_numba(monkeypatch):
    monkeypatch.setitem(INSTALLED, "numba", False)


def test_without_numba_auto_uses_tiles_and_says_what_is_lost(monkeypatch):
    without_numba(monkeypatch)
    made = plan(Random(4), 2000, 2000)
    assert [part.backend.name for part in made.parts] in (["tiles"], ["dense"], ["edges"])
    assert "it needs numba: pip install" in made.explain()
    with pytest.raises(ValueError, match=r"rows .numba.: it needs numba: pip install 'attngraph\[cpu\]'"):
        plan(Random(4), 2000, 2000, backend="rows")


def test_the_package_imports_without_numba_and_scipy():
    code = (
        "import sys; sys.modules['numba'] = sys.modules['scipy'] = None\n"
        "import torch, attngraph as a\n"
        "q = torch.randn(1, 2, 300, 8); g = a.Window(9, 0) | a.Random(2)\n"
        "assert torch.allclose(a.attend(q, q, q, g, backend='tiles'), a.attend(q, q, q, g, backend='edges'), atol=1e-5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------- large sizes


def spot_checked(graph, n, heads, dim, backend):
    """Some rows of the result against the reference."""
    chance = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, generator=chance) for _ in range(3))
    out = attend(q, k, v, graph, backend=backend)
    for row in [*torch.randint(0, n, (8,), generator=chance).tolist(), 0, n - 1]:
        one = at_size(graph, n, n)[0]
        heard = torch.cat([torch.arange(a, b) for a, b in one.spans(row, row + 1, n, n)])
        heard = heard[one.contains(torch.tensor([row]), heard)]
        scores = (k[0, :, heard].double() @ q[0, :, row, :, None].double())[..., 0] * dim**-0.5
        right = (scores.softmax(-1)[..., None] * v[0, :, heard].double()).sum(1)
        assert (out[0, :, row] - right).abs().max() <= 2e-6 * right.abs().max() + 1e-7


@pytest.mark.parametrize("backend", ["tiles", "rows"])
def test_beyond_two_to_the_31_pairs(backend):
    spot_checked(Window(7, 0) | Prefix(2), 70_000, 2, 8, backend)  # N · M = 4.9e9


def test_beyond_two_to_the_31_edges_times_heads():
    spot_checked(Window(8191, 0), 66_000, 5, 1, "tiles")  # E · H = 2.5e9, N · M = 4.4e9


PEAK = """
import ctypes, sys, torch
from attngraph import Prefix, Random, Window, attend
torch.set_num_threads(1)
n, heads, dim, backend = 131_072, 2, 16, sys.argv[1]
graph = {"tiles": Window(256, 0) | Prefix(4), "rows": Window(60, 0) | Random(4)}[backend]
q, k, v = (torch.randn(1, heads, n, dim, requires_grad=True) for _ in range(3))
small = [side[:, :, :4096].detach().requires_grad_() for side in (q, k, v)]
attend(*small, graph, backend=backend).sum().backward()  # what is loaded and compiled once
attend(q, k, v, graph, backend=backend).sum().backward()  # the plan is made, with its transpose
q.grad = k.grad = v.grad = None
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
def high():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = high()
attend(q, k, v, graph, backend=backend).sum().backward()
print(high() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("backend", ["tiles", pytest.param("rows", marks=pytest.mark.slow)])
def test_nothing_of_size_n_squared_or_edges_times_heads_is_allocated(backend):
    """At N = 131,072: N² is 16 GiB of bytes, E · H · D 1 to 4 GiB of float32; what is taken is a few times q."""
    done = subprocess.run([sys.executable, "-c", PEAK, backend], capture_output=True, text=True, check=True)
    mib_of_q = 131_072 * 2 * 16 * 4 / 2**20
    edges_mib = {"tiles": 131_072 * 257, "rows": 131_072 * 65}[backend] * 2 * 16 * 4 / 2**20
    assert float(done.stdout) < 24 * mib_of_q < edges_mib / 2


# ----------------------------------------------------------------------------------- found by a stranger's trial


def test_a_plan_of_a_dense_part_drops_weights():
    q, k, v = tensors(64, 64)
    made = plan(Window(5, 0), 64, 64, heads=4, head_dim=4, backend="dense")
    assert not torch.equal(attend(q, k, v, made, dropout_p=0.9), attend(q, k, v, made))
    tiles = plan(Window(5, 0), 64, 64, heads=4, head_dim=4, backend="tiles")
    assert not torch.equal(attend(q, k, v, tiles, dropout_p=0.9), attend(q, k, v, tiles))


@pytest.mark.parametrize(
    "copied",
    [
        lambda made: pickle.loads(pickle.dumps(made)),
        copy.deepcopy,
        copy.copy,
        lambda made: dataclasses.replace(made, graph=Window(9, 0), parts=plan(Window(9, 0), 64, 64, heads=4).parts),
    ],
    ids=["pickle", "deepcopy", "copy", "replace"],
)
def test_copies_of_a_plan_do_not_take_its_place(copied):
    q, k, v = tensors(64, 64)
    made = plan(Random(3), 64, 64, heads=4, head_dim=4, backend="rows")
    out = attend(q, k, v, made)
    other = copied(made)
    attend(q, k, v, other)
    del other
    gc.collect()
    wanted = torch.autograd.grad(attend(q, k, v, Random(3), backend="edges").square().sum(), q)
    assert_close(torch.autograd.grad(out.square().sum(), q), wanted)


@pytest.mark.parametrize("backend", ["auto", "tiles", "rows"])
def test_forward_mode_is_right_or_an_error(backend):
    q, k, v = (side.detach() for side in tensors(300, 300))

    def tangent(backend):
        return torch.func.jvp(lambda x: attend(x, k, v, Window(5, 0), backend=backend), (q,), (q,))[1]

    if backend == "auto":
        assert_close(tangent("auto"), tangent("edges"))
    else:
        with pytest.raises(ValueError, match="forward-mode"):
            tangent(backend)


def test_a_scale_is_a_number():
    with pytest.raises(TypeError, match="multiply q"):
        attend(*tensors(9, 9), Causal(), scale=torch.tensor(0.3, requires_grad=True))


def test_a_bias_lies_where_the_queries_lie():
    q, k, v = tensors(9, 9)
    for values in (torch.ones(45, device="meta"), torch.ones(45, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="q's device, cpu"):
            attend(q, k, v, Causal(), bias=EdgeBias.sorted(values), backend="rows")


@pytest.mark.parametrize("backend", ["dense", "tiles", "rows"])
def test_vectors_of_no_numbers_have_scores_of_0(backend):
    nothing, v = torch.ones(1, 1, 5, 0), torch.rand(1, 1, 5, 3)
    found, wanted = (
        attend(nothing, nothing, v, Window(2, 0), backend=name, return_lse=True) for name in (backend, "edges")
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("backend", ["tiles", "rows"])
def test_a_bias_of_queries_stays_in_the_graph(backend):
    q, k, v = (side.detach() for side in tensors(30, 30))
    bias = torch.randn(30, 1, dtype=q.dtype, requires_grad=True)
    attend(q, k, v, Window(5, 0), bias=bias, backend=backend).sum().backward()
    assert bias.grad.abs().max() == 0
    with torch.no_grad():
        bias[3] = torch.nan
    assert attend(q, k, v, Window(5, 0), bias=bias, backend=backend)[:, :, 3].isnan().all()


def test_a_bias_may_be_more_exact_than_the_queries():
    q, k, v = (side.detach().float() for side in tensors(300, 300))
    for backend in ("tiles", "rows"):
        out, lse = attend(
            q, k, v, Window(5, 0), bias=Alibi(torch.ones(4, dtype=torch.float64)), backend=backend, return_lse=True
        )
        assert out.dtype == lse.dtype == torch.float32


def test_a_compiled_function_takes_a_plan():
    q, k, v = (side.detach() for side in tensors(300, 300))
    made = plan(MIXED, 300, 300, heads=4, head_dim=4, costs=CUT)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, made), fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v), attend(q, k, v, made))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads"),
        ({"heads": 2.5}, "heads"),
        ({"head_dim": -4}, "head_dim"),
        ({"bias": "alibi"}, "bias must be one of"),
        ({"reorder": "no"}, "reorder"),
        ({"costs": "default"}, "Costs"),
    ],
)
def test_a_plan_checks_what_it_is_given(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan(Causal(), 9, 9, **options)
    with pytest.raises(TypeError, match="graph must be a Graph"):
        plan("Causal()", 9, 9)
    with pytest.raises(ValueError, match="tile_s_per_pair_dim of Costs"):
        Costs(tile_s_per_pair_dim=float("nan"))


def test_keys_that_do_not_stay_near_are_fetched_by_most_edges():
    """With 600 keys a query, in a band the next one finds them near; scattered over 2,048, they are a cache away."""
    band, n = Window(300, 300), 2048
    edges = band.num_edges(n, n)
    pairs = torch.randperm(n * n, generator=torch.Generator().manual_seed(0))[:edges]
    scattered = EdgeList(torch.stack([pairs % n, pairs // n]), size=n)
    near, far = (plan(graph, n, n, backend="rows", costs=Costs()).seconds for graph in (band, scattered))
    assert far > 1.5 * near


def test_a_mask_costs_a_call():
    """However few the pairs: else the smallest graphs were dense, which is slower than their few edges."""
    assert plan(Window(1, 1), 64, 64, backend="dense", costs=Costs()).seconds > Costs().masked_s_per_call
