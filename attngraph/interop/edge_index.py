"""PyG's `edge_index` as a graph. (The way out is the graph's own `edge_index`.)"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.edge_list import EdgeList, of_edge_index


@checked
def from_edge_index(
    edge_index: Tensor | Sequence[Sequence[int]], num_nodes: int | tuple[int, int] | None = None
) -> EdgeList:
    """A graph from PyG's `edge_index` (2, E): row 0 the source = key, row 1 the target = query.

    `num_nodes` is the number of nodes, queries and keys alike, or a pair (num_queries, num_keys) where these are two
    sets of nodes. Without it, there are as many nodes as the largest number says (PyG's own rule, which loses isolated
    nodes at the end: give it where there may be some).

    The graph of a tensor that lives is remembered until its numbers change: a training loop sorts its edges once. On a
    GPU, where looking at the numbers would stop the program, they change as torch counts it: not through `.data`.

    >>> from_edge_index(torch.tensor([[0, 1], [1, 2]]), num_nodes=3)
    EdgeList([[0, 1], [1, 2]], size=(3, 3))
    """
    return of_edge_index(edge_index, num_nodes)
