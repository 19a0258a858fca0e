"""What kernels read of a graph: a mask or a list of edges, built once for a graph, a size and a device. Data only.

A layout is asked for through an operator that takes the graph as text: so `torch.compile` sees one opaque call, and a
compiled program serves every graph size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.graph.base import Graph
from attngraph.graph.text import from_text

MAX_CACHED = 16  # layouts of each kind that are kept
MAX_CACHED_PAIRS = 1 << 26  # (query, key) pairs of a mask that is kept, 64 MB; larger ones cost less to build


class Dense(NamedTuple):
    """All pairs of n queries and m keys: of a closed form that the kernels know, "causal" or "full", or with a mask.

    With lengths, the closed form of each of so many consecutive nodes apart: packed documents.
    """

    graph: Graph
    n: int
    m: int
    closed: str | None
    lengths: tuple[int, ...] = ()

    @property
    def pairs(self) -> int:
        """How many scores are computed."""
        sizes = [(length, length) for length in self.lengths] or [(self.n, self.m)]
        if self.closed != "causal":
            return sum(n * m for n, m in sizes)
        # A triangle, and below it, where there are more queries than keys, a rectangle.
        return sum(min(n, m) * (min(n, m) + 1) // 2 + max(n - m, 0) * m for n, m in sizes)

    @property
    def nbytes(self) -> int:
        """Of the mask."""
        return 0 if self.closed else self.n * self.m

    def documents(self, device: torch.device) -> Iterator[tuple[Tensor, Dense]]:
        """By their length, the nodes (documents, length) of documents, and the layout of one of them."""
        starts = torch.tensor([0, *accumulate(self.lengths)], device=device)
        lengths = starts.diff()
        for length in sorted({*self.lengths}):
            first = starts[:-1][lengths == length]
            nodes = first[:, None] + torch.arange(length, device=device)
            yield nodes, Dense(self.graph, length, length, self.closed)

    def mask(self, device: torch.device) -> Tensor | None:
        """The edges as a bool tensor (n, m), where the closed form does not tell them."""
        return None if self.closed else _kept_mask(self.graph, self.n, self.m, device)


@torch.library.custom_op("attngraph::mask", mutates_args=())
def mask(graph: str, n: int, m: int, device: torch.device) -> Tensor:
    """The edges as a bool tensor (n, m), or (H, n, m)."""
    found = _kept_mask(from_text(graph), n, m, device)
    return found if n * m > MAX_CACHED_PAIRS else found.clone()  # an operator's result belongs to its caller


@mask.register_fake
def _(graph, n, m, device):
    heads = from_text(graph).heads
    return torch.empty((n, m) if heads is None else (heads, n, m), dtype=torch.bool, device=device)


@torch.library.custom_op("attngraph::edges", mutates_args=())
def edges(graph: str, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The edges as query (E,), key (E,) and, with one graph per head, who has which: bool (H, E); else (0, E)."""
    query, key, member = edges_of_heads(from_text(graph), n, m, device)
    return query.clone(), key.clone(), member.clone()


@edges.register_fake
def _(graph, n, m, device):
    count = torch.library.get_ctx().new_dynamic_size()
    query, key = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    return query, key, torch.empty(from_text(graph).heads or 0, count, dtype=torch.bool, device=device)


def _kept_mask(graph: Graph, n: int, m: int, device: torch.device) -> Tensor:
    """The mask, kept if it is small: not to be changed."""
    return graph.mask(n, m, device) if n * m > MAX_CACHED_PAIRS else _mask(graph, n, m, device)


@lru_cache(MAX_CACHED)
def _mask(graph: Graph, n: int, m: int, device: torch.device) -> Tensor:
    return graph.mask(n, m, device)


@lru_cache(MAX_CACHED)
def edges_of_heads(graph: Graph, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator `edges` gives, kept: not to be changed."""
    bound, n, m = graph.at(n, m)
    query, key = bound.list_edges(n, m)
    heads = range(graph.heads or 0)
    member = [bound.head(h).contains(query, key) for h in heads]
    member = torch.stack(member) if member else torch.empty(0, len(query), dtype=torch.bool)
    return query.to(device), key.to(device), member.to(device)
