"""Graphs put together side by side: batches, memory beside self, one graph for each head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.algebra import Empty, Sized, normal_graphs
from attngraph.graph.base import Graph, Size, bind, common_size, require_ints
from attngraph.graph.boxes import PARTIAL, Boxes, SideBySide, require_memory
from attngraph.graph.counting import Breakpoints
from attngraph.graph.edge_list import EdgeList, of_sorted
from attngraph.graph.listing import BYTES_PER_EDGE, count_edges, list_edges, no_edges, sort_edges
from attngraph.graph.values import plain_int

if TYPE_CHECKING:
    from attngraph.graph.boxes import Placed

FEW = 4  # different graphs side by side that are each asked about all pairs


class Disjoint(Graph):
    """Graphs side by side that do not hear each other: a batch *is* one bigger graph (packing, padding, ragged).

    The query and key nodes of each follow those of the one before. All but the last must know their size.

    >>> from attngraph import Causal, Full
    >>> Disjoint([Full().sized(1, 1), Causal().sized(2, 2)]).mask().int()
    tensor([[1, 0, 0],
            [0, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    graphs: Sequence[Graph]

    def _check(self):
        normal_graphs(self, "graphs")
        for position, graph in enumerate(self.graphs[:-1]):
            if None in graph.size:
                raise ValueError(
                    f"Disjoint must know where each graph begins: graph {position}, {graph}, has size "
                    f"{graph.size}; give it one, graph.sized(num_queries, num_keys)"
                )

    def _own_size(self):
        queries, keys = zip(*(graph.size for graph in self.graphs), strict=True)
        return _sum(queries), _sum(keys)

    def _own_places(self):
        placed = list(self._placed(None, None))
        if all(row == column and not graph._places for graph, row, column, _ in placed):
            return ()
        begins = ((place, column - row) for graph, row, column, _ in placed for place in graph._places or (0,))
        return tuple(dict.fromkeys(None if place is None else place + ahead for place, ahead in begins))

    def _placed(self, n: int | None, m: int | None) -> Iterator[tuple[Graph, int, int, Size]]:
        """Each graph with its first query, its first key and its size in n × m nodes."""
        row = column = 0
        for graph in self.graphs:
            rest = (None if n is None else max(n - row, 0), None if m is None else max(m - column, 0))
            size = (
                rest[0] if graph.size[0] is None else graph.size[0],
                rest[1] if graph.size[1] is None else graph.size[1],
            )
            yield graph, row, column, size
            row, column = row + (size[0] or 0), column + (size[1] or 0)

    def _placed_in(self, n: int, m: int) -> Iterator[tuple[Graph, int, int, tuple[int, int]]]:
        """The same in a definite number of nodes."""
        for graph, row, column, size in self._placed(n, m):
            yield graph, row, column, cast(tuple[int, int], size)

    @cached_property
    def _side_by_side(self) -> SideBySide:
        return _side_by_side(self._placed(None, None))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        parts = self._side_by_side.on(q_idx.device)
        of_query, of_key = parts.of_query(q_idx), parts.of_key(kv_idx)
        query, key = q_idx - parts.row[of_query], kv_idx - parts.column[of_key]
        together = (of_query == of_key) & (of_query < len(parts.kind) - 1)
        heads = () if self.heads is None else (self.heads,)
        found = torch.zeros(*heads, *together.shape, dtype=torch.bool, device=q_idx.device)
        if len(parts.graphs) <= FEW:  # all pairs at once: nodes of other parts are looked at as node 0
            for kind, graph in enumerate(parts.graphs):
                own_q, own_k = parts.kind[of_query] == kind, parts.kind[of_key] == kind
                inside = graph.contains(torch.where(own_q, query, 0), torch.where(own_k, key, 0))
                found |= inside & together & own_q
            return found
        query, key, kind = (side.expand(together.shape)[together] for side in (query, key, parts.kind[of_query]))
        inside = found[..., together]
        for graph, pairs in parts.each_kind(kind):
            inside[..., pairs] = graph.contains(query[pairs], key[pairs])
        found[..., together] = inside
        return found

    def _classify_boxes(self, boxes):
        return self._side_by_side.classify(boxes)

    def _box_pattern(self, boxes):
        return self._side_by_side.pattern(boxes)

    def _split(self, n, m, is_listed):
        rests, listed = [], []
        for graph, row, column, size in self._placed_in(n, m):
            rest, lists = graph._split(*size, is_listed)
            rests.append(rest)
            listed += [each.moved(row, column) for each in lists]
        changed = any(rest is not graph for rest, graph in zip(rests, self.graphs, strict=True))
        return Disjoint(tuple(rests)) if changed else self, tuple(listed)

    def _breakpoints(self, n, m):
        parts = []
        for graph, row, column, size in self._placed_in(n, m):
            inner = graph._breakpoints(*size)
            parts += [inner and inner.shifted(row, column), Breakpoints(frozenset({row}), frozenset({column}))]
        return Breakpoints.union(parts)

    def _edges(self, n, m):
        parts = [(*list_edges(graph, *size), row, column) for graph, row, column, size in self._placed_in(n, m)]
        return (
            torch.cat([query + row for query, _, row, _ in parts]),
            torch.cat([key + column for _, key, _, column in parts]),
        )

    def _count(self, n, m):
        return sum(count_edges(graph, *size) for graph, _, _, size in self._placed_in(n, m))

    def _bind(self, n, m):
        return Disjoint(tuple(bind(graph, *size) for graph, _, _, size in self._placed(n, m)))

    def as_list(self) -> EdgeList | None:
        """Of lists of edges, the same as one; None where there are others among them."""
        parts, columns = [], cast(int, self.size[1])
        for graph, row, column, _ in self._placed(None, None):
            own = graph.as_list() if isinstance(graph, Disjoint) else graph
            if isinstance(own, EdgeList):
                parts.append((own.query + row) * columns + own.key + column)
            elif type(own) is not Empty and not (type(own) is Sized and type(own.graph) is Empty):
                return None
        return of_sorted(torch.cat(parts), cast(tuple[int, int], self.size)) if parts else None


class Batched(Disjoint):
    """A graph of its own for each entry of a batch: molecules, documents, sentences; smaller ones are filled up.

    `attend` and models take it with vectors (B, H, N, D) or (B, N, D), where N are the nodes of the largest; the nodes
    past those of an entry hear nobody, and nobody hears them. As a graph, it is what runs: all entries side by side,
    `Disjoint`, in B · N nodes, by which its `edge_index` and dropout number them; vectors of so many nodes are packed
    already. A score of your own sees them packed, as one entry. Operators give a graph of B · N nodes, not `Batched`.

    >>> from attngraph import Causal, Full
    >>> batch = Batched([Causal().sized(3, 3), Full().sized(2, 2)])
    >>> len(batch.graphs), batch.entry_size, batch.num_edges()
    (2, (3, 3), 10)
    """

    def _check(self):
        super()._check()
        if None in self.graphs[-1].size:
            raise ValueError(
                f"Batched must know the size of each graph (got {self.graphs[-1]} as the last): "
                f"graph.sized(num_queries, num_keys)"
            )
        n, m = (max(cast(int, graph.size[side]) for graph in self.graphs) for side in (0, 1))
        object.__setattr__(self, "graphs", tuple(_filled_up(graph, n, m) for graph in self.graphs))

    @property
    def entry_size(self) -> tuple[int, int]:
        """How many queries and keys each entry has, filled up."""
        return cast(tuple[int, int], self.graphs[0].size)


def _filled_up(graph: Graph, n: int, m: int) -> Graph:
    """A graph with further nodes that have no edges."""
    own_n, own_m = cast(tuple[int, int], graph.size)
    return graph if (own_n, own_m) == (n, m) else Disjoint((graph, Empty().sized(n - own_n, m - own_m)))


class Beside(Graph):
    """The keys of a, then the keys of b, both heard by the same queries: memory | self.

    >>> from attngraph import Causal, Full
    >>> Beside(Full().sized(None, 2), Causal()).mask(2, 4).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """

    a: Graph
    b: Graph

    def _check(self):
        common_size(lambda: "the graphs of Beside(a, b)", (self.a.size[0], None), (self.b.size[0], None))
        if self.a.size[1] is None:
            raise ValueError(
                f"Beside(a, b) must know where the keys of b begin: a, {self.a}, has size {self.a.size}; "
                f"give it a number of keys, a.sized(None, num_keys)"
            )

    def _own_size(self):
        queries = common_size(lambda: "graphs", (self.a.size[0], None), (self.b.size[0], None))[0]
        return (queries, None if self.b.size[1] is None else self._first + self.b.size[1])

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        in_a, a_inside = _inside(kv_idx, self.a.size[1])
        in_b, b_inside = _inside(kv_idx - self._first, self.b.size[1])
        return (self.a.contains(q_idx, in_a) & a_inside) | (self.b.contains(q_idx, in_b) & b_inside)

    def _own_places(self):
        return tuple(None if place is None else self._first + place for place in self.b._places or (0,))

    @property
    def _first(self) -> int:
        """The first key of b."""
        return cast(int, self.a.size[1])

    @cached_property
    def _side_by_side(self) -> SideBySide:
        n, first = self.size[0], self._first
        return _side_by_side([(self.a, 0, 0, (n, first)), (self.b, 0, first, (n, self.b.size[1]))])

    def _classify_boxes(self, boxes):
        return self._side_by_side.classify(boxes)

    def _box_pattern(self, boxes):
        return self._side_by_side.pattern(boxes)

    def _breakpoints(self, n, m):
        keys = self._first
        a, b = self.a._breakpoints(n, keys), self.b._breakpoints(n, max(m - keys, 0))
        return Breakpoints.union([a, b and b.shifted(columns=keys), Breakpoints(columns=frozenset({keys}))])

    def _split(self, n, m, is_listed):
        keys = self._first
        (a, of_a), (b, of_b) = self.a._split(n, keys, is_listed), self.b._split(n, max(m - keys, 0), is_listed)
        rest = self if a is self.a and b is self.b else Beside(a, b)
        return rest, (*of_a, *(each.moved(0, keys) for each in of_b))

    def _edges(self, n, m):
        keys = self._first
        (q_a, k_a), (q_b, k_b) = list_edges(self.a, n, keys), list_edges(self.b, n, max(m - keys, 0))
        return sort_edges(torch.cat([q_a, q_b]), torch.cat([k_a, k_b + keys]), m)

    def _count(self, n, m):
        keys = self._first
        return count_edges(self.a, n, keys) + count_edges(self.b, n, max(m - keys, 0))

    def _bind(self, n, m):
        keys = self._first
        return Beside(bind(self.a, n, keys), bind(self.b, n, None if m is None else max(m - keys, 0)))


@checked
def above(a: Graph, b: Graph) -> Graph:
    """The queries of a, then the queries of b, of the same keys: `Beside(a.T, b.T).T`, rows where that has columns.

    Its n_a + n_b queries are one call: notes and tokens that read the same text, say, each by a graph of its own.
    a must know how many queries it has.

    >>> from attngraph import Causal, Full
    >>> above(Full().sized(1, None), Causal()).mask(4, 3).int()
    tensor([[1, 1, 1],
            [1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    common_size(lambda: "the graphs of above(a, b)", (None, a.size[1]), (None, b.size[1]))
    if a.size[0] is None:
        raise ValueError(
            f"above(a, b) must know where the queries of b begin: a, {a}, has size {a.size}; "
            f"give it a number of queries, a.sized(num_queries, None)"
        )
    return Beside(a.T, b.T).T


class Blocks(Graph):
    """Nodes in blocks: a query hears all keys of the blocks that its own block hears in `graph`.

    `block` is how many nodes a block has, one number or (queries, keys); where the last has fewer, say how many nodes
    there are. This is the Kronecker product of the graph's adjacency with a block of ones: what block-sparse attention
    is configured by.

    >>> Blocks(EdgeList([[0, 0], [0, 1]], size=2), 2, num_queries=3, num_keys=3).mask().int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 0]], dtype=torch.int32)
    """

    graph: Graph
    block: int | tuple[int, int]
    num_queries: int | None = None
    num_keys: int | None = None

    def _check(self):
        sides = self.block if isinstance(self.block, tuple | list) else (self.block, self.block)
        if len(sides) != 2:
            raise ValueError(f"block must be a number of nodes, or (queries, keys) (got {self.block!r})")
        for side in (sides := tuple(map(plain_int, sides))):
            require_ints(1, block=side)
        self._set(block=sides)
        counts = {"num_queries": self.num_queries, "num_keys": self.num_keys}
        require_ints(0, **{name: count for name, count in counts.items() if count is not None})
        common_size(lambda: f"blocks of {sides} nodes and their graph", self._in_all(*counts.values()), self.graph.size)

    def _own_size(self):
        n, m = self.num_queries, self.num_keys
        (rows, columns), (queries, keys) = self.graph.size, self._sides
        n = rows * queries if n is None and rows is not None else n
        return n, columns * keys if m is None and columns is not None else m

    def _in_all(self, n: int | None, m: int | None) -> Size:
        """How many blocks so many nodes make."""
        queries, keys = self._sides
        return None if n is None else -(-n // queries), None if m is None else -(-m // keys)

    @property
    def _sides(self) -> tuple[int, int]:
        return cast(tuple[int, int], self.block)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        queries, keys = self._sides
        return self.graph.contains(q_idx // queries, kv_idx // keys)

    def _own_places(self):
        queries, keys = self._sides
        if queries != keys:
            return () if not self.graph._places else (None,)
        return tuple(None if place is None else place * keys for place in self.graph._places)

    def _waits(self):
        return None not in self.graph.size or self.graph._unbound

    def _bind(self, n, m):
        n, m = common_size(lambda: f"graph {self} and its size", self.size, (n, m))
        bound = self._map(bind, *self._in_all(n, m))
        return self if bound is self else replace(bound, num_queries=n, num_keys=m)  # the last blocks may be smaller

    def _in_blocks(self, boxes: Boxes) -> Boxes:
        """The blocks that boxes touch."""
        queries, keys = self._sides
        return Boxes(boxes.top // queries, -(-boxes.bottom // queries), boxes.left // keys, -(-boxes.right // keys))

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(self._in_blocks(boxes))

    def _box_pattern(self, boxes):
        queries, keys = self._sides
        return [boxes.top % queries, boxes.left % keys, *self.graph._box_pattern(self._in_blocks(boxes))]

    def _listed(self, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The edges of the blocks, and how many queries and keys the two blocks of each have: each int64 (blocks,)."""
        queries, keys = self._sides
        query, key = list_edges(self.graph, -(-n // queries), -(-m // keys))
        return query, key, (n - query * queries).clamp(max=queries), (m - key * keys).clamp(max=keys)

    def _edges(self, n, m):
        queries, keys = self._sides
        query, key, high, wide = self._listed(n, m)
        require_memory(int((high * wide).sum()) * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        row, column = torch.arange(queries)[:, None], torch.arange(keys)
        inside = (row < high[:, None, None]) & (column < wide[:, None, None])
        every = torch.broadcast_tensors((query * queries)[:, None, None] + row, (key * keys)[:, None, None] + column)
        return sort_edges(every[0][inside], every[1][inside], m)

    def _edges_of_rows(self, start, stop, n, m):
        if stop <= start:
            return no_edges()
        queries, keys = self._sides
        first, last = start // queries, -(-stop // queries)
        query, key = self.graph._edges_of_rows(first, last, -(-n // queries), -(-m // keys))
        some = Blocks(of_sorted(query * -(-m // keys) + key, (last - first, -(-m // keys))), self.block)
        query, key = some._edges(min(last * queries, n) - first * queries, m)
        query = query - (start - first * queries)
        inside = (query >= 0) & (query < stop - start)
        return query[inside], key[inside]

    def _count(self, n, m):
        _, _, high, wide = self._listed(n, m)
        return int((high * wide).sum())

    def _write(self, inner):
        queries, keys = self._sides
        text = f"{inner(self.graph)}, {queries if queries == keys else [queries, keys]}"
        given = (self.num_queries, self.num_keys) != (None, None)
        return f"Blocks({text}, {self.num_queries}, {self.num_keys})" if given else f"Blocks({text})"


class PerHead(Graph):
    """One graph for each head: its mask is (H, n, m). It combines with other graphs as any graph does.

    >>> from attngraph import Causal, Window
    >>> graph = PerHead([Window(1, 0), Window(2, 0)]) & Causal()
    >>> graph.heads, graph.mask(3, 3).shape
    (2, torch.Size([2, 3, 3]))
    """

    graphs: Sequence[Graph]

    def _check(self):
        if any(graph.heads for graph in normal_graphs(self, "graphs")):
            raise ValueError("PerHead takes one graph for each head, without heads of its own")
        common_size(lambda: "the graphs of PerHead", *(graph.size for graph in self.graphs))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "heads", len(self.graphs))

    def _own_size(self):
        return common_size(lambda: "graphs", *(graph.size for graph in self.graphs))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.stack([graph.contains(q_idx, kv_idx) for graph in self.graphs])

    def _classify_boxes(self, boxes):
        kinds = torch.stack([graph._classify_boxes(boxes) for graph in self.graphs])
        return torch.where(kinds.amin(0) == kinds.amax(0), kinds[0], PARTIAL)

    def _head(self, index):
        return self.graphs[index].sized(*self.size)


def _side_by_side(placed: Placed) -> SideBySide:
    """Graphs side by side; those that need no size to be told are the same in all sizes."""
    return SideBySide.of(
        (graph.graph if type(graph) is Sized and not graph._unbound else graph, row, column, size)
        for graph, row, column, size in placed
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    """The sum of counts, if all are known."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _inside(index: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Node numbers moved into 0 … count-1, and which of them were there before."""
    moved = index.clamp(min=0) if count is None else index.clamp(0, max(count - 1, 0))
    return moved, moved == index if count != 0 else index != index
