"""Where a graph has edges, told box by box: the way to plan at the cost of the occupied tiles, not of N².

A graph tells of any box of the plane (some queries × some keys) whether it is EMPTY, FULL or PARTIAL; PARTIAL is always
a safe answer. From that alone `occupied_tiles` finds where the edges are, by halving boxes until all are decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
from torch import Tensor

if TYPE_CHECKING:
    from attngraph.graph.base import Graph, Size

    Placed = Iterable[tuple[Graph, int, int, Size]]
    """Graphs side by side: each with its first query, its first key, and its size."""

EMPTY, PARTIAL, FULL = 0, 1, 2  # ordered, so that a union is the larger of two, an intersection the smaller


class Boxes(NamedTuple):
    """Boxes of the plane, each with some area: queries top … bottom-1, keys left … right-1; each int64 (boxes,)."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    @property
    def transposed(self) -> Boxes:
        """The boxes after queries and keys changed places."""
        return Boxes(self.left, self.right, self.top, self.bottom)

    def shifted(self, rows: int = 0, columns: int = 0) -> Boxes:
        """The boxes, moved."""
        return Boxes(self.top + rows, self.bottom + rows, self.left + columns, self.right + columns)

    def clipped(self, n: int | None, m: int | None) -> Boxes:
        """What of the boxes lies within n queries and m keys; a box outside loses its area."""
        return Boxes(*(side.clamp(0, end) for side, end in zip(self, (n, n, m, m), strict=True)))

    def along(self, inner: int, length: int) -> Boxes:
        """The coordinates on one axis of a grid: of this length, with `inner` nodes to a step."""
        sides = []
        for start, stop in ((self.top, self.bottom), (self.left, self.right)):
            first, last = start // inner, (stop - 1) // inner
            one_line = (
                first // length == last // length
            )  # else the box goes over the end of the axis, and has all of it
            sides += [torch.where(one_line, first % length, 0), torch.where(one_line, last % length + 1, length)]
        return Boxes(*sides)

    def chosen(self, which: Tensor) -> Boxes:
        """Some of the boxes."""
        return Boxes(*(side[which] for side in self))


def classify(empty: Tensor, full: Tensor) -> Tensor:
    """The class of each box from two answers: int8."""
    return torch.where(empty, EMPTY, torch.where(full, FULL, PARTIAL)).to(torch.int8)


def constant_class(boxes: Boxes, kind: int) -> Tensor:
    """The same answer for all boxes."""
    return torch.full_like(boxes.top, kind, dtype=torch.int8)


def between_diagonals(boxes: Boxes, least: int | None, most: int | None, period: int = 1) -> Tensor:
    """Of least <= j - i <= most, with j - i a multiple of the period; None is no bound."""
    low, high = boxes.left - boxes.bottom + 1, boxes.right - 1 - boxes.top  # the range of j - i in the box
    inside_low = low if least is None else low.clamp(min=least)
    inside_high = high if most is None else high.clamp(max=most)
    empty = inside_high // period * period < inside_low
    return classify(
        empty, (inside_low == low) & (inside_high == high) & (low % period == 0) & ((period == 1) | (low == high))
    )


def classify_groups(first_q: Tensor, last_q: Tensor, first_k: Tensor, last_k: Tensor) -> Tensor:
    """Of nodes that hear each other within ascending groups, from the groups of a box's first and last nodes."""
    return classify(
        (last_q < first_k) | (last_k < first_q), (first_q == last_q) & (first_k == last_k) & (first_q == first_k)
    )


# ------------------------------------------------------------------------------------------------- the descent


class Occupied(NamedTuple):
    """The tiles of a grid that may hold edges, sorted by row, then column, and which of them are FULL."""

    row: Tensor
    column: Tensor
    full: Tensor


BYTES_PER_BOX = 200  # what the descent holds for each box of one level, temporary tensors included


