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

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attngraph.graph.base import Graph

MAX_CELLS = 1 << 25  # looks at `contains`; beyond, cells are no saving
CELLS_PER_STEP = 1 << 20  # cells of one step: 8 MiB for each of about 20 tensors


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
        return Breakpoints(
            frozenset(r + rows for r in self.rows),
            frozenset(c + columns for c in self.columns),
            frozenset(d + columns - rows for d in self.diagonals),
            self.period,
        )


class Cells(NamedTuple):
    """Parts of the plane that belong to a graph: int64 columns of a table, one entry a cell and residue.

    Queries i in first … stop-1; keys j from low + low_slope·(i - first) to below high + high_slope·(i - first), of
    which those with j - i ≡ residue (mod period).
    """

    first: Tensor
    stop: Tensor
    low: Tensor
    low_slope: Tensor
    high: Tensor
    high_slope: Tensor
    residue: Tensor


def cells(graph: Graph, n: int, m: int) -> tuple[Cells, int] | None:
    """The cells of a graph at size n × m with their period, or None where lines are no saving."""
    found = graph._breakpoints(n, m)
    if found is None:
        return None
    columns = sorted({0, m} | {c for c in found.columns if 0 < c < m})
    diagonals = sorted(d for d in found.diagonals if -n < d < m)
    borders = {0, n} | {r for r in found.rows if 0 < r < n}
    if (len(borders) + len(columns) * len(diagonals)) * (len(columns) + len(diagonals)) * found.period > MAX_CELLS:
        return None
    # Between two borders no two lines cross, so their order from left to right is one and the same.
    borders |= {c - d for c in columns for d in diagonals if 0 < c - d < n}
    edge = torch.tensor(sorted(borders))
    upright, slanted = torch.tensor(columns), torch.tensor(diagonals, dtype=torch.int64)
    step = max(1, CELLS_PER_STEP // ((len(columns) + len(diagonals)) * found.period))
    bands = zip(edge[:-1].split(step), edge[1:].split(step), strict=True)
    parts = [_members(graph, _table(first, stop, upright, slanted, m), found.period) for first, stop in bands]
    nothing = torch.empty(0, dtype=torch.int64)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [nothing] * 7
    return Cells(*columns), found.period


def _table(first: Tensor, stop: Tensor, upright: Tensor, slanted: Tensor, m: int) -> list[Tensor]:
    """The cells of some bands of rows, from left to right between the lines: `Cells` without the residue."""
    first, stop = first[:, None], stop[:, None]
    columns = upright.expand(len(first), -1)
    at_first = torch.cat([columns, (first + slanted).clamp(0, m)], dim=1)
    at_last = torch.cat([columns, (stop - 1 + slanted).clamp(0, m)], dim=1)
    order = (at_first + at_last).argsort(dim=1)
    at_first, at_last = at_first.gather(1, order), at_last.gather(1, order)
    slope = (at_last > at_first).long()
    occupied = (at_first[:, 1:] > at_first[:, :-1]) | (at_last[:, 1:] > at_last[:, :-1])
    table = (first, stop, at_first[:, :-1], slope[:, :-1], at_first[:, 1:], slope[:, 1:])
    return [column.expand_as(occupied)[occupied] for column in table]


def _members(graph: Graph, table: list[Tensor], period: int) -> Cells:
    """Of all cells and residues, those that belong to the graph, decided by one pair of each."""
    residue = torch.arange(period).repeat(len(table[0]))
    first, stop, low, low_slope, high, high_slope = (column.repeat_interleave(period) for column in table)
    least = torch.where(low_slope == 1, low - first, low - stop + 1)  # the smallest j - i in the cell
    offset = least + (residue - least) % period
    query = torch.where(low_slope == 1, first, torch.maximum(first, low - offset))
    inside = offset < high - first
    query, offset = torch.where(inside, query, 0), torch.where(inside, offset, 0)
    kept = inside.clone()
    kept[inside] = graph.contains(query[inside], (query + offset)[inside])
    return Cells(*(column[kept] for column in (first, stop, low, low_slope, high, high_slope, residue)))


def count(graph: Graph, n: int, m: int) -> int | None:
    """The exact number of edges, in Python's integers."""
    found = cells(graph, n, m)
    if found is None:
        return None
    table, period = found
    total = 0
    for first, stop, low, low_slope, high, high_slope, residue in zip(*(c.tolist() for c in table), strict=True):
        total += _keys_below(high, high_slope, first, stop, residue, period)
        total -= _keys_below(low, low_slope, first, stop, residue, period)
    return total


def _keys_below(bound: int, slope: int, first: int, stop: int, residue: int, period: int) -> int:
    """Σ over the rows i of ⌈(bound(i) - i - residue) / period⌉."""
    reach, rows = bound - first - residue, stop - first
    if slope:
        return rows * -(-reach // period)
    return _sum_of_ceilings(reach, period) - _sum_of_ceilings(reach - rows, period)


def _sum_of_ceilings(x: int, period: int) -> int:
    """A function G with G(x) - G(x-1) = ⌈x / period⌉ for every integer x."""
    whole, rest = divmod(x, period)
    return period * (whole * (whole + 1) // 2) + rest * (whole + 1)


def in_degrees(graph: Graph, n: int, m: int) -> Tensor | None:
    """How many keys each query hears: (n,)."""
    found = runs(graph, n, m)
    return found and torch.zeros(n, dtype=torch.int64).index_add_(0, found.query, found.length)


def edges(graph: Graph, n: int, m: int) -> tuple[Tensor, Tensor] | None:
    """All edges as (query, key), sorted by query then key."""
    found = runs(graph, n, m)
    if found is None:
        return None
    start = found.length.cumsum(0) - found.length
    step = torch.arange(int(found.length.sum())) - start.repeat_interleave(found.length)
    query = found.query.repeat_interleave(found.length)
    key = found.key.repeat_interleave(found.length) + step * found.period
    order = (query * m + key).argsort()
    return query[order], key[order]


class Runs(NamedTuple):
    """Runs of keys in single rows: `length` keys from `key` on, `period` apart."""

    query: Tensor
    key: Tensor
    length: Tensor
    period: int


def runs(graph: Graph, n: int, m: int) -> Runs | None:
    """The edges as runs of keys in rows, or None where lines are no saving."""
    found = cells(graph, n, m)
    if found is None:
        return None
    table, period = found
    rows = table.stop - table.first
    first, _, low, low_slope, high, high_slope, residue = (column.repeat_interleave(rows) for column in table)
    down = torch.arange(len(first)) - (rows.cumsum(0) - rows).repeat_interleave(rows)
    query, low, high = first + down, low + low_slope * down, high + high_slope * down
    key = low + (query + residue - low) % period
    return Runs(query, key, ((high - key + period - 1) // period).clamp(min=0), period)
