"""What each edge makes of the vectors of its query and its key, a score before the bias, and the way back: on a CPU.

    score_ij = scale · q_i · k_j, or scale · Σ_d weight_d · activation(q_id + k_jd)

Of memory it takes E·H. activation(q + k) of four edges is made in
the cache, and from there on it is one of `gather`'s products. No two threads add to one number: two runs give the same
bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import Adjacency, CSRLayout
from attngraph.kernels.cpu.csr import (
    edges_of,
    flat_nodes,
    neighbors_of_4,
    next_4,
    nodes_first,
    sum_pieces,
    unit_ranges,
)
from attngraph.kernels.cpu.exp import exp
from attngraph.kernels.cpu.gather import Neighbors, Vector, gather_add, gather_dot, gather_sum
from attngraph.kernels.cpu.launch import InThreads, in_threads
from attngraph.kernels.cpu.weights import LEAKY_RELU, OPTIONS, SOFTCAP, compiled, scalar, transform
from attngraph.kernels.memory import empty, zeros

DOT = -1
OWN = (0, 1, 2, 3)  # the places of the vectors of four edges in scratch memory


class Activation(NamedTuple):
    """One of `weights.transform`, or DOT for none: tanh caps at 1, ReLU leaks nothing."""

    kind: int
    value: Any


class Pairs(NamedTuple):
    """Vectors x of n nodes and y of m neighbours, (B, nodes, H, D), flat; weight (H, D), empty for a dot product."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    heads: int
    n: int
    m: int


class Sums(NamedTuple):
    """What the backward kernel fills: sums of dscore_ij times y_j, or activation'(x_i + y_j); the same for pieces."""

    dx: np.ndarray  # (B · nodes, H, D)
    piece_dx: np.ndarray
    dweight: np.ndarray  # sums of dscore · activation, (B · units, H, D), or empty
    pieces: int


@compiled
def edges_of_4(edge, e, last):
    """The numbers of the edges e … e + 3, in edge_index order; past the last edge, the last one again."""
    if len(edge):
        return neighbors_of_4(edge, e, last, 0)
    return next_4(e, last, 0)


@lru_cache
def _forward_kernel(head_dim: int) -> InThreads:
    """The kernel for this dimension; each job is a range of units of one batch entry, here and below."""

    @in_threads(**OPTIONS)
    def forward_units(job, ranges, batches, pairs, edges, activation, scale, lse, scores):
        x, y, heads, is_dot = pairs.x, pairs.y, pairs.heads, activation.kind == DOT
        width, four, of_query = heads * head_dim, np.empty((heads, 4), x.dtype), np.empty(heads * 4, x.dtype)
        flat = four.reshape(heads * 4)
        z, slopes = np.empty(4 * width, x.dtype), np.empty(4 * width, x.dtype)
        place, batch = divmod(job, batches)
        for unit in range(ranges[place], ranges[place + 1]):
            first, stop, begin, end = edges.units[unit]
            for i in range(first, stop):
                lo, hi, row = max(edges.start[i], begin), min(edges.start[i + 1], end), batch * pairs.n + i
                if len(lse):
                    for g in range(heads):
                        of_query[g * 4 : g * 4 + 4] = lse[row, g]
                for e in range(lo, hi, 4):
                    nodes = neighbors_of_4(edges.neighbor, e, hi - 1, batch * pairs.m)
                    four[:] = x.dtype.type(0)
                    if is_dot:
                        for h in range(heads):
                            x_i, y_j = Vector(x, row * width + h * head_dim), Neighbors(y, nodes, width, h * head_dim)
                            gather_dot(four, h * 4, scale, x_i, y_j, head_dim)
                    else:
                        for h in range(heads):
                            x_i, y_j = Vector(x, row * width + h * head_dim), Neighbors(y, nodes, width, h * head_dim)
                            gather_sum(z, h * 4 * head_dim, x_i, y_j, head_dim)
                        transform(z, slopes, 4 * width, activation.kind, activation.value)
                        for h in range(heads):
                            z_j = Neighbors(z, OWN, head_dim, h * 4 * head_dim)
                            gather_dot(four, h * 4, scale, Vector(pairs.weight, h * head_dim), z_j, head_dim)
                    if len(lse):
                        for lane in range(heads * 4):
                            flat[lane] = exp(flat[lane] - of_query[lane])
                    for t in range(min(4, hi - e)):
                        for h in range(heads):
                            scores[batch, e + t, h] = four[h, t]

    return forward_units


