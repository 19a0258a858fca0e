"""The compiled tile kernels equal those of torch in float64, forward and in every gradient, in float32 and float64, bit
for bit by any number of threads."""

import pytest
import torch

from attngraph import (
    Causal,
    Documents,
    EdgeList,
    Empty,
    Full,
    Global,
    Neighborhood,
    Prefix,
    Random,
    Window,
)
from attngraph.graph.base import at_size
from attngraph.kernels.contract import Modifiers
from attngraph.kernels.torch import tiles as tiles_torch
from attngraph.planning.layouts.tiles import Tiles, tabulate

pytest.importorskip("numba")
from attngraph.kernels.cpu import tiles as tiles_numba

chance = torch.Generator().manual_seed(0)
SOME_EDGES = torch.stack([torch.randint(size, (900,), generator=chance) for size in (150, 200)]).unique(dim=1)
HEADS = [(1, 2, 2), (2, 4, 2), (1, 4, 1)]  # B, H, Hkv
DIMS = [(64, 64), (5, 3), (80, 48)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13}
GRAPHS = [
    (Window(256, 0), 400, 400),
    (Window(100, 30) | Prefix(4) | Random(3), 300, 300),
    (Causal(), 200, 200),
    (Full(), 130, 70),
    (Documents([50, 3, 100, 47]), 200, 200),
    (Neighborhood((12, 12), 2), 144, 144),
    (EdgeList(SOME_EDGES, (200, 150)), 200, 150),
    (Empty(), 70, 70),
    (Global([0]), 300, 300),
    (Window(9, 0), 100, 150),
    (Window(9, 0), 150, 100),
    (Full(), 1, 1),
    (Full(), 1, 200),
]


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def layout_of(graph, n, m):
    return Tiles(n, m, tabulate(at_size(graph, n, m)[0], n, m, (64, 64)))


def tensors(heads, n, m, dims, seed=0, dtype=torch.float32):
    """q, k, v, and the gradients of out and lse."""
    (B, H, Hkv), (D, Dv), chance = heads, dims, torch.Generator().manual_seed(seed)
    shapes = (B, H, n, D), (B, Hkv, m, D), (B, Hkv, m, Dv), (B, H, n, Dv), (B, H, n)
    return [torch.randn(shape, generator=chance).to(dtype) for shape in shapes]


def results(kernel, sides, layout, *, with_dlse=True):
    """out, lse, dq, dk, dv."""
    q, k, v, dout, dlse = sides
    scale = q.shape[3] ** -0.5
    out, lse = kernel.forward(q, k, v, layout, Modifiers(scale))
    gradients = kernel.backward(q, k, v, out, lse, dout, dlse if with_dlse else None, layout, Modifiers(scale), False)
    assert gradients[3] is None
    return [out, lse, *gradients[:3]]


