"""Attention weights of a model while it runs: who heard whom, how much, in which layer and head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.draw import notebook
from attngraph.draw.pictures import Names, of_head, weights_of_edges, weights_sheet
from attngraph.graph.base import Graph
from attngraph.graph.positions import query_offset
from attngraph.nn.attention import Attention
from attngraph.nn.heaviest import Heaviest, Rows, heaviest_rows, require_top, rows_of, without_padding
from attngraph.nn.padding import rolled
from attngraph.nn.transformer import Block, Transformer
from attngraph.packing import entries_of
from attngraph.planning.planner import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Recorded:
    """The weights of one `Attention` of a model, as its latest call had them.

    `of` and `draw` number nodes by their places in the model's input. So do `edge_index` and the masks, but for a batch
    that is padded in front, in a model whose graphs fit any size: there each row's numbers count from its first real
    node, as in the graph, and `key_places` and `query_places` have the places. Where each entry of a batch has a graph
    of its own, they are one, as in `Batched`: its nodes are those of all entries, one after the other.
    """

    name: str
    """Of the module in the model, such as "transformer.layers.0.attention"."""
    layer: int
    """The number of the layer, from 0."""
    graph: Graph
    """Who may hear whom; of a graph that queries and keys choose, that of this call, as `graph.resolve` gives it."""
    num_queries: int
    num_keys: int
    heads: tuple[int, ...]
    """Which heads were recorded."""
    weights: Tensor
    """(B, heads, E), in the order of `edge_index`, before dropout. Of a graph that differs by head, 0 where a head has
    no such edge; 0 for keys that are padding."""
    attention_mask: Tensor | None = None
    """Which keys of each batch entry are no padding: bool (B, num_keys)."""
    query_mask: Tensor | None = None
    """The same of the queries, where these are the keys, or the last of them: bool (B, num_queries)."""
    key_places: Tensor | None = None
    """Of each batch entry, where in the input each key of `edge_index` is: int64 (B, num_keys); None if it is there."""
    query_places: Tensor | None = None
    """The same of the queries: int64 (B, num_queries)."""

    @cached_property
    def edge_index(self) -> Tensor:
        """The edges, int64 (2, E): row 0 the key, row 1 the query; where heads differ, those of any of them."""
        return self.graph.edge_index(self.num_queries, self.num_keys)

    @checked
    def of(self, head: int, batch: int = 0) -> tuple[Tensor, Tensor]:
        """Of one head and one entry of the batch, its own edges (2, E) and their weights (E,), without padding.

        Nodes have the numbers of their places in the input.
        """
        if not len(self.weights):
            raise ValueError("batch must have an entry to look at (got an empty batch)")
        if head not in self.heads:
            raise ValueError(f"head must be one of those that were recorded, {_listed(self.heads)} (got {head})")
        if not 0 <= batch < len(self.weights):
            raise ValueError(f"batch must be from 0 to {len(self.weights) - 1} (got {batch})")
        weights = self.weights[batch, self.heads.index(head)]
        edges, weights = of_head(self.edge_index, weights, self.graph, head)
        real = torch.ones_like(edges[0], dtype=torch.bool)
        for mask, nodes in ((self.attention_mask, edges[0]), (self.query_mask, edges[1])):
            if mask is not None:
                real &= mask[batch].to(nodes.device)[nodes]
        key, query = (
            nodes[real] if places is None else places[batch].to(nodes.device)[nodes[real]]
            for nodes, places in zip(edges, (self.key_places, self.query_places), strict=True)
        )
        return torch.stack([key, query]), weights[real.to(weights.device)]

    @checked
    def heaviest(self, top: int = 16) -> Heaviest:
        """The heaviest keys of each query, as `record(model, top=…)` finds them at once."""
        require_top(top, False)
        by_entry = [
            [self._heaviest_rows(head, batch, top) for head in self.heads] for batch in range(len(self.weights))
        ]
        rows = Rows(*(
            torch.cat([torch.cat([getattr(head, name) for head in entry], 1) for entry in by_entry])
            for name in Rows._fields
        ))  # fmt: skip
        return Heaviest(self.name, self.layer, self.graph, self.num_queries, self.num_keys, self.heads, *rows)

    def _heaviest_rows(self, head: int, batch: int, top: int) -> Rows:
        (key, query), weights = self.of(head, batch)
        order = query.argsort(stable=True)
        return rows_of(key[order], query[order], weights.detach()[order][None, None], self.num_queries, 0, top)

    @checked
    def draw(
        self,
        head: int | None = None,
        *,
        batch: int = 0,
        labels: Names | None = None,
        key_labels: Names | None = None,
        title: str | None = None,
    ) -> Figure:
        """A picture of one head, as `attngraph.draw.attention` makes it; by default a sheet of all recorded heads."""
        if head is None:
            title = f"{self.name}, layer.head ({SCALES})" if title is None else title
            return _sheet([self], batch, title, labels, key_labels)
        edges, weights = self.of(head, batch)
        return weights_of_edges(
            weights, edges, self.num_queries, self.num_keys, labels=labels, key_labels=key_labels,
            title=f"{self.name}, head {head}" if title is None else title,
        )  # fmt: skip

    def __repr__(self) -> str:
        batch, heads, edges = self.weights.shape
        size = f"{self.num_queries} × {self.num_keys}"
        return f"Recorded({self.name!r}, {self.graph}, {size}: {batch} × {heads} heads × {edges:,} edges)"

    def _repr_html_(self) -> str:
        facts = {
            "layer": f"{self.layer}, {self.name}",
            "heads": _listed(self.heads),
            "nodes": f"{self.num_queries:,} queries × {self.num_keys:,} keys, a batch of {len(self.weights)}",
            "edges": f"{self.weights.shape[-1]:,}",
            "weights": f"{tuple(self.weights.shape)}, {self.weights.dtype}",
        }
        return notebook.page(str(self.graph), facts, self.draw() if _is_quick([self]) else None)


class Recording(Mapping[str, Any]):
    """What `record` has found: a `Recorded` for each `Attention` that ran, by the name of its module or its layer; with
    `top`, a `Heaviest`."""

    def __init__(self, layers: dict[str, int]):
        self._layers, self._found = layers, dict[str, Any]()

    def __getitem__(self, layer: int | str) -> Any:
        """Of a layer, by its number (from the end where it is negative) or the name of its `Attention`.

        Raises KeyError for what was not recorded, and for a number of several: an encoder–decoder has three of each;
        TypeError for what is neither a number nor a name.
        """
        if isinstance(layer, str):
            names = [layer] if layer in self._found else []
        else:
            if isinstance(layer, bool) or not hasattr(layer, "__index__"):
                raise TypeError(f"layer must be the number of a layer or the name of a module (got {shown(layer)})")
            layer = index(layer)
            number = layer + 1 + max(self._layers.values()) if layer < 0 else layer
            names = [name for name in self._found if self._layers[name] == number]
        if len(names) == 1:
            return self._found[names[0]]
        if names:
            raise KeyError(f"layer {layer} has several, ask for one by its name: {', '.join(names)}")
        if not self._found:
            raise KeyError("nothing was recorded: run the model inside `with record(model) as recorded:`")
        raise KeyError(f"{layer!r} was not recorded, but {', '.join(self._found)}")

    def _keeper(
        self, name: str, heads: tuple[int, ...] | None, gradients: bool, moved: _Moved | None
    ) -> Callable[..., None]:
        """What puts the weights of a module here, as it is told them."""

        def keep(weights: Tensor, graph: Graph | Plan, x: Tensor, memory: Tensor, mask: Tensor | None) -> None:
            if x.ndim == 2:  # one entry
                weights, mask = weights[None], mask if mask is None else mask[None]
            if heads is not None:
                weights = weights[:, list(heads)]
            n, m = x.shape[-2], memory.shape[-2]
            entries = entries_of(graph)
            if entries is not None and x.ndim == 3 and len(x) == entries:  # it is one graph, of the nodes of all
                n, m, mask = entries * n, entries * m, mask if mask is None else mask.flatten()[None]
            hears_itself = memory is x or (moved is not None and moved.hears_itself)
            query_places = None if moved is None else moved.places(n)
            key_places = None
            if hears_itself and query_places is not None:  # the last keys are the queries
                before = torch.arange(m - n, device=query_places.device).expand(len(query_places), -1)
                key_places = torch.cat([before, query_places + (m - n)], 1)
            self._found[name] = Recorded(
                name=name,
                layer=self._layers[name],
                graph=graph.graph if isinstance(graph, Plan) else graph,
                num_queries=n,
                num_keys=m,
                heads=tuple(range(weights.shape[1])) if heads is None else heads,
                weights=weights if gradients else weights.detach(),
                attention_mask=mask,
                query_mask=mask[:, m - n :] if mask is not None and hears_itself else None,
                key_places=key_places,
                query_places=query_places,
            )

        return keep

    def _keep_heaviest(
        self,
        name: str,
        rows: Rows,
        graph: Graph | Plan,
        num_keys: int,
        heads: tuple[int, ...] | None,
        moved: _Moved | None,
    ) -> None:
        """Put the heaviest weights of a module here, by the places of nodes in the input."""
        places = None if moved is None else moved.places(rows.rest.shape[-1])
        if places is not None and moved is not None:
            keys = rows.keys
            if moved.hears_itself:
                at = places[:, None, None].expand(*keys.shape[:3], -1).gather(-1, keys.clamp(min=0))
                keys = at.where(keys >= 0, -1)
            back = places.argsort(-1)[:, None]
            rows = Rows(*(_reordered(column, back) for column in rows._replace(keys=keys)))
        self._found[name] = Heaviest(
            name, self._layers[name], graph.graph if isinstance(graph, Plan) else graph, rows.rest.shape[-1], num_keys,
            tuple(range(rows.rest.shape[1])) if heads is None else heads, *rows,
        )  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @checked
    def draw(
        self,
        *,
        batch: int = 0,
        labels: Names | None = None,
        key_labels: Names | None = None,
        title: str | None = None,
    ) -> Figure:
        """A sheet of all that was recorded, a row for each layer, a column for each head.

        `labels` and `key_labels` name the nodes, as in `attngraph.draw.connectivity`, of all that is on the sheet.
        """
        if not self._found:
            raise ValueError("nothing was recorded: run the model inside `with record(model) as recorded:`")
        title = f"layer.head ({SCALES})" if title is None else title
        return _sheet(list(self._found.values()), batch, title, labels, key_labels)

    def __repr__(self) -> str:
        return f"Recording({', '.join(self._found) or 'nothing yet'})"

    def _repr_html_(self) -> str:
        facts = {name: f"{tuple(each.weights.shape)} on {str(each.graph)[:200]}" for name, each in self._found.items()}
        picture = self.draw() if self._found and _is_quick(list(self._found.values())) else None
        return notebook.page("attention weights, (batch, heads, edges)", facts, picture)


MOST_PANELS, MOST_NUMBERS = 48, 1 << 22  # of a sheet that a notebook shows unasked
SCALES = "white: no edge; dark: weight 0; bright: its largest 2%"


@contextmanager
@checked
def record(
    model: nn.Module,
    *,
    layers: int | str | Collection[int | str] | None = None,
    heads: int | Collection[int] | None = None,
    gradients: bool = False,
    top: int | None = None,
) -> Iterator[Recording]:
    """Keep the attention weights of a model that runs inside the `with`: one number for each edge, head and entry.

    Each `Attention` in the model is asked for its weights, and its latest call is kept: encoder, decoder and cross
    attention, graphs by layer and by head, padding, autocast. Afterwards the model is as it was, and what was recorded
    stays. It takes memory in proportion to the edges: `layers` and `heads` say what is kept. A compiled model runs
    uncompiled meanwhile.

    Args:
        model: any module with `Attention` in it, of this library or of `attngraph.hf`.
        layers: numbers of layers, from 0 (from the end where they are negative), or names of modules; by default all.
        heads: numbers of heads, from 0 (from the end where they are negative); by default all.
        gradients: keep how the weights came about, so that a loss of them can be differentiated; by default they are
            detached. With activation checkpointing, call `backward` inside the `with`: it runs the model again.
        top: keep so many keys of each query alone, the heaviest, and the weight of the rest as one number: a `Heaviest`
            for each module. 256 queries are looked at once, so that long sequences fit.

    >>> from attngraph import record
    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> gpt = GPT(TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="rotary"), vocab_size=65)
    >>> with record(gpt) as recorded:
    ...     logits = gpt(torch.randint(65, (1, 10)))
    >>> recorded[1].weights.shape  # layer 1: batch, heads, edges of Causal()
    torch.Size([1, 4, 55])
    >>> picture = recorded[1].draw(head=3)

    Raises ValueError for a model without `Attention`, and for layers and heads that it has not.
    """
    require_top(top, gradients)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    modules = {name.replace("_orig_mod.", ""): module for name, module in modules.items()}  # compiled or not
    if not modules:
        raise ValueError(f"model must have attngraph.nn.Attention in it (got a {type(model).__name__})")
    recording = Recording({name: _layer(name, place) for place, name in enumerate(modules)})
    chosen = _chosen_layers(layers, recording._layers)
    kept = {name: _chosen_heads(heads, modules[name].num_heads) for name in chosen}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        moved = dict[nn.Module, _Moved]()
        for transformer in model.modules():
            if isinstance(transformer, Transformer):
                moved.update(stack.enter_context(_watching(transformer)))
        for name in chosen:
            if top is not None:
                own = partial(recording._keep_heaviest, name, heads=kept[name], moved=moved.get(modules[name]))
                stack.enter_context(_listening_to_top(modules[name], own, top, kept[name]))
                continue
            keep = recording._keeper(name, kept[name], gradients, moved.get(modules[name]))
            stack.enter_context(_listening(modules[name], keep))
        yield recording


class _Moved:
    """How far a `Transformer` has moved its nodes forward, in its latest call, for one `Attention` in it."""

    def __init__(self, told: list[Tensor | None], hears_itself: bool):
        self._told, self.hears_itself = told, hears_itself

    def places(self, n: int) -> Tensor | None:
        """Where each node was: (B, n); None if none was moved."""
        skipped = self._told[-1] if self._told else None
        if skipped is None:
            return None
        return rolled(torch.arange(n, device=skipped.device).expand(len(skipped), n), skipped)


@contextmanager
def _watching(transformer: Transformer) -> Iterator[dict[nn.Module, _Moved]]:
    """What each `Attention` of a model is told of how its nodes are moved."""
    skipped, told = transformer._skipped, list[Tensor | None]()

    def telling(*inputs: Any) -> Tensor | None:
        told[:] = [skipped(*inputs)]
        return told[0]

    own = dict[nn.Module, _Moved]()
    for block in transformer.layers:
        assert isinstance(block, Block)
        own[block.attention] = _Moved(told, hears_itself=True)
        if transformer.config.cross:
            own[block.cross] = _Moved(told, hears_itself=False)
    with _replaced(transformer, "_skipped", telling):
        yield own


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The module with another method; afterwards as it was."""
    before = vars(module).get(name)  # of the instance: that of an outer recording
    setattr(module, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


@contextmanager
def _listening(module: Attention, keep: Callable[..., None]) -> Iterator[None]:
    """The module, whose every call also tells its weights."""
    forward = module.forward

    def telling(
        x: Tensor, graph: Any, memory: Tensor | None = None, *, return_weights: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(graph, Graph) and graph._unresolved:
            rotary = options.get("rotary")
            start = None if rotary is None else query_offset(graph)
            q, k, _ = module.project(x, x if memory is None else memory, rotary, start)
            graph = graph.resolve(q, k, options.get("attention_mask"))
        out, weights = forward(x, graph, memory, return_weights=True, **options)
        keep(weights, graph, x, x if memory is None else memory, options.get("attention_mask"))
        return (out, weights) if return_weights else out

    with _replaced(module, "forward", telling):
        yield


@contextmanager
def _listening_to_top(
    module: Attention, keep: Callable[..., None], top: int, heads: tuple[int, ...] | None
) -> Iterator[None]:
    """The module, whose every call is made again for some queries at a time."""
    forward = module.forward

    def telling(x: Tensor, graph: Any, memory: Tensor | None = None, **options: Any) -> Any:
        if (isinstance(graph, Graph) and graph._unresolved) or entries_of(graph) is not None:
            raise ValueError(f"top needs one graph that is known before the data (got {graph}): top=None")
        heard = x if memory is None else memory
        asked = {name: value for name, value in options.items() if name != "return_weights"}
        with torch.no_grad():
            rows = heaviest_rows(forward, x, graph, heard, asked, top, heads)
        mask = options.get("attention_mask")
        if mask is not None and (memory is None or memory is x):
            mask = mask if x.ndim == 3 else mask[None]
            rows = without_padding(rows, mask[:, -x.shape[-2] :])
        keep(rows, graph, heard.shape[-2])
        return forward(x, graph, memory, **options)

    with _replaced(module, "forward", telling):
        yield


def _reordered(column: Tensor, order: Tensor) -> Tensor:
    """Queries of (B, H, N, …) in another order, (B, 1, N)."""
    index = order.reshape(*order.shape, *[1] * (column.ndim - 3)).expand(column.shape)
    return column.gather(2, index)


def _layer(name: str, place: int) -> int:
    """The last number in the name of a module; without one, its place among those that can be recorded."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return int(numbers[-1]) if numbers else place


def _chosen_layers(layers: int | str | Collection[int | str] | None, numbers: dict[str, int]) -> list[str]:
    """The names of the modules to record."""
    if layers is None:
        return list(numbers)
    count = 1 + max(numbers.values())
    wanted: set[int | str] = set()
    for each in [layers] if isinstance(layers, int | str) else layers:
        if isinstance(each, bool) or not isinstance(each, int | str):
            raise TypeError(f"layers must be numbers of layers or names of modules (got {shown(each)} among them)")
        number = each + count if isinstance(each, int) and each < 0 else each
        if number not in numbers and number not in numbers.values():
            raise ValueError(f"layers must be among 0 … {count - 1} or {', '.join(numbers)} (got {shown(each)})")
        wanted.add(number)
    if not wanted:
        raise ValueError("layers must be at least one (got none)")
    return [name for name, number in numbers.items() if name in wanted or number in wanted]


def _chosen_heads(heads: int | Collection[int] | None, count: int) -> tuple[int, ...] | None:
    """The numbers of the heads to record; None for all."""
    if heads is None:
        return None
    chosen = dict[int, None]()
    for head in (heads,) if isinstance(heads, int) else tuple(heads):
        if isinstance(head, bool) or not isinstance(head, int):
            raise TypeError(f"heads must be numbers of heads (got {shown(head)} among them)")
        if not -count <= head < count:
            raise ValueError(f"heads must be from {-count} to {count - 1} (got {head})")
        chosen[head % count] = None
    if not chosen:
        raise ValueError("heads must be at least one (got none)")
    return tuple(chosen)


def _sheet(
    rows: Sequence[Recorded], batch: int, title: str, labels: Names | None = None, key_labels: Names | None = None
) -> Figure:
    """A row of small pictures for each module, one for each of its heads."""
    names = {each.name: str(each.layer) for each in rows}
    if len(set(names.values())) < len(names):
        names = {name: name.removesuffix(".attention") for name in names}
    panels = [
        [(f"{names[each.name]}.{head}", *each.of(head, batch), each.num_queries, each.num_keys) for head in each.heads]
        for each in rows
    ]
    return weights_sheet(panels, title, labels, key_labels)


def _is_quick(rows: Sequence[Recorded]) -> bool:
    """Whether a sheet of them can be drawn, in about a second."""
    heads = sum(len(each.heads) for each in rows)
    numbers = sum(each.weights[:1].numel() for each in rows)
    if not all(len(each.weights) for each in rows) or heads > MOST_PANELS or numbers > MOST_NUMBERS:
        return False
    return all(bool(each.weights[0].isfinite().all()) for each in rows)


def _listed(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))
