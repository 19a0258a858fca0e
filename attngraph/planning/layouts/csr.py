"""The layout of the rows kernels: the edges of a graph by query and by key, cut into units of work. Data only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.graph.base import count_edges, list_edges
from attngraph.graph.boxes import require_memory

HEAVY = {"cpu": 1024, "cuda": 256}  # edges above which a node is cut into pieces: a GPU has more at work at a time
UNIT = 2048  # edges and nodes, together, of a run of lighter nodes
AT_ONCE = 1 << 27  # edges that are listed or sorted in one step
BYTES_PER_EDGE = 120  # while they are


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
    def of(start: Tensor, neighbor: Tensor) -> Adjacency:
        """From the edges of each node, their neighbours ascending."""
        heavy = HEAVY[start.device.type]
        return Adjacency(start, neighbor, start.new_empty(0), *_work(start, heavy), heavy)

    @property
    def num_pieces(self) -> int:
        """How many of the units, the first ones, are pieces of heavy nodes."""
        return int(self.pieces[-1, 2]) if len(self.pieces) else 0


@dataclass(frozen=True, eq=False)
class CSR:
    """The edges of a graph with n queries and m keys: the keys of each query; once asked for, the queries of each key.

    >>> rows = CSR.from_edges(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), 2, 3)
    >>> rows.by_query.start.tolist(), rows.by_query.neighbor.tolist()
    ([0, 1, 3], [2, 0, 2])
    >>> rows.by_key.start.tolist(), rows.by_key.neighbor.tolist(), rows.numbered.edge.tolist()
    ([0, 1, 1, 3], [1, 0, 1], [1, 0, 2])
    """

    n: int
    m: int
    by_query: Adjacency  # CSR, in edge_index order

    @staticmethod
    def from_edges(query: Tensor, key: Tensor, n: int, m: int) -> CSR:
        """From edges sorted by (query, key), both (E,) int64."""
        return CSR(n, m, Adjacency.of(_running(torch.bincount(query, minlength=n)), key.to(_integers(m))))

    @staticmethod
    def from_graph(graph, n: int, m: int) -> CSR:
        """From a graph that is bound to its size; of more edges than `AT_ONCE`, those of some queries at a time, where
        the graph can tell them.
        """
        edges, number = count_edges(graph, n, m), _integers(m)
        together = AT_ONCE if graph._lists_rows(n, m) else max(edges, 1)
        needed = edges * number.itemsize + min(edges, together) * BYTES_PER_EDGE
        require_memory(needed, f"for the {edges:,} edges of {graph} in rows")
        neighbor, degree, done = torch.empty(edges, dtype=number), torch.zeros(n, dtype=torch.int64), 0
        step = max(1, n * together // max(edges, together))
        for first in range(0, n, step):
            after = min(first + step, n)
            query, key = list_edges(graph if step >= n else graph.rows(first, after), after - first, m)
            degree[first:after] = torch.bincount(query, minlength=after - first)
            neighbor[done : done + len(key)] = key
            done += len(key)
        return CSR(n, m, Adjacency.of(_running(degree), neighbor))

    @cached_property
    def by_key(self) -> Adjacency:
        """CSC; where every edge has its reverse, CSR again, stored once."""
        neighbor = self.by_query.neighbor
        require_memory(len(neighbor) * 18, "to sort the edges by their keys", neighbor.device)
        start = _running(sum(torch.bincount(part, minlength=self.m) for part in neighbor.split(AT_ONCE)))
        query = torch.arange(self.n, device=start.device, dtype=_integers(self.n))
        query = query.repeat_interleave(self.by_query.start.diff())
        neighbor = torch.cat([query[some] for some in self._places(start)])
        if torch.equal(start, self.by_query.start) and torch.equal(neighbor, self.by_query.neighbor):
            return self.by_query
        return Adjacency.of(start, neighbor)

    @cached_property
    def numbered(self) -> Adjacency:
        """`by_key`, with the number of each edge."""
        number = _integers(len(self.by_query.neighbor))
        return self.by_key._replace(edge=torch.cat([some.to(number) for some in self._places(self.by_key.start)]))

    def _places(self, start: Tensor) -> Iterator[Tensor]:
        """Of the edges sorted by key, then query: the number of each, so many at once that they can be sorted."""
        neighbor = self.by_query.neighbor
        if len(neighbor) <= AT_ONCE:
            yield neighbor.sort(stable=True).indices
            return
        border = torch.searchsorted(start, torch.arange(AT_ONCE, len(neighbor), AT_ONCE, device=start.device))
        for low, high in pairwise([0, *border.unique().tolist(), self.m]):
            inside = [((part >= low) & (part < high)).nonzero()[:, 0] for part in neighbor.split(AT_ONCE)]
            place = torch.cat([part + number * AT_ONCE for number, part in enumerate(inside)])
            yield place[neighbor[place].sort(stable=True).indices]

    def mask(self) -> Tensor:
        """The edges as a bool tensor (n, m)."""
        start, neighbor = self.by_query.start, self.by_query.neighbor
        query = torch.arange(self.n, device=start.device).repeat_interleave(start.diff())
        return torch.zeros(self.n, self.m, dtype=torch.bool, device=start.device).index_put(
            (query, neighbor.long()), torch.tensor(True, device=start.device)
        )

    @property
    def nbytes(self) -> int:
        """Of what was made so far, in memory; what is shared once."""
        halves = [self.by_query, *(vars(self)[name] for name in ("by_key", "numbered") if name in vars(self))]
        return sum({id(part): part.nbytes for half in halves for part in half[:-1]}.values())


def _running(degree: Tensor) -> Tensor:
    """Where the edges of each node start, and where the last one's end."""
    start = degree.new_zeros(len(degree) + 1)
    torch.cumsum(degree, 0, out=start[1:])
    return start


def _integers(size: int) -> torch.dtype:
    """For numbers below `size`."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


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
