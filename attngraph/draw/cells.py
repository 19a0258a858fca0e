"""Pairs of nodes in cells, each with a share or a mean: what a picture shows that has fewer pixels than pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.graph import counting, listing
from attngraph.graph.base import Graph, at_size
from attngraph.graph.boxes import EMPTY, FULL, PARTIAL, Boxes

MOST = 128  # cells along an axis
FEWEST = 8  # rows of a cell that are looked at
PAIRS = 1 << 24  # that are all looked at; of more, in cells that are partly full and not counted, a sample
PARTS = 1 << 20  # of cells, counted each by a formula: of more, they are sampled
LINES, LISTED = 1 << 17, 1 << 22  # breakpoints, and edges that are listed besides: of more, cells are sampled


class Cells(NamedTuple):
    """n queries × m keys, of which height × width make a cell; the last cell of a row or column may be smaller."""

    n: int
    m: int
    height: int
    width: int

    @staticmethod
    def of(n: int, m: int) -> Cells:
        """As few nodes in a cell as a picture has room for."""
        return Cells(n, m, max(1, math.ceil(n / MOST)), max(1, math.ceil(m / MOST)))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return math.ceil(self.n / self.height), math.ceil(self.m / self.width)

    @property
    def are_pairs(self) -> bool:
        """Whether every cell is a pair of its own."""
        return self.height == self.width == 1

    @property
    def boxes(self) -> Boxes:
        """The cells, row by row."""
        rows, columns = self.shape
        top = (torch.arange(rows) * self.height).repeat_interleave(columns)
        left = (torch.arange(columns) * self.width).repeat(rows)
        return Boxes(top, (top + self.height).clamp(max=self.n), left, (left + self.width).clamp(max=self.m))

    @property
    def areas(self) -> Tensor:
        """How many pairs each has: (rows, columns)."""
        top, bottom, left, right = self.boxes
        return ((bottom - top) * (right - left)).view(self.shape)

    def sums(self, query: Tensor, key: Tensor, values: Tensor | None = None) -> Tensor:
        """The sum of values of edges in each cell, or their number: float64 (rows, columns)."""
        rows, columns = self.shape
        place = query // self.height * columns + key // self.width
        values = torch.ones(len(place)) if values is None else values
        return torch.bincount(place, values.double(), minlength=rows * columns).view(rows, columns)

    def means(self, query: Tensor, key: Tensor, values: Tensor) -> Tensor:
        """The mean of the values of edges in each cell, NaN in cells without edges."""
        return self.sums(query, key, values) / self.sums(query, key)


class Shares(NamedTuple):
    """The share of each cell's pairs that are edges."""

    values: Tensor
    is_empty: Tensor
    """Which cells have no edge: of a sample that found none, that is not known."""
    is_exact: bool
    """Whether all pairs were looked at, or counted."""


def shares(graph: Graph, cells: Cells, pairs: int = PAIRS) -> Shares:
    """Of the pairs in each cell, how many are edges; where heads have graphs of their own, in the mean over them.

    Up to so many pairs are all looked at. Of a larger graph, edges are counted by its lines; or else those that are
    listed are counted, and a cell of what is left is empty, full, or, where neither is known, looked at along some of
    its rows and columns.
    """
    if graph.heads:
        values, is_empty, is_exact = zip(
            *(shares(graph._head(h), cells, pairs) for h in range(graph.heads)), strict=True
        )
        return Shares(torch.stack(values).mean(0), torch.stack(is_empty).all(0), all(is_exact))
    graph, n, m = at_size(graph, cells.n, cells.m)
    if n * m <= pairs:
        rows, columns = cells.shape
        padded = torch.zeros(rows * cells.height, columns * cells.width, dtype=torch.bool)
        padded[:n, :m] = graph.mask(n, m, "cpu")
        counts = padded.view(rows, cells.height, columns, cells.width).sum((1, 3))
    else:
        counts = _counted(graph, cells)
    if counts is not None:
        return Shares(counts.double() / cells.areas, counts == 0, True)
    return _sampled(graph, cells, pairs)


def _counted(graph: Graph, cells: Cells) -> Tensor | None:
    """How many edges each cell has, by the lines of the graph: int64; None where that would take long."""
    n, m = cells.n, cells.m
    rest, lists = graph._split(n, m, listing.has_lists_alone)
    lines = rest._breakpoints(n, m)
    if lines is None or len(lines.rows) + len(lines.columns) + len(lines.diagonals) > LINES:
        return None
    if sum(each.cost for each in lists) > LISTED or (cells.height + cells.width) ** 2 >= 1 << 61:
        return None
    split = listing.by_lines(graph, n, m)
    found = None if split is None else counting.cells(split[0], n, m, PARTS)
    parts = None if found is None else _cut(found, cells)
    if split is None or parts is None:
        return None
    place, cut = parts
    counts = torch.zeros(cells.shape, dtype=torch.int64)
    counts.view(-1).index_add_(0, place, torch.from_numpy(counting.sizes(cut)))
    return counts + cells.sums(*split[1]).long() - cells.sums(*split[2]).long()


