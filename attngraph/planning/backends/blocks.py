"""Blocks of keys, each with the queries that hear it gathered: where single queries choose blocks."""

from __future__ import annotations

from attngraph.planning.backends.base import KernelBackend, width_factor
from attngraph.planning.call import Call
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet
from attngraph.planning.layouts.blocks import Blocks

GATHER_FACTOR = 1.3  # of the time of a tile of adjacent nodes: its queries are gathered, and their sums scattered


class NumbaBlocks(KernelBackend):
    """See `kernels.cpu.blocks`: softmax of dot products, with a padding mask, in float32 and float64."""

    name, kernel, module, device, package = "blocks", "numba", "attngraph.kernels.cpu.blocks", "cpu", "numba"

    def limits(self, call: Call) -> str | None:
        is_plain = (call.score, call.normalize, call.dropout, call.bias) == ("dot", "softmax", False, None)
        return None if is_plain else "it has nothing but the scale and padding"

    def lacks(self, edges: EdgeSet) -> str | None:
        if edges.blocks is None:
            return "the graph is not Blocks of an EdgeList, of a multiple of 64 keys, alone or & Causal()"
        return None

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        assert edges.blocks is not None
        pairs = len(edges.blocks.visits[0]) * edges.blocks.keys
        of_pairs = GATHER_FACTOR * costs.tile_s_per_pair_dim * pairs
        results = costs.tile_s_per_result_dim * edges.n
        return (of_pairs + results) * call.mean_dim * width_factor(call) * call.heads + costs.tile_s_per_call

    def overhead(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return costs.tile_s_per_call

    def build(self, edges: EdgeSet, call: Call) -> Blocks:
        assert edges.blocks is not None
        return Blocks.of(edges.blocks)

    def pairs(self, edges: EdgeSet, layout: Blocks) -> int:
        return len(layout.query) * layout.block

    def describe(self, edges: EdgeSet, layout: Blocks, call: Call) -> str:
        return (
            f"{layout.num_blocks:,} blocks of {layout.block} keys, heard {len(layout.query):,} times by single queries"
        )
