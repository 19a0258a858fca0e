"""The meaning of a graph: which key nodes each query node hears; the contract that every graph fulfils.

No kernels, no devices, no weights: a graph is a value that answers questions about its edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields, replace
from functools import reduce, wraps
from inspect import get_annotations
from operator import index, or_
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, cast, dataclass_transform

import torch
from torch import Tensor

from attngraph import cache
from attngraph.graph import boxes as of_boxes
from attngraph.graph import counting
from attngraph.graph.boxes import Boxes
from attngraph.graph.counting import Breakpoints

Size = tuple[int | None, int | None]
Edges = tuple[Tensor, Tensor]
"""Edges as (query, key), each int64 (E,), sorted by query, then key."""

PAIRS_PER_STEP = 1 << 24  # pairs (query, key) that a scan of a predicate looks at in one step: 16 MiB of bools
_CLASS_NUMBERS = itertools.count(1)


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True, repr=False, eq=False)
class Graph:
    """A set of directed edges k → q, "query q hears key k", over any number of nodes.

    A graph is frozen, hashable and comparable, and its `repr` is an expression that rebuilds it. Graphs combine as
    Python's `set` does, ``|  &  -  ^  ~``, and further with ``.T`` (every edge reversed) and ``@`` (two hops).

    A graph of your own is a class with fields and one method, `contains`. Deriving from Graph makes it a frozen
    dataclass; ``@dataclass(frozen=True)`` may stand above it, and changes nothing.

    >>> from attngraph import Causal
    >>> class Ring(Graph):
    ...     nodes: int
    ...
    ...     def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    ...         return (kv_idx - q_idx) % self.nodes == 1
    >>> (Ring(nodes=4) | Causal()).mask(4, 4).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
            [1, 1, 1, 1]], dtype=torch.int32)
    """

    if TYPE_CHECKING:  # plain attributes, set when a graph is made, so that torch.compile reads constants

        @property
        def size(self) -> Size:
            """(num_queries, num_keys), None where any number fits."""
            ...

        @property
        def heads(self) -> int | None:
            """How many heads have each their own graph, or None: one graph for all heads."""
            ...

        @property
        def _key(self) -> str:
            """Which graph this is, as text: equal graphs have equal keys."""
            ...

        @property
        def _may_change(self) -> bool:
            """Whether `_state` has to be asked."""
            ...

    # ================================================================== what a graph MUST define

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The definition: which pairs of node numbers (broadcasting int64 tensors) are edges, as a bool tensor.

        A graph with heads answers with one more dimension in front, (H, ...).
        """
        raise TypeError(f"{type(self).__name__} must define contains(q_idx, kv_idx)")

    # ====================================================== what a graph MAY define, to be faster or to check itself
    # Each has a default, and must agree with `contains`: the tests of GRAPHS hold it to that.

    def _check(self) -> None:
        """Raise ValueError or TypeError if the arguments make no graph; put them into their normal form."""

    def _own_size(self) -> Size:
        """(num_queries, num_keys), None where any number fits."""
        return (None, None)

    def _breakpoints(self, n: int, m: int) -> Breakpoints | None:
        """Rows, columns and diagonals at which membership can change, where they can be named (see `counting`)."""
        return None

    def _edges(self, n: int, m: int) -> Edges:
        """All edges, sorted; the default scans `contains`."""
        step = max(1, PAIRS_PER_STEP // max(m, 1))
        found = [torch.empty(0, 2, dtype=torch.int64)]
        for start in range(0, n, step):
            query = torch.arange(start, min(start + step, n))[:, None]
            found.append(self.contains(query, torch.arange(m)[None]).nonzero() + torch.tensor([start, 0]))
        query, key = torch.cat(found).unbind(1)
        return query, key

    def _edges_of_rows(self, start: int, stop: int, n: int, m: int) -> Edges:
        """The edges of the queries start … stop-1, renumbered from 0; the default chooses among those of all n."""
        query, key = list_edges(self, n, m)
        inside = (query >= start) & (query < stop)
        return query[inside] - start, key[inside]

    def _lists_rows(self, n: int, m: int) -> bool:
        """Whether `_edges_of_rows` costs as much as the edges it lists, not as those of all queries."""
        return type(self)._edges_of_rows is not Graph._edges_of_rows or self._breakpoints(n, m) is not None

    def _count(self, n: int, m: int) -> int:
        """The number of edges; the default lists them."""
        return len(list_edges(self, n, m)[0])

    def _classify_boxes(self, boxes: Boxes) -> Tensor:
        """EMPTY, PARTIAL or FULL for each box (see `boxes`), int8; PARTIAL is always safe."""
        return of_boxes.constant_class(boxes, of_boxes.PARTIAL)

    def _box_pattern(self, boxes: Boxes) -> list[Tensor]:
        """Numbers that decide which pairs of a box are edges: boxes of one shape that agree in all have equal edges."""
        return [boxes.top, boxes.left]

    def _found_by_listing(self) -> bool:
        """Whether to find the edges by listing them, rather than by boxes: true of a graph that can do only that."""
        return type(self)._edges is not Graph._edges and type(self)._classify_boxes is Graph._classify_boxes

    def _bind(self, n: int | None, m: int | None) -> Graph:
        """The same graph, told its size; only what depends on the size (Random, two hops) listens."""
        return self._map(lambda part: part._bind(n, m))

    def _head(self, index: int) -> Graph:
        """The graph of one head."""
        return self._map(lambda part: part._head(index)) if self.heads else self

    def _write(self, inner: Callable[[Graph], str]) -> str:
        """The graph as an expression, its parts written by `inner`."""
        names = [field.name for field in fields(cast(Any, self))]
        while names and names[-1] in self._defaults and getattr(self, names[-1]) == self._defaults[names[-1]]:
            names.pop()
        given = (_argument(getattr(self, name), inner) for name in names)
        return f"{type(self).__name__}({', '.join(given)})"

    def _write_key(self) -> str:
        """The graph as text that no other graph of this process has: equal graphs have equal keys."""
        own = "" if type(self).__module__.startswith("attngraph.") else f"#{self._class_number} "
        return own + self._write(lambda part: part._key)

    def _write_traced(self, tensors: list[Tensor]) -> str:
        """The graph as text for a compiled program; what was made outside it stands there as _0, _1, … of `tensors`.

        These are handles, which mean nothing in another process: an exported program has text and edges instead.
        """
        if self._handle is None or torch.compiler.is_exporting():
            return self._write_exported(tensors)
        tensors.append(self._handle)
        return f"_{len(tensors) - 1}"

    def _write_exported(self, tensors: list[Tensor]) -> str:
        """The graph as text that `parse` understands, parts of it as `_write_traced` writes them."""
        if not type(self).__module__.startswith("attngraph."):
            raise ValueError(
                f"{self} can't be part of an exported program, as {type(self).__name__} is a class of this process: "
                f"export with its edges, EdgeList(graph.edge_index(n, m), size=(n, m))"
            )
        return self._write(lambda part: part._write_traced(tensors))

    def _state(self) -> tuple:
        """What changes when the edges do, of a graph whose definition reads something that can change."""
        return tuple(state for part in self._children for state in part._state())

    # ========================================================================= what follows from the fields

    _class_number = 0
    _defaults: ClassVar[dict[str, Any]] = {}
    """Of the fields that have one; torch.compile can't read `dataclasses.MISSING`."""
    _precedence = 6
    _handle: ClassVar[Tensor | None] = None
    """What names it in compiled programs, unless it is made in one; see `cache.CompiledPrograms`."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        _refuse_reserved_fields(cls)
        owner = _owner(cls, "contains")
        if owner is cls or not issubclass(owner, Graph):
            setattr(cls, "contains", _checked(cls.contains))  # noqa: B010  its type stays
        for name in _FOLLOWS_CONTAINS:
            if cls.__mro__.index(_owner(cls, name)) > cls.__mro__.index(owner):  # of a base class with other edges
                setattr(cls, name, getattr(Graph, name))
        cls._class_number = next(_CLASS_NUMBERS)
        own = cls.__dict__
        cls.__repr__ = cls.__repr__  # the class's own, so that no dataclass decorator makes another
        if "__eq__" not in own:
            cls.__hash__ = Graph.__hash__
        dataclass(frozen=True, repr=False)(cls)
        cls._defaults = {each.name: each.default for each in fields(cast(Any, cls)) if each.default is not MISSING}
        del cls.__setattr__, cls.__delattr__  # Graph's serve; a dataclass decorator would refuse to make them again

    def __post_init__(self):
        self._check()
        if not torch.compiler.is_compiling():
            _require_values(self)
        children = self._children
        heads = {part.heads for part in children if part.heads}
        if len(heads) > 1:
            raise ValueError(f"graphs with different numbers of heads do not combine (got {sorted(heads)})")
        self._set(size=self._own_size(), heads=heads.pop() if heads else None)
        self._set(_may_change=any(part._may_change for part in children) or type(self)._state is not Graph._state)
        if not torch.compiler.is_compiling():
            key, equal, handle = cache.COMPILED.register(self._write_key(), self)
            self._set(
                _key=key, _handle=handle, _equal=equal
            )  # which stays alive as long as this one: its key names both

    def _set(self, **values: object) -> None:
        """Attributes of a graph that is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def _children(self) -> tuple[Graph, ...]:
        """The graphs this one is made of."""
        values = (getattr(self, field.name) for field in fields(cast(Any, self)))
        return tuple(
            part
            for value in values
            for part in (value if isinstance(value, tuple) else (value,))
            if isinstance(part, Graph)
        )

    def _map(self, change: Callable[[Graph], Graph]) -> Graph:
        """The same combination of changed parts."""
        if not self._children:
            return self
        changed = {}
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            if isinstance(value, Graph):
                changed[field.name] = change(value)
            elif isinstance(value, tuple) and any(isinstance(part, Graph) for part in value):
                changed[field.name] = tuple(change(part) if isinstance(part, Graph) else part for part in value)
        return replace(cast(Any, self), **changed)

    def __hash__(self) -> int:
        known = self.__dict__.get("_hash")
        if known is None:
            known = hash((type(self), *(getattr(self, field.name) for field in fields(cast(Any, self)))))
            self._set(_hash=known)
        return known

    def __repr__(self) -> str:
        return self._write(repr)

    def __str__(self) -> str:
        return self._write(str)

    def __reduce__(self) -> tuple:
        return _rebuild, (
            type(self),
            {each.name: getattr(self, each.name) for each in fields(cast(Any, self)) if each.init},
        )

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            kind = type(self).__name__
            raise AttributeError(
                f"{kind} has no {name} yet: its own __init__ or __post_init__ must end with that of Graph, "
                f"super().__post_init__()"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __copy__(self) -> Graph:
        return self  # a value

    def __deepcopy__(self, memo: dict) -> Graph:
        return self

    def __bool__(self) -> bool:
        raise TypeError(
            "a graph has no truth value, as its edges depend on its size: ask graph.num_edges(n, m) > 0, and combine "
            "graphs with & | ~, not with and, or, not"
        )

    # ================================================================================================ the algebra

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
        return algebra.QuerySlice(self, start, stop)

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

    # ================================================================================================== the views

    def mask(self, n: int | None = None, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The edges as a bool tensor (n, m), or (H, n, m): rows are queries, columns are keys, True is an edge."""
        graph, n, m = at_size(self, n, m)
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
        graph, n, m = at_size(self, n, m)
        query, key = list_edges(graph, n, m)
        return torch.stack([key, query])

    def num_edges(self, n: int | None = None, m: int | None = None) -> int:
        """The exact number of edges, without enumerating them where the expression allows.

        >>> from attngraph import Causal
        >>> Causal().num_edges(10**9, 10**9)
        500000000500000000
        """
        graph, n, m = at_size(self, n, m)
        return count_edges(graph, n, m)

    def in_degrees(self, n: int | None = None, m: int | None = None) -> Tensor:
        """How many keys each query hears: int64 (n,)."""
        graph, n, m = at_size(self, n, m)
        found = None if graph.heads else counting.in_degrees(graph, n, m)
        return torch.bincount(list_edges(graph, n, m)[0], minlength=n) if found is None else found

    def out_degrees(self, n: int | None = None, m: int | None = None) -> Tensor:
        """How many queries hear each key: int64 (m,)."""
        graph, n, m = at_size(self, n, m)
        return graph.T.in_degrees(m, n)

    def spans(self, start: int, stop: int, n: int | None = None, m: int | None = None) -> list[tuple[int, int]]:
        """Ranges of keys (first, stop) outside of which the queries start … stop-1 hear nobody; conservative.

        >>> from attngraph import Causal, Prefix, Window
        >>> (Causal() & (Window(2, 0) | Prefix(1))).spans(10, 12, 100, 100)
        [(0, 1), (8, 12)]
        """
        graph, n, m = at_size(self, n, m)
        if not 0 <= start <= stop <= n:
            raise ValueError(f"spans needs 0 <= start <= stop <= {n}, the number of queries (got {start} and {stop})")
        return of_boxes.spans(graph, start, stop, m)


_FOLLOWS_CONTAINS = {
    "_breakpoints", "_edges", "_edges_of_rows", "_lists_rows", "_count", "_classify_boxes", "_box_pattern",
    "_found_by_listing",
}  # fmt: skip
"""What a graph may define besides `contains`, and what is of no use to a class with another `contains`."""


def _owner(cls: type, name: str) -> type:
    """The class from which a class has an attribute."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _refuse_assignment(self: Graph, name: str, value: object = None) -> None:
    raise FrozenInstanceError(f"a graph is a value: field {name!r} of {type(self).__name__} cannot change")


for _name in ("__setattr__", "__delattr__"):
    setattr(Graph, _name, _refuse_assignment)


# ------------------------------------------------------------------------ of any graph, by the fastest way known


def at_size(graph: Graph, n: int | None = None, m: int | None = None) -> tuple[Graph, int, int]:
    """The graph bound to a definite size, and that size; what is not given is the graph's own."""
    n, m = (_node_count(name, given) for name, given in (("n", n), ("m", m)))
    n, m = common_size(f"graph {graph} and the size asked for", graph.size, (n, m))
    if n is None or m is None:
        raise ValueError(f"graph {graph} has size {(n, m)}: give the missing number, as in graph.mask(n, m)")
    return graph._bind(n, m), n, m


def list_edges(graph: Graph, n: int, m: int) -> Edges:
    """All edges, sorted, of a graph that is bound to its size; where heads have graphs of their own, those of any."""
    if graph.heads:
        return merge_edges([list_edges(graph._head(h), n, m) for h in range(graph.heads)], m)
    found = counting.edges(graph, n, m)
    return graph._edges(n, m) if found is None else found


def count_edges(graph: Graph, n: int, m: int) -> int:
    """The number of edges of a graph that is bound to its size."""
    if graph.heads:
        of_any_head = reduce(or_, dict.fromkeys(graph._head(h) for h in range(graph.heads)))
        return count_edges(of_any_head._bind(n, m), n, m)
    found = counting.count(graph, n, m)
    return graph._count(n, m) if found is None else found


# -------------------------------------------------------------------------------------------- how a class is made


def _rebuild(cls: type[Graph], values: dict[str, Any]) -> Graph:
    """A graph from the values of its fields."""
    return cls(**values)


_ATTRIBUTES = {"size", "heads", "_key", "_may_change", "_equal", "_hash"}  # of every graph, set when it is made


def _refuse_reserved_fields(cls: type[Graph]) -> None:
    """Raise if a field would hide what every graph has."""
    reserved = {name for name in vars(Graph) if not name.startswith("__")} | _ATTRIBUTES
    for name in get_annotations(cls):
        if name in reserved:
            raise TypeError(
                f"{cls.__name__} can't have a field called {name!r}: every graph has an attribute of this name; "
                f"choose another one"
            )


def _flat(value: object) -> Iterator[object]:
    """A value, or what tuples within tuples hold."""
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _require_values(graph: Graph) -> None:
    """Raise unless every field is a value: what can't be compared can't be looked up."""
    for field in fields(cast(Any, graph)):
        value = getattr(graph, field.name)
        if any(isinstance(part, Tensor) for part in _flat(value)):
            raise TypeError(
                f"field {field.name!r} of {type(graph).__name__} must be a number, a tuple or a graph, so that the "
                f"graph is a value (got a Tensor): give it as a tuple, tensor.tolist(), or make an EdgeList"
            )
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"field {field.name!r} of {type(graph).__name__} must be hashable, so that the graph is a value (got a "
                f"{type(value).__name__}): give a tuple, or turn it into one in _check"
            ) from None


def _checked(contains: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """A graph's `contains` whose result is known to be a bool for every pair."""

    @wraps(contains)
    def checked(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = contains(self, q_idx, kv_idx)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"contains of {type(self).__name__} must return a bool tensor (got {kind}); use == < & |")
        pairs = torch.broadcast_shapes(q_idx.shape, kv_idx.shape)
        shape = pairs if self.heads is None else (self.heads, *pairs)
        try:
            return found.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"contains of {type(self).__name__} must return one bool for each pair, of shape {tuple(shape)} (got "
                f"{tuple(found.shape)}): compare q_idx with kv_idx element by element"
            ) from None

    return checked


def _argument(value: object, inner: Callable[[Graph], str]) -> str:
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
