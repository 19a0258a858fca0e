"""The backward kernels of tiles, for dq, and for dk with dv; see tiles.py."""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

import triton
import triton.language as tl

from attngraph.kernels.triton.common import DENSE, EDGE, LOG2_E, NO_BIAS, load_real, load_rows, store_rows
from attngraph.kernels.triton.modifiers import NO_TRANSFORM, SOFTMAX, kept_block
from attngraph.kernels.triton.tiles_scores import (
    KeyBlock,
    QueryBlock,
    block_scores,
    edge_numbers,
    find_block,
    load_bias,
    load_mask,
    modified_scores,
    tile_range,
    weights_of,
)


@triton.jit
def _load_lse_delta(upstream, bh, offs_m, num_queries, config: tl.constexpr):
    """The lse of queries as a power of 2 (inf of a query without edges, so that exp2(qk - lse) is 0), and delta; zeros
    but for softmax."""
    if config.NORMALIZE != SOFTMAX:
        return tl.zeros(offs_m.shape, tl.float32), tl.zeros(offs_m.shape, tl.float32)
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

        qk, factor, slope, mask, edge = block_scores(
            q, k, inputs, block, tile, start_n, offs_n, scale, config, IS_MASKED
        )

        _, ds = weights_of(qk * factor, lse[:, None], mask, config, IS_MASKED)
        dw = tl.dot(do, tl.trans(v), input_precision=config.PRECISION)
        if config.DROPOUT:
            first_key = column * config.TILE_N + start_n
            kept = kept_block(inputs.dropout, batch, block.head, block.offs_m, first_key, BLOCK_M, BLOCK_N)
            dw = tl.where(kept, dw * inputs.dropout.keep_factor[0], 0.0)
        ds *= dw - delta[:, None]
        if config.TRANSFORM != NO_TRANSFORM:
            ds *= slope
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
    tile_row, start_m, offs_m = find_block(inputs.tiles, block, config.TILE_M, config.BLOCK_M)

    q = load_rows(inputs.q, batch, head, offs_m, num_queries, config.HEAD_DIM, config.BLOCK_D, True)
    do = load_rows(upstream.dout, batch, head, offs_m, num_queries, config.VALUE_DIM, config.BLOCK_DV, True)
    lse, delta = _load_lse_delta(upstream, bh, offs_m, num_queries, config)
    dq = tl.zeros([config.BLOCK_M, config.BLOCK_D], tl.float32)

    begin, first_full, end = tile_range(inputs.tiles, tile_row)
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
    batch, kv_head, num_heads, group, offs_n, tile_column, start_n, real, num_queries = block
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
        lse, delta = _load_lse_delta(upstream, batch * num_heads + head, offs_m, num_queries, config)

        qkT, factor = tl.dot(k, tl.trans(q), input_precision=config.PRECISION), scale  # (BLOCK_N, BLOCK_M)
        row, col = (start_m + tl.arange(0, BLOCK_M))[None, :], (start_n + tl.arange(0, BLOCK_N))[:, None]
        mask = load_mask(
            inputs.masks.words_by_key, inputs.masks.spans_by_key, inputs.tiles, tile, start_n, start_m,
            config.TILE_N, config.TILE_M, BLOCK_N, BLOCK_M, IS_MASKED, config.SPANS,
        )  # fmt: skip
        if config.PADDED:
            mask = mask & real[:, None]
        if config.BIAS_KIND != NO_BIAS:
            edge = edge_numbers(inputs.masks, inputs.tiles, tile, row, col, config, IS_MASKED)
            qkT = qkT * scale + load_bias(
                inputs.bias, batch, head, offs_m[None, :], offs_n[:, None], edge, num_queries, mask, config.BIAS_KIND
            )
            factor = 1.0
        qkT, factor, slopeT = modified_scores(qkT, factor, mask, config, IS_MASKED)

        pT, dsT = weights_of(qkT * factor, lse[None, :], mask, config, IS_MASKED)
        if config.DROPOUT:
            first_key = tile_column * config.TILE_N + start_n
            keptT = tl.trans(kept_block(inputs.dropout, batch, head, offs_m, first_key, BLOCK_M, BLOCK_N))
            pT = tl.where(keptT, pT, 0.0)
        dv = tl.dot(pT.to(do.dtype), do, dv, input_precision=config.PRECISION)
        dwT = tl.dot(v, tl.trans(do), input_precision=config.PRECISION)
        if config.DROPOUT:
            dwT = tl.where(keptT, dwT * inputs.dropout.keep_factor[0], 0.0)
        dsT *= dwT - delta[None, :]
        if config.TRANSFORM != NO_TRANSFORM:
            dsT *= slopeT
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
    tile_column, start_n, offs_n = find_block(inputs.tiles, block, config.TILE_N, config.BLOCK_N)

    k = load_rows(inputs.k, batch, kv_head, offs_n, num_keys, config.HEAD_DIM, config.BLOCK_D, True)
    v = load_rows(inputs.v, batch, kv_head, offs_n, num_keys, config.VALUE_DIM, config.BLOCK_DV, True)
    dk = tl.zeros([config.BLOCK_N, config.BLOCK_D], tl.float32)
    dv = tl.zeros([config.BLOCK_N, config.BLOCK_DV], tl.float32)
    dbias = tl.zeros([config.BLOCK_N], tl.float32)

    begin, first_full, end = tile_range(inputs.tiles, tile_column)
    real = offs_n < num_keys
    if config.PADDED:
        real = load_real(inputs.padding, batch, offs_n, real)
    keys = KeyBlock(batch, kv_head, num_heads, group, offs_n, tile_column, start_n, real, num_queries)
    dk, dv, dbias = _bwd_dkdv_inner(
        dk, dv, dbias, k, v, inputs, upstream, keys, begin, first_full, scale, config, True, BIAS_GRAD
    )
    dk, dv, dbias = _bwd_dkdv_inner(
        dk, dv, dbias, k, v, inputs, upstream, keys, first_full, end, scale, config, False, BIAS_GRAD
    )
    if config.DROPOUT:
        dv = dv * inputs.dropout.keep_factor[0]
    store_rows(dk_out, batch, kv_head, offs_n, num_keys, dk * dk_scale, config.HEAD_DIM, config.BLOCK_D)
    store_rows(dv_out, batch, kv_head, offs_n, num_keys, dv, config.VALUE_DIM, config.BLOCK_DV)
    if BIAS_GRAD:
        ptrs = dbias_out.ptr + batch * dbias_out.stride_batch + kv_head * dbias_out.stride_head + offs_n
        tl.store(ptrs, dbias, mask=offs_n < num_keys)
