"""Attention over tiles in Triton, for a GPU: forward, then dq by rows of tiles, dk and dv by columns of them.

A program has a block of its own nodes in registers, and walks over the blocks across: first those of tiles with masks,
then those of full tiles, in two loops without branches. Nothing is added atomically: the same bits every run. The
scores are exponents of 2.

How tensors and biases come to a kernel stands in `gpu.py`. `tiles` are start, full, other, mask, at and order of a
`TileRows`; `masks` are the words, those of the transposed masks, and the numbers of the first edges. A tile has `high`
queries and `broad` keys, a block `rows` and `keys` of them. All pairs of a tile are multiplied: a NaN or an infinity in
a key or a value may reach the queries of its tiles that do not hear it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.memory import like
from attngraph.kernels.triton.common import (
    DENSE,
    EDGE,
    KINDS,
    LN_2,
    LOG2_E,
    NO_BIAS,
    OFFSET,
    bias_of,
    constants,
    delta,
    place_of_bias,
    side_of,
    spread,
    summed_as,
    vectors,
    width,
)

# ------------------------------------------------------------------------------------------ what a block reads


@triton.jit
def _put(side, b, h, node, count, x, dim: tl.constexpr, wide: tl.constexpr):
    """Store the vectors x (nodes, wide) of some nodes."""
    d = tl.arange(0, wide)
    at = side[0] + b * side[1] + h * side[2] + node[:, None] * side[3] + d[None, :]
    tl.store(at, x.to(side[0].dtype.element_ty), mask=(node < count)[:, None] & (d < dim)[None, :])


@triton.jit
def _row(tiles, block, parts: tl.constexpr, size: tl.constexpr):
    """The row of tiles that a block lies in, those with the most tiles first; and its first node in this row."""
    return tl.load(tiles[5] + block // parts).to(tl.int64), (block % parts) * size


@triton.jit
def _range(tiles, row):
    """The tiles of a row: where those with masks begin, where full ones do, and where they end."""
    lo, middle, hi = tl.load(tiles[0] + row), tl.load(tiles[1] + row), tl.load(tiles[0] + row + 1)
    return lo.to(tl.int32), middle.to(tl.int32), hi.to(tl.int32)


@triton.jit
def _edges(
    words, tiles, at, row, column,
    high: tl.constexpr, broad: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Which pairs of a block (rows, columns), from this row and column of a tile (high, broad) on, are edges."""
    if masked:
        r, w = row + tl.arange(0, rows), column // 32 + tl.arange(0, columns // 32)
        mask = words + tl.load(tiles[3] + at).to(tl.int64) * (high * broad // 32)
        found = tl.load(mask + r[:, None] * (broad // 32) + w[None, :])
        return tl.reshape((found[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, [rows, columns]) != 0
    return tl.full([rows, columns], 1, tl.int1)


@triton.jit
def _edge_number(
    masks, tiles, at, r, c, high: tl.constexpr, broad: tl.constexpr, kind: tl.constexpr, masked: tl.constexpr
):
    """The numbers of the edges at rows r and columns c of a tile: those before its word, and the bits below it."""
    number = r
    if kind == EDGE:
        word = r * (broad // 32) + c // 32
        number = tl.load(masks[2] + tl.load(tiles[4] + at).to(tl.int64) * (high * broad // 32) + word)
        if masked:
            mask = masks[0] + tl.load(tiles[3] + at).to(tl.int64) * (high * broad // 32)
            bits = tl.load(mask + word) & ((1 << (c % 32)) - 1)
            bits = bits - ((bits >> 1) & 0x55555555)  # the count of its ones; the uppermost bit is never among them
            bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
            bits = (bits + (bits >> 4)) & 0x0F0F0F0F
            bits = bits + (bits >> 8)
            number += (bits + (bits >> 16)) & 63
        else:
            number += c % 32
    return number


@triton.jit
def _bias(bias, b, h, i, j, n, edge, keep, kind: tl.constexpr):
    """The bias of pairs (i, j), times log2 e; `edge` are their numbers. It is read for edges alone."""
    return tl.load(place_of_bias(bias, b, h, i, j, n, edge, kind), mask=keep, other=0.0).to(tl.float32) * LOG2_E


# ----------------------------------------------------------------------------------------------------- forward


@triton.jit
def _hear(
    heard, top, total, own, sides, bias, tiles, masks, place, count, lo, hi, scale,
    dim: tl.constexpr, value_dim: tl.constexpr, wide: tl.constexpr, value_wide: tl.constexpr,
    high: tl.constexpr, broad: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
    kind: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """The tiles lo … hi-1 for the queries of a block: what they hear so far, their top scores, and their sums."""
    b, h, key_head, i, row = place
    n, m = count
    parts: tl.constexpr = broad // keys
    for step in tl.range(lo * parts, hi * parts, num_stages=stages):
        at, column = step // parts, (step % parts) * keys
        j = tl.load(tiles[2] + at).to(tl.int64) * broad + column + tl.arange(0, keys)
        key = vectors(sides[1], b, key_head, j, m, dim, wide, masked)
        value = vectors(sides[2], b, key_head, j, m, value_dim, value_wide, masked)
        s = tl.dot(own, tl.trans(key), input_precision=precision) * scale
        r, c = (row + tl.arange(0, rows))[:, None], (column + tl.arange(0, keys))[None, :]
        keep = _edges(masks[0], tiles, at, row, column, high, broad, rows, keys, masked)
        if kind != NO_BIAS:
            edge = _edge_number(masks, tiles, at, r, c, high, broad, kind, masked)
            s += _bias(bias, b, h, i[:, None], j[None, :], n, edge, keep, kind)
        if masked:
            s = tl.where(keep, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        level = new
        if masked or kind != NO_BIAS:
            level = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - level[:, None])
        less = tl.exp2(top - level)
        total = total * less + tl.sum(p, 1)
        heard = tl.dot(p.to(value.dtype), value, heard * less[:, None], input_precision=precision)
        top = new
    return heard, top, total


@triton.jit(do_not_specialize=["blocks", "H", "n", "m"])
def _forward(sides, bias, tiles, masks, blocks, H, group, n, m, scale, shape: tl.constexpr, out, lse):
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    parts: tl.constexpr = shape.high // shape.rows
    row, first = _row(tiles, block, parts, shape.rows)
    i = row * shape.high + first + tl.arange(0, shape.rows)
    own = vectors(sides[0], b, h, i, n, shape.dim, shape.wide, True)
    heard = tl.zeros([shape.rows, shape.value_wide], tl.float32)
    top, total = tl.full([shape.rows], float("-inf"), tl.float32), tl.zeros([shape.rows], tl.float32)
    lo, middle, hi = _range(tiles, row)
    place = (b, h, h // group, i, first)
    heard, top, total = _hear(
        heard, top, total, own, sides, bias, tiles, masks, place, (n, m), lo, middle, scale,
        shape.dim, shape.value_dim, shape.wide, shape.value_wide, shape.high, shape.broad, shape.rows, shape.keys,
        shape.kind, shape.precision, shape.stages, True,
    )  # fmt: skip
    heard, top, total = _hear(
        heard, top, total, own, sides, bias, tiles, masks, place, (n, m), middle, hi, scale,
        shape.dim, shape.value_dim, shape.wide, shape.value_wide, shape.high, shape.broad, shape.rows, shape.keys,
        shape.kind, shape.precision, shape.stages, False,
    )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    _put(out, b, h, i, n, heard / some[:, None], shape.value_dim, shape.value_wide)
    tl.store(lse + head * n + i, tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) * LN_2), mask=i < n)


# ---------------------------------------------------------------------------------------------------- backward


@triton.jit
def _of_queries(lse, delta, head, i, n):
    """Of some queries, the lse as a power of 2 (inf where they hear nobody, so that exp2(s - lse) is 0), and delta."""
    level = tl.load(lse + head * n + i, mask=i < n, other=float("-inf")) * LOG2_E
    return tl.where(level == float("-inf"), float("inf"), level), tl.load(delta + head * n + i, mask=i < n, other=0.0)


@triton.jit
def _answer(
    dq, own, own_dout, level, mean, sides, bias, dbias, tiles, masks, place, count, lo, hi, scale,
    dim: tl.constexpr, value_dim: tl.constexpr, wide: tl.constexpr, value_wide: tl.constexpr,
    high: tl.constexpr, broad: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
    kind: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr, masked: tl.constexpr,
    bias_grad: tl.constexpr,
):  # fmt: skip
    """What the tiles lo … hi-1 add to the dq of a block; and the gradient of their bias, stored."""
    b, h, key_head, i, row = place
    n, m = count
    parts: tl.constexpr = broad // keys
    for step in tl.range(lo * parts, hi * parts, num_stages=stages):
        at, column = step // parts, (step % parts) * keys
        j = tl.load(tiles[2] + at).to(tl.int64) * broad + column + tl.arange(0, keys)
        key = vectors(sides[1], b, key_head, j, m, dim, wide, masked)
        value = vectors(sides[2], b, key_head, j, m, value_dim, value_wide, masked)
        s = tl.dot(own, tl.trans(key), input_precision=precision) * scale
        r, c = (row + tl.arange(0, rows))[:, None], (column + tl.arange(0, keys))[None, :]
        keep = _edges(masks[0], tiles, at, row, column, high, broad, rows, keys, masked)
        edge = _edge_number(masks, tiles, at, r, c, high, broad, kind, masked)
        if kind != NO_BIAS:
            s += _bias(bias, b, h, i[:, None], j[None, :], n, edge, keep, kind)
        if masked:
            s = tl.where(keep, s, float("-inf"))
        ds = tl.exp2(s - level[:, None])
        ds *= tl.dot(own_dout, tl.trans(value), input_precision=precision) - mean[:, None]
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=precision)
        if bias_grad:
            to = dbias[0] + b * dbias[1] + h * dbias[2]
            if kind == EDGE:
                tl.store(to + edge, ds, mask=keep)
            elif kind == DENSE:
                tl.store(to + i[:, None] * dbias[3] + j[None, :] * dbias[4], ds, mask=keep)
            else:  # the sums of the diagonals j - i of the block, from 1 - rows on
                span: tl.constexpr = 2 * keys
                across = tl.arange(0, span)[None, :] + tl.arange(0, rows)[:, None] - (rows - 1)
                inside = (across >= 0) & (across < keys)
                turned = tl.where(inside, tl.gather(ds, tl.where(inside, across, 0), 1), 0.0)
                block = (tl.load(tiles[4] + at).to(tl.int64) * (high // rows) + row // rows) * parts + step % parts
                tl.store(to + block * span + tl.arange(0, span), tl.sum(turned, 0))
    return dq


@triton.jit(do_not_specialize=["blocks", "H", "n", "m"])
def _backward_rows(
    sides, bias, tiles, masks, blocks, H, group, n, m, scale, shape: tl.constexpr,
    dout, lse, delta, dq, dbias, factor, bias_grad: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    parts: tl.constexpr = shape.high // shape.rows
    row, first = _row(tiles, block, parts, shape.rows)
    i = row * shape.high + first + tl.arange(0, shape.rows)
    own = vectors(sides[0], b, h, i, n, shape.dim, shape.wide, True)
    own_dout = vectors(dout, b, h, i, n, shape.value_dim, shape.value_wide, True)
    level, mean = _of_queries(lse, delta, head, i, n)
    found = tl.zeros([shape.rows, shape.wide], tl.float32)
    lo, middle, hi = _range(tiles, row)
    place = (b, h, h // group, i, first)
    found = _answer(
        found, own, own_dout, level, mean, sides, bias, dbias, tiles, masks, place, (n, m), lo, middle, scale,
        shape.dim, shape.value_dim, shape.wide, shape.value_wide, shape.high, shape.broad, shape.rows, shape.keys,
        shape.kind, shape.precision, shape.stages, True, bias_grad,
    )  # fmt: skip
    found = _answer(
        found, own, own_dout, level, mean, sides, bias, dbias, tiles, masks, place, (n, m), middle, hi, scale,
        shape.dim, shape.value_dim, shape.wide, shape.value_wide, shape.high, shape.broad, shape.rows, shape.keys,
        shape.kind, shape.precision, shape.stages, False, bias_grad,
    )  # fmt: skip
    _put(dq, b, h, i, n, found * factor, shape.dim, shape.wide)


@triton.jit
def _tell(
    dk, dv, dkey, own, own_value, sides, dout, lse, delta, bias, tiles, masks, place, count, lo, hi, scale,
    dim: tl.constexpr, value_dim: tl.constexpr, wide: tl.constexpr, value_wide: tl.constexpr,
    high: tl.constexpr, broad: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
    kind: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr, masked: tl.constexpr,
    bias_grad: tl.constexpr,
):  # fmt: skip
    """What the tiles lo … hi-1 add to the dk and dv of a block, and to the gradient of a bias of its keys.

    Scores stand as (keys, queries). The heads of a group come one after the other.
    """
    b, key_head, H, group, j, column = place
    n, _ = count
    parts: tl.constexpr = high // rows
    for step in tl.range(lo * parts * group, hi * parts * group, num_stages=stages):
        at, row = step // (parts * group), (step % parts) * rows
        h = key_head * group + step // parts % group
        i = tl.load(tiles[2] + at).to(tl.int64) * high + row + tl.arange(0, rows)
        query = vectors(sides[0], b, h, i, n, dim, wide, masked)
        query_dout = vectors(dout, b, h, i, n, value_dim, value_wide, masked)
        level, mean = _of_queries(lse, delta, b * H + h, i, n)
        s = tl.dot(own, tl.trans(query), input_precision=precision) * scale
        r, c = (row + tl.arange(0, rows))[None, :], (column + tl.arange(0, keys))[:, None]
        keep = _edges(masks[1], tiles, at, column, row, broad, high, keys, rows, masked)
        if kind != NO_BIAS:
            edge = _edge_number(masks, tiles, at, r, c, high, broad, kind, masked)
            s += _bias(bias, b, h, i[None, :], j[:, None], n, edge, keep, kind)
        if masked:
            s = tl.where(keep, s, float("-inf"))
        p = tl.exp2(s - level[None, :])
        dv = tl.dot(p.to(query_dout.dtype), query_dout, dv, input_precision=precision)
        ds = p * (tl.dot(own_value, tl.trans(query_dout), input_precision=precision) - mean[None, :])
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=precision)
        if bias_grad:
            dkey += tl.sum(ds, 1)
    return dk, dv, dkey


@triton.jit(do_not_specialize=["blocks", "H", "n", "m"])
def _backward_columns(
    sides, bias, tiles, masks, blocks, H, group, n, m, scale, shape: tl.constexpr,
    dout, lse, delta, dk, dv, dbias, factor, bias_grad: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // (H // group), head % (H // group)
    parts: tl.constexpr = shape.broad // shape.keys
    column, first = _row(tiles, block, parts, shape.keys)
    j = column * shape.broad + first + tl.arange(0, shape.keys)
    own = vectors(sides[1], b, h, j, m, shape.dim, shape.wide, True)
    own_value = vectors(sides[2], b, h, j, m, shape.value_dim, shape.value_wide, True)
    found, found_value = (
        tl.zeros([shape.keys, shape.wide], tl.float32),
        tl.zeros([shape.keys, shape.value_wide], tl.float32),
    )
    dkey = tl.zeros([shape.keys], tl.float32)
    lo, middle, hi = _range(tiles, column)
    place = (b, h, H, group, j, first)
    found, found_value, dkey = _tell(
        found, found_value, dkey, own, own_value, sides, dout, lse, delta, bias, tiles, masks, place, (n, m),
        lo, middle, scale,
        shape.dim, shape.value_dim, shape.wide, shape.value_wide, shape.high, shape.broad, shape.rows, shape.keys,
        shape.kind, shape.precision, shape.stages, True, bias_grad,
    )  # fmt: skip
    found, found_value, dkey = _tell(
        found, found_value, dkey, own, own_value, sides, dout, lse, delta, bias, tiles, masks, place, (n, m),
        middle, hi, scale,
        shape.dim, shape.value_dim, shape.wide, shape.value_wide, shape.high, shape.broad, shape.rows, shape.keys,
        shape.kind, shape.precision, shape.stages, False, bias_grad,
    )  # fmt: skip
    _put(dk, b, h, j, m, found * factor, shape.dim, shape.wide)
    _put(dv, b, h, j, m, found_value, shape.value_dim, shape.value_wide)
    if bias_grad:
        tl.store(dbias[0] + b * dbias[1] + h * dbias[2] + j, dkey, mask=j < m)


# ------------------------------------------------------------------------------------------------------ launch


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    dim: int
    value_dim: int
    wide: int
    value_wide: int
    high: int
    broad: int
    rows: int
    keys: int
    kind: int
    precision: str
    stages: int


class Blocks(NamedTuple):
    """How a kernel runs: its blocks, the warps of a program, and how many blocks across are in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


# By architecture, kernel, bytes of a number, and the widest dimension: of some tried blocks the largest whose numbers
# all stay in registers, counted in what the compiler makes (tests/compile_triton.py). Not yet measured on a GPU.
BLOCKS = {
    90: {
        ("_forward", 2): {64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)},
        ("_backward_rows", 2): {32: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(32, 64, 8, 2)},
        ("_backward_columns", 2): {64: Blocks(64, 64, 4, 3), 128: Blocks(32, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
        ("_forward", 4): {32: Blocks(64, 64, 4, 2), 64: Blocks(64, 32, 4, 2), 128: Blocks(32, 32, 8, 1)},
        ("_backward_rows", 4): {16: Blocks(64, 64, 4, 2), 64: Blocks(64, 32, 4, 2), 128: Blocks(32, 32, 8, 1)},
        ("_backward_columns", 4): {32: Blocks(32, 64, 8, 2), 64: Blocks(32, 32, 4, 2), 128: Blocks(32, 32, 8, 1)},
    },
    80: {
        ("_forward", 2): {64: Blocks(128, 64, 8, 2), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 2)},
        ("_backward_rows", 2): {64: Blocks(128, 64, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
        ("_backward_columns", 2): {
            32: Blocks(64, 64, 8, 2),
            64: Blocks(128, 32, 8, 2),
            128: Blocks(64, 64, 8, 2),
            256: Blocks(32, 32, 8, 2),
        },
        ("_forward", 4): {32: Blocks(64, 64, 8, 2), 64: Blocks(32, 64, 8, 2), 128: Blocks(32, 32, 8, 1)},
        ("_backward_rows", 4): {
            16: Blocks(64, 64, 8, 2),
            32: Blocks(64, 32, 8, 2),
            64: Blocks(32, 32, 8, 2),
            128: Blocks(32, 32, 8, 1),
        },
        ("_backward_columns", 4): {16: Blocks(32, 64, 8, 2), 64: Blocks(32, 32, 8, 2), 128: Blocks(32, 32, 8, 1)},
    },
}
BIASED = {
    90: {
        2: {64: Blocks(64, 64, 8, 2), 128: Blocks(64, 32, 8, 2), 256: Blocks(32, 32, 8, 1)},
        4: {128: Blocks(32, 32, 8, 1)},
    },
    80: {
        2: {64: Blocks(64, 32, 8, 2), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 1)},
        4: {128: Blocks(32, 32, 8, 1)},
    },
}
DIAGONALS = {2: Blocks(32, 32, 4, 2), 4: Blocks(32, 32, 8, 1)}  # where those of a block are summed in registers


def blocks_of(kernel: str, wide: int, size: int, kind: int, bias_grad: bool, device: torch.device) -> Blocks:
    """How a kernel runs, by the widest dimension, the bytes of a number, the bias and the architecture."""
    if kernel == "_backward_rows" and kind == OFFSET.value and bias_grad:
        return DIAGONALS[size]
    known = architecture(device)
    table = BLOCKS[known][kernel, size] if kind == NO_BIAS.value else BIASED[known][size]
    return next(blocks for widest, blocks in table.items() if wide <= widest)


@lru_cache
def architecture(device: torch.device) -> int:
    """The newest one with a table that is no newer than this device: 80 for Ampere and Ada, 90 from Hopper on."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 90 if capability >= (9, 0) else 80


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias, scale: float) -> tuple[Tensor, Tensor]:
    """See `tiles_torch.forward`; in float16, bfloat16 or float32."""
    out, lse = like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    _Call(q, k, v, layout, bias, scale).run(_forward, side_of(out), lse)
    return out, lse


def backward(
    q, k, v, out, lse, dout, dlse, layout, bias, scale: float, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `tiles_torch.backward`."""
    group, of_keys = q.shape[1] // k.shape[1], bias_grad and bias[0] == "dense" and bias[1].shape[2] == 1 != q.shape[2]
    if of_keys and group > 1:  # the kernel of dk sums over the heads of a group, this bias has each alone
        k, v = (side.repeat_interleave(group, 1) for side in (k, v))
        dq, dk, dv, dbias = backward(q, k, v, out, lse, dout, dlse, layout, bias, scale, bias_grad)
        return dq, *(side.unflatten(1, (-1, group)).sum(2) for side in (dk, dv)), dbias
    call = _Call(q, k, v, layout, bias, scale)
    dq, dk, dv = (like(side, side.shape[3]) for side in (q, k, v))
    lse = lse.contiguous()
    past = side_of(dout), lse, delta(out, dout, lse, dlse)
    room = call.room(bias, of_keys) if bias_grad else None
    to = call.bias if room is None else bias_of(room)
    call.run(_backward_rows, *past, side_of(dq), to, scale, bias_grad and not of_keys)
    call.run(_backward_columns, *past, side_of(dk), side_of(dv), to, scale, of_keys)
    return dq, dk, dv, call.gathered(room, bias) if bias_grad else None


class _Call:
    """What all kernels of a call are given: tensors, layout, sizes."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout, bias, scale: float):
        self.layout = layout = layout.on(q.device)
        (_, H, N, D), (_, key_heads, M, Dv) = q.shape, v.shape
        self.q, self.v, self.scale = q, v, scale * LOG2_E.value
        self.kind = KINDS[bias[0]] if bias else NO_BIAS.value
        self.sides = tuple(side_of(side) for side in (q, k, v))
        self.bias = bias_of(spread(bias)) if bias else self.sides[0]
        words = layout.table.words
        self.masks = words, layout.words_by_key, layout.first_edge_of_word if self.kind == EDGE.value else words
        self.sizes = H, H // key_heads, N, M
        self.dims = D, Dv, width(D), width(Dv)

    def blocks(self, kernel, bias_grad: bool) -> Blocks:
        """How a kernel runs, with blocks no larger than a tile."""
        of_call = max(self.dims[2:]), self.q.dtype.itemsize, self.kind
        found = blocks_of(kernel.fn.__name__, *of_call, bias_grad, self.q.device)
        high, broad = self.layout.tile
        return found._replace(rows=min(found.rows, high), keys=min(found.keys, broad))

    def run(self, kernel, *own) -> None:
        """A kernel, for each head and each block of rows or columns of tiles."""
        blocks, by_query = self.blocks(kernel, own[-1] is True), kernel is not _backward_columns
        (high, broad), grid, heads = self.layout.tile, self.layout.grid, (self.q if by_query else self.v).shape[:2]
        count = grid[0] * (high // blocks.rows) if by_query else grid[1] * (broad // blocks.keys)
        tiles = self.layout.by_query if by_query else self.layout.by_key
        if len(tiles.other) * (high // blocks.rows) * (broad // blocks.keys) * self.sizes[1] >= 1 << 31:
            raise ValueError(f"tiles on a GPU are counted in 32 bits (got {len(tiles.other):,} of them)")
        shape = Shape(
            *self.dims, high, broad, blocks.rows, blocks.keys, self.kind, _precision(self.q.dtype), blocks.stages
        )
        if programs := count * heads.numel():
            kernel[(programs,)](
                self.sides, self.bias, tuple(tiles), self.masks, count, *self.sizes, self.scale, constants(shape), *own,
                num_warps=blocks.warps, num_stages=blocks.stages,
            )  # fmt: skip

    # The gradient of a bias: kernels store one number for each head and pair, key, or diagonal of a block, in float32;
    # then those of all that share a value are summed.

    def room(self, bias, of_keys: bool) -> Tensor:
        """Where the kernels store it."""
        (B, H), (_, _, N, M) = self.q.shape[:2], self.sizes
        if self.kind == OFFSET.value:
            blocks, (high, broad) = self.blocks(_backward_rows, True), self.layout.tile
            parts = (high // blocks.rows) * (broad // blocks.keys)
            shape = B, H, len(self.layout.table.row) * parts, 2 * blocks.keys
        else:
            shape = (B, H, 1, bias[1].shape[-1]) if self.kind == EDGE.value else (B, H, 1 if of_keys else N, M)
        return torch.zeros(shape, dtype=torch.float32, device=self.q.device)

    def gathered(self, room: Tensor, bias) -> Tensor:
        """The gradient of the bias's values."""
        values = bias[1]
        if self.kind == OFFSET.value:
            found = self._of_diagonals(room.transpose(0, 1).sum(1, dtype=torch.float64))
            return found.sum(0, keepdim=True) if values.shape[0] == 1 else found
        room = room[:, :, 0] if self.kind == EDGE.value else room
        return summed_as(values, room)

    def _of_diagonals(self, sums: Tensor) -> Tensor:
        """Sums of the diagonals of blocks, (H, blocks, 2 · keys), to those of the plane, (H, N + M - 1), in order."""
        (high, broad), table, (_, _, N, M) = self.layout.tile, self.layout.table, self.sizes
        size = self.blocks(_backward_rows, True).keys  # of a block, on both sides
        row = (table.row * high)[:, None, None] + torch.arange(0, high, size, device=sums.device)[:, None]
        column = (table.column * broad)[:, None, None] + torch.arange(0, broad, size, device=sums.device)
        ahead = ((column - row) // size).flatten()  # in blocks, from 1 - rows of blocks on
        least = 1 - self.layout.grid[0] * high // size
        count = self.layout.grid[1] * broad // size - least
        order = ahead.argsort(stable=True)
        lengths = torch.searchsorted(ahead[order], torch.arange(least, least + count + 1, device=sums.device)).diff()
        total = torch.segment_reduce(sums[:, order].transpose(0, 1).contiguous(), "sum", lengths=lengths)
        total = total.transpose(0, 1).unflatten(2, (2, size))  # (H, diagonals of blocks, 2, size)
        line = total.new_zeros(total.shape[0], count + 1, size)
        line[:, :-1] += total[:, :, 0]
        line[:, 1:] += total[:, :, 1]
        # The first number of the line is that of j - i = least · size - (size - 1).
        first = 1 - N - (least * size - size + 1)
        return line.flatten(1)[:, first : first + N + M - 1]


def _precision(number: torch.dtype) -> str:
    """How float32 is multiplied: as three products in TF32, or as torch.backends.cuda.matmul.fp32_precision says."""
    if number != torch.float32:
        return "ieee"
    return {"ieee": "ieee", "tf32": "tf32"}.get(torch.backends.cuda.matmul.fp32_precision, "tf32x3")
