"""A batch in which each entry has a graph of its own, as one graph: how its tensors get there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.bias import Bias, DenseBias, EdgeBias
from attngraph.graph.compose import Batched
from attngraph.planning.layouts.materialized import edges_of_heads


def takes_batch(graph: Batched, q: Tensor) -> bool:
    """Whether its entries are those of a batch of q (B, H, N, D), rather than packed in each entry of it."""
    if not isinstance(q, Tensor) or q.ndim != 4:
        return False
    n, packed_n = graph.entry_size[0], graph.size[0]
    if q.shape[2] == packed_n and (len(q) == 1 or n != packed_n):
        return False
    if len(q) != len(graph.graphs):
        raise ValueError(
            f"Batched must have one graph for each entry of the batch (got {len(graph.graphs)} for a batch of {len(q)})"
        )
    return True


def packed(x: Tensor) -> Tensor:
    """(B, H, N, …) → (1, H, B · N, …): a view of what lies in memory with the nodes first."""
    return x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)


def unpacked(x: Tensor, batch: int) -> Tensor:
    """The reverse."""
    return x.transpose(1, 2)[0].unflatten(0, (batch, -1)).transpose(1, 2)


def packed_bias(bias: Bias | None, graph: Batched, q: Tensor) -> Bias | None:
    """A bias for the packed nodes: a dense one of the entries at their edges, others as they are.

    Values of edges are in the order of the graph's own `edge_index`, that of all entries.
    """
    if not isinstance(bias, DenseBias):
        return bias
    (n, m), values = graph.entry_size, bias.values
    lead = torch.broadcast_shapes(values.shape[:-2], (len(graph.graphs), 1))
    values = values.expand(*lead, n, m)
    edges = edges_of_heads(graph, len(graph.graphs) * n, len(graph.graphs) * m, q.device)
    entry, query, key = edges.query // n, edges.query % n, edges.key % m
    return EdgeBias.sorted(values[entry, :, query, key].T)
