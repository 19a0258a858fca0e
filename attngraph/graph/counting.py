"""Counting and listing edges without looking at each pair: by the breakpoints at which membership can change.

A causal graph changes at a diagonal, a prefix at a column, a document at a row. A graph that can name its `Breakpoints`
is constant in each cell between them (up to a period along the diagonals), so one look at `contains` decides a whole
cell, and cells are counted by a formula. Those of a combination are those of its parts: the algebra is for free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attngraph.graph.boxes import Boxes, descend, require_memory

if TYPE_CHECKING:
    from attngraph.graph.base import Graph

MAX_CELLS = 1 << 25  # looks at `contains`; beyond, cells are no saving
CELLS_PER_STEP = 1 << 20  # cells of one step: 8 MiB for each of about 20 tensors
BYTES_PER_RUN = 120  # what is held for each run of keys while runs are found
BYTES_PER_EDGE = 60  # and for each edge while edges are listed from runs


@dataclass(frozen=True)
class Breakpoints:
    """Where membership of (query i, key j) can change.

    Between i < r and i >= r for r in `rows`; between j < c and j >= c for c in `columns`; between j - i < d and
    j - i >= d for d in `diagonals`. Inside a cell it depends on (j - i) mod `period` alone. Too many lines do
    no harm.
    """

    rows: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()
    diagonals: frozenset[int] = frozenset()
    period: int = 1

    @staticmethod
    def union(parts: Iterable[Breakpoints | None]) -> Breakpoints | None:
        """The lines of all parts; None where one part can't name its lines."""
        rows, columns, diagonals, period = set(), set(), set(), 1
        for part in parts:
            if part is None:
                return None
            rows |= part.rows
            columns |= part.columns
            diagonals |= part.diagonals
            period = lcm(period, part.period)
        return Breakpoints(frozenset(rows), frozenset(columns), frozenset(diagonals), period)

    def transposed(self) -> Breakpoints:
        """The lines after queries and keys changed places."""
        return Breakpoints(self.columns, self.rows, frozenset(1 - d for d in self.diagonals), self.period)

    def shifted(self, rows: int = 0, columns: int = 0) -> Breakpoints:
        """The lines after the nodes moved by this much."""
        if rows == columns == 0:
            return self
        return Breakpoints(
            frozenset(r + rows for r in self.rows),
            frozenset(c + columns for c in self.columns),
            frozenset(d + columns - rows for d in self.diagonals),
            self.period,
        )


class Cells(NamedTuple):
    """Parts of the plane that belong to a graph: int64 columns of a table, one entry a cell and residue.

    Of the pairs (i, j) of a box, those with low <= j - i < high and j - i ≡ residue (mod period).
    """

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor
    low: Tensor
    high: Tensor
    residue: Tensor
    period: Tensor


def cells(graph: Graph, n: int, m: int, most: int = MAX_CELLS) -> Cells | None:
    """The cells of a graph at size n × m, or None where lines are no saving: after so many looks at `contains`."""
    found = graph._breakpoints(n, m)
    if found is None:
        return None
    rows = torch.tensor(sorted({0, n} | {r for r in found.rows if 0 < r < n}))
    columns = torch.tensor(sorted({0, m} | {c for c in found.columns if 0 < c < m}))
    diagonals = torch.tensor(sorted(d for d in found.diagonals if -n < d < m), dtype=torch.int64)
    parts, looked = [], 0
    for tiles, boxes, full, partial in descend(graph, rows, columns):
        parts.append(_whole(boxes.chosen(full)))
        looked += len(full)
        if looked > most:
            return None
        if tiles.level == 0:  # what is left: boxes without a border inside
            members = _between_diagonals(graph, boxes.chosen(partial), diagonals, found.period, most)
            if members is None:
                return None
            parts += members
    nothing = torch.empty(0, dtype=torch.int64)
    return Cells(*(torch.cat(column) for column in zip(*parts, strict=True)) if parts else [nothing] * 8)


def _whole(boxes: Boxes) -> Cells:
    """All pairs of boxes."""
    one = torch.ones_like(boxes.top)
    return Cells(*boxes, boxes.left - boxes.bottom + 1, boxes.right - boxes.top, one - 1, one)


