"""Strips: rows of tiles whose shape is the same, so that one batched matrix product serves them all. Data only.

A row of tiles hears its keys in spans, runs of adjacent tiles. Where many rows have a span of the same width with the
same masks (a window: each row the same, one tile further), their keys are views of one tensor, without any copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.graph.boxes import same

WIDEST = 64  # tiles of one row in a strip
CUT = 32  # longer rows are cut at multiples of this
MOST_SPANS = 4  # in a row; rows in more pieces gather their tiles
FEWEST_ROWS = 4  # that share masks; fewer are put together with other rows of as many tiles
# Of gathered rows, which are filled up with empty tiles.
WIDTHS = torch.tensor([*range(5), *range(6, 13, 2), *range(16, 33, 4), *range(40, 65, 8)])


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
    keys: Span
    masks: Tensor  # (width,), or (rows, width) where rows differ: the numbers of the masks
    at: Tensor  # (rows, width): the numbers of the tiles in their table, -1 for one that fills up
    deaf: bool  # whether a query may hear nobody in its part of the strip

    def cut(self, start: int, stop: int) -> Strip:
        """Some of its rows."""
        masks = self.masks if self.masks.ndim == 1 else self.masks[start:stop]
        return Strip(
            self.turn, self.rows.cut(start, stop), self.keys.cut(start, stop), masks, self.at[start:stop], self.deaf
        )


def strips(row: Tensor, column: Tensor, mask: Tensor, masks: Tensor) -> list[Strip]:
    """The strips of tiles that are sorted by row, then column, with the number of each one's mask (T,).

    `masks` are the masks: bool (P, tile rows, tile columns), the last of them empty.
    """
    if not len(row):
        return []
    # A part is a span of a row, or if there are many of them, a whole row.
    section = torch.where(torch.bincount(row)[row] > WIDEST, column // CUT, -1)
    whole = _runs(row, section)
    span = _runs(row, section, column - torch.arange(len(column)))
    few = torch.bincount(whole[_starts(span)])[whole] <= MOST_SPANS
    part = _runs(whole, torch.where(few, span, -1))
    first = _starts(part)
    count = torch.diff(first, append=torch.tensor([len(row)]))
    place = torch.arange(len(row)) - first[part]
    turn = torch.arange(len(first)) - torch.searchsorted(row[first], row[first])

    # Parts of one kind: with the same masks from left to right; or, where few would be, as many tiles.
    shape = torch.full((len(first), int(count.max())), -1)
    shape[part, place] = mask
    kind = same([turn, few[first].long(), *shape.T])
    shared = few[first] & (torch.bincount(kind)[kind] >= FEWEST_ROWS)
    width = WIDTHS[torch.searchsorted(WIDTHS, count)]
    kind = same([turn, shared.long(), torch.where(shared, kind, width)])

    heard, found = masks.any(2), []
    for members in _members(kind):
        alike = bool(shared[members[0]])
        wide = int(count[members[0]] if alike else width[members[0]])
        at = first[members][:, None] + torch.arange(wide)
        at = torch.where(torch.arange(wide) < count[members][:, None], at, -1)
        columns = torch.where(at < 0, 0, column[at])
        own = torch.where(at < 0, len(masks) - 1, mask[at])
        own = own[0] if alike else own
        deaf = not bool(heard[own].any(-2).all())
        keys = _span(columns) if alike else Span(*columns.shape, 0, 0, columns)
        found.append(Strip(int(turn[members[0]]), _span(row[first[members]][:, None]), keys, own, at, deaf))
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


def _starts(run: Tensor) -> Tensor:
    """Where each of the runs begins."""
    return torch.searchsorted(run, torch.arange(int(run[-1]) + 1))


def _members(kind: Tensor) -> list[Tensor]:
    """For each number 0, 1, 2 …, the places where it stands, ascending."""
    return list(kind.argsort(stable=True).split(torch.bincount(kind).tolist()))