@lru_cache
def _backward_kernel(head_dim: int) -> InThreads:
    """The kernel for this dimension: of queries, whose neighbours are keys, or of keys."""

    @in_threads(**OPTIONS)
    def backward_units(job, ranges, batches, pairs, edges, activation, scale, dscores, sums):
        x, y, heads, is_dot = pairs.x, pairs.y, pairs.heads, activation.kind == DOT
        width, four, units = heads * head_dim, np.empty((heads, 4), x.dtype), len(edges.units)
        z, slopes, pieces = np.empty(4 * width, x.dtype), np.empty(4 * width, x.dtype), sums.pieces
        place, batch = divmod(job, batches)
        for unit in range(ranges[place], ranges[place + 1]):
            first, stop, begin, end = edges.units[unit]
            for i in range(first, stop):
                lo, hi, row = max(edges.start[i], begin), min(edges.start[i + 1], end), batch * pairs.n + i
                dx, to = sums.dx, row
                if unit < pieces:
                    dx, to = sums.piece_dx, batch * pieces + unit
                for e in range(lo, hi, 4):
                    nodes = neighbors_of_4(edges.neighbor, e, hi - 1, batch * pairs.m)
                    a, b, c, d = edges_of_4(edges.edge, e, hi - 1)
                    for h in range(heads):
                        four[h, 0], four[h, 1] = scale * dscores[batch, a, h], scale * dscores[batch, b, h]
                        four[h, 2], four[h, 3] = scale * dscores[batch, c, h], scale * dscores[batch, d, h]
                    for t in range(hi - e, 4):
                        four[:, t] = x.dtype.type(0)
                    if is_dot:
                        for h in range(heads):
                            dx_h, y_j = Vector(dx, to * width + h * head_dim), Neighbors(y, nodes, width, h * head_dim)
                            gather_add(dx_h, Vector(four, h * 4), y_j, head_dim)
                        continue
                    for h in range(heads):
                        x_i, y_j = Vector(x, row * width + h * head_dim), Neighbors(y, nodes, width, h * head_dim)
                        gather_sum(z, h * 4 * head_dim, x_i, y_j, head_dim)
                    transform(z, slopes, 4 * width, activation.kind, activation.value)
                    for h in range(heads):
                        dx_h = Vector(dx, to * width + h * head_dim)
                        slopes_j = Neighbors(slopes, OWN, head_dim, h * 4 * head_dim)
                        gather_add(dx_h, Vector(four, h * 4), slopes_j, head_dim)
                    for h in range(heads if len(sums.dweight) else 0):
                        dweight_h = Vector(sums.dweight, (batch * units + unit) * width + h * head_dim)
                        z_j = Neighbors(z, OWN, head_dim, h * 4 * head_dim)
                        gather_add(dweight_h, Vector(four, h * 4), z_j, head_dim)

    return backward_units


def products(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    layout: CSRLayout,
    scale: float,
    activation: str,
    negative_slope: float,
    lse: Tensor | None = None,
    by_head: bool = True,
) -> Tensor:
    """q (B, H, N, D), k (B, Hkv, M, D), weight (H, D) → the score of each edge: (B, H, E), in edge_index order.

    activation "": scale · q_i · k_j, and weight is None; "tanh", "leaky_relu" or "relu": scale · Σ_d weight_d ·
    activation(q_id + k_jd). float32 or float64. With lse (B, H, N), finite: exp(score - lse) of its query.

    By head, they lie in memory as they are told; else as (B, E, H), for what reads those of all heads at once.
    """
    (B, H, _, head_dim), adjacency = q.shape, layout.by_query
    x, y = nodes_first(q), _of_query_heads(k, H)
    E = len(adjacency.neighbor)
    scores = empty(B, H, E, like=q).transpose(1, 2) if by_head else empty(B, E, H, like=q)
    of_queries = q.new_empty(0, 0) if lse is None else nodes_first(lse[..., None]).to(q.dtype).flatten(2).flatten(0, 1)
    pairs, edges = _pairs(x, y, weight), edges_of(adjacency)
    rule, factor, stored = _activation(activation, negative_slope, q), scalar(scale, q), scores.numpy()
    kernel, ranges = _forward_kernel(head_dim), unit_ranges(len(adjacency.units))
    kernel((len(ranges) - 1) * B, ranges, B, pairs, edges, rule, factor, of_queries.numpy(), stored)
    return scores.transpose(1, 2)


