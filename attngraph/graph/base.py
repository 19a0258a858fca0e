"""The meaning of a graph: which key nodes each query node hears; the contract that every graph fulfils.

No kernels, no devices, no weights: a graph is a value that answers questions about its edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, dataclass_transform

import torch
from torch import Tensor

from attngraph import cache
from attngraph.arguments import checked
from attngraph.graph import boxes as of_boxes
from attngraph.graph.boxes import Boxes, require_memory
from attngraph.graph.counting import Breakpoints
from attngraph.graph.sharing import once
from attngraph.graph.values import (
    Size,
    argument,
    check_found,
    common_size,
    cut,
    exact,
    is_operand,
    node_count,
    put_plainly,
    refuse_assignment,
    refuse_old_hooks,
    refuse_reserved_fields,
    require_values,
    shortened,
)
from attngraph.graph.values import require_ints as require_ints

if TYPE_CHECKING:
    from attngraph.graph.listing import IsListed, Split

Edges = tuple[Tensor, Tensor]
"""Edges as (query, key), each int64 (E,), sorted by query, then key."""

MAX_DEPTH = 210  # operations within each other: some Python frames each
MAX_TERMS_TOLD, MAX_TERMS_WRITTEN = 100, 1 << 20  # of an expression that `str` and `repr` write out
MAX_TOLD, MAX_WRITTEN = 1000, 10_000  # characters of `str` and `repr`; `text.written` writes all
_CLASS_NUMBERS = itertools.count(1)


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True, repr=False, eq=False)
class Graph:
    """A set of directed edges k → q, "query q hears key k", over any number of nodes.

    A graph is frozen, hashable and comparable, and its `repr`, up to 10,000 characters, is an expression that rebuilds
    it. Graphs combine as Python's `set` does, ``|  &  -  ^  ~``, and with ``.T`` (edges reversed) and ``@`` (two hops).

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

        @property
        def _unbound(self) -> bool:
            """Whether it or a part of it is to be told its size: see `_waits`."""
            ...

        @property
        def _places(self) -> tuple[int | None, ...]:
            """Where its queries stand among its keys: see `positions`."""
            ...

        @property
        def _unresolved(self) -> bool:
            """Whether queries and keys choose some of its edges: see `resolve`."""
            ...

        @property
        def _terms(self) -> int:
            """How many graphs and operations there are in the expression, written out."""
            ...

        @property
        def _depth(self) -> int:
            """How many operations lie within each other."""
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
        found = [torch.empty(0, 2, dtype=torch.int64)]
        for start, inside in listing.scanned(self, n, m):
            found.append(inside.nonzero() + torch.tensor([start, 0]))
            rows = start + len(inside)
            so_far = sum(map(len, found)) * n // rows
            require_memory(
                so_far * listing.BYTES_PER_EDGE, f"to list the about {so_far:,} edges of {self} at {n} × {m}"
            )
        query, key = torch.cat(found).unbind(1)
        return query, key

    def _edges_of_rows(self, start: int, stop: int, n: int, m: int) -> Edges:
        """The edges of the queries start … stop-1, renumbered from 0; the default chooses among those of all n."""
        if not defines(self, "_edges"):
            return Graph._edges(self.rows(start, stop), stop - start, m)
        query, key = self._edges(n, m)
        inside = (query >= start) & (query < stop)
        return query[inside] - start, key[inside]

    def _count(self, n: int, m: int) -> int:
        """The number of edges; the default lists them, or scans `contains`."""
        if defines(self, "_edges"):
            return len(self._edges(n, m)[0])
        return sum(int(inside.sum()) for _, inside in listing.scanned(self, n, m))

    def _classify_boxes(self, boxes: Boxes) -> Tensor:
        """EMPTY, PARTIAL or FULL for each box (see `boxes`), int8; PARTIAL is always safe."""
        return of_boxes.constant_class(boxes, of_boxes.PARTIAL)

    def _box_pattern(self, boxes: Boxes) -> list[Tensor]:
        """Numbers that decide which pairs of a box are edges: boxes of one shape that agree in all have equal edges."""
        return [boxes.top, boxes.left]

    def _found_by_listing(self) -> bool:
        """Whether to find the edges by listing them, rather than by boxes: true of a graph that can do only that."""
        return defines(self, "_edges") and not defines(self, "_classify_boxes")

    def _split(self, n: int, m: int, is_listed: IsListed) -> Split:
        """The graph without those parts that are to be listed, and where these lie."""
        return (algebra.nothing(self), (listing.Listed(self, n, m),)) if is_listed(self, n, m) else (self, ())

    def _waits(self) -> bool:
        """Whether `_bind` would tell the graph something that it does not know."""
        if not _owner(type(self), "_bind").__module__.startswith("attngraph.graph."):
            return True
        return any(part._unbound for part in self._children)

    def _own_places(self) -> tuple[int | None, ...]:
        """The keys at which query 0 stands, as each part tells it: see `positions`."""
        return tuple(dict.fromkeys(place for part in self._children for place in part._places))

    def _bind(self, n: int | None, m: int | None) -> Graph:
        """The same graph, told its size; only what depends on the size (Random, two hops) listens."""
        return self._map(bind, n, m)

    def _head(self, index: int) -> Graph:
        """The graph of one head."""
        return self._map(lambda part, head: part._head(head), index) if self.heads else self

    def _write(self, inner: Callable[[Graph], str]) -> str:
        """The graph as an expression, its parts written by `inner`."""
        names = [field.name for field in fields(cast(Any, self))]
        while names and names[-1] in self._defaults and getattr(self, names[-1]) == self._defaults[names[-1]]:
            names.pop()
        given = (argument(getattr(self, name), inner) for name in names)
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
    _is_choice = False  # whether queries and keys choose its edges
    _handle: ClassVar[Tensor | None] = None
    """What names it in compiled programs, unless it is made in one; see `cache.CompiledPrograms`."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        refuse_reserved_fields(cls, {name for name in vars(Graph) if not name.startswith("__")} | _ATTRIBUTES)
        refuse_old_hooks(cls)
        owner = _owner(cls, "contains")
        if owner is cls or not issubclass(owner, Graph):
            setattr(cls, "contains", once(cls.contains, check_found))  # noqa: B010  its type stays
        for name in _ASKED_ONCE & vars(cls).keys():
            setattr(cls, name, once(getattr(cls, name)))
        for name in _FOLLOWS_CONTAINS:
            if cls.__mro__.index(_owner(cls, name)) > cls.__mro__.index(owner):  # of a base class with other edges
                setattr(cls, name, getattr(Graph, name))
        cls._class_number = next(_CLASS_NUMBERS)
        own = cls.__dict__
        cls.__repr__ = cls.__repr__  # the class's own, so that no dataclass decorator makes another
        if "__eq__" not in own:
            cls.__eq__, cls.__hash__ = cls.__eq__, cls.__hash__
        dataclass(frozen=True, repr=False)(cls)
        cls._defaults = {each.name: each.default for each in fields(cast(Any, cls)) if each.default is not MISSING}
        del cls.__setattr__, cls.__delattr__  # Graph's serve; a dataclass decorator would refuse to make them again

    def __post_init__(self):
        if not torch.compiler.is_compiling():
            put_plainly(self)
        self._check()
        if not torch.compiler.is_compiling():
            require_values(self, type(self).__hash__ is Graph.__hash__)
        children = self._children
        depth = max([0, *(part._depth + 1 for part in children)])
        self._set(_terms=1 + sum(part._terms for part in children), _depth=depth)
        if depth > MAX_DEPTH:
            raise ValueError(
                f"a graph nests at most {MAX_DEPTH} operations (got one more): combine many graphs by one operation, "
                f"as a | b | c is, or list the edges of a part, EdgeList(part.edge_index(n, m), (n, m))"
            )
        heads = {part.heads for part in children if part.heads}
        if len(heads) > 1:
            raise ValueError(f"graphs with different numbers of heads do not combine (got {sorted(heads)})")
        self._set(size=self._own_size(), heads=heads.pop() if heads else None)
        may_change = any(part._may_change for part in children) or type(self)._state is not Graph._state
        unresolved = self._is_choice or any(part._unresolved for part in children)
        self._set(_may_change=may_change, _unresolved=unresolved, _unbound=self._waits(), _places=self._own_places())
        if not torch.compiler.is_compiling():
            key, equal, handle = cache.COMPILED.register(shortened(self._write_key()), self)
            self._set(_key=key, _handle=handle, _equal=None if equal is self else equal)  # its key names both: kept

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

    def _map(self, change: Callable[..., Graph], *arguments: Any) -> Graph:
        """The same combination of changed parts; the graph itself where none changes."""
        changed = {}
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            if isinstance(value, Graph):
                new = change(value, *arguments)
                if new is not value:
                    changed[field.name] = new
            elif isinstance(value, tuple):
                new = list(value)
                for place, part in enumerate(value):  # one frame: expressions are deep
                    if isinstance(part, Graph):
                        new[place] = change(part, *arguments)
                if any(one is not other for one, other in zip(new, value, strict=True)):
                    changed[field.name] = tuple(new)
        return replace(cast(Any, self), **changed) if changed else self

    def _values(self) -> tuple:
        """What makes the graph equal to others of its class."""
        return tuple(exact(getattr(self, field.name)) for field in fields(cast(Any, self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph) or type(self) is not type(other):
            return NotImplemented
        one, two = (each.__dict__.get("_equal") for each in (self, other))
        if (self if one is None else one) is (other if two is None else two):
            return True
        return hash(self) == hash(other) and self._values() == other._values()

    def __hash__(self) -> int:
        known = self.__dict__.get("_hash")
        if known is None:
            known = hash((type(self), self._values()))
            self._set(_hash=known)
        return known

    def __repr__(self) -> str:
        if self._terms > MAX_TERMS_WRITTEN:
            return self._named()
        return cut(self._write(repr if self._depth <= MAX_DEPTH // 2 else Graph.__repr__), MAX_WRITTEN)  # repr is deep

    def __str__(self) -> str:
        return cut(self._write(str), MAX_TOLD) if self._terms <= MAX_TERMS_TOLD else self._named()

    def _named(self) -> str:
        """An expression that is too long to be written out."""
        return f"<{type(self).__name__} of {self._terms - 1:,} graphs>"

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
        return algebra.chain(algebra.Union, self, other) if is_operand(other) else NotImplemented

    def __and__(self, other: Graph) -> Graph:
        return algebra.chain(algebra.Intersection, self, other) if is_operand(other) else NotImplemented

    def __sub__(self, other: Graph) -> Graph:
        return algebra.Difference((self, other)) if is_operand(other) else NotImplemented

    def __xor__(self, other: Graph) -> Graph:
        return algebra.SymmetricDifference((self, other)) if is_operand(other) else NotImplemented

    def __matmul__(self, other: Graph) -> Graph:
        """Two hops: query i hears key j if i hears, in this graph, some node that hears j in the other."""
        return algebra.TwoHops(self, other) if is_operand(other) else NotImplemented

    def _refuse_operand(self, other: object) -> Graph:
        """Of an operator whose left side is no graph."""
        is_operand(other)
        return NotImplemented

    __ror__ = __rand__ = __rsub__ = __rxor__ = __rmatmul__ = _refuse_operand

    def __invert__(self) -> Graph:
        return algebra.Complement(self)

    @property
    def T(self) -> Graph:
        """Every edge reversed: who heard is now heard."""
        return algebra.Transpose(self)

    def rows(self, start: int, stop: int) -> Graph:
        """The queries start … stop-1, renumbered from 0, with all the keys: for decoding and for partitions.

        Biases of distances and rotary positions know that query 0 stands at key `start`.

        >>> from attngraph import Causal
        >>> Causal().rows(2, 3).mask(1, 4).int()
        tensor([[1, 1, 1, 0]], dtype=torch.int32)
        """
        return algebra.QuerySlice(self, start, stop)

    @checked
    def sized(self, num_queries: int | None = None, num_keys: int | None = None) -> Graph:
        """The same graph, knowing its size; a size that contradicts its own is an error.

        >>> from attngraph import Causal
        >>> Causal().sized(3, 3).size
        (3, 3)
        """
        return algebra.Sized(self, num_queries, num_keys) if (num_queries, num_keys) != self.size else self

    @checked
    def with_global_nodes(self, count: int) -> Graph:
        """The graph with `count` more nodes, in front (CLS tokens, registers), that hear all and are heard by all.

        >>> from attngraph import Identity
        >>> Identity().with_global_nodes(1).mask(3, 3).int()
        tensor([[1, 1, 1],
                [1, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
        """
        return algebra.WithGlobalNodes(self, count)

    @checked
    def of_head(self, index: int) -> Graph:
        """The graph of one head, of those that ``heads`` counts; the graph itself where all heads have one.

        >>> from attngraph import Causal, PerHead, Window
        >>> (PerHead([Window(1, 0), Window(2, 0)]) & Causal()).of_head(1)
        Window(2, 0) & Causal()
        """
        if self.heads is not None and not 0 <= index < self.heads:
            raise ValueError(f"index must be that of a head, from 0 to {self.heads - 1} (got {index})")
        return self._head(index)

    def resolve(self, q: Tensor, k: Tensor, attention_mask: Tensor | None = None) -> Graph:
        """The graph of this batch, where queries and keys choose the edges (`TopK`, `BlockTopK`); itself where not.

        q is (B, H, N, D) and k (B, Hkv, M, D), as in `attend`, or both without the first or the first two dimensions;
        attention_mask, bool (B, M), is False for keys that nobody may choose. Of several entries, the graph is
        `Batched`; of several heads, `PerHead`. The choice has no gradient.

        >>> from attngraph import Causal, TopK
        >>> (TopK(1) & Causal()).resolve(*torch.tensor([[[3.0], [1.0], [2.0]]] * 2))
        EdgeList([[0, 0, 0], [0, 1, 2]], size=(3, 3))
        """
        from attngraph.graph import dynamic  # which is made of graphs of every kind

        return dynamic.resolve(self, q, k, attention_mask)

    # ================================================================================================== the views

    @checked
    def mask(self, n: int | None = None, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """The edges as a bool tensor (n, m), or (H, n, m): rows are queries, columns are keys, True is an edge."""
        graph, n, m = at_size(self, n, m)
        heads = graph.heads or 1
        if n * m * heads <= listing.PAIRS_PER_STEP:
            return graph.contains(torch.arange(n, device=device)[:, None], torch.arange(m, device=device)[None])
        require_memory(
            n * m * heads, f"for the mask of {graph} at {n} × {m}", None if device is None else torch.device(device)
        )
        found = torch.empty((n, m) if graph.heads is None else (heads, n, m), dtype=torch.bool, device=device)
        for start, rows in listing.scanned(graph, n, m, device):
            found[..., start : start + rows.shape[-2], :] = rows
        return found

    def edge_index(self, n: int | None = None, m: int | None = None) -> Tensor:
        """The edges as an int64 tensor (2, E): row 0 the key (source), row 1 the query (target), as in PyG.

        Sorted by query, then key: the order of every per-edge tensor in this library. Where heads have each their own
        graph, these are the edges that any head has, and `edge_heads` says which has which.

        >>> from attngraph import Causal
        >>> Causal().edge_index(2, 2)
        tensor([[0, 0, 1],
                [0, 1, 1]])
        """
        graph, n, m = at_size(self, n, m)
        query, key = listing.list_edges(graph, n, m)
        return torch.stack([key, query])

    def edge_heads(self, n: int | None = None, m: int | None = None) -> Tensor:
        """Which head has which edge of `edge_index`: bool (H, E), or (1, E), all True, of one graph for all heads.

        ``weights[:, h, graph.edge_heads(n, m)[h]]`` are those of ``graph.of_head(h)``, in the order of its own edges.
        """
        graph, n, m = at_size(self, n, m)
        query, key = listing.list_edges(graph, n, m)
        return torch.stack(listing.of_each_head(graph, n, m, lambda head, *_: head.contains(query, key)))

    def num_edges(self, n: int | None = None, m: int | None = None) -> int:
        """The exact number of edges, of all heads together, without enumerating them where the expression allows.

        >>> from attngraph import Causal
        >>> Causal().num_edges(10**9, 10**9)
        500000000500000000
        """
        graph, n, m = at_size(self, n, m)
        return sum(listing.of_each_head(graph, n, m, listing.count_edges))

    def in_degrees(self, n: int | None = None, m: int | None = None) -> Tensor:
        """How many keys each query hears: int64 (n,), or (H, n)."""
        graph, n, m = at_size(self, n, m)
        counts = listing.of_each_head(graph, n, m, listing.count_keys)
        return torch.stack(counts) if graph.heads else counts[0]

    def out_degrees(self, n: int | None = None, m: int | None = None) -> Tensor:
        """How many queries hear each key: int64 (m,), or (H, m)."""
        graph, n, m = at_size(self, n, m)
        return graph.T.in_degrees(m, n)

    @checked
    def spans(self, start: int, stop: int, n: int | None = None, m: int | None = None) -> list[tuple[int, int]]:
        """Ranges of keys (first, stop) outside of which the queries start … stop-1 hear nobody; conservative.

        >>> from attngraph import Causal, Prefix, Window
        >>> (Causal() & (Window(2, 0) | Prefix(1))).spans(10, 12, 100, 100)
        [(0, 1), (8, 12)]
        """
        graph, n, m = at_size(self, n, m)
        if not 0 <= start <= stop <= n:
            raise ValueError(f"spans needs 0 <= start <= stop <= {n}, the number of queries (got {start} and {stop})")
        part, n = (listing.of_any_head(graph, n, m) if graph.heads else graph).rows(start, stop), stop - start
        rest, (query, key) = listing.split(part := bind(part, n, m), n, m)
        _, first, last = of_boxes.spans(rest, Boxes.one(0, n, 0, m), key[part.contains(query, key)])
        return list(zip(first.tolist(), last.tolist(), strict=True))


_FOLLOWS_CONTAINS = {
    "_breakpoints", "_edges", "_edges_of_rows", "_count", "_classify_boxes", "_box_pattern", "_found_by_listing",
    "_split",
}  # fmt: skip
"""What a graph may define besides `contains`, and what is of no use to a class with another `contains`."""


_ASKED_ONCE = {"_bind", "_breakpoints", "_classify_boxes", "_box_pattern", "_head", "_split", "_state"}
"""What a combination asks its parts in turn."""

for _name in ("_bind", "_head", "_state"):
    setattr(Graph, _name, once(getattr(Graph, _name)))
for _name in ("__setattr__", "__delattr__"):
    setattr(Graph, _name, refuse_assignment)


def defines(graph: Graph, name: str) -> bool:
    """Whether the class of a graph has another hook than Graph itself."""
    return getattr(type(graph), name) is not getattr(Graph, name)


def _owner(cls: type, name: str) -> type:
    """The class from which a class has an attribute."""
    return next(base for base in cls.__mro__ if name in vars(base))


# ------------------------------------------------------------------------ of any graph


def at_size(graph: Graph, n: int | None = None, m: int | None = None) -> tuple[Graph, int, int]:
    """The graph bound to a definite size, and that size: what is not given is the graph's own; n alone is n × n."""
    m = n if m is None and graph.size[1] is None else m
    n, m = node_count("n", n), node_count("m", m)
    n, m = common_size(lambda: f"graph {graph} and the size asked for", graph.size, (n, m))
    if n is None or m is None:
        raise ValueError(f"graph {graph} has size {(n, m)}: give the missing number, as in graph.mask(n, m)")
    return bind(graph, n, m), n, m


def bind(graph: Graph, n: int | None, m: int | None) -> Graph:
    """The same graph, told its size."""
    return graph._bind(n, m) if graph._unbound else graph


# -------------------------------------------------------------------------------------------- how a class is made


def _rebuild(cls: type[Graph], values: dict[str, Any]) -> Graph:
    """A graph from the values of its fields."""
    return cls(**values)


_SET_WHEN_MADE = "size heads _key _may_change _equal _hash _terms _depth _unbound _places _unresolved"
_ATTRIBUTES = set(_SET_WHEN_MADE.split())


from attngraph.graph import algebra, listing  # noqa: E402  what the operators of Graph build derives from Graph
