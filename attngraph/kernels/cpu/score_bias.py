"""The bias of each edge and its gradient, and keys that are padding, in compiled code.

Scores lie as (blocks of four edges, heads, 4).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import Adjacency, Modifiers, ScoreBias
from attngraph.kernels.cpu.csr import edges_of, unit_ranges
from attngraph.kernels.cpu.launch import in_threads
from attngraph.kernels.cpu.weights import OPTIONS, compiled, mask_padding

NO_BIAS, OFFSET, EDGE, DENSE = range(4)
KINDS = {"offset": OFFSET, "edge": EDGE, "dense": DENSE}


class BiasTable(NamedTuple):
    """A bias and padding: its values, flat, and their strides over (B, H, N, last), 0 where one value serves all."""

    kind: int
    values: np.ndarray
    strides: tuple[int, int, int, int]
    heads: int
    n: int  # queries
    real: np.ndarray  # bool (B, M): keys that are no padding; (0, 0) where all are


def stored(bias: ScoreBias) -> Tensor:
    """The values, contiguous; those of edges as (B, E, H), as each edge asks for those of all heads."""
    values = bias.values.detach()
    return (values.transpose(1, 2) if bias.kind == "edge" else values).contiguous()


def bias_table(modifiers: Modifiers, q: Tensor) -> BiasTable:
    """For q (B, N, H, D)."""
    (_, n, heads, _), bias = q.shape, modifiers.bias
    mask = modifiers.attention_mask
    real = np.empty((0, 0), np.bool_) if mask is None else mask.contiguous().numpy()
    if bias is None:
        return BiasTable(NO_BIAS, q.new_empty(0).numpy(), (0, 0, 0, 0), heads, n, real)
    values = stored(bias).to(q.dtype)
    match bias.kind:
        case "offset":
            whole = values[None, :, None]
        case "edge":
            whole = values.transpose(1, 2)[:, :, None]
        case "dense":
            whole = values
    batch, head, query, last = (
        0 if size == 1 else stride for size, stride in zip(whole.shape, whole.stride(), strict=True)
    )
    return BiasTable(KINDS[bias.kind], values.flatten().numpy(), (batch, head, query, last), heads, n, real)


@compiled
def bias_index(kind, i, j, e, n):
    """The last index into the values of a bias."""
    return e if kind == EDGE else (j - i + n - 1 if kind == OFFSET else j)


@compiled
def add_bias(scores, bias, edges, batch, i, first, count):
    """Add the bias of `count` edges of query i, the first of which is `first`, to their scores (blocks, heads, 4)."""
    heads, strides = bias.heads, bias.strides
    for x in range(count):
        e = first + x
        j = np.int64(edges.neighbor[e])
        at = batch * strides[0] + i * strides[2] + bias_index(bias.kind, i, j, e, bias.n) * strides[3]
        for h in range(heads):
            scores[(x // 4 * heads + h) * 4 + x % 4] += bias.values[at + h * strides[1]]


@compiled
def mask(values, bias, edges, batch, first, count, masked):
    """`masked` for those of `count` edges whose key is padding, and past the last: values (blocks, heads, 4)."""
    mask_padding(values, count, bias.heads, masked)
    if len(bias.real):
        for x in range(count):
            if not bias.real[batch, np.int64(edges.neighbor[first + x])]:
                for h in range(bias.heads):
                    values[(x // 4 * bias.heads + h) * 4 + x % 4] = masked


@in_threads(**OPTIONS)
def add_gradients(job, nodes, by_head, dvalues, strides, weights, bias, edges):
    """ds of the edges of some queries, of all heads, or of all queries, of one head, added to those of their values.

    weights flat, (B, E + 1, 2, H), as in `rows`.
    """
    heads, num_edges = bias.heads, len(edges.neighbor)
    (first, stop), heads_from, heads_to = (nodes[job], nodes[job + 1]), 0, heads
    if by_head:
        first, stop, heads_from, heads_to = 0, len(edges.start) - 1, job, job + 1
    for batch in range(len(weights) // (2 * heads * (num_edges + 1))):
        for i in range(first, stop):
            for e in range(edges.start[i], edges.start[i + 1]):
                place = bias_index(bias.kind, i, np.int64(edges.neighbor[e]), e, bias.n)
                at, kept = batch * strides[0] + i * strides[2] + place * strides[3], batch * (num_edges + 1) + e
                for h in range(heads_from, heads_to):
                    dvalues[at + h * strides[1]] += weights[(2 * kept + 1) * heads + h]


def bias_gradient(bias: ScoreBias, table: BiasTable, weights: Tensor, adjacency: Adjacency) -> Tensor:
    """The gradient of the values of a bias, from weights (B, E + 1, 2, H), as in `rows`."""
    heads, edges, kept = weights.shape[3], edges_of(adjacency), weights.view(-1).numpy()
    if bias.kind == "edge" or (bias.kind == "dense" and bias.values.shape[2] > 1):  # no two queries share a value
        dvalues, nodes = torch.zeros_like(stored(bias), dtype=weights.dtype), unit_ranges(table.n)
        add_gradients(len(nodes) - 1, nodes, False, dvalues.view(-1).numpy(), table.strides, kept, table, edges)
        return dvalues.transpose(1, 2) if bias.kind == "edge" else dvalues
    batch, last = 1 if bias.kind == "offset" else len(bias.values), bias.values.shape[-1]
    total = torch.zeros(batch, heads, last, dtype=torch.float64)
    strides = (0 if batch == 1 else heads * last, last, 0, 1)
    add_gradients(heads, unit_ranges(0), True, total.view(-1).numpy(), strides, kept, table, edges)
    whole = total[0] if bias.kind == "offset" else total[:, :, None]
    return whole.sum_to_size(bias.values.shape).to(bias.values.dtype)
