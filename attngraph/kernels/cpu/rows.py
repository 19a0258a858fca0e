"""Attention edge by edge on a CPU, in machine code by Numba: each query walks along its own edges. For sparse graphs.

Transforms, normalisers and dropout are steps on the scores of a node, or of a chunk of its edges, in the cache.
Nothing of size E·H is stored, in either direction, and no two threads add to one number: two runs give the same bits.
Nodes come first in memory: q is (B, N, H, D). The edges of a node are taken in blocks of four, whose scores lie
together: (blocks, H, 4).
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

from attngraph.kernels.contract import Adjacency, CSRLayout, Modifiers, ScoreBias
from attngraph.kernels.cpu.csr import (
    JOBS_PER_THREAD,
    arrays,
    edges_of,
    flat_nodes,
    max_degree,
    neighbors_of_4,
    nodes_first,
    sum_pieces,
    unit_ranges,
)
from attngraph.kernels.cpu.gather import Neighbors, Vector, gather_add, gather_dot
from attngraph.kernels.cpu.launch import InThreads, in_threads
from attngraph.kernels.cpu.openmp import parallel_for
from attngraph.kernels.cpu.score_bias import (
    EDGE,
    NO_BIAS,
    BiasTable,
    add_bias,
    add_bias_gradient,
    bias_table,
    mask,
    stored,
)
from attngraph.kernels.cpu.weights import (
    OPTIONS,
    SOFTMAX,
    compiled,
    drop_block,
    inner,
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
from attngraph.kernels.memory import zeros

CHUNK_EDGES = 64  # edges of a node whose neighbours stay in the cache between their scores and their sums


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


@compiled
def dropout_factors(factors, edges, batch, node, first, count, by_key, rule):
    """What dropout multiplies the weights of `count` edges by: (blocks, heads, 4)."""
    at, same = np.int64(0), (np.int64(node), np.int64(node), np.int64(node), np.int64(node))
    for e in range(first, first + count, 4):
        four = neighbors_of_4(edges.neighbor, e, first + count - 1, np.int64(0))
        queries, keys = (four, same) if by_key else (same, four)
        drop_block(factors, at, queries, keys, batch, rule)
        at += len(rule.heads) - 4


# ------------------------------------------------------------------------------------------------- forward


@lru_cache
def _forward_kernel(head_dim: int, value_dim: int, plain: bool) -> InThreads:
    """The kernel for these dimensions, compiled once and kept on disk; plain: for a softmax alone.

    Each job is a range of units of one batch entry.
    """

    @in_threads(**OPTIONS)
    def forward_units(job, ranges, tensors, edges, bias, rule, scale):
        q, k, v = tensors.q, tensors.k, tensors.v
        place, batch = divmod(job, len(q))
        (_, n, heads, _), (_, m, key_heads, _) = q.shape, k.shape
        group, pieces = heads // key_heads, len(tensors.piece_lse) // len(q)
        for unit in range(ranges[place], ranges[place + 1]):
            size = (max_degree(edges.start, edges.units[unit]) + 3) // 4 * heads * 4
            scores, zero = np.empty(size, q.dtype), q.dtype.type(0)
            row_max, row_sum = np.empty(heads * 4, q.dtype), np.empty(heads * 4, q.dtype)
            rest = 0 if plain else size
            slopes, factors = np.empty(rest, q.dtype), np.empty(rest + 4, q.dtype)
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
                if bias.kind != NO_BIAS:
                    add_bias(scores, bias, edges, batch, i, lo, hi - lo, False)
                for e in range(lo, hi if head_dim else lo, 4):
                    nodes, at = neighbors_of_4(edges.neighbor, e, hi - 1, batch * m), (e - lo) * heads
                    for g in range(group):
                        for hk in range(key_heads):
                            h = hk * group + g
                            q_i = Vector(q, ((batch * n + i) * heads + h) * head_dim)
                            k_j = Neighbors(k, nodes, key_heads * head_dim, hk * head_dim)
                            gather_dot(scores, at + h * 4, scale, q_i, k_j, head_dim)
                if not plain:
                    transform(scores, slopes, blocks * heads * 4, rule.transform, rule.value)
                if plain or rule.normalize == SOFTMAX:
                    mask(scores, bias, edges, batch, i, lo, hi - lo, False, -np.inf)
                    softmax(scores, blocks, row_max, row_sum, lse[row])
                else:
                    normalize(scores, slopes, blocks * heads * 4, rule.normalize)
                    mask(scores, bias, edges, batch, i, lo, hi - lo, False, zero)
                if not plain and rule.drops:
                    dropout_factors(factors, edges, batch, i, lo, hi - lo, False, rule)
                    multiply(scores, factors, blocks * heads * 4)
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


def forward(q: Tensor, k: Tensor, v: Tensor, layout: CSRLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 or float64 → out (B, H, N, Dv), lse (B, H, N).

    A query without edges has out 0 and lse -inf; normalisers other than softmax have no lse: 0.
    """
    (B, H, N, head_dim), value_dim, adjacency = q.shape, v.shape[3], layout.by_query
    q, k, v = nodes_first(q), nodes_first(k), nodes_first(v)
    is_softmax = modifiers.normalize == "softmax"
    out, lse = zeros(B, N, H, value_dim, like=q), q.new_full((B, N, H), -torch.inf if is_softmax else 0)
    piece_out = out.new_zeros(B, adjacency.num_pieces, H, value_dim)
    piece_lse = lse.new_full((B, adjacency.num_pieces, H), -torch.inf)
    results = flat_nodes(out, lse, piece_out, piece_lse)
    tensors, edges = ForwardTensors(q.numpy(), k.numpy(), v.numpy(), *results), edges_of(adjacency)
    table, rule, factor = bias_table(modifiers, q), weighting(modifiers, q), scalar(modifiers.scale, q)
    kernel = _forward_kernel(head_dim, value_dim, is_plain(modifiers))

    ranges = unit_ranges(len(adjacency.units))
    kernel((len(ranges) - 1) * B, ranges, tensors, edges, table, rule, factor)
    if adjacency.num_pieces and not is_softmax:
        sum_pieces(adjacency.pieces.numpy(), out.numpy(), piece_out.numpy())
    elif adjacency.num_pieces:
        merge_pieces(adjacency.pieces.numpy(), adjacency.num_pieces, N, *results)
    return out.transpose(1, 2), lse.transpose(1, 2)


