"""Each query's edges one by one, for irregular sparse graphs: in Triton on a GPU, in Numba on a CPU."""

from __future__ import annotations

from torch import Tensor

from attngraph.graph.boxes import require_memory
from attngraph.planning.backends.base import KernelBackend, width_factor
from attngraph.planning.call import Call
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet, Tiling
from attngraph.planning.layouts.csr import BYTES_PER_EDGE, CSR

CACHE_BYTES = 400_000  # of keys and values that stay in a CPU core's cache from one query to the next
BLOCKS = Tiling((64, 64), block=(8, 32))  # in which edges are counted
MISS_SHARE = 0.7  # of the edges fetch their key again where the keys do not stay in the cache


class _RowsOfAnyKernel(KernelBackend):
    """What the kernels of rows have in common."""

    name = "rows"
    tiling = BLOCKS

    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return rows_seconds(edges, call, costs)

    def tile_seconds(self, edges: Tensor, blocks: Tensor, call: Call, costs: Costs) -> Tensor:
        keys = edges.clamp(max=self.tiling.tile[1]).double()
        per_edge = costs.row_s_per_edge + costs.row_s_per_edge_dim * call.mean_dim
        return (edges.double() * per_edge + keys * costs.row_s_per_fetch_dim * call.mean_dim) * width_factor(call)

    def overhead(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        return costs.row_s_per_call

    def build(self, edges: EdgeSet, call: Call) -> CSR:
        if edges.is_whole and not edges.is_listed:
            return CSR.from_graph(edges.graph, edges.n, edges.m)
        require_memory(edges.count * BYTES_PER_EDGE, f"for the {edges.count:,} edges of {edges.graph} in rows")
        return CSR.from_edges(*edges.to_edges(), edges.n, edges.m)

    def describe(self, edges: EdgeSet, layout: CSR, call: Call) -> str:
        return "edges one by one" + ("" if edges.is_whole else ": gathering each costs less than the tile around it")


def rows_seconds(edges: EdgeSet, call: Call, costs: Costs) -> float:
    """What products and sums along each edge by itself take."""
    if not edges.count:
        return 0.0
    fetched = edges.count
    if not edges.is_computed:
        tiles, times = edges.sampled(BLOCKS)
        keys = tiles.edges_per_tile.clamp(max=BLOCKS.tile[1])  # each once a tile, if those of a row of tiles stay
        fetched = int(keys.sum() * times)
    bytes_per_row = 8 * call.mean_dim * fetched * BLOCKS.tile[0] / max(edges.n, 1)
    if call.device.type == "cpu" and bytes_per_row > CACHE_BYTES:
        fetched = max(fetched, int(MISS_SHARE * edges.count))
    of_edges = edges.count * (costs.row_s_per_edge + costs.row_s_per_edge_dim * call.mean_dim)
    moved = (fetched * costs.row_s_per_fetch_dim + edges.n * costs.row_s_per_result_dim) * call.mean_dim
    return (of_edges + moved) * call.heads * width_factor(call) + costs.row_s_per_call


class NumbaRows(_RowsOfAnyKernel):
    """See `kernels.cpu.rows`: float32 and float64."""

    kernel, module, device, package = "numba", "attngraph.kernels.cpu.rows", "cpu", "numba"
    tiling = BLOCKS
    takes_no_dims = takes_edge_features = takes_numbers = True
    reads_by_head = False


class TritonRows(_RowsOfAnyKernel):
    """See `kernels.triton.rows`: float16, bfloat16, float32 and float64."""

    kernel, module, device, package = "triton", "attngraph.kernels.triton.rows", "cuda", "triton"
    tiling = Tiling((128, 64), block=(128, 64))
