"""Pictures of graphs and of attention, with matplotlib, on the axes that are given or on new ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.draw.cells import PAIRS, Cells, shares
from attngraph.graph.base import Graph, at_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BLUE, LIGHT, GREY = "#2a5d9f", "#d7e3f2", "#d5d9e0"


@checked
def connectivity(
    graph: Graph | Sequence[Graph],
    n: int | None = None,
    m: int | None = None,
    *,
    labels: Sequence[object] | None = None,
    key_labels: Sequence[object] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """The graph as a picture of its mask: a dark cell where the query of the row hears the key of the column.

    With one graph per head, the darker a cell, the more heads have the edge. Beyond 128 nodes a cell is several of
    them, and its colour the share of its pairs that are edges, as the bar says; white is no edge at all. The shares are
    exact wherever closed forms give them; else, of very large graphs, they are found from a sample, and a cell that is
    not known to be empty is not white.

    Args:
        graph: one graph, or one for each layer: layers that follow each other with the same graph are one picture.
        n, m: queries and keys; by default the graph's own, and as many keys as queries.
        labels: a name for each query, as tokens or the names of a networkx graph.
        key_labels: a name for each key, by default the same where there are as many.
        ax: matplotlib's axes to draw on; by default those of a new figure.
        title: by default the expression.

    Returns:
        the figure, which a notebook shows and `save` writes.
    """
    if not isinstance(graph, Graph):
        return _layers(graph, n, m, labels, key_labels, ax, title)
    n, m = _size(graph, n, m)
    names = _names(n, m, labels, key_labels)
    ax = matrix_axes(n, m, names is not None) if ax is None else ax
    show_graph(ax, graph, n, m)
    frame(ax, n, m, names)
    _title(ax, str(graph) if title is None else title)
    return _figure(ax)


def _layers(
    graphs: Sequence[Graph],
    n: int | None,
    m: int | None,
    labels: Sequence[object] | None,
    key_labels: Sequence[object] | None,
    ax: Axes | None,
    title: str | None,
) -> Figure:
    """A sheet with a picture of each layer that differs from the one before."""
    from attngraph.draw.figure import wrapped_sheet

    for each in graphs:
        if not isinstance(each, Graph):
            raise TypeError(f"graph must be a graph, or one for each layer (got {shown(each)} among them)")
    if not graphs:
        raise ValueError("graph must be a graph, or one for each layer (got an empty list)")
    runs = [(each, len(list(same))) for each, same in groupby(graphs)]
    if ax is not None and len(runs) > 1:
        raise ValueError(f"ax takes the picture of one graph (got {len(runs)} that differ)")
    first, own = 0, [ax] if ax is not None else wrapped_sheet(len(runs), 3.6)
    for (each, count), place in zip(runs, own, strict=True):
        layers = f"layer {first}" if count == 1 else f"layers {first}–{first + count - 1}"
        told = f"{layers}: {each if title is None else title}"
        connectivity(each, n, m, labels=labels, key_labels=key_labels, ax=place, title=told)
        first += count
    return _figure(own[0])


@checked
def messages(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    node: int | None = None,
    labels: Sequence[object] | None = None,
    key_labels: Sequence[object] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """The graph as messages: a line from each key, on top, to each query below that hears it.

    With `node`, the messages that this query receives stand out. For graphs of a few dozen nodes. `labels` and
    `key_labels` name the nodes, as in `connectivity`.

    Raises:
        ValueError: a node that there is not.
    """
    from matplotlib.collections import LineCollection

    from attngraph.draw.figure import LARGEST, set_title, visible

    n, m = _size(graph, n, m)
    if node is not None and not 0 <= node < n:
        raise ValueError(f"node must be one of {n} queries, from 0 on (got {node})")
    names = _names(n, m, labels, key_labels)
    key, query = graph.edge_index(n, m).tolist()
    if ax is None:
        ax = _new_axes(min(LARGEST, max(3.0, 0.45 * max(n, m))), 2.4)
    edges = [(k, q, node is None or q == node) for k, q in zip(key, query, strict=True)]
    edges.sort(key=lambda edge: edge[2])  # what stands out is drawn last
    lines = LineCollection(
        [[(k, 1), (q, 0)] for k, q, _ in edges],
        colors=[BLUE if stands_out else GREY for *_, stands_out in edges],
        linewidths=[2 if node is not None and stands_out else 1 for *_, stands_out in edges],
    )
    ax.add_collection(lines)
    queries, keys = names or (None, None)
    longest = 0
    for count, height, side, own in ((m, 1, "keys", keys), (n, 0, "queries", queries)):
        ax.scatter(range(count), [height] * count, s=130, color="white", edgecolor=BLUE, zorder=3)
        shown_names = [str(node) for node in range(count)] if own is None else own
        inside = own is None or all(len(name) <= 2 for name in own)
        if not inside and height:
            longest = max(len(visible(name)) for name in shown_names)
        for i, name in enumerate(shown_names):
            if inside:
                ax.text(i, height, visible(name), ha="center", va="center", fontsize=7, zorder=4)
            else:  # upright, beside the node that they are too long for
                beside, edge = (9, "bottom") if height else (-9, "top")
                ax.annotate(
                    visible(name), (i, height), (0, beside), textcoords="offset points", ha="center", va=edge,
                    rotation=90, fontsize=7,
                )  # fmt: skip
        ax.text(-0.7, height, side, ha="right", va="center", fontsize=8)
    ax.set(xlim=(-2.2, max(n, m) - 0.3), ylim=(-0.25, 1.25))
    ax.set_axis_off()
    set_title(ax, str(graph) if title is None else title, above=6 + 0.6 * 7 * longest)
    return _figure(ax)


@checked
def attention(
    weights: Tensor,
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    head: int | None = None,
    labels: Sequence[object] | None = None,
    key_labels: Sequence[object] | None = None,
    ax: Axes | None = None,
    title: str = "attention weights",
) -> Figure:
    """The weights (E,) of one head, as `attend` returns them, as a picture; white cells are no edges.

    Beyond 128 nodes a cell is several of them, and its colour the mean weight of its edges. `labels` and `key_labels`
    name the nodes, as in `connectivity`.

    Args:
        head: of a graph that differs by head, whose weights these are: its edges alone are shown.
    """
    n, m = _size(graph, n, m)
    edges = graph.edge_index(n, m)
    if weights.shape != edges.shape[1:]:
        raise ValueError(f"weights must have shape ({edges.shape[1]},), one for each edge (got {tuple(weights.shape)})")
    if graph.heads and head is None:
        raise ValueError(f"head must say which of the graph's {graph.heads} heads has these weights (got None)")
    if head is not None:
        edges, weights = of_head(edges, weights, graph, head)
    return weights_of_edges(weights, edges, n, m, labels=labels, key_labels=key_labels, ax=ax, title=title)


def of_head(edges: Tensor, weights: Tensor, graph: Graph, head: int) -> tuple[Tensor, Tensor]:
    """Of the edges (2, E) that any head has, and a head's weights (E,), those of this head's own graph."""
    if not graph.heads:
        return edges, weights
    if not 0 <= head < graph.heads:
        raise ValueError(f"head must be from 0 to {graph.heads - 1} (got {head})")
    inside = graph._head(head).contains(edges[1], edges[0])
    return edges[:, inside], weights[inside.to(weights.device)]


def weights_of_edges(
    weights: Tensor,
    edges: Tensor,
    n: int,
    m: int,
    *,
    labels: Sequence[object] | None = None,
    key_labels: Sequence[object] | None = None,
    ax: Axes | None = None,
    title: str = "attention weights",
) -> Figure:
    """The picture of `attention`, of weights (E,) and their edges (2, E)."""
    names = _names(n, m, labels, key_labels)
    ax = matrix_axes(n, m, names is not None) if ax is None else ax
    cells = Cells.of(n, m)
    told = "weight" if cells.are_pairs else f"mean weight of the edges in {_told(cells)}"
    _bar(ax, _show_weights(ax, weights, edges, n, m), told)
    frame(ax, n, m, names)
    _title(ax, title)
    return _figure(ax)


Panel = tuple[str, Tensor, Tensor, int, int]
"""A title, edges (2, E), their weights (E,), and how many queries and keys there are."""


def weights_sheet(rows: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Small pictures of weights in rows, each on a scale of its own, on which the largest 2% are alike."""
    from attngraph.draw.figure import fitted, sheet

    axes = sheet(len(rows), max(map(len, rows)), 1.5)
    for row, own in zip(rows, axes, strict=True):
        for ax in own[len(row) :]:
            ax.remove()
        for (name, edges, weights, n, m), ax in zip(row, own, strict=False):
            _show_weights(ax, weights, edges, n, m, 0.98)
            ax.set(xticks=[], yticks=[])
            ax.set_title(name, fontsize=7, pad=2)
    figure = _figure(axes[0][0])
    figure.suptitle(fitted(title, figure.get_figwidth()), fontsize=8)
    return figure


