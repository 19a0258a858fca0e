"""Strips: rows of tiles whose shape is the same, so that one batched matrix product serves them all. Data only.

A row of tiles hears its keys in spans, runs of adjacent tiles. Where many rows have spans of the same widths and the
same masks (a window: each row the same, one tile further), their keys are views of one tensor, without any copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.blocks import same

WIDEST = 64  # tiles of one row in a strip
CUT = 32  # longer rows are cut at multiples of this, and merged
MOST_SPANS = 4  # in a row; rows in more pieces gather their tiles
FEWEST_ROWS = 4  # that share masks; fewer are put together with other rows of as many tiles
WIDTHS = torch.tensor(
    [*range(5), *range(6, 13, 2), *range(16, 33, 4), *range(40, 65, 8)]
)  # of gathered rows, filled up with empty tiles


class Span(NamedTuple):
    """Runs of `width` adjacent tiles, one for each of `rows` rows of a strip: the b-th begins at tile first + b · step.

    Where they begin in no such order, `index` (rows, width) names the tiles themselves.
    """

    rows: int
    width: int
    first: int
    step: int
    index: Tensor | None

    @property
    def tiles(self) -> Tensor:
        """The tiles by number: int64 (rows, width)."""
        if self.index is not None:
            return self.index
        return self.first + torch.arange(self.rows)[:, None] * self.step + torch.arange(self.width)

    def cut(self, start: int, stop: int) -> Span:
        """Those of some rows."""
        index = None if self.index is None else self.index[start:stop]
        return Span(stop - start, self.width, self.first + start * self.step, self.step, index)


class Strip(NamedTuple):
    """Rows of tiles that run together."""

    turn: int  # 0 for the first part of each row; later ones are merged into it
    rows: Span  # of width 1
    spans: list[Span]  # the keys, from left to right
    masks: Tensor  # (width,), or (rows, width) where rows differ: the numbers of the masks
    at: Tensor  # (rows, width): the numbers of the tiles in their table, -1 for one that fills up
    deaf: bool  # whether a query may hear nobody in its part of the strip

    @property
    def width(self) -> int:
        """How many tiles a row has."""
        return self.masks.shape[-1]

    def cut(self, start: int, stop: int) -> Strip:
        """Some of its rows."""
        spans = [span.cut(start, stop) for span in self.spans]
        masks = self.masks if self.masks.ndim == 1 else self.masks[start:stop]
        return self._replace(rows=self.rows.cut(start, stop), spans=spans, masks=masks, at=self.at[start:stop])


def strips(row: Tensor, column: Tensor, mask: Tensor, masks: Tensor) -> list[Strip]:
    """The strips of tiles that are sorted by row, then column, with the number of each one's mask (T,).

    `masks` are the masks: bool (P, tile rows, tile columns), the last of them empty.
    """
    if not len(row):
        return []
    tiles = torch.bincount(row)[row]
    group = torch.where(tiles > WIDEST, column // CUT, -1)
    part = _runs(row, group)  # the number of each tile's part of a row
    first = torch.searchsorted(part, torch.arange(int(part[-1]) + 1))
    count = torch.diff(first, append=torch.tensor([len(row)]))
    place = torch.arange(len(row)) - first[part]
    turn = torch.arange(len(first)) - torch.searchsorted(row[first], row[first])

    # A table (parts, place) of each part's tiles: who begins a span, with which mask.
    begins = torch.ones(len(row), dtype=torch.bool)
    begins[1:] = (part[1:] != part[:-1]) | (column[1:] != column[:-1] + 1)
    shape = torch.full((len(first), int(count.max())), -1)
    shape[part, place] = mask * 2 + begins
    pieces = torch.zeros_like(count).index_add_(0, part, begins.long())
    kind = same([turn, *shape.T])
    shared = (torch.bincount(kind)[kind] >= FEWEST_ROWS) & (pieces <= MOST_SPANS)
    width = WIDTHS[torch.searchsorted(WIDTHS, count)]
    kind = same([turn, shared.long(), torch.where(shared, kind, width)])

    heard = masks.any(2)
    found = []
    for members in _members(kind):
        one = members[0]
        wide = int(count[one] if shared[one] else width[one])
        at = first[members][:, None] + torch.arange(wide)
        at = torch.where(torch.arange(wide) < count[members][:, None], at, -1)
        columns = torch.where(at < 0, 0, column[at])
        own = torch.where(at < 0, len(masks) - 1, mask[at])
        deaf = not bool(heard[own[:1] if shared[one] else own].any(1).all())
        if shared[one]:
            starts = begins[at[0]].nonzero()[:, 0].tolist()
            spans = [_span(columns[:, a:b]) for a, b in zip(starts, [*starts[1:], wide], strict=True)]
            own = own[0]
        else:
            spans = [Span(len(columns), wide, 0, 0, columns)]
        rows = _span(row[first[members]][:, None])
        found.append(Strip(int(turn[one]), rows, spans, own, at, deaf))
    return sorted(found, key=lambda strip: strip.turn)


def _span(columns: Tensor) -> Span:
    """Runs of adjacent tiles (rows, width), as a progression if they are one."""
    step = int(columns[1, 0] - columns[0, 0]) if len(columns) > 1 else 0
    regular = step >= 0 and bool((columns[1:, 0] - columns[:-1, 0] == step).all())
    return Span(*columns.shape, int(columns[0, 0]), step, None if regular else columns)


def _runs(*columns: Tensor) -> Tensor:
    """The number of the run of equal rows in which each row of a table lies."""
    change = torch.zeros(len(columns[0]), dtype=torch.bool)
    for column in columns:
        change[1:] |= column[1:] != column[:-1]
    return change.long().cumsum(0)


def _members(kind: Tensor) -> list[Tensor]:
    """For each number 0, 1, 2 …, the places where it stands, ascending."""
    return list(kind.argsort(stable=True).split(torch.bincount(kind).tolist()))
