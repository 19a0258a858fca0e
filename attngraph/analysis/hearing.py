"""Whom a set of nodes hears, without a look at each pair: sets are runs of nodes, and closed forms map runs to runs.

A receptive field, a path and a diameter are this step, taken again and again; in NumPy, as most sets are a few runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.analysis.layers import heard_by_any_head
from attngraph.graph import counting
from attngraph.graph.algebra import PAIRS_PER_EDGE, is_nothing
from attngraph.graph.base import Graph, defines
from attngraph.graph.boxes import require_memory
from attngraph.graph.counting import BYTES_PER_RUN
from attngraph.graph.listing import BYTES_PER_NODE, PAIRS_PER_STEP, by_lines, has_lists_alone, no_edges

FIRST_QUERIES = 64  # of a set, whose keys are looked at first: later ones are asked only about what these do not hear


class Nodes(NamedTuple):
    """A set of nodes: runs start … stop-1, ascending, with a gap between any two."""

    start: np.ndarray
    stop: np.ndarray

    @staticmethod
    def of(start: np.ndarray, stop: np.ndarray) -> Nodes:
        """The union of runs, in any order."""
        order = start.argsort()
        start, stop = start[order], np.maximum.accumulate(stop[order])
        is_gap, is_end = start[1:] > stop[:-1], np.ones(min(len(start), 1), bool)
        return Nodes(start[np.append(is_end, is_gap)], stop[np.append(is_gap, is_end)])

    @staticmethod
    def run(start: int, stop: int) -> Nodes:
        """start … stop-1."""
        return Nodes(np.array([start]), np.array([stop])) if start < stop else NOBODY

    @property
    def total(self) -> int:
        """How many there are."""
        return int((self.stop - self.start).sum())

    def members(self) -> Tensor:
        """The nodes themselves: ascending int64."""
        require_memory(self.total * BYTES_PER_NODE, f"to list {self.total:,} nodes")
        return torch.as_tensor(counted(self.start, self.stop - self.start), device=torch.get_default_device())

    def has(self, nodes: np.ndarray) -> np.ndarray:
        """Which of these are in the set."""
        place = self.start.searchsorted(nodes, side="right") - 1
        return nodes < np.append(self.stop, -1)[place]  # before the first run, place is -1

    def union(self, other: Nodes) -> Nodes:
        """The nodes of either."""
        return Nodes.of(np.append(self.start, other.start), np.append(self.stop, other.stop))

    def minus(self, other: Nodes) -> Nodes:
        """Those that the other set lacks."""
        ends = np.concatenate([*self, *other])
        order = ends.argsort()
        change = np.repeat([1, -1, -2, 2], [len(side) for side in (*self, *other)])[order]
        ends, inside = ends[order], change.cumsum() == 1  # in this set alone
        here = inside[:-1] & (ends[1:] > ends[:-1])
        return Nodes(ends[:-1][here], ends[1:][here])


NOBODY = Nodes(np.empty(0, np.int64), np.empty(0, np.int64))


def counted(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first, first + 1, …, so many of each, one after the other."""
    return np.repeat(first - count.cumsum() + count, count) + np.arange(count.sum())


def heard_through(layers: Iterable[Graph], node: int, known: dict[Graph, Hearing], n: int) -> Iterator[Nodes]:
    """The nodes that `node` hears through one, two, … layers, the last of a stack first, each with its residual stream.

    `known` keeps what was found out about the graphs.
    """
    heard, asked = Nodes.run(node, node + 1), {}
    for graph in layers:
        if graph not in known:
            known[graph] = Hearing(graph, n)
        before = heard
        heard = heard.union(known[graph].keys(heard.minus(asked.get(graph, NOBODY)), heard))
        asked[graph] = before
        yield heard