def _show_weights(ax: Axes, weights: Tensor, edges: Tensor, n: int, m: int, quantile: float = 1.0) -> AxesImage:
    """From 0 to the largest, or to this quantile; what is no edge stays white."""
    key, query = edges.cpu()
    values = Cells.of(n, m).means(query, key, weights.detach().float().cpu())
    known = values[~values.isnan()]
    vmax = float(known.quantile(quantile)) if len(known) else 1.0
    return _image(ax, values, n, m, "viridis", vmax or 1.0)


@checked
def receptive_field(
    graphs: Sequence[Graph],
    node: int,
    n: int,
    *,
    labels: Sequence[object] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Through which nodes of which layer the inputs reach `node`: a row a layer, the output on top.

    `labels` are names for the nodes.
    """
    from attngraph import analysis
    from attngraph.draw.figure import LARGEST, set_names

    rows = [analysis.receptive_field(graphs[depth:], node, n) for depth in range(len(graphs), -1, -1)]
    names = _names(n, n, labels, None)
    if ax is None:
        ax = _new_axes(6, min(LARGEST, 0.4 * len(rows) + 1))
    cells = Cells.of(1, n)
    picture = [cells.sums(torch.zeros_like(nodes), nodes) / cells.areas for nodes in rows]
    reached = torch.cat(picture)
    image = _image(ax, reached.masked_fill(reached == 0, torch.nan), len(rows), n, _blues(), 1.0)
    if not cells.are_pairs:
        _bar(ax, image, f"share of {cells.width} nodes")
    ax.set_aspect("auto")
    told = ["output", *[f"into layer {depth}" for depth in range(len(graphs) - 1, -1, -1)]]
    set_names(ax, ax.yaxis, told, fontsize=8)
    if names is not None:
        set_names(ax, ax.xaxis, names[1])
    ax.set_xlabel("node")
    own = str(node) if names is None else f"{names[1][node]} ({node})"
    _title(ax, f"receptive field of node {own}" if title is None else title)
    return _figure(ax)


@checked
def set_title(ax: Axes, text: str) -> None:
    """A title that fits: wrapped at the width of the axes, and cut after a few lines."""
    _title(ax, text)


@checked
def save(picture: Figure | Axes, path: str | os.PathLike[str]) -> None:
    """Write a figure, or the one that holds these axes, to a file; its ending says the format."""
    from attngraph.draw.figure import DPI

    cast("Figure", picture.figure.figure).savefig(path, dpi=DPI, bbox_inches="tight")


# ------------------------------------------------------------------------------------------------------- what is shown


def _size(graph: Graph, n: int | None, m: int | None) -> tuple[int, int]:
    """What is asked for, or the graph's own; as many keys as queries where neither says."""
    n = graph.size[0] if n is None else n
    if n is None:
        raise ValueError(f"give the number of nodes to draw, n: {graph} fits any")
    m = graph.size[1] if m is None else m
    return at_size(graph, n, n if m is None else m)[1:]


def _names(
    n: int, m: int, labels: Sequence[object] | None, key_labels: Sequence[object] | None
) -> tuple[list[str], list[str]] | None:
    """The names of queries and of keys, if there are any; ValueError if they are too few."""
    if labels is None and key_labels is None:
        return None
    key_labels = labels if key_labels is None and labels is not None and len(labels) >= m else key_labels
    found = []
    for name, given, nodes in (("labels", labels, n), ("key_labels", key_labels, m)):
        if given is not None and len(given) < nodes:
            raise ValueError(f"{name} must name each of {nodes} nodes (got {len(given)})")
        found.append([str(each) for each in (range(nodes) if given is None else given)][:nodes])
    return found[0], found[1]


def show_graph(ax: Axes, graph: Graph, n: int, m: int, pairs: int = PAIRS) -> None:
    """The share of edges in each cell, from a sample where there are more pairs than these; and what that means."""
    cells = Cells.of(n, m)
    values, is_empty, is_exact = shares(graph, cells, pairs)
    largest = 1.0 if cells.are_pairs else float(values.max()) or 1.0
    image = _image(ax, values.masked_fill(is_empty, torch.nan), n, m, _blues(), largest)
    if not cells.are_pairs:
        heads = ", all heads" if graph.heads else ""
        _bar(ax, image, f"share of edges in {_told(cells)}{heads}{'' if is_exact else ', sampled'}")
    elif graph.heads:
        _bar(ax, image, f"share of {graph.heads} heads")


def _told(cells: Cells) -> str:
    return f"cells of {cells.height} × {cells.width}"


def _image(ax: Axes, values: Tensor, n: int, m: int, colors: str | Colormap, vmax: float) -> AxesImage:
    """Cells of n × m nodes; NaN is white."""
    values = values if values.numel() else torch.full((1, 1), torch.nan)
    extent = (-0.5, max(m, 1) - 0.5, max(n, 1) - 0.5, -0.5)
    image = ax.imshow(
        values.numpy(force=True), cmap=colors, vmin=0, vmax=vmax, extent=extent, interpolation="nearest",
        aspect="equal" if n <= 4 * m and m <= 4 * n else "auto",
    )  # fmt: skip
    ax.set_facecolor("white")
    return image


def _bar(ax: Axes, image: AxesImage, label: str) -> None:
    from attngraph.draw.figure import bar

    bar(ax, image, label)


def frame(ax: Axes, n: int, m: int, names: tuple[list[str], list[str]] | None = None) -> None:
    """Axes of queries and keys, and lines between cells of a small picture."""
    from attngraph.draw.figure import set_names

    ax.set_xlabel("key node")
    ax.set_ylabel("query node")
    if max(n, m) <= 32:
        ax.set_xticks([i - 0.5 for i in range(m + 1)], minor=True)
        ax.set_yticks([i - 0.5 for i in range(n + 1)], minor=True)
        ax.grid(which="minor", color=LIGHT, linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    if names is not None:
        set_names(ax, ax.yaxis, names[0])
        set_names(ax, ax.xaxis, names[1])
        return
    for axis, count in ((ax.xaxis, m), (ax.yaxis, n)):
        axis.set_ticks(sorted({0, count // 2, count - 1}) if count > 1 else range(count))


def matrix_axes(n: int, m: int, named: bool) -> Axes:
    """New axes for a matrix of this shape, large enough for names."""
    from attngraph.draw.figure import INCHES_PER_NAME, LARGEST

    if named:
        sides = [INCHES_PER_NAME * max(count, 8) for count in (n, m)]
    else:
        sides = [4 * min(max(count / max(n, m, 1), 0.3), 1) for count in (n, m)]
    height, width = (min(side, LARGEST) for side in sides)
    return _new_axes(width + (2.2 if named else 0.6), height + (1.4 if named else 0.6))


def _new_axes(width: float, height: float) -> Axes:
    from attngraph.draw.figure import new_axes

    return new_axes(width, height)


def _title(ax: Axes, text: str) -> None:
    from attngraph.draw.figure import set_title

    set_title(ax, text)


def _figure(ax: Axes) -> Figure:
    from attngraph.draw.figure import root

    return root(ax)


def _blues() -> Colormap:
    """From what is just visible, as white is no edge."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("edges", [LIGHT, BLUE])
