"""Both kernels of tiles on a CPU equal the generic layer in float64 under every modifier, in every result."""

import pytest
import torch

from attngraph import Causal, EdgeList, Full, Prefix, Random, Window
from attngraph.graph.base import at_size
from attngraph.kernels.contract import Dropout, Modifiers, ScoreBias, Transform
from attngraph.kernels.edge import edges
from attngraph.kernels.scoring import LeakyReLU, SoftCap
from attngraph.kernels.torch import tiles as tiles_torch
from attngraph.planning.layouts.tiles import Tiles, tabulate

try:
    from attngraph.kernels.cpu import tiles as tiles_numba
except ImportError:
    tiles_numba = None

needs_numba = pytest.mark.skipif(tiles_numba is None, reason="Numba is not there")
KERNELS = {
    "numba": (tiles_numba, torch.float32),
    "numba float64": (tiles_numba, torch.float64),
    "torch": (tiles_torch, torch.float64),
}
chance = torch.Generator().manual_seed(0)
SOME_EDGES = torch.stack([torch.randint(size, (900,), generator=chance) for size in (150, 200)]).unique(dim=1)
GRAPHS = [
    (Causal() & (Window(100, 0) | Prefix(4)), 300, 300),
    (Window(20, 30) | Random(3), 130, 200),
    (EdgeList(SOME_EDGES, (200, 150)), 200, 150),
    (Full(), 70, 140),
]
HEADS = [(1, 2, 2), (2, 4, 2)]  # B, H, Hkv
every_kernel = pytest.mark.parametrize(
    "kernel", [*(pytest.param(name, marks=needs_numba) for name in ("numba", "numba float64")), "torch"]
)
DROPOUT = Dropout(0.3, torch.tensor((5 << 32) + 0x9ABCDEF0))

SINGLE = [
    {},
    {"dropout": True},
    *({"bias": shape} for shape in ("offset", "offset of all", "edge", "edge of all", "edge of batch")),
    *({"bias": shape} for shape in ("dense", "dense of all", "keys", "keys of all", "masked", "expanded")),
    {"transform": Transform("softcap", 1.5)},
    *({"transform": Transform("leaky_relu", slope)} for slope in (0.2, 0.0, -0.5)),
    *({"normalize": name} for name in ("sigmoid", "none", "relu", "squared_relu")),
    {"padding": True},
]
COMBINED = [
    {"padding": True, "bias": "offset", "transform": Transform("softcap", 2.0), "dropout": True},
    {"padding": True, "bias": "edge", "normalize": "sigmoid", "dropout": True},
    {
        "padding": True,
        "bias": "dense",
        "transform": Transform("leaky_relu", 0.1),
        "normalize": "squared_relu",
        "dropout": True,
    },
    {"padding": True, "bias": "keys of all", "normalize": "relu", "dropout": True},
]


def layout_of(graph, n, m):
    return Tiles(n, m, tabulate(at_size(graph, n, m)[0], n, m, (64, 64)))


def tensors(heads, n, m, dims, seed=0):
    """q, k, v, and the gradients of out and lse."""
    (B, H, Hkv), (D, Dv), chance = heads, dims, torch.Generator().manual_seed(seed)
    shapes = (B, H, n, D), (B, Hkv, m, D), (B, Hkv, m, Dv), (B, H, n, Dv), (B, H, n)
    return [torch.randn(shape, generator=chance) for shape in shapes]


def bias_of(shape, B, H, n, m, num_edges):
    draw = torch.Generator().manual_seed(1)
    shapes = {
        "offset": ("offset", (H, n + m - 1)),
        "offset of all": ("offset", (1, n + m - 1)),
        "edge": ("edge", (B, H, num_edges)),
        "edge of all": ("edge", (1, 1, num_edges)),
        "edge of batch": ("edge", (1, H, num_edges)),
        "dense": ("dense", (B, H, n, m)),
        "dense of all": ("dense", (1, 1, n, m)),
        "keys": ("dense", (B, H, 1, m)),
        "keys of all": ("dense", (1, 1, 1, m)),
        "masked": ("dense", (B, 1, n, m)),
        "expanded": ("dense", (1, H, 1, m)),
    }
    kind, size = shapes[shape]
    values = torch.randn(size, generator=draw)
    if shape == "masked":
        values[torch.rand(size, generator=draw) < 0.3] = -torch.inf
        values[:, :, 5] = -torch.inf
    return ScoreBias(kind, values.expand(B, H, n, m) if shape == "expanded" else values)


