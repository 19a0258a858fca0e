"""What the kernels of tiles have in common: their arguments, the blocks and masks of a tile, and the scores."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.triton.common import EDGE, LOG2_E, NO_BIAS, Padding, Strided, StridedBias, bias_ptrs, load_real
from attngraph.kernels.triton.modifiers import NO_TRANSFORM, SOFTMAX, DropoutPtrs, transformed, weights_and_slopes

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
    dropout: DropoutPtrs | None
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
    TRANSFORM: int
    TRANSFORM_VALUE: float
    NORMALIZE: int
    DROPOUT: bool
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
    tile_column: tl.tensor
    start_n: tl.tensor  # the first one's place in its tiles
    real: tl.tensor  # (BLOCK_N,): whether they are no padding
    num_queries: tl.tensor


# ------------------------------------------------------------------------------------------ what a program reads


@triton.jit
def find_block(tiles, block, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The row of tiles of a block, those with most tiles first; where in it the block begins; the block's nodes."""
    row = tl.load(tiles.order + block // (TILE // BLOCK)).to(tl.int64)
    start = (block % (TILE // BLOCK)) * BLOCK
    return row, start, row * TILE + start + tl.arange(0, BLOCK)


@triton.jit
def tile_range(tiles, row):
    """The tiles of a row: those with masks are begin … first_full - 1, the full ones first_full … end - 1."""
    begin, first_full = tl.load(tiles.start + row), tl.load(tiles.first_full + row)
    end = tl.load(tiles.start + row + 1)
    return begin.to(tl.int32), first_full.to(tl.int32), end.to(tl.int32)


@triton.jit
def load_mask(
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
def edge_numbers(masks, tiles, tile, row, col, config: tl.constexpr, IS_MASKED: tl.constexpr):
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
def load_bias(bias, batch, head, offs_m, offs_n, edge, num_queries, mask, BIAS_KIND: tl.constexpr):
    """The bias of the pairs (offs_m, offs_n), times log2 e. It is read for edges alone."""
    ptrs = bias_ptrs(bias, batch, head, offs_m, offs_n, edge, num_queries, BIAS_KIND)
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def block_scores(q, k, inputs, block, tile, start_n, offs_n, scale, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """The scores of a block of queries, (BLOCK_M, BLOCK_N); what they are yet to be multiplied by, and the slopes of
    their transform (see `modified_scores`); which pairs are edges; and the numbers of these edges."""
    qk = tl.dot(q, tl.trans(k), input_precision=config.PRECISION)
    row = (block.start_m + tl.arange(0, config.BLOCK_M))[:, None]
    col = (start_n + tl.arange(0, config.BLOCK_N))[None, :]
    mask = load_mask(
        inputs.masks.words, inputs.masks.spans, inputs.tiles, tile, block.start_m, start_n,
        config.TILE_M, config.TILE_N, config.BLOCK_M, config.BLOCK_N, IS_MASKED, config.SPANS,
    )  # fmt: skip
    edge = edge_numbers(inputs.masks, inputs.tiles, tile, row, col, config, IS_MASKED)
    if config.PADDED:
        mask = mask & load_real(inputs.padding, block.batch, offs_n, offs_n < block.num_keys)[None, :]
    if config.BIAS_KIND != NO_BIAS:
        qk = qk * scale + load_bias(
            inputs.bias, block.batch, block.head, block.offs_m[:, None], offs_n[None, :], edge, block.num_queries, mask,
            config.BIAS_KIND,
        )  # fmt: skip
        scale = 1.0
    qk, scale, slope = modified_scores(qk, scale, mask, config, IS_MASKED)
    return qk, scale, slope, mask, edge


@triton.jit
def modified_scores(qk, scale, mask, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """Scores yet to be multiplied by `scale` → transformed, for softmax -inf where there is no edge; what they are yet
    to be multiplied by, 1 after a function of them; and the slopes of the transform."""
    slope = 1.0
    if config.TRANSFORM != NO_TRANSFORM or config.NORMALIZE != SOFTMAX:
        qk, slope = transformed(qk * scale, config)
        scale = 1.0
    if (IS_MASKED or config.PADDED) and config.NORMALIZE == SOFTMAX:
        qk = tl.where(mask, qk, float("-inf"))
    return qk, scale, slope


@triton.jit
def weights_of(qk, lse, mask, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """The weights of scores, and their slopes: of softmax, the weights again, which multiply dw - delta."""
    if config.NORMALIZE == SOFTMAX:
        p = tl.exp2(qk - lse)
        return p, p
    return weights_and_slopes(qk, mask, config, IS_MASKED or config.PADDED)
