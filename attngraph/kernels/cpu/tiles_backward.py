"""The backward pass over tiles on a CPU (Dao 2024, algorithm 2): scores and weights are computed again."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attngraph.kernels.cpu.half import keep_sums, load_wide, scratch_size, sums, widened
from attngraph.kernels.cpu.launch import in_threads
from attngraph.kernels.cpu.simd import LANES, TILE, broadcast, exp2, load, reduce_sum, store, where
from attngraph.kernels.cpu.tiles_scores import (
    NO_TRANSFORM,
    SOFTMAX,
    Place,
    add_bias_gradient,
    draw_kept,
    elementwise_backward,
    make_scores,
    new_scratch,
    scale_by_slopes,
)
from attngraph.kernels.cpu.tiles_steps import (
    FASTMATH_FLAGS,
    add_product,
    aligned,
    fill_zero,
    inner,
    load_mask,
    product,
    scale_by,
    transpose,
)


class BackwardTensors(NamedTuple):
    """Of all heads, those of one flat: (heads, nodes · dim) or (heads, nodes).

    For dk and dv, the heads of keys: of a query's, all that share a key head, one behind the other.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    lse: np.ndarray  # as an exponent of 2
    delta: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    real: np.ndarray  # uint64 (B, tiles of keys): a bit for each key that is no padding
    head_dim: int  # filled up to a multiple of 16, as value_dim
    value_dim: int


@in_threads(fastmath=FASTMATH_FLAGS)
def start_backward(head, lse, dlse, out, dout, exponent, delta, log2_e):
    """lse as an exponent of 2, inf where a query has no edges, so that p = 0; and Δ = Σ_d out · dout - dlse: of a head.

    All of them (heads, flat); dlse (0, 0) for none. exponent and delta are 0 beyond the queries of lse.
    """
    width = out.shape[1] // max(exponent.shape[1], 1)
    for i in range(exponent.shape[1]):
        exponent[head, i], delta[head, i] = 0, 0
    for i in range(lse.shape[1]):
        exponent[head, i] = np.inf if lse[head, i] == -np.inf else lse[head, i] * log2_e
        total = broadcast(exponent, 0)
        for d in range(i * width, (i + 1) * width, LANES):
            total = total + load_wide(out[head], d) * load_wide(dout[head], d)
        delta[head, i] = reduce_sum(total) - (dlse[head, i] if len(dlse) else 0)


@inner
def softmax_backward(p, ds, bits, kept, keep_factor, scale_log2, lse, delta, at, queries_stream):
    """Scores in p to p = 2^(scale · s - lse), and dp in ds to ds = p · (dp - delta), both (streamed, resident).

    lse and delta are those of the queries, from `at` on: of the streamed nodes, or else of the resident ones. With
    dropout, dp is keep_factor · dp where kept, else 0, and so is p, but for the factor; kept is None without.
    """
    zero, factor, keep = broadcast(p, 0), broadcast(p, scale_log2), broadcast(p, keep_factor)
    for r in range(TILE):
        for c in range(0, TILE, LANES):
            if queries_stream:
                lse_i, delta_i = broadcast(p, lse[at + r]), broadcast(p, delta[at + r])
            else:
                lse_i, delta_i = load(lse, at + c), load(delta, at + c)
            weight = where(bits[r], c, exp2(load(p, r * TILE + c) * factor - lse_i), zero)
            dp = load(ds, r * TILE + c)
            if kept is None:
                store(p, r * TILE + c, weight)
            else:
                store(p, r * TILE + c, where(kept[r], c, weight, zero))
                dp = where(kept[r], c, dp * keep, zero)
            store(ds, r * TILE + c, where(bits[r], c, weight * (dp - delta_i), zero))


