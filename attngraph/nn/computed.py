"""Who hears whom in a layer: a graph, or a function that makes one of what the layer reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from attngraph.arguments import shown
from attngraph.graph.base import Graph
from attngraph.planning.planner import Plan

GraphFunction = Callable[[Tensor], Graph]
"""What a layer's attention reads, (B, N, embed_dim) → who hears whom: one graph, or one for each entry of the batch."""

OneGraph = Graph | Plan | GraphFunction
"""Of one layer: a graph; a plan of one, as `attngraph.distributed` makes them; or a function."""

Graphs = OneGraph | Sequence[OneGraph]
"""Of all layers, or a list of one for each."""


def is_one(graph: object) -> TypeGuard[OneGraph]:
    """Whether it is one of a layer, rather than a list of them. A class makes no graphs of vectors."""
    return isinstance(graph, Graph | Plan) or (callable(graph) and not isinstance(graph, type))


def name_of(function: GraphFunction) -> str:
    """A function as errors and models name it, the same in every process."""
    named = getattr(function, "func", function)  # of a partial
    return f"<function {getattr(named, '__qualname__', type(named).__qualname__)}>"


def require_one_placement(graphs: Sequence[OneGraph]) -> None:
    """Raise if layers would take the same rows for those of different nodes, as plans of one rank's share may."""
    placements = [graph.placement if isinstance(graph, Plan) else None for graph in graphs]
    if any(placement != placements[0] for placement in placements):
        raise ValueError(
            "all layers must take the rows of the same nodes: give each a plan of one call, distribute([graph, …], n, "
            f"mesh), whose partition they share (got {', '.join(map(str, graphs))})"
        )


def graph_of(graph: OneGraph, x: Tensor) -> Graph | Plan:
    """The graph, or what the function makes of x."""
    if isinstance(graph, Graph | Plan):
        return graph
    if torch.compiler.is_compiling():  # it would make programs of what lies between the numbers it asks for
        return torch.compiler.disable()(made_of)(graph, x)
    return made_of(graph, x)


def made_of(graph: GraphFunction, x: Tensor) -> Graph:
    """What the function makes of x."""
    made = graph(x)
    if not isinstance(made, Graph):
        raise TypeError(f"graph must be a function that returns a Graph: {name_of(graph)} returned {shown(made)}")
    return made
