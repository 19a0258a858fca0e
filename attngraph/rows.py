"""The layout of the rows kernels: the edges of a graph by query and by key, cut into units of work. Data only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HEAVY = {"cpu": 1024, "cuda": 256}  # edges above which a node is cut into pieces: a GPU has more at work at a time
UNIT = 2048  # edges and nodes, together, of a run of lighter nodes


class Adjacency(NamedTuple):
    """One side of a graph: node x has the edges start[x] … start[x + 1] - 1, to `neighbor`, ascending.

    The work is cut into units of about one size, as the graph alone decides: so no thread waits for a hub, and sums
    are taken in the same order by any number of threads. A unit takes of each of its nodes the edges that lie between
    two of its own; of a node with more than `heavy` edges, a unit has one piece. Units of pieces come first.
    """

    start: Tensor  # (nodes + 1,) int64
    neighbor: Tensor  # (E,) int32 where the other side's nodes allow it
    edge: Tensor  # (E,) the number of each edge in edge_index order; (0,) where that is 0, 1, 2, …
    units: Tensor  # (units, 4) int64: first node, node after the last, first edge, edge after the last
    pieces: Tensor  # (heavy nodes, 3) int64: node, its first unit, the unit after its last
    heavy: int  # edges above which a node is cut into pieces

    @staticmethod
    def of(node: Tensor, neighbor: Tensor, edge: Tensor, size: tuple[int, int]) -> Adjacency:
        """From edges sorted by (node, neighbor); size: the number of nodes on this side and on the other."""
        start = torch.zeros(size[0] + 1, dtype=torch.int64, device=node.device)
        torch.cumsum(torch.bincount(node, minlength=size[0]), 0, out=start[1:])
        heavy = HEAVY[node.device.type]
        return Adjacency(start, _narrow(neighbor, size[1]), _narrow(edge, len(node)), *_work(start, heavy), heavy)

    @property
    def num_pieces(self) -> int:
        """How many of the units, the first ones, are pieces of heavy nodes."""
        return int(self.pieces[-1, 2]) if len(self.pieces) else 0


class Rows(NamedTuple):
    """The edges of a graph with n queries and m keys, twice: the keys of each query, and the queries of each key.

    >>> rows = Rows.of(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), 2, 3)
    >>> rows.by_query.start.tolist(), rows.by_query.neighbor.tolist()
    ([0, 1, 3], [2, 0, 2])
    >>> rows.by_key.start.tolist(), rows.by_key.neighbor.tolist(), rows.by_key.edge.tolist()
    ([0, 1, 1, 3], [1, 0, 1], [1, 0, 2])
    """

    n: int
    m: int
    by_query: Adjacency  # CSR, in edge_index order
    by_key: Adjacency  # CSC

    @staticmethod
    def of(query: Tensor, key: Tensor, n: int, m: int) -> Rows:
        """From edges sorted by (query, key), both (E,) int64."""
        sorted_key, edge = _narrow(key, m).sort(stable=True)
        by_query = Adjacency.of(query, key, query.new_empty(0), (n, m))
        by_key = Adjacency.of(sorted_key, query[edge], edge, (m, n))
        if all(torch.equal(one, other) for one, other in zip(by_query[:2], by_key[:2], strict=True)):  # symmetric
            by_key = by_query._replace(edge=by_key.edge)
        return Rows(n, m, by_query, by_key)

    def mask(self) -> Tensor:
        """The edges as a bool tensor (n, m)."""
        start, neighbor = self.by_query.start, self.by_query.neighbor
        query = torch.arange(self.n, device=start.device).repeat_interleave(start.diff())
        return torch.zeros(self.n, self.m, dtype=torch.bool, device=start.device).index_put(
            (query, neighbor.long()), torch.tensor(True, device=start.device)
        )

    @property
    def nbytes(self) -> int:
        """Of both halves, in memory; what they share once."""
        parts = {id(part): part.nbytes for half in (self.by_query, self.by_key) for part in half[:-1]}
        return sum(parts.values())


def _narrow(index: Tensor, size: int) -> Tensor:
    """As int32, where numbers below `size` fit."""
    return index.int() if size <= torch.iinfo(torch.int32).max else index


def _work(start: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The units and pieces of an Adjacency with these degrees, of which some are above the limit."""
    nodes, degree = len(start) - 1, start.diff()
    heavy = (degree > limit).nonzero()[:, 0]
    count = (degree[heavy] + limit - 1) // limit  # pieces of each heavy node
    last = count.cumsum(0)
    pieces = torch.stack([heavy, last - count, last], 1)

    node, parts = heavy.repeat_interleave(count), count.repeat_interleave(count)
    part = torch.arange(len(node), device=start.device) - (last - count).repeat_interleave(count)
    first, after = (start[node] + degree[node] * at // parts for at in (part, part + 1))
    of_heavy = torch.stack([node, node + 1, first, after], 1)

    load = start + torch.arange(nodes + 1, device=start.device)
    even = torch.searchsorted(load, torch.arange(0, nodes + int(start[-1]), UNIT, device=start.device))
    border = torch.cat([even, heavy, heavy + 1, start.new_tensor([0, nodes])]).unique()
    first, after = border[:-1], border[1:]
    light = degree[first] <= limit
    first, after = first[light], after[light]
    return torch.cat([of_heavy, torch.stack([first, after, start[first], start[after]], 1)]), pieces
