"""Who is reached: by which nodes, by which way, and through how many layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attngraph.analysis.hearing import Hearing, Nodes, heard_through
from attngraph.analysis.layers import heard_by_any_head, stack
from attngraph.arguments import checked
from attngraph.graph.base import Graph
from attngraph.graph.boxes import require_memory
from attngraph.graph.listing import count_edges

SETS_AT_ONCE = 1 << 14  # of nodes, one for each query, that a diameter is found by
NODES_AT_ONCE = 1 << 22  # in them, where they may have no runs
PAIRS_PER_EDGE = 1024  # of nodes, n times in a product of matrices, that cost what following an edge n times does


@checked
def receptive_field(graphs: Graph | Sequence[Graph], node: int, n: int | None = None) -> Tensor:
    """The input nodes that reach `node` through a stack of layers, each with its residual stream: sorted int64.

    >>> receptive_field([Causal() & Window(2, 0)] * 3, node=9, n=10)
    tensor([3, 4, 5, 6, 7, 8, 9])
    """
    layers, n = _asked_of(graphs, n, node=node)
    *_, heard = Nodes.run(node, node + 1), *heard_through(reversed(layers), node, {}, n)
    return heard.members()


@checked
def growth(graphs: Graph | Sequence[Graph], node: int, n: int | None = None) -> list[int]:
    """How many input nodes reach `node` after one layer of a stack, after two, and so on: see `receptive_field`.

    >>> growth([Causal() & Window(2, 0)] * 3, node=9, n=10)
    [3, 5, 7]
    """
    layers, n = _asked_of(graphs, n, node=node)
    known: dict[Graph, Hearing] = {}
    if len(set(layers)) == 1:
        return [heard.total for heard in heard_through(layers, node, known, n)]
    sizes = []
    for depth in range(1, len(layers) + 1):
        *_, heard = heard_through(reversed(layers[:depth]), node, known, n)
        sizes.append(heard.total)
    return sizes


@checked
def path(graphs: Graph | Sequence[Graph], source: int, target: int, n: int | None = None) -> list[int]:
    """The way by which input `source` reaches output `target`: where it is before the first layer and after each.

    It stays where it is, by residual streams, as long as it can. Empty where there is no way.

    >>> path([Causal() & Window(2, 0)] * 3, source=5, target=9, n=10)
    [5, 5, 7, 9]
    """
    layers, n = _asked_of(graphs, n, source=source, target=target)
    known: dict[Graph, Hearing] = {}
    fields = [Nodes.run(target, target + 1), *heard_through(reversed(layers), target, known, n)][::-1]
    if not fields[0].has(np.array(source)):
        return []
    way = [source]
    for graph, field in zip(layers, fields[1:], strict=True):  # the nodes from which the target is reached
        stays = field.has(np.array(way[-1]))
        way.append(way[-1] if stays else known[graph].first_query(field, way[-1]))
    return way


@checked
def reach(graphs: Graph | Sequence[Graph], n: int | None = None) -> Tensor:
    """Which input (column) reaches which output (row) through a stack of layers with residual streams: bool (n, n)."""
    layers, n = stack(graphs, n)
    require_memory(16 * n * n, f"to multiply matrices of {n} × {n}")
    own = reached = torch.eye(n, dtype=torch.float32)
    for graph in layers:
        step = heard_by_any_head(graph, n).mask(n, n).float() + own
        reached = (step @ reached > 0).float()
    return reached.bool()


@checked
def diameter(graph: Graph, n: int | None = None) -> int:
    """The longest shortest path along edges, of all pairs of nodes that have one: after so many layers reach grows no
    more.

    Where each node reaches each it is the diameter of networkx. Pairs without a path, as most of a causal graph's from
    a later node to an earlier one, do not count: `reach` tells whether there are any.

    >>> diameter(Causal() & Window(16, 0), n=128), diameter(Causal(), n=128)
    (8, 1)
    """
    (graph,), n = stack(graph, n)
    hearing = Hearing(graph, n)
    has_runs = not len(hearing.more[0]) and all(cells[-1].max() == 1 for cells in hearing.cells or ())
    if not hearing.maps_runs or (not has_runs and PAIRS_PER_EDGE * count_edges(hearing.graph, n, n) > n * n):
        return _steps_of_all(hearing.graph, n)
    at_once = SETS_AT_ONCE if has_runs else max(1, NODES_AT_ONCE // max(n, 1))
    return max((_steps(hearing, start, min(start + at_once, n)) for start in range(0, n, at_once)), default=0)


def _steps(hearing: Hearing, start: int, stop: int) -> int:
    """After how many steps the nodes that start … stop-1 hear become no more."""
    own = np.arange(stop - start) * (hearing.n + 1) + np.arange(start, stop)
    heard = new = Nodes(own, own + 1)
    steps = -1
    while len(new.start):
        steps, new = steps + 1, hearing.mapped(new).minus(heard)
        heard = heard.union(new)
    return steps


def _steps_of_all(graph: Graph, n: int) -> int:
    """The same of all nodes, by powers of a matrix: after 2^k steps, and then the most steps that do not suffice."""
    require_memory((2 + n.bit_length()) * 4 * n * n, f"to multiply matrices of {n} × {n}")
    own = torch.eye(n, dtype=torch.float32)
    powers = [torch.maximum(graph.mask(n, n).float(), own)]
    while not torch.equal(power := (powers[-1] @ powers[-1] > 0).float(), powers[-1]):
        powers.append(power)
    steps, reached = 0, own
    for exponent in reversed(range(len(powers) - 1)):
        further = (reached @ powers[exponent] > 0).float()
        if not torch.equal(further, powers[-1]):
            steps, reached = steps + (1 << exponent), further
    return steps + (not torch.equal(own, powers[-1]))


def _asked_of(graphs: Graph | Sequence[Graph], n: int | None, **nodes: int) -> tuple[Sequence[Graph], int]:
    """The layers of a stack, and how many nodes they have, of which these are some."""
    layers, n = stack(graphs, n)
    for name, node in nodes.items():
        if not 0 <= node < n:
            raise ValueError(f"{name} must be from 0 to {n - 1}, of {n} nodes (got {node})")
    return layers, n
