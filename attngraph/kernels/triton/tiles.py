"""Flash attention over the tiles of a graph in Triton, for a GPU: forward; then dq, and dk with dv.

The loops are those of FlashAttention-2 (Dao, 2023), over the tiles that have an edge alone. A tile has TILE_M queries
and TILE_N keys; a block, what is multiplied at once, BLOCK_M ≤ TILE_M of its queries and BLOCK_N ≤ TILE_N of its keys.

The kernels stand in tiles_forward.py and tiles_backward.py; here they are launched.

| kernel | a program has | and walks over | grid |
|---|---|---|---|
| `_fwd_kernel` | BLOCK_M queries of one head | the tiles of their row | (blocks of queries · B · H,) |
| `_bwd_dq_kernel` | BLOCK_M queries of one head | the tiles of their row | (blocks of queries · B · H,) |
| `_bwd_dkdv_kernel` | BLOCK_N keys of one key head | the tiles of their column | (blocks of keys · B · Hkv,) |

Each walks first over tiles with masks, then over full tiles, in two loops without branches; `_bwd_dkdv_kernel` takes
the query heads of a group one after the other at each tile. Rows with most tiles come first. Nothing is added
atomically: the same bits every run. Scores are exponents of 2; what is done to them after scale and bias stands in
modifiers.py. All pairs of a tile are multiplied: a NaN or an infinity in a key or a value may reach queries of its
tiles that do not hear it.

| argument | fields | see |
|---|---|---|
| `inputs` | q, k, v, bias, padding, dropout, tiles, masks | `Inputs` in tiles_scores.py |
| `inputs.tiles` | start, first_full, column, mask, table_index, order | `TilePtrs`: the tiles of each row, or column |
| `inputs.masks` | words, spans, first_edge, … | `MaskPtrs` |
| `upstream` | dout, lse, delta | `Upstream` in common.py |
| `block` | batch, head, kv_head, offs_m, start_m, … | `QueryBlock`, `KeyBlock`: what the program has |
| `config` | HEAD_DIM, …, NUM_STAGES | `Config`: what the kernel is compiled for |
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from attngraph.kernels.memory import like
from attngraph.kernels.triton.common import (
    BIAS_KINDS,
    EDGE,
    LOG2_E,
    OFFSET,
    Upstream,
    bias_ptr_and_strides,
    compute_delta,
    constexprs,
    in_four_dims,
    padded_dim,
    padding_ptr,
    ptr_and_strides,
    sum_to_shape_of,
)
from attngraph.kernels.triton.modifiers import compiled_kinds, dropout_ptrs
from attngraph.kernels.triton.tiles_backward import _bwd_dkdv_kernel, _bwd_dq_kernel
from attngraph.kernels.triton.tiles_forward import _fwd_kernel
from attngraph.kernels.triton.tiles_scores import Config, Inputs, MaskPtrs, TilePtrs

if TYPE_CHECKING:
    from attngraph.kernels.contract import Modifiers, TileRows, TilesLayout


class Blocks(NamedTuple):
    """How a kernel runs."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int  # blocks in flight from memory


