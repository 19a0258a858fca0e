"""Pictures of graphs and of attention, with matplotlib, on the axes that are given or on new ones."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import groupby
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from attngraph.arguments import checked, shown
from attngraph.draw.cells import PAIRS, Cells, shares
from attngraph.graph.base import Graph, at_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Names = Sequence[object] | Tensor | np.ndarray
"""A name for each node, as a list, an array or a tensor of one dimension."""

BLUE, LIGHT, GREY = "#2a5d9f", "#d7e3f2", "#d5d9e0"


@checked
def connectivity(
    graph: Graph | Sequence[Graph],
    n: int | None = None,
    m: int | None = None,
    *,
    labels: Names | None = None,
    key_labels: Names | None = None,
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
    names = names_of(n, m, labels, key_labels)
    ax = matrix_axes(n, m, names is not None) if ax is None else ax
    show_graph(ax, graph, n, m)
    frame(ax, n, m, names)
    _title(ax, _told_graph(graph) if title is None else title)
    return _figure(ax)


def _layers(
    graphs: Sequence[Graph],
    n: int | None,
    m: int | None,
    labels: Names | None,
    key_labels: Names | None,
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
        told = f"{layers}: {_told_graph(each) if title is None else title}"
        connectivity(each, n, m, labels=labels, key_labels=key_labels, ax=place, title=told)
        first += count
    return _figure(own[0])


@checked
def messages(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    node: object = None,
    weights: Tensor | None = None,
    labels: Names | None = None,
    key_labels: Names | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """The graph as messages: a line from each key, on top, to each query below that hears it.

    For graphs of a few dozen nodes. `labels` and `key_labels` name the nodes, as in `connectivity`.

    Args:
        node: a query, by its number or its name: the messages that it receives stand out.
        weights: how strong each message is, (E,), as `attend` returns the weights of one head: the stronger, the
            darker and wider its line. With `node`, of its messages alone.

    Raises:
        ValueError: a node that there is not; weights that are not one for each edge, or not finite.
    """
    from matplotlib.collections import LineCollection

    from attngraph.draw.figure import LARGEST, families, inches, set_title, visible

    n, m = _size(graph, n, m)
    names = names_of(n, m, labels, key_labels)
    node = None if node is None else _node(node, n, names and names[0], labels)
    key, query = edges = graph.edge_index(n, m)
    stands_out = torch.ones_like(query, dtype=torch.bool) if node is None else query == node
    queries, keys = names or (None, None)
    upright = [0.0 if own is None or all(len(name) <= 2 for name in own) else inches(own) for own in (keys, queries)]
    if ax is None:
        ax = _new_axes(min(LARGEST, max(3.0, 0.45 * max(n, m))), 2.4 + sum(upright))
    lines = torch.stack(
        [torch.stack([key, torch.ones_like(key)], 1), torch.stack([query, torch.zeros_like(key)], 1)], 1
    )
    ax.add_collection(LineCollection(lines[~stands_out].tolist(), colors=GREY, linewidths=1))
    heard = LineCollection(lines[stands_out].tolist(), linewidths=1 if node is None else 2)
    if weights is None:
        heard.set_color(BLUE)
    else:
        values = _weights(weights, edges)[stands_out]
        colors, least, most = _limits(values, _blues())
        heard.set(array=values.numpy(), cmap=colors, clim=(least, most))
        heard.set_linewidth((0.5 + 3 * values.abs() / most).tolist())
    ax.add_collection(heard)  # last, above the others
    for count, height, side, own, room in ((m, 1, "keys", keys, upright[0]), (n, 0, "queries", queries, upright[1])):
        ax.scatter(range(count), [height] * count, s=130, color="white", edgecolor=BLUE, zorder=3)
        for i, name in enumerate([str(number) for number in range(count)] if own is None else own):
            beside, edge = (9, "bottom") if height else (-9, "top")  # upright, of a node that they are too long for
            ax.annotate(
                visible(name), (i, height), (0, beside if room else 0), textcoords="offset points", ha="center",
                va=edge if room else "center", rotation=90 if room else 0, fontsize=7, zorder=4,
                family=families("sans-serif"),
            )  # fmt: skip
        ax.text(-0.7, height, side, ha="right", va="center", fontsize=8)
    ax.set(xlim=(-2.2, max(n, m) - 0.3), ylim=(-0.25, 1.25))
    ax.set_axis_off()
    if weights is not None:
        _bar(ax, heard, "weight")
    set_title(ax, _told_graph(graph) if title is None else title, above=6 + 72 * upright[0])
    return _figure(ax)


def _node(node: object, n: int, names: Sequence[str] | None, labels: Names | None) -> int:
    """The number of a query that is given by its number or by its name among the labels."""
    try:
        number = None if isinstance(node, bool) else index(cast(Any, node))
    except TypeError:
        number = None
    if number is None and names is not None:
        found = [place for place, each in enumerate(names) if each == str(node)]
        if len(found) > 1:
            raise ValueError(f"node must be one node, and {shown(node)} names {len(found)}: give its number")
        number = next(iter(found), None)
    if number is None and (isinstance(node, bool) or not isinstance(node, str | tuple)):
        raise TypeError(f"node must be the number of a query, or its name among labels (got {shown(node)})")
    if number is None or not 0 <= number < n:
        also = "" if labels is None else ", or one of labels"
        raise ValueError(f"node must be one of {n} queries, from 0 on{also} (got {shown(node)})")
    return number


@checked
def attention(
    weights: Tensor,
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    head: int | None = None,
    labels: Names | None = None,
    key_labels: Names | None = None,
    ax: Axes | None = None,
    title: str = "attention weights",
) -> Figure:
    """The weights (E,) of one head, as `attend` returns them, as a picture; white cells are no edges.

    Beyond 128 nodes a cell is several of them, and its colour the mean weight of its edges. `labels` and `key_labels`
    name the nodes, as in `connectivity`.

    Args:
        head: of a graph that differs by head, whose weights these are: its edges alone are shown.

    Raises:
        ValueError: weights that are not one for each edge, or not finite; a head that the graph has not.
    """
    n, m = _size(graph, n, m)
    edges = graph.edge_index(n, m)
    weights = _weights(weights, edges)
    if head is not None and not graph.heads:
        raise ValueError(f"head must be None: all heads have the same edges of {graph}, these weights' (got {head})")
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
    labels: Names | None = None,
    key_labels: Names | None = None,
    ax: Axes | None = None,
    title: str = "attention weights",
) -> Figure:
    """The picture of `attention`, of weights (E,) and their edges (2, E)."""
    names = names_of(n, m, labels, key_labels)
    ax = matrix_axes(n, m, names is not None) if ax is None else ax
    cells = Cells.of(n, m)
    told = "weight" if cells.are_pairs else f"mean weight of the edges in {_told(cells)}"
    _bar(ax, _show_weights(ax, weights, edges, n, m), told)
    frame(ax, n, m, names)
    _title(ax, title)
    return _figure(ax)


Panel = tuple[str, Tensor, Tensor, int, int]
"""A title, edges (2, E), their weights (E,), and how many queries and keys there are."""


def weights_sheet(
    rows: Sequence[Sequence[Panel]], title: str, labels: Names | None = None, key_labels: Names | None = None
) -> Figure:
    """Small pictures of weights in rows, each on a scale of its own, on which the largest 2% are alike."""
    from attngraph.draw.figure import families, fitted, sheet

    is_named = labels is not None or key_labels is not None
    axes = sheet(len(rows), max(map(len, rows), default=1), 3.0 if is_named else 1.5)
    for row, own in zip(rows, axes, strict=True):
        for ax in own[len(row) :]:
            ax.remove()
        for (name, edges, weights, n, m), ax in zip(row, own, strict=False):
            _show_weights(ax, weights, edges, n, m, 0.98)
            ax.set(xticks=[], yticks=[])
            if is_named:
                _set_names(ax, names_of(n, m, labels, key_labels))
            ax.set_title(name, fontsize=7, pad=2)
    figure = _figure(axes[0][0])
    figure.suptitle(fitted(title, figure.get_figwidth()), fontsize=8, family=families("sans-serif"))
    return figure


def _show_weights(ax: Axes, weights: Tensor, edges: Tensor, n: int, m: int, quantile: float = 1.0) -> AxesImage:
    """From 0 to the largest, or to this quantile; what is no edge stays white."""
    key, query = edges.cpu()
    values = Cells.of(n, m).means(query, key, _weights(weights, edges))
    return _image(ax, values, n, m, *_limits(values[~values.isnan()], "viridis", quantile))


def _weights(weights: Tensor, edges: Tensor) -> Tensor:
    """One number for each edge (2, E), to be drawn: float32 (E,) on the CPU; ValueError for what has no colour."""
    if weights.shape != edges.shape[1:]:
        raise ValueError(f"weights must have shape ({edges.shape[1]},), one for each edge (got {tuple(weights.shape)})")
    if wrong := int((~weights.isfinite()).sum()):
        raise ValueError(f"weights must be finite (got {wrong:,} of {len(weights):,} that are NaN or infinite)")
    return weights.detach().float().cpu()


def _limits(values: Tensor, colors: str | Colormap, quantile: float = 1.0) -> tuple[str | Colormap, float, float]:
    """Colours from 0 to the largest value, or to this quantile; where any is negative, from its opposite, grey at 0."""
    is_signed = bool((values < 0).any())
    largest = float(values.abs().quantile(quantile)) if len(values) else 1.0
    largest = largest or float(values.abs().max()) or 1.0
    return ("coolwarm", -largest, largest) if is_signed else (colors, 0.0, largest)


@checked
def explanation(
    explanation: Any,
    *,
    labels: Names | None = None,
    key_labels: Names | None = None,
    ax: Axes | None = None,
    title: str = "what explains the result",
) -> Figure:
    """How much each edge counts in an `Explanation` of PyG, its `edge_mask`, as a picture like that of `attention`.

    Args:
        explanation: also what its `get_explanation_subgraph()` gives; of a `HeteroExplanation`, one type of edges:
            ``explanation["author", "writes", "paper"]``.
        labels: a name for each target.
        key_labels: a name for each source, by default the same where there are as many.

    Raises:
        TypeError: what has no `edge_mask`.
    """
    edges, mask = (getattr(explanation, name, None) for name in ("edge_index", "edge_mask"))
    if not (isinstance(edges, Tensor) and isinstance(mask, Tensor)):
        raise TypeError(
            f"explanation must have an edge_index and an edge_mask (got {shown(explanation)}): make the Explainer with "
            'edge_mask_type="object"; of a HeteroExplanation, give one type of edges'
        )
    m, n = explanation.size()
    mask = _weights(mask, edges)
    return weights_of_edges(mask, edges, n, m, labels=labels, key_labels=key_labels, ax=ax, title=title)


@checked
def receptive_field(
    graphs: Graph | Sequence[Graph],
    node: object,
    n: int | None = None,
    *,
    labels: Names | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """Through which nodes of which layer the inputs reach `node`: a row a layer, the output on top.

    Args:
        graphs: one graph, or one for each layer.
        node: its number, or its name among `labels`.
        n: how many nodes there are; by default what a layer knows.
        labels: names for the nodes.
    """
    from attngraph import analysis
    from attngraph.analysis.layers import stack
    from attngraph.draw.figure import LARGEST, inches, set_names

    graphs, n = stack(graphs, n)
    names = names_of(n, n, labels, None)
    node = _node(node, n, names and names[1], labels)
    rows = [analysis.receptive_field(graphs[depth:], node, n) for depth in range(len(graphs), -1, -1)]
    if ax is None:
        room = 0.0 if names is None else inches(names[1])
        ax = _new_axes(6, min(LARGEST, max(0.4 * len(rows) + 1, 0.25 * len(rows) + 1.4 + room)))
    cells = Cells.of(1, n)
    picture = [cells.sums(torch.zeros_like(nodes), nodes) / cells.areas for nodes in rows]
    reached = torch.cat(picture)
    image = _image(ax, reached.masked_fill(reached == 0, torch.nan), len(rows), n, _blues(), 0.0, 1.0)
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
    """Write a figure, or the one that holds these axes, to a file; its ending says the format.

    Raises:
        TypeError: something that is no picture, as a graph is none.
        FileNotFoundError: a folder that does not exist.
        ValueError: a path that is a folder, or no name of a file.
    """
    from attngraph.draw.figure import DPI, is_picture

    if not is_picture(picture):
        raise TypeError(f"picture must be a figure or axes, as draw.connectivity makes it (got {shown(picture)})")
    file = writable(path, "graph.png")
    cast("Figure", picture.figure.figure).savefig(file, dpi=DPI, bbox_inches="tight")


def writable(path: str | os.PathLike[str], example: str) -> Path:
    """The path of a file that can be written, as of this example; or FileNotFoundError or ValueError."""
    file = Path(path)
    if file.is_dir() or (file.name.startswith(".") and not file.suffix):
        raise ValueError(f"path must be that of a file, such as {example} (got {os.fspath(path)!r})")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists: there is no {str(file.parent)!r}")
    return file


# ------------------------------------------------------------------------------------------------------- what is shown


def _size(graph: Graph, n: int | None, m: int | None) -> tuple[int, int]:
    """What is asked for, or the graph's own; as many keys as queries where neither says."""
    n = graph.size[0] if n is None else n
    if n is None:
        raise ValueError(f"give the number of nodes to draw, n: {graph} fits any")
    m = graph.size[1] if m is None else m
    return at_size(graph, n, n if m is None else m)[1:]


