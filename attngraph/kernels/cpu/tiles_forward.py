"""The forward pass over tiles on a CPU: flash attention (Dao 2024, algorithm 1), and weights by other normalisers."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from attngraph.kernels.cpu.half import keep_sums, scratch_size, sums, widened
from attngraph.kernels.cpu.launch import in_threads
from attngraph.kernels.cpu.simd import (
    LANES,
    TILE,
    broadcast,
    exp2_scaled,
    load,
    maximum,
    store,
    where,
    where_positive,
)
from attngraph.kernels.cpu.tiles_scores import (
    SOFTMAX,
    Place,
    draw_kept,
    elementwise_weights,
    make_scores,
    new_scratch,
)
from attngraph.kernels.cpu.tiles_steps import (
    ALL_BITS,
    FASTMATH_FLAGS,
    add_product,
    aligned,
    fill_zero,
    inner,
    load_mask,
    product,
    scale_by,
    scale_rows,
    transpose,
)

LN_2 = math.log(2)
MAX_EXCESS = 8  # as an exponent of 2


class ForwardTensors(NamedTuple):
    """Of all heads, those of one flat: (heads, nodes · dim) or (heads, nodes)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    real: np.ndarray  # uint64 (B, tiles of keys): a bit for each key that is no padding
    head_dim: int  # filled up to a multiple of 16, as value_dim
    value_dim: int


@inner
def masked_score(s):
    """Below every score, and finite: a query without edges has no NaN."""
    return np.finfo(s.dtype).min


@inner
def of_edges(bits, r, c, value, other):
    """`value` where bits[r] has an edge, from column c on, else `other`; bits is None where there are edges alone."""
    if bits is None:
        return value
    return where(bits[r], c, value, other)


@inner
def online_softmax(s, bits, kept, scale_log2, row_max, row_sum, alpha):
    """Scores s (keys, queries) to p = 2^(scale · (s - row_max)), in place; alpha is what earlier sums are worth now.

    row_max, row_sum and alpha (queries,): row_sum is updated, out is left to the caller. row_max follows the largest
    score where p would exceed 2^MAX_EXCESS: until then no p is too large, and alpha is 1. bits is None where all pairs
    are edges. Of those that are not kept, p counts in row_sum, and is 0 after; kept is None where all are.
    """
    zero, masked, excess = broadcast(s, 0), broadcast(s, masked_score(s)), broadcast(s, MAX_EXCESS)
    factor = broadcast(s, scale_log2)
    for c in range(0, TILE, LANES):
        old_max = load(row_max, c)
        max_a, max_b = old_max, old_max  # two chains: each comparison waits for the one before
        for r in range(0, TILE, 2):
            max_a = maximum(of_edges(bits, r, c, load(s, r * TILE + c), masked), max_a)
            max_b = maximum(of_edges(bits, r + 1, c, load(s, (r + 1) * TILE + c), masked), max_b)
        largest = maximum(max_a, max_b)
        new_max = where_positive((largest - old_max) * factor - excess, largest, old_max)
        rescale = exp2_scaled(old_max - new_max, factor)
        sums = load(row_sum, c) * rescale
        for r in range(TILE):
            p = of_edges(bits, r, c, exp2_scaled(load(s, r * TILE + c) - new_max, factor), zero)
            sums = sums + p
            if kept is not None:
                p = where(kept[r], c, p, zero)
            store(s, r * TILE + c, p)
        store(row_max, c, new_max)
        store(row_sum, c, sums)
        store(alpha, c, rescale)


@in_threads(fastmath=FASTMATH_FLAGS)
def forward_rows(job, pieces, tensors, tiles, scoring):
    """out and lse of some rows of tiles of one head: pieces[i] … pieces[i + 1] - 1, job after job, head after head."""
    h, piece = divmod(job, len(pieces) - 1)
    key_head = h // (len(tensors.q) // len(tensors.k))
    batch, head = divmod(h, len(tensors.q) // len(tensors.real))
    q, k, v, out, lse = tensors.q[h], tensors.k[key_head], tensors.v[key_head], tensors.out[h], tensors.lse[h]
    real_keys, head_dim, value_dim = tensors.real[batch], tensors.head_dim, tensors.value_dim
    key_size, value_size = TILE * head_dim, TILE * value_dim
    p, q_t = aligned(TILE * TILE, lse), aligned(key_size, lse)
    wide_k, wide_v = aligned(scratch_size(k, key_size), lse), aligned(scratch_size(v, value_size), lse)
    wide_out = aligned(scratch_size(out, value_size), lse)
    row_max, row_sum, alpha = aligned(TILE, lse), aligned(TILE, lse), aligned(TILE, lse)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    scratch, dropout = new_scratch(scoring, lse), scoring.dropout
    for row in range(pieces[piece], pieces[piece + 1]):
        acc, acc_at = sums(out, row * value_size, wide_out)
        q_i, q_at = widened(q, row * key_size, key_size, wide_k)
        transpose(q_i, q_at, head_dim, q_t)
        fill_zero(acc, acc_at, value_size)
        for r in range(TILE):
            row_max[r], row_sum[r] = masked_score(lse), 0
        for tile in range(tiles.start[row], tiles.start[row + 1]):
            key, real = np.int64(tiles.column[tile]) * TILE, real_keys[tiles.column[tile]]
            if not real:
                continue
            load_mask(tiles.words, tiles.mask[tile], real, by_query, by_key)
            k_j, k_at = widened(k, key * head_dim, key_size, wide_k)
            product(p, k_j, k_at, q_t, head_dim, by_key)
            if not scoring.is_plain:
                place = Place(batch, head, row * TILE, key, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile]))
                make_scores(p, scoring, place, tiles, scratch, False)
                if dropout.is_on:
                    draw_kept(scratch.kept, by_key, dropout, place, False)
            if scoring.normalize == SOFTMAX:
                if dropout.is_on:
                    online_softmax(p, by_key, scratch.kept, scoring.factor, row_max, row_sum, alpha)
                elif tiles.mask[tile] < 0 and real == ALL_BITS:
                    online_softmax(p, None, None, scoring.factor, row_max, row_sum, alpha)
                else:
                    online_softmax(p, by_key, None, scoring.factor, row_max, row_sum, alpha)
                if tile > tiles.start[row]:
                    scale_rows(acc, acc_at, value_dim, alpha)
            else:
                elementwise_weights(p, by_key, scratch.kept, scoring.factor, scoring.normalize)
            v_j, v_at = widened(v, key * value_dim, value_size, wide_v)
            add_product(acc, acc_at, p, 1, TILE, v_j, v_at, value_dim, by_query)
        if scoring.normalize == SOFTMAX:
            for r in range(TILE):
                has_edge = row_sum[r] != 0
                log2 = row_max[r] * scoring.factor + math.log2(row_sum[r]) if has_edge else -np.inf
                lse[row * TILE + r] = log2 * LN_2
                alpha[r] = dropout.factor / row_sum[r] if has_edge else 0.0
            scale_rows(acc, acc_at, value_dim, alpha)
        else:
            fill_zero(lse, row * TILE, TILE)
            scale_by(acc, acc_at, value_size, dropout.factor)
        keep_sums(out, row * value_size, value_size, wide_out)
