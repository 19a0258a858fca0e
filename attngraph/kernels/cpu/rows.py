"""Attention edge by edge on a CPU, in machine code by Numba: each query walks along its own edges. For sparse graphs.

Nothing of size E·H is stored, in either direction, and no two threads add to one number: two runs give the same bits.
Nodes come first in memory: q is (B, N, H, D). The edges of a node are taken in blocks of four, whose scores lie
together: (blocks, H, 4).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from attngraph.kernels.contract import Adjacency, CSRLayout, Modifiers, ScoreBias
from attngraph.kernels.cpu.compiler import CACHE
from attngraph.kernels.cpu.exp import exp
from attngraph.kernels.cpu.gather import Neighbors, Vector, gather_add, gather_dot
from attngraph.kernels.cpu.openmp import parallel_for
from attngraph.kernels.memory import zeros

CHUNK_EDGES = 64  # edges of a node whose neighbours stay in the cache between their scores and their sums
FASTMATH_FLAGS = {"reassoc", "contract", "nsz", "arcp"}  # all that keep inf and nan
NO_BIAS, OFFSET, EDGE, DENSE = range(4)
KINDS = {"offset": OFFSET, "edge": EDGE, "dense": DENSE}
compiled = njit(nogil=True, cache=CACHE, fastmath=FASTMATH_FLAGS)


class Edges(NamedTuple):
    """The arrays of an `Adjacency`."""

    start: np.ndarray
    neighbor: np.ndarray
    edge: np.ndarray
    units: np.ndarray


class BiasTable(NamedTuple):
    """A bias and padding: its values, flat, and their strides over (B, H, N, last), 0 where one value serves all."""

    kind: int
    values: np.ndarray
    strides: tuple[int, int, int, int]
    heads: int
    n: int  # queries
    real: np.ndarray  # bool (B, M): keys that are no padding; (0, 0) where all are


class ForwardTensors(NamedTuple):
    """q (B, N, H, D), k and v (B, M, Hkv, ·); out (B · N, H, Dv), lse (B · N, H); the same for pieces of nodes."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    piece_out: np.ndarray
    piece_lse: np.ndarray


class BackwardTensors(NamedTuple):
    """Two vectors of each node, x and x_v, and of each neighbour, y and y_v: (B, nodes, heads, ·).

    They are q and dout, k and v for dq; k and v, q and dout for dk and dv. lse and delta (B · N, H) are of the queries.
    """

    x: np.ndarray
    x_v: np.ndarray
    y: np.ndarray
    y_v: np.ndarray
    lse: np.ndarray
    delta: np.ndarray


class Gradients(NamedTuple):
    """What the backward kernels fill: dq, or dk and dv, (B · nodes, heads, ·); the same for pieces of nodes."""

    dx: np.ndarray
    piece_dx: np.ndarray
    dx_v: np.ndarray  # empty for dq
    piece_dx_v: np.ndarray
    ds_sum: np.ndarray  # of a bias with one value for each key, (B · M, H, 1); else empty
    piece_ds_sum: np.ndarray
    dvalues: np.ndarray  # of the values of any other bias, flat; else empty


# ----------------------------------------------------------------------------------------- steps of a node


@compiled
def neighbors_of_4(neighbor, e, last, base):
    """base plus the neighbours of the edges e … e + 3; past the last edge, the last one again."""
    b, c, d = neighbor[min(e + 1, last)], neighbor[min(e + 2, last)], neighbor[min(e + 3, last)]
    return base + np.int64(neighbor[e]), base + np.int64(b), base + np.int64(c), base + np.int64(d)


@compiled
def max_degree(start, unit):
    """The most edges that a unit takes of one of its nodes."""
    first, stop, begin, end = unit
    most = 0
    for node in range(first, stop):
        most = max(most, min(start[node + 1], end) - max(start[node], begin))
    return most


@compiled
def bias_index(kind, i, j, e, n):
    """The last index into the values of a bias."""
    return e if kind == EDGE else (j - i + n - 1 if kind == OFFSET else j)


