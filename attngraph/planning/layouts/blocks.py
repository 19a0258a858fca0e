"""The layout of the blocks kernel: the queries that hear each block of keys. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attngraph.graph.algebra import Intersection, Sized
from attngraph.graph.base import Graph
from attngraph.graph.boxes import require_memory
from attngraph.graph.compose import Blocks as BlocksGraph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.patterns import Causal

TILE = 64  # nodes of a tile of the kernel
BYTES_PER_VISIT = 60  # while they are sorted


@dataclass(frozen=True, eq=False)
class ListedBlocks:
    """`Blocks(edges, (queries, keys))`, and whether ``& Causal()``."""

    edges: EdgeList
    queries: int
    keys: int
    causal: bool

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The block of queries and the block of keys of each edge, by query: int32 (E,)."""
        return self.edges.query.to(torch.int32), self.edges.key.to(torch.int32)

    @staticmethod
    def of(graph: Graph) -> ListedBlocks | None:
        """A graph as such, if it is one, of blocks of keys that are whole tiles."""
        parts = [_plain(part) for part in (graph.graphs if type(graph) is Intersection else (graph,))]
        blocks = next((part for part in parts if type(part) is BlocksGraph), None)
        others = [part for part in parts if part is not blocks]
        edges = None if blocks is None else _plain(blocks.graph)
        if blocks is None or not isinstance(edges, EdgeList) or any(other != Causal() for other in others):
            return None
        queries, keys = blocks._sides
        return None if keys % TILE else ListedBlocks(edges, queries, keys, bool(others))

    def count(self, n: int, m: int) -> int:
        """How many edges they have in n queries and m keys."""
        query, key = self.pairs
        is_cut = torch.zeros_like(query, dtype=torch.bool)  # by the diagonal, or the border
        if self.causal:
            is_cut |= query * self.queries - key * self.keys < self.keys
        if n % self.queries:
            is_cut |= query == n // self.queries
        if m % self.keys:
            is_cut |= key == m // self.keys
        row = query[is_cut, None] * self.queries + torch.arange(self.queries, device=query.device)
        left = key[is_cut, None] * self.keys
        stop = (row + 1).clamp(max=m) if self.causal else row.new_tensor(m)
        heard = (stop - left).clamp(0, self.keys)
        whole = len(query) - len(row)
        return int(torch.where(row < n, heard, 0).sum()) + whole * self.queries * self.keys


def _plain(graph: Graph) -> Graph:
    return graph.graph if type(graph) is Sized else graph


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of keys of n queries and m keys, and the queries that hear each: see `kernels.contract.BlocksLayout`."""

    n: int
    m: int
    entries: int
    block: int
    num_blocks: int
    causal: bool
    start: Tensor
    query: Tensor

    @staticmethod
    def of(graph: ListedBlocks, n: int, m: int) -> Blocks:
        """Each query of a block of queries hears what the block does."""
        edges, (rows, num_blocks) = graph.edges, graph.edges.size
        assert rows is not None
        assert num_blocks is not None
        require_memory(len(edges.code) * graph.queries * BYTES_PER_VISIT, "to sort blocks of keys by their queries")
        query, block = graph.pairs
        narrow = torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32
        order = block.to(narrow).sort(stable=True).indices  # of int16 in half the time
        query, start = query[order], torch.zeros(num_blocks + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(block, minlength=num_blocks), 0, out=start[1:])
        if graph.queries > 1:
            start *= graph.queries
            query = query[:, None] * graph.queries + torch.arange(graph.queries, dtype=torch.int32)
            query = query.flatten()
        whole = n == rows * graph.queries and m == num_blocks * graph.keys
        entries = edges.entries or 1 if whole else 1
        return Blocks(n, m, entries, graph.keys, num_blocks, graph.causal, start, query)

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles of 64 × 64 the plane has on each side."""
        return -(-self.n // TILE), self.num_blocks * (self.block // TILE)

    @property
    def nbytes(self) -> int:
        """Of the visits in memory."""
        return self.start.nbytes + self.query.nbytes