@inner
def scores_backward(p, ds, bits, scoring, place, tiles, scratch, lse, delta, at, queries_stream):
    """Products in p to weights, 0 where dropped, and dp in ds to the gradients of the products over the scale."""
    dropout = scoring.dropout
    make_scores(p, scoring, place, tiles, scratch, queries_stream)
    if dropout.is_on:
        draw_kept(scratch.kept, bits, dropout, place, queries_stream)
    factor, kept = scoring.factor, scratch.kept
    if scoring.normalize != SOFTMAX:
        elementwise_backward(p, ds, bits, kept, dropout.factor, factor, scoring.normalize)
    elif dropout.is_on:
        softmax_backward(p, ds, bits, kept, dropout.factor, factor, lse, delta, at, queries_stream)
    else:
        softmax_backward(p, ds, bits, None, dropout.factor, factor, lse, delta, at, queries_stream)
    if scoring.transform != NO_TRANSFORM:
        scale_by_slopes(ds, bits, scratch.slopes)


@in_threads(fastmath=FASTMATH_FLAGS)
def backward_dq(job, pieces, tensors, tiles, scoring):
    """dq, which is 0, of some rows of tiles of one head, as in `forward_rows`: adds in the order of the keys."""
    h, piece = divmod(job, len(pieces) - 1)
    key_head = h // (len(tensors.q) // len(tensors.k))
    batch, head = divmod(h, len(tensors.q) // len(tensors.real))
    q, k, v, dout, dq = tensors.q[h], tensors.k[key_head], tensors.v[key_head], tensors.dout[h], tensors.dq[h]
    lse, delta, real_keys = tensors.lse[h], tensors.delta[h], tensors.real[batch]
    head_dim, value_dim = tensors.head_dim, tensors.value_dim
    key_size, value_size = TILE * head_dim, TILE * value_dim
    p, ds, q_t, dout_t = (
        aligned(TILE * TILE, lse), aligned(TILE * TILE, lse), aligned(key_size, lse), aligned(value_size, lse),
    )  # fmt: skip
    wide_k, wide_v = aligned(scratch_size(k, key_size), lse), aligned(scratch_size(v, value_size), lse)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    scratch = new_scratch(scoring, lse)
    for row in range(pieces[piece], pieces[piece + 1]):
        query = row * TILE
        q_i, q_at = widened(q, query * head_dim, key_size, wide_k)
        transpose(q_i, q_at, head_dim, q_t)
        dout_i, dout_at = widened(dout, query * value_dim, value_size, wide_v)
        transpose(dout_i, dout_at, value_dim, dout_t)
        masked, full = tiles.start[row], tiles.full[row]
        while masked < tiles.full[row] or full < tiles.start[row + 1]:  # merges two ascending lists
            take_masked = full == tiles.start[row + 1]
            if not take_masked and masked < tiles.full[row]:
                take_masked = tiles.column[masked] < tiles.column[full]
            if take_masked:
                tile = masked
                masked += 1
            else:
                tile = full
                full += 1
            key, real = np.int64(tiles.column[tile]) * TILE, real_keys[tiles.column[tile]]
            if not real:
                continue
            load_mask(tiles.words, tiles.mask[tile], real, by_query, by_key)
            k_j, k_at = widened(k, key * head_dim, key_size, wide_k)
            v_j, v_at = widened(v, key * value_dim, value_size, wide_v)
            product(p, k_j, k_at, q_t, head_dim, by_key)
            product(ds, v_j, v_at, dout_t, value_dim, by_key)
            if scoring.is_plain:
                factor, keep_factor = scoring.factor, scoring.dropout.factor
                softmax_backward(p, ds, by_key, None, keep_factor, factor, lse, delta, query, False)
            else:
                place = Place(batch, head, query, key, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile]))
                scores_backward(p, ds, by_key, scoring, place, tiles, scratch, lse, delta, query, False)
            add_product(dq, query * head_dim, ds, 1, TILE, k_j, k_at, head_dim, by_query)
        scale_by(dq, query * head_dim, TILE * head_dim, scoring.scale)


