"""Graphs that are given as any function of two node numbers; and what such a function reads that can change."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attngraph.graph.base import Graph

MAX_BYTES_COMPARED = 1 << 22  # of a tensor on the CPU whose numbers are compared; of larger ones, the version
MAX_DEPTH = 4  # of containers, objects and functions within each other

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
        self._set(_number=next(_NUMBERS))

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.function(q_idx, kv_idx)

    def _state(self) -> tuple:
        return tuple(_described(self.function, 0, set()))

    def _write(self, inner: Callable[[Graph], str]) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"from_function(<{name}, number {self.__dict__['_number']}>)"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _described(value: Any, depth: int, seen: set[int]) -> Iterator[object]:
    """Hashable things that change when the value does, as far as that can be seen."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            yield value
            return
        case Tensor():
            yield _tensor_state(value)
            return
        case np.ndarray():
            yield value.shape, zlib.crc32(np.ascontiguousarray(value).tobytes())
            return
        case ModuleType() | type():
            yield id(value)
            return
    yield id(value)
    if depth > MAX_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    for part in _parts(value):
        yield from _described(part, depth + 1, seen)


def _tensor_state(tensor: Tensor) -> tuple:
    """The numbers of a tensor, by a checksum; of a large one or one elsewhere, how often torch has changed it."""
    if tensor.device.type == "cpu" and tensor.nbytes <= MAX_BYTES_COMPARED and not tensor.dtype.is_complex:
        numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return tuple(tensor.shape), tensor.dtype, zlib.crc32(numbers.numpy().tobytes())
    return id(tensor), None if tensor.is_inference() else tensor._version


def _parts(value: Any) -> Iterator[Any]:
    """What a function, an object or a container reads or holds."""
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from (value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__)
    elif isinstance(value, Mapping):
        yield from (side for item in value.items() for side in item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function may read from its module, those of functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
