"""Of the attention weights of long sequences, the heaviest of each query: found some queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph
from attngraph.planning.planner import Plan

QUERIES = 256  # at a time


@dataclass(frozen=True, eq=False, repr=False)
class Heaviest:
    """The heaviest weights of one `Attention` of a model, as its latest call had them, and what all of them come to.

    Nodes have the numbers of their places in the model's input.
    """

    name: str
    """Of the module in the model."""
    layer: int
    """The number of the layer, from 0."""
    graph: Graph
    """Who may hear whom."""
    num_queries: int
    num_keys: int
    heads: tuple[int, ...]
    """Which heads were recorded."""
    keys: Tensor
    """int64 (B, heads, N, top): by weight, the heaviest first; -1 where a query hears fewer."""
    weights: Tensor
    """(B, heads, N, top), before dropout; 0 where a query hears fewer."""
    rest: Tensor
    """(B, heads, N): the weight of all other keys."""
    entropy: Tensor
    """(B, heads, N), in bits: -Σ w · log2 w."""
    distance: Tensor
    """(B, heads, N), in nodes: Σ w · |query - key|."""

    @checked
    def of(self, head: int, batch: int = 0) -> tuple[Tensor, Tensor]:
        """Of one head and one entry of the batch, the edges (2, E) that were kept, and their weights (E,)."""
        if head not in self.heads:
            raise ValueError(f"head must be one of those that were recorded, {self.heads} (got {head})")
        if not 0 <= batch < len(self.weights):
            raise ValueError(f"batch must be from 0 to {len(self.weights) - 1} (got {batch})")
        at = self.heads.index(head)
        keys, weights = self.keys[batch, at], self.weights[batch, at]
        order = keys.argsort(-1)
        keys, weights = keys.gather(-1, order), weights.gather(-1, order)
        query = torch.arange(self.num_queries, device=keys.device)[:, None].expand_as(keys)
        there = keys >= 0
        return torch.stack([keys[there], query[there]]), weights[there]

    def __repr__(self) -> str:
        batch, heads, n, top = self.weights.shape
        return f"Heaviest({self.name!r}, {self.graph}, {batch} × {heads} heads × {n:,} queries × {top} keys)"


class Rows(NamedTuple):
    """As the fields of `Heaviest` of these names, of some queries."""

    keys: Tensor
    weights: Tensor
    rest: Tensor
    entropy: Tensor
    distance: Tensor


def heaviest_rows(
    forward: Callable[..., Any],
    x: Tensor,
    graph: Graph | Plan,
    memory: Tensor,
    options: dict[str, Any],
    top: int,
    heads: tuple[int, ...] | None,
) -> Rows:
    """Of a call of an `Attention`, asked again for some queries at a time: x (B, N, D), memory (B, M, D)."""
    graph = graph.graph if isinstance(graph, Plan) else graph
    n, m = x.shape[-2], memory.shape[-2]
    whole = graph.sized(m if graph.size[0] is None else graph.size[0], m) if None in graph.size else graph
    bias, found = options.get("bias"), []
    for start in range(0, n, QUERIES):
        stop = min(start + QUERIES, n)
        part = whole.rows(start, stop)
        if isinstance(bias, Tensor) and bias.shape[-2] == n > 1:
            options = {**options, "bias": bias[..., start:stop, :]}
        _, weights = forward(x[..., start:stop, :], part, memory, return_weights=True, **options)
        weights = weights if x.ndim == 3 else weights[None]
        weights = weights if heads is None else weights[:, list(heads)]
        key, query = part.edge_index(stop - start, m).to(weights.device)
        found.append(rows_of(key, query, weights.detach(), stop - start, start, top))
    return Rows(*(torch.cat(column, 2) for column in zip(*found, strict=True)))


def rows_of(key: Tensor, query: Tensor, weights: Tensor, n: int, start: int, top: int) -> Rows:
    """Of all edges, sorted by queries, and their weights (B, H, E); the queries are start, start + 1, …"""
    degree = torch.bincount(query, minlength=n)
    place = torch.arange(len(query), device=query.device) - (degree.cumsum(0) - degree)[query]
    width = max(int(degree.amax()), top)
    dense = weights.new_zeros(*weights.shape[:2], n, width)
    dense[..., query, place] = weights
    keys = key.new_full((n, width), -1)
    keys[query, place] = key
    heavy, at = dense.topk(top, -1)
    chosen = keys.expand(*weights.shape[:2], n, width).gather(-1, at).where(heavy > 0, -1)
    far = (keys - torch.arange(start, start + n, device=key.device)[:, None]).abs().to(dense.dtype)
    entropy = -(dense * dense.clamp(min=torch.finfo(dense.dtype).tiny).log2()).sum(-1)
    return Rows(chosen, heavy, (dense.sum(-1) - heavy.sum(-1)).clamp(min=0), entropy, (dense * far).sum(-1))


def without_padding(rows: Rows, query_mask: Tensor) -> Rows:
    """The same, nothing for queries that are padding: bool (B, N), True for those that are not."""
    real = query_mask[:, None]
    return Rows(
        rows.keys.where(real[..., None], -1), rows.weights * real[..., None],
        *(column * real for column in (rows.rest, rows.entropy, rows.distance)),
    )  # fmt: skip


def require_top(top: int | None, gradients: bool) -> None:
    """Raise for what can't be kept of each query."""
    if top is not None and top < 1:
        raise ValueError(f"top must be 1 or more (got {shown(top)})")
    if top is not None and gradients:
        raise ValueError("top keeps numbers, not how they came about: gradients=False")
