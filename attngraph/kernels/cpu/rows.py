"""Attention edge by edge on a CPU, in machine code by Numba: each query walks along its own edges. For sparse graphs.

Transforms, normalisers and dropout are steps on the scores of a node, or of a chunk of its edges, in the cache.
Of size E·H, the forward pass stores nothing and the backward pass two numbers: a walk along the edges of each query,
for dq, leaves w and ds of each edge to a walk along those of each key, for dk and dv. No two threads add to one number:
two runs give the same bits. Nodes come first in memory: q is (B, N, H, D). The edges of a node are taken in blocks of
four, whose scores lie together: (blocks, H, 4).

Features e of the edges (`EdgeTerms`) are more numbers of their keys and values: of an edge, [k_j ‖ e] and [v_j ‖ e] are
gathered, and K and V are applied once for each query, as q · (k + K e) = [q ‖ Kᵀ q] · [k ‖ e] and Σ w (v + V e) =
Σ w v + V Σ w e.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import Adjacency, CSRLayout, Gradients, Modifiers
from attngraph.kernels.cpu.csr import (
    arrays,
    edges_of,
    flat_nodes,
    max_degree,
    neighbors_of_4,
    next_4,
    nodes_first,
    sum_pieces,
    unit_ranges,
)
from attngraph.kernels.cpu.gather import (
    Neighbors,
    Vector,
    add_map,
    gather_add,
    gather_dot,
    gather_dots,
    prefetch,
    scatter_add,
    scatter_adds,
    transpose_4x4,
)
from attngraph.kernels.cpu.launch import InThreads, in_threads
from attngraph.kernels.cpu.score_bias import NO_BIAS, add_bias, bias_gradient, bias_table, mask
from attngraph.kernels.cpu.weights import (
    OPTIONS,
    SOFTMAX,
    compiled,
    drop_block,
    is_plain,
    multiply,
    normalize,
    scalar,
    softmax,
    softmax_backward,
    softmax_of,
    transform,
    weighting,
    weights_backward,
)
from attngraph.kernels.memory import empty, zeros

AHEAD = 4  # edges; whose neighbours' vectors are asked for while those of an edge are multiplied
CHUNK_EDGES = 64  # edges of a node whose neighbours stay in the cache between their scores and their sums


class ForwardTensors(NamedTuple):
    """q (B, N, H, D), k and v (B, M, Hkv, ·); out (B · N, H, Dv), lse (B · N, H); the same for pieces of nodes.

    Of features: e (B or 1, E, F), K (Hkv, D, F), Vᵀ (Hkv, F, Dv).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    e: np.ndarray
    to_key: np.ndarray
    from_value: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    piece_out: np.ndarray
    piece_lse: np.ndarray