def _cut(found: counting.Cells, cells: Cells) -> tuple[Tensor, counting.Cells] | None:
    """The parts of a graph, cut along the borders of the cells: the cell of each, and what of the part is in it."""
    top = torch.maximum(found.top, found.left - found.high + 1)  # of the rows that have keys in the part
    bottom = torch.minimum(found.bottom, found.right - found.low)
    part, row = _steps(top // cells.height, (bottom - 1) // cells.height)
    top = torch.maximum(found.top[part], row * cells.height)
    bottom = torch.minimum(found.bottom[part], (row + 1) * cells.height)
    left = torch.maximum(found.left[part], top + found.low[part])
    right = torch.minimum(found.right[part], bottom - 1 + found.high[part])
    if int(((right - 1) // cells.width - left // cells.width + 1).clamp(min=0).sum()) > PARTS:
        return None
    piece, column = _steps(left // cells.width, (right - 1) // cells.width)
    part, row, top, bottom = part[piece], row[piece], top[piece], bottom[piece]
    left = torch.maximum(found.left[part], column * cells.width)
    right = torch.minimum(found.right[part], (column + 1) * cells.width)
    low = torch.maximum(found.low[part], left - bottom + 1)
    high = torch.maximum(low, torch.minimum(found.high[part], right - top))
    cut = counting.Cells(top, bottom, left, right, low, high, found.residue[part], found.period[part])
    return row * cells.shape[1] + column, cut


def _steps(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers first … last of each entry: its place, and the number."""
    count = (last - first + 1).clamp(min=0)
    entry = torch.arange(len(count)).repeat_interleave(count)
    return entry, first[entry] + torch.arange(len(entry)) - (count.cumsum(0) - count)[entry]


def _sampled(graph: Graph, cells: Cells, pairs: int) -> Shares:
    """What is known of cells, and of the others what some of their pairs tell."""
    rest, (query, key) = listing.split(graph, cells.n, cells.m)
    boxes = cells.boxes
    kinds = rest._classify_boxes(boxes)
    found, unknown = (kinds == FULL).double(), kinds == PARTIAL
    partial = boxes.chosen(unknown)
    found[unknown], is_exact = _merged(
        _looked_at(rest, partial, pairs // 2), _looked_at(rest.T, partial.transposed, pairs // 2)
    )
    differs = graph.contains(query, key).double() - rest.contains(query, key).double()
    found = found.view(cells.shape) + cells.sums(query, key, differs) / cells.areas
    is_known = is_exact | (kinds == EMPTY).view(cells.shape)
    return Shares(found.clamp(0, 1), (found <= 0) & is_known, is_exact)


def listed(graph: Graph, n: int, m: int) -> int:
    """How many edges `shares` would list, or pairs look at to list them."""
    if graph.heads:
        return sum(listed(graph._head(head), n, m) for head in range(graph.heads))
    bound = at_size(graph, n, m)[0]
    return sum(each.cost for each in bound._split(n, m, lambda part, *_: part._found_by_listing())[1])


class Lines(NamedTuple):
    """What was found along some rows of each box."""

    mean: Tensor
    """The share of edges."""
    spread: Tensor
    """The variance of this share from row to row."""
    are_all: bool
    """Whether every pair was looked at."""

    def is_better_than(self, other: Lines) -> Tensor:
        """Where they have found edges, and agree, or vary much less."""
        agree = self.spread <= 1e-3 * self.mean.square()
        return (self.mean > 0) & (agree | (4 * self.spread < other.spread))


def _merged(rows: Lines, columns: Lines) -> tuple[Tensor, bool]:
    """The share of edges from what was found along rows and along columns, and whether it is exact.

    Their mean, unless all rows agree, or vary much less than the columns do: as columns do where one row is full.
    """
    if rows.are_all or columns.are_all:
        return (rows if rows.are_all else columns).mean, True
    by_rows, by_columns = rows.is_better_than(columns), columns.is_better_than(rows)
    one = torch.where(by_rows, rows.mean, columns.mean)
    return torch.where(by_rows ^ by_columns, one, (rows.mean + columns.mean) / 2), False


def _looked_at(graph: Graph, boxes: Boxes, pairs: int) -> Lines:
    """Some rows of each box, with as many columns as there can be of about so many pairs in all."""
    count = len(boxes.top)
    if not count:
        return Lines(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), True)
    generator = torch.Generator().manual_seed(0)  # the same picture each time
    column, is_column, all_columns = _some(boxes.left, boxes.right, pairs // (count * FEWEST), generator)
    row, is_row, all_rows = _some(boxes.top, boxes.bottom, max(FEWEST, pairs // (count * column.shape[1])), generator)
    found, step = [], max(1, PAIRS // 8 // (row.shape[1] * column.shape[1]))
    for some in torch.arange(count).split(step):
        inside = graph.contains(row[some, :, None], column[some, None]) & is_column[some, None]
        found.append(inside.sum(2) / is_column[some, None].sum(2).double())
    share, weight = torch.cat(found), is_row / is_row.sum(1, keepdim=True).double()
    mean = (share * weight).sum(1)
    spread = ((share - mean[:, None]).square() * weight).sum(1)
    return Lines(mean, spread, all_rows and all_columns)


def _some(first: Tensor, stop: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, bool]:
    """Up to so many of the nodes first … stop-1 of each box, and which of them count; and whether these are all."""
    length = stop - first
    longest = int(length.max())
    if longest <= most:
        node = first[:, None] + torch.arange(longest)
        return node.clamp(max=stop[:, None] - 1), node < stop[:, None], True
    chance = torch.rand(len(first), max(most, 1), generator=generator, device="cpu").to(first.device)
    node = first[:, None] + (chance * length[:, None]).long().clamp(max=length[:, None] - 1)
    return node, torch.ones_like(node, dtype=torch.bool), False