@inner
def backward_columns(first, stop, h, group, tensors, tiles, scoring, bias_gradient):
    """Of the columns of tiles first … stop - 1 of one key head."""
    q, k, v, dout, lse, delta = (
        tensors.q[h], tensors.k[h], tensors.v[h], tensors.dout[h], tensors.lse[h], tensors.delta[h],
    )  # fmt: skip
    dq, dk, dv = tensors.dq[h], tensors.dk[h], tensors.dv[h]
    batch, key_head = divmod(h, len(tensors.k) // len(tensors.real))
    head, real_keys = key_head * group, tensors.real[batch]
    head_dim, value_dim, n = tensors.head_dim, tensors.value_dim, len(lse) // group
    keep_factor = scoring.dropout.factor
    key_size, value_size = TILE * head_dim, TILE * value_dim
    p, ds, k_t, v_t = (
        aligned(TILE * TILE, lse), aligned(TILE * TILE, lse), aligned(key_size, lse), aligned(value_size, lse),
    )  # fmt: skip
    wide_q, wide_dout = aligned(scratch_size(q, key_size), lse), aligned(scratch_size(dout, value_size), lse)
    wide_k, wide_v = aligned(scratch_size(k, key_size), lse), aligned(scratch_size(v, value_size), lse)
    wide_dk, wide_dv = aligned(scratch_size(dk, key_size), lse), aligned(scratch_size(dv, value_size), lse)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    scratch = new_scratch(scoring, lse)
    for column in range(first, stop):
        real = real_keys[column]
        k_j, k_at = widened(k, column * key_size, key_size, wide_k)
        v_j, v_at = widened(v, column * value_size, value_size, wide_v)
        dk_j, dk_at = sums(dk, column * key_size, wide_dk)
        dv_j, dv_at = sums(dv, column * value_size, wide_dv)
        transpose(k_j, k_at, head_dim, k_t)
        transpose(v_j, v_at, value_dim, v_t)
        fill_zero(dk_j, dk_at, key_size)
        fill_zero(dv_j, dv_at, value_size)
        for tile in range(tiles.start[column], tiles.start[column + 1] if real else tiles.start[column]):
            load_mask(tiles.words, tiles.mask[tile], real, by_query, by_key)
            for g in range(group):
                query = np.int64(tiles.column[tile]) * TILE
                at = g * n + query
                q_i, q_at = widened(q, at * head_dim, key_size, wide_q)
                dout_i, dout_at = widened(dout, at * value_dim, value_size, wide_dout)
                product(p, q_i, q_at, k_t, head_dim, by_query)
                product(ds, dout_i, dout_at, v_t, value_dim, by_query)
                place = Place(
                    batch, head + g, query, column * TILE, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile])
                )
                if scoring.is_plain:
                    factor = scoring.factor
                    softmax_backward(p, ds, by_query, None, keep_factor, factor, lse, delta, at, True)
                else:
                    scores_backward(p, ds, by_query, scoring, place, tiles, scratch, lse, delta, at, True)
                add_product(dv_j, dv_at, p, 1, TILE, dout_i, dout_at, value_dim, by_key)
                add_product(dk_j, dk_at, ds, 1, TILE, q_i, q_at, head_dim, by_key)
                if len(dq):
                    add_product(dq, at * head_dim, ds, TILE, 1, k_j, k_at, head_dim, by_query)
                if len(bias_gradient.values) or len(bias_gradient.sums):
                    add_bias_gradient(bias_gradient, scoring.bias, place, tiles, ds, scratch)
        scale_by(dk_j, dk_at, key_size, scoring.scale)
        if keep_factor != 1:
            scale_by(dv_j, dv_at, value_size, keep_factor)
        keep_sums(dk, column * key_size, key_size, wide_dk)
        keep_sums(dv, column * value_size, value_size, wide_dv)
    scale_by(dq, 0, len(dq), scoring.scale)


@in_threads(fastmath=FASTMATH_FLAGS)
def backward_dkdv(job, pieces, heads_per_job, group, tensors, tiles, scoring, bias_gradient):
    """dk and dv of some columns of tiles, as in `forward_rows`, of a key head with `group` query heads, or of several.

    Where dq, which is 0, is not empty, the columns are all, and it is computed too: adds in the order of the keys.
    """
    heads, piece = divmod(job, len(pieces) - 1)
    for h in range(heads * heads_per_job, (heads + 1) * heads_per_job):
        backward_columns(pieces[piece], pieces[piece + 1], h, group, tensors, tiles, scoring, bias_gradient)
