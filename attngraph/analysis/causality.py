"""Whether the future is heard: by which edge, and by which way through a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attngraph.analysis.layers import layers_of, require_known, size_of
from attngraph.arguments import checked
from attngraph.graph import algebra
from attngraph.graph.base import Graph, at_size
from attngraph.graph.boxes import require_memory
from attngraph.graph.compose import PerHead
from attngraph.graph.listing import BYTES_PER_PAIR
from attngraph.graph.patterns import Causal, Identity, Window


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
        return all(is_causal(each, n) for each in dict.fromkeys(layers_of(graph)))
    if n is None and is_causal_by_form(graph):
        return True
    if graph.heads:
        return all(is_causal(graph.of_head(h), n) for h in range(graph.heads))
    n, m = size_of(graph, n)
    return (graph - Causal()).num_edges(n, m) == 0


def is_causal_by_form(graph: Graph) -> bool:
    """Whether an expression can't but be causal, whatever its size."""
    match graph:
        case Causal(offset):
            return offset <= 0
        case Window(_, right):
            return right == 0
        case algebra.Empty() | Identity():
            return True
        case algebra.Intersection(graphs):
            return any(map(is_causal_by_form, graphs))
        case algebra.Union(graphs) | PerHead(graphs) | algebra.SymmetricDifference(graphs):
            return all(map(is_causal_by_form, graphs))
        case algebra.Difference((a, _)) | algebra.Sized(a):
            return is_causal_by_form(a)
    return False


@checked
def leaks(graphs: Graph | Sequence[Graph], n: int | None = None) -> list[Leak]:
    """For each layer that hears the future, the first edge by which it does; empty where the stack is causal.

    A stack of causal layers is causal, so one look at each layer suffices.

    >>> leaks([Causal(), Causal() | Prefix(3)], n=8)
    [Leak(layer=1, key=1, query=0)]
    """
    layers = layers_of(graphs)
    first = {graph: _first_leak(graph, n) for graph in dict.fromkeys(layers)}
    return [Leak(layer, *edge) for layer, graph in enumerate(layers) if (edge := first[graph]) is not None]


def _first_leak(graph: Graph, n: int | None) -> tuple[int, int] | None:
    """The first edge by which a graph hears the future, as (key, query)."""
    if n is None and is_causal_by_form(graph):
        return None
    require_known(graph)
    n, m = size_of(graph, n)
    future = graph - Causal()
    heard = future.in_degrees(n, m)
    hearing = (heard.amax(0) if graph.heads else heard).nonzero()[:, 0]
    if not len(hearing):
        return None
    query = int(hearing[0])
    require_memory(m * BYTES_PER_PAIR, f"to look at the {m:,} keys of a query of {graph}")
    row = at_size(future, n, m)[0].contains(torch.tensor([[query]]), torch.arange(m)[None])
    return int(row.reshape(-1, m).any(0).nonzero()[0, 0]), query


@checked
def leak_path(graphs: Graph | Sequence[Graph], n: int | None = None) -> list[int]:
    """The way by which the future reaches an output through a stack: where it is before the first layer and after each.

    From input j to output i < j, of the first of `leaks`: by residual streams up to its layer, along its edge, and by
    residual streams from there on. Empty where the stack is causal. `path` tells the way between two other nodes.

    >>> leak_path([Causal(), Causal(), Causal() | Prefix(3), Causal()], n=8)
    [1, 1, 1, 0, 0]
    """
    layers = layers_of(graphs)
    found = leaks(layers, n)
    if not found:
        return []
    layer, key, query = found[0]
    return [key] * (layer + 1) + [query] * (len(layers) - layer)