def modifiers_of(case, heads, n, m, num_edges):
    B, H, _ = heads
    padding = torch.ones(B, m, dtype=torch.bool)
    padding[0, m * 4 // 5 :] = False
    padding[-1, :3] = False
    return Modifiers(
        0.3,
        bias_of(case["bias"], B, H, n, m, num_edges) if "bias" in case else None,
        padding if case.get("padding") else None,
        case.get("transform"),
        case.get("normalize", "softmax"),
        DROPOUT if case.get("dropout") else None,
    )


def results(kernel, sides, layout, modifiers, *, with_dlse=True):
    """out, lse, and the gradients of q, k, v and the values of the bias, if there are any."""
    q, k, v, dout, dlse = sides
    out, lse = kernel.forward(q, k, v, layout, modifiers)
    if modifiers.normalize != "softmax":
        assert (lse == 0).all()
        with_dlse = False
    asked = modifiers.bias is not None
    dlse = dlse if with_dlse else None
    gradients = kernel.backward(q, k, v, out, lse, dout, dlse, layout, modifiers, asked)
    assert (gradients[3] is not None) == asked
    return [out, lse, *gradients[: 4 if asked else 3]]


def expected_results(sides, edge_index, modifiers, *, with_dlse=True):
    """The same by `kernels.edge`, differentiated by torch, in float64."""
    q, k, v = (side.double().requires_grad_() for side in sides[:3])
    dout, dlse = (side.double() for side in sides[3:])
    (key, query), bias, transform = edge_index, modifiers.bias, modifiers.transform
    if bias is not None:
        bias = bias._replace(values=bias.values.double().requires_grad_())
    score = "dot"
    if transform is not None:
        score = (SoftCap if transform.kind == "softcap" else LeakyReLU)(transform.value)
    out, lse, _ = edges(
        q, k, v, query, key, torch.empty(0, len(query), dtype=torch.bool),
        bias=None if bias is None else bias.over_edges(query, key, q.shape[2]),
        attention_mask=modifiers.attention_mask, scale=modifiers.scale, dropout=modifiers.dropout,
        score=score, normalize=modifiers.normalize,
    )  # fmt: skip
    loss = (out * dout).sum()
    if lse is not None and with_dlse:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()
    inputs = [q, k, v] if bias is None else [q, k, v, bias.values]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), torch.zeros(q.shape[:3]).double() if lse is None else lse.detach(), *gradients]


def largest(part):
    finite = part[part.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def assert_close(found, expected, tolerance):
    """Each to its own largest value."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * max(largest(other), 1e-3))


def check(kernel, case, graph, n, m, heads, dims, *, with_dlse=True):
    kernel, dtype = KERNELS[kernel]
    edge_index = at_size(graph, n, m)[0].edge_index(n, m)
    modifiers, layout = modifiers_of(case, heads, n, m, edge_index.shape[1]), layout_of(graph, n, m)
    sides = tensors(heads, n, m, dims)
    expected = expected_results(sides, edge_index, modifiers, with_dlse=with_dlse)
    sides = [side.to(dtype) for side in sides]
    if modifiers.bias is not None:
        modifiers = modifiers._replace(bias=modifiers.bias._replace(values=modifiers.bias.values.to(dtype)))
    found = results(kernel, sides, layout, modifiers, with_dlse=with_dlse)
    assert all(one.dtype == dtype for one in found)
    assert_close(found, expected, 5e-6 if dtype == torch.float32 else 1e-12)
    return found


def name(case):
    return (
        "-".join(
            str(f"{x.kind} {x.value}" if isinstance(x, Transform) else x)
            for pair in case.items()
            for x in pair
            if x is not True
        )
        or "plain"
    )


@pytest.mark.share(5)
@every_kernel
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("case", [*SINGLE, *COMBINED], ids=name)
def test_each_modifier_equals_the_generic_layer(case, heads, kernel):
    graph, n, m = GRAPHS[0]
    check(kernel, case, graph, n, m, heads, (32, 16))


@every_kernel
@pytest.mark.parametrize(("graph", "n", "m"), GRAPHS[1:], ids=lambda x: getattr(x, "text", str(x))[:40])
@pytest.mark.parametrize("case", [SINGLE[1], *COMBINED], ids=name)
def test_modifiers_together_on_every_graph(case, graph, n, m, kernel):
    check(kernel, case, graph, n, m, HEADS[1], (5, 3), with_dlse=False)


@every_kernel
def test_heads_drop_by_the_numbers_they_are_given(kernel):
    kernel, dtype = KERNELS[kernel]
    (graph, n, m), heads = GRAPHS[0], torch.tensor([7, 2, 9, 4])
    layout, sides = layout_of(graph, n, m), [side.to(dtype) for side in tensors((1, 10, 10), n, m, (16, 16))]
    whole = results(kernel, sides, layout, Modifiers(0.3, dropout=DROPOUT))
    chosen = [side[:, heads] for side in sides]
    found = results(kernel, chosen, layout, Modifiers(0.3, dropout=DROPOUT._replace(heads=heads)))
    assert_close(found, [one[:, heads].double() for one in whole], 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.share(3)
@needs_numba
@pytest.mark.parametrize("case", [SINGLE[1], *COMBINED, *SINGLE[2:13]], ids=name)
def test_any_number_of_threads_gives_the_same_bits(case, monkeypatch):
    monkeypatch.setattr(tiles_numba, "MAX_JOB_TILES", 3)
    graph, n, m = GRAPHS[0]
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(check("numba", case, graph, n, m, HEADS[1], (16, 16)))
    finally:
        torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