class Hearing:
    """One graph at n nodes, and the keys that sets of its queries hear; where heads have their own, those of any.

    It is `cells`, in which runs are mapped to runs, and besides the edges that it has `more` and `less`. Where there
    are no cells, its pairs are looked at.
    """

    def __init__(self, graph: Graph, n: int):
        self.graph, self.n = heard_by_any_head(graph, n), n
        self.cells: list[np.ndarray] | None = None
        more = less = no_edges()
        rest, listed = self.graph._split(n, n, has_lists_alone)
        is_long = any(defines(each.graph, "_count") and PAIRS_PER_EDGE * each.cost > n * n for each in listed)
        parts = None if is_long else by_lines(self.graph, n, n)
        found = None if parts is None else counting.cells(parts[0], n, n)
        if parts is not None and found is not None:
            self.cells, (_, more, less) = [*_by_height(torch.stack(found).numpy(force=True))], parts
        elif is_nothing(rest) and not is_long:  # all of it is listed
            self.cells, more = [], self.graph._edges(n, n)
        self.more, self.less = (torch.stack(edges).numpy(force=True) for edges in (more, less))

    @property
    def maps_runs(self) -> bool:
        """Whether no pairs have to be looked at."""
        return self.cells is not None and not len(self.less[0])

    def keys(self, queries: Nodes, known: Nodes = NOBODY) -> Nodes:
        """The keys that any of these queries hears; of those that are known already, all, some or none."""
        if self.cells is None:
            return self._looked_at(queries, Nodes.run(0, self.n).minus(known))
        found = self.mapped(queries)
        if not len(self.less[0]):
            return found
        doubtful = self.less[1][queries.has(self.less[0])]
        doubtful = Nodes.of(doubtful, doubtful + 1).minus(known)
        return found.minus(doubtful).union(self._looked_at(queries, doubtful))

    def mapped(self, queries: Nodes) -> Nodes:
        """The same by cells and lists, and of many sets at once: node i of set s is s · (n + 1) + i."""
        width = self.n + 1
        sets = queries.start // width
        own = _Runs(sets, queries.start - sets * width, queries.stop - sets * width)
        runs = [_listed(own, *self.more), *(part for cells in self.cells or () for part in _in_cells(own, cells))]
        sets, start, stop = (np.concatenate(side) for side in zip(*runs, strict=True))
        some = start < stop
        return Nodes.of((sets * width + start)[some], (sets * width + stop)[some])

    def _looked_at(self, queries: Nodes, keys: Nodes) -> Nodes:
        """Those of the keys that any of the queries hears: by pairs, without those of keys that were found."""
        rows, waiting = queries.members(), keys.members()
        heard, at, step = [waiting[:0]], 0, FIRST_QUERIES
        while at < len(rows) and len(waiting):
            step = max(1, min(step, PAIRS_PER_STEP // len(waiting)))
            hears = self.graph.contains(rows[at : at + step, None], waiting[None]).any(0)
            heard.append(waiting[hears])
            waiting, at, step = waiting[~hears], at + step, 2 * step
        found = torch.cat(heard).numpy(force=True)
        return Nodes.of(found, found + 1)

    def first_query(self, queries: Nodes, key: int) -> int:
        """The first of these queries that hears a key, which one of them does."""
        rows = queries.members()
        return int(rows[self.graph.contains(rows, torch.full_like(rows, key)).nonzero()[0, 0]])


# ------------------------------------------------------------------------------------------- many sets at once


class _Runs(NamedTuple):
    """Runs of nodes, start … stop-1, of which some may be empty, and the number of the set that each belongs to."""

    sets: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def _listed(queries: _Runs, query: np.ndarray, key: np.ndarray) -> _Runs:
    """The keys of queries, by sorted edges."""
    first = query.searchsorted(queries.start)
    edges = query.searchsorted(queries.stop) - first
    require_memory(int(edges.sum()) * BYTES_PER_RUN, "for the keys that sets of queries hear")
    heard = key[counted(first, edges)]
    return _Runs(np.repeat(queries.sets, edges), heard, heard + 1)


def _by_height(cells: np.ndarray) -> Iterator[np.ndarray]:
    """The cells, columns of a table as `counting.Cells`, in groups of about equal height.

    Each is sorted by the tops, so that those of a query are a stretch.
    """
    size = np.frexp(cells[1] - cells[0])[1]
    for each in np.unique(size):
        some = cells[:, size == each]
        yield some[:, some[0].argsort()]


def _in_cells(queries: _Runs, cells: np.ndarray) -> Iterator[_Runs]:
    """The keys of queries, by cells as `_by_height` groups them."""
    first = cells[0].searchsorted(queries.start - (cells[1] - cells[0]).max(), side="right")
    count = cells[0].searchsorted(queries.stop) - first
    require_memory(int(count.sum()) * BYTES_PER_RUN, "for the keys that sets of queries hear")
    own = np.repeat(np.arange(len(count)), count)
    top, bottom, left, right, low, high, residue, period = cells[:, counted(first, count)]
    top, bottom = np.maximum(top, queries.start[own]), np.minimum(bottom, queries.stop[own])
    low = low + (residue - low) % period  # the least j - i, and the largest
    high = high - 1 - (high - 1 - residue) % period
    some = (top < bottom) & (low <= high)
    has_gaps = (period > 1) & (low < high) & (bottom - top < period)  # between the keys
    sets, whole = queries.sets[own], some & ~has_gaps
    yield _Runs(sets[whole], np.maximum(left, top + low)[whole], np.minimum(right, bottom + high)[whole])
    if (some & has_gaps).any():
        yield _with_gaps(*np.stack([top, bottom, left, right, low, high, sets, period])[:, some & has_gaps])


def _with_gaps(top, bottom, left, right, low, high, sets, period) -> _Runs:
    """The keys of a few queries each, period apart: one by one, after those in step with each other were runs."""
    query = counted(top, bottom - top)
    left, right, low, high, sets = np.repeat(np.stack([left, right, low, high, sets]), bottom - top, axis=1)
    step = period[0]  # of all that have gaps
    first, last = query + low, query + high
    first = first + np.maximum(left - first + step - 1, 0) // step * step
    last = last - np.maximum(last - right + step, 0) // step * step
    width = right.max() // step + 2
    line = (sets * step + first % step) * width  # where the keys of one set and one remainder stand
    kept = first <= last
    found = Nodes.of((line + first // step)[kept], (line + last // step + 1)[kept])
    found = counted(found.start, found.stop - found.start)
    key = found % width * step + found // width % step
    return _Runs(found // width // step, key, key + 1)
