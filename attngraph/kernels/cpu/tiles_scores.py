"""From the products of a tile on a CPU to its scores and weights, and back: biases, transforms, normalisers, dropout.

Scores lie as (streamed, resident); each step is a pass over a tile that is in the cache.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attngraph.kernels.cpu.simd import (
    LANES,
    TILE,
    broadcast,
    compress,
    count_bits,
    expand,
    load,
    philox_kept,
    sigmoid,
    store,
    tanh,
    where,
    where_positive,
)
from attngraph.kernels.cpu.tiles_steps import ALL_BITS, aligned, fill_zero, inner, transpose

NO_BIAS, OFFSET, EDGE, DENSE = range(4)
BIAS_KINDS = {"offset": OFFSET, "edge": EDGE, "dense": DENSE}
NO_TRANSFORM, SOFTCAP, LEAKY_RELU = range(3)
TRANSFORMS = {"softcap": SOFTCAP, "leaky_relu": LEAKY_RELU}
SOFTMAX, SIGMOID, NONE, RELU, SQUARED_RELU = range(5)
NORMALIZERS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "none": NONE, "relu": RELU, "squared_relu": SQUARED_RELU}


class Bias(NamedTuple):
    """A `ScoreBias`: its values, flat, and their strides over batch, heads and queries, 0 where one serves all.

    Those of an offset have 64 numbers more at both ends, which pairs of tiles beyond the border read.
    """

    kind: int
    values: np.ndarray
    reversed_values: np.ndarray  # of an offset, each head's values from the last to the first; else empty
    strides: tuple[int, int, int]
    n: int
    m: int


class Dropout(NamedTuple):
    """Which weights are dropped; see `kernels.dropout`."""

    is_on: bool
    threshold: np.uint64
    factor: np.floating  # 1 / (1 - p)
    round_keys: np.ndarray  # uint64 (20,)
    heads: np.ndarray  # int64 (H,): their numbers


class Scoring(NamedTuple):
    """How products become scores and weights: a `Modifiers`, but for the padding; numbers of the tensors' dtype."""

    is_plain: bool  # nothing but scale and softmax
    scale: np.floating
    score_scale: np.floating  # of the products in `make_scores`
    factor: np.floating  # of what `make_scores` leaves, or of the products without it, to what the normaliser takes
    transform: int
    transform_value: np.floating
    normalize: int
    bias: Bias
    dropout: Dropout


class BiasGradient(NamedTuple):
    """Gradients of the values of a bias, flat, and their strides over batch and heads; of one kind, or of none.

    float64 where many pairs share a value.
    """

    values: np.ndarray  # of edges, or of pairs
    sums: np.ndarray  # float64, of offsets, or of keys where all queries share one row
    strides: tuple[int, int]


class Place(NamedTuple):
    """Where a tile is."""

    batch: int
    head: int
    query: int
    key: int
    tile: int  # its place in the table
    mask: int  # the number of its mask, or -1


class Scratch(NamedTuple):
    """Tiles (64, 64) for the numbers of one tile of pairs, empty where they are not asked for; see `new_scratch`."""

    slopes: np.ndarray  # of the transform
    bias: np.ndarray  # (queries, keys)
    bias_t: np.ndarray  # (keys, queries)
    diagonals: np.ndarray  # (128,)
    kept: np.ndarray  # uint64 (64,): a bit for each resident node, whether dropout keeps the pair


@inner
def new_scratch(scoring, x):
    """Scratch in the dtype of x, where dropout keeps all; no more than is needed, as memory costs more than a tile."""
    slopes = TILE * TILE if scoring.transform != NO_TRANSFORM else 0
    bias = TILE * TILE if scoring.bias.kind == EDGE or scoring.bias.kind == DENSE else 0
    kept = np.full(TILE, ALL_BITS)
    return Scratch(aligned(slopes, x), aligned(bias, x), aligned(bias, x), aligned(2 * TILE, x), kept)


# ---------------------------------------------------------------------------------------------------- biases


@inner
def mask_row(words, mask, r):
    """The edges of row r of a tile."""
    return words[mask, r] if mask >= 0 else ALL_BITS


@inner
def load_dense(bias, place, tile):
    """The values of a dense bias for a tile → tile (queries, keys); beyond the border, 0."""
    at = place.batch * bias.strides[0] + place.head * bias.strides[1] + place.query * bias.strides[2] + place.key
    rows, columns = min(TILE, bias.n - place.query), min(TILE, bias.m - place.key)
    if rows < TILE or columns < TILE:
        fill_zero(tile, 0, TILE * TILE)
    for r in range(rows):
        if columns == TILE:
            for c in range(0, TILE, LANES):
                store(tile, r * TILE + c, load(bias.values, at + r * bias.strides[2] + c))
        else:
            for c in range(columns):
                tile[r * TILE + c] = bias.values[at + r * bias.strides[2] + c]


