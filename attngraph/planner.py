"""Choosing: which backend runs a graph, and the error when the one that was named can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attngraph.edges import EdgeList
from attngraph.graph import Graph

BACKENDS = ("auto", "reference", "edges", "dense")
PAIRS_PER_EDGE = 64  # gathering one edge costs about as much as this many pairs of a dense product


class Request(NamedTuple):
    """What a call of `attend` asks for that not every backend can do."""

    score: str | Callable
    normalize: str | Callable
    return_lse: bool
    return_weights: bool

    def beyond_dense(self) -> str | None:
        """The first thing asked for that needs a kernel that sees edges one by one."""
        if self.score != "dot":
            return f"score={self.score!r}"
        if self.normalize != "softmax":
            return f"normalize={self.normalize!r}"
        return "return_weights=True" if self.return_weights else None


def choose(backend: str, graph: Graph, n: int, m: int, request: Request) -> str:
    """The backend that runs this request."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} (got {backend!r})")
    beyond = request.beyond_dense()
    if backend == "dense" and beyond:
        raise ValueError(f"backend='dense' can't do {beyond}; backend='edges' and 'reference' can, and 'auto' chooses")
    if backend != "auto":
        return backend
    if beyond:
        return "edges"
    sparse = isinstance(graph, EdgeList) and len(graph.code) * PAIRS_PER_EDGE < n * m
    return "edges" if sparse else "dense"
