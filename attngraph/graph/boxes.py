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

from attngraph.graph.sharing import moved

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

    @staticmethod
    def one(top: int, bottom: int, left: int, right: int) -> Boxes:
        """A single box."""
        return Boxes(*torch.tensor([[top], [bottom], [left], [right]], device="cpu"))

    @property
    def transposed(self) -> Boxes:
        """The boxes after queries and keys changed places."""
        return Boxes(self.left, self.right, self.top, self.bottom)

    def shifted(self, rows: int | Tensor = 0, columns: int | Tensor = 0) -> Boxes:
        """The boxes, moved."""
        by = (rows, rows, columns, columns)
        return Boxes(*(moved(side, step) for side, step in zip(self, by, strict=True)))

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


class Tiles(NamedTuple):
    """Boxes of 2^level × 2^level cells of a grid, by their place."""

    level: int
    row: Tensor
    column: Tensor


def descend(graph: Graph, rows: Tensor, columns: Tensor) -> Iterator[tuple[Tiles, Boxes, Tensor, Tensor]]:
    """The boxes of a grid with these borders, both ascending, in which a graph may have edges.

    Boxes of 2^level × 2^level cells are quartered until their class is decided, or they are single cells. Each level,
    down to 0, is told as the boxes' places, the boxes, and which of them are FULL and PARTIAL.
    """
    num_rows, num_columns = len(rows) - 1, len(columns) - 1
    row = column = torch.zeros(1 if num_rows and num_columns else 0, dtype=torch.int64)
    for level in range(max(num_rows - 1, num_columns - 1, 0).bit_length(), -1, -1):
        top, left = row << level, column << level
        bottom, right = (top + (1 << level)).clamp(max=num_rows), (left + (1 << level)).clamp(max=num_columns)
        boxes = Boxes(rows[top], rows[bottom], columns[left], columns[right])
        kind = graph._classify_boxes(boxes)
        full, partial = kind == FULL, kind == PARTIAL
        purpose = f"to find the edges of {graph} at {int(rows[-1])} × {int(columns[-1])}"
        require_memory(4 * int(partial.sum()) * BYTES_PER_BOX, purpose)
        yield Tiles(level, row, column), boxes, full, partial
        if level:
            inner = (-(-count >> level - 1) for count in (num_rows, num_columns))
            row, column = _quartered(row[partial], column[partial], 1, *inner)


