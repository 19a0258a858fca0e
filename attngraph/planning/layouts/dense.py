"""The layout of all pairs: a closed form that PyTorch's kernels know, packed documents of one, or a mask. Data only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.graph.base import Graph
from attngraph.planning.layouts import materialized


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
        return None if self.closed else materialized.mask(self.graph, self.n, self.m, device)
