"""Attention over tiles on a CPU, float32, in machine code by Numba: products, softmax and their gradients in one pass.

A tile's scores never leave the cache. No two threads add to one number, and every sum has a fixed order: any number of
threads gives the same bits. All pairs of a tile are multiplied: a NaN or an infinity in a key or a value may reach the
queries of its tiles that do not hear it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import pad

from attngraph.kernels.cpu.threads import share
from attngraph.kernels.cpu.vectors import (
    LANES,
    LOG2_E,
    ROWS,
    TILE,
    ends,
    exp2,
    higher,
    keep,
    load,
    multiply,
    splat,
    store,
    total_of,
    turn_block,
)
from attngraph.kernels.memory import empty, zeros

TILES_A_JOB = 128  # of one head, at most: a millisecond
LOW = np.float32(-1e30)  # below every score, and finite: a query that hears nobody is no NaN
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
LN2 = math.log(2)
HONEST = {"contract"}  # of fastmath: exp2 stands no reassociation
compiled = njit(nogil=True, cache=True, fastmath=HONEST)
step = njit(fastmath=HONEST, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # of a compiled function, which keeps it

# Of a tile, the queries of a row of tiles, or the keys of a column, are "own", the nodes across are "other". Scores lie
# as (other, own): every product then reads its first factor number by number, in whatever strides, and its second in
# whole vectors, as it lies in memory; only the own tile is transposed, once for all of its others.


# ----------------------------------------------------------------------------------------- steps of a tile


@step
def scratch(size):
    """A flat array that begins at a cache line."""
    whole = np.empty(size + LANES, np.float32)
    first = -(whole.ctypes.data // 4) % LANES
    return whole[first : first + size]


@step
def clear(x, at, size):
    """Zero in x[at : at + size]; size is a multiple of 16, here and below."""
    for y in range(at, at + size, LANES):
        store(x, y, splat(np.float32(0)))


@step
def enlarge(x, at, size, factor):
    for y in range(at, at + size, LANES):
        store(x, y, load(x, y) * splat(factor))


@step
def turn(x, at, width, turned):
    """The tile x (64, width) that begins at `at` → turned (width, 64)."""
    for first in range(0, TILE, LANES):
        for d in range(0, width, LANES):
            turn_block(x, at + first * width + d, width, turned, d * TILE + first)


@step
def flip(bits, flipped):
    """Bit c of bits[r] → bit r of flipped[c]: by swapping ever smaller off-diagonal blocks."""
    for r in range(TILE):
        flipped[r] = bits[r]
    size, low = 32, np.uint64(0xFFFFFFFF)
    while size:
        r, shift = 0, np.uint64(size)
        while r < TILE:
            swap = ((flipped[r] >> shift) ^ flipped[r + size]) & low
            flipped[r + size] ^= swap
            flipped[r] ^= swap << shift
            r = (r + size + 1) & ~size
        size //= 2
        low ^= low << np.uint64(size)


@step
def look(words, number, by_query, by_key):
    """The edges of a tile: bit j of by_query[i] and bit i of by_key[j]."""
    for r in range(TILE):
        by_query[r] = words[number, r] if number >= 0 else ALL
        by_key[r] = ALL
    if number >= 0:
        flip(by_query, by_key)


@step
def together(bits, r):
    """The union of 8 rows of bits."""
    return (
        bits[r] | bits[r + 1] | bits[r + 2] | bits[r + 3] | bits[r + 4] | bits[r + 5] | bits[r + 6] | bits[r + 7]
    )  # fmt: skip


@step
def scores(x, other, at, turned, width, bits):
    """x (64, 64) = other (64, width) · turned (width, 64), where the bits of a block of x are not all 0."""
    for r in range(0, TILE, ROWS):
        some = together(bits, r)
        for first in range(0, TILE, 2 * LANES):
            if (some >> np.uint64(first)) & np.uint64(0xFFFFFFFF):
                to, left = r * TILE + first, at + r * width
                multiply(x, to, TILE, other, left, width, 1, turned, first, TILE, width, True, 2)


@step
def add_product(c, c_at, x, x_row, x_step, b, b_at, width, bits):
    """c (64, width) += x (64, 64) · b (64, width), where x is 0 but for the pairs in bits."""
    for r in range(0, TILE, ROWS):
        some = together(bits, r)
        if some:
            t, after = ends(some)
            left = r * x_row + t * x_step
            for d in range(0, width, 2 * LANES):
                to, right = c_at + r * width + d, b_at + t * width + d
                if d + 2 * LANES <= width:
                    multiply(c, to, width, x, left, x_row, x_step, b, right, width, after - t, False, 2)
                else:
                    multiply(c, to, width, x, left, x_row, x_step, b, right, width, after - t, False, 1)


# ------------------------------------------------------------------------------------------------- forward


@step
def soften(x, bits, scale, top, total, change):
    """Scores x (keys, queries) to 2^(scale · x - top), with the top and total so far; earlier sums count `change`."""
    zero, low, factor = splat(np.float32(0)), splat(LOW), splat(scale)
    for c in range(0, TILE, LANES):
        before = load(top, c)
        a, b = before, before
        for r in range(0, TILE, 2):
            a = higher(keep(load(x, r * TILE + c) * factor, bits[r], c, low), a)
            b = higher(keep(load(x, (r + 1) * TILE + c) * factor, bits[r + 1], c, low), b)
        highest = higher(a, b)
        less = exp2(before - highest)
        sums = load(total, c) * less
        for r in range(TILE):
            power = keep(exp2(load(x, r * TILE + c) * factor - highest), bits[r], c, zero)
            sums = sums + power
            store(x, r * TILE + c, power)
        store(top, c, highest)
        store(total, c, sums)
        store(change, c, less)


@step
def rescale(out, at, width, factors):
    """out (64, width) times a factor for each row."""
    for r in range(TILE):
        enlarge(out, at + r * width, width, factors[r])


@compiled
def forward_rows(first, after, q, k, v, out, lse, sizes, scale, factor, rows, words):
    """The rows of tiles first … after - 1 of one head: q, k, out flat, (nodes, width) with widths `sizes`."""
    (width, value_width), (start, _, other, mask) = sizes, rows
    x, turned = scratch(TILE * TILE), scratch(TILE * width)
    top, total, change = scratch(TILE), scratch(TILE), scratch(TILE)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for row in range(first, after):
        own, to = row * TILE * width, row * TILE * value_width
        turn(q, own, width, turned)
        clear(out, to, TILE * value_width)
        for r in range(TILE):
            top[r], total[r] = LOW, np.float32(0)
        for at in range(start[row], start[row + 1]):
            key = np.int64(other[at]) * TILE
            look(words, mask[at], by_query, by_key)
            scores(x, k, key * width, turned, width, by_key)
            soften(x, by_key, scale, top, total, change)
            if at > start[row]:
                rescale(out, to, value_width, change)
            add_product(out, to, x, 1, TILE, v, key * value_width, value_width, by_query)
        for r in range(TILE):
            heard = total[r] != np.float32(0)
            lse[row * TILE + r] = (top[r] + math.log2(total[r])) * LN2 if heard else -np.inf
            change[r] = np.float32(1) / total[r] if heard else np.float32(0)
        rescale(out, to, value_width, change)


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 → out (B, H, N, Dv), lse (B, H, N).

    layout: a `Tiles` of 64 × 64. A query that hears nobody has out 0 and lse -inf.
    """
    (B, H, N, _), value_dim, group = q.shape, v.shape[3], q.shape[1] // k.shape[1]
    q, k, v = (_whole(side, layout, place) for side, place in ((q, 0), (k, 1), (v, 1)))
    out, lse = empty(*q.shape[:4], v.shape[4], like=q), empty(*q.shape[:4], like=q)
    heads = [_heads(side, B * H) for side in (q, out, lse)], [_heads(side, B * H // group) for side in (k, v)]
    jobs, terms = _jobs(layout.by_query, B * H), _terms(layout, layout.by_query, q.shape[4], v.shape[4], scale)

    def work(job):
        head, piece = divmod(job, len(jobs))
        (q_h, out_h, lse_h), (k_h, v_h) = (side[head] for side in heads[0]), (side[head // group] for side in heads[1])
        forward_rows(*jobs[piece], q_h, k_h, v_h, out_h, lse_h, *terms)

    share(B * H * len(jobs), work)
    return out.flatten(2, 3)[:, :, :N, :value_dim], lse.flatten(2)[:, :, :N]


# ------------------------------------------------------------------------------------------------- backward


@compiled
def settle(out, dout, width, delta):
    """delta, (nodes,), which holds dlse, to Σ_d out · dout - dlse; out and dout flat, (nodes, width)."""
    for i in range(len(delta)):
        sums = splat(np.float32(0))
        for d in range(i * width, (i + 1) * width, LANES):
            sums = sums + load(out, d) * load(dout, d)
        delta[i] = total_of(sums) - delta[i]


@step
def weigh(x, y, bits, scale, lse, delta, at, by_key):
    """Scores x (other, own) to p = 2^(scale · x - lse), and y = dp to ds = p · (dp - delta), both from `at` on.

    lse and delta are those of the queries: the others by_key, else the own.
    """
    zero, factor = splat(np.float32(0)), splat(scale)
    for r in range(TILE):
        for c in range(0, TILE, LANES):
            if by_key:
                less, mean = splat(lse[at + r]), splat(delta[at + r])
            else:
                less, mean = load(lse, at + c), load(delta, at + c)
            power = keep(exp2(load(x, r * TILE + c) * factor - less), bits[r], c, zero)
            store(x, r * TILE + c, power)
            store(y, r * TILE + c, keep(power * (load(y, r * TILE + c) - mean), bits[r], c, zero))


@compiled
def backward_rows(first, after, q, k, v, dout, lse, delta, dq, sizes, scale, factor, rows, words):
    """dq, which is 0, of some rows of tiles of one head: adds in the order of the keys."""
    (width, value_width), (start, full, other, mask) = sizes, rows
    x, y = scratch(TILE * TILE), scratch(TILE * TILE)
    turned, turned_out = scratch(TILE * width), scratch(TILE * value_width)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for row in range(first, after):
        turn(q, row * TILE * width, width, turned)
        turn(dout, row * TILE * value_width, value_width, turned_out)
        a, b = start[row], full[row]
        while a < full[row] or b < start[row + 1]:
            masked = b == start[row + 1] or (a < full[row] and other[a] < other[b])
            at = a if masked else b
            a, b = (a + 1, b) if masked else (a, b + 1)
            key = np.int64(other[at]) * TILE
            look(words, mask[at], by_query, by_key)
            scores(x, k, key * width, turned, width, by_key)
            scores(y, v, key * value_width, turned_out, value_width, by_key)
            weigh(x, y, by_key, scale, lse, delta, row * TILE, False)
            add_product(dq, row * TILE * width, y, 1, TILE, k, key * width, width, by_query)
        enlarge(dq, row * TILE * width, TILE * width, factor)


@compiled
def backward_columns(
    first, after, group, q, k, v, dout, lse, delta, dq, dk, dv, sizes, scale, factor, columns, words
):  # fmt: skip
    """dk and dv of some columns of tiles of one key head, whose query heads lie one behind the other.

    Where dq, which is 0, is not empty, it gets its share too, and the columns are all: adds in the order of the keys.
    """
    (width, value_width), (start, _, other, mask), n = sizes, columns, len(lse) // group
    x, y = scratch(TILE * TILE), scratch(TILE * TILE)
    turned, turned_v = scratch(TILE * width), scratch(TILE * value_width)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for column in range(first, after):
        own, own_value = column * TILE * width, column * TILE * value_width
        turn(k, own, width, turned)
        turn(v, own_value, value_width, turned_v)
        clear(dk, own, TILE * width)
        clear(dv, own_value, TILE * value_width)
        for at in range(start[column], start[column + 1]):
            look(words, mask[at], by_query, by_key)
            for g in range(group):
                query = g * n + np.int64(other[at]) * TILE
                scores(x, q, query * width, turned, width, by_query)
                scores(y, dout, query * value_width, turned_v, value_width, by_query)
                weigh(x, y, by_query, scale, lse, delta, query, True)
                add_product(dv, own_value, x, 1, TILE, dout, query * value_width, value_width, by_key)
                add_product(dk, own, y, 1, TILE, q, query * width, width, by_key)
                if len(dq):
                    add_product(dq, query * width, y, TILE, 1, k, own, width, by_query)
        enlarge(dk, own, TILE * width, factor)
    enlarge(dq, 0, len(dq), factor)


def backward(
    q, k, v, out, lse, dout, dlse, layout, bias: None, scale: float, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    """What these tiles add to (dq, dk, dv), from the final out and lse of each query; dlse may be None.

    With Δ = Σ dout · out - dlse and p = exp(s - lse): dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k,
    dk = scale · dsᵀ q.
    """
    (B, _, N, dim), (_, key_heads, M, value_dim) = q.shape, v.shape
    lse = lse.masked_fill(lse == -torch.inf, torch.inf) * float(LOG2_E)  # of nobody, p = exp(-inf)
    delta = torch.zeros_like(lse) if dlse is None else dlse.clone()
    lse, delta = (_whole(side[..., None], layout, 0, 1) for side in (lse, delta))
    q, out, dout = (_whole(side, layout, 0) for side in (q, out, dout))
    k, v = _whole(k, layout, 1), _whole(v, layout, 1)
    dq, dk, dv = zeros(*q.shape, like=q), empty(*k.shape, like=k), empty(*v.shape, like=v)
    sides = (q, k, v, dout, lse, delta, dq, dk, dv)
    _settle(out, dout, delta)
    columns = [(0, layout.grid[1])] if _one_pass(B * key_heads) else _jobs(layout.by_key, B * key_heads)
    if len(columns) > 1:
        _add_rows(sides, layout, scale)
    _add_columns(sides, layout, scale, columns)
    dq, dk, dv = (side.flatten(2, 3) for side in (dq, dk, dv))
    return dq[:, :, :N, :dim], dk[:, :, :M, :dim], dv[:, :, :M, :value_dim], None


def _one_pass(key_heads: int) -> bool:
    """Whether a job takes all keys of a key head, and may so add to its dq: 5 products, not 7, but fewer jobs.

    The bits are the same.
    """
    threads = torch.get_num_threads()
    turns = -(-key_heads // threads)
    return threads == 1 or (key_heads >= 2 * threads and 5 * turns * threads <= 7 * key_heads)


def _settle(out: Tensor, dout: Tensor, delta: Tensor) -> None:
    heads = out.shape[0] * out.shape[1]
    parts = [_heads(side, heads) for side in (out, dout, delta)]
    share(heads, lambda head: settle(parts[0][head], parts[1][head], out.shape[4], parts[2][head]))


def _add_rows(sides: tuple[Tensor, ...], layout, scale: float) -> None:
    """Fill dq."""
    q, k, v, dout, lse, delta, dq, _, _ = sides
    (B, H, _, _, width), group = q.shape, q.shape[1] // k.shape[1]
    of_query = [_heads(side, B * H) for side in (q, dout, lse, delta, dq)]
    of_key = [_heads(side, B * H // group) for side in (k, v)]
    jobs, terms = _jobs(layout.by_query, B * H), _terms(layout, layout.by_query, width, v.shape[4], scale)

    def work(job):
        head, piece = divmod(job, len(jobs))
        q_h, dout_h, lse_h, delta_h, dq_h = (side[head] for side in of_query)
        k_h, v_h = (side[head // group] for side in of_key)
        backward_rows(*jobs[piece], q_h, k_h, v_h, dout_h, lse_h, delta_h, dq_h, *terms)

    share(B * H * len(jobs), work)


def _add_columns(sides: tuple[Tensor, ...], layout, scale: float, jobs: list[tuple[int, int]]) -> None:
    """Fill dk and dv; and dq, if there is but one job for each key head."""
    q, k, v, _, _, _, dq, _, _ = sides
    heads, group = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
    of_head = [_heads(side, heads) for side in sides]
    if len(jobs) != 1:
        of_head[6] = _heads(dq.new_empty(heads, 0), heads)
    terms = _terms(layout, layout.by_key, q.shape[4], v.shape[4], scale)

    def work(job):
        head, piece = divmod(job, len(jobs))
        backward_columns(*jobs[piece], group, *(side[head] for side in of_head), *terms)

    share(heads * len(jobs), work)


# ------------------------------------------------------------------------------------------- tensors to arrays


def _whole(x: Tensor, layout, side: int, multiple: int = LANES) -> Tensor:
    """x (B, H, nodes, D) as tiles (B, H, tiles, 64, D), contiguous; filled up with zeros, D to a multiple of 16."""
    x, missing, wide = x.detach(), layout.grid[side] * TILE - x.shape[2], -x.shape[3] % multiple
    x = pad(x, (0, wide, 0, missing)) if missing or wide else x
    return x.contiguous().view(*x.shape[:2], layout.grid[side], TILE, x.shape[3])


def _heads(x: Tensor, heads: int) -> np.ndarray:
    """(heads, flat)."""
    return x.view(heads, x.numel() // max(heads, 1)).numpy()


def _terms(layout, half, width: int, value_width: int, scale: float) -> tuple:
    """(widths, scale for 2^x, scale, rows of tiles, masks) for a kernel."""
    rows = tuple(part.numpy() for part in half[:4])
    return (width, value_width), np.float32(scale * float(LOG2_E)), np.float32(scale), rows, _words(layout)


def _words(layout) -> np.ndarray:
    """The masks, uint64 (P, 64): bit j of row i."""
    return layout.table.words.contiguous().numpy().view(np.uint64).reshape(-1, TILE)


def _jobs(half, heads: int) -> list[tuple[int, int]]:
    """All rows of tiles, (first, after), so many together that they have about as many tiles; some jobs a thread."""
    tiles = int(half.start[-1])
    most = min(TILES_A_JOB, max(4, tiles * heads // (8 * torch.get_num_threads())))
    ends = torch.searchsorted(half.start, torch.arange(0, tiles, most))
    return list(pairwise(sorted({0, len(half.start) - 1, *ends.tolist()})))
