"""Where a node stands in a graph that has no order: how likely random walks from it are to be back."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.analysis import components
from attngraph.arguments import checked
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.packing import entries_of

AT_ONCE = 1 << 22  # numbers that are kept at a time: 16 MiB


@checked
def random_walk_positions(graph: Graph, steps: int, n: int | None = None) -> Tensor:
    """How likely a random walk from each node is to be back after 1, 2, … `steps` steps: (n, steps).

    P[i, s - 1] = (Rˢ)[i, i], where R[k, q] = 1 / (how many queries hear k) for each edge k → q: a walk follows edges
    as messages do, each out of a node as likely, and ends at a node that nobody hears. A graph's own loops are edges.
    Appended to what nodes are, or added to it by a linear layer, they tell apart nodes and graphs that message passing
    alone can't, and name the nodes in no order (Dwivedi et al. 2022, the positional encoding RWPE).

    A batch of graphs, as `Disjoint` or as `collate` packs them, is a graph: what each node gets is that of its own. Of
    a graph for each entry, `Batched` or an `EdgeList` with `entries`, they are (B, N, steps), 0 for nodes that fill up.
    `n` is the number of nodes of a graph that doesn't know its own.

    It takes steps · edges · (nodes of the largest component) multiplications: compute it once for each graph.

    >>> from attngraph import Disjoint, Documents, Identity, Window
    >>> triangle, path = Documents([3]) - Identity(), (Window(1, 1) - Identity()).sized(3, 3)
    >>> random_walk_positions(Disjoint([triangle, path]), 3)
    tensor([[0.0000, 0.5000, 0.2500],
            [0.0000, 0.5000, 0.2500],
            [0.0000, 0.5000, 0.2500],
            [0.0000, 0.5000, 0.0000],
            [0.0000, 1.0000, 0.0000],
            [0.0000, 0.5000, 0.0000]])

    Raises ValueError for a graph of other keys than queries, or of heads that differ.
    """
    require_ints(1, steps=steps)
    entries = entries_of(graph)
    graph, n, m = at_size(graph, n)
    if graph.heads:
        raise ValueError(f"graph must be one for all heads (got one for each of {graph.heads}): graph.of_head(0)")
    if n != m:
        raise ValueError(f"graph must have as many queries as keys, which are the same nodes (got {n} and {m})")
    key, query = graph.edge_index(n, n)
    chance = 1.0 / torch.bincount(key, minlength=n)[key]
    edges = torch.stack([query, key])  # sorted, each once
    walk = torch.sparse_coo_tensor(edges, chance, (n, n), is_coalesced=True, check_invariants=False)
    column = _places(components(graph, n))  # walks of different components never meet, and share a column
    found, width = chance.new_zeros(n, steps), max(1, AT_ONCE // max(n, 1))
    for first in range(0, int(column.max()) + 1 if n else 0, width):
        (node,) = ((column >= first) & (column < first + width)).nonzero(as_tuple=True)
        start = column[node] - first
        at = chance.new_zeros(n, int(start.max()) + 1)  # how likely the walk of each column is to be at each node
        at[node, start] = 1
        for step in range(steps):
            at = walk @ at
            found[node, step] = at[node, start]
    return found if entries is None else found.unflatten(0, (entries, -1))


def _places(group: Tensor) -> Tensor:
    """The place of each node among those of its group, whose numbers are from 0: int64 (n,)."""
    order, counts = group.argsort(stable=True), torch.bincount(group)
    begins = counts.cumsum(0) - counts
    places = torch.empty_like(group)
    places[order] = torch.arange(len(group), device=group.device) - begins[group[order]]
    return places
