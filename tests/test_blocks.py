"""Blocks of keys that single queries choose run by their own kernel: it equals the reference, forward and in every
gradient, bit for bit by any number of threads, without arrays of all visits, and nothing looks at all their pairs."""

import tracemalloc

import pytest
import torch
from torch.testing import assert_close

from attngraph import Blocks, BlockTopK, Causal, EdgeList, TopK, attend, plan
from attngraph.graph import dynamic
from attngraph.graph.base import at_size
from attngraph.planning.backends import chooser_for
from attngraph.planning.edge_set import EdgeSet
from attngraph.planning.layouts.blocks import Blocks as Layout

pytest.importorskip("numba")
from attngraph.kernels.cpu import blocks, choosing

CASES = [
    # N, B, H, Hkv, graph
    (64, 1, 1, 1, BlockTopK(64, 2)),
    (300, 2, 4, 2, BlockTopK(64, 2)),
    (500, 1, 2, 1, BlockTopK(128, 2, 2)),
    (333, 2, 2, 2, BlockTopK(64, 3, 16, causal=False)),
    (256, 3, 1, 1, BlockTopK(128, 1, causal=False)),
    (450, 1, 3, 3, BlockTopK(64, 4, 2)),
    (1, 1, 1, 1, BlockTopK(64, 4)),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[:4]} {case[4]}")
