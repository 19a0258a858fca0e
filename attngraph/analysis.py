"""Questions about graphs: who is reached through several layers, does the future leak, what may a cache forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.graph import algebra, counting
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.boxes import require_memory
from attngraph.graph.compose import PerHead
from attngraph.graph.listing import BYTES_PER_NODE, BYTES_PER_PAIR, list_edges
from attngraph.graph.patterns import Causal, Identity, Window

FAR = 1 << 20  # the number of nodes at which a graph that fits any size is looked at


class Leak(NamedTuple):
    """An edge by which a query hears the future."""

    layer: int
    key: int
    query: int


@checked
def is_causal(graph: Graph | Sequence[Graph], n: int | None = None) -> bool:
    """Whether no query hears a later key, in any layer of a stack; for closed forms of any size, among the first 2²⁰
    nodes.

    >>> is_causal(Causal() & Strided(4)), is_causal(Window(2, 1))
    (True, False)
    """
    if not isinstance(graph, Graph):
        return all(is_causal(each, n) for each in _layers(graph))
    if n is None and _is_causal_by_form(graph):
        return True
    if graph.heads:
        return all(is_causal(graph.of_head(h), n) for h in range(graph.heads))
    n, m = _size(graph, n)
    return (graph - Causal()).num_edges(n, m) == 0


def _is_causal_by_form(graph: Graph) -> bool:
    """Whether an expression can't but be causal, whatever its size."""
    match graph:
        case Causal(offset):
            return offset <= 0
        case Window(_, right):
            return right == 0
        case algebra.Empty() | Identity():
            return True
        case algebra.Intersection(graphs):
            return any(map(_is_causal_by_form, graphs))
        case algebra.Union(graphs) | PerHead(graphs) | algebra.SymmetricDifference(graphs):
            return all(map(_is_causal_by_form, graphs))
        case algebra.Difference((a, _)) | algebra.Sized(a):
            return _is_causal_by_form(a)
    return False


@checked
def leaks(graphs: Graph | Sequence[Graph], n: int | None = None) -> list[Leak]:
    """For each layer that hears the future, the first edge by which it does; empty where the stack is causal.

    A stack of causal layers is causal, so one look at each layer suffices.

    >>> leaks([Causal(), Causal() | Prefix(3)], n=8)
    [Leak(layer=1, key=1, query=0)]
    """
    found = []
    for layer, graph in enumerate(_layers(graphs)):
        n_of, m_of = _size(graph, n)
        future = graph - Causal()
        heard = future.in_degrees(n_of, m_of)
        hearing = (heard.amax(0) if graph.heads else heard).nonzero()[:1, 0]
        for query in hearing.tolist():
            require_memory(m_of * BYTES_PER_PAIR, f"to look at the {m_of:,} keys of a query of {graph}")
            row = at_size(future, n_of, m_of)[0].contains(torch.tensor([[query]]), torch.arange(m_of)[None])
            found.append(Leak(layer, int(row.reshape(-1, m_of).any(0).nonzero()[0, 0]), query))
    return found


@checked
def receptive_field(graphs: Graph | Sequence[Graph], node: int, n: int | None = None) -> Tensor:
    """The input nodes that reach `node` through a stack of layers, each with its residual stream: sorted int64.

    >>> receptive_field([Causal() & Window(2, 0)] * 3, node=9, n=10)
    tensor([3, 4, 5, 6, 7, 8, 9])
    """
    layers, n = stack(graphs, n)
    if not 0 <= node < n:
        raise ValueError(f"node must be from 0 to {n - 1} (got {node})")
    require_memory(n * BYTES_PER_NODE, f"to look at {n:,} nodes")
    heard, every = torch.tensor([node]), torch.arange(n)
    for graph in reversed(layers):
        require_memory(len(heard) * n * BYTES_PER_PAIR, f"to look at the keys of {len(heard):,} queries of {graph}")
        inside = at_size(graph, n, n)[0].contains(heard[:, None], every[None])
        heard = torch.unique(torch.cat([heard, every[inside.reshape(-1, n).any(0)]]))
    return heard