def _between_diagonals(graph: Graph, boxes: Boxes, diagonals: Tensor, period: int, most: int) -> list[Cells] | None:
    """Of boxes cut along the diagonals, and of each residue, what belongs to the graph: decided by one pair of each."""
    low, high = boxes.left - boxes.bottom + 1, boxes.right - boxes.top  # the range of j - i
    first = torch.searchsorted(diagonals, low, right=True)
    pieces = torch.searchsorted(diagonals, high) - first + 1
    if int(pieces.sum()) > most:
        return None
    box = torch.arange(len(low)).repeat_interleave(pieces)
    place = torch.arange(len(box)) - (pieces.cumsum(0) - pieces)[box]
    line = torch.cat([diagonals, diagonals.new_zeros(1)])
    last = place == pieces[box] - 1
    start = torch.where(place == 0, low[box], line[(first[box] + place - 1).clamp(min=0)])
    stop = torch.where(last, high[box], line[first[box] + place])
    residues = (stop - start).clamp(max=period)
    if int(residues.sum()) > most:
        return None
    found = []
    for some in torch.arange(len(box)).split(stretches(residues, CELLS_PER_STEP)):
        piece = some.repeat_interleave(residues[some])
        step = torch.arange(len(piece)) - (residues[some].cumsum(0) - residues[some]).repeat_interleave(residues[some])
        here, offset = boxes.chosen(box[piece]), start[piece] + step
        query = torch.maximum(here.top, here.left - offset)
        member = graph.contains(query, query + offset)
        columns = (*here, start[piece], stop[piece], offset % period, torch.full_like(offset, period))
        found.append(Cells(*(column[member] for column in columns)))
    return found


def stretches(count: Tensor, most: int) -> list[int]:
    """Lengths that cut a list of counts into stretches of about so many in sum."""
    return torch.unique_consecutive(count.cumsum(0) // most, return_counts=True)[1].tolist()


def count(graph: Graph, n: int, m: int) -> int | None:
    """The exact number of edges, in Python's integers."""
    found = cells(graph, n, m)
    if found is None:
        return None
    return int(sizes(found, object if (n + m) ** 2 >= 1 << 61 else np.int64).sum())  # objects where int64 overflows


def sizes(found: Cells, dtype: type = np.int64) -> np.ndarray:
    """How many pairs each cell has."""
    top, bottom, left, right, low, high, residue, period = (np.array(column.tolist(), dtype=dtype) for column in found)
    short, long = np.minimum(bottom - top, right - left), np.maximum(bottom - top, right - left)
    # A diagonal that lies u beyond the lower left corner has min(u, short, short + long - u) pairs in the box.
    low, high, residue = (number - (left - bottom) for number in (low, high, residue))
    total = np.zeros_like(top)
    for shift, sign in ((0, 1), (short, -1), (long, -1), (short + long, 1)):
        inside = [_sum_below(bound - shift, residue - shift, period) for bound in (high, low)]
        total = total + sign * (inside[0] - inside[1])
    return total


def _sum_below(bound: np.ndarray, residue: np.ndarray, period: np.ndarray) -> np.ndarray:
    """The sum of all u with 0 < u < bound and u ≡ residue (mod period)."""
    first = residue % period
    terms = np.maximum(-(-(bound - first) // period), 0)
    return terms * first + period * (terms * (terms - 1) // 2)


def in_degrees(graph: Graph, n: int, m: int) -> Tensor | None:
    """How many keys each query hears: (n,)."""
    found = runs(graph, n, m)
    return found and torch.zeros(n, dtype=torch.int64).index_add_(0, found.query, found.length)


def edges(graph: Graph, n: int, m: int) -> tuple[Tensor, Tensor] | None:
    """All edges as (query, key), sorted by query then key."""
    found = runs(graph, n, m)
    if found is None:
        return None
    total = int(found.length.sum())
    require_memory(total * BYTES_PER_EDGE, f"to list the {total:,} edges of {graph} at {n} × {m}")
    start = found.length.cumsum(0) - found.length
    step = torch.arange(total) - start.repeat_interleave(found.length)
    query = found.query.repeat_interleave(found.length)
    key = found.key.repeat_interleave(found.length) + step * found.period.repeat_interleave(found.length)
    order = (query * m + key).argsort()
    return query[order], key[order]


class Runs(NamedTuple):
    """Runs of keys in single rows: `length` keys from `key` on, `period` apart."""

    query: Tensor
    key: Tensor
    length: Tensor
    period: Tensor


def runs(graph: Graph, n: int, m: int) -> Runs | None:
    """The edges as runs of keys in rows, or None where lines are no saving."""
    found = cells(graph, n, m)
    if found is None:
        return None
    first = torch.maximum(found.top, found.left - found.high + 1)  # of the rows that have keys in the cell
    rows = (torch.minimum(found.bottom, found.right - found.low) - first).clamp(min=0)
    total = int(rows.sum())
    require_memory(total * BYTES_PER_RUN, f"for the keys of each query of {graph} at {n} × {m}")
    cell = torch.arange(len(rows)).repeat_interleave(rows)
    query = first[cell] + torch.arange(total) - (rows.cumsum(0) - rows)[cell]
    _, _, left, right, low, high, residue, period = (column[cell] for column in found)
    offset = torch.maximum(left - query, low)
    offset += (residue - offset) % period
    stop = torch.minimum(right - query, high)
    return Runs(query, query + offset, ((stop - offset + period - 1) // period).clamp(min=0), period)
