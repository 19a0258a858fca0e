"""Transforms, normalisers and dropout in the Triton kernels, run by Triton's interpreter, equal `kernels.edge` in
float64, forward and in every gradient."""

import pytest
import torch
from interpreter import round_as_hardware

from attngraph import Prefix, Window
from attngraph.graph.base import at_size
from attngraph.graph.listing import list_edges
from attngraph.kernels.contract import Dropout, Modifiers, ScoreBias, Transform
from attngraph.kernels.dropout import kept
from attngraph.kernels.edge import edges
from attngraph.kernels.scoring import Additive, LeakyReLU, SoftCap, dot
from attngraph.planning.layouts import csr
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

pytest.importorskip("triton", reason="Triton is not installed: it runs on Linux")

import triton
import triton.language as tl

from attngraph.kernels.triton import rows, tiles
from attngraph.kernels.triton.modifiers import dropout_ptrs, kept_block, kept_pairs
from attngraph.kernels.triton.products import products, products_backward

slow = pytest.mark.slow
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
SOFTCAP, LEAKY_RELU = Transform("softcap", 1.5), Transform("leaky_relu", 0.2)
SCORES = {None: "dot", SOFTCAP: SoftCap(1.5), LEAKY_RELU: LeakyReLU(0.2)}


def tensors(heads, n, m, dims, dtype=torch.float32):
    """q, k, v, and the gradients of out and lse."""
    (B, H, Hkv), (D, Dv), chance = heads, dims, torch.Generator().manual_seed(0)
    shapes = (B, H, n, D), (B, Hkv, m, D), (B, Hkv, m, Dv), (B, H, n, Dv), (B, H, n)
    return [torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype) for shape in shapes]


def values_of(kind, heads, n, m, count):
    """The values of a bias."""
    (B, H, _), chance = heads, torch.Generator().manual_seed(1)
    shape = {"offset": (H, n + m - 1), "edge": (B, 1, count), "dense": (1, H, n, m), "keys": (B, H, 1, m)}[kind]
    return torch.randn(shape, generator=chance, dtype=torch.float64)


def found_and_expected(kernels, layout, sides, pairs, modifiers):
    """out, lse and the gradients: by the kernels, and by `edges` in float64."""
    (q, k, v, dout, dlse), (query, key), n = sides, pairs, sides[0].shape[2]
    is_softmax, bias = modifiers.normalize == "softmax", modifiers.bias
    wanted = [side.double().requires_grad_() for side in (q, k, v)]
    if bias is not None:
        wanted.append(bias.values.double().requires_grad_())
    q_of_call, dropout, chosen = wanted[0], modifiers.dropout, torch.arange(q.shape[1])
    if dropout is not None and dropout.heads is not None:  # as those of a call with all heads
        chosen, dropout = dropout.heads, dropout._replace(heads=None)
        q_of_call = q_of_call.new_zeros(q.shape[0], int(chosen.max()) + 1, *q.shape[2:]).index_copy(
            1, chosen, wanted[0]
        )
    out, lse, _ = edges(
        q_of_call, *wanted[1:3], query, key, torch.empty(0, len(query), dtype=torch.bool), scale=modifiers.scale,
        bias=None if bias is None else bias._replace(values=wanted[3]).over_edges(query, key, n),
        attention_mask=modifiers.attention_mask, dropout=dropout, score=SCORES[modifiers.transform],
        normalize=modifiers.normalize,
    )  # fmt: skip
    out, lse = out[:, chosen], None if lse is None else lse[:, chosen]
    lse = torch.zeros_like(out[..., 0]) if lse is None else lse
    loss = (out * dout.double()).sum() + (lse * dlse.double())[lse.isfinite()].sum()
    grads = torch.autograd.grad(loss, wanted)

    dtype = torch.promote_types(q.dtype, torch.float32)
    if bias is not None:
        modifiers = modifiers._replace(bias=bias._replace(values=bias.values.to(dtype)))
    found_out, found_lse = kernels.forward(q, k, v, layout, modifiers)
    dlse = dlse.where(lse.isfinite(), 0).to(dtype) if is_softmax else None
    found = kernels.backward(q, k, v, found_out, found_lse, dout, dlse, layout, modifiers, bias is not None)
    return [found_out, found_lse, *found[: len(grads)]], [out.detach(), lse.detach(), *grads]


