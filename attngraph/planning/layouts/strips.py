"""Strips: rows of tiles whose shape is the same, so that one batched matrix product serves them all. Data only.

A row of tiles has its keys in spans, runs of adjacent tiles. Where many rows have a span of the same width with the
same masks (a window: each row the same, one tile further), their keys are views of one tensor, without any copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.graph.boxes import row_ids
from attngraph.kernels.contract import Span, Strip

MAX_ROW_TILES = 64  # tiles of a row that is not cut
SECTION_TILES = 32  # longer rows are cut where the number of the tile's column is a multiple of this
MAX_SPANS = 4  # spans of a row that are parts of their own; a row in more of them is one part, which gathers its tiles
MIN_SHARING_ROWS = 4  # rows with the same masks that make a strip; fewer join other rows of about as many tiles
# Tiles of a row in strips that gather them, to which rows are padded with empty tiles: so that strips are few.
PADDED_WIDTHS = torch.tensor([*range(5), *range(6, 13, 2), *range(16, 33, 4), *range(40, 65, 8)])


def strips(row: Tensor, column: Tensor, mask: Tensor, masks: Tensor) -> list[Strip]:
    """The strips of tiles that are sorted by row, then column, with the number of each one's mask (T,).

    `masks` are the masks: bool (P, tile rows, tile columns), the last of them empty.
    """
    if not len(row):
        return []
    # A part is a span of a row, or if there are many of them, a whole row.
    section = torch.where(torch.bincount(row)[row] > MAX_ROW_TILES, column // SECTION_TILES, -1)
    whole = _run_numbers(row, section)
    span = _run_numbers(row, section, column - torch.arange(len(column)))
    in_spans = torch.bincount(whole[_run_starts(span)])[whole] <= MAX_SPANS
    part = _run_numbers(whole, torch.where(in_spans, span, -1))
    first = _run_starts(part)
    count = torch.diff(first, append=torch.tensor([len(row)]))
    place = torch.arange(len(row)) - first[part]
    part_of_row = torch.arange(len(first)) - torch.searchsorted(row[first], row[first])

    # Parts of one kind: with the same masks from left to right; or, where there would be few, as many tiles.
    shape = torch.full((len(first), int(count.max())), -1)
    shape[part, place] = mask
    kind = row_ids([part_of_row, in_spans[first].long(), *shape.T])
    shared = in_spans[first] & (torch.bincount(kind)[kind] >= MIN_SHARING_ROWS)
    widths = PADDED_WIDTHS.to(row.device)
    width = widths[torch.searchsorted(widths, count)]
    kind = row_ids([part_of_row, shared.long(), torch.where(shared, kind, width)])

    has_edge, found = masks.any(2), []
    for members in _members(kind):
        same_masks = bool(shared[members[0]])
        num_tiles = int(count[members[0]] if same_masks else width[members[0]])
        tile = first[members][:, None] + torch.arange(num_tiles)
        tile = torch.where(torch.arange(num_tiles) < count[members][:, None], tile, -1)
        columns = torch.where(tile < 0, 0, column[tile])
        mask_ids = torch.where(tile < 0, len(masks) - 1, mask[tile])
        mask_ids = mask_ids[0] if same_masks else mask_ids
        has_empty_rows = not bool(has_edge[mask_ids].any(-2).all())
        keys = _span(columns) if same_masks else Span(len(members), num_tiles, 0, 0, columns)
        rows = _span(row[first[members]][:, None])
        found.append(Strip(int(part_of_row[members[0]]), rows, keys, mask_ids, tile, has_empty_rows))
    return sorted(found, key=lambda strip: strip.part)


def _span(columns: Tensor) -> Span:
    """Runs of adjacent tiles (rows, width), as a progression if they are one."""
    rows, width = columns.shape
    step = int(columns[1, 0] - columns[0, 0]) if rows > 1 else 0
    regular = step >= 0 and bool((columns[1:, 0] - columns[:-1, 0] == step).all())
    return Span(rows, width, int(columns[0, 0]), step, None if regular else columns)


def _run_numbers(*columns: Tensor) -> Tensor:
    """The number of the run of equal rows in which each row of a table lies."""
    change = torch.zeros(len(columns[0]), dtype=torch.bool)
    for column in columns:
        change[1:] |= column[1:] != column[:-1]
    return change.long().cumsum(0)


def _run_starts(run: Tensor) -> Tensor:
    """Where each of the runs begins."""
    return torch.searchsorted(run, torch.arange(int(run[-1]) + 1))


def _members(kind: Tensor) -> list[Tensor]:
    """For each number 0, 1, 2 …, the places where it stands, ascending."""
    return list(kind.argsort(stable=True).split(torch.bincount(kind).tolist()))
