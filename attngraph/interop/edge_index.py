"""PyG's `edge_index` as a graph. (The way out is the graph's own `edge_index`.)"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import require_ints
from attngraph.graph.edge_list import EdgeList, integer_tensor, of_edge_index


@checked
def from_edge_index(
    edge_index: Tensor | Sequence[Sequence[int]],
    num_nodes: int | None = None,
    *,
    size: tuple[int | None, int | None] | None = None,
) -> EdgeList:
    """A graph from PyG's `edge_index` (2, E): row 0 the source = key, row 1 the target = query.

    Args:
        edge_index: the edges.
        num_nodes: how many nodes, queries and keys alike. Without it, there are as many as the largest number says
            (PyG's own rule, which loses isolated nodes at the end: give it where there may be some).
        size: of two sets of nodes, as PyG has it: (num_sources, num_targets), keys and queries. A number left out,
            None, is what the largest number says. (A graph's own `size` is the other way round, (queries, keys).)

    The graph of a tensor that lives is remembered until its numbers change: a training loop sorts its edges once. On a
    GPU, where looking at the numbers would stop the program, they change as torch counts it: not through `.data`.

    >>> from_edge_index(torch.tensor([[0, 1], [1, 2]]), num_nodes=3)
    EdgeList([[0, 1], [1, 2]], size=(3, 3))
    >>> from_edge_index(torch.tensor([[0, 6], [1, 2]]), size=(7, 3)).mask().shape  # 3 queries hear 7 keys
    torch.Size([3, 7])

    Raises:
        ValueError: both `num_nodes` and `size`, or nodes beyond them.
    """
    if size is None:
        return of_edge_index(edge_index, num_nodes)
    if num_nodes is not None:
        raise ValueError(f"give num_nodes, or size for two sets of nodes (got {num_nodes} and {size})")
    if len(size) != 2:
        raise ValueError(f"size must be (num_sources, num_targets), as in PyG (got {size!r})")
    given = integer_tensor(edge_index)
    largest = [int(side.max()) + 1 if side.numel() else 0 for side in given] if None in size else [0, 0]
    sources, targets = (least if known is None else known for known, least in zip(size, largest, strict=True))
    require_ints(0, num_sources=sources, num_targets=targets)
    for name, row, nodes, side in (("source", 0, sources, "keys"), ("target", 1, targets, "queries")):
        if given.numel() and int(given[row].max()) >= nodes:
            most = f"edge_index has a {name} {int(given[row].max())}, but size says {nodes} {name}s"
            raise ValueError(f"{most}: size is (num_sources, num_targets), as in PyG, and {name}s are {side}")
    return of_edge_index(edge_index, (targets, sources))
