"""A graph as a `BlockMask` of FlexAttention, without looking at N² pairs; its blocks are the tiles of the graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attngraph.graph.base import Graph, at_size
from attngraph.planning.layouts.tiles import Tiles, tabulate

MOST_PLACES = 1 << 20  # of a list of blocks that has a place for every column


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
    if block_size < 1 or block_size % 32:
        raise ValueError(f"block_size must be a multiple of 32 (got {block_size})")
    bound, n, m = at_size(graph, n, m)
    tile = (block_size, block_size)
    layouts = [Tiles(n, m, tabulate(bound._head(h), n, m, tile)) for h in range(bound.heads or 1)]
    lists = {}
    for side, half in (("kv", "by_query"), ("q", "by_key")):
        rows, columns = [getattr(layout, half) for layout in layouts], layouts[0].grid[1 if side == "kv" else 0]
        lists[f"{side}_num_blocks"], lists[f"{side}_indices"] = _lists(rows, columns, device, full=False)
        lists[f"full_{side}_num_blocks"], lists[f"full_{side}_indices"] = _lists(rows, columns, device, full=True)
    return BlockMask(seq_lengths=(n, m), BLOCK_SIZE=tile, mask_mod=_mask_mod(layouts, bound.heads, device), **lists)


def _lists(rows, columns: int, device, full: bool) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, masked or full, int32 (1, H, rows), and which, (1, H, rows, most)."""
    first = torch.stack([half.full if full else half.start[:-1] for half in rows])
    stop = torch.stack([half.start[1:] if full else half.full for half in rows])
    count = stop - first
    # Some methods of BlockMask want as many places as there are columns; many nodes get only those that are used.
    most = max(int(count.max()), 1) if count.numel() else 1
    place = torch.arange(most if count.shape[1] * columns > MOST_PLACES else columns)
    other = torch.stack([torch.cat([half.other, half.other.new_zeros(1)])[
        (first[h][:, None] + place).clamp(max=len(half.other))] for h, half in enumerate(rows)])  # fmt: skip
    other = other.where(place < count[..., None], 0)
    return count[None].int().to(device), other[None].int().contiguous().to(device)


def _mask_mod(layouts: list[Tiles], heads: int | None, device):
    """(b, h, q_idx, kv_idx) → bool, from the blocks of all heads in one table."""
    size, rows = layouts[0].tile[0], layouts[0].grid[0]
    tiles, masks, starts, columns, numbers, words = 0, 0, [], [], [], []
    for layout in layouts:
        table = layout.table
        starts.append(torch.searchsorted(table.row, torch.arange(rows)) + tiles)
        columns.append(table.column)
        numbers.append(torch.where(table.mask < 0, -1, table.mask + masks))
        words.append(table.words)
        tiles, masks = tiles + len(table.row), masks + len(table.words)
    start = torch.cat([*starts, torch.tensor([tiles])]).to(device)
    column = torch.cat([*columns, torch.tensor([-1])]).to(device)
    number = torch.cat([*numbers, torch.tensor([-1])]).to(device)
    bits = torch.cat([*words, words[0].new_zeros(1, size, size // 32)]).to(device)
    steps = int(start.diff().max()).bit_length() if len(start) > 1 else 0

    def mask_mod(b, h, q_idx, kv_idx):
        row = q_idx // size + (0 if heads is None else h * rows)
        low, high, wanted = start[row], start[row + 1], kv_idx // size
        for _ in range(steps):
            middle = (low + high) // 2
            before = (column[middle] < wanted) & (low < high)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        there = (low < start[row + 1]) & (column[low] == wanted)
        mask = number[low]
        word = bits[torch.where(mask < 0, 0, mask), q_idx % size, kv_idx % size // 32]
        return there & ((mask < 0) | (((word >> (kv_idx % 32)) & 1) == 1))

    return mask_mod
