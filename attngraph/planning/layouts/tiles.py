"""The layout of a graph as tiles: which tiles of the plane hold edges, and which pairs of a tile are edges. Data only.

A tile that is full needs no mask; of the others, equal masks are stored once. So a window over a million nodes, whose
tiles are all alike, is a list of tiles and two masks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngraph.graph.base import Graph
from attngraph.graph.boxes import Boxes, occupied_tiles, require_memory, row_ids
from attngraph.graph.listing import warn_if_long
from attngraph.kernels.contract import Strip, TileRows
from attngraph.planning.layouts.strips import strips

WORD = 32  # bits of a word of a packed mask
STEP_PAIRS = 1 << 22  # (query, key) pairs of tiles whose masks are looked at in one step
NO_MASK = -1  # the number of the mask of a full tile


class Table(NamedTuple):
    """Tiles sorted by row, then column: row, column and the number of its mask, each int64 (T,), NO_MASK where full.

    `words` are the masks, packed: int32 (P, tile rows, tile columns / 32), bit c % 32 of word c // 32 for column c.
    """

    row: Tensor
    column: Tensor
    mask: Tensor
    words: Tensor

    @property
    def edges(self) -> Tensor:
        """How many edges each tile has: int64 (T,)."""
        area = self.words.shape[1] * self.words.shape[2] * WORD
        of_masks = torch.cat([unpack(self.words).sum((1, 2)), self.row.new_tensor([area])])
        return of_masks[self.mask]  # NO_MASK is the last

    def occupied(self, block_m: int, block_n: int) -> Tensor:
        """How many of each tile's blocks, of block_m queries and block_n keys, hold edges: int64 (T,)."""
        _, rows, words = self.words.shape
        blocks = unpack(self.words).view(-1, rows // block_m, block_m, words * WORD // block_n, block_n).any(4).any(2)
        full = self.row.new_tensor([blocks.shape[1] * blocks.shape[2]])
        return torch.cat([blocks.sum((1, 2)), full])[self.mask]

    def chosen(self, which: Tensor) -> Table:
        """Some of the tiles, given by a bool tensor."""
        return Table(self.row[which], self.column[which], self.mask[which], self.words)

    def list_edges(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """The edges as (query, key), sorted by tile."""
        tile_m, tile_n = self.words.shape[1], self.words.shape[2] * WORD
        queries, keys = [self.row[:0]], [self.row[:0]]
        masks = torch.cat([unpack(self.words), torch.ones(1, tile_m, tile_n, dtype=torch.bool)])
        for chunk in torch.arange(len(self.row)).split(max(1, STEP_PAIRS // (tile_m * tile_n))):
            tile, query, key = masks[self.mask[chunk]].nonzero().unbind(1)
            queries.append(self.row[chunk][tile] * tile_m + query)
            keys.append(self.column[chunk][tile] * tile_n + key)
        return torch.cat(queries), torch.cat(keys)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A graph of n queries and m keys as tiles: block-CSR and its transpose. Tiles at the border may reach beyond."""

    n: int
    m: int
    table: Table

    @cached_property
    def tile(self) -> tuple[int, int]:
        """How many queries and keys a tile has."""
        return self.table.words.shape[1], self.table.words.shape[2] * WORD

    @cached_property
    def grid(self) -> tuple[int, int]:
        """How many tiles the plane has on each side."""
        return -(-self.n // self.tile[0]), -(-self.m // self.tile[1])

    @cached_property
    def num_edges(self) -> int:
        """How many edges they have."""
        return int(self.table.edges.sum())

    @cached_property
    def by_query(self) -> TileRows:
        """The tiles of each row of tiles."""
        return _tile_rows(self.table.row, self.table.column, self.table.mask, self.grid[0])

    @cached_property
    def by_key(self) -> TileRows:
        """The tiles of each column of tiles."""
        return _tile_rows(self.table.column, self.table.row, self.table.mask, self.grid[1])

    @cached_property
    def masks(self) -> Tensor:
        """The masks unpacked, bool (P + 2, tile rows, tile columns): then a full and an empty one."""
        ends = torch.tensor([True, False], device=self.table.row.device)[:, None, None].expand(2, *self.tile)
        return torch.cat([unpack(self.table.words), ends])

    @cached_property
    def strips(self) -> list[Strip]:
        """The tiles in the order in which matrix products run over them."""
        row, column, mask, _ = self.table
        return strips(row, column, self._mask_id(mask), self.masks)

    def _mask_id(self, mask: Tensor) -> Tensor:
        """Numbers of masks as numbers in `masks`."""
        return torch.where(mask == NO_MASK, len(self.masks) - 2, mask)

    @cached_property
    def empty_rows(self) -> Tensor:
        """The rows of tiles that have no tiles."""
        return (torch.bincount(self.table.row, minlength=self.grid[0]) == 0).nonzero()[:, 0]

    @cached_property
    def first_edge(self) -> Tensor:
        """The number, in `edge_index` order, of the first edge in each row of each tile: int64 (T, tile rows)."""
        row = self.table.row
        chunks = self.table.words.split(max(1, STEP_PAIRS // (4 * self.tile[0] * self.tile[1])))
        ends = row.new_tensor([self.tile[1], 0])[:, None].expand(2, self.tile[0])  # of a full mask, and an empty one
        of_masks = torch.cat([*(unpack(chunk).sum(2) for chunk in chunks), ends])
        mask = self.table.mask
        count = of_masks[torch.where(mask == NO_MASK, len(of_masks) - 2, mask)]  # edges of each query in each tile
        through = count.cumsum(0)  # of all tiles up to this one; a row of zeros at -1
        through = torch.cat([through, count[:1] * 0]) if len(row) else count.new_zeros(1, self.tile[0])
        start = torch.searchsorted(row, torch.arange(self.grid[0] + 1, device=row.device))
        before_row = through[start[:-1] - 1]  # in all earlier rows of tiles
        degree = through[start[1:] - 1] - before_row  # of each query
        first_of_query = (degree.flatten().cumsum(0) - degree.flatten()).view_as(degree)
        return through[: len(row)] - count - before_row[row] + first_of_query[row]

    @cached_property
    def first_edge_of_word(self) -> Tensor:
        """The same for each word of a mask: int64 (T, tile rows, tile columns / 32)."""
        count = self.masks.unflatten(2, (-1, WORD)).sum(3)
        before = (count.cumsum(2) - count)[self._mask_id(self.table.mask)]
        return self.first_edge[:, :, None] + before

    @cached_property
    def words_by_key(self) -> Tensor:
        """The masks transposed, packed: int32 (P, tile columns, tile rows / 32)."""
        return pack(unpack(self.table.words).transpose(1, 2))

    @cached_property
    def spans(self) -> Tensor | None:
        """The keys of each query of a mask, its first | the one after its last << 16: int32 (P, tile rows); None where
        the keys of some query are no span of adjacent ones."""
        return _spans(self.table.words)

    @cached_property
    def spans_by_key(self) -> Tensor | None:
        """The same of the masks transposed: int32 (P, tile columns)."""
        return _spans(self.words_by_key)

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What kernels make of it once."""
        return {}

    def on(self, device: torch.device) -> Tiles:
        """The same tiles on another device, kept."""
        if self.table.row.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = Tiles(self.n, self.m, Table(*(part.to(device) for part in self.table)))
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tiles]:
        return {}

    @property
    def nbytes(self) -> int:
        """How much memory the tiles take."""
        return sum(part.nbytes for part in self.table)

    def mask(self) -> Tensor:
        """The edges as a bool tensor (n, m), rebuilt from the tiles."""
        (tile_m, tile_n), (rows, columns) = self.tile, self.grid
        found = torch.zeros(rows, columns, tile_m, tile_n, dtype=torch.bool)
        found[self.table.row, self.table.column] = self.masks[self._mask_id(self.table.mask)]
        return found.transpose(1, 2).reshape(rows * tile_m, columns * tile_n)[: self.n, : self.m]


def _spans(words: Tensor) -> Tensor | None:
    """Of packed masks (P, rows, columns / 32), each row's first column | the one after its last << 16, 0 where it has
    none: int32 (P, rows); None if a row has a gap."""
    width = words.shape[2] * WORD
    column, found = torch.arange(width, device=words.device), [words[:0, :, 0]]
    for chunk in words.split(max(1, STEP_PAIRS // (words.shape[1] * width))):
        masks = unpack(chunk)
        first = torch.where(masks, column, width).amin(2)
        stop = torch.where(masks, column + 1, 0).amax(2)
        length = (stop - first).clamp(min=0)
        if not torch.equal(length, masks.sum(2)):
            return None
        found.append(torch.where(length > 0, first | stop << 16, 0).int())
    return torch.cat(found)


def _tile_rows(row: Tensor, column: Tensor, mask: Tensor, rows: int) -> TileRows:
    columns = int(column.max()) + 1 if len(column) else 1
    tile = ((row * 2 + (mask == NO_MASK)) * columns + column).argsort()  # by row, those with masks first, by column
    row, full = row[tile], mask[tile] == NO_MASK
    start = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    masked = row.new_zeros(rows).index_add_(0, row, (~full).long())
    heavy_first = start.diff().argsort(descending=True, stable=True)
    return TileRows(start, start[:-1] + masked, column[tile].int(), mask[tile].int(), tile.int(), heavy_first.int())


def tabulate(graph: Graph, n: int, m: int, tile: tuple[int, int]) -> Table:
    """The tiles of a graph that is bound to its size, found box by box."""
    row, column, full = occupied_tiles(graph, n, m, tile)
    boxes = Boxes(row * tile[0], (row + 1) * tile[0], column * tile[1], (column + 1) * tile[1])
    whole = full & (boxes.bottom <= n) & (boxes.right <= m)
    mask = torch.full_like(row, NO_MASK)
    masked = boxes.chosen(~whole)
    inside = masked.clipped(n, m)
    height, width = inside.bottom - inside.top, inside.right - inside.left
    pattern = row_ids([height, width, graph._classify_boxes(inside).long(), *graph._box_pattern(inside)])
    first = _first_of_each(pattern)
    require_memory(len(first) * (tile[0] * tile[1] // 8 + 64), f"for the masks of {graph} at {n} × {m}")
    words = _masks(graph, n, m, tile, masked.top[first], masked.left[first])
    mask[~whole] = pattern
    return _normalized(Table(row, column, mask, words))


def no_tiles(tile: tuple[int, int]) -> Table:
    """Of a graph without edges."""
    none = torch.empty(0, dtype=torch.int64)
    return Table(none, none, none, torch.empty(0, tile[0], tile[1] // WORD, dtype=torch.int32))


def tabulate_edges(query: Tensor, key: Tensor, tile: tuple[int, int]) -> Table:
    """The tiles of a list of edges without duplicates."""
    row, column = query // tile[0], key // tile[1]
    stride = int(column.max()) + 1 if len(column) else 1
    code, at = torch.unique(row * stride + column, return_inverse=True)
    words = tile[1] // WORD
    require_memory(len(code) * tile[0] * tile[1] // 2, f"for the {len(code)} tiles of {len(query)} edges")
    place = (at * tile[0] + query % tile[0]) * words + key % tile[1] // WORD
    packed = torch.zeros(len(code) * tile[0] * words, dtype=torch.int64)
    packed.index_add_(0, place, 1 << key % WORD)  # the bits are distinct: their sum is their union
    masks = packed.to(torch.int32).view(-1, tile[0], words)
    return _normalized(Table(code // stride, code % stride, torch.arange(len(code)), masks))


def union(a: Table, b: Table) -> Table:
    """The tiles of both; where both have one, the union of its edges."""
    return _combined(a, b, or_)


def without(a: Table, b: Table) -> Table:
    """The tiles of a without the edges of b."""
    return _combined(a, b, lambda of_a, of_b: of_a & ~of_b)


def _combined(a: Table, b: Table, operator: Callable[[Tensor, Tensor], Tensor]) -> Table:
    """The tiles of both, with the words of their masks combined."""
    stride = max((int(side.max()) for side in (a.column, b.column) if len(side)), default=0) + 1
    code, at = torch.unique(torch.cat([a.row * stride + a.column, b.row * stride + b.column]), return_inverse=True)
    full_words = torch.full((1, *a.words.shape[1:]), -1, dtype=torch.int32)
    words = torch.cat([a.words, b.words, full_words, torch.zeros_like(full_words)])
    full, empty = len(words) - 2, len(words) - 1
    of_a, of_b = torch.full_like(code, empty), torch.full_like(code, empty)
    of_a[at[: len(a.row)]] = torch.where(a.mask == NO_MASK, full, a.mask)
    of_b[at[len(a.row) :]] = torch.where(b.mask == NO_MASK, full, b.mask + len(a.words))
    pair = row_ids([of_a, of_b])
    first = _first_of_each(pair)
    both = operator(words[of_a[first]], words[of_b[first]])
    return _normalized(Table(code // stride, code % stride, pair, both))


def _masks(graph: Graph, n: int, m: int, tile: tuple[int, int], top: Tensor, left: Tensor) -> Tensor:
    """The packed masks of tiles, looked up pair by pair."""
    packed = [torch.zeros(0, tile[0], tile[1] // WORD, dtype=torch.int32)]
    began = time.perf_counter()
    for chunk in torch.arange(len(top)).split(max(1, STEP_PAIRS // (tile[0] * tile[1]))):
        query = top[chunk][:, None, None] + torch.arange(tile[0])[:, None]
        key = left[chunk][:, None, None] + torch.arange(tile[1])
        edge = graph.contains(query.clamp(max=n - 1), key.clamp(max=m - 1))
        packed.append(pack(edge & (query < n) & (key < m)))
        if len(packed) == 2:
            pairs = len(top) * tile[0] * tile[1]
            warn_if_long(graph, pairs, (time.perf_counter() - began) * len(top) / max(len(chunk), 1))
    return torch.cat(packed)


def _normalized(table: Table) -> Table:
    """The same tiles, without empty ones, full ones without a mask, and equal masks stored once."""
    row, column, mask, words = table
    kind = _same_words(words.flatten(1).long())
    words = words[_first_of_each(kind)]
    empty, full = (words == 0).all(2).all(1), (words == -1).all(2).all(1)
    kept = ~empty & ~full
    number = torch.where(full, NO_MASK, torch.where(empty, NO_MASK - 1, kept.cumsum(0) - 1))
    masked = mask != NO_MASK
    mask = mask.clone()
    mask[masked] = number[kind[mask[masked]]]
    nonempty = mask >= NO_MASK
    return Table(row[nonempty], column[nonempty], mask[nonempty], words[kept])


def _same_words(words: Tensor) -> Tensor:
    """As `same`, of the rows of a matrix (int64): by a hash, which is then checked."""
    factor = torch.arange(1, words.shape[1] + 1, device=words.device) * 0x9E3779B97F4A7C1 | 1
    number = row_ids([(words * factor).sum(1)])
    return number if torch.equal(words[_first_of_each(number)][number], words) else row_ids(list(words.T))


def _first_of_each(numbers: Tensor) -> Tensor:
    """For each of the numbers 0, 1, 2 …, a place where it stands."""
    count = int(numbers.max()) + 1 if len(numbers) else 0
    return torch.empty(count, dtype=torch.int64).scatter_(0, numbers, torch.arange(len(numbers)))


def pack(masks: Tensor) -> Tensor:
    """Bool (..., columns) as int32 words (..., columns / 32)."""
    bit = torch.arange(WORD, device=masks.device, dtype=torch.int32)
    return (masks.unflatten(-1, (-1, WORD)).int() << bit).sum(-1, dtype=torch.int32)


def unpack(words: Tensor) -> Tensor:
    """The bool masks that were packed."""
    bit = torch.ones((), device=words.device, dtype=torch.int32) << torch.arange(WORD, device=words.device).int()
    return (words[..., None] & bit != 0).flatten(-2)
