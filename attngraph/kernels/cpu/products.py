"""What each edge makes of the vectors of its query and its key, a score before the bias, and the way back: on a CPU.

    score_ij = scale · q_i · k_j, or scale · Σ_d weight_d · activation(q_id + k_jd + Σ_f K_df e_ijf)

Of memory it takes E·H. activation(q + k + K e) of four edges is made in the cache, and from there on it is one of
`gather`'s products. No two threads add to one number: two runs give the same bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import Adjacency, CSRLayout, EdgeTerms
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
from attngraph.kernels.cpu.gather import (
    Neighbors,
    Rows,
    Vector,
    gather_add,
    gather_dot,
    gather_outer,
    gather_product,
    gather_sum,
)
from attngraph.kernels.cpu.launch import InThreads, in_threads
from attngraph.kernels.cpu.weights import LEAKY_RELU, OPTIONS, SOFTCAP, compiled, scalar, transform
from attngraph.kernels.memory import empty, zeros

DOT = -1
OWN = (0, 1, 2, 3)  # the places of the vectors of four edges in scratch memory
SUMS = 64  # for the gradient of K, of consecutive units each: about so many, whatever the number of threads


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


class Features(NamedTuple):
    """What each edge adds to its key by itself: Σ_f K_df e_ijf. Flat arrays; empty where there is none."""

    values: np.ndarray  # e (B or 1, E, F), in edge_index order
    to_key: np.ndarray  # K (F, H, D)
    dim: int  # F
    stride: int  # E, from batch entry to batch entry, or 0


class FeatureSums(NamedTuple):
    """What the backward kernel fills of their gradients, flat: each empty where it is not asked for."""

    dvalues: np.ndarray  # (B, E, F)
    weighted: np.ndarray  # K · weight, (F, H, D), which makes them
    dto_key: np.ndarray  # sums of dscore_ij · activation' · e_ij, (jobs, F, H, D)


class Sums(NamedTuple):
    """What the backward kernel fills: sums of dscore_ij times y_j, or activation'(x_i + y_j); the same for pieces."""

    dx: np.ndarray  # (B · nodes, H, D)
    piece_dx: np.ndarray
    dweight: np.ndarray  # sums of dscore · activation, (B · units, H, D), or empty
    pieces: int
    features: FeatureSums


@compiled
def edges_of_4(edge, e, last, base):
    """base plus the numbers of the edges e … e + 3, in edge_index order; past the last edge, the last one again."""
    return neighbors_of_4(edge, e, last, base) if len(edge) else next_4(e, last, base)