class BackwardTensors(NamedTuple):
    """q and dout (B, N, H, ·), k and v (B, M, Hkv, ·); out (B · N, H, Dv), lse and dlse (B · N, H), or of no heads; of
    features e, K, Kᵀ and V.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    e: np.ndarray
    to_key: np.ndarray
    from_key: np.ndarray
    to_value: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    dlse: np.ndarray
    weights: np.ndarray  # flat, (B, E + 1, 2, H): p, or w · kept, and ds of each edge, and zeros


class Sums(NamedTuple):
    """What a backward kernel fills, (B · nodes, heads, ·): dk and dv, or dq, Σ scale · ds e, Σ w e; and of pieces."""

    dx: np.ndarray
    piece_dx: np.ndarray
    dx_v: np.ndarray
    piece_dx_v: np.ndarray
    sums: np.ndarray
    piece_sums: np.ndarray


@compiled
def clear(x, row, heads, width):
    """Zeros into x[row, :heads, :width]: a sum begins."""
    for h in range(heads):
        for d in range(width):
            x[row, h, d] = x.dtype.type(0)


@compiled
def dropout_factors(factors, edges, batch, i, first, count, rule):
    """What dropout multiplies the weights of `count` edges by: (blocks, heads, 4)."""
    query = rule.queries[i] if len(rule.queries) else np.int64(i)
    at, queries = np.int64(0), (query, query, query, query)
    for e in range(first, first + count, 4):
        keys = neighbors_of_4(edges.neighbor, e, first + count - 1, np.int64(0))
        if len(rule.keys):
            keys = (rule.keys[keys[0]], rule.keys[keys[1]], rule.keys[keys[2]], rule.keys[keys[3]])
        drop_block(factors, at, queries, keys, batch, rule)
        at += len(rule.heads) - 4


# ------------------------------------------------------------------------------------------------- forward


@lru_cache
def _forward_kernel(head_dim: int, value_dim: int, key_features: int, value_features: int, plain: bool) -> InThreads:
    """The kernel for these dimensions, compiled once and kept on disk; plain: for a softmax alone.

    Each job is a range of units of one batch entry.
    """
    has_products = head_dim + key_features > 0

    @in_threads(**OPTIONS)
    def forward_units(job, ranges, tensors, edges, bias, rule, scale):
        q, k, v = tensors.q, tensors.k, tensors.v
        place, batch = divmod(job, len(q))
        first_edge = batch * len(edges.neighbor) if len(tensors.e) > 1 else 0
        (_, n, heads, _), (_, m, key_heads, _) = q.shape, k.shape
        group, pieces, last = heads // key_heads, len(tensors.piece_lse) // len(q), len(edges.neighbor) - 1
        for unit in range(ranges[place], ranges[place + 1]):
            size = (max_degree(edges.start, edges.units[unit]) + 3) // 4 * heads * 4
            scores, zero = np.empty(size, q.dtype), q.dtype.type(0)
            row_max, row_sum = np.empty(heads * 4, q.dtype), np.empty(heads * 4, q.dtype)
            rest = 0 if plain else size
            slopes, factors = np.empty(rest, q.dtype), np.empty(rest + 4, q.dtype)
            q_e, sums = np.empty(heads * key_features, q.dtype), np.empty(heads * value_features, q.dtype)
            first, stop, begin, end = edges.units[unit]
            for i in range(first, stop):
                lo, hi = max(edges.start[i], begin), min(edges.start[i + 1], end)
                blocks = (hi - lo + 3) // 4
                if unit < pieces:
                    acc, lse, row = tensors.piece_out, tensors.piece_lse, batch * pieces + unit
                else:
                    acc, lse, row = tensors.out, tensors.lse, batch * n + i
                clear(acc, row, heads, value_dim)
                for y in range(blocks * heads * 4):
                    scores[y] = zero
                if bias.kind != NO_BIAS:
                    add_bias(scores, bias, edges, batch, i, lo, hi - lo)
                if key_features:
                    q_e[:] = zero
                    for h in range(heads):
                        q_i = Vector(q, ((batch * n + i) * heads + h) * head_dim)
                        matrix = Vector(tensors.to_key, h // group * head_dim * key_features)
                        add_map(Vector(q_e, h * key_features), q_i, matrix, head_dim, key_features)
                for e in range(lo, hi if has_products else lo, 4):
                    nodes, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - lo) * heads
                    e_j = Neighbors(tensors.e, next_4(e, hi - 1, first_edge), key_features, 0)
                    coming = neighbors_of_4(edges.neighbor, min(e + AHEAD, last), last, batch * m)
                    for g in range(group):
                        for hk in range(key_heads):
                            h = hk * group + g
                            prefetch(Neighbors(k, coming, key_heads * head_dim, hk * head_dim), head_dim)
                            prefetch(Neighbors(v, coming, key_heads * value_dim, hk * value_dim), value_dim)
                            q_i = Vector(q, ((batch * n + i) * heads + h) * head_dim)
                            k_j = Neighbors(k, nodes, key_heads * head_dim, hk * head_dim)
                            if key_features:
                                x_e = Vector(q_e, h * key_features)
                                gather_dots(scores, at + h * 4, scale, q_i, k_j, head_dim, x_e, e_j, key_features)
                            else:
                                gather_dot(scores, at + h * 4, scale, q_i, k_j, head_dim)
                if not plain:
                    transform(scores, slopes, blocks * heads * 4, rule.transform, rule.value)
                if plain or rule.normalize == SOFTMAX:
                    mask(scores, bias, edges, batch, lo, hi - lo, -np.inf)
                    softmax(scores, blocks, row_max, row_sum, lse[row])
                else:
                    normalize(scores, slopes, blocks * heads * 4, rule.normalize)
                    mask(scores, bias, edges, batch, lo, hi - lo, zero)
                if not plain and rule.drops:
                    dropout_factors(factors, edges, batch, i, lo, hi - lo, rule)
                    multiply(scores, factors, blocks * heads * 4)
                if value_features:
                    sums[:] = zero
                for e in range(lo, hi, 4):
                    nodes, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - lo) * heads
                    e_j = Neighbors(tensors.e, next_4(e, hi - 1, first_edge), value_features, 0)
                    for g in range(group):
                        for hk in range(key_heads):
                            h = hk * group + g
                            acc_i, p = Vector(acc, (row * heads + h) * value_dim), Vector(scores, at + h * 4)
                            v_j = Neighbors(v, nodes, key_heads * value_dim, hk * value_dim)
                            gather_add(acc_i, p, v_j, value_dim)
                            if value_features:
                                gather_add(Vector(sums, h * value_features), p, e_j, value_features)
                if value_features:
                    for h in range(heads):
                        acc_i, matrix = (
                            Vector(acc, (row * heads + h) * value_dim),
                            Vector(tensors.from_value, h // group * value_dim * value_features),
                        )
                        add_map(acc_i, Vector(sums, h * value_features), matrix, value_features, value_dim)

    return forward_units


@compiled
def merge_pieces(pieces, count, n, out, lse, piece_out, piece_lse):
    """The softmax of each heavy node from those of its pieces, in fixed order."""
    zero = out.dtype.type(0)
    for batch in range(len(lse) // max(n, 1)):
        for node, first, stop in pieces:
            row = batch * n + node
            clear(out, row, *out.shape[1:])
            for h in range(lse.shape[1]):
                lse_max, row_sum = -np.inf, zero
                for x in range(batch * count + first, batch * count + stop):
                    lse_max = max(lse_max, piece_lse[x, h])
                lse_max = lse_max if lse_max > -np.inf else 0.0
                for x in range(batch * count + first, batch * count + stop):
                    weight = out.dtype.type(math.exp(piece_lse[x, h] - lse_max))
                    row_sum += weight
                    for d in range(out.shape[2]):
                        out[row, h, d] += weight * piece_out[x, h, d]
                if row_sum != zero:
                    lse[row, h] = lse_max + math.log(row_sum)
                    for d in range(out.shape[2]):
                        out[row, h, d] /= row_sum


def forward(q: Tensor, k: Tensor, v: Tensor, layout: CSRLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 or float64 → out (B, H, N, Dv), lse (B, H, N).

    A query without edges has out 0 and lse -inf; normalisers other than softmax have no lse: 0.
    """
    (B, H, N, head_dim), value_dim, adjacency = q.shape, v.shape[3], layout.by_query
    q, k, v, features = nodes_first(q), nodes_first(k), nodes_first(v), _Features.of(modifiers, q.dtype)
    is_softmax = modifiers.normalize == "softmax"
    out, lse = empty(B, N, H, value_dim, like=q), q.new_full((B, N, H), -torch.inf if is_softmax else 0)
    piece_out = out.new_empty(B, adjacency.num_pieces, H, value_dim)
    piece_lse = lse.new_full((B, adjacency.num_pieces, H), -torch.inf)
    results = flat_nodes(out, lse, piece_out, piece_lse)
    of_edges = features.e, features.to_key, features.to_value.mT.contiguous()
    tensors = ForwardTensors(*arrays(q, k, v, *of_edges), *results)
    table, rule, factor = bias_table(modifiers, q), weighting(modifiers, q), scalar(modifiers.scale, q)
    kernel, edges = _forward_kernel(head_dim, value_dim, *features.dims, is_plain(modifiers)), edges_of(adjacency)

    ranges = unit_ranges(len(adjacency.units))
    kernel((len(ranges) - 1) * B, ranges, tensors, edges, table, rule, factor)
    if adjacency.num_pieces and not is_softmax:
        sum_pieces(adjacency.pieces.numpy(), out.numpy(), piece_out.numpy())
    elif adjacency.num_pieces:
        merge_pieces(adjacency.pieces.numpy(), adjacency.num_pieces, N, *results)
    return out.transpose(1, 2), lse.transpose(1, 2)


