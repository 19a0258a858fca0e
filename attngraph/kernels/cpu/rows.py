"""Each query walks along its own edges, on a CPU, in machine code by Numba: for irregular sparse graphs.

Nothing of size E·H is stored, in either direction, and no two threads add to one number: two runs give the same bits.
Nodes come first in memory: q is (B, N, H, D), and the four scores of a block of edges lie together, (blocks, H, 4).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from attngraph.kernels.cpu.threads import share
from attngraph.kernels.cpu.vectors import adds, dots, exp
from attngraph.kernels.memory import zeros

CHUNK = 64  # edges of a node whose neighbours stay in the cache between their scores and their sums
HONEST = {"reassoc", "contract", "nsz", "arcp"}  # of fastmath, what keeps inf and nan
NONE, OFFSET, EDGE, DENSE = range(4)
KINDS = {"offset": OFFSET, "edge": EDGE, "dense": DENSE}
compiled = njit(nogil=True, cache=True, fastmath=HONEST)


# ----------------------------------------------------------------------------------------- steps of a row


@compiled
def four(neighbor, at, last, base):
    """base plus the neighbours of the edges at … at + 3; past the last edge, the last one again."""
    b, c, d = neighbor[min(at + 1, last)], neighbor[min(at + 2, last)], neighbor[min(at + 3, last)]
    return base + np.int64(neighbor[at]), base + np.int64(b), base + np.int64(c), base + np.int64(d)


@compiled
def longest(start, unit):
    """The most edges that a unit takes of one of its nodes."""
    first, after, begin, end = unit
    most = 0
    for node in range(first, after):
        most = max(most, min(start[node + 1], end) - max(start[node], begin))
    return most


@compiled
def place(kind, i, j, e, n):
    """The last index into the values of a bias."""
    return e if kind == EDGE else (j - i + n - 1 if kind == OFFSET else j)


@compiled
def add_bias(scores, kind, values, strides, batch, node, neighbor, edge, first, number, heads, n, by_key):
    """Add the bias of `number` edges to their scores (blocks, heads, 4)."""
    for x in range(number):
        other, e = np.int64(neighbor[first + x]), first + x
        if len(edge):
            e = np.int64(edge[e])
        i, j = (other, node) if by_key else (node, other)
        at = batch * strides[0] + i * strides[2] + place(kind, i, j, e, n) * strides[3]
        for h in range(heads):
            scores[(x // 4 * heads + h) * 4 + x % 4] += values[at + h * strides[1]]


@compiled
def add_gradients(dvalues, strides, gradients, kind, batch, i, neighbor, first, number, heads, n):
    """Add the gradients (blocks, heads, 4) of `number` edges of query i to those of the bias."""
    for x in range(number):
        e = first + x
        at = batch * strides[0] + i * strides[2] + place(kind, i, np.int64(neighbor[e]), e, n) * strides[3]
        for h in range(heads):
            dvalues[at + h * strides[1]] += gradients[(x // 4 * heads + h) * 4 + x % 4]


@compiled
def silence(scores, number, heads):
    """Scores of -inf past the last of `number` edges, in its block: (blocks, heads, 4)."""
    for x in range(number, (number + 3) // 4 * 4):
        for h in range(heads):
            scores[(x // 4 * heads + h) * 4 + x % 4] = -np.inf


@compiled
def softmax(scores, blocks, top, total, lse):
    """Scores (blocks, lanes) to their softmax in place, and its lse (heads,); top and total are scratch (lanes,)."""
    lanes, zero, one = len(top), top.dtype.type(0), top.dtype.type(1)
    for y in range(lanes):
        top[y], total[y] = -np.inf, zero
    for x in range(blocks):
        for y in range(lanes):
            top[y] = scores[x * lanes + y] if scores[x * lanes + y] > top[y] else top[y]
    for h in range(0, lanes, 4):
        highest = max(max(top[h], top[h + 1]), max(top[h + 2], top[h + 3]))
        top[h : h + 4] = highest if highest > -np.inf else zero  # a query that hears nobody
    for x in range(blocks):
        for y in range(lanes):
            power = exp(scores[x * lanes + y] - top[y])
            scores[x * lanes + y] = power
            total[y] += power
    for h in range(len(lse)):
        whole = total[4 * h] + total[4 * h + 1] + total[4 * h + 2] + total[4 * h + 3]
        lse[h] = top[4 * h] + math.log(whole) if whole != zero else -np.inf
        total[4 * h : 4 * h + 4] = one / whole if whole != zero else zero
    for x in range(blocks):
        for y in range(lanes):
            scores[x * lanes + y] *= total[y]


# ------------------------------------------------------------------------------------------------- forward


@lru_cache
def _forward(width: int, value_width: int):
    """The kernel for these sizes of q and v; each pair of sizes is compiled once, and kept on disk."""

    @compiled
    def forward_unit(
        unit, batch, q, k, v, start, neighbor, edge, units, scale, kind, values, strides, out, lse, some_out, some_lse
    ):
        (_, n, heads, _), (_, m, key_heads, _) = q.shape, k.shape
        group, pieces = heads // key_heads, len(some_lse) // len(q)
        scores = np.empty((longest(start, units[unit]) + 3) // 4 * heads * 4, q.dtype)
        top, total, zero = np.empty(heads * 4, q.dtype), np.empty(heads * 4, q.dtype), q.dtype.type(0)
        first, after, begin, end = units[unit]
        for i in range(first, after):
            lo, hi = max(start[i], begin), min(start[i + 1], end)
            if unit < pieces:
                sums, lses, row = some_out, some_lse, batch * pieces + unit
            else:
                sums, lses, row = out, lse, batch * n + i
            for y in range((hi - lo + 3) // 4 * heads * 4):
                scores[y] = zero
            silence(scores, hi - lo, heads)
            if kind != NONE:
                add_bias(scores, kind, values, strides, batch, i, neighbor, edge, lo, hi - lo, heads, n, False)
            for e in range(lo, hi, 4):
                nodes, at = four(neighbor, e, hi - 1, batch * m), (e - lo) * heads
                for g in range(group):
                    for hk in range(key_heads):
                        h = hk * group + g
                        x_at = ((batch * n + i) * heads + h) * width
                        dots(scores, at + h * 4, scale, q, x_at, k, nodes, key_heads * width, hk * width, width)
            softmax(scores, (hi - lo + 3) // 4, top, total, lses[row])
            for e in range(lo, hi, 4):
                nodes, at = four(neighbor, e, hi - 1, batch * m), (e - lo) * heads
                for g in range(group):
                    for hk in range(key_heads):
                        h = hk * group + g
                        to = (row * heads + h) * value_width
                        stride = key_heads * value_width
                        adds(sums, to, scores, at + h * 4, v, nodes, stride, hk * value_width, value_width)

    return forward_unit


@compiled
def merge(pieces, count, n, out, lse, some_out, some_lse):
    """The softmax of each heavy node from those of its pieces, in fixed order."""
    zero = out.dtype.type(0)
    for batch in range(len(lse) // max(n, 1)):
        for node, first, last in pieces:
            row = batch * n + node
            for h in range(lse.shape[1]):
                top, total = -np.inf, zero
                for x in range(batch * count + first, batch * count + last):
                    top = max(top, some_lse[x, h])
                top = top if top > -np.inf else 0.0
                for x in range(batch * count + first, batch * count + last):
                    power = out.dtype.type(math.exp(some_lse[x, h] - top))
                    total += power
                    for d in range(out.shape[2]):
                        out[row, h, d] += power * some_out[x, h, d]
                if total != zero:
                    lse[row, h] = top + math.log(total)
                    for d in range(out.shape[2]):
                        out[row, h, d] /= total


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: tuple[str, Tensor] | None, scale: float):
    """q (B, H, N, D), k and v (B, Hkv, M, ·), float32 or float64 → out (B, H, N, Dv), lse (B, H, N).

    layout: a `Rows`. bias: "offset" with values (H | 1, N + M - 1), of j - i; "edge" with (B | 1, H | 1, E), in
    edge_index order; or "dense" with (B | 1, H | 1, N | 1, M). A query that hears nobody has out 0 and lse -inf.
    """
    (B, H, N, _), half = q.shape, layout.by_query
    q, k, v = _nodes_first(q, k, v)
    kind, values, strides = _terms(bias, q)
    out, lse = zeros(B, N, H, v.shape[3], like=q), q.new_full((B, N, H), -torch.inf)
    some_out, some_lse = (
        whole.new_full((B, half.num_pieces, *whole.shape[2:]), fill) for whole, fill in ((out, 0), (lse, -torch.inf))
    )
    kernel = _forward(q.shape[3], v.shape[3])
    arguments = _arrays(q, k, v, half.start, half.neighbor, half.edge, half.units)
    results = _arrays(*(whole.flatten(0, 1) for whole in (out, lse, some_out, some_lse)))
    terms = _number(q)(scale), kind, values.numpy(), strides

    def work(job):
        unit, batch = divmod(job, B)
        kernel(unit, batch, *arguments, *terms, *results)

    share(len(half.units) * B, work)
    if half.num_pieces:
        merge(*_arrays(half.pieces), half.num_pieces, N, *results)
    return out.transpose(1, 2), lse.transpose(1, 2)


# ------------------------------------------------------------------------------------------------- backward


@compiled
def fill_gradients(scores, gradients, lse, delta, row, neighbor, base, first, number, by_key):
    """Scores of -lse and gradients of -delta, (blocks, heads, 4); past the last edge, -inf and what the last one has.

    Both are of the query: node `row`, or with by_key the neighbour.
    """
    heads = lse.shape[1]
    for block in range((number + 3) // 4):
        a = b = c = d = row
        if by_key:
            a, b, c, d = four(neighbor, first + block * 4, first + number - 1, base)
        for h in range(heads):
            y = (block * heads + h) * 4
            scores[y], gradients[y] = -lse[a, h], -delta[a, h]
            scores[y + 1], gradients[y + 1] = -lse[b, h], -delta[b, h]
            scores[y + 2], gradients[y + 2] = -lse[c, h], -delta[c, h]
            scores[y + 3], gradients[y + 3] = -lse[d, h], -delta[d, h]
    silence(scores, number, heads)


@compiled
def weigh(scores, gradients, blocks, sums):
    """Scores less their lse to weights p, and dp - delta to ds = p (dp - delta), in place; sums (lanes,) of the ds."""
    lanes = len(sums)
    for x in range(blocks):
        for y in range(lanes):
            weight = exp(scores[x * lanes + y])
            scores[x * lanes + y] = weight
            gradients[x * lanes + y] *= weight
            sums[y] += gradients[x * lanes + y]


@lru_cache
def _backward(width: int, value_width: int, by_key: bool):
    """The kernel of dq or, by_key, of dk and dv. A node has `own` vectors, q and dout or k and v; neighbours `other`.

    In both, score = own · other, dp = own_value · other_value, d_own = scale · Σ ds other; and dv = Σ p other_value.
    """

    @compiled
    def backward_unit(
        unit, batch, own, own_value, other, other_value, lse, delta, start, neighbor, edge, units, scale,
        kind, values, strides, d_own, some_own, d_value, some_value, d_bias, some_bias, d_values,
    ):  # fmt: skip
        (_, nodes, own_heads, _), (_, other_nodes, other_heads, _) = own.shape, other.shape
        heads, pieces = max(own_heads, other_heads), len(some_own) // len(own)
        key_heads, n = min(own_heads, other_heads), other_nodes if by_key else nodes
        one, size = own.dtype.type(1), (min(longest(start, units[unit]), CHUNK) + 3) // 4 * heads * 4
        scores, ds, sums = np.empty(size, own.dtype), np.empty(size, own.dtype), np.empty(heads * 4, own.dtype)
        first, after, begin, end = units[unit]
        for node in range(first, after):
            lo, hi = max(start[node], begin), min(start[node + 1], end)
            row, x = batch * nodes + node, batch * nodes + node
            to, to_value, to_bias = d_own, d_value, d_bias
            if unit < pieces:
                row, to, to_value, to_bias = batch * pieces + unit, some_own, some_value, some_bias
            sums[:] = own.dtype.type(0)
            for lower in range(lo, hi, CHUNK):
                number = min(hi - lower, CHUNK)
                fill_gradients(scores, ds, lse, delta, x, neighbor, batch * n, lower, number, by_key)
                if kind != NONE:
                    add_bias(
                        scores, kind, values, strides, batch, node, neighbor, edge, lower, number, heads, n, by_key
                    )
                for block in range((number + 3) // 4):
                    others = four(neighbor, lower + block * 4, hi - 1, batch * other_nodes)
                    for g in range(heads // key_heads):
                        for hk in range(key_heads):
                            h = hk * (heads // key_heads) + g
                            a, b = (hk, h) if by_key else (h, hk)
                            at = (block * heads + h) * 4
                            o, stride, y = (x * own_heads + a) * width, other_heads * width, b * width
                            dots(scores, at, scale, own, o, other, others, stride, y, width)
                            o, stride, y = (x * own_heads + a) * value_width, other_heads * value_width, b * value_width
                            dots(ds, at, one, own_value, o, other_value, others, stride, y, value_width)
                weigh(scores, ds, (number + 3) // 4, sums)
                if len(d_values):
                    add_gradients(d_values, strides, ds, kind, batch, node, neighbor, lower, number, heads, n)
                for block in range((number + 3) // 4):
                    others = four(neighbor, lower + block * 4, hi - 1, batch * other_nodes)
                    for g in range(heads // key_heads):
                        for hk in range(key_heads):
                            h = hk * (heads // key_heads) + g
                            a, b = (hk, h) if by_key else (h, hk)
                            at, stride = (block * heads + h) * 4, other_heads * width
                            adds(to, (row * own_heads + a) * width, ds, at, other, others, stride, b * width, width)
                            if by_key:
                                o, stride = (row * own_heads + a) * value_width, other_heads * value_width
                                y = b * value_width
                                adds(to_value, o, scores, at, other_value, others, stride, y, value_width)
            for a in range(own_heads):
                for d in range(width):
                    to[row, a, d] *= scale
            if len(d_bias):
                for h in range(heads):
                    to_bias[row, h, 0] = sums[4 * h] + sums[4 * h + 1] + sums[4 * h + 2] + sums[4 * h + 3]

    return backward_unit


@compiled
def gather(pieces, count, total, some):
    """The sum of each heavy node over its pieces, in fixed order: total (B, nodes, ·, ·), some (B, count, ·, ·)."""
    for batch in range(len(total)):
        for node, first, last in pieces:
            for x in range(first, last):
                total[batch, node] += some[batch, x]


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    layout,
    bias: tuple[str, Tensor] | None,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The share of these edges in dq, dk, dv and, where asked for, in the gradient of the bias's values.

    out (B, H, N, Dv) and lse (B, H, N) are those of all the edges of each query: with p = exp(score - lse) and
    Δ = Σ_d dout · out - dlse, ds = p · (dout · v - Δ).
    """
    delta = (dout * out).sum(3) if dlse is None else (dout * out).sum(3) - dlse
    q, k, v, dout = _nodes_first(q, k, v, dout)
    lse, delta = (side.detach().transpose(1, 2).contiguous() for side in (lse, delta))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # p = 0 where nobody is heard
    sides = q, k, v, dout, lse, delta
    if bias_grad and bias[0] == "offset":
        dq, d_values = _by_head(sides, layout, bias, scale)
    else:
        d_values = torch.zeros(bias[1].shape, dtype=q.dtype) if bias_grad else None
        rows = None if bias_grad and _of_keys(bias) else d_values
        dq = _half((q, dout, k, v), sides, layout, bias, scale, d_values=rows)[0]
    d_keys = bias_grad and _of_keys(bias)
    dk, dv, d_bias = _half((k, v, q, dout), sides, layout, bias, scale, by_key=True, d_keys=d_keys)
    if d_keys:
        d_values = d_bias.permute(0, 2, 3, 1).sum_to_size(bias[1].shape)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), d_values