@lru_cache
def _forward_kernel(head_dim: int) -> InThreads:
    """The kernel for this dimension; each job is a range of units of one batch entry, here and below."""

    @in_threads(**OPTIONS)
    def forward_units(job, ranges, batches, pairs, features, edges, activation, scale, lse, scores):
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
                        of_entry = edges_of_4(edges.edge, e, hi - 1, batch * features.stride)
                        e_ij = Neighbors(features.values, of_entry, features.dim, 0)
                        for h in range(heads if features.dim else 0):
                            to_key = Rows(features.to_key, width, h * head_dim)
                            gather_product(z, h * 4 * head_dim, e_ij, to_key, features.dim, head_dim)
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
    def backward_units(job, ranges, batches, pairs, features, edges, activation, scale, dscores, sums):
        x, y, heads, is_dot = pairs.x, pairs.y, pairs.heads, activation.kind == DOT
        width, four, units = heads * head_dim, np.empty((heads, 4), x.dtype), len(edges.units)
        z, slopes, pieces = np.empty(4 * width, x.dtype), np.empty(4 * width, x.dtype), sums.pieces
        of_edge, (place, batch) = np.empty(features.dim + 3, x.dtype), divmod(job, batches)
        for unit in range(ranges[place], ranges[place + 1]):
            first, stop, begin, end = edges.units[unit]
            for i in range(first, stop):
                lo, hi, row = max(edges.start[i], begin), min(edges.start[i + 1], end), batch * pairs.n + i
                dx, to = sums.dx, row
                if unit < pieces:
                    dx, to = sums.piece_dx, batch * pieces + unit
                for e in range(lo, hi, 4):
                    nodes = neighbors_of_4(edges.neighbor, e, hi - 1, batch * pairs.m)
                    numbers = edges_of_4(edges.edge, e, hi - 1, 0)
                    for t in range(4):
                        for h in range(heads):
                            four[h, t] = scale * dscores[batch, numbers[t], h]
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
                    of_entry = edges_of_4(edges.edge, e, hi - 1, batch * features.stride)
                    e_ij = Neighbors(features.values, of_entry, features.dim, 0)
                    for h in range(heads if features.dim else 0):
                        to_key = Rows(features.to_key, width, h * head_dim)
                        gather_product(z, h * 4 * head_dim, e_ij, to_key, features.dim, head_dim)
                    transform(z, slopes, 4 * width, activation.kind, activation.value)
                    for h in range(heads):
                        dx_h = Vector(dx, to * width + h * head_dim)
                        slopes_j = Neighbors(slopes, OWN, head_dim, h * 4 * head_dim)
                        gather_add(dx_h, Vector(four, h * 4), slopes_j, head_dim)
                    for h in range(heads if len(sums.dweight) else 0):
                        dweight_h = Vector(sums.dweight, (batch * units + unit) * width + h * head_dim)
                        z_j = Neighbors(z, OWN, head_dim, h * 4 * head_dim)
                        gather_add(dweight_h, Vector(four, h * 4), z_j, head_dim)
                    for h in range(heads if len(sums.features.dto_key) else 0):
                        dto_key = Rows(sums.features.dto_key, width, job * features.dim * width + h * head_dim)
                        slopes_j = Neighbors(slopes, OWN, head_dim, h * 4 * head_dim)
                        gather_outer(dto_key, e_ij, Vector(four, h * 4), slopes_j, features.dim, head_dim)
                    for t in range(min(4, hi - e) if len(sums.features.dvalues) else 0):
                        of_edge[:] = x.dtype.type(0)
                        for h in range(heads):
                            slopes_j = Vector(slopes, (h * 4 + t) * head_dim)
                            for f in range(0, features.dim, 4):
                                rows = next_4(f, features.dim - 1, 0)
                                to_key = Neighbors(sums.features.weighted, rows, width, h * head_dim)
                                gather_dot(of_edge, f, four[h, t], slopes_j, to_key, head_dim)
                        place_of_edge = (batch * dscores.shape[1] + numbers[t]) * features.dim
                        for f in range(features.dim):
                            sums.features.dvalues[place_of_edge + f] = of_edge[f]

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
    features: EdgeTerms | None = None,
) -> Tensor:
    """q (B, H, N, D), k (B, Hkv, M, D), weight (H, D) → the score of each edge: (B, H, E), in edge_index order.

    activation "": scale · q_i · k_j, and weight is None; "tanh", "leaky_relu" or "relu": scale · Σ_d weight_d ·
    activation(q_id + k_jd), where the features of the edges may add K e_ij to k_j. float32 or float64. With lse (B, H,
    N), finite: exp(score - lse) of its query.

    By head, they lie in memory as they are told; else as (B, E, H), for what reads those of all heads at once.
    """
    (B, H, _, head_dim), adjacency = q.shape, layout.by_query
    x, y = nodes_first(q), _of_query_heads(k, H)
    E = len(adjacency.neighbor)
    scores = empty(B, H, E, like=q).transpose(1, 2) if by_head else empty(B, E, H, like=q)
    of_queries = q.new_empty(0, 0) if lse is None else nodes_first(lse[..., None]).to(q.dtype).flatten(2).flatten(0, 1)
    pairs, edges, of_edges = _pairs(x, y, weight), edges_of(adjacency), _features(features, x)
    rule, factor, stored = _activation(activation, negative_slope, q), scalar(scale, q), scores.numpy()
    kernel, ranges = _forward_kernel(head_dim), unit_ranges(len(adjacency.units))
    kernel((len(ranges) - 1) * B, ranges, B, pairs, of_edges, edges, rule, factor, of_queries.numpy(), stored)
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
    features: EdgeTerms | None = None,
) -> tuple[Tensor | None, ...]:
    """dproducts (B, H, E) → dq, dk and, of an activation, dweight; of features, dvalues if asked for, and dto_key."""
    H, Hkv = q.shape[1], k.shape[1]
    x, y = nodes_first(q), _of_query_heads(k, H)
    rule = _activation(activation, negative_slope, q)
    call = _Backward(dproducts.detach().transpose(1, 2), weight, rule, scale, features)
    dq, sums = call.of_nodes(x, y, layout.by_query, True)
    dk, _ = call.of_nodes(y, x, layout.numbered, False)
    # By NumPy, whose sums do not depend on the number of threads.
    dweight = None if weight is None else torch.from_numpy(sums.dweight.sum(0, dtype=np.float64)).to(q.dtype)
    if weight is not None:
        dq, dk = dq.mul_(weight.detach()), dk.mul_(weight.detach())
    dk = dk if Hkv == H else dk.unflatten(2, (Hkv, H // Hkv)).sum(3)
    gradients = dq.transpose(1, 2), dk.transpose(1, 2), dweight
    return gradients if features is None else (*gradients, *call.of_features(sums.features))


class _Backward(NamedTuple):
    """dproducts (B, E, H), weight (H, D), the activation, the scale and the features of edges."""

    dproducts: Tensor
    weight: Tensor | None
    activation: Activation
    scale: float
    features: EdgeTerms | None

    def of_nodes(self, x: Tensor, y: Tensor, adjacency: Adjacency, of_queries: bool) -> tuple[Tensor, Sums]:
        """scale · Σ_j dproduct · (y_j, or activation'), (B, nodes, H, D); and, of queries, what else is summed up."""
        (B, n, H, D), units = x.shape, len(adjacency.units)
        dx, piece_dx = zeros(B, n, H, D, like=x), x.new_zeros(B, adjacency.num_pieces, H, D)
        dweight = x.new_zeros(B, units, H, D) if of_queries and self.weight is not None else x.new_zeros(0, 0, H, D)
        edges, pairs, dscores = edges_of(adjacency), _pairs(x, y, self.weight), self.dproducts.to(x.dtype).numpy()
        ranges = unit_ranges(units, max(1, SUMS // max(1, B)) if of_queries and self.features is not None else None)
        jobs, factor, of_edges = (len(ranges) - 1) * B, scalar(self.scale, x), _features(self.features, x)
        sums = Sums(
            *flat_nodes(dx, piece_dx, dweight), adjacency.num_pieces, self._feature_sums(x, jobs if of_queries else 0)
        )
        kernel = _backward_kernel(D)

        kernel(jobs, ranges, B, pairs, of_edges, edges, self.activation, factor, dscores, sums)
        if adjacency.num_pieces:
            sum_pieces(adjacency.pieces.numpy(), dx.numpy(), piece_dx.numpy())
        return dx, sums

    def _feature_sums(self, x: Tensor, jobs: int) -> FeatureSums:
        """Those that are asked for, for x (B, nodes, H, D), made by so many jobs."""
        dvalues = weighted = dto_key = x.new_empty(0).numpy()
        if self.features is not None and jobs:
            (_, E, F), (_, _, H, D) = self.features.values.shape, x.shape
            dto_key = zeros(jobs * F * H * D, like=x).numpy()
            if self.features.needs_grad:
                dvalues = zeros(len(x) * E * F, like=x).numpy()
                weighted = _by_feature(self.features, x, self.weight)
        return FeatureSums(dvalues, weighted, dto_key)

    def of_features(self, sums: FeatureSums) -> tuple[Tensor | None, Tensor]:
        """dvalues, where asked for, and dto_key."""
        assert self.features is not None
        assert self.features.to_key is not None
        assert self.weight is not None  # of dot products, rows know the features
        (_, E, F), (Hkv, D, _), H = self.features.values.shape, self.features.to_key.shape, len(self.weight)
        summed = torch.from_numpy(sums.dto_key.reshape(-1, F, H, D).sum(0, dtype=np.float64))
        by_head = (summed * self.weight.detach()).permute(1, 2, 0)
        dto_key = by_head.unflatten(0, (Hkv, H // Hkv)).sum(1).to(self.weight.dtype)
        if not self.features.needs_grad:
            return None, dto_key
        of_entries = torch.from_numpy(sums.dvalues).view(len(self.dproducts), E, F)
        return of_entries.sum_to_size(self.features.values.shape), dto_key


def _features(features: EdgeTerms | None, x: Tensor) -> Features:
    """As the kernels take them, for x (B, nodes, H, D)."""
    if features is None:
        return Features(x.new_empty(0).numpy(), x.new_empty(0).numpy(), 0, 0)
    B, E, F = features.values.shape
    return Features(features.values.detach().to(x.dtype).flatten().numpy(), _by_feature(features, x), F, E * (B > 1))


def _by_feature(features: EdgeTerms, x: Tensor, weight: Tensor | None = None) -> np.ndarray:
    """K, or its product with the weight, as (F, H, D), flat."""
    assert features.to_key is not None
    to_key = features.to_key.detach().to(x.dtype)
    of_heads = to_key.repeat_interleave(x.shape[2] // len(to_key), 0).permute(2, 0, 1)
    return (of_heads if weight is None else of_heads * weight.detach()).flatten().numpy()


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
