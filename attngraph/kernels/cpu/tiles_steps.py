"""What the kernels of tiles on a CPU have in common: how tiles lie in memory, their masks and their products.

Of a tile, the nodes of the row (or column) of tiles that a loop is at are resident, the nodes across stream. Scores
lie as (streamed, resident): every product then reads its first factor number by number, in whatever strides, and its
second in whole vectors, as it lies in memory; only the resident tile is transposed, once for all that stream by.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from attngraph.kernels.cpu.compiler import compiled_with
from attngraph.kernels.cpu.simd import (
    BLOCK_ROWS,
    LANES,
    TILE,
    Matrix,
    bit_range,
    broadcast,
    gemm_8_rows,
    load,
    store,
    transpose_16x16,
    vectors_at_once,
)

ALL_BITS = np.uint64(0xFFFFFFFFFFFFFFFF)
FASTMATH_FLAGS = {"contract"}  # multiply and add in one rounding; exp2 stands no reassociation
compiled = compiled_with(fastmath=FASTMATH_FLAGS)
# For functions that only compiled ones call, which keep their code.
inner = njit(fastmath=FASTMATH_FLAGS, no_cpython_wrapper=True, no_cfunc_wrapper=True)


class Tiles(NamedTuple):
    """The tiles of rows, or of columns: the arrays of a `TileRows`, and the masks."""

    start: np.ndarray
    full: np.ndarray
    column: np.ndarray
    mask: np.ndarray
    words: np.ndarray  # uint64 (P, 64): bit j of row i
    tile: np.ndarray
    first_edge: np.ndarray  # int64 (T, 64), by place in the table; (0, 64) where no bias asks for it


@inner
def aligned(size, x):
    """A flat array of the dtype of x that begins at a cache line."""
    whole = np.empty(size + LANES, x.dtype)
    first = -(whole.ctypes.data // whole.itemsize) % LANES
    return whole[first : first + size]


@inner
def fill_zero(x, at, size):
    """Zero in x[at : at + size]; size is a multiple of 16, here and below."""
    for y in range(at, at + size, LANES):
        store(x, y, broadcast(x, 0))


@inner
def scale_by(x, at, size, factor):
    """x[at : at + size] *= factor."""
    for y in range(at, at + size, LANES):
        store(x, y, load(x, y) * broadcast(x, factor))


@inner
def scale_rows(x, at, width, factors):
    """x (64, width) times a factor for each row."""
    for r in range(TILE):
        if factors[r] != 1:
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
    """s (64, 64) = x (64, width) · y_t (width, 64), but for blocks of s without an edge: (8, 32), or (8, 16).

    0 of vectors of no numbers.
    """
    if not width:
        fill_zero(s, 0, TILE * TILE)
        return
    vectors = vectors_at_once(s)
    columns = vectors * LANES
    mask = (np.uint64(1) << np.uint64(columns)) - np.uint64(1)
    for r in range(0, TILE, BLOCK_ROWS):
        edges = union_of_8(bits, r)
        for first in range(0, TILE, columns):
            if (edges >> np.uint64(first)) & mask:
                a, b = Matrix(x, x_at + r * width, width, 1), Matrix(y_t, first, TILE, 1)
                gemm_8_rows(Matrix(s, r * TILE + first, TILE, 1), a, b, width, True, vectors)


@inner
def add_product(acc, acc_at, weights, row_stride, column_stride, x, x_at, width, bits):
    """acc (64, width) += weights (64, 64) · x (64, width), where the weights are 0 but for the pairs in bits."""
    vectors = vectors_at_once(acc)
    for r in range(0, TILE, BLOCK_ROWS):
        edges = union_of_8(bits, r)
        if edges:
            first, stop = bit_range(edges)
            a = Matrix(weights, r * row_stride + first * column_stride, row_stride, column_stride)
            for d in range(0, width, vectors * LANES):
                b = Matrix(x, x_at + first * width + d, width, 1)
                c = Matrix(acc, acc_at + r * width + d, width, 1)
                if d + vectors * LANES <= width:
                    gemm_8_rows(c, a, b, stop - first, False, vectors)
                else:
                    gemm_8_rows(c, a, b, stop - first, False, 1)
