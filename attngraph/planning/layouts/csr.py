"""The layout of the rows kernels: the edges of a graph by query and by key, cut into units of work. Data only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from attngraph.graph.base import Graph, bind
from attngraph.graph.boxes import require_memory
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, list_edges, lists_rows
from attngraph.kernels.available import why_not
from attngraph.kernels.contract import Adjacency

# Edges of one node above which it is cut into pieces of at most as many, by device: a GPU has more at work at a time.
HEAVY_DEGREE = {"cpu": 1024, "cuda": 256}
# Edges and nodes, together, of a unit of lighter nodes: some tenths of a millisecond on a CPU, far above what it costs
# to begin one.
UNIT_EDGES = 2048
# Edges that are listed or sorted in one step: more would need memory far beyond that of the layout itself.
STEP_EDGES = 1 << 27
# Bytes of memory that each edge of such a step takes while it is listed and sorted.
BYTES_PER_EDGE = 120
COMPILED = "attngraph.kernels.cpu.csr"  # where edges are sorted by counting


@dataclass(frozen=True, eq=False)
class CSR:
    """The edges of a graph with n queries and m keys: the keys of each query; once asked for, the queries of each key.

    >>> csr = CSR.from_edges(torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), 2, 3)
    >>> csr.by_query.start.tolist(), csr.by_query.neighbor.tolist()
    ([0, 1, 3], [2, 0, 2])
    >>> csr.by_key.start.tolist(), csr.by_key.neighbor.tolist(), csr.numbered.edge.tolist()
    ([0, 1, 1, 3], [1, 0, 1], [1, 0, 2])
    """

    n: int
    m: int
    by_query: Adjacency  # CSR, in edge_index order

    @staticmethod
    def from_edges(query: Tensor, key: Tensor, n: int, m: int) -> CSR:
        """From edges sorted by (query, key), both (E,) int64."""
        start = _row_pointers(torch.bincount(query, minlength=n))
        return CSR(n, m, _adjacency(start, key.to(_index_dtype(m))))

    @staticmethod
    def from_code(code: Tensor, n: int, m: int) -> CSR:
        """From edges query · m + key, ascending: int64 (E,)."""
        require_memory(len(code) * 24, f"for {len(code):,} edges in rows", code.device)
        first = torch.arange(n + 1, device=code.device) * m
        start = torch.searchsorted(code, first)
        return CSR(n, m, _adjacency(start, (code - first[:-1].repeat_interleave(start.diff())).to(_index_dtype(m))))

    @staticmethod
    def from_graph(graph: Graph, n: int, m: int) -> CSR:
        """From a graph that is bound to its size; of more edges than `STEP_EDGES`, those of some queries at a time,
        where the graph can tell them.
        """
        edges, dtype = count_edges(graph, n, m), _index_dtype(m)
        if isinstance(graph, EdgeList) and edges <= STEP_EDGES:
            return CSR.from_code(graph.code.to(torch.get_default_device()), n, m)
        step_edges = STEP_EDGES if lists_rows(graph, n, m) else max(edges, 1)
        needed = edges * dtype.itemsize + min(edges, step_edges) * BYTES_PER_EDGE
        require_memory(needed, f"for the {edges:,} edges of {graph} in rows")
        neighbor, degree = torch.empty(edges, dtype=dtype), torch.zeros(n, dtype=torch.int64)
        step, filled = max(1, n * step_edges // max(edges, step_edges)), 0
        for first in range(0, n, step):
            stop = min(first + step, n)
            part = graph if step >= n else bind(graph.rows(first, stop), stop - first, m)
            query, key = list_edges(part, stop - first, m)
            degree[first:stop] = torch.bincount(query, minlength=stop - first)
            neighbor[filled : filled + len(key)] = key
            filled += len(key)
        return CSR(n, m, _adjacency(_row_pointers(degree), neighbor))

    @cached_property
    def by_key(self) -> Adjacency:
        """CSC; where every edge has its reverse, CSR again, stored once."""
        neighbor = self.by_query.neighbor
        require_memory(len(neighbor) * 18, "to sort the edges by their keys", neighbor.device)
        degree = torch.zeros(self.m, dtype=torch.int64, device=neighbor.device)
        for chunk in neighbor.split(STEP_EDGES):
            degree += torch.bincount(chunk, minlength=self.m)
        start = _row_pointers(degree)
        query = torch.arange(self.n, device=start.device, dtype=_index_dtype(self.n))
        query = query.repeat_interleave(self.by_query.start.diff())
        neighbor = torch.cat([query[chunk] for chunk in self._edges_by_key(start)])
        if torch.equal(start, self.by_query.start) and torch.equal(neighbor, self.by_query.neighbor):
            return self.by_query
        return _adjacency(start, neighbor)

    @cached_property
    def numbered(self) -> Adjacency:
        """`by_key`, with the number of each edge."""
        dtype = _index_dtype(len(self.by_query.neighbor))
        return self.by_key._replace(
            edge=torch.cat([chunk.to(dtype) for chunk in self._edges_by_key(self.by_key.start)])
        )

    def _edges_by_key(self, start: Tensor) -> Iterator[Tensor]:
        """The numbers of the edges, sorted by key, then query: so many at once that they can be sorted."""
        neighbor = self.by_query.neighbor
        if len(neighbor) <= STEP_EDGES:
            yield _order_by_key(neighbor, start)
            return
        border = torch.searchsorted(start, torch.arange(STEP_EDGES, len(neighbor), STEP_EDGES, device=start.device))
        for low, high in pairwise([0, *border.unique().tolist(), self.m]):
            inside = [((part >= low) & (part < high)).nonzero()[:, 0] for part in neighbor.split(STEP_EDGES)]
            edge = torch.cat([part + step * STEP_EDGES for step, part in enumerate(inside)])
            yield edge[neighbor[edge].sort(stable=True).indices]

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
        by_key, numbered = vars(self).get("by_key", self.by_query), vars(self).get("numbered")
        sides = [self.by_query] if by_key is self.by_query else [self.by_query, by_key]
        own = 0 if numbered is None else numbered.edge.nbytes
        return own + sum(part.nbytes for side in sides for part in side[:-1])


def _order_by_key(key: Tensor, start: Tensor) -> Tensor:
    """Where the edges stand by key, those of a key in their order, given where those of each key begin: int64 (E,)."""
    if key.device.type == "cpu" and find_spec("numba") is not None and why_not(COMPILED, "numba") is None:
        return torch.from_numpy(import_module(COMPILED).sort_by_key(key.numpy(), start.numpy()))
    return key.sort(stable=True).indices


def _adjacency(start: Tensor, neighbor: Tensor) -> Adjacency:
    """From the edges of each node, their neighbours ascending."""
    heavy = HEAVY_DEGREE[start.device.type]
    units, pieces = _units(start, heavy)
    return Adjacency(start, neighbor, start.new_empty(0), units, pieces, heavy)


def _row_pointers(degree: Tensor) -> Tensor:
    """Where the edges of each node start, and where the last one's end."""
    start = degree.new_zeros(len(degree) + 1)
    torch.cumsum(degree, 0, out=start[1:])
    return start