def occupied_tiles(graph: Graph, n: int, m: int, tile: tuple[int, int]) -> Occupied:
    """The tiles, of so many queries and keys, in which a graph of size n × m may have edges.

    Boxes of 2^level × 2^level tiles are quartered until their class is decided, or they are single tiles.
    """
    rows, columns = -(-n // tile[0]), -(-m // tile[1])
    row = column = torch.zeros(1 if rows and columns else 0, dtype=torch.int64)
    found = [(row[:0], row[:0], torch.zeros(0, dtype=torch.bool))]
    for level in range(max(rows - 1, columns - 1, 0).bit_length(), -1, -1):
        kind = graph._classify_boxes(_boxes(row, column, tile[0] << level, tile[1] << level).clipped(n, m))
        full, partial = kind == FULL, kind == PARTIAL
        num_full = int(full.sum()) << 2 * level
        require_memory((num_full + 4 * int(partial.sum())) * BYTES_PER_BOX, f"to plan {graph} at {n} × {m}")
        found.append((*_quartered(row[full], column[full], level, rows, columns), torch.ones(1, dtype=torch.bool)))
        if level == 0:
            found.append((row[partial], column[partial], torch.zeros(1, dtype=torch.bool)))
        else:
            row, column = _quartered(row[partial], column[partial], 1, -(-rows >> level - 1), -(-columns >> level - 1))
    full = torch.cat([flag.expand(len(row)) for row, _, flag in found])
    row, column = (torch.cat([part[side] for part in found]) for side in (0, 1))
    order = (row * columns + column).argsort()
    return Occupied(row[order], column[order], full[order])


def _boxes(row: Tensor, column: Tensor, height: int, width: int) -> Boxes:
    """Boxes of one shape, by their place in a grid."""
    return Boxes(row * height, (row + 1) * height, column * width, (column + 1) * width)


def _quartered(row: Tensor, column: Tensor, levels: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The boxes some levels below, in a grid of rows × columns of them."""
    step = torch.arange(1 << levels)
    row = ((row << levels)[:, None, None] + step[:, None]).expand(-1, -1, len(step)).flatten()
    column = ((column << levels)[:, None, None] + step).expand(-1, len(step), -1).flatten()
    inside = (row < rows) & (column < columns)
    return row[inside], column[inside]


def spans(graph: Graph, start: int, stop: int, m: int) -> list[tuple[int, int]]:
    """Ranges of keys outside of which the queries start … stop-1 hear nobody, as (first, stop), ascending.

    The keys are halved until a part is decided or is one key; ranges that touch are one.
    """
    left = torch.zeros(1 if start < stop and m else 0, dtype=torch.int64)
    right, found = torch.full_like(left, m), []
    while len(left):
        kind = graph._classify_boxes(Boxes(torch.full_like(left, start), torch.full_like(left, stop), left, right))
        done = (kind != EMPTY) & ((kind == FULL) | (right - left == 1))
        found += zip(left[done].tolist(), right[done].tolist(), strict=True)
        left, right = (side[(kind == PARTIAL) & ~done] for side in (left, right))
        middle = (left + right) // 2
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
    merged: list[tuple[int, int]] = []
    for first, end in sorted(found):
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((first, end))
    return merged


# ----------------------------------------------------------------------------------------- graphs side by side


def overlapping(placed: Placed, boxes: Boxes) -> Iterator[tuple[Graph, int, int, Tensor, Tensor, Boxes]]:
    """Of graphs side by side: graph, first query, first key, the boxes inside, those overlapping, and what of them."""
    for graph, row, column, size in placed:
        end = [LAST if count is None else first + count for first, count in zip((row, column), size, strict=True)]
        top, bottom = boxes.top.clamp(min=row), boxes.bottom.clamp(max=end[0])
        left, right = boxes.left.clamp(min=column), boxes.right.clamp(max=end[1])
        some = (top < bottom) & (left < right)
        inside = (top == boxes.top) & (bottom == boxes.bottom) & (left == boxes.left) & (right == boxes.right)
        part = Boxes(top, bottom, left, right).chosen(some).shifted(-row, -column)
        yield graph, row, column, inside & some, some, part


LAST = 1 << 62


def classify_side_by_side(placed: Placed, boxes: Boxes) -> Tensor:
    """The classes of boxes in graphs side by side; between them are no edges."""
    found = constant_class(boxes, EMPTY)
    for graph, _, _, inside, some, part in overlapping(placed, boxes):
        if len(part.top):
            kind = graph._classify_boxes(part)
            found[some] = torch.maximum(found[some], torch.where(inside[some], kind, kind.clamp(max=PARTIAL)))
    return found


def patterns_side_by_side(parts: Iterable[tuple[Graph, int, int, Tensor]], boxes: Boxes) -> list[Tensor]:
    """The patterns of graphs, each in its boxes: which graph, and its own numbers; elsewhere the box itself."""
    numbers = torch.stack([torch.full_like(boxes.top, -1), boxes.top, boxes.left])
    kinds: dict = {}
    for graph, row, column, inside in parts:
        own = graph._box_pattern(boxes.chosen(inside).shifted(-row, -column))
        numbers = torch.cat([numbers, numbers.new_zeros(max(0, 1 + len(own) - len(numbers)), len(boxes.top))])
        numbers[:, inside] = 0
        for place, number in enumerate([kinds.setdefault(graph, len(kinds)), *own]):
            numbers[place, inside] = number
    return list(numbers)


# ------------------------------------------------------------------------------------------------- the patterns


def row_ids(columns: list[Tensor]) -> Tensor:
    """A number for each row of a table of int64 columns, equal where the rows are, from 0 on."""
    code = torch.zeros_like(columns[0])
    for column in columns:
        codes, values = (torch.unique(side, return_inverse=True)[1] for side in (code, column))
        code = codes * (int(values.max()) + 1 if len(values) else 1) + values
    return torch.unique(code, return_inverse=True)[1]


# --------------------------------------------------------------------------------------------------- the memory


def _available(device: torch.device) -> int:
    """Bytes of memory of a device; what torch holds back from earlier tensors is there."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def require_memory(size: int, purpose: str, device: torch.device | None = None) -> None:
    """Raise before an allocation that this device, by default where new tensors are made, can't give."""
    if size > 1 << 28 and size > (available := _available(device or torch.get_default_device())):
        raise MemoryError(
            f"{size / 2**30:.1f} GiB of memory are required {purpose}, and {available / 2**30:.1f} GiB are available; "
            f"use a sparser graph, fewer nodes, or rows of it, graph.rows(start, stop)"
        )
