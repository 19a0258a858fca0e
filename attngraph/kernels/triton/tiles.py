"""Flash attention over the tiles of a graph in Triton, for a GPU: forward; then dq, and dk with dv.

The loops are those of FlashAttention-2 (Dao, 2023), over the tiles that have an edge alone. A tile has TILE_M queries
and TILE_N keys; a block, what is multiplied at once, BLOCK_M ≤ TILE_M of its queries and BLOCK_N ≤ TILE_N of its keys.

| kernel | a program has | and walks over | grid |
|---|---|---|---|
| `_fwd_kernel` | BLOCK_M queries of one head | the tiles of their row | (blocks of queries · B · H,) |
| `_bwd_dq_kernel` | BLOCK_M queries of one head | the tiles of their row | (blocks of queries · B · H,) |
| `_bwd_dkdv_kernel` | BLOCK_N keys of one key head | the tiles of their column | (blocks of keys · B · Hkv,) |

Each walks first over tiles with masks, then over full tiles, in two loops without branches; `_bwd_dkdv_kernel` takes
the query heads of a group one after the other at each tile. Rows with most tiles come first. Nothing is added
atomically: the same bits every run. Scores are exponents of 2. All pairs of a tile are multiplied: a NaN or an infinity
in a key or a value may reach queries of its tiles that do not hear it.

| argument | fields | see |
|---|---|---|
| `inputs` | q, k, v, bias, padding, tiles, masks | `Inputs` |
| `inputs.tiles` | start, first_full, column, mask, table_index, order | `TilePtrs`: the tiles of each row, or column |
| `inputs.masks` | words, spans, first_edge, … | `MaskPtrs` |
| `upstream` | dout, lse, delta | `Upstream` in common.py |
| `block` | batch, head, kv_head, offs_m, start_m, … | `QueryBlock`, `KeyBlock`: what the program has |
| `config` | HEAD_DIM, …, NUM_STAGES | `Config`: what the kernel is compiled for |
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.memory import like
from attngraph.kernels.triton.common import (
    BIAS_KINDS,
    DENSE,
    EDGE,
    LN_2,
    LOG2_E,
    NO_BIAS,
    OFFSET,
    Padding,
    Strided,
    StridedBias,
    Upstream,
    bias_ptr_and_strides,
    bias_ptrs,
    compute_delta,
    constexprs,
    in_four_dims,
    load_real,
    load_rows,
    padded_dim,
    padding_ptr,
    ptr_and_strides,
    store_rows,
    sum_to_shape_of,
)

if TYPE_CHECKING:
    from attngraph.kernels.contract import Modifiers, TileRows, TilesLayout

# --------------------------------------------------------------------------------------------------- arguments


class TilePtrs(NamedTuple):
    """The tiles of each row, those with masks first; for dk and dv, of each column (read row for column)."""

    start: Tensor  # int64 (rows + 1,): the first tile of each row
    first_full: Tensor  # int64 (rows,): the first of its tiles without a mask
    column: Tensor  # int32 (T,): the column of each tile
    mask: Tensor  # int32 (T,): the number of its mask
    table_index: Tensor  # int32 (T,): its number in the table of tiles
    order: Tensor  # int32 (rows,): the rows, those with most tiles first


class MaskPtrs(NamedTuple):
    """The masks of tiles, 32 pairs to a word."""

    words: Tensor  # int32 (masks, TILE_M, TILE_N / 32)
    words_by_key: Tensor  # int32 (masks, TILE_N, TILE_M / 32): of the transposed masks
    spans: Tensor  # int32 (masks, TILE_M): the first key of each query | the one after its last << 16; read with SPANS
    spans_by_key: Tensor  # int32 (masks, TILE_N): of the transposed masks
    first_edge: Tensor  # (T, TILE_M, TILE_N / 32): the number of the first edge of each word; read with a bias of edges


class Inputs(NamedTuple):
    """What all kernels of a call read."""

    q: Strided
    k: Strided
    v: Strided
    bias: StridedBias | Strided  # without a bias, q: it is not read
    padding: Padding
    tiles: TilePtrs
    masks: MaskPtrs


class Config(NamedTuple):
    """What a kernel is compiled for."""

    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int  # HEAD_DIM, padded to a power of two
    BLOCK_DV: int  # VALUE_DIM, padded
    TILE_M: int
    TILE_N: int
    BLOCK_M: int
    BLOCK_N: int
    BIAS_KIND: int
    PADDED: bool
    SPANS: bool  # the edges of each node in a mask are a span, so that masks are two comparisons
    PRECISION: str
    NUM_STAGES: int


class QueryBlock(NamedTuple):
    """In a kernel: the queries of a program."""

    batch: tl.tensor
    head: tl.tensor
    kv_head: tl.tensor
    offs_m: tl.tensor  # (BLOCK_M,): their numbers
    start_m: tl.tensor  # the first one's place in its tiles
    num_queries: tl.tensor
    num_keys: tl.tensor


class KeyBlock(NamedTuple):
    """In a kernel: the keys of a program."""

    batch: tl.tensor
    kv_head: tl.tensor
    num_heads: tl.tensor
    group: tl.tensor  # query heads of a key head
    offs_n: tl.tensor  # (BLOCK_N,): their numbers
    start_n: tl.tensor  # the first one's place in its tiles
    real: tl.tensor  # (BLOCK_N,): whether they are no padding
    num_queries: tl.tensor


# ------------------------------------------------------------------------------------------ what a program reads


@triton.jit
def _find_block(tiles, block, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The row of tiles of a block, those with most tiles first; where in it the block begins; the block's nodes."""
    row = tl.load(tiles.order + block // (TILE // BLOCK)).to(tl.int64)
    start = (block % (TILE // BLOCK)) * BLOCK
    return row, start, row * TILE + start + tl.arange(0, BLOCK)


@triton.jit
def _tile_range(tiles, row):
    """The tiles of a row: those with masks are begin … first_full - 1, the full ones first_full … end - 1."""
    begin, first_full = tl.load(tiles.start + row), tl.load(tiles.first_full + row)
    end = tl.load(tiles.start + row + 1)
    return begin.to(tl.int32), first_full.to(tl.int32), end.to(tl.int32)


@triton.jit
def _load_mask(
    words, spans, tiles, tile, start_row, start_col,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    IS_MASKED: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """Which pairs are edges, (BLOCK_ROWS, BLOCK_COLS), in the block of a tile that begins at (start_row, start_col)."""
    if IS_MASKED:
        row = start_row + tl.arange(0, BLOCK_ROWS)
        mask = tl.load(tiles.mask + tile).to(tl.int64)
        if SPANS:
            span = tl.load(spans + mask * TILE_ROWS + row)[:, None]
            col = (start_col + tl.arange(0, BLOCK_COLS))[None, :]
            return (col >= (span & 0xFFFF)) & (col < (span >> 16))
        word = start_col // 32 + tl.arange(0, BLOCK_COLS // 32)
        ptrs = words + mask * (TILE_ROWS * TILE_COLS // 32)
        packed = tl.load(ptrs + row[:, None] * (TILE_COLS // 32) + word[None, :])
        bits = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        return tl.reshape(bits, [BLOCK_ROWS, BLOCK_COLS]) != 0
    return tl.full([BLOCK_ROWS, BLOCK_COLS], 1, tl.int1)


@triton.jit
def _edge_numbers(masks, tiles, tile, row, col, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """The numbers of the edges at (row, col) of a tile, for a bias of edges: the number of the first edge of the word,
    and how many bits are set before this one."""
    edge = row
    if config.BIAS_KIND == EDGE:
        WORDS: tl.constexpr = config.TILE_M * config.TILE_N // 32  # of a tile
        word = row * (config.TILE_N // 32) + col // 32
        first_edge = masks.first_edge + tl.load(tiles.table_index + tile).to(tl.int64) * WORDS
        edge = tl.load(first_edge + word)
        if IS_MASKED:
            mask = masks.words + tl.load(tiles.mask + tile).to(tl.int64) * WORDS
            bits = tl.load(mask + word) & ((1 << (col % 32)) - 1)
            bits = bits - ((bits >> 1) & 0x55555555)  # popcount; the uppermost bit is never among them
            bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
            bits = (bits + (bits >> 4)) & 0x0F0F0F0F
            bits = bits + (bits >> 8)
            edge += (bits + (bits >> 16)) & 63
        else:
            edge += col % 32
    return edge


@triton.jit
def _load_bias(bias, batch, head, offs_m, offs_n, edge, num_queries, mask, BIAS_KIND: tl.constexpr):
    """The bias of the pairs (offs_m, offs_n), times log2 e. It is read for edges alone."""
    ptrs = bias_ptrs(bias, batch, head, offs_m, offs_n, edge, num_queries, BIAS_KIND)
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def _scores(q, k, inputs, block, tile, start_n, offs_n, scale, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """The scores of a block of queries, (BLOCK_M, BLOCK_N), -inf where there is no edge, and what they are yet to be
    multiplied by: the scale, or 1 with a bias; which pairs are edges; and the numbers of these edges."""
    qk = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
    row = (block.start_m + tl.arange(0, config.BLOCK_M))[:, None]
    col = (start_n + tl.arange(0, config.BLOCK_N))[None, :]
    mask = _load_mask(
        inputs.masks.words, inputs.masks.spans, inputs.tiles, tile, block.start_m, start_n,
        config.TILE_M, config.TILE_N, config.BLOCK_M, config.BLOCK_N, IS_MASKED, config.SPANS,
    )  # fmt: skip
    edge = _edge_numbers(inputs.masks, inputs.tiles, tile, row, col, config, IS_MASKED)
    if config.PADDED:
        mask = mask & load_real(inputs.padding, block.batch, offs_n, offs_n < block.num_keys)[None, :]
    if config.BIAS_KIND != NO_BIAS:
        qk = qk * scale + _load_bias(
            inputs.bias, block.batch, block.head, block.offs_m[:, None], offs_n[None, :], edge, block.num_queries, mask,
            config.BIAS_KIND,
        )  # fmt: skip
        scale = 1.0
    if IS_MASKED or config.PADDED:
        qk = tl.where(mask, qk, float("-inf"))
    return qk, scale, mask, edge


# ----------------------------------------------------------------------------------------------------- forward


@triton.jit
def _fwd_inner(
    acc, row_max, row_sum, q, inputs, block, begin, end, scale, config: tl.constexpr, IS_MASKED: tl.constexpr
):
    """Online softmax of a block of queries over the tiles begin … end - 1."""
    batch, kv_head, num_keys = block.batch, block.kv_head, block.num_keys
    BLOCK_N: tl.constexpr = config.BLOCK_N
    BLOCKS: tl.constexpr = config.TILE_N // BLOCK_N  # of a tile
    for step in tl.range(begin * BLOCKS, end * BLOCKS, num_stages=config.NUM_STAGES):
        tile, start_n = step // BLOCKS, (step % BLOCKS) * BLOCK_N
        column = tl.load(inputs.tiles.column + tile).to(tl.int64)
        offs_n = column * config.TILE_N + start_n + tl.arange(0, BLOCK_N)
        k = load_rows(inputs.k, batch, kv_head, offs_n, num_keys, config.HEAD_DIM, config.BLOCK_D, IS_MASKED)
        v = load_rows(inputs.v, batch, kv_head, offs_n, num_keys, config.VALUE_DIM, config.BLOCK_DV, IS_MASKED)

        qk, factor, _, _ = _scores(q, k, inputs, block, tile, start_n, offs_n, scale, config, IS_MASKED)

        new_max = tl.maximum(row_max, tl.max(qk, 1) * factor)
        safe_max = new_max
        if (
            IS_MASKED or config.PADDED or config.BIAS_KIND != NO_BIAS
        ):  # a row without an edge so far: -inf - -inf would be NaN
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(qk * factor - safe_max[:, None])
        alpha = tl.exp2(row_max - safe_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=config.PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_queries", "num_keys"])
def _fwd_kernel(
    inputs, num_blocks, num_heads, group, num_queries, num_keys, scale, config: tl.constexpr,
    out, lse,
):  # fmt: skip
    """out = softmax(scale · q kᵀ + bias) v and lse, of a block of queries of one head."""
    block, bh = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = bh // num_heads, bh % num_heads
    tile_row, start_m, offs_m = _find_block(inputs.tiles, block, config.TILE_M, config.BLOCK_M)

    q = load_rows(inputs.q, batch, head, offs_m, num_queries, config.HEAD_DIM, config.BLOCK_D, True)
    acc = tl.zeros([config.BLOCK_M, config.BLOCK_DV], tl.float32)
    row_max = tl.full([config.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([config.BLOCK_M], tl.float32)

    begin, first_full, end = _tile_range(inputs.tiles, tile_row)
    queries = QueryBlock(batch, head, head // group, offs_m, start_m, num_queries, num_keys)
    acc, row_max, row_sum = _fwd_inner(
        acc, row_max, row_sum, q, inputs, queries, begin, first_full, scale, config, True
    )
    acc, row_max, row_sum = _fwd_inner(acc, row_max, row_sum, q, inputs, queries, first_full, end, scale, config, False)

    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # 0 of a query without edges: out = 0, lse = -inf
    row_lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(safe_sum)) * LN_2)
    store_rows(out, batch, head, offs_m, num_queries, acc / safe_sum[:, None], config.VALUE_DIM, config.BLOCK_DV)
    tl.store(lse + bh * num_queries + offs_m, row_lse, mask=offs_m < num_queries)


# ---------------------------------------------------------------------------------------------------- backward


@triton.jit
def _load_lse_delta(upstream, bh, offs_m, num_queries):
    """The lse of queries as a power of 2 (inf of a query without edges, so that exp2(qk - lse) is 0), and delta."""
    lse = tl.load(upstream.lse + bh * num_queries + offs_m, mask=offs_m < num_queries, other=float("-inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse, tl.load(upstream.delta + bh * num_queries + offs_m, mask=offs_m < num_queries, other=0.0)


@triton.jit
def _bwd_dq_inner(
    dq, q, do, lse, delta, inputs, dbias, block, begin, end, scale,
    config: tl.constexpr, IS_MASKED: tl.constexpr, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """What the tiles begin … end - 1 add to the dq of a block of queries; and the gradient of their bias, stored."""
    batch, kv_head, num_keys = block.batch, block.kv_head, block.num_keys
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    BLOCKS: tl.constexpr = config.TILE_N // BLOCK_N  # of a tile
    for step in tl.range(begin * BLOCKS, end * BLOCKS, num_stages=config.NUM_STAGES):
        tile, start_n = step // BLOCKS, (step % BLOCKS) * BLOCK_N
        column = tl.load(inputs.tiles.column + tile).to(tl.int64)
        offs_n = column * config.TILE_N + start_n + tl.arange(0, BLOCK_N)
        k = load_rows(inputs.k, batch, kv_head, offs_n, num_keys, config.HEAD_DIM, config.BLOCK_D, IS_MASKED)
        v = load_rows(inputs.v, batch, kv_head, offs_n, num_keys, config.VALUE_DIM, config.BLOCK_DV, IS_MASKED)

        qk, factor, mask, edge = _scores(q, k, inputs, block, tile, start_n, offs_n, scale, config, IS_MASKED)

        ds = tl.exp2(qk * factor - lse[:, None])
        ds *= tl.dot(do, tl.trans(v), input_precision=config.PRECISION) - delta[:, None]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=config.PRECISION)
        if BIAS_GRAD:
            ptrs = dbias.ptr + batch * dbias.stride_batch + block.head * dbias.stride_head
            if config.BIAS_KIND == EDGE:
                tl.store(ptrs + edge, ds, mask=mask)
            elif config.BIAS_KIND == DENSE:
                ptrs = ptrs + block.offs_m[:, None] * dbias.stride_query + offs_n[None, :] * dbias.stride_key
                tl.store(ptrs, ds, mask=mask)
            else:
                sums = _diagonal_sums(ds, BLOCK_M, BLOCK_N)
                index = tl.load(inputs.tiles.table_index + tile).to(tl.int64)
                block_index = (index * (config.TILE_M // BLOCK_M) + block.start_m // BLOCK_M) * BLOCKS + step % BLOCKS
                ptrs = ptrs + block_index * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
                tl.store(ptrs, sums)
    return dq


@triton.jit
def _diagonal_sums(ds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of ds (BLOCK_M, BLOCK_N) over its diagonals col - row = 1 - BLOCK_M …, (2 · BLOCK_N,)."""
    col = tl.arange(0, 2 * BLOCK_N)[None, :] + tl.arange(0, BLOCK_M)[:, None] - (BLOCK_M - 1)
    inside = (col >= 0) & (col < BLOCK_N)
    skewed = tl.where(inside, tl.gather(ds, tl.where(inside, col, 0), 1), 0.0)
    return tl.sum(skewed, 0)


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_queries", "num_keys"])
def _bwd_dq_kernel(
    inputs, num_blocks, num_heads, group, num_queries, num_keys, scale, config: tl.constexpr,
    upstream, dq_out, dbias, dq_scale, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries of one head; and the gradient of the bias of each of its pairs."""
    block, bh = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = bh // num_heads, bh % num_heads
    tile_row, start_m, offs_m = _find_block(inputs.tiles, block, config.TILE_M, config.BLOCK_M)

    q = load_rows(inputs.q, batch, head, offs_m, num_queries, config.HEAD_DIM, config.BLOCK_D, True)
    do = load_rows(upstream.dout, batch, head, offs_m, num_queries, config.VALUE_DIM, config.BLOCK_DV, True)
    lse, delta = _load_lse_delta(upstream, bh, offs_m, num_queries)
    dq = tl.zeros([config.BLOCK_M, config.BLOCK_D], tl.float32)

    begin, first_full, end = _tile_range(inputs.tiles, tile_row)
    queries = QueryBlock(batch, head, head // group, offs_m, start_m, num_queries, num_keys)
    dq = _bwd_dq_inner(dq, q, do, lse, delta, inputs, dbias, queries, begin, first_full, scale, config, True, BIAS_GRAD)
    dq = _bwd_dq_inner(dq, q, do, lse, delta, inputs, dbias, queries, first_full, end, scale, config, False, BIAS_GRAD)
    store_rows(dq_out, batch, head, offs_m, num_queries, dq * dq_scale, config.HEAD_DIM, config.BLOCK_D)


@triton.jit
def _bwd_dkdv_inner(
    dk, dv, dbias, k, v, inputs, upstream, block, begin, end, scale,
    config: tl.constexpr, IS_MASKED: tl.constexpr, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """What the tiles begin … end - 1 add to the dk and dv of a block of keys, and to the gradient of a bias of keys.

    Scores are transposed, (keys, queries). The query heads of a group come one after the other.
    """
    batch, kv_head, num_heads, group, offs_n, start_n, real, num_queries = block
    BLOCK_M: tl.constexpr = config.BLOCK_M
    BLOCK_N: tl.constexpr = config.BLOCK_N
    BLOCKS: tl.constexpr = config.TILE_M // BLOCK_M  # of a tile
    for step in tl.range(begin * BLOCKS * group, end * BLOCKS * group, num_stages=config.NUM_STAGES):
        tile, start_m = step // (BLOCKS * group), (step % BLOCKS) * BLOCK_M
        head = kv_head * group + step // BLOCKS % group
        tile_row = tl.load(inputs.tiles.column + tile).to(tl.int64)  # these are the tiles of the transpose
        offs_m = tile_row * config.TILE_M + start_m + tl.arange(0, BLOCK_M)
        q = load_rows(inputs.q, batch, head, offs_m, num_queries, config.HEAD_DIM, config.BLOCK_D, IS_MASKED)
        do = load_rows(upstream.dout, batch, head, offs_m, num_queries, config.VALUE_DIM, config.BLOCK_DV, IS_MASKED)
        lse, delta = _load_lse_delta(upstream, batch * num_heads + head, offs_m, num_queries)

        qkT, factor = tl.dot(k, tl.trans(q), input_precision=config.PRECISION), scale  # (BLOCK_N, BLOCK_M)
        row, col = (start_m + tl.arange(0, BLOCK_M))[None, :], (start_n + tl.arange(0, BLOCK_N))[:, None]
        mask = _load_mask(
            inputs.masks.words_by_key, inputs.masks.spans_by_key, inputs.tiles, tile, start_n, start_m,
            config.TILE_N, config.TILE_M, BLOCK_N, BLOCK_M, IS_MASKED, config.SPANS,
        )  # fmt: skip
        if config.PADDED:
            mask = mask & real[:, None]
        if config.BIAS_KIND != NO_BIAS:
            edge = _edge_numbers(inputs.masks, inputs.tiles, tile, row, col, config, IS_MASKED)
            qkT = qkT * scale + _load_bias(
                inputs.bias, batch, head, offs_m[None, :], offs_n[:, None], edge, num_queries, mask, config.BIAS_KIND
            )
            factor = 1.0
        if IS_MASKED or config.PADDED:
            qkT = tl.where(mask, qkT, float("-inf"))

        pT = tl.exp2(qkT * factor - lse[None, :])
        dv = tl.dot(pT.to(do.dtype), do, dv, input_precision=config.PRECISION)
        dsT = pT * (tl.dot(v, tl.trans(do), input_precision=config.PRECISION) - delta[None, :])
        dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision=config.PRECISION)
        if BIAS_GRAD:
            dbias += tl.sum(dsT, 1)
    return dk, dv, dbias


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_queries", "num_keys"])
def _bwd_dkdv_kernel(
    inputs, num_blocks, num_heads, group, num_queries, num_keys, scale, config: tl.constexpr,
    upstream, dk_out, dv_out, dbias_out, dk_scale, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys of one key head; and the gradient of a bias that depends on the key alone."""
    block, bh = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, kv_head = bh // (num_heads // group), bh % (num_heads // group)
    tile_column, start_n, offs_n = _find_block(inputs.tiles, block, config.TILE_N, config.BLOCK_N)

    k = load_rows(inputs.k, batch, kv_head, offs_n, num_keys, config.HEAD_DIM, config.BLOCK_D, True)
    v = load_rows(inputs.v, batch, kv_head, offs_n, num_keys, config.VALUE_DIM, config.BLOCK_DV, True)
    dk = tl.zeros([config.BLOCK_N, config.BLOCK_D], tl.float32)
    dv = tl.zeros([config.BLOCK_N, config.BLOCK_DV], tl.float32)
    dbias = tl.zeros([config.BLOCK_N], tl.float32)

    begin, first_full, end = _tile_range(inputs.tiles, tile_column)
    real = offs_n < num_keys
    if config.PADDED:
        real = load_real(inputs.padding, batch, offs_n, real)
    keys = KeyBlock(batch, kv_head, num_heads, group, offs_n, start_n, real, num_queries)
    dk, dv, dbias = _bwd_dkdv_inner(
        dk, dv, dbias, k, v, inputs, upstream, keys, begin, first_full, scale, config, True, BIAS_GRAD
    )
    dk, dv, dbias = _bwd_dkdv_inner(
        dk, dv, dbias, k, v, inputs, upstream, keys, first_full, end, scale, config, False, BIAS_GRAD
    )
    store_rows(dk_out, batch, kv_head, offs_n, num_keys, dk * dk_scale, config.HEAD_DIM, config.BLOCK_D)
    store_rows(dv_out, batch, kv_head, offs_n, num_keys, dv, config.VALUE_DIM, config.BLOCK_DV)
    if BIAS_GRAD:
        ptrs = dbias_out.ptr + batch * dbias_out.stride_batch + kv_head * dbias_out.stride_head + offs_n
        tl.store(ptrs, dbias, mask=offs_n < num_keys)


# ------------------------------------------------------------------------------------------------------ launch


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
# With a bias or padding: by architecture, bytes of a number, and the widest BLOCK_D.
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
DIAGONAL_BLOCKS = {2: Blocks(32, 32, 4, 2), 4: Blocks(32, 32, 8, 1)}  # for `_diagonal_sums`


def block_sizes(
    kernel: str, widest: int, itemsize: int, bias_kind: int, padded: bool, bias_grad: bool, device: torch.device
) -> Blocks:
    """How a kernel runs, by the widest BLOCK_D, the bytes of a number, the bias, padding and the architecture."""
    if kernel == "_bwd_dq_kernel" and bias_kind == OFFSET.value and bias_grad:
        return DIAGONAL_BLOCKS[itemsize]
    arch = architecture(device)
    plain = bias_kind == NO_BIAS.value and not padded
    table = BLOCKS[arch][kernel, itemsize] if plain else BIASED_BLOCKS[arch][itemsize]
    return next(blocks for limit, blocks in table.items() if widest <= limit)


@lru_cache
def architecture(device: torch.device) -> int:
    """The newest one with a table that is no newer than this device: 80 for Ampere and Ada, 90 from Hopper on."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 90 if capability >= (9, 0) else 80


def forward(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N) of the pairs of a layout; in float16, bfloat16 or float32."""
    out, lse = like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
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
    upstream = Upstream(ptr_and_strides(dout), lse, compute_delta(out, dout, lse, dlse))
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
        scale, bias, attention_mask = modifiers
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
        kinds = self.bias_kind, self.padded, bias_grad
        blocks = block_sizes(kernel.fn.__name__, widest, itemsize, *kinds, self.q.device)
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
        inputs = Inputs(*self.qkv, self.bias, self.padding, _tile_ptrs(tiles), self.masks)
        config = Config(
            *self.dims, tile_m, tile_n, blocks.BLOCK_M, blocks.BLOCK_N,
            self.bias_kind, self.padded, self.spans, _input_precision(self.q.dtype), blocks.num_stages,
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
    return {"ieee": "ieee", "tf32": "tf32"}.get(torch.backends.cuda.matmul.fp32_precision, "tf32x3")
