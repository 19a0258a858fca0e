"""Graphs put together side by side: batches, memory beside self, one graph for each head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from attngraph.graph.algebra import normal_graphs
from attngraph.graph.base import Graph, common_size, sort_edges
from attngraph.graph.boxes import blocks_side_by_side, patterns_side_by_side, touched
from attngraph.graph.counting import Lines


@dataclass(frozen=True, repr=False)
class Disjoint(Graph):
    """Graphs side by side that do not hear each other: a batch *is* one bigger graph (packing, padding, ragged).

    The query and key nodes of each follow those of the one before. All but the last must know their size.

    >>> from attngraph import Causal, Full
    >>> Disjoint([Full().sized(1, 1), Causal().sized(2, 2)]).mask().int()
    tensor([[1, 0, 0],
            [0, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    graphs: tuple[Graph, ...]

    def check(self):
        normal_graphs(self, "graphs")
        for position, graph in enumerate(self.graphs[:-1]):
            if None in graph.size:
                raise ValueError(
                    f"Disjoint must know where each graph begins: graph {position}, {graph.text}, has size "
                    f"{graph.size}; give it one, graph.sized(num_queries, num_keys)"
                )

    def own_size(self):
        sides = zip(*(graph.size for graph in self.graphs), strict=True)
        return tuple(None if None in side else sum(side) for side in sides)

    def _placed(self, n: int | None, m: int | None):
        """Each graph with its first query, its first key and its size in n × m nodes."""
        row = column = 0
        for graph in self.graphs:
            rest = (None if n is None else max(n - row, 0), None if m is None else max(m - column, 0))
            size = tuple(r if own is None else own for own, r in zip(graph.size, rest, strict=True))
            yield graph, row, column, size
            row, column = row + (size[0] or 0), column + (size[1] or 0)

    def contains(self, q_idx, kv_idx):
        found = []
        for graph, row, column, _ in self._placed(None, None):
            query, q_inside = _inside(q_idx - row, graph.size[0])
            key, k_inside = _inside(kv_idx - column, graph.size[1])
            found.append(graph.contains(query, key) & q_inside & k_inside)
        return reduce(or_, found)

    def blocks(self, boxes):
        return blocks_side_by_side(self._placed(None, None), boxes)

    def pattern(self, boxes):
        return patterns_side_by_side([part[:4] for part in touched(self._placed(None, None), boxes)], boxes)

    @property
    def scattered(self):
        return all(graph.scattered for graph in self.graphs)

    def lines(self, n, m):
        parts = []
        for graph, row, column, size in self._placed(n, m):
            inner = graph.lines(*size)
            parts += [inner and inner.shifted(row, column), Lines(frozenset({row}), frozenset({column}))]
        return Lines.union(parts)

    def edges(self, n, m):
        parts = [(*graph.list_edges(*size), row, column) for graph, row, column, size in self._placed(n, m)]
        return (
            torch.cat([query + row for query, _, row, _ in parts]),
            torch.cat([key + column for _, key, _, column in parts]),
        )

    def count(self, n, m):
        return sum(graph.count_edges(*size) for graph, _, _, size in self._placed(n, m))

    def bind(self, n, m):
        return Disjoint(tuple(graph.bind(*size) for graph, _, _, size in self._placed(n, m)))


@dataclass(frozen=True, repr=False)
class Beside(Graph):
    """The keys of a, then the keys of b, both heard by the same queries: memory | self.

    >>> from attngraph import Causal, Full
    >>> Beside(Full().sized(None, 2), Causal()).mask(2, 4).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """

    a: Graph
    b: Graph

    def check(self):
        common_size("the graphs of Beside(a, b)", self.a.size[:1], self.b.size[:1])
        if self.a.size[1] is None:
            raise ValueError(
                f"Beside(a, b) must know where the keys of b begin: a, {self.a.text}, has size {self.a.size}; "
                f"give it a number of keys, a.sized(None, num_keys)"
            )

    def own_size(self):
        queries = common_size("graphs", self.a.size[:1], self.b.size[:1])[0]
        return (queries, None if self.b.size[1] is None else self.a.size[1] + self.b.size[1])

    def contains(self, q_idx, kv_idx):
        in_a, a_inside = _inside(kv_idx, self.a.size[1])
        in_b, b_inside = _inside(kv_idx - self.a.size[1], self.b.size[1])
        return (self.a.contains(q_idx, in_a) & a_inside) | (self.b.contains(q_idx, in_b) & b_inside)

    def _placed(self):
        yield self.a, 0, 0, self.a.size
        yield self.b, 0, self.a.size[1], self.b.size

    def blocks(self, boxes):
        return blocks_side_by_side(self._placed(), boxes)

    def pattern(self, boxes):
        return patterns_side_by_side([part[:4] for part in touched(self._placed(), boxes)], boxes)

    @property
    def scattered(self):
        return self.a.scattered and self.b.scattered

    def lines(self, n, m):
        keys = self.a.size[1]
        a, b = self.a.lines(n, keys), self.b.lines(n, max(m - keys, 0))
        return Lines.union([a, b and b.shifted(columns=keys), Lines(columns=frozenset({keys}))])

    def edges(self, n, m):
        keys = self.a.size[1]
        (q_a, k_a), (q_b, k_b) = self.a.list_edges(n, keys), self.b.list_edges(n, max(m - keys, 0))
        return sort_edges(torch.cat([q_a, q_b]), torch.cat([k_a, k_b + keys]), m)

    def count(self, n, m):
        keys = self.a.size[1]
        return self.a.count_edges(n, keys) + self.b.count_edges(n, max(m - keys, 0))

    def bind(self, n, m):
        keys = self.a.size[1]
        return Beside(self.a.bind(n, keys), self.b.bind(n, None if m is None else max(m - keys, 0)))


@dataclass(frozen=True, repr=False)
class PerHead(Graph):
    """One graph for each head: its mask is (H, n, m). It combines with other graphs as any graph does.

    >>> from attngraph import Causal, Window
    >>> graph = PerHead([Window(1, 0), Window(2, 0)]) & Causal()
    >>> graph.heads, graph.mask(3, 3).shape
    (2, torch.Size([2, 3, 3]))
    """

    graphs: tuple[Graph, ...]

    def check(self):
        if any(graph.heads for graph in normal_graphs(self, "graphs")):
            raise ValueError("PerHead takes one graph for each head, without heads of its own")
        common_size("the graphs of PerHead", *(graph.size for graph in self.graphs))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "heads", len(self.graphs))

    def own_size(self):
        return common_size("graphs", *(graph.size for graph in self.graphs))

    def contains(self, q_idx, kv_idx):
        return torch.stack([graph.contains(q_idx, kv_idx) for graph in self.graphs])

    def head(self, index):
        return self.graphs[index]


def _inside(index: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Node numbers moved into 0 … count-1, and which of them were there before."""
    moved = index.clamp(min=0) if count is None else index.clamp(0, max(count - 1, 0))
    return moved, moved == index if count != 0 else index != index
