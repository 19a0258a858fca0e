"""The layout of the blocks kernel: the queries that hear each block of keys. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attngraph.graph.algebra import Intersection, Sized
from attngraph.graph.base import Edges, Graph
from attngraph.graph.boxes import require_memory
from attngraph.graph.compose import Blocks as BlocksGraph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.patterns import Causal

TILE = 64  # nodes of a tile of the kernel
BYTES_PER_VISIT = 30  # while they are sorted
BYTES_PER_EDGE = 40  # while they are listed


@dataclass(frozen=True, eq=False)
class ListedBlocks:
    """`Blocks(edges, (queries, keys))` of n queries and m keys, and whether ``& Causal()``."""

    edges: EdgeList
    queries: int
    keys: int
    causal: bool
    n: int
    m: int

    @staticmethod
    def of(graph: Graph, n: int, m: int) -> ListedBlocks | None:
        """A graph as such, if it is one, of blocks of keys that are whole tiles."""
        plain = _plain(graph)
        parts = [_plain(part) for part in (plain.graphs if type(plain) is Intersection else (plain,))]
        blocks = next((part for part in parts if type(part) is BlocksGraph), None)
        others = [part for part in parts if part is not blocks]
        edges = None if blocks is None else _plain(blocks.graph)
        if blocks is None or not isinstance(edges, EdgeList) or any(other != Causal() for other in others):
            return None
        queries, keys = blocks._sides
        return None if keys % TILE else ListedBlocks(edges, queries, keys, bool(others), n, m)

    @cached_property
    def visits(self) -> tuple[Tensor, Tensor]:
        """Each query with each block of keys that it hears, by query, then block: int32 (visits,)."""
        code, width = self.edges.code.to(torch.get_default_device()), self.edges._keys
        block = code // width
        key, block = (code - block * width).to(torch.int32), block.to(torch.int32)
        if self.queries == 1:
            return block, key
        query = torch.arange(self.n, dtype=torch.int32, device=block.device)
        degree = torch.bincount(block, minlength=-(-self.n // self.queries))
        first = (degree.cumsum(0) - degree)[query // self.queries]
        degree = degree[query // self.queries]
        return query.repeat_interleave(degree), key[_ranges(first, degree)]

    @cached_property
    def heard(self) -> Tensor:
        """How many keys of its block each visit hears, always the first ones: int32 (visits,)."""
        query, left = self.visits[0], self.visits[1] * self.keys
        heard = (self.m - left).clamp(max=self.keys)
        return torch.minimum(heard, query + 1 - left).clamp(min=0) if self.causal else heard

    @cached_property
    def count(self) -> int:
        """How many edges there are."""
        return int(self.heard.sum())

    def to_edges(self) -> Edges:
        """All edges, sorted."""
        require_memory(self.count * BYTES_PER_EDGE, f"to list the {self.count:,} edges of blocks")
        query, block = self.visits
        return query.repeat_interleave(self.heard).long(), _ranges(block.long() * self.keys, self.heard)


def _plain(graph: Graph) -> Graph:
    return graph.graph if type(graph) is Sized else graph


def _ranges(first: Tensor, length: Tensor) -> Tensor:
    """The numbers first[0] … first[0] + length[0] - 1, first[1] …, one after the other: int64."""
    before = first - (length.cumsum(0) - length)
    return torch.arange(int(length.sum()), device=first.device) + before.repeat_interleave(length)


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
    def of(graph: ListedBlocks) -> Blocks:
        """Sorts the visits by the blocks of keys."""
        edges, (rows, num_blocks) = graph.edges, graph.edges.size
        assert rows is not None
        assert num_blocks is not None
        query, block = graph.visits
        require_memory(len(query) * BYTES_PER_VISIT, "to sort blocks of keys by their queries")
        narrow = torch.int16 if num_blocks <= torch.iinfo(torch.int16).max else torch.int32
        order = block.to(narrow).sort(stable=True).indices  # of int16 in half the time
        start = query.new_zeros(num_blocks + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(block, minlength=num_blocks), 0, out=start[1:])
        whole = graph.n == rows * graph.queries and graph.m == num_blocks * graph.keys
        entries = edges.entries or 1 if whole else 1
        return Blocks(graph.n, graph.m, entries, graph.keys, num_blocks, graph.causal, start, query[order])

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles of 64 × 64 the plane has on each side."""
        return -(-self.n // TILE), self.num_blocks * (self.block // TILE)

    @property
    def nbytes(self) -> int:
        """Of the visits in memory."""
        return self.start.nbytes + self.query.nbytes
