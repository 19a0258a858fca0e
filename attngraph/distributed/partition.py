"""Which rank owns which nodes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from attngraph.graph.base import Graph, at_size
from attngraph.graph.listing import count_edges, list_edges

PartitionName = Literal["contiguous", "zigzag", "weighted", "metis"]
MAX_LISTED_EDGES = 1 << 28  # of the list that METIS reads: 4 GiB
EDGES_PER_NODE = 8  # what a node costs besides its edges, in edges: its projections, its place in every layer


class Nodes(NamedTuple):
    """Nodes in the order in which a rank holds or receives them: ranges, or one by one."""

    first: Tensor
    """int64 (R,)."""
    stop: Tensor
    """The node after the last of each range."""

    @staticmethod
    def of(nodes: Tensor) -> Nodes:
        """From nodes one by one: those that follow each other are one range."""
        begins = torch.ones(len(nodes), dtype=torch.bool)
        begins[1:] = nodes[1:] != nodes[:-1] + 1
        at = begins.nonzero()[:, 0]
        length = torch.diff(at, append=at.new_tensor([len(nodes)]))
        return Nodes(nodes[at], nodes[at] + length)

    @staticmethod
    def joined(parts: list[Nodes]) -> Nodes:
        """One after the other."""
        none = torch.empty(0, dtype=torch.int64)
        return Nodes(torch.cat([none, *(p.first for p in parts)]), torch.cat([none, *(p.stop for p in parts)]))

    @property
    def merged(self) -> Nodes:
        """The same with ranges that follow each other as one."""
        begins = torch.ones_like(self.first, dtype=torch.bool)
        begins[1:] = self.first[1:] != self.stop[:-1]
        ends = torch.ones_like(begins)
        ends[:-1] = begins[1:]
        return Nodes(self.first[begins], self.stop[ends])

    @property
    def ascending(self) -> Nodes:
        """The same nodes in their order."""
        order = self.first.argsort()
        return Nodes(self.first[order], self.stop[order]).merged

    @property
    def total(self) -> int:
        """How many nodes."""
        return int((self.stop - self.first).sum())

    @property
    def numbers(self) -> Tensor:
        """One by one: int64 (total,)."""
        length = self.stop - self.first
        before = torch.cumsum(length, 0) - length
        return torch.repeat_interleave(self.first - before, length) + torch.arange(int(length.sum()))

    @property
    def ranges(self) -> list[tuple[int, int, int]]:
        """(first, stop, place of the first among them)."""
        length = self.stop - self.first
        place = torch.cumsum(length, 0) - length
        return list(zip(self.first.tolist(), self.stop.tolist(), place.tolist(), strict=True))

    def cut(self, rows: int) -> list[Nodes]:
        """In pieces of so many, the last of them smaller."""
        total = self.total
        if total <= rows:
            return [self] if total else []
        place = torch.cumsum(self.stop - self.first, 0) - (self.stop - self.first)
        pieces = []
        for begin in range(0, total, rows):
            first = torch.maximum(self.first, self.first + begin - place)
            stop = torch.minimum(self.stop, self.first + begin + rows - place)
            pieces.append(Nodes(first[first < stop], stop[first < stop]))
        return pieces


@dataclass(frozen=True, eq=False)
class Partition:
    """Each of n nodes on one of several ranks: ranges of nodes, ascending, one after the other.

    The rows of a rank are its nodes, ascending.
    """

    name: str
    n: int
    ranks: int
    first: Tensor
    """The first node of each range, ascending, from 0 on: int64 (R,)."""
    owner: Tensor
    """The rank of each: int64 (R,)."""
    digest: int = field(init=False)
    """A number that other partitions do not have, but for chance."""

    @staticmethod
    def of(name: str, owner: Tensor, ranks: int) -> Partition:
        """From the rank of each node, int64 (n,)."""
        starts = torch.ones(len(owner), dtype=torch.bool)
        starts[1:] = owner[1:] != owner[:-1]
        first = starts.nonzero()[:, 0]
        return Partition(name, len(owner), ranks, first, owner[first])

    def __post_init__(self):
        sides = (self.first.contiguous(), self.owner.contiguous())
        object.__setattr__(self, "digest", zlib.crc32(b"".join(side.numpy().tobytes() for side in sides)))

    @cached_property
    def stop(self) -> Tensor:
        """The node after the last of each range."""
        return torch.cat([self.first[1:], self.first.new_tensor([self.n])[: len(self.first)]])

    @cached_property
    def counts(self) -> Tensor:
        """How many rows each rank has: int64 (ranks,)."""
        return torch.zeros(self.ranks, dtype=torch.int64).index_add_(0, self.owner, self.stop - self.first)

    @cached_property
    def first_row(self) -> Tensor:
        """Of each range, the row of its rank at which it begins: int64 (R,)."""
        order = self.owner.argsort(stable=True)
        length = (self.stop - self.first)[order]
        before = torch.cumsum(length, 0) - length
        rows = before - (torch.cumsum(self.counts, 0) - self.counts)[self.owner[order]]
        return torch.empty_like(rows).scatter_(0, order, rows)

    @property
    def pieces(self) -> int:
        """In how many ranges the nodes of one rank lie at most."""
        return int(torch.bincount(self.owner).max()) if len(self.owner) else 0

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """The nodes of a rank as ranges (first, stop), ascending."""
        own = self.owner == rank
        return list(zip(self.first[own].tolist(), self.stop[own].tolist(), strict=True))

    def held(self, rank: int) -> Nodes:
        """The nodes of a rank, ascending."""
        own = self.owner == rank
        return Nodes(self.first[own], self.stop[own])

    def nodes(self, rank: int) -> Tensor:
        """The same one by one: int64 (rows,)."""
        return self.held(rank).numbers

    def owners(self, nodes: Tensor) -> Tensor:
        """The rank of each node."""
        return self.owner[self._range_of(nodes)]

    def rows(self, nodes: Tensor) -> Tensor:
        """The row that each node has on its rank."""
        number = self._range_of(nodes)
        return self.first_row[number] + nodes - self.first[number]

    def _range_of(self, nodes: Tensor) -> Tensor:
        return torch.searchsorted(self.first, nodes.contiguous(), right=True) - 1


def contiguous(n: int, ranks: int) -> Partition:
    """n / ranks nodes that lie together on each rank."""
    return _bounded("contiguous", n, torch.arange(ranks) * n // ranks)


def zigzag(n: int, ranks: int) -> Partition:
    """Of 2 · ranks equal pieces, rank r has the pieces r and 2 · ranks - 1 - r: under `Causal` all have equal work.

    Also called load-balanced ring attention (Brandon et al. 2023, "Striped attention", discuss why).
    """
    piece = torch.arange(2 * ranks)
    first, owner = piece * n // (2 * ranks), torch.minimum(piece, 2 * ranks - 1 - piece)
    kept = first < torch.cat([first[1:], first.new_tensor([n])])
    return Partition("zigzag", n, ranks, first[kept], owner[kept])


def weighted(graph: Graph, n: int, m: int, ranks: int) -> Partition:
    """Nodes that lie together on each rank, so many that all ranks have about as many edges."""
    graph, n, m = at_size(graph, n, m)
    total = count_edges(graph, n, m) + EDGES_PER_NODE * n
    bounds = [0]
    for rank in range(1, ranks):
        low, high = bounds[-1], n
        while low < high:
            middle = (low + high) // 2
            before = count_edges(*at_size(graph.rows(0, middle), middle, m)) + EDGES_PER_NODE * middle
            low, high = (middle + 1, high) if before * ranks < total * rank else (low, middle)
        bounds.append(low)
    return _bounded("weighted", n, torch.tensor(bounds))


def metis(graph: Graph, n: int, m: int, ranks: int) -> Partition:
    """Nodes that hear each other together, by METIS (Karypis and Kumar 1998), through `pymetis`; of square graphs.

    Nodes weigh as their edges do.
    """
    if n != m:
        raise ValueError(f"partition='metis' is of graphs whose queries are their keys (got {n} × {m})")
    if find_spec("pymetis") is None:
        raise ImportError("partition='metis' needs pymetis: pip install pymetis")
    graph, n, m = at_size(graph, n, m)
    if (edges := count_edges(graph, n, m)) > MAX_LISTED_EDGES:
        raise ValueError(f"partition='metis' reads a list of at most {MAX_LISTED_EDGES:,} edges (got {edges:,})")
    import pymetis  # pyright: ignore[reportMissingImports]  (optional)

    query, key = list_edges(graph, n, m)
    apart = query != key
    code = torch.unique(torch.cat([query[apart] * n + key[apart], key[apart] * n + query[apart]]))
    starts = torch.searchsorted(code, torch.arange(n + 1) * n)
    weight = torch.bincount(query, minlength=n) + EDGES_PER_NODE
    _, owner = pymetis.part_graph(
        ranks, pymetis.CSRAdjacency(starts.numpy(), (code % n).numpy()), vweights=weight.tolist(), recursive=ranks <= 8
    )
    return Partition.of("metis", torch.tensor(owner, dtype=torch.int64), ranks)


def given(owner: Tensor, n: int, ranks: int) -> Partition:
    """As the rank of each node says."""
    if owner.shape != (n,) or owner.is_floating_point() or owner.dtype == torch.bool:
        raise ValueError(
            f"a partition must be the rank of each of {n} nodes, integers ({n},) (got {owner.dtype} of shape "
            f"{tuple(owner.shape)})"
        )
    if n and not 0 <= int(owner.min()) <= int(owner.max()) < ranks:
        raise ValueError(
            f"ranks of a partition must be from 0 to {ranks - 1} (got {int(owner.min())} … {int(owner.max())})"
        )
    return Partition.of("given", owner.to("cpu", torch.int64), ranks)


def named(name: str, graph: Graph, n: int, m: int, ranks: int) -> Partition:
    """The partition of this name."""
    made: dict[str, Callable[[], Partition]] = {
        "contiguous": lambda: contiguous(n, ranks),
        "zigzag": lambda: zigzag(n, ranks),
        "weighted": lambda: weighted(graph, n, m, ranks),
        "metis": lambda: metis(graph, n, m, ranks),
    }
    if name not in made:
        raise ValueError(
            f"partition must be 'auto', one of {', '.join(map(repr, get_args(PartitionName)))}, or the rank of each "
            f"node (got {name!r})"
        )
    return made[name]()


def _bounded(name: str, n: int, first: Tensor) -> Partition:
    """Rank r from first[r] on; ranks without nodes have no range."""
    kept = first < torch.cat([first[1:], first.new_tensor([n])])
    return Partition(name, n, len(first), first[kept], torch.arange(len(first))[kept])
