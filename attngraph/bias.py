"""Additive terms of the scores, one number per edge and head, all differentiable. Data only: no kernels, no graphs.

A bias answers `at(q_idx, kv_idx, edge)` with a tensor that broadcasts to (B, H, *edges) for any edges it is asked for;
`edge` is their number in `edge_index` order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Alibi:
    """-slope · |i - j| (Press et al. 2022), with one slope for each head: (H,).

    >>> Alibi.geometric(4).slopes
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """

    slopes: Tensor

    def __post_init__(self):
        if self.slopes.ndim != 1:
            raise ValueError(f"Alibi takes slopes of shape (H,) (got {tuple(self.slopes.shape)})")

    @staticmethod
    def geometric(num_heads: int) -> Alibi:
        """The slopes of the paper, 2^(-8h/H) for h = 1 … H."""
        return Alibi(2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads))

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(H, *edges)."""
        distance = (q_idx - kv_idx).abs()
        return -self.slopes.view(-1, *[1] * distance.ndim) * distance


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """table[h, bucket(j - i)]: a learned number for each head and relative position. table: (H, buckets).

    Without `max_distance`, offsets are clipped to the table's width: its middle column is j = i, and buckets must be
    odd (Shaw et al. 2018). With it, the buckets are T5's (Raffel et al. 2020): half of them exact, the rest logarithmic
    up to `max_distance`; `bidirectional` spends half of the buckets on the future, otherwise the future is bucket 0.

    >>> RelativeBias(torch.tensor([[1.0, 0.0, 2.0]])).at(torch.tensor([5]), torch.tensor([9]))
    tensor([[2.]])
    """

    table: Tensor
    max_distance: int | None = None
    bidirectional: bool = True

    def __post_init__(self):
        if self.table.ndim != 2:
            raise ValueError(f"RelativeBias takes a table of shape (H, buckets) (got {tuple(self.table.shape)})")
        buckets = self.table.shape[1]
        if self.max_distance is None and buckets % 2 == 0:
            raise ValueError(
                f"clipped offsets -r … r need an odd number of buckets (got {buckets}); or give max_distance"
            )
        exact = buckets // (4 if self.bidirectional else 2)
        if self.max_distance is not None and not 0 < exact < self.max_distance:
            raise ValueError(
                f"max_distance must be above the {exact} exact distances, of which there is at least 1 (got "
                f"max_distance={self.max_distance} for {buckets} buckets)"
            )

    def bucket(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The column of the table for each pair."""
        ahead, buckets = kv_idx - q_idx, self.table.shape[1]
        if self.max_distance is None:
            radius = buckets // 2
            return ahead.clamp(-radius, radius) + radius
        first = torch.zeros_like(ahead)
        if self.bidirectional:
            buckets //= 2
            first, distance = (ahead > 0) * buckets, ahead.abs()
        else:
            distance = (-ahead).clamp(min=0)
        exact = buckets // 2
        # float32, as T5 computes it: the bucket's border depends on the rounding.
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(H, *edges)."""
        return self.table[:, self.bucket(q_idx, kv_idx)]


@dataclass(frozen=True, eq=False)
class EdgeBias:
    """One number per edge, in `edge_index` order: values (E,), (H, E) or (B, H, E).

    For an `EdgeList`, values in the order in which the edges were given fit as ``values[..., graph.order]``.
    """

    values: Tensor

    def __post_init__(self):
        if not 1 <= self.values.ndim <= 4:
            raise ValueError(f"EdgeBias takes values (E,), (H, E) or (B, H, E) (got shape {tuple(self.values.shape)})")

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor) -> Tensor:
        """(..., *edges)."""
        return self.values[..., edge]


@dataclass(frozen=True, eq=False)
class DenseBias:
    """One number for each pair of nodes, edge or not: values that broadcast to (B, H, N, M)."""

    values: Tensor

    def __post_init__(self):
        if self.values.ndim < 2:
            raise ValueError(
                f"a dense bias has shape (N, M), (H, N, M) or (B, H, N, M) (got {tuple(self.values.shape)})"
            )

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor | None = None) -> Tensor:
        """(..., *edges)."""
        return self.values[..., q_idx, kv_idx]


Bias = Alibi | RelativeBias | EdgeBias | DenseBias
