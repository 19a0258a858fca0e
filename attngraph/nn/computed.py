"""Who hears whom in a layer: a graph, or a function that makes one of what the layer reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from attngraph.arguments import shown
from attngraph.graph.base import Graph

GraphFunction = Callable[[Tensor], Graph]
"""What a layer's attention reads, (B, N, embed_dim) → who hears whom: one graph, or one for each entry of the batch."""

Graphs = Graph | GraphFunction | Sequence[Graph | GraphFunction]
"""Of all layers, or a list of one for each."""


def is_one(graph: object) -> TypeGuard[Graph | GraphFunction]:
    """Whether it is a graph or a function, rather than a list of them. A class makes no graphs of vectors."""
    return isinstance(graph, Graph) or (callable(graph) and not isinstance(graph, type))


def name_of(function: GraphFunction) -> str:
    """A function as errors and models name it, the same in every process."""
    named = getattr(function, "func", function)  # of a partial
    return f"<function {getattr(named, '__qualname__', type(named).__qualname__)}>"


def graph_of(graph: Graph | GraphFunction, x: Tensor) -> Graph:
    """The graph, or what the function makes of x."""
    if isinstance(graph, Graph):
        return graph
    if torch.compiler.is_compiling():  # it would make programs of what lies between the numbers it asks for
        return torch.compiler.disable()(_made)(graph, x)
    return _made(graph, x)


def _made(graph: GraphFunction, x: Tensor) -> Graph:
    made = graph(x)
    if not isinstance(made, Graph):
        raise TypeError(f"graph must be a function that returns a Graph: {name_of(graph)} returned {shown(made)}")
    return made
