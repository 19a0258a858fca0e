"""The algebra of graphs: what the operators on `Graph` build. Each class is one operation on sets of edges.

It defines no connectivity of its own; that is in `attngraph.patterns`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_, or_, xor

import torch
from torch import Tensor

from attngraph.graph.base import Graph, common_size, merge_edges, require_ints, sort_edges
from attngraph.graph.boxes import FULL, PARTIAL, Boxes, decide, patterns_side_by_side
from attngraph.graph.counting import Lines

PATHS_AT_ONCE = 1 << 22  # paths of two hops that are looked at in one step

# ------------------------------------------------------------------------------------------------ pair by pair


@dataclass(frozen=True, repr=False)
class _Pointwise(Graph):
    """A combination of graphs of one size by an operator on booleans."""

    graphs: tuple[Graph, ...]

    def check(self):
        normal_graphs(self, "graphs")
        common_size(f"graphs combined with {self.symbol}", *(graph.size for graph in self.graphs))

    def own_size(self):
        return common_size("graphs", *(graph.size for graph in self.graphs))

    def contains(self, q_idx, kv_idx):
        return reduce(type(self).operator, (graph.contains(q_idx, kv_idx) for graph in self.graphs))

    def lines(self, n, m):
        return Lines.union(graph.lines(n, m) for graph in self.graphs)

    def write(self, inner):
        return f" {self.symbol} ".join(_operand(graph, inner, self) for graph in self.graphs)

    def blocks(self, boxes):
        return reduce(type(self).combine, (graph.blocks(boxes) for graph in self.graphs))

    def pattern(self, boxes):
        return [number for graph in self.graphs for number in _where_partial(graph, boxes)]

    def edges_of(self, start, stop, n, m):
        return type(self)(tuple(Rows(graph, start, stop) for graph in self.graphs)).list_edges(stop - start, m)

    def by_rows(self, n, m):
        return all(graph.by_rows(n, m) for graph in self.graphs)

    def _of(self, source: Graph, n: int, m: int) -> tuple[Tensor, Tensor]:
        """Those edges of a larger graph that are in this one."""
        query, key = source.list_edges(n, m)
        kept = self.contains(query, key)
        return query[kept], key[kept]


@dataclass(frozen=True, repr=False)
class Union(_Pointwise):
    """``a | b``: the edges of either."""

    symbol, precedence, operator, combine = "|", 0, staticmethod(or_), staticmethod(torch.maximum)

    @property
    def scattered(self):
        return all(graph.scattered for graph in self.graphs)

    def edges(self, n, m):
        return merge_edges([graph.list_edges(n, m) for graph in self.graphs], m)

    def count(self, n, m):
        first, rest = self.graphs[0], reduce(or_, self.graphs[1:])
        return first.count_edges(n, m) + rest.count_edges(n, m) - (first & rest).count_edges(n, m)


@dataclass(frozen=True, repr=False)
class SymmetricDifference(_Pointwise):
    """``a ^ b``: the edges of one of the two."""

    symbol, precedence, operator = "^", 1, staticmethod(xor)
    combine = staticmethod(lambda a, b: torch.where((a == PARTIAL) | (b == PARTIAL), PARTIAL, (a - b).abs()))

    @property
    def scattered(self):
        return all(graph.scattered for graph in self.graphs)

    def edges(self, n, m):
        return self._of(Union(self.graphs), n, m)

    def count(self, n, m):
        a, b = self.graphs
        return a.count_edges(n, m) + b.count_edges(n, m) - 2 * (a & b).count_edges(n, m)


@dataclass(frozen=True, repr=False)
class Intersection(_Pointwise):
    """``a & b``: the edges of both."""

    symbol, precedence, operator, combine = "&", 2, staticmethod(and_), staticmethod(torch.minimum)

    @property
    def scattered(self):
        return any(graph.scattered for graph in self.graphs)

    def edges(self, n, m):
        listed = [graph for graph in self.graphs if graph.scattered] or self.graphs
        return self._of(min(listed, key=lambda graph: graph.count_edges(n, m)) if len(listed) > 1 else listed[0], n, m)

    def count(self, n, m):
        for part in self.graphs:
            if isinstance(part, Complement):  # a & ~b is a - b, which never lists ~b
                others = reduce(and_, (other for other in self.graphs if other is not part))
                return (others - part.graph).count_edges(n, m)
        return super().count(n, m)


@dataclass(frozen=True, repr=False)
class Difference(_Pointwise):
    """``a - b``: the edges of a that b lacks."""

    symbol, precedence, operator = "-", 3, staticmethod(lambda a, b: a & ~b)
    combine = staticmethod(lambda a, b: torch.minimum(a, FULL - b))

    @property
    def scattered(self):
        return self.graphs[0].scattered

    def edges(self, n, m):
        return self._of(self.graphs[0], n, m)

    def count(self, n, m):
        a, b = self.graphs
        return a.count_edges(n, m) - (a & b).count_edges(n, m)


@dataclass(frozen=True, repr=False)
class Complement(Graph):
    """``~a``: the pairs that are no edges."""

    graph: Graph
    precedence = 5

    def own_size(self):
        return self.graph.size

    def contains(self, q_idx, kv_idx):
        return ~self.graph.contains(q_idx, kv_idx)

    def blocks(self, boxes):
        return FULL - self.graph.blocks(boxes)

    def pattern(self, boxes):
        return self.graph.pattern(boxes)

    def lines(self, n, m):
        return self.graph.lines(n, m)

    def count(self, n, m):
        return n * m - self.graph.count_edges(n, m)

    def write(self, inner):
        return "~" + (inner(self.graph) if isinstance(self.graph, Complement) else _operand(self.graph, inner, self))


# -------------------------------------------------------------------------------------- moving nodes and edges


@dataclass(frozen=True, repr=False)
class Transpose(Graph):
    """``a.T``: every edge reversed."""

    graph: Graph

    def own_size(self):
        return self.graph.size[::-1]

    def contains(self, q_idx, kv_idx):
        return self.graph.contains(kv_idx, q_idx)

    def blocks(self, boxes):
        return self.graph.blocks(boxes.transposed)

    def pattern(self, boxes):
        return self.graph.pattern(boxes.transposed)

    @property
    def scattered(self):
        return self.graph.scattered

    def lines(self, n, m):
        inner = self.graph.lines(m, n)
        return inner and inner.transposed()

    def edges(self, n, m):
        query, key = self.graph.list_edges(m, n)
        return sort_edges(key, query, m)

    def count(self, n, m):
        return self.graph.count_edges(m, n)

    def bind(self, n, m):
        return Transpose(self.graph.bind(m, n))

    def write(self, inner):
        return _operand(self.graph, inner) + ".T"


@dataclass(frozen=True, repr=False)
class Rows(Graph):
    """``a.rows(start, stop)``: the queries start … stop-1, renumbered from 0."""

    graph: Graph
    start: int
    stop: int

    def check(self):
        require_ints(0, start=self.start, stop=self.stop)
        most = self.graph.size[0]
        if self.start > self.stop or (most is not None and self.stop > most):
            limit = "" if most is None else f" <= {most}, the graph's number of queries"
            raise ValueError(f"rows must satisfy start <= stop{limit} (got start={self.start}, stop={self.stop})")

    def own_size(self):
        return (self.stop - self.start, self.graph.size[1])

    def contains(self, q_idx, kv_idx):
        return self.graph.contains(q_idx + self.start, kv_idx)

    def blocks(self, boxes):
        return self.graph.blocks(boxes.shifted(rows=self.start))

    def pattern(self, boxes):
        return self.graph.pattern(boxes.shifted(rows=self.start))

    @property
    def scattered(self):
        return self.graph.scattered

    def lines(self, n, m):
        inner = self.graph.lines(self._all, m)
        return inner and inner.shifted(rows=-self.start)

    def edges(self, n, m):
        return self.graph.edges_of(self.start, self.stop, self._all, m)

    def bind(self, n, m):
        return replace(self, graph=self.graph.bind(self._all, m))

    @property
    def _all(self) -> int:
        """How many queries the whole graph has, as far as it is needed."""
        return self.stop if self.graph.size[0] is None else self.graph.size[0]

    def write(self, inner):
        return f"{_operand(self.graph, inner)}.rows({self.start}, {self.stop})"


@dataclass(frozen=True, repr=False)
class Sized(Graph):
    """``a.sized(num_queries, num_keys)``: a graph that fits any size, at this one."""

    graph: Graph
    num_queries: int | None
    num_keys: int | None

    def check(self):
        given = {"num_queries": self.num_queries, "num_keys": self.num_keys}
        require_ints(0, **{name: count for name, count in given.items() if count is not None})
        common_size(f"{self.graph.text} and its new size", self.graph.size, tuple(given.values()))

    def own_size(self):
        return common_size("graph", self.graph.size, (self.num_queries, self.num_keys))

    def contains(self, q_idx, kv_idx):
        return self.graph.bind(*self.size).contains(q_idx, kv_idx)

    def blocks(self, boxes):
        return self.graph.blocks(boxes)

    def pattern(self, boxes):
        return self.graph.pattern(boxes)

    @property
    def scattered(self):
        return self.graph.scattered

    def bind(self, n, m):
        return replace(self, graph=self.graph.bind(*common_size("graph", self.size, (n, m))))

    def lines(self, n, m):
        return self.graph.lines(n, m)

    def edges(self, n, m):
        return self.graph.list_edges(n, m)

    def count(self, n, m):
        return self.graph.count_edges(n, m)

    def write(self, inner):
        return f"{_operand(self.graph, inner)}.sized({self.num_queries}, {self.num_keys})"


@dataclass(frozen=True, repr=False)
class WithGlobalNodes(Graph):
    """``a.with_global_nodes(k)``: k more nodes, in front, that hear all and are heard by all."""

    graph: Graph
    num_global: int

    def check(self):
        require_ints(0, num_global=self.num_global)

    def own_size(self):
        return tuple(None if count is None else count + self.num_global for count in self.graph.size)

    def contains(self, q_idx, kv_idx):
        k = self.num_global
        inner = self.graph.contains((q_idx - k).clamp(min=0), (kv_idx - k).clamp(min=0))
        return (q_idx < k) | (kv_idx < k) | inner

    def blocks(self, boxes):
        k, inner = self.num_global, self._in_inner(boxes)
        found = decide(inner, (boxes.bottom <= k) | (boxes.right <= k))
        found[inner] = self.graph.blocks(boxes.chosen(inner).shifted(-k, -k))
        return found

    def pattern(self, boxes):
        k = self.num_global
        return patterns_side_by_side([(self.graph, k, k, self._in_inner(boxes))], boxes)

    def _in_inner(self, boxes: Boxes) -> Tensor:
        return (boxes.top >= self.num_global) & (boxes.left >= self.num_global)

    def lines(self, n, m):
        k = self.num_global
        inner = self.graph.lines(*self._inner(n, m))
        return inner and Lines.union([inner.shifted(k, k), Lines(frozenset({k}), frozenset({k}))])

    def edges(self, n, m):
        k = self.num_global
        query, key = self.graph.list_edges(*self._inner(n, m))
        in_front = torch.cartesian_prod(torch.arange(min(k, n)), torch.arange(m)).T
        heard = torch.cartesian_prod(torch.arange(n), torch.arange(min(k, m))).T
        return merge_edges([tuple(in_front), tuple(heard), (query + k, key + k)], m)

    def count(self, n, m):
        inner_n, inner_m = self._inner(n, m)
        return n * m - inner_n * inner_m + self.graph.count_edges(inner_n, inner_m)

    def bind(self, n, m):
        for name, count in (("queries", n), ("keys", m)):
            if count is not None and count < self.num_global:
                raise ValueError(f"with_global_nodes({self.num_global}) needs at least that many {name} (got {count})")
        return replace(self, graph=self.graph.bind(*self._inner(n, m)))

    def _inner(self, *size: int | None) -> tuple[int | None, ...]:
        return tuple(None if count is None else max(count - self.num_global, 0) for count in size)

    def write(self, inner):
        return f"{_operand(self.graph, inner)}.with_global_nodes({self.num_global})"


@dataclass(frozen=True, repr=False)
class TwoHops(Graph):
    """``a @ b``: query i hears key j if i hears, in a, some node that hears j in b."""

    a: Graph
    b: Graph
    precedence = 4

    def check(self):
        common_size("the two hops of a @ b: the keys of a and the queries of b", (self.a.size[1],), (self.b.size[0],))

    def own_size(self):
        return (self.a.size[0], self.b.size[1])

    @property
    def middle(self) -> int | None:
        """How many nodes lie between the two hops, if known."""
        return self.b.size[0] if self.a.size[1] is None else self.a.size[1]

    def contains(self, q_idx, kv_idx):
        if self.middle is None:
            raise ValueError(
                f"two hops need the number of nodes between them, which {self.text} does not tell: give one of the "
                f"graphs its size, graph.sized(num_queries, num_keys)"
            )
        middle = torch.arange(self.middle, device=q_idx.device)
        (queries, at_query), (keys, at_key) = (torch.unique(side, return_inverse=True) for side in (q_idx, kv_idx))
        first = self.a.contains(queries[:, None], middle[None]).float()
        second = self.b.contains(middle[:, None], keys[None]).float()
        return (first @ second > 0)[..., at_query, at_key]

    scattered = True

    def edges(self, n, m):
        (query, between), (middle, key) = self.a.list_edges(n, self.middle), self.b.list_edges(self.middle, m)
        fan = torch.bincount(middle, minlength=self.middle)
        first, fan = (
            (fan.cumsum(0) - fan)[between],
            fan[between],
        )  # of each edge of a, the edges of b that go on from it
        found = (query[:0], key[:0])
        for some in torch.arange(len(fan)).split(_together(fan)):
            here = fan[some]
            step = torch.arange(int(here.sum())) - (here.cumsum(0) - here - first[some]).repeat_interleave(here)
            found = merge_edges([found, (query[some].repeat_interleave(here), key[step])], m)
        return found

    def bind(self, n, m):
        middle = self.middle if self.middle is not None else n if n == m else None
        return TwoHops(self.a.sized(n, middle).bind(n, middle), self.b.sized(middle, m).bind(middle, m))

    def write(self, inner):
        return f"{_operand(self.a, inner, self)} @ {_operand(self.b, inner, self)}"


# --------------------------------------------------------------------------------------------------- the parts


def normal_graphs(graph: Graph, name: str) -> tuple[Graph, ...]:
    """A field that holds several graphs, as a tuple; anything else is an error."""
    given = getattr(graph, name)
    graphs = tuple(given) if isinstance(given, Iterable) and not isinstance(given, Graph) else (None,)
    if not graphs or not all(isinstance(part, Graph) for part in graphs):
        raise TypeError(f"{type(graph).__name__} takes a list of at least one graph (got {given!r})")
    object.__setattr__(graph, name, graphs)
    return graphs


def _operand(graph: Graph, inner, operator: Graph | None = None) -> str:
    """A part as text, in brackets where the operator around it binds as strongly or more."""
    own, around = getattr(graph, "precedence", 6), 5 if operator is None else operator.precedence
    return inner(graph) if own > around else f"({inner(graph)})"


def _together(count: Tensor) -> list[int]:
    """Lengths that cut a list of counts into stretches of about PATHS_AT_ONCE in sum."""
    return torch.unique_consecutive(count.cumsum(0) // PATHS_AT_ONCE, return_counts=True)[1].tolist()


def _where_partial(graph: Graph, boxes: Boxes) -> list[Tensor]:
    """The class of each box, and the graph's pattern where the class does not tell all."""
    kind = graph.blocks(boxes)
    return [kind.long(), *(torch.where(kind == PARTIAL, number, 0) for number in graph.pattern(boxes))]


def chain(kind: type[_Pointwise], a: Graph, b: Graph) -> Graph:
    """An associative operation on many graphs, as one node."""
    return kind(tuple(part for graph in (a, b) for part in (graph.graphs if type(graph) is kind else (graph,))))
