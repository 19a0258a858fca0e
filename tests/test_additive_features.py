"""Additive scores of keys to which edges add their features: by a kernel, in every gradient as the definition says."""

import tracemalloc

import pytest
import torch
from hypothesis import given, strategies
from irregular import learned, small_pieces, some_mask  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attngraph import Additive, EdgeFeatures, EdgeList, attend, from_edge_index, plan

pytest.importorskip("numba")
ACTIVATIONS = ("tanh", "leaky_relu", "relu", torch.sigmoid)
D, DV = 6, 5


def graph_of(mask):
    return EdgeList(mask.nonzero().T.flip(0), tuple(mask.shape))


def sides(graph, batch=2, heads=4, key_heads=2, F=7, entries=1):
    """q, k, v, the weight of the score, the features of the edges, K and V."""
    (n, m), edges = graph.size, graph.num_edges()
    shapes = [
        (batch, heads, n, D), (batch, key_heads, m, D), (batch, key_heads, m, DV), (heads, D),
        (entries, edges, F), (key_heads, D, F), (key_heads, DV, F),
    ]  # fmt: skip
    return [learned(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def call(inputs, graph, activation, to_value=True, **options):
    q, k, v, weight, values, to_key, of_values = inputs
    features = EdgeFeatures.sorted(values, to_key=to_key, to_value=of_values if to_value else None)
    return attend(q, k, v, graph, score=Additive(weight, activation), edge_features=features, **options)


def results(inputs, graph, activation, **options):
    """What a call returns, and the gradients of all sides."""
    found = call(inputs, graph, activation, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    loss = sum((part.masked_fill(part == -torch.inf, 0) * learned(*part.shape).to(part.dtype)).sum() for part in found)
    return found + list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def assert_close(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=tolerance)


@given(
    size=strategies.sampled_from([(13, 17), (19, 5), (1, 40), (40, 1)]),
    activation=strategies.sampled_from(ACTIVATIONS),
    shape=strategies.sampled_from([(2, 4, 2), (1, 1, 1), (3, 2, 1), (2, 4, 4)]),
    F=strategies.sampled_from([1, 3, 4, 17]),
    a_batch=strategies.booleans(),
    to_value=strategies.booleans(),
    normalize=strategies.sampled_from(["softmax", "sigmoid"]),
    scale=strategies.sampled_from([1.0, -0.4]),
)
def test_steps_equal_the_reference_in_every_gradient(size, activation, shape, F, a_batch, to_value, normalize, scale):
    graph = graph_of(some_mask(*size))
    inputs = sides(graph, *shape, F, shape[0] if a_batch else 1)
    options = {
        "to_value": to_value, "normalize": normalize, "scale": scale, "return_weights": True,
        "return_lse": normalize == "softmax",
    }  # fmt: skip
    found = results(inputs, graph, activation, backend="steps", **options)
    assert_close(found, results(inputs, graph, activation, backend="reference", **options), 1e-10)


@pytest.mark.parametrize("threads", [1, 2])
def test_hubs_are_cut_into_pieces_by_any_number_of_threads(threads):
    graph = graph_of(some_mask(120, 110))
    inputs = sides(graph)
    expected = results(inputs, graph, "leaky_relu", backend="edges")
    torch.set_num_threads(threads)
    assert_close(results(inputs, graph, "leaky_relu", backend="steps"), expected)


@pytest.mark.parametrize("how", ["mean", "entropy", "received"])
def test_reduced_weights(how):
    graph = graph_of(some_mask(23, 31))
    inputs, options = sides(graph), {"return_weights": True, "reduce": how}
    found = results(inputs, graph, "tanh", backend="steps", **options)
    assert_close(found, results(inputs, graph, "tanh", backend="edges", **options), 1e-10)


@pytest.mark.parametrize("activation", ["tanh", "leaky_relu"])
def test_gradients_have_gradients(activation):
    graph = graph_of(some_mask(9, 8))
    inputs = sides(graph)

    def second(backend):
        out = call(inputs, graph, activation, backend=backend)
        first = torch.autograd.grad(out.pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(part.pow(2).sum() for part in first), inputs)

    assert_close(second("steps"), second("edges"), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    graph = graph_of(some_mask(40, 30))
    inputs = sides(graph)
    expected = results(inputs, graph, "tanh", backend="reference")
    low = [side.detach().to(dtype).requires_grad_() for side in inputs]
    found = results(low, graph, "tanh", backend="steps")
    assert all(part.dtype == dtype for part in found)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.detach().abs().max())
        assert float((one.double() - other).detach().abs().max()) < scale * (1e-5 if dtype == torch.float32 else 0.03)


def test_a_compiled_program_runs_the_kernel(monkeypatch):
    monkeypatch.delattr("attngraph.planning.steps.streamed")
    graph = graph_of(some_mask(23, 31))
    inputs = sides(graph)
    compiled = torch.compile(lambda *inputs: call(inputs, graph, "leaky_relu"), fullgraph=True)
    for asked in (inputs, inputs[:4], inputs[5:]):
        found, expected = compiled(*inputs), call(inputs, graph, "leaky_relu")
        torch.testing.assert_close(found, expected)
        pairs = [torch.autograd.grad(out.square().sum(), asked) for out in (found, expected)]
        assert_close(*pairs, 1e-10)


def test_the_planner_has_the_kernel_run():
    many = from_edge_index(torch.randint(2000, (2, 30_000), generator=torch.Generator().manual_seed(0)), 2000)
    made = plan(many, heads=4, head_dim=32, score="additive", edge_features=16)
    assert made.in_steps
    assert "by a kernel" in made.explain()


class Largest(TorchDispatchMode):
    """The most bytes that a tensor has which an operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sizes = [part.untyped_storage().nbytes() for part in tree_leaves(found) if isinstance(part, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return found


def test_nothing_of_all_edges_and_dimensions_is_held():
    n, heads, width, F, chance = 500, 4, 32, 8, torch.Generator().manual_seed(0)
    edge_index = torch.randint(n, (2, 20_000), generator=chance).unique(dim=1)
    graph, edges = from_edge_index(edge_index, n), edge_index.shape[1]
    shapes = [(1, heads, n, width)] * 3 + [(heads, width), (edges, F), (heads, width, F), (heads, width, F)]
    inputs = [torch.randn(shape, generator=chance).requires_grad_() for shape in shapes]
    results(inputs, graph, "leaky_relu")  # kernels are compiled

    tracemalloc.start()  # NumPy's arrays, in which kernels have their results
    with Largest() as largest:
        results(inputs, graph, "leaky_relu")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    of_edges = 4 * edges * width  # bytes of vectors of all edges, of one head
    assert largest.bytes < of_edges / 2
    assert peak < of_edges