def products_backward(
    dproducts: Tensor,
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    layout: CSRLayout,
    scale: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dproducts (B, H, E) → dq, dk and, of an activation, dweight."""
    H, Hkv = q.shape[1], k.shape[1]
    x, y = nodes_first(q), _of_query_heads(k, H)
    call = _Backward(dproducts.detach().transpose(1, 2), weight, _activation(activation, negative_slope, q), scale)
    dq, dweight = call.of_nodes(x, y, layout.by_query, weight is not None)
    dk, _ = call.of_nodes(y, x, layout.numbered, False)
    if weight is not None:
        dq, dk = dq.mul_(weight.detach()), dk.mul_(weight.detach())
    dk = dk if Hkv == H else dk.unflatten(2, (Hkv, H // Hkv)).sum(3)
    return dq.transpose(1, 2), dk.transpose(1, 2), dweight


class _Backward(NamedTuple):
    """dproducts (B, E, H), weight (H, D), the activation and the scale."""

    dproducts: Tensor
    weight: Tensor | None
    activation: Activation
    scale: float

    def of_nodes(self, x: Tensor, y: Tensor, adjacency: Adjacency, weights: bool) -> tuple[Tensor, Tensor | None]:
        """scale · Σ_j dproduct · (y_j, or activation'), (B, nodes, H, D); scale · Σ dproduct · activation, (H, D)."""
        (B, n, H, D), units = x.shape, len(adjacency.units)
        dx, piece_dx = zeros(B, n, H, D, like=x), x.new_zeros(B, adjacency.num_pieces, H, D)
        dweight = x.new_zeros(B, units, H, D) if weights else x.new_zeros(0, 0, H, D)
        sums = Sums(*flat_nodes(dx, piece_dx, dweight), adjacency.num_pieces)
        edges, pairs, dscores = edges_of(adjacency), _pairs(x, y, self.weight), self.dproducts.to(x.dtype).numpy()
        factor = scalar(self.scale, x)
        kernel, ranges = _backward_kernel(D), unit_ranges(units)

        kernel((len(ranges) - 1) * B, ranges, B, pairs, edges, self.activation, factor, dscores, sums)
        if adjacency.num_pieces:
            sum_pieces(adjacency.pieces.numpy(), dx.numpy(), piece_dx.numpy())
        if not weights:
            return dx, None
        # By NumPy, whose sums do not depend on the number of threads.
        return dx, torch.from_numpy(sums.dweight.sum(0, dtype=np.float64)).to(x.dtype)


def _of_query_heads(k: Tensor, heads: int) -> Tensor:
    """k (B, Hkv, M, D), repeated for the query heads of each of its heads: (B, M, H, D)."""
    return nodes_first(k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1))


def _pairs(x: Tensor, y: Tensor, weight: Tensor | None) -> Pairs:
    """Of x and y (B, nodes, H, D)."""
    weights = x.new_empty(0, 0) if weight is None else weight.detach().to(x.dtype).contiguous()
    return Pairs(x.flatten().numpy(), y.flatten().numpy(), weights.numpy(), x.shape[2], x.shape[1], y.shape[1])


def _activation(name: str, negative_slope: float, q: Tensor) -> Activation:
    """By its name, with numbers of the dtype of q."""
    match name:
        case "":
            kind, value = DOT, 0.0
        case "tanh":
            kind, value = SOFTCAP, 1.0
        case "leaky_relu":
            kind, value = LEAKY_RELU, negative_slope
        case "relu":
            kind, value = LEAKY_RELU, 0.0
        case _:
            raise AssertionError(name)
    return Activation(kind, scalar(value, q))