class _Features(NamedTuple):
    """Features of the edges and their maps, as `EdgeTerms`; what is not there is empty."""

    e: Tensor
    to_key: Tensor
    to_value: Tensor

    @staticmethod
    def of(modifiers: Modifiers, dtype: torch.dtype) -> _Features:
        """In this precision."""
        none = torch.empty(0, 0, 0, dtype=dtype)
        terms = (None, None, None) if modifiers.edges is None else modifiers.edges[:3]
        return _Features(*(none if side is None else side.detach().to(dtype).contiguous() for side in terms))

    @property
    def dims(self) -> tuple[int, int]:
        """How many numbers stand beside each key, and beside each value."""
        return self.to_key.shape[2], self.to_value.shape[2]


# ------------------------------------------------------------------------------------------------- backward


@compiled
def compute_delta(delta, out, dout, dlse):
    """delta (heads,) = Σ_d out · dout - dlse, of out and dout (heads, Dv) of a query; dlse may be of no heads."""
    for h in range(len(delta)):
        total = -dlse[h] if len(dlse) else delta.dtype.type(0)
        for d in range(out.shape[1]):
            total += out[h, d] * dout[h, d]
        delta[h] = total


@compiled
def same_in_blocks(x, values, blocks):
    """-values (heads,) in each of the blocks of x, (blocks, heads, 4)."""
    for block in range(blocks):
        for h in range(len(values)):
            at = (block * len(values) + h) * 4
            x[at : at + 4] = -values[h]