def _told_graph(graph: Graph) -> str:
    """The expression, with the number of edges for those that are listed, not a hash of them."""
    return re.sub(r"EdgeList\(<([\d,]+ edges?), \w+>(, size=\([^()]*\))?\)", r"\1", str(graph))


def names_of(n: int, m: int, labels: Names | None, key_labels: Names | None) -> tuple[list[str], list[str]] | None:
    """The names of queries and of keys as they can be drawn, if there are any; ValueError if they are too few."""
    from attngraph.draw.figure import drawable

    found = plain_names_of(n, m, labels, key_labels)
    if found is None:
        return None
    names = drawable([*found[0], *found[1]])
    return names[:n], names[n:]


def plain_names_of(
    n: int, m: int, labels: Names | None, key_labels: Names | None
) -> tuple[list[str], list[str]] | None:
    """The same as they were given."""
    if labels is None and key_labels is None:
        return None
    key_labels = labels if key_labels is None and labels is not None and len(labels) >= m else key_labels
    found = []
    for name, given, nodes in (("labels", labels, n), ("key_labels", key_labels, m)):
        if isinstance(given, Tensor | np.ndarray):
            if given.ndim != 1:
                raise ValueError(f"{name} must have one dimension (got shape {tuple(given.shape)})")
            given = given.tolist()
        if given is not None and len(given) < nodes:
            raise ValueError(f"{name} must name each of {nodes} nodes (got {len(given)})")
        found.append([str(each) for each in (range(nodes) if given is None else given)][:nodes])
    return found[0], found[1]


