"""The forward kernel of tiles; see tiles.py."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

import triton
import triton.language as tl

from attngraph.kernels.triton.common import LN_2, NO_BIAS, load_rows, store_rows
from attngraph.kernels.triton.modifiers import SOFTMAX, kept_block, weights_and_slopes
from attngraph.kernels.triton.tiles_scores import QueryBlock, block_scores, find_block, tile_range


@triton.jit
def _fwd_inner(
    acc, row_max, row_sum, q, inputs, block, begin, end, scale, config: tl.constexpr, IS_MASKED: tl.constexpr
):
    """Online softmax of a block of queries, or sums with other weights, over the tiles begin … end - 1."""
    batch, kv_head, num_keys = block.batch, block.kv_head, block.num_keys
    BLOCK_N: tl.constexpr = config.BLOCK_N
    BLOCKS: tl.constexpr = config.TILE_N // BLOCK_N  # of a tile
    for step in tl.range(begin * BLOCKS, end * BLOCKS, num_stages=config.NUM_STAGES):
        tile, start_n = step // BLOCKS, (step % BLOCKS) * BLOCK_N
        column = tl.load(inputs.tiles.column + tile).to(tl.int64)
        offs_n = column * config.TILE_N + start_n + tl.arange(0, BLOCK_N)
        k = load_rows(inputs.k, batch, kv_head, offs_n, num_keys, config.HEAD_DIM, config.BLOCK_D, IS_MASKED)
        v = load_rows(inputs.v, batch, kv_head, offs_n, num_keys, config.VALUE_DIM, config.BLOCK_DV, IS_MASKED)

        qk, factor, _, mask, _ = block_scores(q, k, inputs, block, tile, start_n, offs_n, scale, config, IS_MASKED)

        if config.NORMALIZE == SOFTMAX:
            new_max = tl.maximum(row_max, tl.max(qk, 1) * factor)
            safe_max = new_max
            if (
                IS_MASKED or config.PADDED or config.BIAS_KIND != NO_BIAS
            ):  # a row without an edge so far: -inf - -inf would be NaN
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(qk * factor - safe_max[:, None])
            alpha = tl.exp2(row_max - safe_max)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            row_max = new_max
        else:
            alpha = tl.full([config.BLOCK_M], 1.0, tl.float32)
            p, _ = weights_and_slopes(qk, mask, config, IS_MASKED or config.PADDED)
        if config.DROPOUT:
            first_key = column * config.TILE_N + start_n
            p = tl.where(
                kept_block(inputs.dropout, batch, block.head, block.offs_m, first_key, config.BLOCK_M, BLOCK_N), p, 0.0
            )
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=config.PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_queries", "num_keys"])
def _fwd_kernel(
    inputs, num_blocks, num_heads, group, num_queries, num_keys, scale, config: tl.constexpr,
    out, lse,
):  # fmt: skip
    """out = weights(transform(scale · q kᵀ + bias)) v and, of softmax, lse; of a block of queries of one head."""
    block, bh = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = bh // num_heads, bh % num_heads
    tile_row, start_m, offs_m = find_block(inputs.tiles, block, config.TILE_M, config.BLOCK_M)

    q = load_rows(inputs.q, batch, head, offs_m, num_queries, config.HEAD_DIM, config.BLOCK_D, True)
    acc = tl.zeros([config.BLOCK_M, config.BLOCK_DV], tl.float32)
    row_max = tl.full([config.BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([config.BLOCK_M], tl.float32)

    begin, first_full, end = tile_range(inputs.tiles, tile_row)
    queries = QueryBlock(batch, head, head // group, offs_m, start_m, num_queries, num_keys)
    acc, row_max, row_sum = _fwd_inner(
        acc, row_max, row_sum, q, inputs, queries, begin, first_full, scale, config, True
    )
    acc, row_max, row_sum = _fwd_inner(acc, row_max, row_sum, q, inputs, queries, first_full, end, scale, config, False)

    if config.DROPOUT:
        acc = acc * inputs.dropout.keep_factor[0]
    if config.NORMALIZE == SOFTMAX:
        safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # 0 of a query without edges: out = 0, lse = -inf
        row_lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(safe_sum)) * LN_2)
        acc = acc / safe_sum[:, None]
    store_rows(out, batch, head, offs_m, num_queries, acc, config.VALUE_DIM, config.BLOCK_DV)
    if config.NORMALIZE == SOFTMAX:
        tl.store(lse + bh * num_queries + offs_m, row_lse, mask=offs_m < num_queries)
