"""A page for a browser: who hears whom in each layer, how far it spreads, what it costs; one file, and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from attngraph.analysis.facts import facts as facts_of
from attngraph.analysis.layers import layers_of, stack
from attngraph.arguments import checked, shown
from attngraph.draw.encoding import MOST_RUNS, as_bytes, encoded, packed
from attngraph.draw.pictures import Names, plain_names_of, writable
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.text import written
from attngraph.planning.explain import time
from attngraph.planning.planner import Plan, plan

MOST_PIXELS = 512  # of an image, along a side
TOP = 16  # keys of each query that are drawn of recorded weights
LONGEST = 4096  # characters of an expression that are shown
SCRIPTS = "engine.js", "state.js", "messages.js", "mask.js", "heads.js", "facts.js", "layers.js", "tour.js", "page.js"
TALL = 620  # CSS pixels of a page in a notebook


class Weights(Protocol):
    """The heaviest attention weights of a layer, as `attngraph.record(model, top=16)` finds them."""

    graph: Graph
    num_queries: int
    num_keys: int
    heads: tuple[int, ...]
    keys: Tensor
    weights: Tensor
    rest: Tensor
    entropy: Tensor
    distance: Tensor


class Page:
    """A page that explains a stack of graphs: a notebook shows it, and `save` writes it. See `page`."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    @property
    def text(self) -> str:
        """What it shows, as far as words go."""
        facts = [f"{name}: {told}" for name, told in self.data.get("facts", ())]
        return "\n".join([self.data["title"], *facts, self.data.get("text", "")]).strip()

    @property
    def html(self) -> str:
        """The whole page, with all that it needs: it asks no network for anything."""
        return filled(self.data, self.text)

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to one file, which any browser opens, also without a network; its path is returned.

        Raises FileNotFoundError for a folder that does not exist, and ValueError for what is no name of a file.
        """
        file = writable(path, "page.html")
        file.write_text(self.html, encoding="utf-8", errors="replace")
        return file

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="{html.escape(self.data["title"][:200])}" sandbox="allow-scripts" loading="lazy" '
            f'style="width:100%;height:{TALL}px;border:1px solid #8a93a0" srcdoc="{html.escape(self.html)}">'
            f"<pre>{html.escape(self.text)}</pre></iframe>"
        )

    def __repr__(self) -> str:
        size = f", {self.data['n']} × {self.data['m']}" if "n" in self.data else ""
        return f"Page({self.data['title']!r}{size})"


@checked
def page(
    graphs: Graph | Sequence[Graph] | None = None,
    n: int | None = None,
    *,
    heads: int | None = None,
    head_dim: int = 64,
    labels: Names | None = None,
    key_labels: Names | None = None,
    recorded: Any = None,
    image: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Page:
    """A page on which a person sees a stack: who hears whom, how far it spreads, where the future leaks, what it costs.

    In the middle are three pictures: *Messages*, rows of nodes before and after each layer, with whom a chosen node
    hears through all of them, and who hears it; the *Mask* of each layer, to zoom; and the *Heads*. Beside them are the
    expressions and the facts of `analysis` and `plan`. `python -m attngraph show` serves the same page to edit.

    The page has the edges themselves, as runs of keys; from 2,000,000 runs on, the share of edges in some cells.

    Args:
        graphs: one graph, or one for each layer; by default those of `recorded`.
        n: how many nodes; may be left out where the graphs know.
        heads: how many heads queries have, for the facts; by default those of the graphs, or 8.
        head_dim: the dimension of each.
        labels: a name for each node, such as its token.
        key_labels: a name for each key, by default the same where there are as many.
        recorded: what `attngraph.record(model, top=16)` has found, or one of it for each layer (of an encoder–decoder
            those of one kind); messages are drawn by the weights of the first entry of the batch.
        image: (height, width) or (channels, height, width), of 1 or 3 channels, of which the last nodes are patches.
        grid: rows and columns of patches, counted row by row; what is before them, as a class node, is no patch.

    >>> page([Causal() & Window(64, 0)] * 11 + [Causal()], 4096)
    Page('layers 0–10: Causal() & Window(64, 0); layer 11: Causal()', 4096 × 4096)
    """
    weights = None if recorded is None else _weights(recorded)
    if weights is not None and graphs is None:
        graphs = [each.graph for each in weights]
    if graphs is None:
        raise ValueError("graphs must be one, or one for each layer, where nothing was recorded (got None)")
    if weights is not None:
        if n not in (None, weights[0].num_queries):
            raise ValueError(f"n must be as many nodes as were recorded, {weights[0].num_queries} (got {n})")
        graphs, n = _as_recorded(layers_of(graphs), weights), weights[0].num_queries
        heads = int(max(max(each.heads) for each in weights)) + 1 if heads is None else heads
    data = data_of(graphs, n, heads=heads, head_dim=head_dim, labels=labels, key_labels=key_labels, weights=weights)
    if image is not None:
        data["image"] = _told_image(image, grid, data["m"])
    return Page(data)


def _weights(recorded: Any) -> list[Weights]:
    """The heaviest weights of each layer."""
    found = list(recorded.values()) if isinstance(recorded, Mapping) else recorded
    found = found if isinstance(found, list | tuple) else [found]
    found = [each.heaviest(TOP) if hasattr(each, "heaviest") else each for each in found]
    if not found or not all(hasattr(each, "entropy") for each in found):
        raise TypeError(f"recorded must be what attngraph.record(model, top=16) has found (got {shown(recorded)})")
    if len({(each.num_queries, each.num_keys) for each in found}) > 1:
        raise ValueError("recorded must be of layers with as many nodes: of an encoder–decoder, those of one kind")
    return found


def _told_image(image: Tensor, grid: tuple[int, int] | None, m: int) -> dict[str, Any]:
    """An image as bytes of red, green and blue, and where in it the nodes are."""
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise ValueError(
            f"image must have shape (height, width) or (channels, height, width) of 1 or 3 (got {tuple(image.shape)})"
        )
    if grid is None or min(grid) < 1 or grid[0] * grid[1] > m:
        raise ValueError(f"grid must be the rows and columns of patches, at most {m} in all (got {grid})")
    every = -(-max(image.shape[1:]) // MOST_PIXELS)
    pixels = image[:, ::every, ::every].detach().double().cpu()
    if not bool(pixels.isfinite().all()):
        raise ValueError("image must be finite numbers (got NaN or infinity)")
    low, high = float(pixels.min()), float(pixels.max())
    pixels = (pixels - low) / max(high - low, 1e-12) * 255
    colors = pixels.expand(3, *pixels.shape[1:]).permute(1, 2, 0).round().to(torch.uint8)
    rgb = base64.b64encode(colors.contiguous().numpy().tobytes()).decode()
    height, width = pixels.shape[1:]
    return {
        "height": height,
        "width": width,
        "rgb": rgb,
        "rows": grid[0],
        "columns": grid[1],
        "before": m - grid[0] * grid[1],
    }


def _as_recorded(layers: Sequence[Graph], weights: Sequence[Weights]) -> list[Graph]:
    """The graphs of the layers that were recorded, in their size."""
    if len(layers) != len(weights):
        raise ValueError(f"graphs must be one for each recorded layer (got {len(layers)} and {len(weights)})")
    n, m = weights[0].num_queries, weights[0].num_keys
    return [graph.sized(n, m) if n != m and None in graph.size else graph for graph in layers]


def data_of(
    graphs: Graph | Sequence[Graph],
    n: int | None = None,
    *,
    heads: int | None = None,
    head_dim: int = 64,
    labels: Names | None = None,
    key_labels: Names | None = None,
    weights: Sequence[Weights] | None = None,
    facts: dict[str, str] | None = None,
    most: int = MOST_RUNS,
) -> dict[str, Any]:
    """What the page is told; without facts, those of `python -m attngraph show`, where there are."""
    layers, n, m = _sizes(graphs, n)
    heads = next((graph.heads for graph in layers if graph.heads), 8) if heads is None else heads
    require_ints(1, heads=heads, head_dim=head_dim)
    names = plain_names_of(n, m, labels, key_labels) or (None, None)
    if facts is None and n == m and not any(graph._unresolved for graph in layers):
        facts = facts_of(layers, n, dim=heads * head_dim, heads=heads)
    facts = {"nodes": f"{n:,} queries × {m:,} keys"} if facts is None else facts
    kinds = list(dict.fromkeys(layers))
    parts = list(dict.fromkeys(part for graph in kinds for part in _heads(graph)))
    return {
        "title": _title(layers),
        "n": n,
        "m": m,
        "heads": heads,
        "head_dim": head_dim,
        "labels": names[0],
        "key_labels": None if names[0] == names[1] else names[1],
        "parts": [encoded(part, n, m, most) for part in parts],
        "graphs": [_told(graph, [parts.index(p) for p in _heads(graph)], n, m, heads, head_dim) for graph in kinds],
        "layers": [kinds.index(graph) for graph in layers],
        "facts": [*facts.items()],
        "recorded": None if weights is None else [_told_weights(each) for each in weights],
    }


def _sizes(graphs: Graph | Sequence[Graph], n: int | None) -> tuple[Sequence[Graph], int, int]:
    """The graphs of a stack, and how many queries and keys they have: as many, but for a graph alone."""
    layers = layers_of(graphs)
    if not layers:
        raise ValueError("graphs must be one for each layer (got an empty list)")
    layers, n = stack(layers, n)
    keys = layers[0].size[1] if len(layers) == 1 and layers[0].size[1] is not None else n
    return layers, n, keys


def _heads(graph: Graph) -> list[Graph]:
    """The graphs of its heads, one where they have the same; none where queries and keys choose them."""
    if graph._unresolved:
        return []
    return [graph.of_head(head) for head in range(graph.heads)] if graph.heads else [graph]


def _told(graph: Graph, parts: list[int], n: int, m: int, heads: int, head_dim: int) -> dict[str, Any]:
    """A graph: its expression, its parts by head, its edges, and what each backend would take."""
    text = written(graph)
    found: dict[str, Any] = {"text": text if len(text) <= LONGEST else str(graph)[:LONGEST], "parts": parts}
    if graph._unresolved:
        return found | {"chosen_by_data": True}
    found["edges"] = [each.num_edges(n, m) for each in _heads(graph)]
    if graph.heads in (None, heads):
        found |= told_of_plan(plan(graph, n, m, heads=heads, head_dim=head_dim))
    return found


def _told_weights(found: Weights) -> dict[str, Any]:
    """The weights of a layer, of the first entry of the batch: each as a byte, a share of 255."""
    heads = [
        {
            "keys": packed(found.keys[0, at].flatten()),
            "weights": as_bytes(found.weights[0, at] * 255),
            "rest": as_bytes(found.rest[0, at] * 255),
            "entropy": float(found.entropy[0, at].mean()),
            "distance": float(found.distance[0, at].mean()),
        }
        for at in range(len(found.heads))
    ]
    return {"numbers": list(found.heads), "top": found.keys.shape[-1], "heads": heads}


def told_of_plan(found: Plan) -> dict[str, Any]:
    """What each backend is expected to take, or why it can't, those that can first; and by what that is known."""
    answers = sorted(found.candidates.items(), key=lambda each: (isinstance(each[1], str), str(each[1])))
    told = [
        (name, answer if isinstance(answer, str) else time(answer), not isinstance(answer, str))
        for name, answer in answers
    ]
    source = f"One forward pass of one batch entry, by {found.costs.source}."
    return {"backends": told, "chosen": [*found.chosen], "source": source}