def largest(part):
    finite = part[part.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def assert_close(found, expected, factor=1):
    """out and lse to their own largest value, gradients to that of all: one may be what large terms leave."""
    of_gradients, tolerance = max(map(largest, expected[2:])), factor * TOLERANCES[found[0].dtype]
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        assert one.dtype == found[0].dtype
        atol = tolerance * (largest(other) if place < 2 else of_gradients)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


@pytest.mark.parametrize(("heads", "dims"), [*zip(HEADS, DIMS, strict=True), (HEADS[2], DIMS[0])], ids=str)
@pytest.mark.parametrize(("graph", "n", "m"), GRAPHS, ids=lambda x: getattr(x, "text", str(x))[:40])
@DTYPES
def test_the_kernels_equal_those_of_torch(graph, n, m, heads, dims, dtype):
    layout, sides = layout_of(graph, n, m), tensors(heads, n, m, dims, dtype=dtype)
    exact = [side.double() for side in sides]
    for with_dlse in (True, False):
        found = results(tiles_numba, sides, layout, with_dlse=with_dlse)
        assert_close(found, results(tiles_torch, exact, layout, with_dlse=with_dlse))


@pytest.mark.parametrize("graph", [Window(200, 0) | Prefix(4), Causal()], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@DTYPES
def test_any_number_of_threads_gives_the_same_bits(graph, heads, dtype, monkeypatch):
    monkeypatch.setattr(tiles_numba, "MAX_JOB_TILES", 5)
    layout, sides = layout_of(graph, 700, 700), tensors(heads, 700, 700, (64, 32), dtype=dtype)
    runs = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        runs.append(results(tiles_numba, sides, layout))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("passes", [1, 2])
def test_one_pass_or_two_are_the_same_bits(passes, monkeypatch):
    layout, sides = layout_of(Window(200, 3) | Random(2), 500, 500), tensors((1, 4, 2), 500, 500, (64, 64))
    expected = results(tiles_numba, sides, layout)
    monkeypatch.setattr(tiles_numba, "in_one_pass", lambda heads: passes == 1)
    assert all(
        torch.equal(one, other) for one, other in zip(results(tiles_numba, sides, layout), expected, strict=True)
    )


def test_strides_do_not_matter():
    layout, sides = layout_of(Window(70, 20), 128, 128), tensors((2, 4, 2), 128, 128, (16, 16))
    expected = results(tiles_numba, sides, layout)
    turned = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in sides]
    flipped = [side.mT.contiguous().mT for side in sides]
    wider = [torch.cat([side, side], -1)[..., : side.shape[-1]] for side in sides]
    for views in (turned, flipped, wider):
        found = results(tiles_numba, views, layout)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_gradients_of_disjoint_parts_add_up():
    n, whole, part = 300, Window(150, 0), Window(30, 0)
    layouts = [layout_of(graph, n, n) for graph in (whole, part, whole - part)]
    q, k, v, dout, dlse = tensors((1, 2, 1), n, n, (32, 32))
    out, lse = tiles_numba.forward(q, k, v, layouts[0], Modifiers(0.2))
    expected, *shares = (
        tiles_numba.backward(q, k, v, out, lse, dout, dlse, layout, Modifiers(0.2), False)[:3] for layout in layouts
    )
    total = [a + b for a, b in zip(*shares, strict=True)]
    assert_close([out, lse, *total], [side.double() for side in (out, lse, *expected)])


def test_who_hears_nobody_is_zero_and_has_no_gradient():
    edges = torch.tensor([[0, 70, 1], [3, 3, 80]])
    layout, sides = layout_of(EdgeList(edges, (100, 100)), 100, 100), tensors((1, 2, 2), 100, 100, (16, 16))
    out, lse, dq, dk, dv = results(tiles_numba, sides, layout)
    heard = torch.tensor([i in (3, 80) for i in range(100)])
    assert (out[:, :, ~heard] == 0).all()
    assert (lse[:, :, ~heard] == -torch.inf).all()
    assert (dq[:, :, ~heard] == 0).all()
    hears = torch.tensor([j in (0, 1, 70) for j in range(100)])
    assert (dk[:, :, ~hears] == 0).all()
    assert (dv[:, :, ~hears] == 0).all()
    assert all(side.isfinite().all() for side in (out, dq, dk, dv))


@pytest.mark.parametrize("factor", [1e-3, 30.0, -1.0])
@DTYPES
def test_scores_of_any_size_are_safe(factor, dtype):
    layout, (q, k, v, dout, dlse) = layout_of(Causal(), 200, 200), tensors((1, 2, 2), 200, 200, (16, 16), dtype=dtype)
    sides = [q * factor, k, v, dout, dlse]
    found = results(tiles_numba, sides, layout)
    assert all(side.isfinite().all() for side in found)
    assert_close(found, results(tiles_torch, [side.double() for side in sides], layout), 10)


@pytest.mark.parametrize("growth", [-20.0, -3.0, 3.0, 20.0])
@DTYPES
def test_scores_may_grow_from_tile_to_tile(growth, dtype):
    """Above what was the largest, little by little or at once: sums need not be rescaled at each tile."""
    layout, (q, k, v, dout, dlse) = layout_of(Full(), 70, 640), tensors((1, 2, 2), 70, 640, (16, 16), dtype=dtype)
    q[..., 0], k[..., 0] = 4, growth * torch.arange(640).div(64)  # whose product, scaled, grows so in each tile
    sides = [q, k, v, dout, dlse]
    assert_close(results(tiles_numba, sides, layout), results(tiles_torch, [x.double() for x in sides], layout), 10)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_no_nodes_are_no_error(n, m):
    sides = tensors((1, 2, 1), n, m, (16, 16))
    out, lse, dq, dk, dv = results(tiles_numba, sides, layout_of(Empty(), n, m))
    assert [side.shape for side in (out, lse, dq, dk, dv)] == [sides[x].shape for x in (3, 4, 0, 1, 2)]
    assert (out == 0).all()
    assert (dk == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])  # gradients in one pass, or in two
def test_half_precision_is_that_of_float32_rounded_once(dtype, threads):
    torch.set_num_threads(threads)
    for heads, dims, (graph, n, m) in ((HEADS[0], DIMS[0], GRAPHS[0]), (HEADS[1], DIMS[1], GRAPHS[1])):
        q, k, v, dout, dlse = tensors(heads, n, m, dims)
        layout, halves = layout_of(graph, n, m), [side.to(dtype) for side in (q, k, v, dout)]
        wide = [side.float() for side in halves]
        modifiers = Modifiers(dims[0] ** -0.5)
        out, lse = tiles_numba.forward(*halves[:3], layout, modifiers)
        right, right_lse = tiles_numba.forward(*wide[:3], layout, modifiers)
        assert torch.equal(out, right.to(dtype))
        assert torch.equal(lse, right_lse)
        found = tiles_numba.backward(*halves[:3], out, lse, halves[3], dlse, layout, modifiers, False)
        right = tiles_numba.backward(*wide[:3], out.float(), lse, wide[3], dlse, layout, modifiers, False)
        assert all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in zip(found[:3], right[:3], strict=True))