TOLERANCES = {torch.float32: 5e-6, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def sides(N, B, H, Hkv, dtype=torch.float64, dims=(20, 13), seed=0, M=None):
    chance = torch.Generator().manual_seed(seed)
    shapes = (H, N, dims[0]), (Hkv, M or N, dims[0]), (Hkv, M or N, dims[1])
    return [torch.randn(B, *shape, dtype=dtype, generator=chance).requires_grad_() for shape in shapes]


def results(q, k, v, graph, backend, seed=1, **options):
    """out, lse and the gradients of q, k and v by both."""
    chance = torch.Generator().manual_seed(seed)
    out, lse = attend(q, k, v, graph, backend=backend, return_lse=True, **options)
    douts = [torch.randn(x.shape, dtype=q.dtype, generator=chance) for x in (out, lse)]
    heard = lse != -torch.inf
    return out, lse, *torch.autograd.grad([out, lse[heard]], [q, k, v], [douts[0], douts[1][heard]])


@cases
def test_it_equals_the_reference(case):
    *sizes, graph = case
    q, k, v = sides(*sizes)
    found, expected = results(q, k, v, graph, "blocks"), results(q, k, v, graph.resolve(q, k), "reference")
    assert_close(found[:2], expected[:2], rtol=0, atol=1e-12)
    assert_close(found[2:], expected[2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_it_equals_the_reference_in_float32(causal):
    q, k, v = sides(400, 2, 2, 2, torch.float32, dims=(64, 64))
    graph = BlockTopK(64, 2, causal=causal)
    found, expected = results(q, k, v, graph, "blocks"), results(q, k, v, graph.resolve(q, k), "reference")
    assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_with_padding_and_a_scale(scale):
    q, k, v = sides(300, 3, 2, 2)
    mask = torch.arange(300) < torch.tensor([[300], [150], [64]])
    graph = BlockTopK(64, 3)
    options = {"attention_mask": mask, "scale": scale}
    found = results(q, k, v, graph, "blocks", **options)
    expected = results(q, k, v, graph.resolve(q, k, mask), "reference", **options)
    assert_close(found, expected, rtol=0, atol=1e-10)


GRAPHS = [  # (n, m) and blocks that were chosen by hand: nobody's, keys after the query, borders, other numbers of keys
    (200, 200, [(0, 0), (3, 1), (3, 0), (60, 2), (150, 2), (150, 3), (199, 0)], (1, 64)),
    (200, 333, [(0, 4), (1, 5), (2, 0), (66, 3)], (3, 64)),
    (70, 300, [(0, 0), (0, 2), (69, 1)], (1, 128)),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "pairs", "block"), GRAPHS)
def test_blocks_that_were_given(n, m, pairs, block, causal):
    query, key = torch.tensor(pairs).T
    graph = Blocks(EdgeList(torch.stack([key, query]), (-(-n // block[0]), -(-m // block[1]))), block, n, m)
    graph = graph & Causal() if causal else graph
    q, k, v = sides(n, 2, 4, 2, M=m)
    found, expected = (results(q, k, v, graph, backend) for backend in ("blocks", "reference"))
    assert (expected[1] == -torch.inf).any()
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert plan(graph, n, m, backend="blocks").edges == graph.num_edges(n, m) == int(graph.mask(n, m).sum())


@cases
def test_any_number_of_threads_gives_the_same_bits(case):
    *sizes, graph = case
    q, k, v = sides(*sizes, torch.float32)
    runs = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results(q, k, v, graph, "blocks"))
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_one_entry_is_cut_into_jobs_of_queries_and_of_keys(monkeypatch):
    q, k, v = sides(700, 1, 1, 1)
    graph, jobs = BlockTopK(64, 3), []
    for name in ("forward_part", "backward_part"):
        run = getattr(blocks, name)
        counted = lambda count, *rest, run=run: (jobs.append(count), run(count, *rest))  # noqa: E731
        monkeypatch.setattr(blocks, name, counted)
    torch.set_num_threads(2)
    found = results(q, k, v, graph, "blocks")
    assert jobs == [2, 8, 8]
    torch.set_num_threads(1)
    assert all(map(torch.equal, found, results(q, k, v, graph, "blocks")))
    assert jobs[3:] == [1, 1]


def test_a_nan_in_a_query_that_is_the_last_of_a_tile_reaches_no_other_tile():
    q, k, v = sides(256, 1, 1, 1)
    graph = BlockTopK(64, 1)  # each hears its own block
    clean = attend(q, k, v, graph, backend="blocks")
    with torch.no_grad():
        q[0, 0, 63] = torch.nan
    found = attend(q, k, v, graph, backend="blocks")
    assert torch.equal(found[:, :, 64:], clean[:, :, 64:])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_threads_choose_alike_in_every_mode_of_torch(mode):
    q, k, v = sides(900, 1, 2, 1, torch.float32)
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with mode():
            runs.append(attend(q, k, v, BlockTopK(64, 3)))
    assert torch.equal(*runs)


def test_heads_that_chose_run_by_blocks_one_after_the_other():
    q, k, v = sides(2048, 1, 2, 1)
    graph = BlockTopK(64, 3).resolve(q, k)
    assert {part.backend.name for part in plan(graph, heads=2).parts} == {"blocks"}
    found, expected = results(q, k, v, graph, "auto"), results(q, k, v, graph, "reference")
    assert_close(found, expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------- planning


def test_few_queries_run_by_blocks_and_whole_tiles_of_them_by_tiles():
    q, k, _ = sides(4096, 1, 1, 1)
    for queries, backend in ((1, "blocks"), (16, "blocks"), (64, "tiles")):
        made = plan(BlockTopK(64, 2, queries).resolve(q, k), heads=8)
        assert [part.backend.name for part in made.parts] == [backend]
        assert "blocks (numba)" in made.explain()
    assert "are whole tiles" in made.candidates["blocks (numba)"]
    assert "is faster" in plan(BlockTopK(64, 2).resolve(q, k)).candidates["rows (numba)"]


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"score": "dot", "normalize": "sigmoid"}], ids=str)
def test_no_pair_is_looked_at(options, monkeypatch):
    q, k, v = sides(2048, 1, 2, 2, torch.float32)

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(Blocks, "contains", fail)
    monkeypatch.setattr(Blocks, "_classify_boxes", fail)
    assert attend(q, k, v, BlockTopK(64, 4), **options).isfinite().all()


def test_other_options_run_edge_by_edge():
    q, k, v = sides(300, 2, 2, 1)
    graph = BlockTopK(64, 2, 2)
    for options in ({"normalize": "sigmoid"}, {"score": "dot", "normalize": "relu"}):
        found = attend(q, k, v, graph, **options)
        expected = attend(q, k, v, graph.resolve(q, k), backend="reference", **options)
        assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [Causal(), Blocks(Causal(), 64), Blocks(EdgeList([[0], [0]], 20), 16)], ids=str)
def test_it_says_which_graphs_it_runs(graph):
    q, k, v = sides(320, 1, 1, 1)
    with pytest.raises(ValueError, match=r"backend='blocks' can't run .*: the graph is not Blocks of an EdgeList"):
        attend(q, k, v, graph, backend="blocks")


@pytest.mark.parametrize("options", [{"dropout_p": 0.1}, {"normalize": "sigmoid"}, {"score": "additive"}], ids=str)
def test_it_says_which_calls_it_runs(options):
    q, k, v = sides(128, 1, 1, 1)
    options = {**options, "score": "dot"} if options.get("score") == "additive" else options
    if "score" in options:
        options["bias"] = torch.zeros(128, 128, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend='blocks' can't run this call"):
        attend(q, k, v, Blocks(EdgeList([[0], [0]], (128, 2)), (1, 64)), backend="blocks", **options)


@pytest.mark.parametrize("queries", [1, 2, 16, 64, 100])
@pytest.mark.parametrize(("n", "m"), [(200, 200), (200, 300), (300, 128), (256, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_are_counted_and_visits_listed(queries, n, m, causal):
    shape = -(-n // queries), -(-m // 64)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    graph = Blocks(EdgeList(mask.nonzero().T.flip(0), shape), (queries, 64), n, m)
    graph = graph & Causal() if causal else graph
    edges = EdgeSet(at_size(graph, n, m)[0], n, m)
    assert edges.blocks is not None
    assert edges.count == int(graph.mask(n, m).sum())
    layout, heard = Layout.of(edges.blocks), torch.zeros(n, m, dtype=torch.bool)
    for block in range(layout.num_blocks):
        visits = layout.query[layout.start[block] : layout.start[block + 1]]
        assert (visits[1:] > visits[:-1]).all()
        heard[visits.long(), block * 64 : block * 64 + 64] = True
    assert torch.equal(heard & Causal().mask(n, m) if causal else heard, graph.mask(n, m))


def test_the_edges_of_some_queries_are_those_of_their_blocks():
    mask = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    graph = Blocks(EdgeList(mask.nonzero().T.flip(0), (40, 5)), (3, 64), 118, 300)
    whole = graph.mask(118, 300)
    for start, stop in ((0, 118), (4, 4), (5, 90), (117, 118)):
        query, key = graph._edges_of_rows(start, stop, 118, 300)
        assert torch.equal(torch.stack([query, key], 1), whole[start:stop].nonzero())


# ------------------------------------------------------------------------------------------ memory and choosing


def test_no_array_has_all_visits_times_a_dimension():
    q, k, v = sides(4096, 1, 1, 1, torch.float32, dims=(64, 64))
    graph = BlockTopK(64, 8)
    attend(q, k, v, graph).sum().backward()
    tracemalloc.start()  # NumPy's arrays, in which kernels have their results
    attend(q, k, v, graph).sum().backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * q.nbytes  # 8 · 64 visits · D would be 8 times as much


@pytest.mark.parametrize("k", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [16, 17, 100, 700])
def test_the_largest_scores_are_found(k, dtype, width):
    scores = torch.randn(3, 50, width, dtype=dtype, generator=torch.Generator().manual_seed(k))
    scores[:, :10, k + 3 :] = scores[:, 3:5, k - 1 :] = scores[0, 0] = -torch.inf
    scores[1, 20, 7] = torch.inf
    assert torch.equal(choosing.largest(scores, k), dynamic.largest(scores, k))


def test_of_equal_scores_the_first_are_chosen():
    scores = torch.randint(5, (200, 40), generator=torch.Generator().manual_seed(0)).float()
    found = choosing.largest(scores, 8)
    assert torch.equal(found, scores.sort(stable=True, descending=True).indices[:, :8].sort().values)


def test_both_ways_of_finding_scores_choose_alike():
    q, k, _ = sides(900, 2, 2, 1)
    for graph in (BlockTopK(64, 3), BlockTopK(64, 3, 4, causal=False), TopK(5) & Causal()):
        folded = dynamic.Folded.of(graph, q, k, None, chooser_for(q)).graph
        assert folded == dynamic.Folded.of(graph, q, k, None, dynamic.IN_TORCH).graph
