"""Flash attention over blocks of keys and the queries that hear each, on a CPU, in machine code by Numba.

Where single queries choose blocks of 64 keys (mixture of block attention, Lu et al. 2025), tiles of adjacent queries
would be nearly empty. So a tile here has any 64 of the queries that hear a block: their rows of q, of the sums so far
and of the gradients are gathered for it, and scattered after. Its steps are those of `tiles_forward` and
`tiles_backward`, and what holds of their bits holds here: every sum has a fixed order, which is that of the keys for a
query, and that of the queries for a key.

Gathering costs a quarter: 8 of 256 blocks for each of 16,384 queries, in 8 heads of dimension 64, take 0.20 s and
backward 0.41, whole tiles of as many pairs 0.16 and 0.35 (best of 7 runs, one core of a Xeon with AVX-512, float32).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import BlocksLayout, Modifiers
from attngraph.kernels.cpu.launch import in_threads
from attngraph.kernels.cpu.simd import LANES, TILE, load, store
from attngraph.kernels.cpu.tiles import (
    as_nodes,
    backward_tensors,
    filled,
    filled_grid,
    flat_heads,
    in_one_pass,
    log2_e,
    number_of,
    real_keys,
)
from attngraph.kernels.cpu.tiles_backward import BackwardTensors, softmax_backward
from attngraph.kernels.cpu.tiles_forward import LN_2, ForwardTensors, masked_score, online_softmax
from attngraph.kernels.cpu.tiles_steps import (
    ALL_BITS,
    FASTMATH_FLAGS,
    add_product,
    aligned,
    fill_zero,
    inner,
    product,
    scale_by,
    scale_rows,
    transpose,
    transpose_bits,
)

PIECES_PER_THREAD = 4  # of an entry, where there are too few for all threads


class Visits(NamedTuple):
    """A `BlocksLayout`: the queries that hear each block, as arrays."""

    start: np.ndarray
    query: np.ndarray
    tiles: int  # of 64 keys in a block
    causal: bool


# --------------------------------------------------------------------------------------------------- kernels


@inner
def gather(x, index, at, count, width, rows):
    """rows (64, width) = the rows index[at], …, index[at + count - 1] of x, the last of them again and again."""
    for r in range(TILE):
        row = np.int64(index[at + min(r, count - 1)]) * width
        for d in range(0, width, LANES):
            store(rows, r * width + d, load(x, row + d))


@inner
def scatter(rows, index, at, count, width, x):
    """The reverse."""
    for r in range(count):
        row = np.int64(index[at + r]) * width
        for d in range(0, width, LANES):
            store(x, row + d, load(rows, r * width + d))


@inner
def gather_numbers(x, index, at, count, base, numbers):
    """numbers (64,) = x[index[at] - base], …, as `gather`."""
    for r in range(TILE):
        numbers[r] = x[np.int64(index[at + min(r, count - 1)]) - base]


@inner
def scatter_numbers(numbers, index, at, count, base, x):
    """The reverse."""
    for r in range(count):
        x[np.int64(index[at + r]) - base] = numbers[r]


@inner
def visits_within(visits, block, first, stop):
    """The visits of a block by the queries first … stop - 1: the first of them, and the one after the last."""
    start = visits.start[block]
    found = visits.query[start : visits.start[block + 1]]
    return start + np.searchsorted(found, first), start + np.searchsorted(found, stop)


@inner
def load_visits(visits, at, count, key, real, by_query, by_key):
    """The pairs of `count` visits from `at` on with the real keys of 64 from `key` on, as `load_mask`."""
    is_full = count == TILE and real == ALL_BITS
    for r in range(TILE):
        bits = real if r < count else np.uint64(0)
        if visits.causal and r < count:
            heard = np.int64(visits.query[at + r]) - key + 1  # keys
            if heard < TILE:
                bits &= (np.uint64(1) << np.uint64(max(heard, 0))) - np.uint64(1)
                is_full = False
        by_query[r], by_key[r] = bits, ALL_BITS
    if not is_full:
        transpose_bits(by_query, by_key)


@in_threads(fastmath=FASTMATH_FLAGS)
def forward_part(job, parts, tensors, visits, scale_log2):
    """out and lse of some queries of one head, from blocks of which they hear no other: job after job, see `_parts`."""
    h, piece = divmod(job, len(parts))
    q, k, v, out, lse = tensors.q[h], tensors.k[h], tensors.v[h], tensors.out[h], tensors.lse[h]
    real_of = tensors.real[h // (len(tensors.q) // len(tensors.real))]
    head_dim, value_dim = tensors.head_dim, tensors.value_dim
    first, stop, first_block, end = parts[piece]
    p, rows, q_t = aligned(TILE * TILE, q), aligned(TILE * head_dim, q), aligned(TILE * head_dim, q)
    acc, row_max, row_sum, alpha = aligned(TILE * value_dim, q), aligned(TILE, q), aligned(TILE, q), aligned(TILE, q)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    all_max, all_sum = np.full(stop - first, masked_score(q), q.dtype), np.zeros(stop - first, q.dtype)
    fill_zero(out, first * value_dim, (stop - first) * value_dim)
    for block in range(first_block, end):
        low, high = visits_within(visits, block, first, stop)
        for at in range(low, high, TILE):
            count = min(TILE, high - at)
            gather(q, visits.query, at, count, head_dim, rows)
            transpose(rows, 0, head_dim, q_t)
            gather(out, visits.query, at, count, value_dim, acc)
            gather_numbers(all_max, visits.query, at, count, first, row_max)
            gather_numbers(all_sum, visits.query, at, count, first, row_sum)
            for tile in range(block * visits.tiles, (block + 1) * visits.tiles):
                real = real_of[tile]
                if not real:
                    continue
                load_visits(visits, at, count, tile * TILE, real, by_query, by_key)
                product(p, k, tile * TILE * head_dim, q_t, head_dim, by_key)
                online_softmax(p, by_key, None, scale_log2, row_max, row_sum, alpha)
                scale_rows(acc, 0, value_dim, alpha)
                add_product(acc, 0, p, 1, TILE, v, tile * TILE * value_dim, value_dim, by_query)
            scatter(acc, visits.query, at, count, value_dim, out)
            scatter_numbers(row_max, visits.query, at, count, first, all_max)
            scatter_numbers(row_sum, visits.query, at, count, first, all_sum)
    for x in range(stop - first):
        has_edge = all_sum[x] != 0
        log2 = all_max[x] * scale_log2 + math.log2(all_sum[x]) if has_edge else -np.inf
        lse[first + x] = log2 * LN_2
        scale_by(out, (first + x) * value_dim, value_dim, 1 / all_sum[x] if has_edge else 0.0)


@in_threads(fastmath=FASTMATH_FLAGS)
def backward_part(job, parts, tensors, visits, scale_log2, scale):
    """dq, which is 0, of some queries from all blocks that they hear, and dk and dv of some blocks from all queries.

    One of them alone, where the other is empty.
    """
    h, piece = divmod(job, len(parts))
    q, k, v, dout, dq, dk, dv = (
        tensors.q[h], tensors.k[h], tensors.v[h], tensors.dout[h], tensors.dq[h], tensors.dk[h], tensors.dv[h],
    )  # fmt: skip
    real_of = tensors.real[h // (len(tensors.q) // len(tensors.real))]
    first_query, stop_query, first_block, end = parts[piece]
    head_dim, value_dim, adds_dq, adds_dkdv = tensors.head_dim, tensors.value_dim, len(dq) > 0, len(dk) > 0
    p, ds = aligned(TILE * TILE, q), aligned(TILE * TILE, q)
    k_t, v_t = aligned(visits.tiles * TILE * head_dim, q), aligned(visits.tiles * TILE * value_dim, q)
    q_rows, dq_rows, dout_rows = (
        aligned(TILE * head_dim, q), aligned(TILE * head_dim, q), aligned(TILE * value_dim, q),
    )  # fmt: skip
    lse, delta = aligned(TILE, q), aligned(TILE, q)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for block in range(first_block, end):
        first, last = block * visits.tiles, (block + 1) * visits.tiles
        for tile in range(first, last):
            transpose(k, tile * TILE * head_dim, head_dim, k_t[(tile - first) * TILE * head_dim :])
            transpose(v, tile * TILE * value_dim, value_dim, v_t[(tile - first) * TILE * value_dim :])
        if adds_dkdv:
            fill_zero(dk, first * TILE * head_dim, (last - first) * TILE * head_dim)
            fill_zero(dv, first * TILE * value_dim, (last - first) * TILE * value_dim)
        low, high = visits_within(visits, block, first_query, stop_query)
        for at in range(low, high, TILE):
            count = min(TILE, high - at)
            gather(q, visits.query, at, count, head_dim, q_rows)
            gather(dout, visits.query, at, count, value_dim, dout_rows)
            gather_numbers(tensors.lse[h], visits.query, at, count, 0, lse)
            gather_numbers(tensors.delta[h], visits.query, at, count, 0, delta)
            if adds_dq:
                gather(dq, visits.query, at, count, head_dim, dq_rows)
            for tile in range(first, last):
                real, k_at, v_at = real_of[tile], tile * TILE * head_dim, tile * TILE * value_dim
                if not real:
                    continue
                load_visits(visits, at, count, tile * TILE, real, by_query, by_key)
                product(p, q_rows, 0, k_t[(tile - first) * TILE * head_dim :], head_dim, by_query)
                product(ds, dout_rows, 0, v_t[(tile - first) * TILE * value_dim :], value_dim, by_query)
                softmax_backward(p, ds, by_query, None, 1.0, scale_log2, lse, delta, 0, True)
                if adds_dkdv:
                    add_product(dv, v_at, p, 1, TILE, dout_rows, 0, value_dim, by_key)
                    add_product(dk, k_at, ds, 1, TILE, q_rows, 0, head_dim, by_key)
                if adds_dq:
                    add_product(dq_rows, 0, ds, TILE, 1, k, k_at, head_dim, by_query)
            if adds_dq:
                scatter(dq_rows, visits.query, at, count, head_dim, dq)
        if adds_dkdv:
            scale_by(dk, first * TILE * head_dim, (last - first) * TILE * head_dim, scale)
    if adds_dq:
        scale_by(dq, first_query * head_dim, (stop_query - first_query) * head_dim, scale)


# ------------------------------------------------------------------------------------------- tensors and jobs


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlocksLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 or float64 → out (B, H, N, Dv), lse (B, H, N).

    A query without edges has out 0 and lse -inf.
    """
    (B, H, N, D), Dv = q.shape, v.shape[3]
    (nodes, key_nodes), dims, number = filled_grid(layout), (filled(D), filled(Dv)), number_of(q.dtype)
    out, lse = np.empty((B * H, nodes * dims[1]), number), np.empty((B * H, nodes), number)
    k, v = _of_query_heads(k, H), _of_query_heads(v, H)
    sides = flat_heads(q, nodes), flat_heads(k, key_nodes), flat_heads(v, key_nodes)
    tensors = ForwardTensors(*sides, out, lse, _real_keys(layout, modifiers, B), *dims)
    parts = _parts(layout, _pieces_for(B * H * layout.entries), 1)
    forward_part(B * H * len(parts), parts, tensors, _visits(layout), number(modifiers.scale * log2_e(q.dtype)))
    return as_nodes(out, B, N, Dv, nodes, q.dtype), torch.from_numpy(lse).view(B, H, nodes)[:, :, :N]


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    layout: BlocksLayout,
    modifiers: Modifiers,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """What these blocks add to (dq, dk, dv, dbias), from the final out and lse of each query; dlse may be None.

    With Δ = Σ dout · out - dlse, p = exp(s - lse): dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k,
    dk = scale · dsᵀ q.
    """
    (B, H, N, D), (_, key_heads, M, Dv), (nodes, key_nodes) = q.shape, v.shape, filled_grid(layout)
    k, v = _of_query_heads(k, H), _of_query_heads(v, H)
    tensors = backward_tensors(q, k, v, out, lse, dout, dlse, layout, _real_keys(layout, modifiers, B))
    number, visits = number_of(q.dtype), _visits(layout)
    scales = number(modifiers.scale * log2_e(q.dtype)), number(modifiers.scale)

    def run(some: BackwardTensors, of_queries: int, of_blocks: int) -> None:
        parts = _parts(layout, of_queries, of_blocks)
        backward_part(B * H * len(parts), parts, some, visits, *scales)

    if in_one_pass(B * H * layout.entries):
        run(tensors, 1, 1)
    else:
        pieces = PIECES_PER_THREAD * torch.get_num_threads()
        run(tensors._replace(dk=tensors.dk[:, :0], dv=tensors.dv[:, :0]), pieces, 1)
        run(tensors._replace(dq=tensors.dq[:, :0]), 1, pieces)
    dk, dv = (as_nodes(x, B, M, dim, key_nodes, q.dtype) for x, dim in ((tensors.dk, D), (tensors.dv, Dv)))
    dk, dv = _of_key_heads(dk, key_heads), _of_key_heads(dv, key_heads)
    return as_nodes(tensors.dq, B, N, D, nodes, q.dtype), dk, dv, None