def assert_close(found, expected, tolerance):
    for part, right in zip(found, expected, strict=True):
        assert part.shape == right.shape
        finite = right.isfinite()
        assert torch.equal(part.double()[~finite], right[~finite])
        assert (part.double() - right)[finite].abs().max() <= tolerance * max(1, right[finite].abs().max())


@triton.jit
def _kept_kernel(block, pairs, dropout, batch, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of head 1."""
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    queries, keys = first_query + tl.arange(0, BLOCK_M), first_key + tl.arange(0, BLOCK_N)
    batch, head = tl.full([1], batch, tl.int64), tl.full([1], 1, tl.int64)
    tl.store(block + at, kept_block(dropout, batch, head, queries, first_key, BLOCK_M, BLOCK_N))
    tl.store(pairs + at, kept_pairs(dropout, batch, head, queries[:, None], keys[None, :]))


@pytest.mark.parametrize(("first_key", "block_n"), [(96, 32), (64, 32), (64, 64), (128, 128)])
def test_kernels_keep_the_weights_that_the_definition_keeps(first_key, block_n):
    """By sixteen counters for 64 keys, and by one for each pair; the words of a block in their order."""
    dropout = Dropout(0.3, SEED)
    block, pairs = torch.zeros(2, 32, block_n, dtype=torch.bool)
    _kept_kernel[1,](block, pairs, dropout_ptrs(dropout), 3, 40, first_key, 32, block_n)
    query, key = 40 + torch.arange(32)[:, None], first_key + torch.arange(block_n)
    expected = kept(dropout, torch.tensor(3), torch.tensor(1), query, key)
    assert torch.equal(block, expected)
    assert torch.equal(pairs, expected)


# Each of them with others: the interpreter takes a second for each.
CASES = [
    ({"dropout": Dropout(0.36, SEED)}, None),
    ({"dropout": Dropout(0.36, SEED, torch.tensor([5, 2]))}, "edge"),
    ({"transform": SOFTCAP}, "dense"),
    ({"transform": LEAKY_RELU, "dropout": Dropout(0.2, SEED)}, "offset"),
    ({"normalize": "sigmoid", "transform": SOFTCAP, "dropout": Dropout(0.5, SEED)}, "keys"),
    ({"normalize": "squared_relu", "transform": LEAKY_RELU}, "edge"),
    ({"normalize": "none"}, None),
    ({"normalize": "relu"}, "offset"),
]


@pytest.mark.share(2)
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=slow)], ids=["padded", "whole"])
@pytest.mark.parametrize(("options", "kind"), CASES, ids=lambda it: it if isinstance(it, str) else "+".join(it or "-"))
def test_tiles_equal_the_edges_in_every_gradient(options, kind, padded):
    """Of a full tile and of tiles with masks; the share that runs always has the cases that the rows below have not."""
    heads, n, m = (2, 2, 1), 70, 100
    graph = at_size(Prefix(66) | Window(9, 4), n, m)[0]
    query, key = list_edges(graph, n, m)
    sides = tensors(heads, n, m, (16, 16))
    bias = None if kind is None else values_of(kind, heads, n, m, len(query))
    mask = (torch.arange(m) + torch.arange(2)[:, None]) % 5 > 0
    name = "dense" if kind == "keys" else kind
    modifiers = Modifiers(0.3, None if bias is None else ScoreBias(name, bias), mask if padded else None, **options)
    layout = Tiles(n, m, tabulate(graph, n, m, (128, 64)))
    assert_close(*found_and_expected(tiles, layout, sides, (query, key), modifiers), 4e-6)


@slow
@pytest.mark.parametrize("blocks", [(64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)], ids=str)
def test_dropout_in_blocks_of_any_size(blocks, monkeypatch):
    heads, n, m = (2, 2, 1), 140, 130
    graph = at_size(Prefix(66) | Window(9, 4), n, m)[0]
    pairs, layout = list_edges(graph, n, m), Tiles(n, m, tabulate(graph, n, m, (128, 64)))
    monkeypatch.setattr(tiles, "block_sizes", lambda *_: tiles.Blocks(*blocks))
    modifiers = Modifiers(0.3, dropout=Dropout(0.36, SEED))
    assert_close(*found_and_expected(tiles, layout, tensors(heads, n, m, (16, 16)), pairs, modifiers), 4e-6)


@pytest.mark.parametrize("kernels", [tiles, rows], ids=["tiles", "rows"])
def test_half_precision(kernels, monkeypatch):
    round_as_hardware(monkeypatch)
    (B, H, Hkv), n = (1, 2, 1), 40
    graph = at_size(Window(20, 0) | Prefix(3), n, n)[0]
    pairs = query, key = list_edges(graph, n, n)
    layout = Tiles(n, n, tabulate(graph, n, n, (128, 64))) if kernels is tiles else CSR.from_edges(query, key, n, n)
    modifiers = Modifiers(0.3, transform=SOFTCAP, dropout=Dropout(0.5, SEED))
    sides = tensors((B, H, Hkv), n, n, (16, 16), torch.bfloat16)
    found, expected = found_and_expected(kernels, layout, sides, pairs, modifiers)
    assert [part.dtype for part in found] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]
    assert_close(found, expected, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.fixture
def small_pieces(monkeypatch):
    """Heavy queries and heavy keys."""
    monkeypatch.setitem(csr.HEAVY_DEGREE, "cpu", 8)


def some_edges(n, m):
    """Random ones, a query that hears all, one that hears nobody, a key that all hear."""
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[3], mask[:, 2], mask[5] = True, True, False
    return mask.nonzero().unbind(1)


@pytest.mark.share(2)
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=slow)], ids=str)
@pytest.mark.parametrize(
    ("options", "kind"), CASES[::-1], ids=lambda it: it if isinstance(it, str) else "+".join(it or "-")
)
def test_rows_equal_the_edges_in_every_gradient(options, kind, dtype):
    heads, n, m = (2, 2, 1), 9, 11
    query, key = some_edges(n, m)
    sides = tensors(heads, n, m, (5, 3), dtype)
    bias = None if kind is None else values_of(kind, heads, n, m, len(query))
    mask = (torch.arange(m) + torch.arange(2)[:, None]) % 5 > 0
    name = "dense" if kind == "keys" else kind
    modifiers = Modifiers(0.3, None if bias is None else ScoreBias(name, bias), mask, **options)
    layout = CSR.from_edges(query, key, n, m)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    assert_close(*found_and_expected(rows, layout, sides, (query, key), modifiers), tolerance)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=slow)], ids=str)
@pytest.mark.parametrize("activation", ["", "tanh", "leaky_relu", "relu"])
def test_products_and_their_gradients(activation, dtype):
    (B, H, Hkv), n, m, D = (2, 4, 2), 9, 11, 5
    query, key = some_edges(n, m)
    layout = CSR.from_edges(query, key, n, m)
    q, k, *_ = tensors((B, H, Hkv), n, m, (D, D), dtype)
    chance = torch.Generator().manual_seed(1)
    weight = torch.randn(H, D, generator=chance, dtype=torch.float64).to(dtype) if activation else None
    dproducts = torch.randn(B, H, len(query), generator=chance, dtype=torch.float64).to(dtype)

    wanted = [side.double().requires_grad_() for side in (q, k, *([] if weight is None else [weight]))]
    q_i, k_j = wanted[0][:, :, query], wanted[1][:, :, key].repeat_interleave(H // Hkv, 1)
    pair = Additive(wanted[2], activation, 0.3) if activation else dot
    expected = 0.7 * pair(q_i, k_j)
    grads = torch.autograd.grad(expected, wanted, dproducts.double())

    options = q, k, weight, layout, 0.7, activation, 0.3
    found = [products(*options), *products_backward(dproducts, *options)]
    assert [part.dtype for part in found if part is not None] == [dtype] * (2 + len(wanted) - 1)
    assert_close(
        [part for part in found if part is not None],
        [expected.detach(), *grads],
        1e-12 if dtype == torch.float64 else 2e-6,
    )


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (3, 2)])
def test_products_of_a_graph_without_edges(n, m):
    layout = CSR.from_edges(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), n, m)
    q, k, *_ = tensors((1, 2, 1), n, m, (3, 3))
    weight = torch.ones(2, 3)
    assert products(q, k, weight, layout, 1.0, "tanh").shape == (1, 2, 0)
    assert all((grad == 0).all() for grad in products_backward(torch.zeros(1, 2, 0), q, k, weight, layout, 1.0, "tanh"))
