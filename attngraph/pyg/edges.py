"""What PyG's layers are given as `edge_index`, as a graph: edges between two sides, some of them parallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.utils import is_torch_sparse_tensor, to_edge_index

from attngraph import cache
from attngraph.graph.edge_list import EdgeList, fingerprint


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges of a layer. A graph is a set: each edge parallel to another comes from a copy of its source."""

    columns: Tensor
    """The source and the target of each edge, as they were given: int64 (2, E)."""
    graph: EdgeList
    """The same as a graph of size (num_targets, num_sources + copies)."""
    copied: Tensor | None
    """The source of each copy, int64 (copies,); None where no edges are parallel."""

    @staticmethod
    def between(columns: Tensor, num_sources: int, num_targets: int) -> Edges:
        """The edges of these columns, sorted and planned once for as long as they are among those used last.

        They are found by what they are, not by the tensor: so also the layers that add self loops of their own sort
        and plan once, and those of a loader's batch together.

        Raises IndexError for nodes that are not there.
        """
        key = fingerprint(columns), num_sources, num_targets, columns.device
        known = cache.EDGES_OF_LAYERS.get(key)
        if known is not None and torch.equal(known.columns, columns):
            return known
        with cache.outside_of_transforms():
            made = Edges._made(columns.detach().clone(), num_sources, num_targets)
        return made if known is not None else cache.EDGES_OF_LAYERS.keep(key, made)

    @staticmethod
    def _made(columns: Tensor, num_sources: int, num_targets: int) -> Edges:
        for name, nodes, count in zip(("source", "target"), columns, (num_sources, num_targets), strict=True):
            least, most = (0, -1) if not nodes.numel() else map(int, torch.aminmax(nodes))
            if least < 0 or most >= count:
                raise IndexError(
                    f"edge_index must name {name} nodes from 0 to {count - 1}, as there are {count} of them (got "
                    f"{least} … {most}): x must have a row for each node"
                )
        graph = EdgeList(columns, (num_targets, num_sources))
        if len(graph.code) == columns.shape[1]:
            return Edges(columns, graph.without_plans(), None)
        # The first of parallel edges stays; the r-th after it comes from the r-th copy of its source.
        order = graph.position.argsort(stable=True)
        place, at = graph.position[order], torch.arange(len(order), device=order.device)
        is_first = torch.ones_like(place, dtype=torch.bool)
        torch.ne(place[1:], place[:-1], out=is_first[1:])
        rank = at - torch.where(is_first, at, 0).cummax(0).values
        later = order[~is_first]
        copies, which = (rank[~is_first] * num_sources + columns[0, later]).unique(return_inverse=True)
        apart = columns.clone()
        apart[0, later] = num_sources + which
        graph = EdgeList(apart, (num_targets, num_sources + len(copies)))
        return Edges(columns, graph.without_plans(), copies % num_sources)

    def of_sources(self, x: Tensor) -> Tensor:
        """Of vectors of the sources (…, num_sources, H, D), those of their copies too."""
        return x if self.copied is None else torch.cat([x, x.index_select(-3, self.copied)], -3)

    def sorted(self, x: Tensor) -> Tensor:
        """Of values in the order in which the edges were given, (E, …), those in the order of the graph."""
        return x if self._is_sorted else x.index_select(0, self.graph.order)

    def as_given(self, x: Tensor) -> Tensor:
        """The way back, of (…, E, ·)."""
        return x if self._is_sorted else x.index_select(-2, self.graph.position)

    @property
    def _is_sorted(self) -> bool:
        return self.graph.order is self.graph.position

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, with its plans."""
        plans = self.graph.plans or {}
        own = self.columns.nbytes + sum(x.nbytes for x in (self.graph.code, self.graph.position, self.graph.order))
        return own + sum(getattr(plan, "nbytes", 0) for plan in plans.values())


def columns_of(edge_index: Any, flow: str = "source_to_target") -> Tensor:
    """The source and the target of each edge, int64 (2, E), of all that PyG takes for an `edge_index`."""
    if not isinstance(edge_index, Tensor):  # of torch_sparse: rows are targets
        target, source, _ = edge_index.coo()
        return torch.stack([source, target])
    if is_torch_sparse_tensor(edge_index):
        return to_edge_index(edge_index)[0].flip(0)
    plain = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
    plain = plain.detach().to(torch.int64)
    return plain if flow == "source_to_target" else plain.flip(0)


def num_edges(edge_index: Any) -> int:
    """How many edges it has."""
    if not isinstance(edge_index, Tensor):
        return edge_index.nnz()
    return edge_index._nnz() if is_torch_sparse_tensor(edge_index) else edge_index.shape[1]


def values_of(edge_index: Any) -> Tensor | None:
    """Values that a sparse matrix brings with its edges, for layers that are given no others; None without."""
    if not isinstance(edge_index, Tensor):
        return edge_index.storage.value()
    if is_torch_sparse_tensor(edge_index):
        values = to_edge_index(edge_index)[1]
        return values if values.ndim > 1 else None
    return None
