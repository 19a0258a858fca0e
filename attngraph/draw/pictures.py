"""Pictures of graphs and of attention, with matplotlib, on the axes that are given or on new ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

BLUE, LIGHT, GREY = "#2a5d9f", "#d7e3f2", "#d5d9e0"


@checked
def connectivity(
    graph: Graph, n: int, m: int | None = None, *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """The graph as a picture of its mask: a dark cell where the query of the row hears the key of the column.

    With one graph per head, the darker a cell, the more heads have the edge.
    """
    m = n if m is None else m
    mask = graph.mask(n, m).float()
    ax = _axes((4, 4 * max(n / max(m, 1), 0.3))) if ax is None else ax
    mask = mask.mean(0) if mask.ndim == 3 else mask
    ax.imshow(mask.numpy(), cmap=_blues(), vmin=0, vmax=1, interpolation="nearest")
    _frame(ax, n, m)
    ax.set_title(_wrapped(str(graph) if title is None else title), fontsize=8)
    return ax


@checked
def messages(
    graph: Graph,
    n: int,
    m: int | None = None,
    *,
    node: int | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """The graph as messages: a line from each key, on top, to each query below that hears it.

    With `node`, the messages that this query receives stand out. For graphs of a few dozen nodes.

    Raises:
        ValueError: a node that there is not.
    """
    from matplotlib.collections import LineCollection

    m = n if m is None else m
    if node is not None and not 0 <= node < n:
        raise ValueError(f"node must be one of {n} queries, from 0 on (got {node})")
    key, query = graph.edge_index(n, m).tolist()
    ax = _axes((max(3.0, 0.45 * max(n, m)), 2.4)) if ax is None else ax
    edges = [(k, q, node is None or q == node) for k, q in zip(key, query, strict=True)]
    edges.sort(key=lambda edge: edge[2])  # what stands out is drawn last
    lines = LineCollection(
        [[(k, 1), (q, 0)] for k, q, _ in edges],
        colors=[BLUE if stands_out else GREY for *_, stands_out in edges],
        linewidths=[2 if node is not None and stands_out else 1 for *_, stands_out in edges],
    )
    ax.add_collection(lines)
    for count, height, name in ((m, 1, "keys"), (n, 0, "queries")):
        ax.scatter(range(count), [height] * count, s=130, color="white", edgecolor=BLUE, zorder=3)
        for i in range(count):
            ax.text(i, height, str(i), ha="center", va="center", fontsize=7, zorder=4)
        ax.text(-0.7, height, name, ha="right", va="center", fontsize=8)
    ax.set(xlim=(-2.2, max(n, m) - 0.3), ylim=(-0.25, 1.25))
    ax.set_axis_off()
    ax.set_title(_wrapped(str(graph) if title is None else title, 60), fontsize=8)
    return ax


@checked
def attention(
    weights: Tensor,
    graph: Graph,
    n: int,
    m: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str = "attention weights",
) -> Axes:
    """The weights (E,) of one head, as `attend` returns them, as a picture; white cells are no edges.

    With labels, one for each query, rows carry them; columns carry key_labels, by default the same.
    """
    m = n if m is None else m
    key, query = graph.edge_index(n, m)
    if weights.shape != key.shape:
        raise ValueError(f"weights must have shape ({len(key)},), one for each edge (got {tuple(weights.shape)})")
    key_labels = labels if key_labels is None else key_labels
    for name, given, nodes in (("labels", labels, n), ("key_labels", key_labels, m)):
        if given is not None and len(given) < nodes:
            raise ValueError(f"{name} must name each of {nodes} nodes (got {len(given)})")
    picture = torch.full((n, m), torch.nan)
    picture[query, key] = weights.detach().float().cpu()
    ax = _axes((2.2 + 0.16 * m, 1.4 + 0.16 * n) if labels else (5, 5)) if ax is None else ax
    image = ax.imshow(picture.numpy(), cmap="viridis", vmin=0, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, label="weight")
    _frame(ax, n, m)
    if labels is not None and key_labels is not None:
        ax.set_xticks(range(m), [_visible(label) for label in key_labels[:m]], fontsize=7, family="monospace")
        ax.set_yticks(range(n), [_visible(label) for label in labels[:n]], fontsize=7, family="monospace")
    ax.set_title(_wrapped(title), fontsize=9)
    return ax


@checked
def receptive_field(graphs: Sequence[Graph], node: int, n: int, *, ax: Axes | None = None) -> Axes:
    """Through which nodes of which layer the inputs reach `node`: a row a layer, the output on top."""
    from attngraph import analysis

    rows = [analysis.receptive_field(graphs[depth:], node, n) for depth in range(len(graphs), -1, -1)]
    ax = _axes((6, 0.4 * len(rows) + 1)) if ax is None else ax
    picture = torch.zeros(len(rows), n)
    for row, nodes in enumerate(rows):
        picture[row, nodes] = 1
    ax.imshow(picture.numpy(), cmap=_blues(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(rows)), ["output", *[f"into layer {depth}" for depth in range(len(graphs) - 1, -1, -1)]])
    ax.set_xlabel("node")
    ax.set_title(_wrapped(f"receptive field of node {node}"), fontsize=9)
    return ax


@checked
def save(ax: Axes, path: str | os.PathLike[str]) -> None:
    """Write the picture that holds these axes to a file; its ending says the format."""
    cast("Figure", ax.figure).savefig(path, dpi=150, bbox_inches="tight")


def _axes(size: tuple[float, float]) -> Axes:
    """New axes that belong to no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def _blues() -> LinearSegmentedColormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("edges", ["white", BLUE])


def _frame(ax: Axes, n: int, m: int) -> None:
    ax.set_xlabel("key node")
    ax.set_ylabel("query node")
    for axis, count in ((ax.xaxis, m), (ax.yaxis, n)):
        axis.set_ticks(sorted({0, count // 2, count - 1}) if count > 1 else range(count))
    if max(n, m) <= 32:
        ax.set_xticks([i - 0.5 for i in range(m + 1)], minor=True)
        ax.set_yticks([i - 0.5 for i in range(n + 1)], minor=True)
        ax.grid(which="minor", color=LIGHT, linewidth=0.5)
        ax.tick_params(which="minor", length=0)


def _visible(label: str) -> str:
    return {" ": "␣", "\n": "↵", "\t": "⇥"}.get(label, label).replace("$", r"\$")


def _wrapped(text: str, width: int = 44) -> str:
    from textwrap import fill

    return "\n".join(fill(line, width) for line in text.split("\n"))