def show_graph(ax: Axes, graph: Graph, n: int, m: int, pairs: int = PAIRS) -> None:
    """The share of edges in each cell, from a sample where there are more pairs than these; and what that means."""
    cells = Cells.of(n, m)
    values, is_empty, is_exact = shares(graph, cells, pairs)
    largest = 1.0 if cells.are_pairs else float(values.max()) or 1.0
    image = _image(ax, values.masked_fill(is_empty, torch.nan), n, m, _blues(), 0.0, largest)
    if not cells.are_pairs:
        heads = ", all heads" if graph.heads else ""
        _bar(ax, image, f"share of edges in {_told(cells)}{heads}{'' if is_exact else ', sampled'}")
    elif graph.heads:
        _bar(ax, image, f"share of {graph.heads} heads")


def _told(cells: Cells) -> str:
    return f"cells of {cells.height:,} × {cells.width:,}"


def _image(ax: Axes, values: Tensor, n: int, m: int, colors: str | Colormap, vmin: float, vmax: float) -> AxesImage:
    """Cells of n × m nodes; NaN is white."""
    values = values if values.numel() else torch.full((1, 1), torch.nan)
    extent = (-0.5, max(m, 1) - 0.5, max(n, 1) - 0.5, -0.5)
    image = ax.imshow(
        values.numpy(force=True), cmap=colors, vmin=vmin, vmax=vmax, extent=extent, interpolation="nearest",
        aspect="equal" if n <= 4 * m and m <= 4 * n else "auto",
    )  # fmt: skip
    ax.set_facecolor("white")
    return image


