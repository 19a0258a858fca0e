"""Graphs that are given as any function of two node numbers; and what such a function reads that can change."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MappingView
from contextvars import ContextVar
from decimal import Decimal
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor

from attngraph.graph.base import Graph

MAX_BYTES_COMPARED = 1 << 22  # of a tensor on the CPU whose numbers are compared; of larger ones, the version
MAX_DEPTH = 12  # of containers, objects and functions within each other; what lies deeper is never taken for unchanged
MAX_PARTS = 5000  # that are looked at; nor is what has more

_NUMBERS = itertools.count(1)


class Predicate(Graph):
    """The pairs for which a function says so; see `attngraph.from_function`. Every pair is looked at.

    Functions can't be compared: a predicate equals itself alone. What the function reads (captured variables, globals,
    attributes of its object) may change, and then the edges do: plans and masks are kept for one `_state` alone.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def _check(self):
        if not callable(self.function):
            raise TypeError(f"from_function takes a function of (q_idx, kv_idx) (got {self.function!r})")
        _require_two_arguments(self.function)
        self._set(_number=next(_NUMBERS))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        try:
            return self.function(q_idx, kv_idx)
        except RuntimeError as error:
            if "Boolean value of Tensor" not in str(error):
                raise
            raise TypeError(
                f"{self} uses `and`, `or`, `not` or `if` on tensors: it is asked about many pairs at once, so combine "
                f"them by & | ~, and choose by torch.where"
            ) from error

    def _state(self) -> tuple:
        return tuple(_described(self.function, 0, set()))

    def _write(self, inner: Callable[[Graph], str]) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"from_function(<{name}, number {self.__dict__['_number']}>)"

    def _write_exported(self, tensors: list[Tensor]) -> str:
        raise ValueError(
            f"{self} can't be part of an exported program, as a function can't be written down: export with its edges, "
            f"EdgeList(graph.edge_index(n, m), size=(n, m))"
        )

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def alike_in_every_process(graph: Graph) -> str:
    """A graph as text that is the same in every process that makes it: of functions, with what they read."""
    text = re.sub(r", number \d+>", ">", graph._key)
    if not graph._may_change:
        return text
    state = []
    for part in graph._state():
        if isinstance(part, CodeType):
            constants = [each for each in part.co_consts if not isinstance(each, CodeType)]
            state.append(repr((part.co_code, part.co_names, constants)))
        elif isinstance(part, tuple):
            state.append(repr([each for each in part if not isinstance(each, ReferenceType)]))
        elif isinstance(part, bytes):
            state.append(repr(part))
    return f"{text} with checksum {zlib.crc32(repr(sorted(state)).encode()):08x}"


def _require_two_arguments(function: Callable[..., Any]) -> None:
    """Raise if a function can't be called with q_idx and kv_idx."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins
        return
    try:
        signature.bind(None, None)
    except TypeError:
        hint = ""
        if len(signature.parameters) == 4:
            hint = "; a mask_mod of FlexAttention with batch and head: lambda q, k: mask_mod(0, 0, q, k)"
        raise TypeError(f"from_function takes a function of (q_idx, kv_idx) (got one of {signature}){hint}") from None


def _described(value: Any, depth: int, seen: set[int]) -> Iterator[object]:
    """Hashable things that change when the value does, as far as that can be seen; else something new each time."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic | range | Decimal):
        yield type(value), value
    elif isinstance(value, Tensor):
        yield _tensor_state(value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytearray | array | memoryview):
        yield bytes(value)
    elif isinstance(value, CodeType):
        yield value
    elif isinstance(value, Iterator):
        yield object()  # it gives something else each time
    elif depth > MAX_DEPTH or len(seen) > MAX_PARTS:
        yield object()  # unlike any other: nothing is kept for it
    elif not _is_foreign(value) and id(value) not in seen:
        yield _Same(value)
        seen.add(id(value))
        for part in _parts(value):
            yield from _described(part, depth + 1, seen)


class _Same:
    """An object, equal to itself alone: unlike its id, which the next object may have when it is gone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_foreign(value: Any) -> bool:
    """Whether a module, class or function belongs to Python or to a library, whose own state is no part of a graph."""
    if not isinstance(value, ModuleType | type | FunctionType | BuiltinFunctionType):
        return False
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType | None):
        return False  # a method, as of a dict
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return name is None or name.partition(".")[0] in FOREIGN


FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "attngraph"} - {"__main__"}


def _tensor_state(tensor: Tensor) -> tuple:
    """The numbers of a tensor, by a checksum; of a large one or one elsewhere, how often torch has changed it."""
    small = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.nbytes <= MAX_BYTES_COMPARED
    if small:
        numbers = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
        return tuple(tensor.shape), tensor.dtype, zlib.crc32(numbers.view(torch.uint8).numpy().tobytes())
    return weakref.ref(tensor), None if tensor.is_inference() else tensor._version


def _parts(value: Any) -> Iterator[Any]:
    """What a function, an object, a class or a container reads or holds."""
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, BuiltinFunctionType):
        yield value.__self__
    elif isinstance(value, ContextVar):
        yield value.get(None)
    elif isinstance(value, ReferenceType):
        yield value()
    elif isinstance(value, FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, MappingView):
        yield from cast(Any, value)
    elif isinstance(value, Mapping):
        yield from (side for item in value.items() for side in item)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
    else:
        yield from dict(getattr(value, "__dict__", {})).values()
        if isinstance(value, type):
            yield from cast(Any, value).__bases__
        for base in cast(Any, type(value)).__mro__:
            slots: Any = base.__dict__.get("__slots__", ())
            yield from (getattr(value, slot, None) for slot in slots)
        yield type(value)


def _parts_of_function(function: FunctionType) -> Iterator[Any]:
    """Captured variables, defaults, attributes, and globals that it names; of a module that it names, what it names."""
    yield function.__code__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from function.__dict__.values()
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, ModuleType) and not _is_foreign(value):
            yield from (vars(value)[own] for own in names & vars(value).keys())
        elif not isinstance(value, ModuleType):
            yield value


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function may read from its module, those of functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