def _of_keys(bias: tuple[str, Tensor]) -> bool:
    """Whether one value of the bias serves all queries."""
    return bias[0] == "dense" and bias[1].shape[2] == 1


def _half(vectors, sides, layout, bias, scale, *, by_key=False, d_values=None, d_keys=False, alone=False):
    """The gradients of one side's nodes: (dq, -, -), or (dk, dv, and ds summed over the queries where d_keys)."""
    (own, own_value, _, _), (q, _, v, _, lse, delta) = vectors, sides
    half = layout.by_query
    if by_key:
        half = layout.numbered if bias and bias[0] == "edge" else layout.by_key
    B, _, H, D = q.shape
    kind, values, strides = _terms(bias, q)
    totals = [zeros(*own.shape, like=own)]
    totals.append(zeros(*own_value.shape, like=own) if by_key else q.new_empty(0, 0, 0, 0))
    totals.append(q.new_zeros(B, own.shape[1], H, 1) if d_keys else q.new_empty(0, 0, 0, 0))
    some = [total.new_zeros(total.shape[0], half.num_pieces, *total.shape[2:]) for total in totals]
    results = _arrays(*(total.flatten(0, 1) for pair in zip(totals, some, strict=True) for total in pair))
    arguments = _arrays(
        *vectors, lse.flatten(0, 1), delta.flatten(0, 1), half.start, half.neighbor, half.edge, half.units
    )
    gradient = (q.new_empty(0) if d_values is None else d_values.view(-1)).numpy()
    kernel, terms = _backward(D, v.shape[3], by_key), (_number(q)(scale), kind, values.numpy(), strides)
    # One thread for all batches that share a value: no two add to it.
    together = B if d_values is not None and strides[0] == 0 else 1

    def work(job):
        unit, turn = divmod(job, B // together)
        for batch in range(turn * together, (turn + 1) * together):
            kernel(unit, batch, *arguments, *terms, *results, gradient)

    jobs = len(half.units) * (B // together) if B else 0
    if alone:
        for job in range(jobs):
            work(job)
    else:
        share(jobs, work)
    if half.num_pieces:
        for total, part in zip(totals, some, strict=True):
            if len(total):
                gather(half.pieces.numpy(), half.num_pieces, total.numpy(), part.numpy())
    return totals


def _by_head(sides, layout, bias, scale):
    """dq, and the gradient of an "offset" bias: each job is a head, whose table no other adds to."""
    q, k, v, dout, lse, delta = sides
    group, table = q.shape[2] // k.shape[2], bias[1].detach()
    dq, d_table = torch.empty_like(q), torch.zeros(q.shape[2], table.shape[1], dtype=torch.float64)

    def work(h):
        q_h, dout_h, lse_h, delta_h = (side.narrow(2, h, 1).contiguous() for side in (q, dout, lse, delta))
        k_h, v_h = (side.narrow(2, h // group, 1).contiguous() for side in (k, v))
        vectors, sides = (q_h, dout_h, k_h, v_h), (q_h, k_h, v_h, dout_h, lse_h, delta_h)
        values = table[[min(h, len(table) - 1)]]
        dq_h = _half(vectors, sides, layout, ("offset", values), scale, d_values=d_table[h], alone=True)[0]
        dq[:, :, h] = dq_h[:, :, 0]

    share(q.shape[2], work)
    return dq, d_table.sum_to_size(table.shape).to(table.dtype)


# ------------------------------------------------------------------------------------------- tensors to arrays


def _nodes_first(*sides: Tensor) -> list[Tensor]:
    """(B, heads, nodes, ·) → (B, nodes, heads, ·), contiguous."""
    return [side.detach().transpose(1, 2).contiguous() for side in sides]


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors]


def _number(like: Tensor):
    return np.float32 if like.dtype == torch.float32 else np.float64


def _terms(bias: tuple[str, Tensor] | None, like: Tensor) -> tuple[int, Tensor, tuple[int, int, int, int]]:
    """The kind, the values (flat) and their strides over (B, H, N, last), 0 where one value serves all."""
    if bias is None:
        return NONE, like.new_empty(0), (0, 0, 0, 0)
    kind, values = bias
    shape = {"offset": (1, values.shape[0], 1), "edge": (*values.shape[:-1], 1), "dense": values.shape[:-1]}[kind]
    values = values.detach().to(like.dtype).contiguous()
    laid_out = values.view(*shape, values.shape[-1])
    strides = tuple(0 if size == 1 else stride for size, stride in zip(laid_out.shape, laid_out.stride(), strict=True))
    return KINDS[kind], values.flatten(), strides
