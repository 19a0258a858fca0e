"""The answers about a stack in a few lines: what `python -m attngraph show` prints."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attngraph.analysis.causality import is_causal, leak_path, leaks
from attngraph.analysis.costs import cost
from attngraph.analysis.layers import require_known, stack
from attngraph.analysis.reach import diameter, growth
from attngraph.analysis.structure import components
from attngraph.graph.base import Graph, at_size
from attngraph.planning.explain import memory, time

FEW = 1024  # nodes, of which the diameter is found in about a second
SHOWN = 12  # layers whose receptive fields are told


def facts(
    graphs: Graph | Sequence[Graph],
    n: int | None = None,
    *,
    dim: int,
    heads: int,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, str]:
    """What the questions of this module answer, for people; the diameter of few nodes."""
    layers, n = stack(graphs, n)
    for graph in layers:
        require_known(graph)
        at_size(graph, n, n)
    causal = is_causal(layers, n)
    found = cost(layers, n, dim=dim, heads=heads, kv_heads=kv_heads, dtype=dtype, cache=causal, seconds=True)
    told = {
        "layers": f"{len(layers)} of {n:,} nodes; {heads} head{'s' * (heads != 1)} of dimension "
        f"{dim // heads}, {_name(dtype)}",
        "edges": f"{found.edges:,} of all layers, {100 * found.density:.3g}% of all pairs",
        "causal": "yes" if causal else _leaking(layers, n),
    }
    if n:
        sizes = [f"{size:,}" for size in growth(layers, n - 1, n)]
        more = [f"… {sizes[-1]}"] if len(sizes) > SHOWN else []
        told["receptive field"] = f"of node {n - 1:,} after each layer: {', '.join([*sizes[:SHOWN], *more])}"
    sizes = torch.bincount(components(layers, n))
    largest = f", the largest of {int(sizes.max()):,} nodes" if len(sizes) > 1 else ""
    told["components"] = f"{len(sizes):,}{largest}"
    if n <= FEW:
        each = dict.fromkeys(layers)
        told["diameter"] = ", ".join(f"{diameter(graph, n)}" + f" of {graph}" * (len(each) > 1) for graph in each)
    times = found.dense_flops / max(found.flops, 1)
    told["GFLOP"] = (
        f"{_plain(found.flops / 1e9)} forward, of one batch entry; {_plain(times)} times as many on all pairs"
    )
    told["memory"] = f"{memory(found.bytes)} of q, k, v and outputs; layouts of {memory(found.layout_bytes or 0)}"
    told["cache"] = "none, as the future is heard"
    if found.cache_bytes is not None:
        rows = found.cache_bytes // (2 * (dim // heads) * dtype.itemsize)
        told["cache"] = (
            f"{rows:,} keys and values of all layers and heads, {memory(found.cache_bytes)}, at most while {n:,} "
            f"nodes are decoded"
        )
    told["expected"] = f"{time(found.seconds or 0)} for the attention of a forward pass; `explain` tells why"
    return told


def _leaking(layers: Sequence[Graph], n: int) -> str:
    """By which edge and which way the future is heard."""
    layer, key, query = leaks(layers, n)[0]
    way = " → ".join(map(str, leak_path(layers, n)))
    return f"no: in layer {layer} query {query} hears the later key {key}; input to output {way}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: float) -> str:
    """A number of three digits, without an exponent where it is not tiny."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