def occupied_tiles(graph: Graph, n: int, m: int, tile: tuple[int, int]) -> Occupied:
    """The tiles, of so many queries and keys, in which a graph of size n × m may have edges."""
    rows, columns = -(-n // tile[0]), -(-m // tile[1])
    borders = [
        (torch.arange(count + 1) * side).clamp(max=end)
        for count, side, end in zip((rows, columns), tile, (n, m), strict=True)
    ]
    nothing = torch.empty(0, dtype=torch.int64)
    found = [(nothing, nothing, nothing.bool())]
    for (level, row, column), _, full, partial in descend(graph, *borders):
        num_full = int(full.sum()) << 2 * level
        require_memory(num_full * BYTES_PER_BOX, f"to plan {graph} at {n} × {m}")
        found.append((*_quartered(row[full], column[full], level, rows, columns), torch.ones(1, dtype=torch.bool)))
        if level == 0:
            found.append((row[partial], column[partial], torch.zeros(1, dtype=torch.bool)))
    full = torch.cat([flag.expand(len(row)) for row, _, flag in found])
    row, column = (torch.cat([part[side] for part in found]) for side in (0, 1))
    order = (row * columns + column).argsort()
    return Occupied(row[order], column[order], full[order])


def _quartered(row: Tensor, column: Tensor, levels: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The boxes some levels below, in a grid of rows × columns of them."""
    step = torch.arange(1 << levels)
    row = ((row << levels)[:, None, None] + step[:, None]).expand(-1, -1, len(step)).flatten()
    column = ((column << levels)[:, None, None] + step).expand(-1, len(step), -1).flatten()
    inside = (row < rows) & (column < columns)
    return row[inside], column[inside]


MAX_SPANS = 1 << 16  # parts of the keys that are undecided
FEW_SPANS = 1 << 8  # with which hubs are looked for


def spans(graph: Graph, boxes: Boxes, heard: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges of keys outside of which the queries of each box hear none of its keys: number of the box, first, stop.

    Each int64 (ranges,), sorted; ranges of a box that touch are one. Its keys are halved until a part is decided or is
    one key, or there are too many parts: what is found of a box does not depend on the others. The first box hears some
    keys besides.
    """
    return _spans(graph, boxes, heard, MAX_SPANS)[0]


def spans_of_hubs(graph: Graph, transposed: Graph, boxes: Boxes) -> tuple[Tensor, Tensor, Tensor]:
    """The same where some queries of a box may hear all of its keys: these are found first, if the keys are too many.

    Halving the keys of a box alone, no part were decided before it is one key, as the other queries hear none.
    """
    found, many = _spans(graph, boxes, None, FEW_SPANS)
    if not len(many):
        return found
    of_many = boxes.chosen(many)
    (number, top, bottom), _ = _spans(transposed, of_many.transposed, None, FEW_SPANS)
    inner = Boxes(top, bottom, of_many.left[number], of_many.right[number])
    (place, first, stop), _ = _spans(graph, inner, None, MAX_SPANS)
    kept = ~torch.isin(found[0], many)
    sides = (found[0][kept], many[number[place]]), (found[1][kept], first), (found[2][kept], stop)
    return joined(*(torch.cat(side) for side in sides))


def _spans(graph: Graph, boxes: Boxes, heard: Tensor | None, most: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """As `spans`, and the boxes that had more than `most` parts undecided: their ranges may have more keys."""
    number = ((boxes.top < boxes.bottom) & (boxes.left < boxes.right)).nonzero()[:, 0]
    left, right = boxes.left[number], boxes.right[number]
    heard = left[:0] if heard is None else heard
    found: list[tuple[Tensor, Tensor, Tensor]] = [(0 * heard, heard, heard + 1)]
    many = [number[:0]]
    while len(number):
        kind = graph._classify_boxes(Boxes(boxes.top[number], boxes.bottom[number], left, right))
        too_many = torch.bincount(number)[number] > most
        done = (kind != EMPTY) & ((kind == FULL) | (right - left == 1) | too_many)
        found.append((number[done], left[done], right[done]))
        many.append(number[done & too_many & (kind == PARTIAL)])
        number, left, right = (side[(kind == PARTIAL) & ~done] for side in (number, left, right))
        middle = (left + right) // 2
        number, left, right = number.repeat(2), torch.cat([left, middle]), torch.cat([middle, right])
    return joined(*(torch.cat(sides) for sides in zip(*found, strict=True))), torch.cat(many).unique()


def joined(number: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranges (first, stop) of the same number that touch or overlap, as one; sorted."""
    if not len(number):
        return number, first, stop
    across = int(stop.max()) + 1
    order = (number * across + first).argsort()
    number, first, stop = number[order], first[order], stop[order]
    reached = (number * across + stop).cummax(0).values
    begins = torch.ones_like(number, dtype=torch.bool)
    begins[1:] = number[1:] * across + first[1:] > reached[:-1]
    last = torch.cat([begins[1:].nonzero()[:, 0], number.new_tensor([len(number) - 1])])
    return number[begins], first[begins], reached[last] - number[begins] * across


# ----------------------------------------------------------------------------------------- graphs side by side


class SideBySide(NamedTuple):
    """Graphs side by side, each with its own keys, ascending; their queries ascend too, or are the same for all.

    Where each begins and ends is int64 (parts,), and then an entry for nodes that are in none. `kind` is the number of
    its graph among the different ones.
    """

    graphs: tuple[Graph, ...]
    kind: Tensor
    row: Tensor
    row_stop: Tensor
    column: Tensor
    column_stop: Tensor

    @staticmethod
    def of(placed: Placed) -> SideBySide:
        """Those of the graphs that have pairs at all."""
        numbers: dict[Graph, int] = {}
        table = [(-1, LAST, LAST, LAST, LAST)]
        for graph, row, column, size in placed:
            if 0 not in size:
                row_stop = LAST if size[0] is None else row + size[0]
                column_stop = LAST if size[1] is None else column + size[1]
                kind = numbers.setdefault(graph, len(numbers))
                table.insert(-1, (kind, row, row_stop, column, column_stop))
        return SideBySide(tuple(numbers), *torch.tensor(table, device="cpu").T.contiguous())

    def on(self, device: torch.device) -> SideBySide:
        """The same, its tables on a device."""
        return self if self.kind.device == device else SideBySide(self.graphs, *(side.to(device) for side in self[1:]))

    def of_query(self, query: Tensor) -> Tensor:
        """The part of each query, where queries ascend; the number of parts for those in none."""
        return _part_of(query, self.row, self.row_stop)

    def of_key(self, key: Tensor) -> Tensor:
        """The part of each key; the number of parts for those in none."""
        return _part_of(key, self.column, self.column_stop)

    def each_kind(self, kind: Tensor) -> Iterator[tuple[Graph, Tensor]]:
        """Each graph, with the places where its number stands."""
        count = torch.bincount(kind, minlength=len(self.graphs)).tolist()
        for graph, places in zip(self.graphs, kind.argsort(stable=True).split(count), strict=True):
            if len(places):
                yield graph, places

    def _overlapping(self, boxes: Boxes) -> tuple[Tensor, Tensor, Boxes, Tensor]:
        """Each box with each part that it has pairs of: their numbers; these pairs, in the part's own numbers; and
        whether they are the whole box.
        """
        first = torch.maximum(
            torch.searchsorted(self.row_stop, boxes.top, right=True),
            torch.searchsorted(self.column_stop, boxes.left, right=True),
        )
        stop = torch.minimum(torch.searchsorted(self.row, boxes.bottom), torch.searchsorted(self.column, boxes.right))
        count = (stop - first).clamp(min=0)
        box = torch.arange(len(count)).repeat_interleave(count)
        part = first[box] + torch.arange(len(box)) - (count.cumsum(0) - count)[box]
        whole = boxes.chosen(box)
        inside = Boxes(
            torch.maximum(whole.top, self.row[part]), torch.minimum(whole.bottom, self.row_stop[part]),
            torch.maximum(whole.left, self.column[part]), torch.minimum(whole.right, self.column_stop[part]),
        )  # fmt: skip
        is_whole = torch.stack([one == other for one, other in zip(whole, inside, strict=True)]).all(0)
        return box, part, inside.shifted(-self.row[part], -self.column[part]), is_whole

    def classify(self, boxes: Boxes) -> Tensor:
        """The class of each box; between the graphs are no edges."""
        here = self.on(boxes.top.device)
        box, part, inside, is_whole = here._overlapping(boxes)
        kinds = torch.empty_like(box)
        for graph, places in here.each_kind(here.kind[part]):
            kinds[places] = graph._classify_boxes(inside.chosen(places)).long()
        kinds = torch.where(is_whole, kinds, kinds.clamp(max=PARTIAL))
        return torch.zeros_like(boxes.top).scatter_reduce(0, box, kinds, "amax").to(torch.int8)

    def pattern(self, boxes: Boxes) -> list[Tensor]:
        """The pattern of each box: in one part which graph it is, and its own numbers; elsewhere the box itself."""
        here = self.on(boxes.top.device)
        box, part, inside, is_whole = here._overlapping(boxes)
        box, part, inside = box[is_whole], part[is_whole], inside.chosen(is_whole)
        numbers = torch.stack([torch.full_like(boxes.top, -1), boxes.top, boxes.left])
        for graph, places in here.each_kind(here.kind[part]):
            own, which = graph._box_pattern(inside.chosen(places)), box[places]
            numbers = torch.cat([numbers, numbers.new_zeros(max(0, 1 + len(own) - len(numbers)), len(boxes.top))])
            numbers[:, which] = 0
            for place, number in enumerate([here.kind[part[places]], *own]):
                numbers[place, which] = number
        return list(numbers)


LAST = 1 << 62


def _part_of(node: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    part = torch.searchsorted(stop, node, right=True).clamp(max=len(stop) - 1)
    return torch.where(node >= start[part], part, len(stop) - 1)


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
