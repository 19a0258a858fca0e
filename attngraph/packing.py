"""A batch in which each entry, or each head of it, has a graph of its own, as one graph: how its tensors get there and
back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.bias import Bias, DenseBias, EdgeBias
from attngraph.graph.base import Graph
from attngraph.graph.compose import Batched
from attngraph.graph.dynamic import side_by_side
from attngraph.graph.edge_list import EdgeList
from attngraph.planning.backends import choices_by
from attngraph.planning.layouts.materialized import edges_of_heads


def entries_of(graph: object) -> int | None:
    """How many entries of a batch have graphs of their own; None: one graph is for all."""
    if isinstance(graph, Batched):
        return len(graph.graphs)
    return graph.entries if isinstance(graph, EdgeList) else None


def entry_size(graph: Graph) -> tuple[int, int]:
    """How many queries and keys each entry has."""
    (n, m), entries = graph.size, entries_of(graph)
    assert n is not None
    assert m is not None
    assert entries is not None
    return n // entries, m // entries


def takes_batch(graph: object, q: Tensor) -> bool:
    """Whether it has entries that are those of a batch of q (B, H, N, D), rather than packed in each entry of it."""
    entries = entries_of(graph)
    if entries is None or not isinstance(graph, Graph) or not isinstance(q, Tensor) or q.ndim != 4:
        return False
    n, packed_n = entry_size(graph)[0], graph.size[0]
    if q.shape[2] == packed_n and (len(q) == 1 or n != packed_n):
        return False
    if len(q) != entries:
        name = type(graph).__name__
        raise ValueError(
            f"{name} must have one graph for each entry of the batch (got {entries} for a batch of {len(q)})"
        )
    return True


def packed(x: Tensor) -> Tensor:
    """(B, H, N, …) → (1, H, B · N, …): a view of what lies in memory with the nodes first."""
    return x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def unpacked(x: Tensor, batch: int) -> Tensor:
    """The reverse."""
    return x.transpose(1, 2)[0].unflatten(0, (batch, -1)).transpose(1, 2)


def packed_bias(bias: Bias | None, graph: Graph, q: Tensor) -> Bias | None:
    """A bias for the packed nodes: a dense one of the entries at their edges, others as they are.

    Values of edges are in the order of the graph's own `edge_index`, that of all entries.
    """
    if not isinstance(bias, DenseBias):
        return bias
    (n, m), entries, values = entry_size(graph), entries_of(graph) or 1, bias.values
    values = values.expand(*torch.broadcast_shapes(values.shape[:-2], (entries, 1)), n, m)
    edges = edges_of_heads(graph, entries * n, entries * m, q.device)
    entry, query, key = edges.query // n, edges.query % n, edges.key % m
    return EdgeBias.sorted(values[entry, :, query, key].T)


class Folded(NamedTuple):
    """All heads of all entries as the nodes of one head of one entry, with the graph that queries and keys choose."""

    graph: Graph
    num_queries: int
    """Of each head, filled up to whole blocks; and keys."""
    num_keys: int
    batch: int
    heads: int

    @staticmethod
    def of(graph: Graph, q: Tensor, k: Tensor, attention_mask: Tensor | None) -> Folded:
        """Of queries (B, H, N, D) and keys (B, Hkv, M, D), of a graph that `may_be_one`."""
        return Folded(*side_by_side(graph, q, k, attention_mask, choices_by(q)), *q.shape[:2])

    def queries(self, x: Tensor) -> Tensor:
        """(B, H, N, D) → (1, 1, B · H · num_queries, D)."""
        return _filled_up(x, self.num_queries).flatten(0, 2)[None, None]

    def keys(self, x: Tensor) -> Tensor:
        """(B, Hkv, M, D) → (1, 1, B · H · num_keys, D)."""
        x = x.repeat_interleave(self.heads // x.shape[1], 1) if x.shape[1] < self.heads else x
        return _filled_up(x, self.num_keys).flatten(0, 2)[None, None]

    def mask(self, attention_mask: Tensor | None, k: Tensor) -> Tensor | None:
        """(B, M) → (1, B · H · num_keys); None where all keys of k are real and none were added."""
        more = self.num_keys - k.shape[2]
        if attention_mask is None and not more:
            return None
        real = k.new_ones(len(k), k.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask
        return pad(real, (0, more))[:, None].expand(-1, self.heads, -1).flatten()[None]

    def of_heads(self, x: Tensor, num_queries: int) -> Tensor:
        """(1, 1, B · H · num_queries, …) → (B, H, N, …), without those that were added."""
        return x[0, 0].unflatten(0, (self.batch, self.heads, self.num_queries))[:, :, :num_queries]


def _filled_up(x: Tensor, nodes: int) -> Tensor:
    """(B, H, N, D) with zeros for the nodes that are missing."""
    return pad(x, (0, 0, 0, nodes - x.shape[2])) if nodes > x.shape[2] else x