@compiled
def keep_weights(kept, at, scores, ds, count, heads):
    """Two numbers for each of `count` edges, from (blocks, heads, 4), to kept[at : at + count] (·, 2, heads)."""
    whole = count // 4 * 4 if heads % 4 == 0 else 0
    for x in range(0, whole, 4):
        for h in range(0, heads, 4):
            to = (at + x) * 2 * heads + h
            transpose_4x4(scores, x * heads + 4 * h, kept, to, 2 * heads)
            transpose_4x4(ds, x * heads + 4 * h, kept, to + heads, 2 * heads)
    for x in range(whole, count):
        first, to = x // 4 * heads * 4 + x % 4, (at + x) * 2 * heads
        for h in range(heads):
            kept[to + h], kept[to + heads + h] = scores[first + 4 * h], ds[first + 4 * h]


@lru_cache
def _queries_kernel(head_dim: int, value_dim: int, key_features: int, value_features: int, plain: bool) -> InThreads:
    """The kernel of dq = scale · Σ ds k, of w and ds of each edge, and of de = Σ scale · ds q + w dout over the heads.

    plain: for a softmax alone. Each job is a range of units of one batch entry.
    """
    has_products, features = head_dim + key_features > 0, key_features or value_features

    @in_threads(**OPTIONS)
    def backward_queries(job, ranges, tensors, gradients, edges, bias, rule, scale, de):
        q, k, v, dout, of_edges = tensors.q, tensors.k, tensors.v, tensors.dout, tensors.e
        place, batch = divmod(job, len(q))
        first_edge = batch * len(edges.neighbor) if len(of_edges) > 1 else 0
        (_, n, heads, _), (_, m, key_heads, _), num_edges = q.shape, k.shape, len(edges.neighbor)
        group, pieces = heads // key_heads, len(gradients.piece_dx) // len(q)
        zero, one, is_softmax = q.dtype.type(0), q.dtype.type(1), plain or rule.normalize == SOFTMAX
        for unit in range(ranges[place], ranges[place + 1]):
            size = (min(max_degree(edges.start, edges.units[unit]), CHUNK_EDGES) + 3) // 4 * heads * 4
            scores, ds, rest = np.empty(size, q.dtype), np.empty(size, q.dtype), 0 if plain else size
            minus_lse, minus_delta = np.empty(rest, q.dtype), np.empty(rest, q.dtype)
            slopes, factors, delta = np.empty(rest, q.dtype), np.ones(rest + 4, q.dtype), np.empty(heads, q.dtype)
            q_e, dout_e = np.empty(heads * key_features, q.dtype), np.empty(heads * value_features, q.dtype)
            first, stop, begin, end = edges.units[unit]
            for i in range(first, stop):
                lo, hi = max(edges.start[i], begin), min(edges.start[i + 1], end)
                dx, row, q_row = gradients.dx, batch * n + i, batch * n + i
                dx_e, sums = gradients.dx_v, gradients.sums
                if unit < pieces:
                    dx, row = gradients.piece_dx, batch * pieces + unit
                    dx_e, sums = gradients.piece_dx_v, gradients.piece_sums
                clear(dx, row, heads, head_dim)
                compute_delta(delta, tensors.out[q_row], dout[batch, i], tensors.dlse[q_row])
                if features:
                    clear(dx_e, row, heads, key_features)
                    clear(sums, row, heads, value_features)
                    q_e[:], dout_e[:] = zero, zero
                for h in range(heads if features else 0):
                    x_i, matrix = (
                        Vector(q, (q_row * heads + h) * head_dim),
                        Vector(tensors.to_key, h // group * head_dim * key_features),
                    )
                    add_map(Vector(q_e, h * key_features), x_i, matrix, head_dim, key_features)
                    x_i, matrix = (
                        Vector(dout, (q_row * heads + h) * value_dim),
                        Vector(tensors.to_value, h // group * value_dim * value_features),
                    )
                    add_map(Vector(dout_e, h * value_features), x_i, matrix, value_dim, value_features)
                for chunk in range(lo, hi, CHUNK_EDGES):
                    count = min(hi - chunk, CHUNK_EDGES)
                    blocks, numbers = (count + 3) // 4, (count + 3) // 4 * heads * 4
                    if plain:
                        same_in_blocks(scores, tensors.lse[q_row], blocks)
                        same_in_blocks(ds, delta, blocks)
                    else:
                        scores[:], ds[:] = zero, zero
                        same_in_blocks(minus_lse, tensors.lse[q_row], blocks)
                        same_in_blocks(minus_delta, delta, blocks)
                    if bias.kind != NO_BIAS:
                        add_bias(scores, bias, edges, batch, i, chunk, count)
                    for e in range(chunk, chunk + count, 4):
                        four, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - chunk) * heads
                        e_j = Neighbors(of_edges, next_4(e, hi - 1, first_edge), features, 0)
                        coming = neighbors_of_4(edges.neighbor, min(e + AHEAD, num_edges - 1), num_edges - 1, batch * m)
                        for g in range(group):
                            for hk in range(key_heads):
                                h = hk * group + g
                                prefetch(Neighbors(k, coming, key_heads * head_dim, hk * head_dim), head_dim)
                                prefetch(Neighbors(v, coming, key_heads * value_dim, hk * value_dim), value_dim)
                                q_i = Vector(q, (q_row * heads + h) * head_dim)
                                k_j = Neighbors(k, four, key_heads * head_dim, hk * head_dim)
                                if key_features:
                                    x_e = Vector(q_e, h * key_features)
                                    gather_dots(scores, at + h * 4, scale, q_i, k_j, head_dim, x_e, e_j, key_features)
                                elif head_dim:
                                    gather_dot(scores, at + h * 4, scale, q_i, k_j, head_dim)
                                dout_i = Vector(dout, (q_row * heads + h) * value_dim)
                                v_j = Neighbors(v, four, key_heads * value_dim, hk * value_dim)
                                if value_features:
                                    x_e = Vector(dout_e, h * value_features)
                                    gather_dots(ds, at + h * 4, one, dout_i, v_j, value_dim, x_e, e_j, value_features)
                                else:
                                    gather_dot(ds, at + h * 4, one, dout_i, v_j, value_dim)
                    if not plain:
                        transform(scores, slopes, numbers, rule.transform, rule.value)
                    if is_softmax and (count % 4 or len(bias.real)):
                        mask(scores, bias, edges, batch, chunk, count, -np.inf)
                    if plain:
                        softmax_backward(scores, ds, numbers)
                    else:
                        if is_softmax:
                            softmax_of(scores, minus_lse, numbers)
                        else:
                            normalize(scores, slopes, numbers, rule.normalize)
                            mask(scores, bias, edges, batch, chunk, count, zero)
                            mask(slopes, bias, edges, batch, chunk, count, zero)
                        if rule.drops:
                            dropout_factors(factors, edges, batch, i, chunk, count, rule)
                        weights_backward(scores, ds, minus_delta, slopes, factors, numbers, is_softmax)
                    keep_weights(tensors.weights, batch * (num_edges + 1) + chunk, scores, ds, count, heads)
                    for e in range(chunk, chunk + count if has_products or features else chunk, 4):
                        four, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - chunk) * heads
                        e_j = Neighbors(of_edges, next_4(e, hi - 1, first_edge), features, 0)
                        for g in range(group):
                            for hk in range(key_heads):
                                h = hk * group + g
                                dq_i = Vector(dx, (row * heads + h) * head_dim)
                                k_j = Neighbors(k, four, key_heads * head_dim, hk * head_dim)
                                gather_add(dq_i, Vector(ds, at + h * 4), k_j, head_dim)
                                if key_features:
                                    dq_e = Vector(dx_e, (row * heads + h) * key_features)
                                    gather_add(dq_e, Vector(ds, at + h * 4), e_j, key_features)
                                if value_features:
                                    sum_i = Vector(sums, (row * heads + h) * value_features)
                                    gather_add(sum_i, Vector(scores, at + h * 4), e_j, value_features)
                    if features and len(de):
                        for e in range(chunk, chunk + count, 4):
                            at, of_four = (e - chunk) * heads, next_4(e, hi - 1, batch * num_edges)
                            de_j = Neighbors(de, of_four, features, 0)
                            for h in range(heads):
                                of_key, of_value = Vector(q_e, h * key_features), Vector(dout_e, h * value_features)
                                ds_h, w_h = Vector(ds, at + h * 4), Vector(scores, at + h * 4)
                                if key_features and value_features:
                                    scatter_adds(de_j, scale, ds_h, of_key, w_h, of_value, features)
                                elif key_features:
                                    scatter_add(de_j, scale, ds_h, of_key, features)
                                else:
                                    scatter_add(de_j, one, w_h, of_value, features)
                for h in range(heads):
                    if key_features:
                        dq_i, dq_e = Vector(dx, (row * heads + h) * head_dim), (row * heads + h) * key_features
                        matrix = Vector(tensors.from_key, h // group * head_dim * key_features)
                        add_map(dq_i, Vector(dx_e, dq_e), matrix, key_features, head_dim)
                    for d in range(head_dim):
                        dx[row, h, d] *= scale
                    for d in range(key_features):
                        dx_e[row, h, d] *= scale

    return backward_queries


@compiled
def kept_of_4(edge, e, stop, base, none):
    """Where the weights of the edges e … e + 3 stand; for those from `stop` on, base + none, where zeros stand."""
    b = np.int64(edge[e + 1]) if e + 1 < stop else none
    c = np.int64(edge[e + 2]) if e + 2 < stop else none
    d = np.int64(edge[e + 3]) if e + 3 < stop else none
    return base + np.int64(edge[e]), base + b, base + c, base + d


@lru_cache
def _keys_kernel(head_dim: int, value_dim: int) -> InThreads:
    """The kernel of dk = scale · Σ ds q and dv = Σ w dout, for these dimensions; jobs as above."""

    @in_threads(**OPTIONS)
    def backward_keys(job, ranges, tensors, gradients, edges, scale):
        q, dout, weights = tensors.q, tensors.dout, tensors.weights
        place, batch = divmod(job, len(q))
        (_, n, heads, _), (_, m, key_heads, _), num_edges = q.shape, tensors.k.shape, len(edges.neighbor)
        group, pieces = heads // key_heads, len(gradients.piece_dx) // len(q)
        first_kept, none = batch * (num_edges + 1), num_edges
        for unit in range(ranges[place], ranges[place + 1]):
            first, stop, begin, end = edges.units[unit]
            for j in range(first, stop):
                lo, hi = max(edges.start[j], begin), min(edges.start[j + 1], end)
                dk, dv, row = gradients.dx, gradients.dx_v, batch * m + j
                if unit < pieces:
                    dk, dv, row = gradients.piece_dx, gradients.piece_dx_v, batch * pieces + unit
                clear(dk, row, key_heads, head_dim)
                clear(dv, row, key_heads, value_dim)
                for e in range(lo, hi, 4):
                    four, ahead = neighbors_of_4(edges.neighbor, e, hi - 1, batch * n), min(e + AHEAD, num_edges - 1)
                    kept = kept_of_4(edges.edge, e, hi, first_kept, none)
                    coming = neighbors_of_4(edges.neighbor, ahead, num_edges - 1, batch * n)
                    coming_kept = neighbors_of_4(edges.edge, ahead, num_edges - 1, first_kept)
                    for h in range(0, 2 * heads, 16):
                        prefetch(Neighbors(weights, coming_kept, 2 * heads, h), 1)
                    for g in range(group):
                        for hk in range(key_heads):
                            h = hk * group + g
                            prefetch(Neighbors(q, coming, heads * head_dim, h * head_dim), head_dim)
                            prefetch(Neighbors(dout, coming, heads * value_dim, h * value_dim), value_dim)
                            dv_j, w = (
                                Vector(dv, (row * key_heads + hk) * value_dim),
                                Neighbors(weights, kept, 2 * heads, h),
                            )
                            gather_add(dv_j, w, Neighbors(dout, four, heads * value_dim, h * value_dim), value_dim)
                            dk_j, ds = (
                                Vector(dk, (row * key_heads + hk) * head_dim),
                                Neighbors(weights, kept, 2 * heads, heads + h),
                            )
                            gather_add(dk_j, ds, Neighbors(q, four, heads * head_dim, h * head_dim), head_dim)
                for h in range(key_heads):
                    for d in range(head_dim):
                        dk[row, h, d] *= scale

    return backward_keys


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    layout: CSRLayout,
    modifiers: Modifiers,
    bias_grad: bool,
) -> Gradients:
    """What these edges add to the gradients.

    out (B, H, N, Dv) and lse (B, H, N) are those of all the edges of each query: with w = exp(s - lse),
    dw = kept / (1 - p) · dout · v and Δ = Σ_d dout · out - dlse, ds = transform' · w · (dw - Δ); of other normalisers,
    which have no lse, ds = transform' · normalize' · dw. dlse may be None.
    """
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # p = 0 where there are no edges
    lse, dlse = (x.detach().transpose(1, 2).contiguous() for x in (lse, lse[:, :0] if dlse is None else dlse))
    q, k, v, out, dout, plain = *(nodes_first(x) for x in (q, k, v, out, dout)), is_plain(modifiers)
    (B, N, H, head_dim), value_dim, adjacency = q.shape, v.shape[3], layout.by_query
    features = _Features.of(modifiers, q.dtype)
    weights = empty(B, len(adjacency.neighbor) + 1, 2, H, like=q)
    weights[:, -1] = 0
    of_edges = features.e, features.to_key, features.to_key.mT.contiguous(), features.to_value
    tensors = BackwardTensors(*arrays(q, k, v, dout, *of_edges), *flat_nodes(out, lse, dlse), weights.view(-1).numpy())
    table, rule, factor = bias_table(modifiers, q), weighting(modifiers, q), scalar(modifiers.scale, q)

    dq, dk, dv = (empty(*x.shape, like=q) for x in (q, k, v))
    dq_e, sums = (empty(B, N, H, dim, like=q) for dim in features.dims)
    de = zeros(B if modifiers.edges and modifiers.edges.needs_grad else 0, *features.e.shape[1:], like=q)
    kernel, none = _queries_kernel(head_dim, value_dim, *features.dims, plain), q.new_empty(0, 0, 0, 0)
    _add_up(kernel, tensors, adjacency, (dq, dq_e, sums), (table, rule, factor, de.numpy()))
    _add_up(_keys_kernel(head_dim, value_dim), tensors, layout.numbered, (dk, dv, none), (factor,))
    bias = modifiers.bias if bias_grad else None
    dbias = None if bias is None else bias_gradient(bias, table, weights, adjacency)
    dto_key = dto_value = None
    if features.dims[0]:
        dto_key = _map_gradient(q, dq_e, features.to_key)
    if features.dims[1]:
        dto_value = _map_gradient(dout, sums, features.to_value)
    dedges = de.sum_to_size(features.e.shape) if len(de) else None, dto_key, dto_value
    return Gradients(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dbias, dedges)


