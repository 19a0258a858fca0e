"""How nodes hang together, whoever hears whom: components, and the edges that much has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.analysis.hearing import Nodes
from attngraph.analysis.layers import heard_by_any_head, stack
from attngraph.arguments import checked
from attngraph.graph import counting
from attngraph.graph.base import Edges, Graph
from attngraph.graph.boxes import require_memory
from attngraph.graph.listing import by_lines, list_edges, no_edges

SAME = 1e-9  # resistances that differ by less are ranked as equal


@checked
def components(graphs: Graph | Sequence[Graph], n: int | None = None) -> Tensor:
    """The weakly connected component of each node: int64 (n,), numbered from 0 by the first node of each.

    Two nodes are in one where edges of any layer lead from one to the other, whatever their direction.

    >>> components(Documents([2, 3]))
    tensor([0, 0, 1, 1, 1])
    """
    layers, n = stack(graphs, n)
    pairs = [no_edges(), *(_pairs(heard_by_any_head(graph, n), n) for graph in dict.fromkeys(layers))]
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    return torch.unique(_first_connected(one, other, n), return_inverse=True)[1]


def _pairs(graph: Graph, n: int) -> Edges:
    """Pairs of nodes that hang together as the edges of a graph do: of the keys in a run, each with the next."""
    parts = by_lines(graph, n, n)
    runs = None if parts is None else counting.runs(parts[0], n, n)
    if parts is None or runs is None:
        return list_edges(graph, n, n)
    _, more, (lacking_query, lacking_key) = parts
    pairs = [more]
    for step in runs.period.unique().tolist():
        query, key, length, _ = (column[(runs.period == step) & (runs.length > 0)] for column in runs)
        row = step * (n // step + 2)  # of the keys, those with one remainder side by side
        line = query * row + _by_remainder(key, step, n)
        lacking = lacking_query * row + _by_remainder(lacking_key, step, n)
        left = _runs(line, length).minus(_runs(lacking, torch.ones_like(lacking)))
        start, stop = (torch.as_tensor(side, device=query.device) for side in left)
        pairs.append((start // row, _from_remainder(start % row, step, n)))
        long = stop - start > 1
        before = _runs((start % row)[long], (stop - start)[long] - 1).members()
        pairs.append((_from_remainder(before, step, n), _from_remainder(before + 1, step, n)))
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    return one, other


def _runs(start: Tensor, length: Tensor) -> Nodes:
    return Nodes.of(start.numpy(force=True), (start + length).numpy(force=True))


def _by_remainder(node: Tensor, step: int, n: int) -> Tensor:
    """Where nodes stand if those with one remainder of n, divided by a step, stand side by side, with gaps between."""
    return node % step * (n // step + 2) + node // step


def _from_remainder(place: Tensor, step: int, n: int) -> Tensor:
    """Which nodes stand there."""
    width = n // step + 2
    return place % width * step + place // width


def _first_connected(one: Tensor, other: Tensor, n: int) -> Tensor:
    """The first node that each of n nodes is connected with by pairs: int64 (n,)."""
    first = torch.arange(n, device=one.device)
    while True:
        ends = torch.cat([first[one], first[other]])
        lower = torch.minimum(*ends.chunk(2)).repeat(2) if len(ends) else ends
        nearer = first.scatter_reduce(0, ends, lower, "amin")
        while not torch.equal(nearer, nearer[nearer]):
            nearer = nearer[nearer]
        if torch.equal(nearer, first):
            return first
        first = nearer


class Bottlenecks(NamedTuple):
    """Edges, whatever their direction, from the one that most has to pass on."""

    edges: Tensor
    """Two nodes each, the lower first: int64 (2, E)."""
    resistance: Tensor
    """The effective resistance between them, above 0 and at most 1: float64 (E,)."""


@checked
def bottlenecks(graphs: Graph | Sequence[Graph], n: int | None = None) -> Bottlenecks:
    """The edges of all layers by their effective resistance, the largest first: R(u, v) = (e_u - e_v)ᵀ L⁺ (e_u - e_v).

    L is the Laplacian of the graph with each edge in both directions, once, and without loops. An edge of resistance 1
    is a bridge: nothing passes from one side to the other but by it. The lower, the more other ways there are; R is the
    share of all spanning trees that have the edge, and those of a component of c nodes sum up to c - 1. Information
    that has to pass edges of high resistance is squashed (Black et al. 2023; Topping et al. 2022).

    Exact, in O(n³): L⁺ is a dense inverse.

    >>> two_cliques = Documents([3, 3]) | EdgeList([[2], [3]], size=6)
    >>> found = bottlenecks(two_cliques)
    >>> found.edges.T.tolist()[:2], found.resistance[:2]
    ([[2, 3], [0, 1]], tensor([1.0000, 0.6667], dtype=torch.float64))
    """
    layers, n = stack(graphs, n)
    require_memory(4 * 8 * n * n, f"to invert a matrix of {n} × {n}")
    codes = [torch.empty(0, dtype=torch.int64)]
    for graph in dict.fromkeys(layers):
        query, key = list_edges(heard_by_any_head(graph, n), n, n)
        between = query != key
        codes.append((torch.minimum(query, key) * n + torch.maximum(query, key))[between])
    code = torch.unique(torch.cat(codes))
    low, high = code // max(n, 1), code % max(n, 1)
    component = _first_connected(low, high, n)
    resistance = _resistance(low, high, component)
    order = (-resistance / SAME).round().argsort(stable=True)
    return Bottlenecks(torch.stack([low, high])[:, order], resistance[order])


def _resistance(low: Tensor, high: Tensor, component: Tensor) -> Tensor:
    """The effective resistance of each edge: the inverse is of L + J, which differs from L⁺ by a constant in each
    component, where J has 1 / c between its c nodes.
    """
    size = torch.bincount(component, minlength=len(component))[component].double()
    lifted = (component[:, None] == component).double() / size
    for one, other, sign in ((low, high, -1.0), (high, low, -1.0), (low, low, 1.0), (high, high, 1.0)):
        lifted.index_put_((one, other), torch.full(one.shape, sign, dtype=torch.float64), accumulate=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(lifted)) if len(lifted) else lifted
    return inverse[low, low] + inverse[high, high] - 2 * inverse[low, high]
