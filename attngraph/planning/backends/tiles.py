"""Tiles of the adjacency, only where there are edges: in Triton on a GPU, by Numba or by PyTorch's kernels else."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from attngraph.kernels.contract import Gradients, Modifiers
from attngraph.planning.backends.base import KernelBackend, width_factor
from attngraph.planning.call import Call
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet, Tiling
from attngraph.planning.layouts.tiles import NO_MASK, Tiles

FIXED_SHARE = 0.2  # of the time of a full tile: what a tile takes however few of its blocks hold edges
MAX_ROW_GROUPS = 16  # groups of alike rows of tiles, as far as their number is estimated before they are made


class _TilesOfAnyKernel(KernelBackend):
    """What the kernels of tiles have in common."""

    name = "tiles"
    tiling = Tiling((64, 64), block=(64, 64))
    fused = True  # all tiles in one call

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        tiles = edges.tabulated(self.tiling)
        if not len(tiles.edges_per_tile):
            return 0.0
        of_tiles = float(self.tile_seconds(tiles.edges_per_tile, tiles.blocks_per_tile, call, costs).sum())
        calls = 1 if self.fused else min(tiles.tile_rows, MAX_ROW_GROUPS)
        results = costs.tile_s_per_result_dim * edges.n * call.mean_dim * width_factor(call)
        return (of_tiles + results) * call.heads + calls * costs.tile_s_per_call

    def tile_seconds(self, edges: Tensor, blocks: Tensor, call: Call, costs: Costs) -> Tensor:
        (rows, columns), (block_rows, block_columns) = self.tiling.tile, self.tiling.block
        share = blocks.double() * (block_rows * block_columns / (rows * columns))
        full = costs.tile_s_per_pair_dim * call.mean_dim * rows * columns * width_factor(call)
        return full * (FIXED_SHARE + (1 - FIXED_SHARE) * share)

    def overhead(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return costs.tile_s_per_call

    def build(self, edges: EdgeSet, call: Call) -> Tiles:
        return Tiles(edges.n, edges.m, edges.tabulated(self.tiling).to_table())

    def pairs(self, edges: EdgeSet, layout: Tiles) -> int:
        return len(layout.table.row) * layout.tile[0] * layout.tile[1]

    def describe(self, edges: EdgeSet, layout: Tiles, call: Call) -> str:
        tiles = len(layout.table.row)
        full, fill = int((layout.table.mask == NO_MASK).sum()), edges.count / max(self.pairs(edges, layout), 1)
        text = f"{tiles:,} tiles, {full:,} full; {fill:.0%} of their pairs are edges; "
        text += f"{len(layout.table.words):,} distinct masks"
        if not self.fused:
            text += f", {len(layout.strips):,} groups of rows"
        return text if edges.order is None else f"{text}; nodes reordered"


class NumbaTiles(_TilesOfAnyKernel):
    """See `kernels.cpu.tiles`: products, softmax and gradients of a tile in one pass, sums in float32 or float64."""

    kernel, module, device, package = "numba", "attngraph.kernels.cpu.tiles", "cpu", "numba"
    tiling = Tiling((64, 64), block=(8, 32))
    takes_no_dims = takes_half = makes_products = True


class TorchTiles(_TilesOfAnyKernel):
    """See `kernels.torch.tiles`: PyTorch's own kernels on groups of tiles, on every device."""

    kernel, module, fused, takes_numbers = "torch", "attngraph.kernels.torch.tiles", False, True
    tiling = Tiling((64, 64), block=(64, 64))

    def only_by_name(self, call: Call) -> str | None:
        return None if call.device.type == "cpu" or call.renumbered else f"only by name on {call.device}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Tiles, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        q, k, v = _widened(q, k, v)
        return super().forward(q, k, v, layout, modifiers)

    def backward(self, q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad) -> Gradients:
        q, k, v, out, dout = _widened(q, k, v, out, dout)
        return super().backward(q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad)


class TritonTiles(_TilesOfAnyKernel):
    """See `kernels.triton.tiles`: fused, on a GPU, in float16, bfloat16 and float32."""

    kernel, module, device, package = "triton", "attngraph.kernels.triton.tiles", "cuda", "triton"
    tiling = Tiling((128, 64), block=(128, 64))
    max_head_dim: ClassVar[dict[int, int]] = {2: 256, 4: 128}
    """By the bytes of a number, the dimension of a head whose blocks fit in the registers."""

    def limits(self, call: Call) -> str | None:
        most, dim = self.max_head_dim.get(call.number_bytes, 0), max(call.head_dim, call.value_dim)
        if dim > most:
            return f"a head of dimension {dim} in {call.dtype} does not fit in its registers (at most {most})"
        return None


def _widened(*sides: Tensor) -> list[Tensor]:
    """Half precision as float32."""
    return [side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]
