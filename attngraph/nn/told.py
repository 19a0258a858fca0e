"""What a model says of its graphs: to those who print it, and to whom its weights are loaded into."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from attngraph.graph.base import Graph
from attngraph.nn.computed import OneGraph, name_of
from attngraph.planning.planner import Plan

LONGEST, MOST = 160, 8  # characters of a graph, and lines of graphs


def short(graph: OneGraph) -> str:
    """A graph as one line; what is cut off is told apart by its hash. That functions are numbered says nothing."""
    graph = graph.graph if isinstance(graph, Plan) else graph
    if not isinstance(graph, Graph):
        return name_of(graph)
    text = re.sub(r", number \d+>", ">", str(graph))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def by_layer(graphs: Sequence[OneGraph]) -> str:
    """Who hears whom, a line for each run of layers that have one graph."""
    return "\n".join(_lines(_texts(graphs)))


def _texts(graphs: Sequence[OneGraph]) -> list[str]:
    texts = {number: short(graph) for number, graph in {id(graph): graph for graph in graphs}.items()}
    return [texts[id(graph)] for graph in graphs]


def _lines(texts: Sequence[str]) -> list[str]:
    lines = []
    starts = [layer for layer, text in enumerate(texts) if layer == 0 or text != texts[layer - 1]]
    for start, stop in zip(starts, [*starts[1:], len(texts)], strict=True):
        several = f"graph of layers {start}–{stop - 1}" if stop - start > 1 else f"graph of layer {start}"
        lines.append(f"{several if len(starts) > 1 else 'graph'}: {texts[start]}")
    more = len(lines) - MOST
    return [*lines[:MOST], f"… and {more} more"] if more > 0 else lines


def tell_graphs(module: nn.Module, name: str) -> None:
    """Its state dict says which graphs the attribute `name` has, and weights of other graphs are warned of.

    They stand in what PyTorch keeps of each module beside the weights: no key, and nothing that loading needs.
    """
    module.register_state_dict_post_hook(partial(_note, name))
    module.register_load_state_dict_pre_hook(partial(_compare, name))


def _note(name: str, module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata["graphs"] = _texts(getattr(module, name))


def _compare(name: str, module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
    theirs, ours = metadata.get("graphs"), _texts(getattr(module, name))
    if isinstance(theirs, list) and theirs != ours:
        one, other = (
            ", ".join([f"of {len(texts)} layer{'s' * (len(texts) > 1)}"] * (len(theirs) != len(ours)) + _lines(texts))
            for texts in (theirs, ours)
        )
        warnings.warn(
            f"weights of a model with other {prefix}{name.lstrip('_')}: theirs, {one}; here, {other}", stacklevel=2
        )
