"""All that the benchmarks know of the inside of attngraph, which may change: its costs, tiles and plans."""

from __future__ import annotations

import torch

from attngraph import Costs, EdgeList, Graph, Plan, plan
from attngraph.graph.base import at_size
from attngraph.graph.boxes import occupied_tiles
from attngraph.graph.listing import split
from attngraph.graph.rewrite import simplify
from attngraph.planning.backends.tiles import TritonTiles
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

TILE = TritonTiles.tiling.tile


def explained(graph: Graph, n: int, heads: int, head_dim: int) -> str:
    """The plan with the default costs of a CPU, whatever this machine is."""
    return plan(graph, n, n, heads=heads, head_dim=head_dim, costs=Costs()).explain()


def parts(graph: Graph, n: int) -> tuple[Graph, Graph]:
    """What the planner gives to tiles, and the residual edges."""
    bound = at_size(graph, n, n)[0]
    banded, (query, key) = split(bound, n, n)
    inside = bound.contains(query, key)
    return simplify(banded), EdgeList(torch.stack([key[inside], query[inside]]), n)


def pairs_of_tiles(graph: Graph, n: int, tile: tuple[int, int] = TILE) -> int:
    """How many pairs the occupied tiles of a graph have."""
    bound, n, m = at_size(graph, n, n)
    return len(occupied_tiles(bound, n, m, tile)[0]) * tile[0] * tile[1]


def tiles_of(graph: Graph, n: int, tile: tuple[int, int], device: torch.device | str) -> Tiles:
    """What the kernels of tiles walk over on a GPU."""
    bound, n, m = at_size(graph, n, n)
    with torch.device(device):
        return Tiles(n, m, tabulate(bound, n, m, tile))


def csr_of(graph: Graph, n: int, device: torch.device | str) -> CSR:
    """The edges one by one, as the kernels of rows take them on a GPU."""
    with torch.device(device):
        return CSR.from_graph(*at_size(graph, n, n))


def pairs_of(made: Plan) -> int:
    """How many pairs a plan computes."""
    return sum(part.pairs for part in made.parts)


def backends_of(made: Plan) -> list[str]:
    """Of each part of a plan."""
    return [part.backend.name for part in made.parts]


def sort_edges(made: Plan, by_key: bool) -> None:
    """Make what a plan's first part keeps for the forward pass, and for the backward one, which is else made then."""
    layout = made.parts[0].layout
    _ = layout.by_query, by_key and layout.by_key


def keys_of(made: Plan, i: int):
    """The keys of query i, in a plan whose only part lists edges one by one."""
    by_query = made.parts[0].layout.by_query
    return by_query.neighbor[by_query.start[i] : by_query.start[i + 1]].long()