def _add_up(
    kernel: InThreads,
    tensors: BackwardTensors,
    adjacency: Adjacency,
    results: tuple[Tensor, Tensor, Tensor],
    more: tuple,
) -> None:
    """A kernel for each unit and batch entry; its sums, and those of pieces, into results (B, nodes, heads, ·)."""
    pieces = [x.new_empty(x.shape[0], adjacency.num_pieces, *x.shape[2:]) for x in results]
    pairs = [x for pair in zip(results, pieces, strict=True) for x in pair]
    ranges = unit_ranges(len(adjacency.units))
    kernel((len(ranges) - 1) * len(tensors.q), ranges, tensors, Sums(*flat_nodes(*pairs)), edges_of(adjacency), *more)
    if adjacency.num_pieces:
        for result, of_pieces in zip(results, pieces, strict=True):
            if len(result):
                sum_pieces(adjacency.pieces.numpy(), result.numpy(), of_pieces.numpy())


def _map_gradient(x: Tensor, dresult: Tensor, matrices: Tensor) -> Tensor:
    """The gradient of the matrices (Hkv, D, F), from that (B, N, H, F) of what they make of x (B, N, H, D)."""
    gradient, group = torch.zeros_like(matrices), x.shape[2] // len(matrices)
    for h in range(x.shape[2]):
        gradient[h // group].addmm_(x[:, :, h].flatten(0, 1).T, dresult[:, :, h].flatten(0, 1))
    return gradient
