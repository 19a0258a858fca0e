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
from attngraph.kernels.cpu.openmp import parallel_for
from attngraph.kernels.cpu.simd import LANES, TILE, load, store
from attngraph.kernels.cpu.tiles import Gradients, backward_tensors, flat_heads, in_one_pass, log2_e, real_keys, tiled
from attngraph.kernels.cpu.tiles_backward import BackwardTensors, softmax_backward
from attngraph.kernels.cpu.tiles_forward import LN_2, ForwardTensors, masked_score, online_softmax
from attngraph.kernels.cpu.tiles_steps import (
    ALL_BITS,
    add_product,
    aligned,
    compiled,
    fill_zero,
    inner,
    product,
    scale_by,
    scale_rows,
    transpose,
    transpose_bits,
)
from attngraph.kernels.memory import DTYPES, empty

PIECES_PER_THREAD = 4  # of an entry, where there are too few for all threads


class Visits(NamedTuple):
    """A `BlocksLayout`: the queries that hear each block, as arrays."""

    start: np.ndarray
    query: np.ndarray
    tiles: int  # of 64 keys in a block
    causal: bool


class Part(NamedTuple):
    """What a job computes: the pairs of some queries and some blocks, each as first, stop."""

    queries: tuple[int, int]
    blocks: tuple[int, int]


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
def visits_within(visits, block, queries):
    """The visits of a block by the queries first … stop - 1: the first of them, and the one after the last."""
    start, stop = visits.start[block], visits.start[block + 1]
    found = visits.query[start:stop]
    return start + np.searchsorted(found, queries[0]), start + np.searchsorted(found, queries[1])


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


@compiled
def forward_part(part, tensors, visits, scale_log2):
    """out and lse of some queries of one head, from blocks of which they hear no other."""
    q, k, v, out, lse = tensors.q, tensors.k, tensors.v, tensors.out, tensors.lse
    head_dim, value_dim = tensors.head_dim, tensors.value_dim
    first, stop = part.queries
    p, rows, q_t = aligned(TILE * TILE, q), aligned(TILE * head_dim, q), aligned(TILE * head_dim, q)
    acc, row_max, row_sum, alpha = aligned(TILE * value_dim, q), aligned(TILE, q), aligned(TILE, q), aligned(TILE, q)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    all_max, all_sum = np.full(stop - first, masked_score(q), q.dtype), np.zeros(stop - first, q.dtype)
    fill_zero(out, first * value_dim, (stop - first) * value_dim)
    for block in range(*part.blocks):
        low, high = visits_within(visits, block, part.queries)
        for at in range(low, high, TILE):
            count = min(TILE, high - at)
            gather(q, visits.query, at, count, head_dim, rows)
            transpose(rows, 0, head_dim, q_t)
            gather(out, visits.query, at, count, value_dim, acc)
            gather_numbers(all_max, visits.query, at, count, first, row_max)
            gather_numbers(all_sum, visits.query, at, count, first, row_sum)
            for tile in range(block * visits.tiles, (block + 1) * visits.tiles):
                real = tensors.real[tile]
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
        lse[first + x] = (all_max[x] + math.log2(all_sum[x])) * LN_2 if has_edge else -np.inf
        scale_by(out, (first + x) * value_dim, value_dim, 1 / all_sum[x] if has_edge else 0.0)


@compiled
def backward_part(part, tensors, visits, scale_log2, scale):
    """dq, which is 0, of some queries from all blocks that they hear, and dk and dv of some blocks from all queries.

    One of them alone, where the other is empty.
    """
    q, k, v, dout, dq, dk, dv = (
        tensors.q, tensors.k, tensors.v, tensors.dout, tensors.dq, tensors.dk, tensors.dv,
    )  # fmt: skip
    head_dim, value_dim, adds_dq, adds_dkdv = tensors.head_dim, tensors.value_dim, len(dq) > 0, len(dk) > 0
    p, ds = aligned(TILE * TILE, q), aligned(TILE * TILE, q)
    k_t, v_t = aligned(visits.tiles * TILE * head_dim, q), aligned(visits.tiles * TILE * value_dim, q)
    q_rows, dq_rows, dout_rows = (
        aligned(TILE * head_dim, q), aligned(TILE * head_dim, q), aligned(TILE * value_dim, q),
    )  # fmt: skip
    lse, delta = aligned(TILE, q), aligned(TILE, q)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for block in range(*part.blocks):
        first, last = block * visits.tiles, (block + 1) * visits.tiles
        for tile in range(first, last):
            transpose(k, tile * TILE * head_dim, head_dim, k_t[(tile - first) * TILE * head_dim :])
            transpose(v, tile * TILE * value_dim, value_dim, v_t[(tile - first) * TILE * value_dim :])
        if adds_dkdv:
            fill_zero(dk, first * TILE * head_dim, (last - first) * TILE * head_dim)
            fill_zero(dv, first * TILE * value_dim, (last - first) * TILE * value_dim)
        low, high = visits_within(visits, block, part.queries)
        for at in range(low, high, TILE):
            count = min(TILE, high - at)
            gather(q, visits.query, at, count, head_dim, q_rows)
            gather(dout, visits.query, at, count, value_dim, dout_rows)
            gather_numbers(tensors.lse, visits.query, at, count, 0, lse)
            gather_numbers(tensors.delta, visits.query, at, count, 0, delta)
            if adds_dq:
                gather(dq, visits.query, at, count, head_dim, dq_rows)
            for tile in range(first, last):
                real, k_at, v_at = tensors.real[tile], tile * TILE * head_dim, tile * TILE * value_dim
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
        first, stop = part.queries
        scale_by(dq, first * head_dim, (stop - first) * head_dim, scale)


