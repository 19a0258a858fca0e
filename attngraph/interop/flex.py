"""A graph as a `BlockMask` of FlexAttention, without looking at N² pairs; its blocks are the tiles of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import Graph, at_size
from attngraph.graph.rewrite import simplify
from attngraph.planning.edge_set import EdgeSet, Tiling
from attngraph.planning.layouts.tiles import Tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MAX_LIST_ENTRIES = 1 << 20  # of a list of blocks that has an entry for every column


@checked
def to_block_mask(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The mask for ``flex_attention(q, k, v, block_mask=…)``: the same edges, for any batch size.

    Its `mask_mod` finds the block of a pair by bisection in its row of blocks, and looks up one bit; no closure over
    the graph, so that any graph compiles. A graph with heads gives a mask with as many.

    Args:
        graph: who hears whom; n and m may be left out where it knows them.
        block_size: how many queries and keys a block has, a multiple of 32.
        device: where the tensors will be.

    >>> from attngraph import Causal, Window
    >>> to_block_mask(Causal() & Window(256, 0), 1024, 1024).sparsity()
    67.1875

    Raises:
        ValueError: sizes that do not fit, or a block size that is no multiple of 32.
    """
    from torch.nn.attention.flex_attention import BlockMask  # takes longer than all of attngraph

    if block_size < 1 or block_size % 32:
        raise ValueError(f"block_size must be a multiple of 32 (got {block_size})")
    bound, n, m = at_size(graph, n, m)
    tile = (block_size, block_size)
    tiling = Tiling(tile, block=tile)
    heads = (EdgeSet(simplify(bound._head(h)), n, m) for h in range(bound.heads or 1))
    layouts = [Tiles(n, m, edges.tabulated(tiling).to_table()) for edges in heads]
    lists = {}
    by_query, by_key = [layout.by_query for layout in layouts], [layout.by_key for layout in layouts]
    num_rows, num_columns = layouts[0].grid
    for side, tiles, columns in (("kv", by_query, num_columns), ("q", by_key, num_rows)):
        lists[f"{side}_num_blocks"], lists[f"{side}_indices"] = _lists(tiles, columns, device, full=False)
        lists[f"full_{side}_num_blocks"], lists[f"full_{side}_indices"] = _lists(tiles, columns, device, full=True)
    return BlockMask(seq_lengths=(n, m), BLOCK_SIZE=tile, mask_mod=_mask_mod(layouts, bound.heads, device), **lists)


def _lists(tiles, columns: int, device: torch.device | str, full: bool) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, masked or full, int32 (1, H, rows), and which, (1, H, rows, entries).

    `tiles` are the tiles of each head, sorted by row.
    """
    first = torch.stack([head.full if full else head.start[:-1] for head in tiles])
    stop = torch.stack([head.start[1:] if full else head.full for head in tiles])
    count = stop - first
    # Some methods of BlockMask want as many entries as there are columns; many nodes get only those that are used.
    longest = max(int(count.max()), 1) if count.numel() else 1
    entry = torch.arange(longest if count.shape[1] * columns > MAX_LIST_ENTRIES else columns)
    indices = torch.zeros((*count.shape, len(entry)), dtype=torch.int32)
    for h, head in enumerate(tiles):
        column = torch.cat([head.column, head.column.new_zeros(1)])
        indices[h] = column[(first[h][:, None] + entry).clamp(max=len(head.column))]
    indices = indices.where(entry < count[..., None], 0)
    return count[None].int().to(device), indices[None].contiguous().to(device)


def _mask_mod(
    layouts: list[Tiles], heads: int | None, device: torch.device | str
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(b, h, q_idx, kv_idx) → bool, from the blocks of all heads in one table."""
    size, rows = layouts[0].tile[0], layouts[0].grid[0]
    num_tiles = num_masks = 0
    starts, columns, masks, words = [], [], [], []
    for layout in layouts:
        table = layout.table
        starts.append(torch.searchsorted(table.row, torch.arange(rows)) + num_tiles)
        columns.append(table.column)
        masks.append(torch.where(table.mask < 0, -1, table.mask + num_masks))  # -1: a full tile
        words.append(table.words)
        num_tiles, num_masks = num_tiles + len(table.row), num_masks + len(table.words)
    start = torch.cat([*starts, torch.tensor([num_tiles])]).to(device)
    column = torch.cat([*columns, torch.tensor([-1])]).to(device)
    mask_of_tile = torch.cat([*masks, torch.tensor([-1])]).to(device)
    bits = torch.cat([*words, words[0].new_zeros(1, size, size // 32)]).to(device)
    steps = int(start.diff().max()).bit_length() if len(start) > 1 else 0

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, key_column = q_idx // size + (0 if heads is None else h * rows), kv_idx // size
        low, high = start[row], start[row + 1]
        for _ in range(steps):
            middle = (low + high) // 2
            before = (column[middle] < key_column) & (low < high)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        has_tile = (low < start[row + 1]) & (column[low] == key_column)
        mask = mask_of_tile[low]
        word = bits[torch.where(mask < 0, 0, mask), q_idx % size, kv_idx % size // 32]
        return has_tile & ((mask < 0) | (((word >> (kv_idx % 32)) & 1) == 1))

    return mask_mod
