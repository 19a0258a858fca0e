"""Every cache of the library: what is kept from one call to the next, for how long, and how to empty it.

No other module keeps anything between calls, apart from compiled kernels. `cache_info` says what is held, `clear` frees
it; results do not depend on either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from threading import RLock
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Value = TypeVar("Value")


@contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Make what is to be kept: it outlives the inference mode, the transform or the default device of today's call."""
    # As a mode, a device is asked at each operation of torch.
    place = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch._C._DisableTorchDispatch(), torch._C._DisableFuncTorch(), torch.inference_mode(False), place:
        yield


class CacheInfo(NamedTuple):
    """What a cache holds: how many entries, how many at most, and their bytes where they are counted."""

    entries: int
    max_entries: int
    nbytes: int


class Cache(Generic[Value]):
    """The values used last, by key: at most so many, and of so many bytes by their `nbytes`. Safe among threads.

    Two threads that miss the same key at once both make the value; both get the one that was kept first.
    """

    def __init__(self, max_entries: int, max_bytes: int | None = None):
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self._entries: dict[Hashable, Value] = {}
        """The latest last. No OrderedDict, which asks each key for its hash whenever all values are looked at."""
        self._lock = RLock()

    def get(self, key: Hashable) -> Value | None:
        """The value of a key, which is then the latest; None where there is none."""
        with self._lock:
            found = self._entries.pop(key, None)
            if found is not None:
                self._entries[key] = found
            return found

    def keep(self, key: Hashable, value: Value) -> Value:
        """Keep a value, unless the key has one by now; the one that is kept."""
        with self._lock:
            kept = self._entries[key] = self._entries.pop(key, value)
            while len(self._entries) > self.max_entries or (len(self._entries) > 1 and self._too_large()):
                del self._entries[next(iter(self._entries))]
            return kept

    def get_or_make(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if there is none."""
        found = self.get(key)
        if found is None:
            with outside_of_transforms():
                found = self.keep(key, make())
        return found

    def _too_large(self) -> bool:
        return self.max_bytes is not None and self.nbytes > self.max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all values, as each tells them now: layouts grow when a gradient first asks for their transpose."""
        return sum(getattr(value, "nbytes", 0) for value in self._entries.values())

    def info(self) -> CacheInfo:
        """How much is held."""
        with self._lock:
            return CacheInfo(len(self._entries), self.max_entries, self.nbytes)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()


class CompiledPrograms(Cache[Any]):
    """What compiled programs name by number: a graph or a plan, which their operators look up when they run.

    The number is a tensor, the handle, so that it is an input of the program and not part of its text: one program
    serves all graphs. Whatever is made here is found as long as it lives. What a program has asked for once stays, also
    when nobody else holds it, among the latest `max_entries`: its backward pass may run after the graph is gone.
    """

    def __init__(self, max_entries: int):
        super().__init__(max_entries)
        self._by_text: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._living: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._handles = _numbers()
        self._collisions = 0

    def register(self, text: str, thing: Any) -> tuple[str, Any, Tensor]:
        """The text of this alone, the equal thing that lives, which is to be held beside it, and that one's handle."""
        with self._lock:
            known = self._by_text.setdefault(text, thing)
            if known is not thing and known == thing:
                return text, known, known._handle
            if known is not thing:
                self._collisions += 1  # two digests that agree by chance, or on purpose
                text = f"{text} #{self._collisions}"
                self._by_text[text] = thing
            number, handle = next(self._handles)
            self._living[number] = thing
            return text, thing, handle

    def find(self, handle: Tensor) -> Any:
        """What has this handle; from now on held."""
        number = int(handle)
        found = self.get(number)
        if found is not None:
            return found
        if (found := self._living.get(number)) is None:
            raise RuntimeError(
                "a compiled program runs on a graph that is not in this process, or that was forgotten by "
                "attngraph.cache.clear(): compile it again where the graph is made"
            )
        return self.keep(number, found)


def _numbers() -> Iterator[tuple[int, Tensor]]:
    """0, 1, 2, … and the same as tensors, whatever modes and transforms of torch are at work."""
    for first in count(step=256):
        with torch._C._DisableTorchDispatch(), torch._C._DisableFuncTorch(), torch.inference_mode(False):
            made = [(number, torch.from_numpy(np.array(number))) for number in range(first, first + 256)]
        yield from made


PLANS: Cache[Any] = Cache(max_entries=64, max_bytes=1 << 31)
"""(graph, its state, call, backend) → plan, with its layouts."""
PLANS_ON_GPU: Cache[Any] = Cache(max_entries=64, max_bytes=1 << 34)
"""The same for plans whose layouts lie on a GPU."""
MASKS: Cache[Tensor] = Cache(max_entries=16)
"""(graph, its state, n, m, device) → mask."""
EDGES: Cache[Any] = Cache(max_entries=16)
"""(graph, its state, n, m, device) → the edges with one bool for each head."""
CALLS: Cache[Any] = Cache(max_entries=256)
"""Sizes, dtypes and plain options of a call of `attend` that was checked → what it asks for: no tensors, no graph."""
COLUMNS: Cache[Any] = Cache(max_entries=64, max_bytes=1 << 30)
"""(graph, its state, n, m, device, given edges) → which of these each edge of the graph is."""
COSTS: Cache[Any] = Cache(max_entries=16)
"""(setting, device, threads) → costs, as read from a file or by default."""
WARNED: Cache[bool] = Cache(max_entries=64)
"""Arguments of `attend` of whose cost a warning has told."""
COMPILED = CompiledPrograms(max_entries=1024)
"""Number → graph or plan, for compiled programs; and text with numbers → the graph that a program makes of them."""
EDGES_OF_LAYERS: Cache[Any] = Cache(max_entries=16, max_bytes=1 << 30)
"""(fingerprint of an edge_index, sizes) → its edges as PyG's layers take them, with their plans."""
EDGE_INDEX: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A tensor `edge_index` that lives → its numbers, as a fingerprint, and its graphs by what was asked for."""

_NAMED: dict[str, Cache[Any]] = {
    "plans": PLANS,
    "plans on a GPU": PLANS_ON_GPU,
    "masks": MASKS,
    "edges": EDGES,
    "edge values": COLUMNS,
    "edges of layers": EDGES_OF_LAYERS,
    "calls": CALLS,
    "costs": COSTS,
    "warnings": WARNED,
    "compiled programs": COMPILED,
}


def cache_info() -> dict[str, CacheInfo]:
    """What each cache holds.

    >>> from attngraph import cache
    >>> sorted(cache.cache_info())
    ['calls', 'compiled programs', 'costs', 'edge values', 'edges', 'edges of layers', 'masks',
     'plans', 'plans on a GPU', 'warnings']
    """
    return {name: each.info() for name, each in _NAMED.items()}


def clear() -> None:
    """Forget all plans, masks, edges and costs.

    Compiled programs whose graph nobody else holds have to be compiled again.
    """
    for each in _NAMED.values():
        each.clear()
    EDGE_INDEX.clear()


def _unlock() -> None:
    """In a process that was forked: a thread that held a lock is not there to release it."""
    for each in _NAMED.values():
        each._lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
