"""One compiled program serves all graphs of a kind, whoever holds them, forward and backward."""

import gc

import pytest
import torch
from graphs import GRAPHS
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from attngraph import (
    Additive,
    Alibi,
    Batched,
    Beside,
    Causal,
    Chunks,
    Disjoint,
    Documents,
    EdgeBias,
    EdgeList,
    Full,
    Graph,
    Identity,
    PerHead,
    Prefix,
    Random,
    SoftCap,
    Tree,
    Window,
    attend,
    cache,
    from_function,
    plan,
)
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

N = 24
slow = pytest.mark.nightly


class Ring(Graph):
    step: int

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % 7 == self.step


def listed(seed, n=N, m=N, edges=60):
    chance = torch.Generator().manual_seed(seed)
    return EdgeList(torch.stack([torch.randint(side, (edges,), generator=chance) for side in (m, n)]), (n, m))


def documents(seed, n=N):
    cuts = torch.randperm(n - 1, generator=torch.Generator().manual_seed(seed))[: seed % 3 + 1].add(1).sort().values
    return Documents([b - a for a, b in zip([0, *cuts.tolist()], [*cuts.tolist(), n], strict=True)])


def predicate(seed):
    return from_function(lambda i, j: (i * j) % (seed + 2) != 1)


KINDS = {
    "edges": listed,
    "documents": documents,
    "causal documents": lambda seed: Causal() & documents(seed),
    "more or fewer edges": lambda seed: listed(seed, edges=20 + 7 * seed),
    "a tree": lambda seed: Tree([-1, *((seed * i) % i if i < 9 else i // 2 for i in range(1, N))]),
    "random": lambda seed: Random(3, seed) | Identity(),
    "window": lambda seed: Causal() & Window(seed, 0),
    "a class": Ring,
    "a function": predicate,
    "side by side": lambda seed: Disjoint([listed(seed, 9, 9, 12), Causal().sized(N - 9, N - 9)]),
    "beside": lambda seed: Beside(listed(seed, N, 9, 12), Prefix(seed)),
    "heads": lambda seed: PerHead([listed(seed), Ring(seed), Causal() & Window(seed, 0), documents(seed)]),
    "hops": lambda seed: listed(seed) @ Window(1, 0),
    "complement": lambda seed: ~(listed(seed) | Chunks(seed + 1)),
}
BACKENDS = ("auto", "dense", "edges", "tiles", "rows")
TIMES = 11  # Dynamo gives up at eight


def sweep(first, second):
    """All pairs; those with the first of `second`, or of `first`, run in make test."""
    quick = lambda a, b: b == second[0] or a == first[0]  # noqa: E731
    return [pytest.param(a, b, marks=() if quick(a, b) else slow) for a in first for b in second]


def sides(n=N, m=N, heads=4, dim=4):
    chance = torch.Generator().manual_seed(n)
    shapes = (2, heads, n, dim), (2, 2, m, dim), (2, 2, m, dim)
    return [torch.randn(shape, dtype=torch.float64, generator=chance).requires_grad_() for shape in shapes]


def compiled(function, **options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def same(found, expected, inputs):
    """Results, and the gradients of what they were made of."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if found.dtype == torch.float32 else {}
    assert_close(found, expected, **tolerance)
    gradients = [torch.autograd.grad(out.square().sum() + 0 * sum(side.sum() for side in inputs), inputs)
                 for out in (found, expected)]  # fmt: skip
    assert_close(*gradients, **tolerance)


@pytest.mark.parametrize(("kind", "backend"), sweep([*KINDS], BACKENDS))
def test_one_program_for_all_graphs_of_a_kind(kind, backend):
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph, backend=backend))
    q, k, v = sides()
    for seed in range(1, TIMES):
        graph = KINDS[kind](seed)
        same(program(q, k, v, graph), attend(q, k, v, graph, backend="edges"), (q, k, v))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("kind", "dropout_p"), [("edges", 0.0), *(pytest.param(kind, p, marks=slow) for kind in KINDS for p in (0.0, 1e-9))]
)
def test_also_for_graphs_that_a_model_holds_for_its_layers(kind, dropout_p):
    class Layers(torch.nn.Module):
        def forward(self, q, k, v):
            for graph in self.graphs:
                q = q + attend(q, k, v, graph, dropout_p=dropout_p)
            return q

    model = Layers()
    program, counter = compiled(model)
    q, k, v = sides()
    for seed in range(1, TIMES):
        model.graphs = [KINDS[kind](seed), KINDS[kind](seed + TIMES)]
        same(program(q, k, v), model(q, k, v), (q, k, v))
    assert counter.frame_count <= (3 if dropout_p else 1)


OPTIONS = {
    "dropout": {"dropout_p": 0.3},
    "normalize": {"normalize": "sigmoid"},
    "bias": {"bias": Alibi.geometric(4)},
    "all that kernels fuse": {
        "bias": Alibi.geometric(4), "dropout_p": 0.3, "score": SoftCap(2.0), "normalize": "squared_relu",
        "attention_mask": torch.arange(N) < torch.tensor([[N], [N - 3]]),
    },
    "sinks": {"sinks": torch.ones(4, dtype=torch.float64)},
    "additive": {"score": Additive(torch.rand(4, 4, dtype=torch.float64)), "dropout_p": 0.3},
    "functions": {"score": lambda q_i, k_j: -(q_i - k_j).square().sum(-1), "normalize": torch.nn.functional.silu},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), sweep(["edges", "causal documents", "heads"], [*OPTIONS]))
def test_also_with_options_that_one_backend_alone_has(kind, options):
    options = OPTIONS[options]
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph, **options))
    q, k, v = sides()
    for seed in range(1, TIMES):
        graph = KINDS[kind](seed)
        torch.manual_seed(seed)
        found = program(q, k, v, graph)
        torch.manual_seed(seed)
        same(found, attend(q, k, v, graph, **options), (q, k, v))
    assert counter.frame_count <= 2  # once more for an EdgeList of another length


@pytest.mark.parametrize("how", [None, "mean", "entropy", "received"])
def test_also_for_weights(how):
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph, return_weights=True, reduce=how)[1])
    q, k, v = sides()
    for seed in range(1, 5):
        graph = documents(seed)
        same(program(q, k, v, graph), attend(q, k, v, graph, return_weights=True, reduce=how)[1], (q, k, v))
    assert counter.frame_count == 1


def test_also_for_a_graph_of_each_entry_and_for_lengths():
    program, counter = compiled(lambda q, k, v, graph, mask: attend(q, k, v, graph, attention_mask=mask))
    q, k, v = sides()
    for seed in range(1, TIMES):
        graph = Batched([listed(seed), listed(seed + 1)])
        lengths = torch.tensor([N, N - seed])
        same(program(q, k, v, graph, lengths), attend(q, k, v, graph, attention_mask=lengths), (q, k, v))
    assert counter.frame_count <= 2


def test_also_with_a_value_for_each_edge():
    program, counter = compiled(lambda q, k, v, graph, values: attend(q, k, v, graph, bias=EdgeBias.sorted(values)))
    q, k, v = sides()
    for seed in range(1, TIMES):
        graph = listed(seed)
        values = torch.rand(4, graph.num_edges(), dtype=torch.float64, requires_grad=True)
        expected = attend(q, k, v, graph, bias=EdgeBias.sorted(values), backend="edges")
        same(program(q, k, v, graph, values), expected, (q, k, v, values))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_also_in_float32(backend):
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph, backend=backend))
    q, k, v = (side.float().detach().requires_grad_() for side in sides())
    for seed in range(1, 5):
        same(program(q, k, v, listed(seed)), attend(q, k, v, listed(seed), backend="edges"), (q, k, v))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["documents", "edges", "heads"])
def test_once_more_where_sizes_change(kind):
    graphs = {
        "documents": lambda n: documents(n, n),
        "edges": lambda n: listed(n, n, n),
        "heads": lambda n: PerHead([listed(n, n, n)] * 2 + [documents(n, n)] * 2),
    }
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph))
    for n in range(10, 10 + TIMES):
        graph, (q, k, v) = graphs[kind](n), sides(n, n)
        same(program(q, k, v, graph), attend(q, k, v, graph, backend="edges"), (q, k, v))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["auto", "edges", "tiles"])
def test_also_for_plans(backend):
    program, counter = compiled(lambda q, k, v, made: attend(q, k, v, made))
    q, k, v = sides()
    for seed in range(1, TIMES):
        made = plan(listed(seed), N, N, heads=4, dtype=torch.float64, backend="rows" if backend == "edges" else backend)
        same(program(q, k, v, made), attend(q, k, v, listed(seed), backend="edges"), (q, k, v))
    assert counter.frame_count == 1


def test_also_where_the_program_combines_them():
    def both(q, k, v, one, other):
        return attend(q, k, v, (one & ~other | Window(1, 1)).rows(2, N - 2))

    program, counter = compiled(both)
    q, k, v = sides(N - 4)
    k, v = sides()[1:]
    for seed in range(1, TIMES):
        pair = listed(seed), Ring(seed)
        same(program(q, k, v, *pair), both(q, k, v, *pair), (q, k, v))
    assert counter.frame_count == 1


INSIDE = {
    "window": lambda x: Causal() & Window(3, 0, dilation=2),
    "random": lambda x: Random(3, seed=2) | Prefix(2),
    "documents": lambda x: Documents([9, N - 9]),
    "heads": lambda x: PerHead([Causal(), x, ~x, Full()]),
    "beside": lambda x: Beside(x, Full()).rows(0, N).T.rows(0, N),
    "listed": lambda x: x - Identity(),
    "global nodes": lambda x: Window(2, 2).with_global_nodes(3) ^ x,
}


@pytest.mark.parametrize("kind", INSIDE)
def test_also_where_a_graph_is_made_in_the_program(kind):
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, INSIDE[kind](graph)))
    q, k, v = sides()
    for seed in range(1, TIMES):
        same(program(q, k, v, listed(seed)), attend(q, k, v, INSIDE[kind](listed(seed)), backend="edges"), (q, k, v))
    assert counter.frame_count == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_also_with_activation_checkpoints(reentrant):
    def layer(q, k, v, graph):
        return checkpoint(lambda q, k, v: attend(q, k, v, graph), q, k, v, use_reentrant=reentrant)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    program = torch.compile(layer, backend=counter)
    q, k, v = sides()
    for seed in range(1, TIMES):
        same(program(q, k, v, listed(seed)), attend(q, k, v, listed(seed), backend="edges"), (q, k, v))
    assert counter.frame_count <= 2


def test_a_backward_pass_after_all_graphs_are_gone():
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph))
    q, k, v = sides()
    outs = [program(q, k, v, listed(seed)) for seed in range(30)]
    gc.collect()
    for seed in range(30):
        same(outs[seed], attend(q, k, v, listed(seed), backend="edges"), (q, k, v))
    assert counter.frame_count == 1


def test_what_programs_hold_is_bounded_and_equal_graphs_are_one():
    cache.clear()
    program, _ = compiled(lambda q, k, v, graph: attend(q, k, v, graph))
    q, k, v = (side.detach() for side in sides(8, 8))
    first = listed(0, 8, 8)
    for _ in range(20):
        program(q, k, v, listed(0, 8, 8))
    assert cache.cache_info()["compiled programs"].entries == 1
    assert cache.cache_info()["plans"].entries == 1
    assert first._handle is listed(0, 8, 8)._handle
    for seed in range(1200):
        program(q, k, v, listed(seed, 8, 8))
    for name, info in cache.cache_info().items():
        assert info.entries <= info.max_entries, name


def test_a_graph_that_does_not_fit_is_told_when_the_program_runs():
    program, _ = compiled(lambda q, k, v, graph: attend(q, k, v, graph))
    q, k, v = sides()
    program(q, k, v, listed(0))
    for wrong in (listed(0, N + 1, N), listed(0, N, N + 1), Disjoint([Full().sized(2, 2), Causal().sized(2, 2)])):
        with pytest.raises(ValueError, match=r"must have the same number of (query|key) nodes"):
            program(q, k, v, wrong)
    with pytest.raises(ValueError, match="the plan was made for 5 queries"):
        program(q, k, v, plan(Causal() & Window(2, 0), 5, N, heads=4))
    with pytest.raises(Exception, match="graph has 5 query nodes but q has 24"):
        program(q, k, v, Causal().sized(5, 5))


@pytest.mark.parametrize("mode", ["fake", "inference", "meta", "grad", "vmap"])
def test_a_graph_made_under_any_mode_or_transform_serves_a_program(mode):
    made = []

    def make(x):
        made.extend(Window(width, 0) & Causal() for width in range(300))  # more than one block of handles
        return x.sum()

    match mode:
        case "grad":
            torch.func.grad(make)(torch.ones(2))
        case "vmap":
            torch.vmap(make)(torch.ones(2, 2))
        case _:
            modes = {"fake": FakeTensorMode(), "inference": torch.inference_mode(), "meta": torch.device("meta")}
            with modes[mode]:
                make(torch.ones(2))
    program, counter = compiled(lambda q, k, v, graph: attend(q, k, v, graph))
    q, k, v = sides()
    for graph in made[::50]:
        same(program(q, k, v, graph), attend(q, k, v, graph, backend="edges"), (q, k, v))
    assert counter.frame_count == 1


@slow
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_every_graph_runs_in_a_program(case):
    heads = case.graph.heads or 4
    for backend in BACKENDS:
        program, _ = compiled(lambda q, k, v, backend=backend: attend(q, k, v, case.graph, backend=backend))
        q, k, v = sides(case.n, case.m, heads)
        same(program(q, k, v), attend(q, k, v, case.graph, backend="reference"), (q, k, v))


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative", "learned"])
@pytest.mark.parametrize("changes", ["documents", "edges", "lengths"])
def test_one_program_for_a_model_whatever_tells_nodes_their_places(position, changes):
    torch._dynamo.reset()
    config = TransformerConfig(embed_dim=16, num_layers=1, num_heads=2, position=position, max_length=50)
    model, counter = GPT(config, 30), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(10):
        tokens, graph = torch.randint(30, (1, 40 - step if changes == "lengths" else 40)), Causal()
        if changes == "documents":
            graph = Causal() & Documents([10 + step, 30 - step])
        elif changes == "edges":
            graph = EdgeList(torch.randint(0, 40, (2, 99 + step)), 40)
        assert_close(compiled(tokens, graph), model(tokens, graph))
    assert counter.frame_count <= (2 if changes == "lengths" else 1)