# By architecture, kernel, bytes of a number, and the widest BLOCK_D. For 90 and 2 bytes, up to 128: the fastest of
# those that `python -m benchmarks.gpu_blocks tiles` tries, on an H200. Else, of some tried blocks the largest whose
# numbers all stay in registers, counted in what the compiler makes (tests/compile_triton.py).
BLOCKS = {
    90: {
        ("_fwd_kernel", 2): {64: Blocks(128, 64, 8, 2), 128: Blocks(128, 64, 4, 4), 256: Blocks(64, 64, 8, 2)},
        ("_bwd_dq_kernel", 2): {64: Blocks(64, 32, 4, 2), 128: Blocks(64, 32, 4, 3), 256: Blocks(32, 64, 8, 2)},
        ("_bwd_dkdv_kernel", 2): {64: Blocks(128, 64, 4, 2), 128: Blocks(64, 64, 4, 4), 256: Blocks(64, 32, 8, 2)},
        ("_fwd_kernel", 4): {32: Blocks(64, 64, 4, 2), 64: Blocks(64, 32, 4, 2), 128: Blocks(32, 32, 8, 1)},
        ("_bwd_dq_kernel", 4): {16: Blocks(64, 64, 4, 2), 64: Blocks(64, 32, 4, 2), 128: Blocks(32, 32, 8, 1)},
        ("_bwd_dkdv_kernel", 4): {32: Blocks(32, 64, 8, 2), 64: Blocks(32, 32, 4, 2), 128: Blocks(32, 32, 8, 1)},
    },
    80: {
        ("_fwd_kernel", 2): {64: Blocks(128, 64, 8, 2), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 2)},
        ("_bwd_dq_kernel", 2): {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
        ("_bwd_dkdv_kernel", 2): {
            32: Blocks(64, 64, 8, 2),
            64: Blocks(128, 32, 8, 2),
            128: Blocks(64, 64, 8, 2),
            256: Blocks(32, 32, 8, 2),
        },
        ("_fwd_kernel", 4): {32: Blocks(64, 64, 8, 2), 64: Blocks(32, 64, 8, 2), 128: Blocks(32, 32, 8, 1)},
        ("_bwd_dq_kernel", 4): {
            16: Blocks(64, 64, 8, 2),
            32: Blocks(64, 32, 8, 2),
            64: Blocks(32, 32, 8, 2),
            128: Blocks(32, 32, 8, 1),
        },
        ("_bwd_dkdv_kernel", 4): {16: Blocks(32, 64, 8, 2), 64: Blocks(32, 32, 8, 2), 128: Blocks(32, 32, 8, 1)},
    },
}
# With any modifier but the scale: by architecture, bytes of a number, and the widest BLOCK_D.
BIASED_BLOCKS = {
    90: {
        2: {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        4: {128: Blocks(32, 32, 8, 1)},
    },
    80: {
        2: {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
        4: {128: Blocks(32, 32, 8, 1)},
    },
}
# The same where scores are transformed, which takes registers for their slopes: where the others would not fit.
TRANSFORMED_BLOCKS = {(90, 2, 64): Blocks(64, 32, 8, 2), (80, 2, 128): Blocks(64, 32, 8, 2)}
# The same for dk and dv of heads up to 32 wide, of scores or weights that are changed one by one, or dropped.
NARROW_DKDV_BLOCKS = {(90, 2): Blocks(32, 32, 8, 2), (80, 2): Blocks(32, 32, 8, 2), (90, 4): Blocks(32, 64, 8, 1)}
DIAGONAL_BLOCKS = {2: Blocks(32, 32, 4, 2), 4: Blocks(32, 32, 8, 1)}  # for `_diagonal_sums`


def block_sizes(
    kernel: str, widest: int, itemsize: int, modifiers: Modifiers, sums_diagonals: bool, device: torch.device
) -> Blocks:
    """How a kernel runs, by the widest BLOCK_D, the bytes of a number, the modifiers and the architecture."""
    if kernel == "_bwd_dq_kernel" and sums_diagonals:
        return DIAGONAL_BLOCKS[itemsize]
    arch = architecture(device)
    table = BLOCKS[arch][kernel, itemsize] if modifiers.is_plain else BIASED_BLOCKS[arch][itemsize]
    limit, blocks = next((limit, blocks) for limit, blocks in table.items() if widest <= limit)
    changed = modifiers.transform is not None or modifiers.normalize != "softmax" or modifiers.dropout is not None
    if changed and kernel == "_bwd_dkdv_kernel" and widest <= 32:
        return NARROW_DKDV_BLOCKS.get((arch, itemsize), blocks)
    return blocks if modifiers.transform is None else TRANSFORMED_BLOCKS.get((arch, itemsize, limit), blocks)


@lru_cache
def architecture(device: torch.device) -> int:
    """The newest one with a table that is no newer than this device: 80 for Ampere and Ada, 90 from Hopper on."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 90 if capability >= (9, 0) else 80


def forward(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N) of the pairs of a layout; in float16, bfloat16 or float32.

    lse is 0 of a normaliser that has none.
    """
    out, lse = like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if modifiers.normalize != "softmax":
        lse.zero_()
    _Launcher(q, k, v, layout, modifiers).launch(_fwd_kernel, ptr_and_strides(out), lse)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    layout: TilesLayout, modifiers: Modifiers, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv and, with `bias_grad`, the gradient of the bias's values; out and lse may be those of more pairs."""
    group = q.shape[1] // k.shape[1]
    kind, values = modifiers.bias if modifiers.bias is not None and bias_grad else (None, None)
    of_keys = kind == "dense" and values is not None and values.shape[2] == 1 != q.shape[2]
    if of_keys and group > 1:  # `_bwd_dkdv_kernel` sums over the heads of a group, but each has a bias of its own
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        dq, dk, dv, dbias = backward(q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad)
        return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2), dbias

    launcher = _Launcher(q, k, v, layout, modifiers)
    dq, dk, dv = like(q, q.shape[3]), like(k, k.shape[3]), like(v, v.shape[3])
    lse = lse.contiguous()
    delta = compute_delta(out, dout, lse, dlse) if modifiers.normalize == "softmax" else lse  # which is not read then
    upstream = Upstream(ptr_and_strides(dout), lse, delta)
    pair_grads = None if values is None else launcher.empty_pair_grads(values, of_keys)
    dbias = launcher.bias if pair_grads is None else bias_ptr_and_strides(pair_grads)
    launcher.launch(_bwd_dq_kernel, upstream, ptr_and_strides(dq), dbias, modifiers.scale, bias_grad and not of_keys)
    launcher.launch(
        _bwd_dkdv_kernel, upstream, ptr_and_strides(dk), ptr_and_strides(dv), dbias, modifiers.scale, of_keys
    )
    return dq, dk, dv, None if pair_grads is None or values is None else launcher.reduce_pair_grads(values, pair_grads)


class _Launcher:
    """What all kernels of a call are given: tensors, layout, sizes."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, modifiers: Modifiers) -> None:
        scale, bias, attention_mask = modifiers[:3]
        self.modifiers, self.kinds = modifiers, compiled_kinds(modifiers)
        self.dropout = dropout_ptrs(modifiers.dropout)
        self.layout = layout = layout.on(q.device)
        self.q, self.v, self.scale = q, v, scale * LOG2_E.value
        self.padding, self.padded = padding_ptr(attention_mask, q), attention_mask is not None
        self.bias_kind = BIAS_KINDS[None if bias is None else bias[0]]
        self.qkv = ptr_and_strides(q), ptr_and_strides(k), ptr_and_strides(v)
        self.bias = self.qkv[0] if bias is None else bias_ptr_and_strides(in_four_dims(*bias))
        words = layout.table.words
        first_edge = layout.first_edge_of_word if self.bias_kind == EDGE.value else words
        spans, spans_by_key = layout.spans, layout.spans_by_key
        self.spans = spans is not None and spans_by_key is not None
        if spans is None or spans_by_key is None:
            spans = spans_by_key = words  # not read
        self.masks = MaskPtrs(words, layout.words_by_key, spans, spans_by_key, first_edge)
        self.sizes = q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        self.dims = q.shape[3], v.shape[3], padded_dim(q.shape[3]), padded_dim(v.shape[3])

    def blocks(self, kernel: triton.JITFunction, bias_grad: bool) -> Blocks:
        """How a kernel runs, with blocks no larger than a tile."""
        widest, itemsize = max(self.dims[2:]), self.q.dtype.itemsize
        sums_diagonals = bias_grad and self.bias_kind == OFFSET.value
        blocks = block_sizes(kernel.fn.__name__, widest, itemsize, self.modifiers, sums_diagonals, self.q.device)
        tile_m, tile_n = self.layout.tile
        return blocks._replace(BLOCK_M=min(blocks.BLOCK_M, tile_m), BLOCK_N=min(blocks.BLOCK_N, tile_n))

    def launch(self, kernel: triton.JITFunction, *own) -> None:
        """A kernel, for each head and each block of rows or columns of tiles."""
        blocks = self.blocks(kernel, own[-1] is True)
        (tile_m, tile_n), (tile_rows, tile_columns) = self.layout.tile, self.layout.grid
        blocks_m, blocks_n = tile_m // blocks.BLOCK_M, tile_n // blocks.BLOCK_N  # of a tile
        if kernel is _bwd_dkdv_kernel:
            tiles, num_blocks, heads = self.layout.by_key, tile_columns * blocks_n, self.v.shape[:2]
        else:
            tiles, num_blocks, heads = self.layout.by_query, tile_rows * blocks_m, self.q.shape[:2]
        if len(tiles.column) * blocks_m * blocks_n * self.sizes[1] >= 1 << 31:
            raise ValueError(f"tiles on a GPU are counted in 32 bits (got {len(tiles.column):,} of them)")
        inputs = Inputs(*self.qkv, self.bias, self.padding, self.dropout, _tile_ptrs(tiles), self.masks)
        config = Config(
            *self.dims, tile_m, tile_n, blocks.BLOCK_M, blocks.BLOCK_N,
            self.bias_kind, self.padded, *self.kinds, self.spans, _input_precision(self.q.dtype), blocks.num_stages,
        )  # fmt: skip
        if num_programs := num_blocks * heads.numel():
            kernel[(num_programs,)](
                inputs, num_blocks, *self.sizes, self.scale, constexprs(config), *own,
                num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            )  # fmt: skip

    # The gradient of a bias: kernels store one number for each head and pair, key, or diagonal of a block, in float32;
    # then those of all that share a value are summed.

    def empty_pair_grads(self, values: Tensor, of_keys: bool) -> Tensor:
        """Where the kernels store it, zeros where they store nothing."""
        (B, H), (_, _, N, M) = self.q.shape[:2], self.sizes
        if self.bias_kind == OFFSET.value:
            blocks, (tile_m, tile_n) = self.blocks(_bwd_dq_kernel, True), self.layout.tile
            blocks_of_tile = (tile_m // blocks.BLOCK_M) * (tile_n // blocks.BLOCK_N)
            shape = B, H, len(self.layout.table.row) * blocks_of_tile, 2 * blocks.BLOCK_N
        elif self.bias_kind == EDGE.value:
            shape = B, H, 1, values.shape[-1]
        else:
            shape = B, H, 1 if of_keys else N, M
        return torch.zeros(shape, dtype=torch.float32, device=self.q.device)

    def reduce_pair_grads(self, values: Tensor, pair_grads: Tensor) -> Tensor:
        """The gradient of the bias's values."""
        if self.bias_kind == OFFSET.value:
            dbias = self._reduce_diagonals(pair_grads.transpose(0, 1).sum(1, dtype=torch.float64))
            return dbias.sum(0, keepdim=True) if values.shape[0] == 1 else dbias
        if self.bias_kind == EDGE.value:
            pair_grads = pair_grads[:, :, 0]
        return sum_to_shape_of(values, pair_grads)

    def _reduce_diagonals(self, sums: Tensor) -> Tensor:
        """From the sums of the diagonals of blocks, (H, blocks, 2 · BLOCK_N), those of all pairs, (H, N + M - 1)."""
        (tile_m, tile_n), table, (_, _, N, M) = self.layout.tile, self.layout.table, self.sizes
        size = self.blocks(_bwd_dq_kernel, True).BLOCK_N  # = BLOCK_M
        row = (table.row * tile_m)[:, None, None] + torch.arange(0, tile_m, size, device=sums.device)[:, None]
        column = (table.column * tile_n)[:, None, None] + torch.arange(0, tile_n, size, device=sums.device)
        diagonal = ((column - row) // size).flatten()  # of each block, counted in blocks
        lowest = 1 - self.layout.grid[0] * tile_m // size
        count = self.layout.grid[1] * tile_n // size - lowest
        order = diagonal.argsort(stable=True)
        bounds = torch.arange(lowest, lowest + count + 1, device=sums.device)
        lengths = torch.searchsorted(diagonal[order], bounds).diff()
        total = torch.segment_reduce(sums[:, order].transpose(0, 1).contiguous(), "sum", lengths=lengths)
        total = total.transpose(0, 1).unflatten(2, (2, size))  # (H, diagonals of blocks, 2, size)
        offsets = total.new_zeros(total.shape[0], count + 1, size)
        offsets[:, :-1] += total[:, :, 0]
        offsets[:, 1:] += total[:, :, 1]
        # The first number is that of key - query = lowest · size - (size - 1).
        first = 1 - N - (lowest * size - size + 1)
        return offsets.flatten(1)[:, first : first + N + M - 1]


def _tile_ptrs(tiles: TileRows) -> TilePtrs:
    """The tiles of each row, or of each column, as kernels take them."""
    return TilePtrs(tiles.start, tiles.full, tiles.column, tiles.mask, tiles.tile, tiles.order)


def _input_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as three products in TF32, or as torch.backends.cuda.matmul.fp32_precision says."""
    if dtype != torch.float32:
        return "ieee"
    return {"ieee": "ieee", "tf32": "tf32"}.get(str(torch.backends.cuda.matmul.fp32_precision), "tf32x3")
