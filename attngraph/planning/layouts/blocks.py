"""The layout of the blocks kernel: the queries that hear each block of keys. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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


class ListedBlocks(NamedTuple):
    """`Blocks(edges, (queries, keys))`, and whether ``& Causal()``."""

    edges: EdgeList
    queries: int
    keys: int
    causal: bool

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
        query, key = self.edges.query * self.queries, self.edges.key * self.keys
        high, wide = (n - query).clamp(max=self.queries), (m - key).clamp(max=self.keys)
        if not self.causal:
            return int((high * wide).sum())
        rows = torch.arange(self.queries, device=query.device)[:, None]
        heard = torch.minimum(query - key + 1 + rows, wide).clamp(min=0)
        return int(torch.where(rows < high, heard, 0).sum())


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
        block, query = edges.key, edges.query
        if num_blocks <= torch.iinfo(torch.int16).max:
            block = block.to(torch.int16)  # sorted in a quarter of the time
        query = query.to(torch.int32)[block.sort(stable=True).indices]
        start = query.new_zeros(num_blocks + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(edges.key, minlength=num_blocks), 0, out=start[1:])
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