def _index_dtype(size: int) -> torch.dtype:
    """Of numbers below `size`."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


def _units(start: Tensor, heavy: int) -> tuple[Tensor, Tensor]:
    """The units and pieces of an Adjacency with these row pointers: nodes with more than `heavy` edges have pieces."""
    nodes, degree = len(start) - 1, start.diff()
    hub = (degree > heavy).nonzero()[:, 0]
    load = start + torch.arange(nodes + 1, device=start.device)
    even = torch.searchsorted(load, torch.arange(0, nodes + int(start[-1]), UNIT_EDGES, device=start.device))
    border = torch.cat([even, hub, hub + 1, start.new_tensor([0, nodes])]).unique()
    first, stop = border[:-1], border[1:]
    if not len(hub):
        return torch.stack([first, stop, start[first], start[stop]], 1), start.new_empty(0, 3)
    light = degree[first] <= heavy
    first, stop = first[light], stop[light]
    of_pieces, pieces = _pieces(start, degree, hub, heavy)
    return torch.cat([of_pieces, torch.stack([first, stop, start[first], start[stop]], 1)]), pieces


def _pieces(start: Tensor, degree: Tensor, hub: Tensor, heavy: int) -> tuple[Tensor, Tensor]:
    """The units of the nodes `hub`, of at most `heavy` edges each, and which of them each node has."""
    count = (degree[hub] + heavy - 1) // heavy  # pieces of each
    last = count.cumsum(0)
    node, parts = hub.repeat_interleave(count), count.repeat_interleave(count)
    part = torch.arange(len(node), device=start.device) - (last - count).repeat_interleave(count)
    first = start[node] + degree[node] * part // parts
    stop = start[node] + degree[node] * (part + 1) // parts
    return torch.stack([node, node + 1, first, stop], 1), torch.stack([hub, last - count, last], 1)
