"""Flash attention over tiles on a CPU, float32, in machine code by Numba: products, softmax and gradients in one pass.

A tile's scores never leave the cache. No two threads add to one number, and every sum has a fixed order: any number of
threads gives the same bits. All pairs of a tile are multiplied: a NaN or an infinity in a key or a value may reach
queries of its tiles without an edge to it.

The names are those of flash attention (Dao 2024, algorithms 1 and 2). Scores are exponents of 2, as exp2 is cheaper.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import pad

from attngraph.kernels.contract import Modifiers, TileRows, TilesLayout
from attngraph.kernels.cpu.compiler import CACHE
from attngraph.kernels.cpu.openmp import parallel_for
from attngraph.kernels.cpu.simd import (
    BLOCK_ROWS,
    LANES,
    LOG2_E,
    TILE,
    Matrix,
    bit_range,
    broadcast,
    exp2,
    gemm_8_rows,
    load,
    maximum,
    reduce_sum,
    store,
    transpose_16x16,
    where,
)
from attngraph.kernels.memory import empty, zeros

MAX_JOB_TILES = 128  # tiles of one head that a job has at most: about a millisecond of work
MASKED_SCORE = np.finfo(np.float32).min  # below every score, and finite: a query without edges has no NaN
ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)
LN_2 = math.log(2)
FASTMATH_FLAGS = {"contract"}  # multiply and add in one rounding; exp2 stands no reassociation
compiled = njit(nogil=True, cache=CACHE, fastmath=FASTMATH_FLAGS)
# For functions that only compiled ones call, which keep their code.
inner = njit(fastmath=FASTMATH_FLAGS, no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Tiles(NamedTuple):
    """The tiles of rows, or of columns: the arrays of a `TileRows`, and the masks."""

    start: np.ndarray
    full: np.ndarray
    column: np.ndarray
    mask: np.ndarray
    words: np.ndarray  # uint64 (P, 64): bit j of row i


class Sizes(NamedTuple):
    """Dimensions of a head, filled up to multiples of 16, and its scale."""

    head_dim: int
    value_dim: int
    scale: np.float32
    scale_log2: np.float32  # scale · log2 e


class ForwardTensors(NamedTuple):
    """Of one query head and its key head, flat: (nodes · dim,) or (nodes,)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    real: np.ndarray


