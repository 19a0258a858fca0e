"""A graph is a value: what its class may define, what its fields may hold, and when two of them are equal."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import FrozenInstanceError, fields
from inspect import get_annotations
from operator import index
from types import FunctionType
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import torch
from torch import Tensor

from attngraph.arguments import shown

if TYPE_CHECKING:
    from attngraph.graph.base import Graph

Size = tuple[int | None, int | None]
LARGEST = 1 << 61  # of the numbers of a graph: sums and differences of two stay within int64
MAX_ITEMS_TOLD = 500  # of a tuple, by `str`
MAX_KEY = 4096  # characters of a key; longer ones are named by their hash

# --------------------------------------------------------------------------------------------------- the class


_HOOKS_OF_0_1 = {
    "blocks": ("_classify_boxes", 2), "pattern": ("_box_pattern", 2), "lines": ("_breakpoints", 3),
    "edges": ("_edges", 3), "list_edges": ("_edges", 3), "edges_of": ("_edges_of_rows", 4), "count": ("_count", 3),
    "count_edges": ("_count", 3), "own_size": ("_own_size", 1), "check": ("_check", 1), "bind": ("_bind", 3),
}  # fmt: skip
"""What was a hook in version 0.1, what it is now, and how many arguments it takes."""


def refuse_old_hooks(cls: type[Graph]) -> None:
    """Raise if a class defines a hook by the name of an earlier version, which nobody would call."""
    for name, (today, arguments) in _HOOKS_OF_0_1.items():
        hook = vars(cls).get(name)
        if isinstance(hook, FunctionType) and hook.__code__.co_argcount == arguments:
            raise TypeError(
                f"{cls.__name__} defines {name}, which was a hook of graphs before version 0.2 and is {today} now: "
                f"rename it; a method of yours needs another name"
            )


def refuse_reserved_fields(cls: type[Graph], reserved: Collection[str]) -> None:
    """Raise if a field would hide what every graph has."""
    for name in get_annotations(cls):
        if name in reserved:
            raise TypeError(
                f"{cls.__name__} can't have a field called {name!r}: every graph has an attribute of this name; "
                f"choose another one"
            )


# ---------------------------------------------------------------------------------------------- the instance


def _flat(value: object) -> Iterator[object]:
    """A value, or what tuples within tuples hold."""
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def require_values(graph: Graph, compares_fields: bool) -> None:
    """Raise unless every field is a value: what can't be compared can't be looked up."""
    for field in fields(cast(Any, graph)):
        value = getattr(graph, field.name)
        if any(isinstance(part, Tensor) for part in _flat(value)):
            raise TypeError(
                f"field {field.name!r} of {type(graph).__name__} must be a number, a tuple or a graph, so that the "
                f"graph is a value (got a Tensor): give it as a tuple, tensor.tolist(), or make an EdgeList"
            )
        try:
            if compares_fields:
                hash(value)
        except TypeError:
            raise TypeError(
                f"field {field.name!r} of {type(graph).__name__} must be hashable, so that the graph is a value (got a "
                f"{type(value).__name__}): give a tuple, or turn it into one in _check"
            ) from None


def check_found(graph: Graph, q_idx: Tensor, kv_idx: Tensor, found: Tensor) -> Tensor:
    """What `contains` has found, known to be a bool for every pair."""
    if not isinstance(found, Tensor) or found.dtype != torch.bool:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"contains of {type(graph).__name__} must return a bool tensor (got {kind}); use == < & |")
    pairs = torch.broadcast_tensors(q_idx, kv_idx)[0].shape  # torch.broadcast_shapes loads sympy, half a second
    shape = pairs if graph.heads is None else (graph.heads, *pairs)
    try:
        return found.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"contains of {type(graph).__name__} must return one bool for each pair, of shape {tuple(shape)} (got "
            f"{tuple(found.shape)}): compare q_idx with kv_idx element by element"
        ) from None


def plain_int(value: Any) -> Any:
    """An integer of NumPy, or a tensor of one, as an int; anything else as it is."""
    if isinstance(value, int) or not hasattr(type(value), "__index__") or getattr(value, "ndim", 0):
        return value
    try:
        return value if str(getattr(value, "dtype", "")).endswith("bool") else index(value)
    except (TypeError, RuntimeError):
        return value


def put_plainly(graph: Graph) -> None:
    """Integers of any kind in the fields of a graph as ints, so that equal graphs are equal; raise for no operands."""
    for field in fields(cast(Any, graph)):
        value = getattr(graph, field.name)
        if getattr(field.type, "__name__", field.type) == "Graph" and not hasattr(type(value), "_classify_boxes"):
            raise TypeError(f"{field.name} of {type(graph).__name__} must be a Graph (got {shown(value)})")
        plain = plain_int(value)
        if isinstance(value, tuple) and not _PLAIN.issuperset(map(type, value)):
            plain = type(value)(map(plain_int, value)) if type(value) is tuple else value
        if plain is not value:
            graph._set(**{field.name: plain})


def exact(value: object) -> object:
    """A value that equals no other that reads differently: True is not 1, 0.0 not -0.0; a NaN is itself."""
    if isinstance(value, float):
        return type(value), struct.pack("<d", value)
    if isinstance(value, complex):
        return type(value), struct.pack("<dd", value.real, value.imag)
    if isinstance(value, frozenset):
        return type(value), frozenset(map(exact, value))
    if isinstance(value, tuple):
        return value if _PLAIN.issuperset(map(type, value)) else (type(value), *map(exact, value))
    return value if type(value) in _PLAIN or hasattr(type(value), "_classify_boxes") else (type(value), value)


_PLAIN = {int, str, type(None)}


def shortened(key: str) -> str:
    """A key, or if it is long its beginning and a hash: expressions of expressions would grow without bound."""
    if len(key) <= MAX_KEY:
        return key
    return f"{key[:60]} … <{hashlib.sha256(key.encode()).hexdigest()[:40]}>"


def cut(text: str, longest: int) -> str:
    """A text for people: of a long one, the beginning and the end."""
    half = longest // 2 - 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def argument(value: object, inner: Callable[[Graph], str]) -> str:
    """A field as an argument of an expression."""
    if isinstance(value, tuple):
        if inner is str and len(value) > MAX_ITEMS_TOLD:  # `str` cuts what is so long
            return f"[{', '.join(map(str, value[:200]))}, …, {', '.join(map(str, value[-200:]))}]"
        return f"[{', '.join(argument(item, inner) for item in value)}]"
    return inner(cast(Any, value)) if hasattr(type(value), "_classify_boxes") else repr(value)


def refuse_assignment(self: Any, name: str, value: object = None) -> None:
    if "_key" not in self.__dict__:
        raise FrozenInstanceError(
            f"a graph is a frozen dataclass: {type(self).__name__} declares its fields, as in `{name}: int`, and needs "
            f"no __init__ (one of your own sets them by self._set({name}=…) and ends with self.__post_init__())"
        )
    raise FrozenInstanceError(f"a graph is a value: field {name!r} of {type(self).__name__} cannot change")


def common_size(what: Callable[[], str], *sizes: Size) -> Size:
    """The size that all of these agree on; None agrees with everything."""
    merged = []
    for side, of in zip(("query", "key"), zip(*sizes, strict=True), strict=False):
        definite = sorted({count for count in of if count is not None})
        if len(definite) > 1:
            raise ValueError(
                f"{what()} must have the same number of {side} nodes (got {' and '.join(map(str, definite))})"
            )
        merged.append(definite[0] if definite else None)
    return tuple(merged)


def require_ints(at_least: int | None, **given: int) -> None:
    """Raise unless every argument is an int, not below a bound, and not beyond what node numbers can be."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int (got {value!r})")
        if abs(value) > LARGEST:
            raise ValueError(f"{name} must be at most 2**61 in size (got {value})")
        if at_least is not None and value < at_least:
            raise ValueError(f"{name} must be {at_least} or more (got {value})")


def is_operand(other: Any) -> bool:
    """Whether an operator can combine a graph with this; raise where something else was meant."""
    if isinstance(other, type) and hasattr(other, "_classify_boxes"):
        raise TypeError(f"unsupported operand: the class {other.__name__}; did you mean {other.__name__}()?")
    if hasattr(other, "shape") and not hasattr(type(other), "_classify_boxes"):
        raise TypeError(
            f"unsupported operand: a graph combines with graphs (got a {type(other).__name__}); a mask becomes one by "
            f"from_dense(mask)"
        )
    return hasattr(type(other), "_classify_boxes")


def node_count(name: str, given: SupportsIndex | None) -> int | None:
    """A size that was asked for, as an int."""
    count = plain_int(given)
    if count is None or (isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= LARGEST):
        return count
    raise ValueError(f"{name} must be a number of nodes, an int from 0 to 2**61 (got {given!r})")