def _of_query_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, Hkv, M, ·) of each query head: (B, H, M, ·)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _of_key_heads(x: Tensor, key_heads: int) -> Tensor:
    """The reverse for gradients: (B, H, M, ·) → (B, Hkv, M, ·)."""
    return x if x.shape[1] == key_heads else x.unflatten(1, (key_heads, -1)).sum(2)


def _visits(layout: BlocksLayout) -> Visits:
    return Visits(layout.start.numpy(), layout.query.numpy(), layout.block // TILE, layout.causal)


def _real_keys(layout: BlocksLayout, modifiers: Modifiers, batch: int) -> np.ndarray:
    """A bit for each key that there is and that is no padding: uint64 (B, tiles of keys)."""
    mask = modifiers.attention_mask
    return real_keys(
        torch.ones(batch, layout.m, dtype=torch.bool, device="cpu") if mask is None else mask, layout.grid[1]
    )


def _parts(layout: BlocksLayout, of_queries: int, of_blocks: int) -> np.ndarray:
    """All pairs, those of each entry by themselves, its queries and its blocks cut into so many pieces: (parts, 4).

    Each are the pairs of some queries, first … stop - 1, and some blocks, first … stop - 1.
    """
    n, blocks = layout.n // layout.entries, layout.num_blocks // layout.entries
    parts = [
        (e * n + queries[0], e * n + queries[1], e * blocks + of_keys[0], e * blocks + of_keys[1])
        for e in range(layout.entries)
        for queries in _pieces(n, of_queries)
        for of_keys in _pieces(blocks, of_blocks)
    ]
    return np.array(parts, np.int64).reshape(-1, 4)


def _pieces(size: int, count: int) -> list[tuple[int, int]]:
    """0 … size - 1 in so many ranges (first, stop)."""
    return list(pairwise(size * piece // count for piece in range(count + 1)))


def _pieces_for(entries: int) -> int:
    """Into how many pieces the queries of each entry are cut: few, as each has fewer of the queries of a block."""
    threads = torch.get_num_threads()
    return 1 if entries % threads == 0 or entries >= PIECES_PER_THREAD * threads else threads