class BackwardTensors(NamedTuple):
    """Of one query head and its key head, or of one key head and all its query heads, one behind the other; flat."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    lse: np.ndarray  # as an exponent of 2
    delta: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    real: np.ndarray  # uint64 (tiles of keys,): a bit for each key that is no padding


# Of a tile, the nodes of the row (or column) of tiles that a loop is at are resident, the nodes across stream. Scores
# lie as (streamed, resident): every product then reads its first factor number by number, in whatever strides, and its
# second in whole vectors, as it lies in memory; only the resident tile is transposed, once for all that stream by.


# ------------------------------------------------------------------------------------------ steps of one tile


@inner
def aligned(size):
    """A flat array that begins at a cache line."""
    whole = np.empty(size + LANES, np.float32)
    first = -(whole.ctypes.data // 4) % LANES
    return whole[first : first + size]


@inner
def fill_zero(x, at, size):
    """Zero in x[at : at + size]; size is a multiple of 16, here and below."""
    for y in range(at, at + size, LANES):
        store(x, y, broadcast(np.float32(0)))


@inner
def scale_by(x, at, size, factor):
    """x[at : at + size] *= factor."""
    for y in range(at, at + size, LANES):
        store(x, y, load(x, y) * broadcast(factor))


@inner
def scale_rows(x, at, width, factors):
    """x (64, width) times a factor for each row."""
    for r in range(TILE):
        scale_by(x, at + r * width, width, factors[r])


@inner
def transpose(x, at, width, x_t):
    """The tile x (64, width) that begins at `at` → x_t (width, 64)."""
    for first in range(0, TILE, LANES):
        for d in range(0, width, LANES):
            transpose_16x16(x, at + first * width + d, width, x_t, d * TILE + first)


@inner
def transpose_bits(bits, bits_t):
    """Bit c of bits[r] → bit r of bits_t[c]: by swapping ever smaller off-diagonal blocks (Warren 2012, 7-3)."""
    for r in range(TILE):
        bits_t[r] = bits[r]
    size, low = 32, np.uint64(0xFFFFFFFF)
    while size:
        r, shift = 0, np.uint64(size)
        while r < TILE:
            swap = ((bits_t[r] >> shift) ^ bits_t[r + size]) & low
            bits_t[r + size] ^= swap
            bits_t[r] ^= swap << shift
            r = (r + size + 1) & ~size
        size //= 2
        low ^= low << np.uint64(size)


@inner
def load_mask(words, mask_id, real, by_query, by_key):
    """The edges of a tile to real keys: bit j of by_query[i] and bit i of by_key[j]; all where mask_id is negative."""
    for r in range(TILE):
        by_query[r] = (words[mask_id, r] if mask_id >= 0 else ALL_BITS) & real
        by_key[r] = ALL_BITS
    if mask_id >= 0 or real != ALL_BITS:
        transpose_bits(by_query, by_key)


@inner
def union_of_8(bits, r):
    """bits[r] | … | bits[r + 7]."""
    low = bits[r] | bits[r + 1] | bits[r + 2] | bits[r + 3]
    return low | bits[r + 4] | bits[r + 5] | bits[r + 6] | bits[r + 7]


@inner
def product(s, x, x_at, y_t, width, bits):
    """s (64, 64) = x (64, width) · y_t (width, 64), but for blocks (8, 32) of s without an edge."""
    for r in range(0, TILE, BLOCK_ROWS):
        edges = union_of_8(bits, r)
        for first in range(0, TILE, 2 * LANES):
            if (edges >> np.uint64(first)) & np.uint64(0xFFFFFFFF):
                a, b = Matrix(x, x_at + r * width, width, 1), Matrix(y_t, first, TILE, 1)
                gemm_8_rows(Matrix(s, r * TILE + first, TILE, 1), a, b, width, True, 2)


@inner
def add_product(acc, acc_at, weights, row_stride, column_stride, x, x_at, width, bits):
    """acc (64, width) += weights (64, 64) · x (64, width), where the weights are 0 but for the pairs in bits."""
    for r in range(0, TILE, BLOCK_ROWS):
        edges = union_of_8(bits, r)
        if edges:
            first, stop = bit_range(edges)
            a = Matrix(weights, r * row_stride + first * column_stride, row_stride, column_stride)
            for d in range(0, width, 2 * LANES):
                b = Matrix(x, x_at + first * width + d, width, 1)
                c = Matrix(acc, acc_at + r * width + d, width, 1)
                if d + 2 * LANES <= width:
                    gemm_8_rows(c, a, b, stop - first, False, 2)
                else:
                    gemm_8_rows(c, a, b, stop - first, False, 1)


# ------------------------------------------------------------------------------------------------- forward


@inner
def online_softmax(s, bits, scale_log2, row_max, row_sum, alpha):
    """Scores s (keys, queries) to p = 2^(scale · s - row_max), in place; alpha is what earlier sums are worth now.

    row_max, row_sum and alpha (queries,): row_sum is updated, out is left to the caller.
    """
    zero, masked, factor = broadcast(np.float32(0)), broadcast(MASKED_SCORE), broadcast(scale_log2)
    for c in range(0, TILE, LANES):
        old_max = load(row_max, c)
        max_a, max_b = old_max, old_max  # two chains: each comparison waits for the one before
        for r in range(0, TILE, 2):
            scaled_a, scaled_b = load(s, r * TILE + c) * factor, load(s, (r + 1) * TILE + c) * factor
            store(s, r * TILE + c, scaled_a)  # rounded, so that none is above the largest
            store(s, (r + 1) * TILE + c, scaled_b)
            max_a = maximum(where(bits[r], c, scaled_a, masked), max_a)
            max_b = maximum(where(bits[r + 1], c, scaled_b, masked), max_b)
        new_max = maximum(max_a, max_b)
        rescale = exp2(old_max - new_max)
        sums = load(row_sum, c) * rescale
        for r in range(TILE):
            p = where(bits[r], c, exp2(load(s, r * TILE + c) - new_max), zero)
            sums = sums + p
            store(s, r * TILE + c, p)
        store(row_max, c, new_max)
        store(row_sum, c, sums)
        store(alpha, c, rescale)


@compiled
def forward_rows(first, stop, tensors, tiles, sizes):
    """out and lse of the rows of tiles first … stop - 1 of one head."""
    q, k, v, acc, lse = tensors.q, tensors.k, tensors.v, tensors.out, tensors.lse
    head_dim, value_dim = sizes.head_dim, sizes.value_dim
    p, q_t = aligned(TILE * TILE), aligned(TILE * head_dim)
    row_max, row_sum, alpha = aligned(TILE), aligned(TILE), aligned(TILE)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for row in range(first, stop):
        acc_at = row * TILE * value_dim
        transpose(q, row * TILE * head_dim, head_dim, q_t)
        fill_zero(acc, acc_at, TILE * value_dim)
        for r in range(TILE):
            row_max[r], row_sum[r] = MASKED_SCORE, np.float32(0)
        for tile in range(tiles.start[row], tiles.start[row + 1]):
            key, real = np.int64(tiles.column[tile]) * TILE, tensors.real[tiles.column[tile]]
            if not real:
                continue
            load_mask(tiles.words, tiles.mask[tile], real, by_query, by_key)
            product(p, k, key * head_dim, q_t, head_dim, by_key)
            online_softmax(p, by_key, sizes.scale_log2, row_max, row_sum, alpha)
            if tile > tiles.start[row]:
                scale_rows(acc, acc_at, value_dim, alpha)
            add_product(acc, acc_at, p, 1, TILE, v, key * value_dim, value_dim, by_query)
        for r in range(TILE):
            has_edge = row_sum[r] != np.float32(0)
            lse[row * TILE + r] = (row_max[r] + math.log2(row_sum[r])) * LN_2 if has_edge else -np.inf
            alpha[r] = np.float32(1) / row_sum[r] if has_edge else np.float32(0)
        scale_rows(acc, acc_at, value_dim, alpha)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: TilesLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 → out (B, H, N, Dv), lse (B, H, N).

    layout: tiles of 64 × 64. A query without edges has out 0 and lse -inf.
    """
    (B, H, N, _), value_dim, group = q.shape, v.shape[3], q.shape[1] // k.shape[1]
    q, k, v = _tiled(q, layout, 0), _tiled(k, layout, 1), _tiled(v, layout, 1)
    out, lse = empty(*q.shape[:4], v.shape[4], like=q), empty(*q.shape[:4], like=q)
    q_heads, out_heads, lse_heads = _heads(q, B * H), _heads(out, B * H), _heads(lse, B * H)
    k_heads, v_heads = _heads(k, B * H // group), _heads(v, B * H // group)
    jobs, tiles = _jobs(layout.by_query, B * H), _tiles(layout, layout.by_query)
    sizes, real = _sizes(q, v, modifiers.scale), _real_keys(modifiers, layout, B)

    def run(job: int) -> None:
        h, piece = divmod(job, len(jobs))
        sides = q_heads[h], k_heads[h // group], v_heads[h // group]
        tensors = ForwardTensors(*sides, out_heads[h], lse_heads[h], real[h // H])
        forward_rows(*jobs[piece], tensors, tiles, sizes)

    parallel_for(B * H * len(jobs), run)
    return out.flatten(2, 3)[:, :, :N, :value_dim], lse.flatten(2)[:, :, :N]


# ------------------------------------------------------------------------------------------------- backward


@compiled
def compute_delta(out, dout, width, delta):
    """delta, (nodes,), which holds dlse, to Σ_d out · dout - dlse; out and dout flat, (nodes, width)."""
    for i in range(len(delta)):
        sums = broadcast(np.float32(0))
        for d in range(i * width, (i + 1) * width, LANES):
            sums = sums + load(out, d) * load(dout, d)
        delta[i] = reduce_sum(sums) - delta[i]


@inner
def softmax_backward(p, ds, bits, scale_log2, lse, delta, at, queries_stream):
    """Scores in p to p = 2^(scale · s - lse), and dp in ds to ds = p · (dp - delta), both (streamed, resident).

    lse and delta are those of the queries, from `at` on: of the streamed nodes, or else of the resident ones.
    """
    zero, factor = broadcast(np.float32(0)), broadcast(scale_log2)
    for r in range(TILE):
        for c in range(0, TILE, LANES):
            if queries_stream:
                lse_i, delta_i = broadcast(lse[at + r]), broadcast(delta[at + r])
            else:
                lse_i, delta_i = load(lse, at + c), load(delta, at + c)
            weight = where(bits[r], c, exp2(load(p, r * TILE + c) * factor - lse_i), zero)
            store(p, r * TILE + c, weight)
            store(ds, r * TILE + c, where(bits[r], c, weight * (load(ds, r * TILE + c) - delta_i), zero))


@compiled
def backward_dq(first, stop, tensors, tiles, sizes):
    """dq, which is 0, of the rows of tiles first … stop - 1 of one head: adds in the order of the keys."""
    head_dim, value_dim = sizes.head_dim, sizes.value_dim
    p, ds = aligned(TILE * TILE), aligned(TILE * TILE)
    q_t, dout_t = aligned(TILE * head_dim), aligned(TILE * value_dim)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for row in range(first, stop):
        query = row * TILE
        transpose(tensors.q, query * head_dim, head_dim, q_t)
        transpose(tensors.dout, query * value_dim, value_dim, dout_t)
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
            key, real = np.int64(tiles.column[tile]) * TILE, tensors.real[tiles.column[tile]]
            if not real:
                continue
            load_mask(tiles.words, tiles.mask[tile], real, by_query, by_key)
            product(p, tensors.k, key * head_dim, q_t, head_dim, by_key)
            product(ds, tensors.v, key * value_dim, dout_t, value_dim, by_key)
            softmax_backward(p, ds, by_key, sizes.scale_log2, tensors.lse, tensors.delta, query, False)
            add_product(tensors.dq, query * head_dim, ds, 1, TILE, tensors.k, key * head_dim, head_dim, by_query)
        scale_by(tensors.dq, query * head_dim, TILE * head_dim, sizes.scale)


@compiled
def backward_dkdv(first, stop, group, tensors, tiles, sizes):
    """dk and dv of the columns of tiles first … stop - 1 of one key head, for which there are `group` query heads.

    Where dq, which is 0, is not empty, the columns are all, and it is computed too: adds in the order of the keys.
    """
    q, k, v, dout, dq, dk, dv = (
        tensors.q, tensors.k, tensors.v, tensors.dout, tensors.dq, tensors.dk, tensors.dv,
    )  # fmt: skip
    head_dim, value_dim, n = sizes.head_dim, sizes.value_dim, len(tensors.lse) // group
    p, ds = aligned(TILE * TILE), aligned(TILE * TILE)
    k_t, v_t = aligned(TILE * head_dim), aligned(TILE * value_dim)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for column in range(first, stop):
        k_at, v_at = column * TILE * head_dim, column * TILE * value_dim
        transpose(k, k_at, head_dim, k_t)
        transpose(v, v_at, value_dim, v_t)
        fill_zero(dk, k_at, TILE * head_dim)
        fill_zero(dv, v_at, TILE * value_dim)
        real = tensors.real[column]
        if not real:
            continue
        for tile in range(tiles.start[column], tiles.start[column + 1]):
            load_mask(tiles.words, tiles.mask[tile], real, by_query, by_key)
            for g in range(group):
                query = g * n + np.int64(tiles.column[tile]) * TILE
                q_at, dout_at = query * head_dim, query * value_dim
                product(p, q, q_at, k_t, head_dim, by_query)
                product(ds, dout, dout_at, v_t, value_dim, by_query)
                softmax_backward(p, ds, by_query, sizes.scale_log2, tensors.lse, tensors.delta, query, True)
                add_product(dv, v_at, p, 1, TILE, dout, dout_at, value_dim, by_key)
                add_product(dk, k_at, ds, 1, TILE, q, q_at, head_dim, by_key)
                if len(dq):
                    add_product(dq, q_at, ds, TILE, 1, k, k_at, head_dim, by_query)
        scale_by(dk, k_at, TILE * head_dim, sizes.scale)
    scale_by(dq, 0, len(dq), sizes.scale)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    layout: TilesLayout,
    modifiers: Modifiers,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """What these tiles add to (dq, dk, dv), from the final out and lse of each query; dlse may be None.

    With Δ = Σ dout · out - dlse and p = exp(s - lse): dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k,
    dk = scale · dsᵀ q.
    """
    (B, _, N, dim), (_, key_heads, M, value_dim) = q.shape, v.shape
    lse = lse.masked_fill(lse == -torch.inf, torch.inf) * float(LOG2_E)  # without edges, p = exp(-inf)
    delta = torch.zeros_like(lse) if dlse is None else dlse.clone()
    lse, delta = _tiled(lse[..., None], layout, 0, 1), _tiled(delta[..., None], layout, 0, 1)
    q, out, dout = _tiled(q, layout, 0), _tiled(out, layout, 0), _tiled(dout, layout, 0)
    k, v = _tiled(k, layout, 1), _tiled(v, layout, 1)
    _delta(out, dout, delta)
    dq, dk, dv = zeros(*q.shape, like=q), empty(*k.shape, like=k), empty(*v.shape, like=v)
    tensors = _Gradients(q, k, v, dout, lse, delta, dq, dk, dv)
    if _in_one_pass(B * key_heads):
        _dkdv(tensors, layout, modifiers, [(0, layout.grid[1])])
    else:
        columns = _jobs(layout.by_key, B * key_heads)
        if len(columns) > 1:
            _dq(tensors, layout, modifiers)
        _dkdv(tensors, layout, modifiers, columns)
    dq, dk, dv = dq.flatten(2, 3), dk.flatten(2, 3), dv.flatten(2, 3)
    return dq[:, :, :N, :dim], dk[:, :, :M, :dim], dv[:, :, :M, :value_dim], None


class _Gradients(NamedTuple):
    """What the backward kernels read and write, tiled: (B, heads, tiles, 64, ·)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def _in_one_pass(key_heads: int) -> bool:
    """Whether a job takes all keys of a key head, and may so add to its dq: 5 products, not 7, but fewer jobs.

    The bits are the same.
    """
    threads = torch.get_num_threads()
    rounds = -(-key_heads // threads)
    return threads == 1 or (key_heads >= 2 * threads and 5 * rounds * threads <= 7 * key_heads)


def _delta(out: Tensor, dout: Tensor, delta: Tensor) -> None:
    """Δ of all queries, into `delta`, which holds dlse."""
    heads = out.shape[0] * out.shape[1]
    out_heads, dout_heads, delta_heads = _heads(out, heads), _heads(dout, heads), _heads(delta, heads)
    parallel_for(heads, lambda h: compute_delta(out_heads[h], dout_heads[h], out.shape[4], delta_heads[h]))


def _dq(tensors: _Gradients, layout: TilesLayout, modifiers: Modifiers) -> None:
    """Fill dq."""
    q, k = tensors.q, tensors.k
    heads, key_heads = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    by_key_head = {"k", "v", "dk", "dv"}
    arrays = {
        name: _heads(x, key_heads if name in by_key_head else heads) for name, x in tensors._asdict().items()
    }  # each (heads, flat)
    jobs, tiles = _jobs(layout.by_query, heads), _tiles(layout, layout.by_query)
    sizes, real = _sizes(q, tensors.v, modifiers.scale), _real_keys(modifiers, layout, len(q))

    def run(job: int) -> None:
        h, piece = divmod(job, len(jobs))
        key_head = h * key_heads // heads
        of_head = {name: x[key_head if name in by_key_head else h] for name, x in arrays.items()}
        backward_dq(*jobs[piece], BackwardTensors(**of_head, real=real[h // q.shape[1]]), tiles, sizes)

    parallel_for(heads * len(jobs), run)


def _dkdv(tensors: _Gradients, layout: TilesLayout, modifiers: Modifiers, jobs: list[tuple[int, int]]) -> None:
    """Fill dk and dv; and dq, if there is but one job for each key head."""
    q, k = tensors.q, tensors.k
    key_heads, group = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
    if len(jobs) != 1:
        tensors = tensors._replace(dq=q.new_empty(key_heads, 0))
    arrays = [_heads(x, key_heads) for x in tensors]
    tiles, sizes = _tiles(layout, layout.by_key), _sizes(q, tensors.v, modifiers.scale)
    real = _real_keys(modifiers, layout, len(k))

    def run(job: int) -> None:
        h, piece = divmod(job, len(jobs))
        of_head = BackwardTensors(*(x[h] for x in arrays), real=real[h // k.shape[1]])
        backward_dkdv(*jobs[piece], group, of_head, tiles, sizes)

    parallel_for(key_heads * len(jobs), run)


# ------------------------------------------------------------------------------------------- tensors to arrays


def _tiled(x: Tensor, layout: TilesLayout, axis: int, multiple: int = LANES) -> Tensor:
    """x (B, H, nodes, D) as tiles (B, H, tiles, 64, D), contiguous; filled up with zeros, D to a multiple of 16.

    The nodes are queries (axis 0 of the adjacency matrix) or keys (axis 1).
    """
    x = x.detach()
    missing_nodes, missing_dims = layout.grid[axis] * TILE - x.shape[2], -x.shape[3] % multiple
    x = pad(x, (0, missing_dims, 0, missing_nodes)) if missing_nodes or missing_dims else x
    return x.contiguous().view(*x.shape[:2], layout.grid[axis], TILE, x.shape[3])


def _heads(x: Tensor, heads: int) -> np.ndarray:
    """(heads, flat)."""
    return x.view(heads, x.numel() // max(heads, 1)).numpy()


def _sizes(q: Tensor, v: Tensor, scale: float) -> Sizes:
    """Of tiled q and v."""
    return Sizes(q.shape[4], v.shape[4], np.float32(scale), np.float32(scale * float(LOG2_E)))


def _real_keys(modifiers: Modifiers, layout: TilesLayout, batch: int) -> np.ndarray:
    """A bit for each key that is no padding: uint64 (B, tiles of keys)."""
    tiles, mask = layout.grid[1], modifiers.attention_mask
    if mask is None:
        return np.full((batch, tiles), ALL_BITS)
    bits = np.packbits(pad(mask, (0, tiles * TILE - mask.shape[1])).numpy(), axis=1, bitorder="little")
    return bits.view(np.dtype(np.uint64).newbyteorder("<")).astype(np.uint64)


def _tiles(layout: TilesLayout, rows: TileRows) -> Tiles:
    words = layout.table.words.contiguous().numpy().view(np.uint64).reshape(-1, TILE)
    return Tiles(rows.start.numpy(), rows.full.numpy(), rows.column.numpy(), rows.mask.numpy(), words)


def _jobs(rows: TileRows, heads: int) -> list[tuple[int, int]]:
    """All rows of tiles as (first, stop), cut where jobs have about as many tiles; at least 8 jobs a thread, if so."""
    tiles = int(rows.start[-1])
    job_tiles = min(MAX_JOB_TILES, max(4, tiles * heads // (8 * torch.get_num_threads())))
    stops = torch.searchsorted(rows.start, torch.arange(0, tiles, job_tiles, device=rows.start.device))
    return list(pairwise(sorted({0, len(rows.start) - 1, *stops.tolist()})))
