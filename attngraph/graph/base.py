"""The meaning of a graph: which key nodes each query node hears; the contract that every graph fulfils.

No kernels, no devices, no weights: a graph is a value that answers questions about its edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import reduce, wraps
from operator import index, or_
from typing import SupportsIndex
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attngraph.graph import boxes as of_boxes
from attngraph.graph import counting as lines
from attngraph.graph.boxes import Boxes
from attngraph.graph.counting import Lines

Size = tuple[int | None, int | None]

PAIRS_AT_ONCE = 1 << 24  # how many pairs a scan of a predicate looks at in one step


class Graph:
    """A set of directed edges k → q, "query q hears key k", over any number of nodes.

    A graph is frozen, hashable and comparable, and its `repr` is an expression that rebuilds it. Graphs combine as
    Python's `set` does, ``|  &  -  ^  ~``, and further with ``.T`` (every edge reversed) and ``@`` (two hops).

    A new graph is a frozen dataclass with one method, `contains`. The methods `blocks`, `pattern`, `lines`, `edges` and
    `count` are optional speed-ups that must agree with it; `check` validates the arguments.

    >>> from attngraph import Causal, Prefix, Window
    >>> graph = Causal() & (Window(1, 0) | Prefix(1))
    >>> graph
    Causal() & (Window(1, 0) | Prefix(1))
    >>> graph.mask(4, 4).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    >>> graph.num_edges(10**9, 10**9)
    2999999997
    """

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The definition: which pairs of node numbers (broadcasting int64 tensors) are edges, as a bool tensor.

        A graph with heads answers with one more dimension in front, (H, ...).
        """
        raise TypeError(f"{type(self).__name__} must define contains(q_idx, kv_idx)")

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "contains" in cls.__dict__:
            cls.contains = _checked(cls.contains)

    # ------------------------------------------------------ what a graph may know besides, each with a default

    def check(self) -> None:
        """Raise ValueError or TypeError if the arguments make no graph; put them into their normal form."""

    def own_size(self) -> Size:
        """(num_queries, num_keys), None where any number fits."""
        return (None, None)

    def lines(self, n: int, m: int) -> Lines | None:
        """The lines at which membership can change, where they can be named (see `attngraph.lines`)."""
        return None

    def edges(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """All edges as (query, key), sorted by query then key; the default scans `contains`."""
        step = max(1, PAIRS_AT_ONCE // max(m, 1))
        found = [torch.empty(0, 2, dtype=torch.int64)]
        for start in range(0, n, step):
            query = torch.arange(start, min(start + step, n))[:, None]
            found.append(self.contains(query, torch.arange(m)[None]).nonzero() + torch.tensor([start, 0]))
        return torch.cat(found).unbind(1)

    def edges_of(self, start: int, stop: int, n: int, m: int) -> tuple[Tensor, Tensor]:
        """The edges of the queries start … stop-1, renumbered from 0; the default chooses among those of all n.

        A graph that does better says so: `by_rows`.
        """
        query, key = self.list_edges(n, m)
        kept = (query >= start) & (query < stop)
        return query[kept] - start, key[kept]

    def by_rows(self, n: int, m: int) -> bool:
        """Whether the edges of some queries are listed at their own cost, not at that of all."""
        return type(self).edges_of is not Graph.edges_of or self.lines(n, m) is not None

    def count(self, n: int, m: int) -> int:
        """The number of edges; the default lists them."""
        return len(self.list_edges(n, m)[0])

    def blocks(self, boxes: Boxes) -> Tensor:
        """EMPTY, PARTIAL or FULL for each box (see `attngraph.blocks`), int8; PARTIAL is always safe."""
        return of_boxes.one_class(boxes, of_boxes.PARTIAL)

    def pattern(self, boxes: Boxes) -> list[Tensor]:
        """Numbers that decide which pairs of a box are edges: boxes of one shape that agree in all have equal edges."""
        return [boxes.top, boxes.left]

    @property
    def scattered(self) -> bool:
        """Whether to find the edges by listing them, rather than by boxes: true of a graph that can do only that."""
        return type(self).edges is not Graph.edges and type(self).blocks is Graph.blocks

    def bind(self, n: int | None, m: int | None) -> Graph:
        """The same graph, told its size; only what depends on the size (Random, two hops) listens."""
        return self.map(lambda part: part.bind(n, m))

    # ---------------------------------------------------------------------------- what follows from the fields

    size: Size
    """(num_queries, num_keys), None where any number fits."""
    heads: int | None
    """How many heads have each their own graph, or None: one graph for all heads."""
    text: str
    """The graph as text, short also where `repr` is long: how a graph travels into a compiled program."""

    def __post_init__(self):
        self.check()
        heads = {part.heads for part in self.children if part.heads}
        if len(heads) > 1:
            raise ValueError(f"graphs with different numbers of heads do not combine (got {sorted(heads)})")
        # Plain attributes, not properties: torch.compile reads them as constants.
        object.__setattr__(self, "size", self.own_size())
        object.__setattr__(self, "heads", heads.pop() if heads else None)
        object.__setattr__(self, "text", self.write(lambda part: part.text))
        if not torch.compiler.is_compiling():
            first = _KNOWN.setdefault(self.text, self)
            if first is not self:  # equal graphs keep the known one alive
                object.__setattr__(self, "twin", first)

    @property
    def children(self) -> tuple[Graph, ...]:
        """The graphs this one is made of."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(
            part
            for value in values
            for part in (value if isinstance(value, tuple) else (value,))
            if isinstance(part, Graph)
        )

    def map(self, change: Callable[[Graph], Graph]) -> Graph:
        """The same combination of changed parts."""
        if not self.children:
            return self
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Graph):
                changed[field.name] = change(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Graph):
                changed[field.name] = tuple(change(part) for part in value)
        return replace(self, **changed)

    def head(self, index: int) -> Graph:
        """The graph of one head."""
        return self.map(lambda part: part.head(index)) if self.heads else self

    def write(self, inner: Callable[[Graph], str]) -> str:
        """The graph as an expression, its parts written by `inner`."""
        given = [(getattr(self, field.name), field.default) for field in fields(self)]
        while given and given[-1][1] is not MISSING and given[-1][0] == given[-1][1]:
            given.pop()
        name = type(self).__name__
        if inner is not repr and not type(self).__module__.startswith("attngraph."):
            name += f"@{id(type(self)):x}"  # two classes of users may have one name, and differ
        return f"{name}({', '.join(_argument(value, inner) for value, _ in given)})"

    def __repr__(self) -> str:
        return self.write(repr)

    def __reduce__(self):
        return (type(self), tuple(getattr(self, field.name) for field in fields(self)))

    def __deepcopy__(self, memo) -> Graph:
        return self  # a value

    def __bool__(self) -> bool:
        raise TypeError(
            "a graph has no truth value, as its edges depend on its size: ask graph.num_edges(n, m) > 0, and combine "
            "graphs with & | ~, not with and, or, not"
        )

    # --------------------------------------------------------------------------------------------- the algebra

    def __or__(self, other: Graph) -> Graph:
        return algebra.chain(algebra.Union, self, other) if isinstance(other, Graph) else NotImplemented

    def __and__(self, other: Graph) -> Graph:
        return algebra.chain(algebra.Intersection, self, other) if isinstance(other, Graph) else NotImplemented

    def __sub__(self, other: Graph) -> Graph:
        return algebra.Difference((self, other)) if isinstance(other, Graph) else NotImplemented

    def __xor__(self, other: Graph) -> Graph:
        return algebra.SymmetricDifference((self, other)) if isinstance(other, Graph) else NotImplemented

    def __matmul__(self, other: Graph) -> Graph:
        """Two hops: query i hears key j if i hears, in this graph, some node that hears j in the other."""
        return algebra.TwoHops(self, other) if isinstance(other, Graph) else NotImplemented

    def __invert__(self) -> Graph:
        return algebra.Complement(self)

    @property
    def T(self) -> Graph:
        """Every edge reversed: who heard is now heard."""
        return algebra.Transpose(self)

    def rows(self, start: int, stop: int) -> Graph:
        """The queries start … stop-1, renumbered from 0, with all the keys: for decoding and for partitions.

        >>> from attngraph import Causal
        >>> Causal().rows(2, 3).mask(1, 4).int()
        tensor([[1, 1, 1, 0]], dtype=torch.int32)
        """
        return algebra.Rows(self, start, stop)

    def sized(self, num_queries: int | None = None, num_keys: int | None = None) -> Graph:
        """The same graph, knowing its size; a size that contradicts its own is an error.

        >>> from attngraph import Causal
        >>> Causal().sized(3, 3).size
        (3, 3)
        """
        return algebra.Sized(self, num_queries, num_keys) if (num_queries, num_keys) != self.size else self

    def with_global_nodes(self, count: int) -> Graph:
        """The graph with `count` more nodes, in front (CLS tokens, registers), that hear all and are heard by all.

        >>> from attngraph import Identity
        >>> Identity().with_global_nodes(1).mask(3, 3).int()
        tensor([[1, 1, 1],
                [1, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
        """
        return algebra.WithGlobalNodes(self, count)

    # ----------------------------------------------------------------------------------------------- the views

    def mask(self, n: int | None = None, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The edges as a bool tensor (n, m), or (H, n, m): rows are queries, columns are keys, True is an edge."""
        graph, n, m = self.at(n, m)
        query, key = torch.arange(n, device=device)[:, None], torch.arange(m, device=device)[None]
        return graph.contains(query, key)

    def edge_index(self, n: int | None = None, m: int | None = None) -> Tensor:
        """The edges as an int64 tensor (2, E): row 0 the key (source), row 1 the query (target), as in PyG.

        Sorted by query, then key: the order of every per-edge tensor in this library. Where heads have each their own
        graph, these are the edges that any head has.

        >>> from attngraph import Causal
        >>> Causal().edge_index(2, 2)
        tensor([[0, 0, 1],
                [0, 1, 1]])
        """
        graph, n, m = self.at(n, m)
        query, key = graph.list_edges(n, m)
        return torch.stack([key, query])

    def num_edges(self, n: int | None = None, m: int | None = None) -> int:
        """The exact number of edges, without enumerating them where the expression allows.

        >>> from attngraph import Causal
        >>> Causal().num_edges(10**9, 10**9)
        500000000500000000
        """
        graph, n, m = self.at(n, m)
        return graph.count_edges(n, m)

    def in_degrees(self, n: int | None = None, m: int | None = None) -> Tensor:
        """How many keys each query hears: int64 (n,)."""
        graph, n, m = self.at(n, m)
        by_lines = None if graph.heads else lines.in_degrees(graph, n, m)
        return torch.bincount(graph.list_edges(n, m)[0], minlength=n) if by_lines is None else by_lines

    def out_degrees(self, n: int | None = None, m: int | None = None) -> Tensor:
        """How many queries hear each key: int64 (m,)."""
        graph, n, m = self.at(n, m)
        return graph.T.in_degrees(m, n)

    def spans(self, start: int, stop: int, n: int | None = None, m: int | None = None) -> list[tuple[int, int]]:
        """Ranges of keys (first, stop) outside of which the queries start … stop-1 hear nobody; conservative.

        >>> from attngraph import Causal, Prefix, Window
        >>> (Causal() & (Window(2, 0) | Prefix(1))).spans(10, 12, 100, 100)
        [(0, 1), (8, 12)]
        """
        graph, n, m = self.at(n, m)
        if not 0 <= start <= stop <= n:
            raise ValueError(f"spans needs 0 <= start <= stop <= {n}, the number of queries (got {start} and {stop})")
        return of_boxes.spans(graph, start, stop, m)

    # -------------------------------------------------------------------------------- by the fastest way known

    def at(self, n: int | None = None, m: int | None = None) -> tuple[Graph, int, int]:
        """This graph bound to a definite size, and that size; what is not given is the graph's own."""
        n, m = (_node_count(name, given) for name, given in (("n", n), ("m", m)))
        n, m = common_size(f"graph {self.text} and the size asked for", self.size, (n, m))
        if n is None or m is None:
            raise ValueError(f"graph {self.text} has size {(n, m)}: give the missing number, as in graph.mask(n, m)")
        return self.bind(n, m), n, m

    def list_edges(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """All edges as (query, key), sorted, of a graph that is bound to its size."""
        if self.heads:
            return merge_edges([self.head(h).list_edges(n, m) for h in range(self.heads)], m)
        by_lines = lines.edges(self, n, m)
        return self.edges(n, m) if by_lines is None else by_lines

    def count_edges(self, n: int, m: int) -> int:
        """The number of edges of a graph that is bound to its size."""
        if self.heads:  # the edges that any head has
            return reduce(or_, dict.fromkeys(self.head(h) for h in range(self.heads))).bind(n, m).count_edges(n, m)
        by_lines = lines.count(self, n, m)
        return self.count(n, m) if by_lines is None else by_lines


_KNOWN: WeakValueDictionary[str, Graph] = WeakValueDictionary()


def known(text: str) -> Graph | None:
    """The living graph with this `text`, if there is one."""
    return _KNOWN.get(text)


def _checked(contains):
    """A graph's `contains` whose result is known to be a bool for every pair."""

    @wraps(contains)
    def checked(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = contains(self, q_idx, kv_idx)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"contains of {type(self).__name__} must return a bool tensor (got {kind}); use == < & |")
        pairs = torch.broadcast_shapes(q_idx.shape, kv_idx.shape)
        return found.expand(pairs if self.heads is None else (self.heads, *pairs))

    return checked


def _argument(value, inner: Callable[[Graph], str]) -> str:
    if isinstance(value, Tensor):
        raise TypeError("a graph's fields are numbers, tuples and graphs, so that it is a value (got a Tensor)")
    if isinstance(value, tuple):
        return f"[{', '.join(_argument(item, inner) for item in value)}]"
    return inner(value) if isinstance(value, Graph) else repr(value)


def _node_count(name: str, given: SupportsIndex | None) -> int | None:
    """A size that was asked for, as an int."""
    count = index(given) if isinstance(given, SupportsIndex) and not isinstance(given, bool) else given
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
        raise ValueError(f"{name} must be a number of nodes, 0 or more (got {given!r})")
    return count


def common_size(what: str, *sizes: Size) -> Size:
    """The size that all of these agree on; None agrees with everything."""
    merged = []
    for side, of in zip(("query", "key"), zip(*sizes, strict=True), strict=False):
        definite = sorted({count for count in of if count is not None})
        if len(definite) > 1:
            raise ValueError(
                f"{what} must have the same number of {side} nodes (got {' and '.join(map(str, definite))})"
            )
        merged.append(definite[0] if definite else None)
    return tuple(merged)


def require_ints(at_least: int | None, **given: int) -> None:
    """Raise unless every argument is an int, and not below a bound."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int (got {value!r})")
        if at_least is not None and value < at_least:
            raise ValueError(f"{name} must be {at_least} or more (got {value})")


def sort_edges(query: Tensor, key: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Edges by query, then key."""
    order = (query * m + key).argsort()
    return query[order], key[order]


def merge_edges(parts: list[tuple[Tensor, Tensor]], m: int) -> tuple[Tensor, Tensor]:
    """The union of several lists of edges, sorted."""
    code = torch.unique(torch.cat([query * m + key for query, key in parts]))
    return code // max(m, 1), code % max(m, 1)


from attngraph.graph import algebra  # noqa: E402  what the operators of Graph build derives from Graph