@inner
def values_of_edges(values, e, lanes):
    """values[e], values[e + 1], … in the lanes whose bits are set, 0 in the others."""
    return load(values, e) if lanes == np.uint64(0xFFFF) else expand(values, e, lanes)


@inner
def load_edges(values, at, place, tiles, tile):
    """The values of the edges of a tile, that of edge 0 at `at` → tile (queries, keys); without an edge, 0."""
    for r in range(TILE):
        bits = mask_row(tiles.words, place.mask, r)
        e = at + tiles.first_edge[place.tile, r]
        for c in range(0, TILE, LANES):
            lanes = (bits >> np.uint64(c)) & np.uint64(0xFFFF)
            store(tile, r * TILE + c, values_of_edges(values, e, lanes))
            e += count_bits(lanes)


@inner
def store_edges(values, at, place, tiles, tile, adds):
    """A tile (queries, keys) → the values of its edges, that of edge 0 at `at`; or added to them."""
    for r in range(TILE):
        bits = mask_row(tiles.words, place.mask, r)
        e = at + tiles.first_edge[place.tile, r]
        for c in range(0, TILE, LANES):
            lanes = (bits >> np.uint64(c)) & np.uint64(0xFFFF)
            if lanes:
                x = load(tile, r * TILE + c)
                if adds:
                    x = x + values_of_edges(values, e, lanes)
                if lanes == np.uint64(0xFFFF):
                    store(values, e, x)
                else:
                    compress(values, e, lanes, x)
            e += count_bits(lanes)


@inner
def add_bias(s, values, first, row_stride, scale):
    """s (64, 64) = scale · s + values, those of a row side by side, from one row to the next `row_stride` apart."""
    factor = broadcast(s, scale)
    for r in range(TILE):
        for c in range(0, TILE, LANES):
            added = load(values, first + r * row_stride + c)
            store(s, r * TILE + c, load(s, r * TILE + c) * factor + added)


@inner
def add_tile_bias(s, scoring, place, tiles, scratch, queries_stream):
    """s = scale · s + bias, of a tile."""
    bias = scoring.bias
    if bias.kind == OFFSET:
        head = place.batch * bias.strides[0] + place.head * bias.strides[1] + TILE
        ahead = place.key - place.query
        if queries_stream:
            add_bias(s, bias.values, head + ahead + bias.n - 1, -1, scoring.score_scale)
        else:
            add_bias(s, bias.reversed_values, head - ahead + bias.m - 1, -1, scoring.score_scale)
        return
    if bias.kind == DENSE:
        load_dense(bias, place, scratch.bias)
    else:
        at = place.batch * bias.strides[0] + place.head * bias.strides[1]
        load_edges(bias.values, at, place, tiles, scratch.bias)
    if queries_stream:
        add_bias(s, scratch.bias, 0, TILE, scoring.score_scale)
    else:
        transpose(scratch.bias, 0, TILE, scratch.bias_t)
        add_bias(s, scratch.bias_t, 0, TILE, scoring.score_scale)


@inner
def add_diagonals(sums, at, ds, diagonals):
    """sums[at + c - r] += ds[r, c], for ds (64, 64).

    Blocks on one diagonal are added first, so that few sums overlap with those stored just before.
    """
    fill_zero(diagonals, 0, 2 * TILE)
    blocks = TILE // LANES
    for r in range(LANES):
        for ahead in range(1 - blocks, blocks):
            total = broadcast(ds, 0)
            for block in range(max(0, -ahead), min(blocks, blocks - ahead)):
                total = total + load(ds, (block * LANES + r) * TILE + (block + ahead) * LANES)
            y = TILE + ahead * LANES - r
            store(diagonals, y, load(diagonals, y) + total)
    for y in range(1, 2 * TILE):
        sums[at - TILE + y] += diagonals[y]


@inner
def add_dense_gradient(gradient, bias, place, ds):
    """Add ds (queries, keys) to the gradient of a dense bias."""
    at = place.batch * gradient.strides[0] + place.head * gradient.strides[1]
    rows, columns = min(TILE, bias.n - place.query), min(TILE, bias.m - place.key)
    if len(gradient.sums):  # one row for all queries
        for c in range(0, TILE, LANES):
            total = broadcast(ds, 0)
            for r in range(TILE):
                total = total + load(ds, r * TILE + c)
            store(ds, c, total)
        for c in range(columns):
            gradient.sums[at + place.key + c] += ds[c]
        return
    for r in range(rows):
        first = at + (place.query + r) * bias.m + place.key
        for c in range(columns):
            gradient.values[first + c] += ds[r * TILE + c]


@inner
def add_bias_gradient(gradient, bias, place, tiles, ds, scratch):
    """Add ds (queries, keys), which may be overwritten, to the gradient of a bias."""
    if bias.kind == OFFSET:
        at = place.batch * gradient.strides[0] + place.head * gradient.strides[1] + TILE
        add_diagonals(gradient.sums, at + place.key - place.query + bias.n - 1, ds, scratch.diagonals)
    elif bias.kind == DENSE:
        add_dense_gradient(gradient, bias, place, ds)
    else:
        at = place.batch * gradient.strides[0] + place.head * gradient.strides[1]
        store_edges(gradient.values, at, place, tiles, ds, True)