# ------------------------------------------------------------------------------------------- tensors and jobs


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlocksLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 or float64 → out (B, H, N, Dv), lse (B, H, N).

    A query without edges has out 0 and lse -inf.
    """
    (B, H, N, _), value_dim = q.shape, v.shape[3]
    q, k, v = tiled(q, layout, 0), tiled(_of_query_heads(k, H), layout, 1), tiled(_of_query_heads(v, H), layout, 1)
    out, lse = empty(*q.shape[:4], v.shape[4], like=q), empty(*q.shape[:4], like=q)
    arrays, real = [flat_heads(x, B * H) for x in (q, k, v, out, lse)], _real_keys(layout, modifiers, B)
    scale_log2, visits = DTYPES[q.dtype](modifiers.scale * log2_e(q.dtype)), _visits(layout)
    parts = _parts(layout, _pieces_for(B * H * layout.entries), 1)

    def run(job: int) -> None:
        h, piece = divmod(job, len(parts))
        tensors = ForwardTensors(*(x[h] for x in arrays), real[h // H], q.shape[4], v.shape[4])
        forward_part(parts[piece], tensors, visits, scale_log2)

    parallel_for(B * H * len(parts), run)
    return out.flatten(2, 3)[:, :, :N, :value_dim], lse.flatten(2)[:, :, :N]


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
    (B, H, N, dim), (_, key_heads, M, value_dim) = q.shape, v.shape
    k, v = _of_query_heads(k, H), _of_query_heads(v, H)
    tensors = backward_tensors(q, k, v, out, lse, dout, dlse, layout)
    if in_one_pass(B * H * layout.entries):
        _run_backward(tensors, layout, modifiers, _parts(layout, 1, 1))
    else:
        pieces, nothing = PIECES_PER_THREAD * torch.get_num_threads(), q.new_empty(0)
        _run_backward(tensors._replace(dk=nothing, dv=nothing), layout, modifiers, _parts(layout, pieces, 1))
        _run_backward(tensors._replace(dq=nothing), layout, modifiers, _parts(layout, 1, pieces))
    dq, dk, dv = (x.flatten(2, 3) for x in (tensors.dq, tensors.dk, tensors.dv))
    dk, dv = _of_key_heads(dk[:, :, :M], key_heads), _of_key_heads(dv[:, :, :M], key_heads)
    return dq[:, :, :N, :dim], dk[..., :dim], dv[..., :value_dim], None


def _run_backward(tensors: Gradients, layout: BlocksLayout, modifiers: Modifiers, parts: list[Part]) -> None:
    """Fill those of dq, or dk and dv, that are not empty, part by part."""
    (B, H), dtype = tensors.q.shape[:2], DTYPES[tensors.q.dtype]
    arrays, real = [flat_heads(x, B * H) for x in tensors], _real_keys(layout, modifiers, B)
    visits, scale = _visits(layout), dtype(modifiers.scale)
    scale_log2, dims = dtype(modifiers.scale * log2_e(tensors.q.dtype)), (tensors.q.shape[4], tensors.v.shape[4])

    def run(job: int) -> None:
        h, piece = divmod(job, len(parts))
        backward_part(
            parts[piece], BackwardTensors(*(x[h] for x in arrays), real[h // H], *dims), visits, scale_log2, scale
        )

    parallel_for(B * H * len(parts), run)


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


def _parts(layout: BlocksLayout, of_queries: int, of_blocks: int) -> list[Part]:
    """All pairs, those of each entry by themselves, its queries and its blocks cut into so many pieces."""
    n, blocks = layout.n // layout.entries, layout.num_blocks // layout.entries
    return [
        Part((e * n + queries[0], e * n + queries[1]), (e * blocks + of_keys[0], e * blocks + of_keys[1]))
        for e in range(layout.entries)
        for queries in _pieces(n, of_queries)
        for of_keys in _pieces(blocks, of_blocks)
    ]


def _pieces(size: int, count: int) -> list[tuple[int, int]]:
    """0 … size - 1 in so many ranges (first, stop)."""
    return list(pairwise(size * piece // count for piece in range(count + 1)))


def _pieces_for(entries: int) -> int:
    """Into how many pieces the queries of each entry are cut: few, as each has fewer of the queries of a block."""
    threads = torch.get_num_threads()
    return 1 if entries % threads == 0 or entries >= PIECES_PER_THREAD * threads else threads
