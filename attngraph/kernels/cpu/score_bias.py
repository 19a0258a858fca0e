"""The bias of each edge and its gradient, and keys that are padding, in compiled code.

Scores lie as (blocks of four edges, heads, 4).
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from attngraph.kernels.contract import Modifiers, ScoreBias
from attngraph.kernels.cpu.weights import compiled, mask_padding

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
def mask(values, bias, edges, batch, node, first, count, by_key, masked):
    """`masked` for those of `count` edges whose key is padding, and past the last: values (blocks, heads, 4)."""
    mask_padding(values, count, bias.heads, masked)
    if len(bias.real):
        for x in range(count):
            if not bias.real[batch, node if by_key else np.int64(edges.neighbor[first + x])]:
                for h in range(bias.heads):
                    values[(x // 4 * bias.heads + h) * 4 + x % 4] = masked


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
