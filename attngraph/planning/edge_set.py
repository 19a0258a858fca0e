"""The edges that a backend is asked about, or builds its layout of: how many there are, and how they lie in tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.graph.algebra import Full, Intersection, Sized
from attngraph.graph.base import Edges, Graph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, list_edges, no_edges, split
from attngraph.graph.patterns import Causal, Chunks, Documents
from attngraph.graph.rewrite import simplify
from attngraph.planning.layouts.blocks import ListedBlocks
from attngraph.planning.layouts.tiles import Table, no_tiles, tabulate, tabulate_edges, union, without

SAMPLE_EDGES = 1 << 20  # edges from which it is estimated how close together they all lie
SAMPLE_ROWS = 16  # rows of tiles, of a list of edges, from which it is


class Tiling(NamedTuple):
    """How a backend cuts the plane of all pairs: queries and keys of a tile, and of the blocks that it may skip."""

    tile: tuple[int, int]
    block: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tabulated:
    """Edges as they lie in tiles: those found box by box as a table of tiles, the others listed one by one."""

    tiling: Tiling
    table: Table
    query: Tensor
    """The listed edges, int64 (L,)."""
    key: Tensor
    tile_of_edge: Tensor
    """The tile of each listed edge, among those that hold any: int64 (L,)."""
    edges_per_tile: Tensor
    """Edges in each tile, of the table and then of the listed edges: int64 (T + U,)."""
    blocks_per_tile: Tensor
    """Blocks with edges in each of these tiles."""

    @staticmethod
    def of(table: Table, query: Tensor, key: Tensor, m: int, tiling: Tiling) -> Tabulated:
        """From a table, and listed edges that are not in it, of a graph with m keys."""
        (block_rows, block_columns), (tile_rows, tile_columns) = tiling.block, tiling.tile
        across = -(-m // block_columns)
        block = query // block_rows * across + key // block_columns
        block, block_of_edge, edges_in_block = torch.unique(block, return_inverse=True, return_counts=True)
        row = block // across // (tile_rows // block_rows)
        column = block % across // (tile_columns // block_columns)
        tile = row * -(-m // tile_columns) + column
        _, tile_of_block, blocks = torch.unique(tile, return_inverse=True, return_counts=True)
        edges = torch.zeros_like(blocks).index_add_(0, tile_of_block, edges_in_block)
        return Tabulated(
            tiling, table, query, key, tile_of_block[block_of_edge],
            torch.cat([table.edges, edges]), torch.cat([table.occupied(*tiling.block), blocks]),
        )  # fmt: skip

    @property
    def count(self) -> int:
        """How many edges there are."""
        return int(self.edges_per_tile.sum())

    @property
    def tile_rows(self) -> int:
        """How many rows of tiles hold edges."""
        return len(torch.unique(torch.cat([self.table.row, self.query // self.tiling.tile[0]])))

    def select(self, tiles: Tensor) -> Tabulated:
        """The edges of some tiles, given by a bool for each."""
        of_table, listed = tiles[: len(self.table.row)], tiles[len(self.table.row) :]
        edges = listed[self.tile_of_edge]
        number = listed.cumsum(0) - 1
        return replace(
            self,
            table=self.table.chosen(of_table),
            query=self.query[edges],
            key=self.key[edges],
            tile_of_edge=number[self.tile_of_edge[edges]],
            edges_per_tile=self.edges_per_tile[tiles],
            blocks_per_tile=self.blocks_per_tile[tiles],
        )

    def to_table(self) -> Table:
        """All edges as tiles."""
        if not len(self.query):
            return self.table
        listed = tabulate_edges(self.query, self.key, self.tiling.tile)
        return union(self.table, listed) if len(self.table.row) else listed

    def to_edges(self, n: int, m: int) -> Edges:
        """All edges as a sorted list."""
        query, key = self.query, self.key
        if len(self.table.row):
            of_table = self.table.list_edges(n, m)
            query, key = torch.cat([query, of_table[0]]), torch.cat([key, of_table[1]])
        code = (query * m + key).sort().values
        return code // max(m, 1), code % max(m, 1)


class EdgeSet:
    """Some edges of a graph at one size: all of them, or those of some tiles. Everything is found when it is asked for.

    A graph with a graph for each head is a set of edges for backends that run all heads at once.
    """

    def __init__(self, graph: Graph, n: int, m: int, *, some: Tabulated | None = None, order: Tensor | None = None):
        self.graph, self.n, self.m, self.order = graph, n, m, order
        self._some = some
        self._sampled: dict[Tiling, tuple[Tabulated, float]] = {}
        self._tabulated: dict[Tiling, Tabulated] = {} if some is None else {some.tiling: some}

    @property
    def is_whole(self) -> bool:
        """Whether these are all the edges of the graph, its nodes in their own order."""
        return self._some is None

    @property
    def is_computed(self) -> bool:
        """Whether the graph is made for some calls alone, so that counting its edges is all that may pay."""
        return isinstance(self.graph, EdgeList) and self.graph.plans is not None

    @cached_property
    def closed_form(self) -> Graph | None:
        """Causal() or Full(), where these are its edges."""
        return closed_form(self.graph) if self.is_whole else None

    @cached_property
    def documents(self) -> tuple[Graph, tuple[int, ...]] | None:
        """Causal() or Full(), and the lengths of the documents in which each is by itself, where this is so."""
        return packed_form(self.graph, self.n, self.m) if self.is_whole else None

    @cached_property
    def blocks(self) -> ListedBlocks | None:
        """Blocks of a list of edges, where these are its edges."""
        return ListedBlocks.of(self.graph, self.n, self.m) if self.is_whole else None

    @cached_property
    def count(self) -> int:
        """How many edges there are."""
        if self.blocks is not None:
            return self.blocks.count
        for known in self._tabulated.values():
            return known.count
        return count_edges(self.graph, self.n, self.m)

    def tabulated(self, tiling: Tiling) -> Tabulated:
        """How the edges lie in tiles."""
        if tiling not in self._tabulated:
            table = tabulate(self.banded, self.n, self.m, tiling.tile)
            (query, key), less = ([side.to(table.row.device) for side in edges] for edges in self.beside_bands)
            if len(less[0]):
                table = without(table, tabulate_edges(less[0], less[1], tiling.tile))
            self._tabulated[tiling] = Tabulated.of(table, query, key, self.m, tiling)
        return self._tabulated[tiling]

    @cached_property
    def _split(self) -> tuple[Graph, Edges]:
        rest, pairs = split(self.graph, self.n, self.m)
        return simplify(rest), pairs

    @property
    def banded(self) -> Graph:
        """A graph that is found box by box, and is this one but for a list of pairs."""
        return self._split[0]

    @cached_property
    def beside_bands(self) -> tuple[Edges, Edges]:
        """The edges that these are more than those of `banded`, and less."""
        query, key = self._split[1]
        if not len(query):
            return no_edges(), no_edges()
        here, there = self.graph.contains(query, key), self.banded.contains(query, key)
        return (query[here & ~there], key[here & ~there]), (query[there & ~here], key[there & ~here])

    def select(self, tiling: Tiling, tiles: Tensor) -> EdgeSet:
        """The edges of some tiles, given by a bool for each."""
        return EdgeSet(self.graph, self.n, self.m, some=self.tabulated(tiling).select(tiles), order=self.order)

    def reordered(self, order: Tensor, tiling: Tiling) -> EdgeSet:
        """The same edges after the nodes were put into this order, (N,): its i-th node is node order[i]."""
        place = torch.empty_like(order).scatter_(0, order, torch.arange(self.n))
        query, key = self.to_edges()
        some = Tabulated.of(no_tiles(tiling.tile), place[query], place[key], self.m, tiling)
        return EdgeSet(self.graph, self.n, self.m, some=some, order=order)

    @property
    def is_listed(self) -> bool:
        """Whether the list of all edges is at hand, or easy to make."""
        return "_listed" in vars(self) or self.blocks is not None

    def to_edges(self) -> Edges:
        """All edges, sorted; kept, as a backend may estimate by them and then build its layout of them."""
        return self._listed

    @cached_property
    def _listed(self) -> Edges:
        for known in self._tabulated.values():
            query, key = known.to_edges(self.n, self.m)
            if self.order is None:
                return query, key
            code = (self.order[query] * self.m + self.order[key]).sort().values  # the nodes by their own numbers
            return code // max(self.m, 1), code % max(self.m, 1)
        if self.blocks is not None:
            return self.blocks.to_edges()
        if self.is_whole and isinstance(self.graph, EdgeList):
            return self.graph._edges(self.n, self.m)
        return list_edges(self.graph, self.n, self.m)

    def sampled(self, tiling: Tiling) -> tuple[Tabulated, float]:
        """How some of the edges lie in tiles, or all, where that is known; and how many times as many there are."""
        for known in self._tabulated.values():
            return known, 1.0
        if tiling not in self._sampled:
            self._sampled[tiling] = self._sample(tiling)
        return self._sampled[tiling]

    def _sample(self, tiling: Tiling) -> tuple[Tabulated, float]:
        if (some := self.some_rows(tiling)) is not None:
            query, key = some
        elif self.count <= SAMPLE_EDGES:
            query, key = self.to_edges()
        else:
            rows = max(1, self.n * SAMPLE_EDGES // self.count)
            query, key = list_edges(self.graph.rows(0, rows), rows, self.m)
        return Tabulated.of(no_tiles(tiling.tile), query, key, self.m, tiling), self.count / max(len(query), 1)

    def some_rows(self, tiling: Tiling) -> Edges | None:
        """The edges of `SAMPLE_ROWS` rows of tiles, spread over all, of a graph that is a list; None of others."""
        if not (self.is_whole and isinstance(self.graph, EdgeList)):
            return None
        height, (query, key) = tiling.tile[0], self.to_edges()
        rows = -(-self.n // height)
        if rows <= SAMPLE_ROWS:
            return query, key
        first = torch.linspace(0, rows - 1, SAMPLE_ROWS).long().unique() * height
        low, high = torch.searchsorted(query, first), torch.searchsorted(query, first + height)
        parts = [torch.arange(start, stop) for start, stop in zip(low.tolist(), high.tolist(), strict=True)]
        edges = torch.cat(parts) if parts else torch.arange(0)
        return query[edges], key[edges]


# ------------------------------------------------------------------------------------------ what flash kernels know


def closed_form(graph: Graph) -> Graph | None:
    """Causal() or Full(), where the graph is one of them."""
    plain = graph.graph if type(graph) is Sized else graph
    if type(plain) is Full or (type(plain) is Causal and plain.offset == 0):
        return plain
    return None


def packed_form(graph: Graph, n: int, m: int) -> tuple[Graph, tuple[int, ...]] | None:
    """Causal() or Full(), and the lengths of the documents in which each is by itself, where the graph is that."""
    parts = graph.graphs if type(graph) is Intersection else (graph,)
    plain = [part.graph if type(part) is Sized else part for part in parts]
    apart = [part for part in plain if type(part) is Documents or (type(part) is Chunks and not part.offset)]
    within = closed_form(next((part for part in plain if part not in apart), Full()))
    if len(apart) != 1 or len(plain) > 2 or within is None or n != m:
        return None
    if isinstance(apart[0], Documents):
        return within, tuple(length for length in apart[0].lengths if length)
    assert isinstance(apart[0], Chunks)
    whole, rest = divmod(n, apart[0].chunk)
    return within, (apart[0].chunk,) * whole + (rest,) * (rest > 0)
