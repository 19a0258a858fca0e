"""The Triton tile kernels, run by Triton's interpreter on a CPU, equal the reference; their compiled code is sound."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import round_as_hardware, without_interpreter

from attngraph import Causal, Documents, EdgeList, Empty, Full, Global, Neighborhood, Prefix, Random, Window, attend
from attngraph.bias import DenseBias, EdgeBias
from attngraph.graph.base import at_size
from attngraph.kernels.contract import Modifiers, ScoreBias
from attngraph.planning.layouts.tiles import Tiles, tabulate

pytest.importorskip("triton", reason="Triton is not installed: it runs on Linux")
from attngraph.kernels.triton import tiles as tiles_triton

slow = pytest.mark.slow
TILES = [(128, 64), pytest.param((64, 64), marks=slow)]
chance = torch.Generator().manual_seed(0)
SOME_EDGES = torch.stack([torch.randint(size, (600,), generator=chance) for size in (150, 100)]).unique(dim=1)
GRAPHS = [
    (Window(40, 0), 150, 150),
    (Window(60, 9) | Prefix(4) | Random(2), 140, 140),
    (Causal(), 130, 130),
    (Full(), 130, 70),
    (Full(), 128, 128),
    (Documents([50, 3, 60]), 113, 113),
    (Neighborhood((11, 12), 2), 132, 132),
    (EdgeList(SOME_EDGES, (100, 150)), 100, 150),
    (Empty(), 70, 70),
    (Global([0]), 129, 129),
    (Window(9, 0), 60, 150),
    (Window(9, 0), 150, 60),
    (Full(), 1, 1),
]


def layout_of(graph, n, m, tile):
    return Tiles(n, m, tabulate(at_size(graph, n, m)[0], n, m, tile))


def tensors(heads, n, m, dims, dtype=torch.float32):
    """q, k, v, and the gradients of out and lse."""
    (B, H, Hkv), (D, Dv), chance = heads, dims, torch.Generator().manual_seed(0)
    shapes = (B, H, n, D), (B, Hkv, m, D), (B, Hkv, m, Dv), (B, H, n, Dv), (B, H, n)
    *sides, dlse = (torch.randn(shape, generator=chance) for shape in shapes)
    return [*(side.to(dtype) for side in sides), dlse]


def results(sides, layout, bias=None, bias_grad=False, attention_mask=None):
    (q, k, v, dout, dlse), modifiers = sides, Modifiers(0.3, bias, attention_mask)
    out, lse = tiles_triton.forward(q, k, v, layout, modifiers)
    return [out, lse, *tiles_triton.backward(q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad)]


def expected(sides, graph, bias=None, values=None, **options):
    """The same by the reference, in float64; `values` are those of the bias."""
    q, k, v, dout, dlse = (side.double() for side in sides)
    wanted = [side.requires_grad_() for side in (q, k, v)] + ([] if values is None else [values])
    out, lse = attend(q, k, v, graph, bias=bias, scale=0.3, return_lse=True, backend="reference", **options)
    loss = (out * dout).sum()
    if dlse.any():
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * dlse).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def assert_close(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for part, right in zip(found, wanted, strict=True):
        assert part.shape == right.shape
        finite = right.isfinite()
        assert torch.equal(part.double()[~finite], right[~finite])
        worst = (part.double() - right)[finite].abs().max() if finite.any() else 0
        assert worst <= tolerance * max(1, right[finite].abs().max() if finite.any() else 1)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("graph", "n", "m"), GRAPHS, ids=str)
def test_it_equals_the_reference(graph, n, m, tile):
    sides = tensors((1, 2, 2), n, m, (16, 16))
    assert_close(results(sides, layout_of(graph, n, m, tile))[:5], expected(sides, graph), 2e-6)


@pytest.mark.parametrize("dims", [(16, 24), (5, 3), (80, 16), pytest.param((16, 120), marks=slow)])
@pytest.mark.parametrize("heads", [(2, 2, 1), pytest.param((1, 6, 2), marks=slow)])
def test_any_heads_and_dimensions(heads, dims):
    graph = Causal() & (Window(20, 0) | Prefix(3))
    sides = tensors(heads, 70, 70, dims)
    assert_close(results(sides, layout_of(graph, 70, 70, (128, 64)))[:5], expected(sides, graph), 2e-6)


BIASES = ("offset", "edge", "dense", "keys")


@pytest.mark.parametrize("group", [pytest.param(1, marks=slow), 2])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", [*BIASES, *(pytest.param(f"{kind} of all", marks=slow) for kind in BIASES)])
def test_every_bias_and_its_gradient(kind, tile, group):
    graph, n, m = Window(30, 5) | Prefix(2), 100, 90
    sides = tensors((2, 2, 2 // group), n, m, (16, 16))
    B, H = (1, 1) if kind.endswith("of all") else (2, 2)
    shape = {
        "offset": (H, n + m - 1),
        "edge": (B, H, graph.num_edges(n, m)),
        "dense": (B, H, n, m),
        "keys": (B, H, 1, m),
    }
    name = kind.split()[0]
    values = torch.randn(shape[name], generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    if name == "offset":
        ahead = torch.arange(m) - torch.arange(n)[:, None] + n - 1
        bias = DenseBias(values[:, ahead])
    else:
        bias = EdgeBias.sorted(values) if name == "edge" else DenseBias(values.expand(-1, -1, n, m))
    score_bias = ScoreBias("dense" if name == "keys" else name, values.detach().float())
    found = results(sides, layout_of(graph, n, m, tile), score_bias, True)
    assert_close(found, expected(sides, graph, bias, values), 4e-6)


@pytest.mark.parametrize("kind", [None, *(pytest.param(kind, marks=slow) for kind in ("offset", "edge", "dense"))])
@pytest.mark.parametrize("tile", TILES)
def test_padding_is_heard_by_nobody(tile, kind):
    """In tiles with masks and without; of one batch entry a whole tile of keys, of another one all of them."""
    graph, n, m = Prefix(70) | Window(5, 0), 90, 100
    sides = tensors((3, 2, 1), n, m, (16, 16))
    mask = (torch.arange(m) >= torch.tensor([[3], [66], [m]])) & (torch.arange(m) % 7 > 0)
    sides[4][2] = 0  # a query that hears nobody has no gradient of its lse
    bias = values = None
    if kind is not None:
        shape = {"offset": (2, n + m - 1), "edge": (3, 2, graph.num_edges(n, m)), "dense": (3, 2, n, m)}[kind]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        ahead = torch.arange(m) - torch.arange(n)[:, None] + n - 1
        bias = (
            EdgeBias.sorted(values) if kind == "edge" else DenseBias(values[:, ahead] if kind == "offset" else values)
        )
    score_bias = None if values is None else ScoreBias(kind, values.detach().float())
    found = results(sides, layout_of(graph, n, m, tile), score_bias, kind is not None, mask)
    right = expected(sides, graph, bias, values, attention_mask=mask)
    assert_close(found if kind else found[:5], right, 4e-6)


@pytest.mark.parametrize("kind", ["dense", "offset"])
def test_a_bias_of_minus_infinity_hides(kind):
    n, graph = 80, Full()
    sides = tensors((1, 1, 1), n, n, (16, 16))
    sides[4].zero_()  # the lse of a query that a bias makes deaf has no gradient
    values = torch.zeros(1, 1, n, n)
    values[..., 5:, :40] = -torch.inf
    values[..., 7, :] = -torch.inf
    if kind == "offset":
        values = torch.zeros(1, 2 * n - 1)
        values[:, n:] = -torch.inf  # causal
    bias = DenseBias(values.double()) if kind == "dense" else None
    right = expected(sides, Causal() if bias is None else graph, bias)
    assert_close(results(sides, layout_of(graph, n, n, (128, 64)), ScoreBias(kind, values))[:5], right, 2e-6)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=slow), torch.bfloat16], ids=str)
def test_half_precision(dtype, monkeypatch):
    """As exact as results in half precision can be."""
    round_as_hardware(monkeypatch)
    graph, n = Causal() & (Window(40, 0) | Prefix(3)), 140
    sides = tensors((1, 2, 1), n, n, (16, 16), dtype)
    found, wanted = results(sides, layout_of(graph, n, n, (128, 64)))[:5], expected(sides, graph)
    assert [part.dtype for part in found] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_close(found, wanted, 4 * torch.finfo(dtype).eps)


def test_strides_do_not_matter():
    graph, n = Window(20, 10), 70
    sides = tensors((2, 2, 2), n, n, (16, 16))
    right = results(sides, layout_of(graph, n, n, (128, 64)))[:5]
    q, k, v, dout, dlse = sides
    turned = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in (q, k, v, dout)]
    found = results([*turned, dlse], layout_of(graph, n, n, (128, 64)))[:5]
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    assert found[0].stride(1) < found[0].stride(2)  # as the queries lie
    wide = [torch.randn(*side.shape[:3], 2 * side.shape[3])[..., ::2].copy_(side) for side in (q, k, v, dout)]
    found = results([*wide, dlse], layout_of(graph, n, n, (128, 64)))[:5]
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def test_gradients_of_parts_add_up():
    """From the merged out and lse of two parts, each gives its share: as a plan needs it."""
    n, parts = 130, (Window(20, 0), Prefix(2) - Window(20, 0))
    q, k, v, dout, dlse = sides = tensors((1, 1, 1), n, n, (16, 16))
    whole = results(sides, layout_of(parts[0] | parts[1], n, n, (128, 64)))
    shares = [
        tiles_triton.backward(q, k, v, *whole[:2], dout, dlse, layout_of(part, n, n, (128, 64)), Modifiers(0.3), False)[
            :3
        ]
        for part in parts
    ]
    assert_close([sum(side) for side in zip(*shares, strict=True)], [side.double() for side in whole[2:5]], 2e-6)


@slow
def test_blocks_may_be_smaller_than_tiles(monkeypatch):
    graph, n = Window(50, 20) | Prefix(3), 140
    sides = tensors((1, 2, 1), n, n, (16, 16))
    bias = ScoreBias("edge", torch.randn(1, 1, graph.num_edges(n, n)))
    right = results(sides, layout_of(graph, n, n, (128, 64)), bias, True)
    for blocks in ((32, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)):
        monkeypatch.setattr(tiles_triton, "block_sizes", lambda *_, blocks=blocks: tiles_triton.Blocks(*blocks))
        found = results(sides, layout_of(graph, n, n, (128, 64)), bias, True)
        assert_close(found, [part.double() for part in right], 4e-6)


# --------------------------------------------------------------------------------------------- the compiled code


COMPILED = [
    "tiles --dim 64 --bias none edge",
    "rows --dim 64 --modifier softcap+dropout",
]
COMPILED_SLOWLY = [
    "tiles --dim 64 --modifier dropout softcap sigmoid",
    "rows --dim 64 --bias none edge",
    "products --dim 64 --modifier tanh",
    *(f"tiles --arch 90 --dim {dim}" for dim in (16, 32, 128, 256)),
    *(f"tiles --arch 80 --dim {dim}" for dim in (16, 32, 64, 128, 256)),
    *(f"tiles --arch {arch} --bytes 4 --dim {dim}" for arch in (90, 80) for dim in (16, 32, 64, 128)),
    "tiles --dim 64 --bias offset dense keys",
    *(f"tiles --arch {arch} --dim 64 128 --modifier dropout softcap sigmoid" for arch in (90, 80)),
    *(f"tiles --arch {arch} --bytes 4 --dim 64 --modifier dropout softcap sigmoid" for arch in (90, 80)),
    "tiles --dim 64 --bias edge --modifier dropout leaky_relu squared_relu",
    "rows --dim 64 --bias offset dense keys",
    *(f"rows --dim {dim}" for dim in (16, 256)),
    *(f"rows --arch 80 --bytes 4 --dim {dim}" for dim in (32, 128)),
    "rows --bytes 8 --dim 64",
    "rows --arch 80 --bytes 8 --dim 64 --modifier softcap+dropout sigmoid squared_relu",
    *(f"products --bytes {size} --dim 16 128" for size in (2, 4, 8)),
    "products --arch 80 --bytes 4 --dim 64 --modifier tanh leaky_relu",
]


@pytest.mark.parametrize("arguments", [*COMPILED, *(pytest.param(each, marks=slow) for each in COMPILED_SLOWLY)])
def test_compiled_kernels_keep_their_numbers_in_registers(arguments):
    """Without a GPU: no spills but known ones, and products by tensor cores, in the code that is compiled for it."""
    command = [sys.executable, Path(__file__).with_name("compile_triton.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=without_interpreter())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
