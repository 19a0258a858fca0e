"""What a graph costs before it runs: edges, time and memory, and what a cache of keys and values has to hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.analysis.causality import is_causal, leaks
from attngraph.analysis.layers import layers_of, require_known
from attngraph.arguments import checked
from attngraph.graph import counting
from attngraph.graph.algebra import contains_code
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.boxes import require_memory
from attngraph.graph.listing import BYTES_PER_NODE, PAIRS_PER_STEP, by_lines, list_edges, of_any_head
from attngraph.planning.planner import plan


@checked
def last_reader(graph: Graph, n: int | None = None, m: int | None = None) -> Tensor:
    """For each key, the last query that hears it, or -1: int64 (m,). A cache may forget the key after that query.

    >>> last_reader(Causal() & (Window(2, 0) | Prefix(1)), 6, 6)
    tensor([5, 3, 4, 5, 5, 5])
    """
    require_known(graph)
    bound, n, m = at_size(graph, n, m)
    require_memory(m * BYTES_PER_NODE, f"for the last reader of each key of {graph} at {n} × {m}")
    bound = of_any_head(bound, n, m) if bound.heads else bound
    last = torch.full((m,), -1)
    parts = by_lines(bound.T, m, n)
    runs = None if parts is None else counting.runs(parts[0], m, n)
    if parts is None or runs is None:
        query, key = list_edges(bound, n, m)
        return last.scatter_reduce(0, key, query, "amax")
    _, more, less = parts  # as (key, query)
    ends = torch.where(runs.length > 0, runs.key + (runs.length - 1) * runs.period, -1)
    last = last.scatter_reduce(0, runs.query, ends, "amax").scatter_reduce(0, *more, "amax")
    is_edge = ~contains_code(less[0] * n + less[1], torch.arange(m) * n + last) | (last < 0)
    wrong = (~is_edge).nonzero()[:, 0]
    if len(wrong):
        last[wrong] = _last_looked_at(bound, wrong, n)
    return last


def _last_looked_at(graph: Graph, keys: Tensor, n: int) -> Tensor:
    """The last query that hears each of some keys, or -1: by pairs, from the last query on."""
    last, step = torch.full_like(keys, -1), max(1, PAIRS_PER_STEP // len(keys))
    for stop in range(n, 0, -step):
        query = torch.arange(max(stop - step, 0), stop)
        hears = graph.contains(query[:, None], keys[None])
        last = torch.maximum(last, torch.where(hears, query[:, None], -1).amax(0))
        if bool((last >= 0).all()):
            break
    return last


@checked
def peak_alive(graph: Graph, n: int | None = None) -> int:
    """The most keys that a cache has to hold at once while n nodes are decoded one by one; where heads have each their
    own graph, keys that any of them needs.

    Key j is alive from query j, its own, to its `last_reader`.

    >>> peak_alive(Causal() & (Window(256, 0) | Prefix(4)), 100_000), peak_alive(Causal(), 100_000)
    (261, 100000)
    """
    last = last_reader(graph, n)
    born = torch.arange(len(last))
    return most_at_once(born, torch.maximum(last, born))


def most_at_once(born: Tensor, last: Tensor) -> int:
    """Of keys that are alive from one query to another, each int64 (keys,), how many are at most at the same."""
    if not len(born):
        return 0
    end = int(last.max()) + 2
    change = torch.bincount(born, minlength=end) - torch.bincount(last + 1, minlength=end)
    return int(change.cumsum(0).amax())


class Cost(NamedTuple):
    """What attention on a graph costs, or on one for each layer, all together: forward and backward are about 3.5 times
    the forward FLOPs. Of one batch entry."""

    edges: int
    """As `graph.num_edges`: those of all heads together, where heads have each their own graph."""
    density: float
    """The share of all pairs that are edges, in the mean over the heads and layers."""
    flops: int
    """Multiplications and additions of the forward pass, 4·E·D for each head."""
    dense_flops: int
    """The same for all pairs of nodes."""
    bytes: int
    """What the forward pass reads and writes at least: q, k and v once, and the output."""
    cache_bytes: int | None = None
    """What a cache of keys and values has to hold at most while n nodes are decoded one by one, 2 · (keys alive at
    once) · kv_heads · head_dim numbers for each layer: see `peak_alive`."""
    seconds: float | None = None
    """The time of a forward pass that the planner expects: see `plan`."""
    layout_bytes: int | None = None
    """What its layouts take; layers with equal graphs share one."""


@checked
def cost(
    graphs: Graph | Sequence[Graph],
    n: int | None = None,
    *,
    dim: int,
    heads: int,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache: bool = False,
    seconds: bool = False,
    device: torch.device | str = "cpu",
) -> Cost:
    """What layers of this width (dim = heads · head_dim) cost on a sequence of n nodes.

    Args:
        graphs: one graph, or one for each layer.
        n: how many nodes; may be left out where the graphs know.
        dim: the width of all query heads together.
        heads: how many query heads.
        kv_heads: how many heads keys and values have; by default as many as queries.
        dtype: of the numbers.
        cache: whether to tell `cache_bytes`, for graphs that are causal.
        seconds: whether to make a plan of each layer, and tell what it expects.
        device: where it would run.

    >>> cost(Causal(), 1024, dim=512, heads=8).density
    0.50048828125
    >>> cost([Causal(), Window(16, 0)], 1024, dim=512, heads=8).edges
    542072
    >>> window = cost(Causal() & (Window(256, 0) | Prefix(4)), 100_000, dim=512, heads=8, kv_heads=2, cache=True)
    >>> window.cache_bytes == 2 * 261 * 2 * 64 * 4
    True
    """
    require_ints(1, dim=dim, heads=heads)
    if dim % heads:
        raise ValueError(f"dim must be a multiple of heads (got {dim} and {heads})")
    kv_heads = heads if kv_heads is None else kv_heads
    require_ints(1, kv_heads=kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads must be a divisor of heads (got {kv_heads} and {heads})")
    times, head_dim = Counter(layers_of(graphs)), dim // heads
    edges, of_one_head, pairs, nodes, kept = 0, 0.0, 0, 0, 0
    for graph, layers in times.items():
        require_known(graph)
        if graph.heads not in (None, heads):
            raise ValueError(f"graph has {graph.heads} heads, but the cost of {heads} was asked for")
        bound, queries, keys = at_size(graph, n)
        count = layers * bound.num_edges(queries, keys)
        edges, of_one_head = edges + count, of_one_head + count / (graph.heads or 1)
        pairs += layers * queries * keys
        nodes += layers * 2 * (heads * queries + kv_heads * keys)
        kept += layers * _kept(bound, queries, keys, kv_heads) if cache else 0
    size = {"heads": heads, "head_dim": head_dim, "dtype": dtype, "device": device}
    plans = [(layers, plan(graph, n, **size)) for graph, layers in times.items() if seconds]
    return Cost(
        edges,
        of_one_head / max(pairs, 1),
        round(4 * of_one_head * dim),
        4 * pairs * dim,
        nodes * head_dim * dtype.itemsize,
        2 * kept * head_dim * dtype.itemsize if cache else None,
        sum(layers * each.seconds for layers, each in plans) if seconds else None,
        sum(each.nbytes for _, each in plans) if seconds else None,
    )


def _kept(graph: Graph, n: int, m: int, kv_heads: int) -> int:
    """How many keys a cache has to hold at once, of all its heads: those that a query head of theirs hears later."""
    if n != m:
        raise ValueError(f"a cache is for nodes that are queries and keys (got {n} queries and {m} keys): cache=False")
    if not is_causal(graph, n):
        leak = leaks(graph, n)[0]
        raise ValueError(
            f"a cache is for causal graphs, and in {graph} query {leak.query} hears the later key {leak.key}: "
            f"cache=False, or graph & Causal()"
        )
    if graph.heads is None:
        return kv_heads * peak_alive(graph, n)
    group = graph.heads // kv_heads
    heads = [[graph.of_head(first + h) for h in range(group)] for first in range(0, graph.heads, group)]
    return sum(peak_alive(reduce(or_, dict.fromkeys(of_group)), n) for of_group in heads)


class Compared(NamedTuple):
    """Two graphs side by side."""

    only_a: int
    """Edges that only the first has, as `graph.num_edges` counts them; which ones, `a - b` tells."""
    only_b: int
    """Those that only the second has, `b - a`."""
    both: int
    """Those that both have, `a & b`."""
    a: Cost
    """What the first costs."""
    b: Cost
    """What the second costs."""


@checked
def compare(
    a: Graph,
    b: Graph,
    n: int | None = None,
    *,
    dim: int,
    heads: int,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Compared:
    """Which edges only one of two graphs has, and what each costs, expected seconds and layouts included: see `cost`.

    >>> found = analysis.compare(Causal(), Window(16, 16), 1024, dim=512, heads=8)
    >>> found.only_a, found.only_b, found.both
    (507528, 16248, 17272)
    """
    require_known(a)
    require_known(b)
    cost_a, cost_b = (
        cost(graph, n, dim=dim, heads=heads, kv_heads=kv_heads, dtype=dtype, seconds=True, device=device)
        for graph in (a, b)
    )
    return Compared((a - b).num_edges(n), (b - a).num_edges(n), (a & b).num_edges(n), cost_a, cost_b)