# ------------------------------------------------------------------------------------------------ transforms


@inner
def apply_transform(s, slopes, scoring, scale):
    """scale · s to its transform in place; the slopes there → slopes."""
    one, value = broadcast(s, 1), broadcast(s, scoring.transform_value)
    if scoring.transform == SOFTCAP:
        factor = broadcast(s, scale / scoring.transform_value)
        for y in range(0, TILE * TILE, LANES):
            capped = tanh(load(s, y) * factor)
            store(s, y, capped * value)
            store(slopes, y, one - capped * capped)
    else:
        factor = broadcast(s, scale)
        for y in range(0, TILE * TILE, LANES):
            x = load(s, y) * factor
            store(s, y, where_positive(x, x, x * value))
            store(slopes, y, where_positive(x, one, value))


@inner
def make_scores(s, scoring, place, tiles, scratch, queries_stream):
    """Products s to scores, transform(scale · s + bias), in place; the slopes of the transform → scratch."""
    scale = scoring.score_scale
    if scoring.bias.kind != NO_BIAS:
        add_tile_bias(s, scoring, place, tiles, scratch, queries_stream)
        scale = s.dtype.type(1)
    if scoring.transform != NO_TRANSFORM:
        apply_transform(s, scratch.slopes, scoring, scale)


@inner
def scale_by_slopes(ds, bits, slopes):
    """ds *= slopes, where there are edges; without, a slope may be anything."""
    zero = broadcast(ds, 0)
    for r in range(TILE):
        for c in range(0, TILE, LANES):
            y = r * TILE + c
            store(ds, y, where(bits[r], c, load(ds, y) * load(slopes, y), zero))


# --------------------------------------------------------------------------------------------------- dropout


@inner
def draw_kept(kept, bits, dropout, place, queries_stream):
    """Which pairs of a tile dropout keeps, in the order of bits: the edges (64,) of each streamed node."""
    group, head = place.key // TILE * LANES, dropout.heads[place.head]
    if queries_stream:
        for r in range(TILE):
            if bits[r]:
                kept[r] = philox_kept(
                    group, 1, place.query + r, 0, place.batch, head, dropout.round_keys, dropout.threshold
                )
        return
    for r in range(TILE):
        kept[r] = np.uint64(0)
    for lane in range(LANES):
        edges = bits[lane] | bits[LANES + lane] | bits[2 * LANES + lane] | bits[3 * LANES + lane]
        for c in range(0, TILE, LANES):
            if (edges >> np.uint64(c)) & np.uint64(0xFFFF):
                words = philox_kept(
                    group + lane, 0, place.query + c, 1, place.batch, head, dropout.round_keys, dropout.threshold
                )
                for r in range(lane, TILE, LANES):
                    kept[r] |= (words & np.uint64(0xFFFF)) << np.uint64(c)
                    words >>= np.uint64(LANES)


# ----------------------------------------------------------------------------------------------- normalisers


@inner
def elementwise_weights(s, bits, kept, factor, normalize):
    """Scores s · factor to weights in place, 0 where there is no edge or it is dropped."""
    zero, scale = broadcast(s, 0), broadcast(s, factor)
    for r in range(TILE):
        for c in range(0, TILE, LANES):
            x = load(s, r * TILE + c) * scale
            if normalize == SIGMOID:
                x = sigmoid(x)
            elif normalize == RELU:
                x = where_positive(x, x, zero)
            elif normalize == SQUARED_RELU:
                x = where_positive(x, x * x, zero)
            store(s, r * TILE + c, where(bits[r] & kept[r], c, x, zero))


@inner
def elementwise_backward(p, ds, bits, kept, keep_factor, factor, normalize):
    """Scores p · factor to weights, 0 where dropped, and dp in ds to the gradients of the scores, both in place."""
    zero, one, two = broadcast(p, 0), broadcast(p, 1), broadcast(p, 2)
    scale, keep = broadcast(p, factor), broadcast(p, keep_factor)
    for r in range(TILE):
        edges = bits[r] & kept[r]
        for c in range(0, TILE, LANES):
            x, slope = load(p, r * TILE + c) * scale, one
            if normalize == SIGMOID:
                x = sigmoid(x)
                slope = x * (one - x)
            elif normalize == RELU:
                slope = where_positive(x, one, zero)
                x = where_positive(x, x, zero)
            elif normalize == SQUARED_RELU:
                x = where_positive(x, x, zero)
                slope = two * x
                x = x * x
            store(p, r * TILE + c, where(edges, c, x, zero))
            store(ds, r * TILE + c, where(edges, c, load(ds, r * TILE + c) * keep * slope, zero))