def _bar(ax: Axes, image: ScalarMappable, label: str) -> None:
    from attngraph.draw.figure import bar

    bar(ax, image, label)


def frame(ax: Axes, n: int, m: int, names: tuple[list[str], list[str]] | None = None) -> None:
    """Axes of queries and keys, and lines between cells of a small picture."""
    ax.set_xlabel("key node")
    ax.set_ylabel("query node")
    if max(n, m) <= 32:
        ax.set_xticks([i - 0.5 for i in range(m + 1)], minor=True)
        ax.set_yticks([i - 0.5 for i in range(n + 1)], minor=True)
        ax.grid(which="minor", color=LIGHT, linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    if names is not None:
        _set_names(ax, names)
        return
    for axis, count in ((ax.xaxis, m), (ax.yaxis, n)):
        axis.set_ticks(sorted({0, count // 2, count - 1}) if count > 1 else range(count))


def _set_names(ax: Axes, names: tuple[list[str], list[str]] | None) -> None:
    from attngraph.draw.figure import set_names

    for axis, own in zip((ax.yaxis, ax.xaxis), names or (), strict=False):
        set_names(ax, axis, own)


def matrix_axes(n: int, m: int, named: bool) -> Axes:
    """New axes for a matrix of this shape, large enough for names."""
    from attngraph.draw.figure import INCHES_PER_NAME, LARGEST

    if named:
        sides = [INCHES_PER_NAME * max(count, 8) for count in (n, m)]
    else:
        sides = [4 * min(max(count / max(n, m, 1), 0.3), 1) for count in (n, m)]
    height, width = (min(side, LARGEST) for side in sides)
    return _new_axes(width + 2.2, height + 1.4) if named else _new_axes(max(width + 0.6, 2.8), height + 0.6)


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