# ------------------------------------------------------------------------------------------------- backward


@in_threads(**OPTIONS)
def compute_delta(job, size, out, dout, delta):
    """delta, which holds dlse, to Σ_d out · dout - dlse, of so many vectors a job."""
    for x in range(job * size, min((job + 1) * size, len(delta))):
        total = delta.dtype.type(0)
        for d in range(out.shape[1]):
            total += out[x, d] * dout[x, d]
        delta[x] = total - delta[x]


@compiled
def start_backward(scores, ds, tensors, edges, row, base, first, count, by_key):
    """-lse in `scores` and -delta in `ds`, (blocks, heads, 4); past the last edge, those of the last one.

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


@lru_cache
def _backward_kernel(head_dim: int, value_dim: int, plain: bool, by_key: bool) -> InThreads:
    """The kernel of dq or, by_key, of dk and dv, for these dimensions; plain: for a softmax alone.

    In both, score = x · y, dp = x_v · y_v, dx = scale · Σ ds y; and dv = Σ p y_v. Each job is a range of units of
    `batches` batch entries.
    """

    @inner
    def backward_range(first_unit, stop_unit, batch, tensors, gradients, edges, bias, rule, scale):
        x, x_v, y, y_v = tensors.x, tensors.x_v, tensors.y, tensors.y_v
        (_, nodes, x_heads, _), (_, y_nodes, y_heads, _) = x.shape, y.shape
        heads, key_heads, n = max(x_heads, y_heads), min(x_heads, y_heads), y_nodes if by_key else nodes
        group, pieces = heads // key_heads, len(gradients.piece_dx) // len(x)
        zero, one, is_softmax = x.dtype.type(0), x.dtype.type(1), plain or rule.normalize == SOFTMAX
        for unit in range(first_unit, stop_unit):
            size = (min(max_degree(edges.start, edges.units[unit]), CHUNK_EDGES) + 3) // 4 * heads * 4
            scores, ds, ds_sum = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(heads * 4, x.dtype)
            rest = 0 if plain else size
            minus_lse, minus_delta = np.empty(rest, x.dtype), np.empty(rest, x.dtype)
            slopes, factors = np.empty(rest, x.dtype), np.ones(rest + 4, x.dtype)
            first, stop, begin, end = edges.units[unit]
            for node in range(first, stop):
                lo, hi = max(edges.start[node], begin), min(edges.start[node + 1], end)
                x_row, row = batch * nodes + node, batch * nodes + node
                dx, dx_v, key_ds_sum = gradients.dx, gradients.dx_v, gradients.ds_sum
                if unit < pieces:
                    row = batch * pieces + unit
                    dx, dx_v, key_ds_sum = gradients.piece_dx, gradients.piece_dx_v, gradients.piece_ds_sum
                ds_sum[:] = zero
                for chunk in range(lo, hi, CHUNK_EDGES):
                    count = min(hi - chunk, CHUNK_EDGES)
                    blocks = (count + 3) // 4
                    if plain:
                        start_backward(scores, ds, tensors, edges, x_row, batch * n, chunk, count, by_key)
                    else:
                        scores[:], ds[:] = zero, zero
                    if not plain and is_softmax:
                        start_backward(minus_lse, minus_delta, tensors, edges, x_row, batch * n, chunk, count, by_key)
                    if bias.kind != NO_BIAS:
                        add_bias(scores, bias, edges, batch, node, chunk, count, by_key)
                    for block in range(blocks):
                        four = neighbors_of_4(edges.neighbor, chunk + block * 4, hi - 1, batch * y_nodes)
                        for g in range(group):
                            for hk in range(key_heads):
                                h = hk * group + g
                                x_h, y_h = (hk, h) if by_key else (h, hk)
                                at = (block * heads + h) * 4
                                x_i = Vector(x, (x_row * x_heads + x_h) * head_dim)
                                y_j = Neighbors(y, four, y_heads * head_dim, y_h * head_dim)
                                if head_dim:
                                    gather_dot(scores, at, scale, x_i, y_j, head_dim)
                                x_i = Vector(x_v, (x_row * x_heads + x_h) * value_dim)
                                y_j = Neighbors(y_v, four, y_heads * value_dim, y_h * value_dim)
                                gather_dot(ds, at, one, x_i, y_j, value_dim)
                    if not plain:
                        transform(scores, slopes, blocks * heads * 4, rule.transform, rule.value)
                    if is_softmax:
                        mask(scores, bias, edges, batch, node, chunk, count, by_key, -np.inf)
                    if plain:
                        softmax_backward(scores, ds, blocks, ds_sum)
                    else:
                        if is_softmax:
                            softmax_of(scores, minus_lse, blocks * heads * 4)
                        else:
                            normalize(scores, slopes, blocks * heads * 4, rule.normalize)
                            mask(scores, bias, edges, batch, node, chunk, count, by_key, zero)
                            mask(slopes, bias, edges, batch, node, chunk, count, by_key, zero)
                        if rule.drops:
                            dropout_factors(factors, edges, batch, node, chunk, count, by_key, rule)
                        weights_backward(scores, ds, minus_delta, slopes, factors, blocks, ds_sum, is_softmax)
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

    @in_threads(**OPTIONS)
    def backward_units(job, ranges, batches, tensors, gradients, edges, bias, rule, scale):
        place, entries = divmod(job, len(tensors.x) // batches)
        for batch in range(entries * batches, (entries + 1) * batches):
            backward_range(ranges[place], ranges[place + 1], batch, tensors, gradients, edges, bias, rule, scale)

    return backward_units


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

    out (B, H, N, Dv) and lse (B, H, N) are those of all the edges of each query: with w = exp(s - lse),
    dw = kept / (1 - p) · dout · v and Δ = Σ_d dout · out - dlse, ds = transform' · w · (dw - Δ); of other normalisers,
    which have no lse, ds = transform' · normalize' · dw. dlse may be None.
    """
    bias, lse = modifiers.bias, lse.masked_fill(lse == -torch.inf, torch.inf)  # p = 0 where there are no edges
    lse, dout = lse.detach().transpose(1, 2).contiguous(), nodes_first(dout)
    call = _Backward(nodes_first(q), nodes_first(k), nodes_first(v), dout, lse, _delta(out, dout, dlse), modifiers)
    if bias is None or not bias_grad:
        dq, dvalues, per_key = call.of_queries(layout), None, False
    elif bias.kind == "offset":
        (dq, dvalues), per_key = _offset_gradient(call, bias, layout), False
    else:
        per_key = bias.kind == "dense" and bias.values.shape[2] == 1  # one value serves all queries
        dvalues = None if per_key else torch.zeros_like(stored(bias), dtype=q.dtype)
        dq = call.of_queries(layout, dvalues)
        dvalues = dvalues.transpose(1, 2) if dvalues is not None and bias.kind == "edge" else dvalues
    dk, dv, ds_sum = call.of_keys(layout, per_key)
    if bias is not None and per_key:
        dvalues = ds_sum.permute(0, 2, 3, 1).sum_to_size(bias.values.shape)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dvalues


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """Δ of each query and head, (B, N, H); dout (B, N, H, Dv)."""
    out = nodes_first(out)
    delta = out.new_zeros(out.shape[:3]) if dlse is None else dlse.detach().transpose(1, 2).contiguous().clone()
    of_rows = out.view(-1, out.shape[3]).numpy(), dout.view(-1, out.shape[3]).numpy(), delta.view(-1).numpy()
    step = max(1, delta.numel() // (JOBS_PER_THREAD * torch.get_num_threads()))
    compute_delta(-(-delta.numel() // step), step, *of_rows)
    return delta


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
        if not q.shape[3] and dvalues is None:
            return q
        no_tensor, table = q.new_empty(0, 0, 0, 0), bias_table(self.modifiers, q)
        flat = q.new_empty(0) if dvalues is None else dvalues.view(-1)
        tensors = BackwardTensors(*arrays(q, dout, k, v), *flat_nodes(self.lse, self.delta))
        results = [zeros(*q.shape, like=q), no_tensor, no_tensor]
        # All batches that share a value are one job: no two threads add to it.
        batches = len(q) if dvalues is not None and table.strides[0] == 0 else 1
        kernel = _backward_kernel(q.shape[3], v.shape[3], is_plain(self.modifiers), False)
        self._run(kernel, tensors, results, flat, layout.by_query, table, batches, serial)
        return results[0]

    def of_keys(self, layout: CSRLayout, per_key: bool) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv and, where a bias has one value for each key, ds summed over the queries: (B, M, H, 1)."""
        q, k, v, dout = self.q, self.k, self.v, self.dout
        table = bias_table(self.modifiers, q)
        ds_sum = q.new_zeros(*k.shape[:2], q.shape[2], 1) if per_key else q.new_empty(0, 0, 0, 0)
        tensors = BackwardTensors(*arrays(k, v, q, dout), *flat_nodes(self.lse, self.delta))
        results = [zeros(*k.shape, like=k), zeros(*v.shape, like=v), ds_sum]
        kernel = _backward_kernel(q.shape[3], v.shape[3], is_plain(self.modifiers), True)
        adjacency = layout.numbered if table.kind == EDGE else layout.by_key
        self._run(kernel, tensors, results, q.new_empty(0), adjacency, table, 1, False)
        return results[0], results[1], results[2]

    def _run(
        self,
        kernel: InThreads,
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
        gradients, edges = Gradients(*flat_nodes(*pairs), dvalues.numpy()), edges_of(adjacency)
        factor, rule = scalar(self.modifiers.scale, self.q), weighting(self.modifiers, self.q)
        ranges = unit_ranges(len(adjacency.units))
        jobs = (len(ranges) - 1) * len(self.q) // max(batches, 1)
        run = kernel.serially if serial else kernel
        run(jobs, ranges, batches, tensors, gradients, edges, table, rule, factor)
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
        modifiers = call.modifiers._replace(bias=head_bias)
        if modifiers.dropout is not None:
            heads = modifiers.dropout.heads
            number = torch.tensor([h]) if heads is None else heads[h : h + 1]
            modifiers = modifiers._replace(dropout=modifiers.dropout._replace(heads=number))
        one_head = _Backward(q_h, k_h, v_h, dout_h, lse_h, delta_h, modifiers)
        dq[:, :, h] = one_head.of_queries(layout, dvalues[h], serial=True)[:, :, 0]

    parallel_for(q.shape[2], run)
    return dq, dvalues.sum_to_size(values.shape).to(values.dtype)