def _title(layers: Sequence[Graph]) -> str:
    """The expressions of all layers; those that follow each other with the same graph once."""
    texts = [str(graph) for graph in layers]
    starts = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    if len(starts) == 1:
        return texts[0] if len(texts) == 1 else f"{len(texts)} layers of {texts[0]}"
    ends = [*starts[1:], len(texts)]
    runs = [
        f"layer {start}: {texts[start]}" if end == start + 1 else f"layers {start}–{end - 1}: {texts[start]}"
        for start, end in zip(starts, ends, strict=True)
    ]
    return "; ".join(runs)


# ---------------------------------------------------------------------------------------------------- the document


def filled(data: dict[str, Any], text: str = "", connects: bool = False) -> str:
    """The document that shows some data; `connects`: and may ask the server that it comes from."""
    scripts = [f'<script id="script-{name.removesuffix(".js")}">{asset(name)}</script>' for name in SCRIPTS]
    values = {
        "policy": html.escape(policy(connects)),
        "title": html.escape(data.get("title", "attngraph")[:LONGEST]),
        "text": html.escape(text),
        "style": asset("page.css"),
        "scripts": "\n".join(scripts),
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], asset("page.html"))


def policy(connects: bool = False) -> str:
    """The content security policy: its own scripts and style by their hashes, and nothing else."""
    scripts = " ".join(_hash(asset(name)) for name in SCRIPTS)
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_hash(asset('page.css'))}; worker-src blob:; "
        f"connect-src {chr(39)}{'self' if connects else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def asset(name: str) -> str:
    """A file of the page."""
    return files("attngraph.draw").joinpath("assets", name).read_text(encoding="utf-8")