@compiled
def add_bias(scores, bias, edges, batch, node, first, count, by_key):
    """Add the bias of `count` edges, the first of which is `first`, to their scores (blocks, heads, 4)."""
    heads, strides = bias.heads, bias.strides
    for x in range(count):
        neighbor, e = np.int64(edges.neighbor[first + x]), first + x
        if len(edges.edge):
            e = np.int64(edges.edge[e])
        i, j = (neighbor, node) if by_key else (node, neighbor)
        at = batch * strides[0] + i * strides[2] + bias_index(bias.kind, i, j, e, bias.n) * strides[3]
        for h in range(heads):
            scores[(x // 4 * heads + h) * 4 + x % 4] += bias.values[at + h * strides[1]]


@compiled
def leave_out_padding(scores, bias, edges, batch, node, first, count, by_key):
    """Scores of -inf for those of `count` edges whose key is padding: (blocks, heads, 4)."""
    for x in range(count):
        if not bias.real[batch, node if by_key else np.int64(edges.neighbor[first + x])]:
            for h in range(bias.heads):
                scores[(x // 4 * bias.heads + h) * 4 + x % 4] = -np.inf


@compiled
def add_bias_gradient(dvalues, ds, bias, edges, batch, i, first, count):
    """Add the gradients ds (blocks, heads, 4) of `count` edges of query i to those of the values of the bias."""
    heads, strides = bias.heads, bias.strides
    for x in range(count):
        e = first + x
        j = np.int64(edges.neighbor[e])
        at = batch * strides[0] + i * strides[2] + bias_index(bias.kind, i, j, e, bias.n) * strides[3]
        for h in range(heads):
            dvalues[at + h * strides[1]] += ds[(x // 4 * heads + h) * 4 + x % 4]


@compiled
def mask_padding(scores, count, heads):
    """Scores of -inf past the last of `count` edges, in its block: (blocks, heads, 4)."""
    for x in range(count, (count + 3) // 4 * 4):
        for h in range(heads):
            scores[(x // 4 * heads + h) * 4 + x % 4] = -np.inf


@compiled
def softmax(scores, blocks, row_max, row_sum, lse):
    """Scores (blocks, heads · 4) to their softmax in place, and its lse (heads,).

    row_max and row_sum are scratch, (heads · 4,): of each fourth edge, then of all.
    """
    lanes, zero, one = len(row_max), row_max.dtype.type(0), row_max.dtype.type(1)
    for y in range(lanes):
        row_max[y], row_sum[y] = -np.inf, zero
    for x in range(blocks):
        for y in range(lanes):
            row_max[y] = scores[x * lanes + y] if scores[x * lanes + y] > row_max[y] else row_max[y]
    for h in range(0, lanes, 4):
        largest = max(max(row_max[h], row_max[h + 1]), max(row_max[h + 2], row_max[h + 3]))
        row_max[h : h + 4] = largest if largest > -np.inf else zero  # a query without edges
    for x in range(blocks):
        for y in range(lanes):
            p = exp(scores[x * lanes + y] - row_max[y])
            scores[x * lanes + y] = p
            row_sum[y] += p
    for h in range(len(lse)):
        denominator = row_sum[4 * h] + row_sum[4 * h + 1] + row_sum[4 * h + 2] + row_sum[4 * h + 3]
        lse[h] = row_max[4 * h] + math.log(denominator) if denominator != zero else -np.inf
        row_sum[4 * h : 4 * h + 4] = one / denominator if denominator != zero else zero
    for x in range(blocks):
        for y in range(lanes):
            scores[x * lanes + y] *= row_sum[y]


# ------------------------------------------------------------------------------------------------- forward


@lru_cache
def _forward_kernel(head_dim: int, value_dim: int) -> Callable[..., None]:
    """The kernel for these dimensions; each pair of them is compiled once, and kept on disk."""

    @compiled
    def forward_units(first_unit, stop_unit, batch, tensors, edges, bias, scale):
        q, k, v = tensors.q, tensors.k, tensors.v
        (_, n, heads, _), (_, m, key_heads, _) = q.shape, k.shape
        group, pieces = heads // key_heads, len(tensors.piece_lse) // len(q)
        for unit in range(first_unit, stop_unit):
            size = (max_degree(edges.start, edges.units[unit]) + 3) // 4 * heads * 4
            scores, zero = np.empty(size, q.dtype), q.dtype.type(0)
            row_max, row_sum = np.empty(heads * 4, q.dtype), np.empty(heads * 4, q.dtype)
            first, stop, begin, end = edges.units[unit]
            for i in range(first, stop):
                lo, hi = max(edges.start[i], begin), min(edges.start[i + 1], end)
                blocks = (hi - lo + 3) // 4
                if unit < pieces:
                    acc, lse, row = tensors.piece_out, tensors.piece_lse, batch * pieces + unit
                else:
                    acc, lse, row = tensors.out, tensors.lse, batch * n + i
                for y in range(blocks * heads * 4):
                    scores[y] = zero
                mask_padding(scores, hi - lo, heads)
                if bias.kind != NO_BIAS:
                    add_bias(scores, bias, edges, batch, i, lo, hi - lo, False)
                if len(bias.real):
                    leave_out_padding(scores, bias, edges, batch, i, lo, hi - lo, False)
                for e in range(lo, hi, 4):
                    nodes, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - lo) * heads
                    for g in range(group):
                        for hk in range(key_heads):
                            h = hk * group + g
                            q_i = Vector(q, ((batch * n + i) * heads + h) * head_dim)
                            k_j = Neighbors(k, nodes, key_heads * head_dim, hk * head_dim)
                            gather_dot(scores, at + h * 4, scale, q_i, k_j, head_dim)
                softmax(scores, blocks, row_max, row_sum, lse[row])
                for e in range(lo, hi, 4):
                    nodes, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - lo) * heads
                    for g in range(group):
                        for hk in range(key_heads):
                            h = hk * group + g
                            acc_i, p = Vector(acc, (row * heads + h) * value_dim), Vector(scores, at + h * 4)
                            v_j = Neighbors(v, nodes, key_heads * value_dim, hk * value_dim)
                            gather_add(acc_i, p, v_j, value_dim)

    return forward_units


@compiled
def merge_pieces(pieces, count, n, out, lse, piece_out, piece_lse):
    """The softmax of each heavy node from those of its pieces, in fixed order."""
    zero = out.dtype.type(0)
    for batch in range(len(lse) // max(n, 1)):
        for node, first, stop in pieces:
            row = batch * n + node
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


JOBS_PER_THREAD = 16  # ranges of units: few, as each call of a compiled function takes some microseconds, but divisible


def _unit_ranges(units: int) -> list[tuple[int, int]]:
    """The units in consecutive ranges (first, stop), one for each job."""
    size = max(1, units // (JOBS_PER_THREAD * torch.get_num_threads()))
    return [(first, min(first + size, units)) for first in range(0, units, size)]


def forward(q: Tensor, k: Tensor, v: Tensor, layout: CSRLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 or float64 → out (B, H, N, Dv), lse (B, H, N).

    A query without edges has out 0 and lse -inf.
    """
    (B, H, N, head_dim), value_dim, adjacency = q.shape, v.shape[3], layout.by_query
    q, k, v = _nodes_first(q), _nodes_first(k), _nodes_first(v)
    out, lse = zeros(B, N, H, value_dim, like=q), q.new_full((B, N, H), -torch.inf)
    piece_out = out.new_zeros(B, adjacency.num_pieces, H, value_dim)
    piece_lse = lse.new_full((B, adjacency.num_pieces, H), -torch.inf)
    results = _flat_nodes(out, lse, piece_out, piece_lse)
    tensors, edges = ForwardTensors(q.numpy(), k.numpy(), v.numpy(), *results), _edges(adjacency)
    table, factor = _bias_table(modifiers, q), _scalar(modifiers.scale, q)
    kernel = _forward_kernel(head_dim, value_dim)

    ranges = _unit_ranges(len(adjacency.units))

    def run(job: int) -> None:
        place, batch = divmod(job, B)
        kernel(*ranges[place], batch, tensors, edges, table, factor)

    parallel_for(len(ranges) * B, run)
    if adjacency.num_pieces:
        merge_pieces(adjacency.pieces.numpy(), adjacency.num_pieces, N, *results)
    return out.transpose(1, 2), lse.transpose(1, 2)


# ------------------------------------------------------------------------------------------------- backward


@compiled
def start_backward(scores, ds, tensors, edges, row, base, first, count, by_key):
    """Scores of -lse and ds of -delta, (blocks, heads, 4); past the last edge, -inf and what the last one has.

    Both are of the query: node `row`, or with by_key the neighbour.
    """
    lse, delta, heads = tensors.lse, tensors.delta, tensors.lse.shape[1]
    for block in range((count + 3) // 4):
        a = b = c = d = row
        if by_key:
            a, b, c, d = neighbors_of_4(edges.neighbor, first + block * 4, first + count - 1, base)
        for h in range(heads):
            y = (block * heads + h) * 4
            scores[y], ds[y] = -lse[a, h], -delta[a, h]
            scores[y + 1], ds[y + 1] = -lse[b, h], -delta[b, h]
            scores[y + 2], ds[y + 2] = -lse[c, h], -delta[c, h]
            scores[y + 3], ds[y + 3] = -lse[d, h], -delta[d, h]
    mask_padding(scores, count, heads)


@compiled
def softmax_backward(scores, ds, blocks, ds_sum):
    """Scores less their lse to p, and dp - delta in ds to ds = p (dp - delta), in place; ds_sum (heads · 4,) += ds."""
    lanes = len(ds_sum)
    for x in range(blocks):
        for y in range(lanes):
            p = exp(scores[x * lanes + y])
            scores[x * lanes + y] = p
            ds[x * lanes + y] *= p
            ds_sum[y] += ds[x * lanes + y]


@lru_cache
def _backward_kernel(head_dim: int, value_dim: int, by_key: bool) -> Callable[..., None]:
    """The kernel of dq or, by_key, of dk and dv, for these dimensions.

    In both, score = x · y, dp = x_v · y_v, dx = scale · Σ ds y; and dv = Σ p y_v.
    """

    @compiled
    def backward_units(first_unit, stop_unit, batch, tensors, gradients, edges, bias, scale):
        x, x_v, y, y_v = tensors.x, tensors.x_v, tensors.y, tensors.y_v
        (_, nodes, x_heads, _), (_, y_nodes, y_heads, _) = x.shape, y.shape
        heads, key_heads, n = max(x_heads, y_heads), min(x_heads, y_heads), y_nodes if by_key else nodes
        group, pieces = heads // key_heads, len(gradients.piece_dx) // len(x)
        one = x.dtype.type(1)
        for unit in range(first_unit, stop_unit):
            size = (min(max_degree(edges.start, edges.units[unit]), CHUNK_EDGES) + 3) // 4 * heads * 4
            scores, ds, ds_sum = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(heads * 4, x.dtype)
            first, stop, begin, end = edges.units[unit]
            for node in range(first, stop):
                lo, hi = max(edges.start[node], begin), min(edges.start[node + 1], end)
                x_row, row = batch * nodes + node, batch * nodes + node
                dx, dx_v, key_ds_sum = gradients.dx, gradients.dx_v, gradients.ds_sum
                if unit < pieces:
                    row = batch * pieces + unit
                    dx, dx_v, key_ds_sum = gradients.piece_dx, gradients.piece_dx_v, gradients.piece_ds_sum
                ds_sum[:] = x.dtype.type(0)
                for chunk in range(lo, hi, CHUNK_EDGES):
                    count = min(hi - chunk, CHUNK_EDGES)
                    blocks = (count + 3) // 4
                    start_backward(scores, ds, tensors, edges, x_row, batch * n, chunk, count, by_key)
                    if bias.kind != NO_BIAS:
                        add_bias(scores, bias, edges, batch, node, chunk, count, by_key)
                    if len(bias.real):
                        leave_out_padding(scores, bias, edges, batch, node, chunk, count, by_key)
                    for block in range(blocks):
                        four = neighbors_of_4(edges.neighbor, chunk + block * 4, hi - 1, batch * y_nodes)
                        for g in range(group):
                            for hk in range(key_heads):
                                h = hk * group + g
                                x_h, y_h = (hk, h) if by_key else (h, hk)
                                at = (block * heads + h) * 4
                                x_i = Vector(x, (x_row * x_heads + x_h) * head_dim)
                                y_j = Neighbors(y, four, y_heads * head_dim, y_h * head_dim)
                                gather_dot(scores, at, scale, x_i, y_j, head_dim)
                                x_i = Vector(x_v, (x_row * x_heads + x_h) * value_dim)
                                y_j = Neighbors(y_v, four, y_heads * value_dim, y_h * value_dim)
                                gather_dot(ds, at, one, x_i, y_j, value_dim)
                    softmax_backward(scores, ds, blocks, ds_sum)
                    if len(gradients.dvalues):
                        add_bias_gradient(gradients.dvalues, ds, bias, edges, batch, node, chunk, count)
                    for block in range(blocks):
                        four = neighbors_of_4(edges.neighbor, chunk + block * 4, hi - 1, batch * y_nodes)
                        for g in range(group):
                            for hk in range(key_heads):
                                h = hk * group + g
                                x_h, y_h = (hk, h) if by_key else (h, hk)
                                at = (block * heads + h) * 4
                                dx_i = Vector(dx, (row * x_heads + x_h) * head_dim)
                                y_j = Neighbors(y, four, y_heads * head_dim, y_h * head_dim)
                                gather_add(dx_i, Vector(ds, at), y_j, head_dim)
                                if by_key:
                                    dx_i = Vector(dx_v, (row * x_heads + x_h) * value_dim)
                                    y_j = Neighbors(y_v, four, y_heads * value_dim, y_h * value_dim)
                                    gather_add(dx_i, Vector(scores, at), y_j, value_dim)
                for a in range(x_heads):
                    for d in range(head_dim):
                        dx[row, a, d] *= scale
                if len(gradients.ds_sum):
                    for h in range(heads):
                        key_ds_sum[row, h, 0] = (
                            ds_sum[4 * h] + ds_sum[4 * h + 1] + ds_sum[4 * h + 2] + ds_sum[4 * h + 3]
                        )

    return backward_units


@compiled
def sum_pieces(pieces, result, of_pieces):
    """Each heavy node's sum over its pieces, in fixed order: result (B, nodes, ·, ·), of_pieces (B, pieces, ·, ·)."""
    for batch in range(len(result)):
        for node, first, stop in pieces:
            for x in range(first, stop):
                result[batch, node] += of_pieces[batch, x]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What these edges add to dq, dk, dv and, where asked for, to the gradient of the bias's values.

    out (B, H, N, Dv) and lse (B, H, N) are those of all the edges of each query: with p = exp(score - lse) and
    Δ = Σ_d dout · out - dlse, ds = p · (dout · v - Δ). dlse may be None.
    """
    delta, bias = (dout * out).sum(3), modifiers.bias
    if dlse is not None:
        delta = delta - dlse
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # p = 0 where there are no edges
    lse, delta = lse.detach().transpose(1, 2).contiguous(), delta.detach().transpose(1, 2).contiguous()
    call = _Backward(_nodes_first(q), _nodes_first(k), _nodes_first(v), _nodes_first(dout), lse, delta, modifiers)
    if bias is None or not bias_grad:
        dq, dvalues, per_key = call.of_queries(layout), None, False
    elif bias.kind == "offset":
        (dq, dvalues), per_key = _offset_gradient(call, bias, layout), False
    else:
        per_key = bias.kind == "dense" and bias.values.shape[2] == 1  # one value serves all queries
        dvalues = None if per_key else torch.zeros(bias.values.shape, dtype=q.dtype)
        dq = call.of_queries(layout, dvalues)
    dk, dv, ds_sum = call.of_keys(layout, per_key)
    if bias is not None and per_key:
        dvalues = ds_sum.permute(0, 2, 3, 1).sum_to_size(bias.values.shape)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dvalues


class _Backward(NamedTuple):
    """What the backward kernels read: q, k, v and dout (B, nodes, heads, ·), lse and delta (B, N, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    modifiers: Modifiers

    def of_queries(self, layout: CSRLayout, dvalues: Tensor | None = None, *, serial: bool = False) -> Tensor:
        """dq; the gradient of the bias is added to dvalues, where given; serial: by this thread alone."""
        q, k, v, dout = self.q, self.k, self.v, self.dout
        no_tensor, table = q.new_empty(0, 0, 0, 0), _bias_table(self.modifiers, q)
        flat = q.new_empty(0) if dvalues is None else dvalues.view(-1)
        tensors = BackwardTensors(*_arrays(q, dout, k, v), *_flat_nodes(self.lse, self.delta))
        results = [zeros(*q.shape, like=q), no_tensor, no_tensor]
        # All batches that share a value are one job: no two threads add to it.
        batches = len(q) if dvalues is not None and table.strides[0] == 0 else 1
        kernel = _backward_kernel(q.shape[3], v.shape[3], False)
        self._run(kernel, tensors, results, flat, layout.by_query, table, batches, serial)
        return results[0]

    def of_keys(self, layout: CSRLayout, per_key: bool) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv and, where a bias has one value for each key, ds summed over the queries: (B, M, H, 1)."""
        q, k, v, dout = self.q, self.k, self.v, self.dout
        table = _bias_table(self.modifiers, q)
        ds_sum = q.new_zeros(*k.shape[:2], q.shape[2], 1) if per_key else q.new_empty(0, 0, 0, 0)
        tensors = BackwardTensors(*_arrays(k, v, q, dout), *_flat_nodes(self.lse, self.delta))
        results = [zeros(*k.shape, like=k), zeros(*v.shape, like=v), ds_sum]
        kernel = _backward_kernel(q.shape[3], v.shape[3], True)
        adjacency = layout.numbered if table.kind == EDGE else layout.by_key
        self._run(kernel, tensors, results, q.new_empty(0), adjacency, table, 1, False)
        return results[0], results[1], results[2]

    def _run(
        self,
        kernel: Callable[..., None],
        tensors: BackwardTensors,
        results: list[Tensor],
        dvalues: Tensor,
        adjacency: Adjacency,
        table: BiasTable,
        batches: int,
        serial: bool,
    ) -> None:
        """A kernel, for each unit and so many batches at once; dx, dx_v and ds_sum into results."""
        pieces = [x.new_zeros(x.shape[0], adjacency.num_pieces, *x.shape[2:]) for x in results]
        pairs = [x for pair in zip(results, pieces, strict=True) for x in pair]
        gradients, edges = Gradients(*_flat_nodes(*pairs), dvalues.numpy()), _edges(adjacency)
        factor, rounds = _scalar(self.modifiers.scale, self.q), len(self.q) // batches if batches else 0

        ranges = _unit_ranges(len(adjacency.units))

        def run(job: int) -> None:
            units, place = divmod(job, rounds)
            for batch in range(place * batches, (place + 1) * batches):
                kernel(*ranges[units], batch, tensors, gradients, edges, table, factor)

        jobs = len(ranges) * rounds
        if serial:
            for job in range(jobs):
                run(job)
        else:
            parallel_for(jobs, run)
        if adjacency.num_pieces:
            for result, of_pieces in zip(results, pieces, strict=True):
                if len(result):
                    sum_pieces(adjacency.pieces.numpy(), result.numpy(), of_pieces.numpy())


def _offset_gradient(call: _Backward, bias: ScoreBias, layout: CSRLayout) -> tuple[Tensor, Tensor]:
    """dq, and the gradient of an "offset" bias, in float64: each job is a head, to whose values no other adds."""
    q, k = call.q, call.k
    group, values = q.shape[2] // k.shape[2], bias.values.detach()
    dq, dvalues = torch.empty_like(q), torch.zeros(q.shape[2], values.shape[1], dtype=torch.float64)

    def run(h: int) -> None:
        q_h, dout_h, lse_h, delta_h = (x.narrow(2, h, 1).contiguous() for x in (q, call.dout, call.lse, call.delta))
        k_h, v_h = (x.narrow(2, h // group, 1).contiguous() for x in (k, call.v))
        head_bias = ScoreBias("offset", values[[min(h, len(values) - 1)]])
        one_head = _Backward(q_h, k_h, v_h, dout_h, lse_h, delta_h, call.modifiers._replace(bias=head_bias))
        dq[:, :, h] = one_head.of_queries(layout, dvalues[h], serial=True)[:, :, 0]

    parallel_for(q.shape[2], run)
    return dq, dvalues.sum_to_size(values.shape).to(values.dtype)


# ------------------------------------------------------------------------------------------- tensors to arrays


def _nodes_first(x: Tensor) -> Tensor:
    """(B, heads, nodes, ·) → (B, nodes, heads, ·), contiguous."""
    return x.detach().transpose(1, 2).contiguous()


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]


def _flat_nodes(*tensors: Tensor) -> list[np.ndarray]:
    """(B, nodes, …) → (B · nodes, …)."""
    return [tensor.flatten(0, 1).numpy() for tensor in tensors]


def _edges(adjacency: Adjacency) -> Edges:
    return Edges(*_arrays(adjacency.start, adjacency.neighbor, adjacency.edge, adjacency.units))


def _scalar(x: float, like: Tensor) -> Any:
    """A number of the tensor's dtype."""
    return np.float32(x) if like.dtype == torch.float32 else np.float64(x)


def _bias_table(modifiers: Modifiers, q: Tensor) -> BiasTable:
    """For q (B, N, H, D)."""
    (_, n, heads, _), bias = q.shape, modifiers.bias
    mask = modifiers.attention_mask
    real = np.empty((0, 0), np.bool_) if mask is None else mask.contiguous().numpy()
    if bias is None:
        return BiasTable(NO_BIAS, q.new_empty(0).numpy(), (0, 0, 0, 0), heads, n, real)
    values = bias.values.detach().to(q.dtype).contiguous()
    if bias.kind == "offset":
        whole = values[None, :, None]
    elif bias.kind == "edge":
        whole = values[:, :, None]
    else:
        whole = values
    batch, head, query, last = (
        0 if size == 1 else stride for size, stride in zip(whole.shape, whole.stride(), strict=True)
    )
    return BiasTable(KINDS[bias.kind], values.flatten().numpy(), (batch, head, query, last), heads, n, real)
