"""Scores of edges that lie in tiles, scale · q_i · k_j, and the way back on a CPU, by the products of `tiles_steps`.

Every edge is in one tile, and every sum has a fixed order: any number of threads gives the same bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import TilesLayout
from attngraph.kernels.cpu.launch import in_threads
from attngraph.kernels.cpu.simd import LANES, TILE, broadcast, exp2, load, store
from attngraph.kernels.cpu.tiles import (
    as_nodes,
    filled,
    filled_grid,
    flat_heads,
    log2_e,
    pieces_of,
    regrouped,
    tiles_of,
)
from attngraph.kernels.cpu.tiles_scores import Place, load_edges, store_edges
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
    transpose,
)
from attngraph.kernels.cpu.weights import scalar
from attngraph.kernels.memory import DTYPES


class ProductTensors(NamedTuple):
    """Of all key heads, with their query heads one behind the other: (heads, flat)."""

    q: np.ndarray
    k: np.ndarray
    lse: np.ndarray  # as an exponent of 2, or empty
    products: np.ndarray  # of the edges
    nodes: int  # queries of a head, in whole tiles
    edges: int
    head_dim: int  # filled up to a multiple of 16


class SumTensors(NamedTuple):
    """Of all heads, with those that add to the gradient of one, one behind the other: (heads, flat)."""

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


@in_threads(fastmath=FASTMATH_FLAGS)
def products_of_columns(job, pieces, group, tensors, tiles, factor):
    """The products, or weights, of some columns of tiles, as in `forward_rows`, of a key head with `group` queries'."""
    h, piece = divmod(job, len(pieces) - 1)
    q, k, lse, found, head_dim = tensors.q[h], tensors.k[h], tensors.lse[h], tensors.products[h], tensors.head_dim
    s, k_t = aligned(TILE * TILE, q), aligned(TILE * head_dim, q)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for column in range(pieces[piece], pieces[piece + 1]):
        transpose(k, column * TILE * head_dim, head_dim, k_t)
        scale_by(k_t, 0, TILE * head_dim, factor)
        for tile in range(tiles.start[column], tiles.start[column + 1]):
            load_mask(tiles.words, tiles.mask[tile], ALL_BITS, by_query, by_key)
            query = np.int64(tiles.column[tile]) * TILE
            for g in range(group):
                at = g * tensors.nodes + query
                product(s, q, at * head_dim, k_t, head_dim, by_query)
                if len(lse):
                    to_weights(s, by_query, lse, at)
                place = Place(0, g, query, column * TILE, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile]))
                store_edges(found, g * tensors.edges, place, tiles, s, False)


@in_threads(fastmath=FASTMATH_FLAGS)
def sums_of_rows(job, pieces, group, of_queries, tensors, tiles, scale):
    """dx = scale · Σ dproduct · y, over `group` heads, of some rows of tiles, as in `forward_rows`, or of columns."""
    h, piece = divmod(job, len(pieces) - 1)
    y, dx, dproducts = tensors.y[h // (len(tensors.dx) // len(tensors.y))], tensors.dx[h], tensors.dproducts[h]
    head_dim = tensors.head_dim
    ds = aligned(TILE * TILE, y)
    by_query, by_key = np.empty(TILE, np.uint64), np.empty(TILE, np.uint64)
    for row in range(pieces[piece], pieces[piece + 1]):
        at = row * TILE * head_dim
        fill_zero(dx, at, TILE * head_dim)
        for tile in range(tiles.start[row], tiles.start[row + 1]):
            load_mask(tiles.words, tiles.mask[tile], ALL_BITS, by_query, by_key)
            other = np.int64(tiles.column[tile]) * TILE
            place = Place(0, 0, row * TILE, other, np.int64(tiles.tile[tile]), np.int64(tiles.mask[tile]))
            for g in range(group):
                load_edges(dproducts, g * tensors.edges, place, tiles, ds)
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
    (B, H, _, D), edges, heads = q.shape, layout.num_edges, k.shape[0] * k.shape[1]
    unit, (nodes, key_nodes) = 1.0 if lse is None else log2_e(q.dtype), filled_grid(layout)
    found = np.empty((B * H, edges), DTYPES[q.dtype])
    exponent = found[:, :0] if lse is None else flat_heads(lse.to(q.dtype)[..., None] * unit, nodes, 1)
    of_queries, exponent, of_edges = (regrouped(x, heads) for x in (flat_heads(q, nodes), exponent, found))
    tensors = ProductTensors(of_queries, flat_heads(k, key_nodes), exponent, of_edges, nodes, edges, filled(D))
    pieces, tiles = pieces_of(layout, "by_key", heads), tiles_of(layout, "by_key", True)
    factor = scalar(scale * unit, q)
    products_of_columns(heads * (len(pieces) - 1), pieces, H // k.shape[1], tensors, tiles, factor)
    return torch.from_numpy(found).view(B, H, edges)


def products_backward(
    dproducts: Tensor, q: Tensor, k: Tensor, layout: TilesLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """dproducts (B, H, E) → dq = scale · dproducts k and dk = scale · dproductsᵀ q."""
    dproducts = dproducts.detach().to(q.dtype).contiguous()
    dq = _sums(dproducts, k, q, layout, scale, of_queries=True)
    dk = _sums(dproducts, q, k, layout, scale, of_queries=False)
    return dq, dk


def _sums(dproducts: Tensor, y: Tensor, x: Tensor, layout: TilesLayout, scale: float, *, of_queries: bool) -> Tensor:
    """scale · Σ dproduct · y of each query x over its keys, or of each key over its queries: as x, (B, heads, ·, ·)."""
    (B, y_heads, _, D), (heads, size), edges = y.shape, x.shape[1:3], dproducts.shape[2]
    axis, side = (0, "by_query") if of_queries else (1, "by_key")
    nodes, y_nodes = filled_grid(layout)[axis], filled_grid(layout)[1 - axis]
    dx = np.empty((B * heads, nodes * filled(D)), DTYPES[y.dtype])
    group = max(1, y_heads // heads)  # heads of y for one of dx; or there are several of dx for one of y
    of_edges = regrouped(dproducts.numpy(), B * heads)
    of_y = regrouped(flat_heads(y, y_nodes), B * y_heads // group)
    tensors = SumTensors(of_edges, of_y, dx, y_nodes, edges, filled(D))
    pieces, tiles, factor = pieces_of(layout, side, B * heads), tiles_of(layout, side, True), scalar(scale, y)
    sums_of_rows(B * heads * (len(pieces) - 1), pieces, group, of_queries, tensors, tiles, factor)
    return as_nodes(dx, B, size, D, nodes, y.dtype)
