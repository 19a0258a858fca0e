"""Walking along the edges of an `Adjacency` in compiled code, four at a time, unit by unit; tensors as arrays."""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators and intrinsics have no types that a checker understands)

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels.contract import Adjacency
from attngraph.kernels.cpu.weights import compiled

JOBS_PER_THREAD = 16  # ranges of units


class Edges(NamedTuple):
    """The arrays of an `Adjacency`."""

    start: np.ndarray
    neighbor: np.ndarray
    edge: np.ndarray
    units: np.ndarray


@compiled
def neighbors_of_4(neighbor, e, last, base):
    """base plus the neighbours of the edges e … e + 3; past the last edge, the last one again."""
    b, c, d = neighbor[min(e + 1, last)], neighbor[min(e + 2, last)], neighbor[min(e + 3, last)]
    return base + np.int64(neighbor[e]), base + np.int64(b), base + np.int64(c), base + np.int64(d)


@compiled
def next_4(e, last, base):
    """base plus e … e + 3; past the last, the last one again."""
    return base + e, base + min(e + 1, last), base + min(e + 2, last), base + min(e + 3, last)


@compiled
def max_degree(start, unit):
    """The most edges that a unit takes of one of its nodes."""
    first, stop, begin, end = unit
    most = 0
    for node in range(first, stop):
        most = max(most, min(start[node + 1], end) - max(start[node], begin))
    return most


@compiled
def sum_pieces(pieces, result, of_pieces):
    """Each heavy node's sum over its pieces, in fixed order: result (B, nodes, ·, ·) of of_pieces (B, pieces, ·, ·)."""
    for batch in range(len(result)):
        for node, first, stop in pieces:
            result[batch, node] = of_pieces[batch, first]
            for x in range(first + 1, stop):
                result[batch, node] += of_pieces[batch, x]


@compiled
def sort_by_key(keys, start):
    """The numbers of the edges by key, those of a key in their order: int64 (E,). start: where those of each begin."""
    place, order = start.copy(), np.empty(len(keys), np.int64)
    for e in range(len(keys)):
        order[place[keys[e]]] = e
        place[keys[e]] += 1
    return order


def unit_ranges(units: int, jobs: int | None = None) -> np.ndarray:
    """The units in consecutive ranges, one for each job, as where each begins, and the end: int64 (ranges + 1,).

    Less than twice as many as `jobs`, by default some for each thread.
    """
    size = max(1, units // (jobs or JOBS_PER_THREAD * torch.get_num_threads()))
    return np.array([*range(0, units, size), units])


def nodes_first(x: Tensor) -> Tensor:
    """(B, heads, nodes, ·) → (B, nodes, heads, ·), contiguous."""
    return x.detach().transpose(1, 2).contiguous()


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Tensors as arrays."""
    return [tensor.numpy() for tensor in tensors]


def flat_nodes(*tensors: Tensor) -> list[np.ndarray]:
    """(B, nodes, …) → (B · nodes, …)."""
    return [tensor.flatten(0, 1).numpy() for tensor in tensors]


def edges_of(adjacency: Adjacency) -> Edges:
    """An adjacency as compiled functions take it."""
    return Edges(*arrays(adjacency.start, adjacency.neighbor, adjacency.edge, adjacency.units))
