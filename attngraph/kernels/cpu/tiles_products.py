"""Scores of edges that lie in tiles, scale · q_i · k_j, and the way back on a CPU, by the products of `tiles_steps`.

Every edge is in one tile, and every sum has a fixed order: any number of threads gives the same bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from attngraph.kernels.contract import TilesLayout
from attngraph.kernels.cpu.openmp import parallel_for
from attngraph.kernels.cpu.simd import LANES, TILE, broadcast, exp2, load, store
from attngraph.kernels.cpu.tiles import flat_heads, log2_e, pieces_of, tiled, tiles_of
from attngraph.kernels.cpu.tiles_scores import Place, load_edges, store_edges
from attngraph.kernels.cpu.tiles_steps import (
    ALL_BITS,
    add_product,
    aligned,
    compiled,
    fill_zero,
    inner,
    load_mask,
    product,
    scale_by,
    transpose,
)
from attngraph.kernels.cpu.weights import scalar
from attngraph.kernels.memory import empty


class ProductTensors(NamedTuple):
    """Of one key head and all its query heads, one behind the other; flat."""

    q: np.ndarray
    k: np.ndarray
    lse: np.ndarray  # as an exponent of 2, or empty
    products: np.ndarray  # of the edges
    nodes: int  # queries of a head, in whole tiles
    edges: int
    head_dim: int  # filled up to a multiple of 16


class SumTensors(NamedTuple):
    """Of one head, and of all heads that add to its gradient, one behind the other; flat."""

    dproducts: np.ndarray  # of the edges
    y: np.ndarray
    dx: np.ndarray
    nodes: int  # those of y in a head, in whole tiles
    edges: int
    head_dim: int  # filled up to a multiple of 16


@inner
def to_weights(s, bits, lse, at):
    """Scores s (queries, keys) to exp2(s - lse), at most 1, where any of 16 adjacent pairs is an edge."""
    for r in range(TILE):
        of_query = broadcast(s, lse[at + r])
        for c in range(0, TILE, LANES):
            if (bits[r] >> np.uint64(c)) & np.uint64(0xFFFF):
                store(s, r * TILE + c, exp2(load(s, r * TILE + c) - of_query))


@compiled
def products_of_columns(first, stop, group, tensors, tiles, factor):
    """The products, or weights, of the columns of tiles first … stop - 1 of a key head with `group` query heads."""
    q, k, head_dim = tensors.q, tensors.k, tensors.head_dim
    s, k_t = aligned(TILE * TILE, q), aligned(TILE * head_dim, q)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for column in range(first, stop):
        transpose(k, column * TILE * head_dim, head_dim, k_t)
        scale_by(k_t, 0, TILE * head_dim, factor)
        for tile in range(tiles.start[column], tiles.start[column + 1]):
            load_mask(tiles.words, tiles.mask[tile], ALL_BITS, by_query, by_key)
            query = np.int64(tiles.column[tile]) * TILE
            for g in range(group):
                at = g * tensors.nodes + query
                product(s, q, at * head_dim, k_t, head_dim, by_query)
                if len(tensors.lse):
                    to_weights(s, by_query, tensors.lse, at)
                place = Place(0, g, query, column * TILE, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile]))
                store_edges(tensors.products, g * tensors.edges, place, tiles, s, False)


@compiled
def sums_of_rows(first, stop, group, of_queries, tensors, tiles, scale):
    """dx = scale · Σ dproduct · y, over `group` heads, of the rows of tiles first … stop - 1, or of the columns."""
    y, dx, head_dim = tensors.y, tensors.dx, tensors.head_dim
    ds = aligned(TILE * TILE, y)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for row in range(first, stop):
        at = row * TILE * head_dim
        fill_zero(dx, at, TILE * head_dim)
        for tile in range(tiles.start[row], tiles.start[row + 1]):
            load_mask(tiles.words, tiles.mask[tile], ALL_BITS, by_query, by_key)
            other = np.int64(tiles.column[tile]) * TILE
            place = Place(0, 0, row * TILE, other, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile]))
            for g in range(group):
                load_edges(tensors.dproducts, g * tensors.edges, place, tiles, ds)
                y_at = (g * tensors.nodes + other) * head_dim
                if of_queries:
                    add_product(dx, at, ds, TILE, 1, y, y_at, head_dim, by_query)
                else:
                    add_product(dx, at, ds, 1, TILE, y, y_at, head_dim, by_key)
        scale_by(dx, at, TILE * head_dim, scale)


def products(q: Tensor, k: Tensor, layout: TilesLayout, scale: float, lse: Tensor | None = None) -> Tensor:
    """q (B, H, N, D), k (B, Hkv, M, D), float32 or float64 → scale · q_i · k_j of each edge: (B, H, E), by number.

    layout: tiles of 64 × 64, with all edges. With lse (B, H, N), finite: exp(score - lse) of its query, at most 1.
    """
    (B, H), Hkv, edges = q.shape[:2], k.shape[1], layout.num_edges
    found, unit = empty(B, H, edges, like=q), 1.0 if lse is None else log2_e(q.dtype)
    lse = q.new_empty(B, H, 0) if lse is None else tiled(lse.to(q.dtype)[..., None] * unit, layout, 0, 1)
    q, k = tiled(q, layout, 0), tiled(k, layout, 1)
    arrays = [flat_heads(x, B * Hkv) for x in (q, k, lse, found)]
    jobs, tiles = [*pairwise(pieces_of(layout.by_key, B * Hkv))], tiles_of(layout, layout.by_key, True)
    factor = scalar(scale * unit, q)

    def run(job: int) -> None:
        h, piece = divmod(job, len(jobs))
        tensors = ProductTensors(*(x[h] for x in arrays), layout.grid[0] * TILE, edges, q.shape[4])
        products_of_columns(*jobs[piece], H // Hkv, tensors, tiles, factor)

    parallel_for(B * Hkv * len(jobs), run)
    return found


def products_backward(
    dproducts: Tensor, q: Tensor, k: Tensor, layout: TilesLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """dproducts (B, H, E) → dq = scale · dproducts k and dk = scale · dproductsᵀ q."""
    dproducts = dproducts.detach().to(q.dtype).contiguous()
    dq = _sums(dproducts, k, q.shape[1], layout, scale, of_queries=True)
    dk = _sums(dproducts, q, k.shape[1], layout, scale, of_queries=False)
    return dq[:, :, : q.shape[2], : q.shape[3]], dk[:, :, : k.shape[2], : k.shape[3]]


def _sums(dproducts: Tensor, y: Tensor, heads: int, layout: TilesLayout, scale: float, *, of_queries: bool) -> Tensor:
    """scale · Σ dproduct · y of each query over its keys, or of each key over its queries: (B, heads, nodes, ·)."""
    (B, y_heads), edges = y.shape[:2], dproducts.shape[2]
    rows, axis = (layout.by_query, 0) if of_queries else (layout.by_key, 1)
    y = tiled(y, layout, 1 - axis)
    dx = empty(B, heads, layout.grid[axis], *y.shape[3:], like=y)
    group, share = max(1, y_heads // heads), max(1, heads // y_heads)  # heads of y for one of dx, or of dx for one of y
    of_edges, of_y, of_x = (
        flat_heads(dproducts, B * heads),
        flat_heads(y, B * heads // share),
        flat_heads(dx, B * heads),
    )
    jobs, tiles, factor = [*pairwise(pieces_of(rows, B * heads))], tiles_of(layout, rows, True), scalar(scale, y)

    def run(job: int) -> None:
        h, piece = divmod(job, len(jobs))
        tensors = SumTensors(of_edges[h], of_y[h // share], of_x[h], y.shape[2] * TILE, edges, y.shape[4])
        sums_of_rows(*jobs[piece], group, of_queries, tensors, tiles, factor)

    parallel_for(B * heads * len(jobs), run)
    return dx.flatten(2, 3)
