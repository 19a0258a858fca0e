"""The algebra of graphs: what the operators on `Graph` build. Each class is one operation on sets of edges.

Of connectivity it knows all and nothing, its unit and its zero; the rest is in `attngraph.graph.patterns`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from operator import and_, or_, xor
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from attngraph.graph import counting
from attngraph.graph.base import Edges, Graph, bind, common_size, require_ints
from attngraph.graph.boxes import (
    EMPTY,
    FULL,
    PARTIAL,
    Boxes,
    SideBySide,
    classify,
    constant_class,
    require_memory,
    row_ids,
)
from attngraph.graph.counting import Breakpoints, stretches
from attngraph.graph.listing import (
    BYTES_PER_EDGE,
    IsListed,
    Listed,
    Split,
    count_edges,
    has_lists_alone,
    list_edges,
    merge_edges,
    sort_edges,
)
from attngraph.graph.sharing import moved

PAIRS_PER_EDGE = 16  # pairs that can be looked at for what listing an edge costs
MANY_NUMBERS = 16  # of a pattern, for which one number is taken that tells as much
PATHS_AT_ONCE = 1 << 22  # paths of two hops that are looked at in one step
PAIRS_LOOKED_AT = 1 << 22  # of nodes and those between two hops, as a matrix; for more, all edges are listed once

# ------------------------------------------------------------------------------------------- all and nothing


class Full(Graph):
    """Everyone hears everyone: BERT, the encoder, ViT.

    >>> Full().mask(2, 3).int()
    tensor([[1, 1, 1],
            [1, 1, 1]], dtype=torch.int32)
    """

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 0) & (kv_idx >= 0)

    def _classify_boxes(self, boxes):
        return constant_class(boxes, FULL)

    def _box_pattern(self, boxes):
        return []

    def _breakpoints(self, n, m):
        return Breakpoints()


class Empty(Graph):
    """Nobody hears anybody.

    >>> Empty().num_edges(5, 5)
    0
    """

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx < 0) & (kv_idx < 0)

    def _classify_boxes(self, boxes):
        return constant_class(boxes, EMPTY)

    def _box_pattern(self, boxes):
        return []

    def _breakpoints(self, n, m):
        return Breakpoints()


# ------------------------------------------------------------------------------------------------ pair by pair


class _Pointwise(Graph):
    """A combination of graphs of one size by an operator on booleans."""

    graphs: Sequence[Graph]

    symbol: ClassVar[str]
    operator: ClassVar[Callable[[Any, Any], Any]]
    combine: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def _check(self):
        normal_graphs(self, "graphs")
        common_size(lambda: f"graphs combined with {self.symbol}", *(graph.size for graph in self.graphs))

    def _own_size(self):
        return common_size(lambda: "graphs", *(graph.size for graph in self.graphs))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = self.graphs[0].contains(q_idx, kv_idx)
        for graph in self.graphs[1:]:
            found = type(self).operator(found, graph.contains(q_idx, kv_idx))
        return found

    def _breakpoints(self, n, m):
        return Breakpoints.union([graph._breakpoints(n, m) for graph in self.graphs])

    def _write(self, inner):
        return f" {self.symbol} ".join(_operand(graph, inner, self) for graph in self.graphs)

    def _classify_boxes(self, boxes):
        found = self.graphs[0]._classify_boxes(boxes)
        for graph in self.graphs[1:]:
            found = type(self).combine(found, graph._classify_boxes(boxes))
        return found

    def _box_pattern(self, boxes):
        numbers = [number for graph in self.graphs for number in _patterns_where_partial(graph, boxes)]
        return numbers if len(numbers) <= MANY_NUMBERS else [row_ids(numbers)]

    def _split(self, n, m, is_listed):
        return _combined(self, [graph._split(n, m, is_listed) for graph in self.graphs])

    def _edges_of_rows(self, start, stop, n, m):
        sliced = type(self)(tuple(QuerySlice(graph, start, stop) for graph in self.graphs))
        return list_edges(sliced, stop - start, m)

    def _among(self, graphs: Sequence[Graph], n: int, m: int) -> Edges:
        """The edges, looked for among those of one of some graphs that each have them all, if it has few itself."""
        most = [_most_edges(graph._split(n, m, has_lists_alone), n, m) for graph in graphs]
        if not _is_few(min(most), n, m):
            return Graph._edges(self, n, m)
        query, key = list_edges(graphs[most.index(min(most))], n, m)
        kept = self.contains(query, key)
        return query[kept], key[kept]


class Union(_Pointwise):
    """``a | b``: the edges of either."""

    symbol, _precedence, operator, combine = "|", 0, staticmethod(or_), staticmethod(torch.maximum)


class SymmetricDifference(_Pointwise):
    """``a ^ b``: the edges of one of the two."""

    symbol, _precedence, operator = "^", 1, staticmethod(xor)
    combine = staticmethod(lambda a, b: torch.where((a == PARTIAL) | (b == PARTIAL), PARTIAL, (a - b).abs()))


class Intersection(_Pointwise):
    """``a & b``: the edges of both."""

    symbol, _precedence, operator, combine = "&", 2, staticmethod(and_), staticmethod(torch.minimum)

    def _split(self, n, m, is_listed):
        parts = [graph._split(n, m, is_listed) for graph in self.graphs]
        lists = [listed for rest, listed in parts if is_nothing(rest)]
        if lists:  # no edge lies outside of any of them
            return nothing(self), min(lists, key=lambda listed: sum(each.cost for each in listed))
        return _among_few(self, n, m, is_listed, parts, parts)

    def _edges(self, n, m):
        return self._among(self.graphs, n, m)


class Difference(_Pointwise):
    """``a - b``: the edges of a that b lacks."""

    symbol, _precedence, operator = "-", 3, staticmethod(lambda a, b: a & ~b)
    combine = staticmethod(lambda a, b: torch.minimum(a, FULL - b))

    def _split(self, n, m, is_listed):
        parts = [graph._split(n, m, is_listed) for graph in self.graphs]
        if is_nothing(parts[0][0]):
            return nothing(self), parts[0][1]
        return _among_few(self, n, m, is_listed, parts, parts[:1])

    def _edges(self, n, m):
        return self._among(self.graphs[:1], n, m)


class Complement(Graph):
    """``~a``: the pairs that are no edges."""

    graph: Graph
    _precedence = 5

    def _own_size(self):
        return self.graph.size

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~self.graph.contains(q_idx, kv_idx)

    def _classify_boxes(self, boxes):
        return FULL - self.graph._classify_boxes(boxes)

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes)

    def _breakpoints(self, n, m):
        return self.graph._breakpoints(n, m)

    def _count(self, n, m):
        return n * m - count_edges(self.graph, n, m)

    def _split(self, n, m, is_listed):
        return _split_within(self, n, m, is_listed)

    def _write(self, inner):
        return "~" + (inner(self.graph) if isinstance(self.graph, Complement) else _operand(self.graph, inner, self))


# -------------------------------------------------------------------------------------- moving nodes and edges


class Transpose(Graph):
    """``a.T``: every edge reversed."""

    graph: Graph

    def _own_size(self):
        n, m = self.graph.size
        return m, n

    def _own_places(self):
        return tuple(None if place is None else -place for place in self.graph._places)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.graph.contains(kv_idx, q_idx)

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(boxes.transposed)

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes.transposed)

    def _breakpoints(self, n, m):
        inner = self.graph._breakpoints(m, n)
        return inner and inner.transposed()

    def _split(self, n, m, is_listed):
        rest, listed = self.graph._split(m, n, is_listed)
        return _around(self, rest), tuple(each.transposed for each in listed)

    def _edges(self, n, m):
        query, key = list_edges(self.graph, m, n)
        return sort_edges(key, query, m)

    def _count(self, n, m):
        return count_edges(self.graph, m, n)

    def _bind(self, n, m):
        return self._map(bind, m, n)

    def _write(self, inner):
        return _operand(self.graph, inner) + ".T"


class QuerySlice(Graph):
    """``a.rows(start, stop)``: the queries start … stop-1, renumbered from 0."""

    graph: Graph
    start: int
    stop: int

    def _check(self):
        require_ints(0, start=self.start, stop=self.stop)
        most = self.graph.size[0]
        if self.start > self.stop or (most is not None and self.stop > most):
            limit = "" if most is None else f" <= {most}, the graph's number of queries"
            raise ValueError(f"rows must satisfy start <= stop{limit} (got start={self.start}, stop={self.stop})")

    def _own_size(self):
        return (self.stop - self.start, self.graph.size[1])

    def _own_places(self):
        told = tuple(place for place in self.graph._places if place is not None)
        return tuple(self.start + place for place in told or (0,))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.graph.contains(moved(q_idx, self.start), kv_idx)

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(boxes.shifted(rows=self.start))

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes.shifted(rows=self.start))

    def _breakpoints(self, n, m):
        inner = self.graph._breakpoints(self._all, m)
        return inner and inner.shifted(rows=-self.start)

    def _split(self, n, m, is_listed):
        return _split_within(self, self._all, m, is_listed, rows=-self.start)

    def _edges(self, n, m):
        return self.graph._edges_of_rows(self.start, self.stop, self._all, m)

    def _bind(self, n, m):
        return self._map(bind, self._all, m)

    @property
    def _all(self) -> int:
        """How many queries the whole graph has, as far as it is needed."""
        return self.stop if self.graph.size[0] is None else self.graph.size[0]

    def _write(self, inner):
        return f"{_operand(self.graph, inner)}.rows({self.start}, {self.stop})"


class Sized(Graph):
    """``a.sized(num_queries, num_keys)``: a graph that fits any size, at this one."""

    graph: Graph
    num_queries: int | None
    num_keys: int | None

    def _check(self):
        given = {"num_queries": self.num_queries, "num_keys": self.num_keys}
        require_ints(0, **{name: count for name, count in given.items() if count is not None})
        common_size(lambda: f"{self.graph} and its new size", self.graph.size, (self.num_queries, self.num_keys))

    def _own_size(self):
        return common_size(lambda: "graph", self.graph.size, (self.num_queries, self.num_keys))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return bind(self.graph, *self.size).contains(q_idx, kv_idx)

    def _classify_boxes(self, boxes):
        return self.graph._classify_boxes(boxes)

    def _box_pattern(self, boxes):
        return self.graph._box_pattern(boxes)

    def _bind(self, n, m):
        n, m = common_size(lambda: f"graph {self} and its size", self.size, (n, m))
        return self._map(bind, n, m)

    def _breakpoints(self, n, m):
        return self.graph._breakpoints(n, m)

    def _split(self, n, m, is_listed):
        return _split_within(self, n, m, is_listed)

    def _edges(self, n, m):
        return list_edges(self.graph, n, m)

    def _count(self, n, m):
        return count_edges(self.graph, n, m)

    def _write(self, inner):
        return f"{_operand(self.graph, inner)}.sized({self.num_queries}, {self.num_keys})"


class WithGlobalNodes(Graph):
    """``a.with_global_nodes(k)``: k more nodes, in front, that hear all and are heard by all."""

    graph: Graph
    num_global: int

    def _check(self):
        require_ints(0, num_global=self.num_global)

    def _own_size(self):
        n, m = self.graph.size
        return _plus(n, self.num_global), _plus(m, self.num_global)

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        k = self.num_global
        inner = self.graph.contains((q_idx - k).clamp(min=0), (kv_idx - k).clamp(min=0))
        return (q_idx < k) | (kv_idx < k) | inner

    def _classify_boxes(self, boxes):
        k, inner = self.num_global, self._in_inner(boxes)
        found = classify(inner, (boxes.bottom <= k) | (boxes.right <= k))
        found[inner] = self.graph._classify_boxes(boxes.chosen(inner).shifted(-k, -k))
        return found

    def _box_pattern(self, boxes):
        k = self.num_global
        return SideBySide.of([(self.graph, k, k, (None, None))]).pattern(boxes)

    def _in_inner(self, boxes: Boxes) -> Tensor:
        return (boxes.top >= self.num_global) & (boxes.left >= self.num_global)

    def _breakpoints(self, n, m):
        k = self.num_global
        inner = self.graph._breakpoints(*self._inner(n, m))
        return inner and Breakpoints.union([inner.shifted(k, k), Breakpoints(frozenset({k}), frozenset({k}))])

    def _split(self, n, m, is_listed):
        return _split_within(self, *self._inner(n, m), is_listed, self.num_global, self.num_global)

    def _edges(self, n, m):
        k = self.num_global
        require_memory((n + m) * k * BYTES_PER_EDGE, f"to list the edges of {self} at {n} × {m}")
        query, key = list_edges(self.graph, *self._inner(n, m))
        of_global_queries = all_pairs(min(k, n), m)
        of_global_keys = all_pairs(n, min(k, m))
        return merge_edges([of_global_queries, of_global_keys, (query + k, key + k)], m)

    def _count(self, n, m):
        inner_n, inner_m = self._inner(n, m)
        return n * m - inner_n * inner_m + count_edges(self.graph, inner_n, inner_m)

    def _bind(self, n, m):
        for name, count in (("queries", n), ("keys", m)):
            if count is not None and count < self.num_global:
                raise ValueError(f"with_global_nodes({self.num_global}) needs at least that many {name} (got {count})")
        inner = [None if count is None else max(count - self.num_global, 0) for count in (n, m)]
        return self._map(bind, *inner)

    def _waits(self):
        return True  # for an error where the size is too small

    def _inner(self, n: int, m: int) -> tuple[int, int]:
        """The size of the graph without its global nodes."""
        return max(n - self.num_global, 0), max(m - self.num_global, 0)

    def _write(self, inner):
        return f"{_operand(self.graph, inner)}.with_global_nodes({self.num_global})"


class TwoHops(Graph):
    """``a @ b``: query i hears key j if i hears, in a, some node that hears j in b."""

    a: Graph
    b: Graph
    _precedence = 4

    def _check(self):
        what = "the two hops of a @ b: the keys of a and the queries of b"
        common_size(lambda: what, (None, self.a.size[1]), (None, self.b.size[0]))

    def _own_size(self):
        return (self.a.size[0], self.b.size[1])

    def _own_places(self):
        if not (self.a._places or self.b._places):
            return ()
        pairs = itertools.product(self.a._places or (0,), self.b._places or (0,))
        return tuple(dict.fromkeys(None if a is None or b is None else a + b for a, b in pairs))

    @property
    def middle(self) -> int | None:
        """How many nodes lie between the two hops, if known."""
        return self.b.size[0] if self.a.size[1] is None else self.a.size[1]

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.middle is None:
            raise ValueError(self._no_middle())
        looked_at = max(q_idx.numel(), kv_idx.numel()) * self.middle
        if looked_at > PAIRS_LOOKED_AT and self.heads is None and not self._unbound:
            return contains_code(self._codes.to(q_idx.device), q_idx * cast(int, self.size[1]) + kv_idx)
        middle = torch.arange(self.middle, device=q_idx.device)
        (queries, at_query), (keys, at_key) = (torch.unique(side, return_inverse=True) for side in (q_idx, kv_idx))
        first = self.a.contains(queries[:, None], middle[None]).float()
        second = self.b.contains(middle[:, None], keys[None]).float()
        return (first @ second > 0)[..., at_query, at_key]

    @cached_property
    def _codes(self) -> Tensor:
        """query · num_keys + key of each edge, ascending, of hops that know their size."""
        n, m = (cast(int, count) for count in self.size)
        query, key = self._hops(n, m)
        return query * m + key

    def _edges(self, n, m):
        return self._codes // max(m, 1), self._codes % max(m, 1)

    def _hops(self, n: int, m: int) -> Edges:
        between = cast(int, self.middle)
        query, end = list_edges(self.a, n, between)
        start, key = list_edges(self.b, between, m)
        degree = torch.bincount(start, minlength=between)
        first, fan = (degree.cumsum(0) - degree)[end], degree[end]  # the edges of b that go on from each edge of a
        found = (query[:0], key[:0])
        for some in torch.arange(len(fan)).split(stretches(fan, PATHS_AT_ONCE)):
            here = fan[some]
            step = torch.arange(int(here.sum())) - (here.cumsum(0) - here - first[some]).repeat_interleave(here)
            purpose = f"to list the more than {len(found[0]):,} edges of {self} at {n} × {m}"
            require_memory((len(found[0]) + PATHS_AT_ONCE) * BYTES_PER_EDGE, purpose)
            found = merge_edges([found, (query[some].repeat_interleave(here), key[step])], m)
        return found

    def _bind(self, n, m):
        middle = self.middle if self.middle is not None else n if n == m else None
        if middle is None and None not in (n, m):
            raise ValueError(self._no_middle())
        return TwoHops(bind(self.a.sized(n, middle), n, middle), bind(self.b.sized(middle, m), middle, m))

    def _no_middle(self) -> str:
        return (
            f"two hops need the number of nodes between them, which {self} does not tell: give one of the graphs its "
            f"size, graph.sized(num_queries, num_keys)"
        )

    def _waits(self):
        return None in (*self.a.size, *self.b.size) or super()._waits()

    def _write(self, inner):
        return f"{_operand(self.a, inner, self)} @ {_operand(self.b, inner, self)}"


# --------------------------------------------------------------------------------------------------- the parts


def contains_code(code: Tensor, wanted: Tensor) -> Tensor:
    """Which numbers are among ascending ones."""
    if not len(code):
        return torch.zeros_like(wanted, dtype=torch.bool)
    return code[torch.searchsorted(code, wanted).clamp(max=len(code) - 1)] == wanted


def _plus(count: int | None, more: int) -> int | None:
    return None if count is None else count + more


def all_pairs(n: int, m: int) -> Edges:
    """The edges of n queries that hear m keys each."""
    return torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)


def normal_graphs(graph: Graph, name: str) -> tuple[Graph, ...]:
    """A field that holds several graphs, as a tuple; anything else is an error."""
    given = getattr(graph, name)
    graphs = tuple(given) if isinstance(given, Iterable) and not isinstance(given, Graph) else ()
    if not graphs or not all(isinstance(part, Graph) for part in graphs):
        raise TypeError(f"{type(graph).__name__} takes a list of at least one graph (got {given!r})")
    object.__setattr__(graph, name, graphs)
    return graphs


def _operand(graph: Graph, inner, operator: Graph | None = None) -> str:
    """A part as text, in brackets where the operator around it binds as strongly or more."""
    own, around = graph._precedence, 5 if operator is None else operator._precedence
    return inner(graph) if own > around else f"({inner(graph)})"


def nothing(graph: Graph) -> Graph:
    """No edges, in the size of a graph."""
    return Empty().sized(*graph.size)


def is_nothing(graph: Graph) -> bool:
    """Whether a graph says of itself that it has no edges."""
    return type(graph.graph if type(graph) is Sized else graph) is Empty


def _combined(graph: _Pointwise, parts: list[Split]) -> Split:
    """The split of a combination of graphs that are split into these parts."""
    rests, listed = [rest for rest, _ in parts], tuple(dict.fromkeys(each for _, lists in parts for each in lists))
    if all(map(is_nothing, rests)):
        return nothing(graph), listed
    unchanged = all(rest is part for rest, part in zip(rests, graph.graphs, strict=True))
    return graph if unchanged else type(graph)(tuple(rests)), listed


def _among_few(
    graph: _Pointwise, n: int, m: int, is_listed: IsListed, parts: list[Split], larger: list[Split]
) -> Split:
    """The same, of a graph that is best listed where it has no lines and one of some larger ones has few edges."""
    rest, listed = _combined(graph, parts)
    has_lines = rest._breakpoints(n, m) is not None
    if has_lines or not is_listed(graph, n, m) or not _is_few(min(_most_edges(each, n, m) for each in larger), n, m):
        return rest, listed
    return nothing(graph), (Listed(graph, n, m),)


def _is_few(edges: int, n: int, m: int) -> bool:
    """Whether to list so many edges costs less than to look at all pairs."""
    return PAIRS_PER_EDGE * edges <= n * m


def _around(graph: Graph, inner: Graph) -> Graph:
    """The same operation on another graph of the same size."""
    if is_nothing(inner) and type(graph) in (Transpose, QuerySlice, Sized):
        return nothing(graph)
    return graph._map(lambda _: inner)


def _split_within(graph: Any, n: int, m: int, is_listed: IsListed, rows: int = 0, columns: int = 0) -> Split:
    """The split of an operation on one graph, of this size, whose nodes it moves."""
    rest, listed = graph.graph._split(n, m, is_listed)
    return _around(graph, rest), tuple(each.moved(rows, columns) for each in listed)


def _most_edges(split: Split, n: int, m: int) -> int:
    """A bound of the number of edges of a graph that is split like this."""
    rest, listed = split
    of_lines = counting.count(rest, n, m)
    return n * m if of_lines is None else min(n * m, of_lines + sum(each.cost for each in listed))


def _patterns_where_partial(graph: Graph, boxes: Boxes) -> list[Tensor]:
    """The class of each box, and the graph's pattern where the class does not tell all."""
    kind = graph._classify_boxes(boxes)
    return [kind.long(), *(torch.where(kind == PARTIAL, number, 0) for number in graph._box_pattern(boxes))]


def chain(kind: type[_Pointwise], a: Graph, b: Graph) -> Graph:
    """An associative operation on many graphs, as one node."""
    return kind(tuple(part for graph in (a, b) for part in (graph.graphs if type(graph) is kind else (graph,))))
