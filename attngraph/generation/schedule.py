"""Which keys a cache holds at each step, and in which slot: the graph says after which query nobody hears a key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

import numpy as np
import torch
from torch import Tensor

from attngraph.analysis import last_reader
from attngraph.analysis.costs import most_at_once
from attngraph.graph.base import Graph, at_size
from attngraph.graph.counting import runs

MAX_LOOKED_AT = 1 << 26  # pairs that are looked at to find out what may be forgotten; beyond, everything is kept


@dataclass(frozen=True, eq=False)
class Schedule:
    """The slots of the keys of a causal graph, one query after the other.

    A key takes the lowest free slot when its node comes, and leaves it after the last query that hears it, so that a
    window's keys are a ring, sinks stay, and as few slots are needed as keys are alive at once. Keys of a memory,
    before those of the nodes, are there from the start.
    """

    graph: Graph
    """Bound to its size: `length` queries; the keys of the memory, then those of the nodes, if these are heard."""
    length: int
    memory: int

    @cached_property
    def num_keys(self) -> int:
        """Of the memory and of the nodes."""
        return at_size(self.graph)[2]

    @cached_property
    def born(self) -> Tensor:
        """The query from which on each key is there, int64 (num_keys,)."""
        return (torch.arange(self.num_keys) - self.memory).clamp(min=0)

    @cached_property
    def last(self) -> np.ndarray:
        """The last query for which each key is kept, int64 (num_keys,): its last reader, but at least its own node."""
        if not _is_quick(self.graph):
            return np.full(self.num_keys, self.length - 1)
        return torch.maximum(last_reader(self.graph), self.born).numpy()

    @cached_property
    def capacity(self) -> int:
        """How many keys are alive at once, at most: so many slots there are."""
        return most_at_once(self.born, torch.from_numpy(self.last))

    @cached_property
    def _taken(self) -> tuple[np.ndarray, np.ndarray]:
        """The slot of each key; and up to which slot there are keys, when each query has its own."""
        slots, used = np.arange(self.num_keys), np.minimum(np.arange(self.length) + 1 + self.memory, self.num_keys)
        if self.capacity == self.num_keys:  # nothing makes room for another
            return slots, used
        order = np.argsort(self.last, kind="stable").tolist()
        last, taken = self.last.tolist(), [True] * self.memory + [False] * (self.capacity - self.memory)
        where, free, top, dead = list(range(self.memory)), list(range(self.memory, self.capacity)), self.memory, 0
        for query in range(self.length):
            while dead < len(order) and last[order[dead]] < query:
                taken[where[order[dead]]] = False
                heappush(free, where[order[dead]])
                dead += 1
            if len(where) < self.num_keys:
                slot = heappop(free)
                taken[slot] = True
                where.append(slot)
                top = max(top, slot + 1)
            while top and not taken[top - 1]:
                top -= 1
            used[query] = top
        return np.array(where), used

    @property
    def slots(self) -> np.ndarray:
        """The slot of each key, int64 (num_keys,)."""
        return self._taken[0]

    @property
    def used(self) -> np.ndarray:
        """For each query, how many slots, from the first on, hold all that it hears: int64 (length,)."""
        return self._taken[1]

    @cached_property
    def degrees(self) -> np.ndarray:
        """How many keys each query hears, int64 (1 | H, length); -1 where counting them takes too long."""
        if not _is_quick(self.graph):
            return np.full((1, self.length), -1)
        return self.graph.in_degrees().reshape(-1, self.length).numpy()

    @cached_property
    def is_whole(self) -> np.ndarray:
        """Whether each query, in every head, hears what is in all of its used slots: bool (length,)."""
        return (self.degrees == self.used).all(0)

    @cached_property
    def on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """The slots and last queries of the keys as tensors, by device."""
        return {}

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The slots and last queries of the keys, int64 (num_keys,)."""
        if device not in self.on:
            self.on[device] = torch.from_numpy(self.slots).to(device), torch.from_numpy(self.last).to(device)
        return self.on[device]


def _is_quick(bound: Graph) -> bool:
    """Whether degrees and last readers are found without a look at very many pairs."""
    _, n, m = at_size(bound)
    if n * m * (bound.heads or 1) <= MAX_LOOKED_AT:
        return True
    parts = [bound.of_head(h) for h in range(bound.heads)] if bound.heads else [bound]
    return all(each._found_by_listing() or runs(each.T, m, n) is not None for each in parts)