@checked
def reach(graphs: Graph | Sequence[Graph], n: int | None = None) -> Tensor:
    """Which input (column) reaches which output (row) through a stack of layers with residual streams: bool (n, n)."""
    layers, n = stack(graphs, n)
    require_memory(16 * n * n, f"to multiply matrices of {n} × {n}")
    own = reached = torch.eye(n, dtype=torch.float32)
    for graph in layers:
        mask = graph.mask(n, n)
        step = (mask.any(0) if graph.heads else mask).float() + own
        reached = (step @ reached > 0).float()
    return reached.bool()


def _layers(graphs: Graph | Sequence[Graph]) -> Sequence[Graph]:
    """The graphs of a stack, of which one graph is the smallest; TypeError if they are none."""
    layers = [graphs] if isinstance(graphs, Graph) else list(graphs)
    for graph in layers:
        if not isinstance(graph, Graph):
            raise TypeError(f"graphs must be a graph, or one for each layer (got {shown(graph)} in the list)")
    return layers


def stack(graphs: Graph | Sequence[Graph], n: int | None) -> tuple[Sequence[Graph], int]:
    """The graphs of a stack, and how many nodes it has: those asked for, or what a layer knows."""
    layers = _layers(graphs)
    known = [graph.size[0] for graph in layers if graph.size[0] is not None]
    n = next(iter(known), None) if n is None else n
    if n is None:
        raise ValueError("give the number of nodes, n: no layer knows its own")
    require_ints(0, n=n)
    return layers, n


@checked
def last_reader(graph: Graph, n: int | None = None, m: int | None = None) -> Tensor:
    """For each key, the last query that hears it, or -1: int64 (m,). A cache may forget the key after that query.

    >>> last_reader(Causal() & (Window(2, 0) | Prefix(1)), 6, 6)
    tensor([5, 3, 4, 5, 5, 5])
    """
    bound, n, m = at_size(graph, n, m)
    require_memory(m * BYTES_PER_NODE, f"for the last reader of each key of {graph} at {n} × {m}")
    last = torch.full((m,), -1)
    runs = None if graph.heads else counting.runs(bound.T, m, n)
    if runs is None:
        query, key = list_edges(bound, n, m)
        return last.scatter_reduce(0, key, query, "amax")
    ends = torch.where(runs.length > 0, runs.key + (runs.length - 1) * runs.period, -1)
    return last.scatter_reduce(0, runs.query, ends, "amax")


class Cost(NamedTuple):
    """What attention on a graph costs, or on one for each layer, all together: forward and backward are about 3.5 times
    the forward FLOPs."""

    edges: int
    """As `graph.num_edges`: those of all heads together, where heads have each their own graph."""
    density: float
    """The share of all pairs that are edges, in the mean over the heads and layers."""
    flops: int
    """Multiplications and additions of the forward pass, 4·E·D for each head."""
    dense_flops: int
    """The same for all pairs of nodes."""


@checked
def cost(graphs: Graph | Sequence[Graph], n: int | None = None, *, dim: int, heads: int) -> Cost:
    """What layers of this width (dim = heads · head_dim) cost on a sequence of n nodes.

    >>> cost(Causal(), 1024, dim=512, heads=8).density
    0.50048828125
    >>> cost([Causal(), Window(16, 0)], 1024, dim=512, heads=8).edges
    542072
    """
    require_ints(1, dim=dim, heads=heads)
    if dim % heads:
        raise ValueError(f"dim must be a multiple of heads (got {dim} and {heads})")
    edges, of_one_head, pairs, layers = 0, 0.0, 0, _layers(graphs)
    for graph in layers:
        if graph.heads not in (None, heads):
            raise ValueError(f"graph has {graph.heads} heads, but the cost of {heads} was asked for")
        bound, queries, keys = at_size(graph, n)
        count = bound.num_edges(queries, keys)
        edges, of_one_head = edges + count, of_one_head + count / (graph.heads or 1)
        pairs += queries * keys
    return Cost(edges, of_one_head / max(pairs, 1), round(4 * of_one_head * dim), 4 * pairs * dim)


def _size(graph: Graph, n: int | None) -> tuple[int, int]:
    n = graph.size[0] if n is None else n
    if n is None:
        if graph._breakpoints(FAR, FAR) is None:
            raise ValueError(f"give the number of nodes, n: {graph} can only be looked at edge by edge")
        n = FAR
    return n, n if graph.size[1] is None else graph.size[1]
