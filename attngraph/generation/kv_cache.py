"""The keys and values of a model that continues a text, of which its graph says how long each is needed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from attngraph.analysis import leaks
from attngraph.arguments import checked
from attngraph.generation.layers import CachedLayer, head_groups
from attngraph.generation.schedule import Schedule
from attngraph.generation.slots import HeadGroup, Nodes, Track, depths
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, bind, require_ints
from attngraph.graph.compose import Beside
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.patterns import Tree
from attngraph.graph.text import read, write
from attngraph.models.saved import EDGES, readable, write_whole
from attngraph.nn.checks import require_range
from attngraph.nn.computed import OneGraph, name_of
from attngraph.nn.padding import padding_in_front
from attngraph.nn.positions import Rotary
from attngraph.nn.rope import TRAINED, Rope
from attngraph.nn.transformer import Transformer
from attngraph.packing import entries_of
from attngraph.planning.planner import Plan

AHEAD = 256  # positions for which cos and sin are made at once
HEADER = "attngraph.KVCache"  # its name in a file's metadata
FORMAT = 1  # of files: others are refused


class KVCache:
    """What a model keeps of the nodes that it has seen, so that each new one costs one step (prefill, then decode).

    A key is kept while some later query hears it (`analysis.last_reader`), in every layer, and for every key head,
    by its own graph: a window takes as many slots as it is wide, however long the text, and sinks stay. Out of the
    cache comes what the whole text at once would give: `model(tokens)` of `max_length` nodes, node by node.

        cache = KVCache(model, max_length=1000)
        logits = model(prompt, cache=cache)            # prefill: (B, N, V)
        logits = model(next_tokens, cache=cache)       # one step or several: (B, 1, V)

    Args:
        model: a `Transformer`, or a model with one that is its decoder. Its graphs must be causal.
        max_length: how many nodes there will be at most. Graphs that depend on the number of nodes, as `Random` does,
            are those of this number; what has a size must have at least this one.
        rotary: from where rotary positions count. "absolute": from the first node. "kept": among the keys that are
            kept at each step, in each layer (StreamingLLM, Xiao et al. 2024), so that no position is beyond the
            slots, however long the text; the model then computes something else than on the whole text at once.

    Raises ValueError where a graph is not causal, naming the first edge into the future, or can't be known before the
    data; and where the rotary frequencies depend on the length of the text. Calls without gradients alone can use it.
    A call that fails leaves the cache as it was.

    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> model = GPT(TransformerConfig(embed_dim=64, num_layers=2, num_heads=4), 65, Causal() & Window(8, 0)).eval()
    >>> tokens, cache = torch.randint(65, (1, 30)), KVCache(model, max_length=30)
    >>> with torch.no_grad():
    ...     steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(30)], dim=1)
    ...     torch.allclose(steps, model(tokens), atol=1e-5), cache.nbytes
    (True, 9216)
    """

    @checked
    def __init__(self, model: nn.Module, max_length: int, *, rotary: Literal["absolute", "kept"] = "absolute"):
        require_ints(1, max_length=max_length)
        self.transformer = decoder_of(model)
        config = self.transformer.config
        if rotary == "kept" and config.position != "rotary":
            raise ValueError(f"rotary='kept' is of rotary positions (got a model with position={config.position!r})")
        if config.position == "learned" and max_length > cast(int, config.max_length):
            raise ValueError(
                f"max_length must be at most {config.max_length}, the model's learned positions (got {max_length})"
            )
        rope = cast(Rotary, self.transformer.position).rope if config.position == "rotary" else None
        if rope is not None and rope.kind in Rope.BY_LENGTH and max_length > rope.scaling[TRAINED]:
            raise ValueError(
                f"a cache holds keys that are turned, but frequencies of rope_type {rope.kind!r} change with the "
                f"length of texts of more than {rope.scaling[TRAINED]} nodes (got max_length={max_length}): without a "
                f"cache, use_cache=False, each step computes all again"
            )
        self.max_length, self.rotary = max_length, rotary
        self._told = self.transformer.graphs
        self.graphs = tuple(decodable(graph, layer, max_length) for layer, graph in enumerate(self.transformer.graphs))
        self.length = 0
        """How many nodes the cache has seen, padding included."""
        self._layers: list[CachedLayer] = []
        self._tracks: list[Track] = []
        self._batch = 0
        self._memory: tuple[Graph, int] = Full(), 0  # who hears a memory, and how many nodes it has
        self._nodes: Nodes = 0  # the number of the next node in the graph
        self._front: Tensor | None = None  # (B, 1): padding before each row's first node that takes places in the graph
        self._ahead: tuple[int, Tensor, Tensor] = 0, torch.empty(0), torch.empty(0)  # cos and sin from a node on
        self._tree: Tree | None = None  # whose nodes wait to be accepted

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, from the first call on; they stay the same. `analysis.cost` knows it before."""
        groups = [group for layer in self.every_layer for group in layer.groups]
        return sum(side.nbytes for group in groups for side in (group.keys, group.values))

    @checked
    def accept(self, path: Sequence[int]) -> None:
        """After a call with `tree=`: the nodes of a path from a root of the tree on are the text's next; all others are
        forgotten. An empty path takes none."""
        if self._tree is None:
            raise RuntimeError("accept goes on from a call with tree=, of which nodes may be accepted: there was none")
        parents = (-1, *path)
        if any(not 0 <= node < len(self._tree.parents) for node in path) or any(
            self._tree.parents[node] != parent for parent, node in zip(parents, path, strict=False)
        ):
            raise ValueError(f"path must be nodes of the tree from a root on, each the parent of the next (got {path})")
        self._commit(torch.tensor(path, dtype=torch.int64))

    @checked
    def reorder(self, rows: Tensor) -> None:
        """The batch's rows with these numbers, int64 (B,), in the place of all: what beam search asks for."""
        if self._tree is not None:
            raise RuntimeError("reorder needs a cache without a tree that waits to be accepted: cache.accept([])")
        if rows.dtype != torch.int64 or rows.ndim != 1:
            raise ValueError(f"rows must be numbers of rows, int64 (B,) (got {rows.dtype}, {tuple(rows.shape)})")
        require_range(f"rows must be from 0 to {self._batch - 1}", self._batch - 1, rows)
        if torch.equal(rows, torch.arange(self._batch, device=rows.device)):
            return
        for group in (group for layer in self.every_layer for group in layer.groups):
            group.keys, group.values = group.keys[rows], group.values[rows]
        for track in self._tracks:
            track.reorder(rows)
        self._nodes = self._nodes[rows] if isinstance(self._nodes, Tensor) else self._nodes
        self._front = None if self._front is None else self._front[rows]
        self._batch = len(rows)

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write all that the cache holds to one file, safetensors, which `load` reads again."""
        from safetensors.torch import save_file

        if not self.length or self._tree is not None:
            raise RuntimeError("a cache is saved after its prompt, and when no tree waits to be accepted")
        graph, memory = self._memory
        listed: list[EdgeList] = []
        text = write(graph, listed)
        readable(graph, text, lambda text: read(text, [each.given for each in listed]))
        tensors = {"nodes": torch.as_tensor(self._nodes), **self._tensors()}
        if self._front is not None:
            tensors["front"] = self._front
        header = {
            "format": FORMAT, "max_length": self.max_length, "rotary": self.rotary, "length": self.length,
            "batch": self._batch, "memory": memory, "memory_graph": text, "model": self._digest(),
        }  # fmt: skip
        tensors |= {f"{EDGES}{number}": each.given for number, each in enumerate(listed)}
        file = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(Path(path), lambda new: save_file(file, new, {HEADER: json.dumps(header)}))

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike, model: nn.Module, *, device: torch.device | str = "cpu") -> KVCache:
        """The cache that `save` wrote, of the same model: its config, dtype and graphs are compared, not its weights.

        Raises ValueError for a file of another kind, or of a model with another config, dtype or other graphs.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as opened:
                header = json.loads((opened.metadata() or {}).get(HEADER, "null"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} can't be read: {error}") from None
        if not header or header.get("format") != FORMAT:
            raise ValueError(f"{path} was not written by KVCache.save of this version")
        found = cls(model, header["max_length"], rotary=header["rotary"])
        if header["model"] != found._digest():
            raise ValueError(f"{path} must be of a model with the same config, dtype and graphs (it is of another)")
        edges = [tensors[name] for name in sorted(tensors, key=len) if name.startswith(EDGES)]
        found._layers = [CachedLayer(found._rotary) for _ in found.graphs]
        found._tracks = found._lay_out(read(header["memory_graph"], edges), header["memory"])
        nodes = tensors["nodes"]
        found._nodes = nodes if nodes.ndim else int(nodes)
        found._front, found._batch, found.length = tensors.get("front"), header["batch"], header["length"]
        for number, track in enumerate(found._tracks):
            track.rows = tensors.get(f"rows:{number}")
        for number, group in enumerate(group for layer in found.every_layer for group in layer.groups):
            group.keys, group.values = tensors[f"keys:{number}"], tensors[f"values:{number}"]
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        found = {f"rows:{number}": track.rows for number, track in enumerate(self._tracks) if track.rows is not None}
        for number, group in enumerate(group for layer in self.every_layer for group in layer.groups):
            found |= {f"keys:{number}": group.keys, f"values:{number}": group.values}
        return found

    def _digest(self) -> str:
        """What tells models with other configs or graphs apart."""
        listed: list[EdgeList] = []
        texts = [write(graph, listed) for graph in self.graphs]
        dtype = next(self.transformer.parameters()).dtype
        found = hashlib.sha256(repr((self.transformer.config, dtype, texts)).encode())
        for edges in listed:
            found.update(edges.given.numpy().tobytes())
        return found.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A copy that goes on by itself, of the same model."""
        memo |= {id(shared): shared for shared in (self.transformer, *(track.schedule for track in self._tracks))}
        other = KVCache.__new__(KVCache)
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    # --------------------------------------------------------------- what a Transformer asks of it: first the prompt

    def start(self, x: Tensor) -> tuple[Graph, ...]:
        """The graphs of a prompt x (B, T, embed_dim), one for each layer."""
        self._require(x, x.shape[-2])
        self._layers = [CachedLayer(self._rotary) for _ in self.graphs]
        graphs = zip(self.transformer.graphs, self.graphs, strict=True)
        return tuple(cut(own, graph, x.shape[-2]) for own, graph in graphs)

    def keep(
        self,
        x: Tensor,
        skipped: Tensor | None,
        mask: Tensor | None,
        memory: Tensor | None,
        memory_graph: Graph,
        memory_mask: Tensor | None,
    ) -> None:
        """After a prompt x: what of its keys is still to be heard, and all of the memory's.

        `skipped` (B, 1) are the nodes in front that went behind the others in each row; `mask` of x, in a model
        without a cross phase after that of the memory's nodes, which are keys too.
        """
        count, cross = x.shape[-2], self.transformer.config.cross
        held = 0 if memory is None else memory.shape[-2]
        nodes = count if skipped is None else count - skipped[:, 0]
        front = None
        if mask is not None and skipped is None:
            front = padding_in_front(mask[:, 0 if cross else held :])
        tracks = self._lay_out(memory_graph, held)
        for track in tracks:
            of_memory = not track.brings_keys
            keys = held if of_memory else track.schedule.memory + count
            track.start(memory_mask if of_memory else mask, nodes, len(x), keys, x.device)
        for layer in self.every_layer:
            assert layer.prompt is not None
            for group in layer.groups:
                group.keep_prompt(*layer.prompt, nodes)
            layer.prompt = None
        self._tracks, self._nodes, self._front, self._batch, self.length = tracks, nodes, front, len(x), count

    @property
    def every_layer(self) -> list[CachedLayer]:
        """Of each layer its own keys, and those of the phase that hears a memory."""
        return [part for layer in self._layers for part in (layer, layer.cross) if part is not None]

    def _lay_out(self, memory_graph: Graph, memory: int) -> list[Track]:
        """Groups of heads for each layer, with so many keys of a memory, and what their slots have in common."""
        tracks, self._memory = dict[Any, Track](), (memory_graph, memory)
        cross = self.transformer.config.cross
        for layer, graph in zip(self._layers, self.graphs, strict=True):
            held = 0 if cross else memory
            own = Beside(memory_graph.sized(None, held), graph) if held else graph
            layer.groups = self._groups(own, held, tracks, True)
            if cross:
                layer.of_memory.groups = self._groups(memory_graph, memory, tracks, False)
        return list(tracks.values())

    def _groups(self, graph: Graph, memory: int, tracks: dict[Any, Track], brings_keys: bool) -> list[HeadGroup]:
        """The groups of heads of a layer."""
        config, keys = self.transformer.config, memory + (self.max_length if brings_keys else 0)
        groups = []
        for part, heads, kv_heads in head_groups(
            bind(graph, self.max_length, keys), config.num_heads, config.num_kv_heads or config.num_heads
        ):
            named = part, heads, brings_keys
            if named not in tracks:
                schedule = Schedule(part.sized(self.max_length, keys), self.max_length, memory)
                tracks[named] = Track(schedule, heads, brings_keys, self._rotary if brings_keys else None)
            groups.append(HeadGroup(tracks[named], kv_heads))
        return groups

    # ------------------------------------------------------------------------------------------- then the other nodes

    def begin(self, x: Tensor, tree: Tree | None = None) -> None:
        """A call with new nodes x (B, T, embed_dim) begins."""
        count = x.shape[-2]
        self._require(x, count if tree is None else int(depths(tree).max()) + 1)
        if tree is not None and len(tree.parents) != count:
            raise ValueError(f"tree must have the {count} nodes of the call (got {len(tree.parents)})")
        if tree is not None and (self._batch > 1 or isinstance(self._nodes, Tensor)):
            raise ValueError(f"a tree continues one text (got a batch of {self._batch})")
        if self._tree is not None:
            raise RuntimeError("a tree waits to be accepted: cache.accept(path), or cache.accept([]) to forget it")
        if x.shape[0] != self._batch:
            raise ValueError(f"the cache is of a batch of {self._batch} (got one of {x.shape[0]})")
        for track in self._tracks:
            track.begin(self._nodes, count, tree)

    def positions(self, x: Tensor) -> Tensor:
        """Of the new nodes: (T,) or (B, T)."""
        track = self._tracks[0]
        step = torch.arange(track.count, device=x.device) if track.tree is None else depths(track.tree).to(x.device)
        positions = self._nodes[:, None] + step if isinstance(self._nodes, Tensor) else self._nodes + step
        return positions if self._front is None else positions - self._front

    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of rotary positions of the new nodes; where all rows are alike, made some time before."""
        dtype, rotary = torch.promote_types(x.dtype, torch.float32), cast(Rotary, self.transformer.position)
        if isinstance(self._nodes, Tensor) or self._front is not None or self._tracks[0].tree is not None:
            return rotary(self.positions(x), dtype)
        first, count = self._nodes, self._tracks[0].count
        start, cos, sin = self._ahead
        if not (start <= first and first + count <= start + len(cos) and cos.dtype == dtype):
            start = first
            cos, sin = rotary(
                torch.arange(first, min(first + max(count, AHEAD), self.max_length), device=x.device), dtype
            )
            self._ahead = start, cos, sin
        return cos.narrow(0, first - start, count), sin.narrow(0, first - start, count)

    def end(self, tree: Tree | None = None) -> None:
        """After a call: its nodes are part of the text; those of a tree wait to be accepted."""
        self._tree = tree
        if tree is None:
            self._commit(None)

    @property
    def layers(self) -> list[CachedLayer]:
        """One for each layer, for its attention."""
        return self._layers

    def pieces(self, x: Tensor, tree: Tree | None) -> list[int]:
        """In how many calls new nodes are given: one, unless keys are turned by their places among others."""
        count = x.shape[-2]
        if self._rotary is None:
            return [count]
        if tree is not None:
            raise ValueError("a tree can't be given with rotary='kept': its nodes have no places among the keys")
        self._require(x, count)
        if self.length:
            return [1] * count
        config, first = self.transformer.config, count
        for graph in dict.fromkeys(self.graphs):
            for part, *_ in head_groups(graph, config.num_heads, config.num_kv_heads or config.num_heads):
                schedule = Schedule(part.sized(self.max_length, self.max_length), self.max_length, 0)
                first = min(first, int(schedule.last.min()) + 1)
        return [first, *[1] * (count - first)]

    @property
    def _rotary(self) -> Rotary | None:
        """What turns keys only when they are heard."""
        return cast(Rotary, self.transformer.position) if self.rotary == "kept" else None

    def _commit(self, path: Tensor | None) -> None:
        """The new nodes are in the text: all, or those of a path through their tree."""
        found = {
            track: track.commit(path)
            for track in self._tracks
            if track.brings_keys and (path is not None or track.is_beside)
        }
        if found:
            for group in (group for layer in self._layers for group in layer.groups if group.track in found):
                group.commit(path, *found[group.track])
        count = self._tracks[0].count if path is None else len(path)
        self._nodes, self.length, self._tree = self._nodes + count, self.length + count, None

    def _require(self, x: Tensor, count: int) -> None:
        """Raise unless so many new nodes x fit."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a cache keeps no gradients: call the model under torch.no_grad()")
        if self.transformer.training and self.transformer.config.dropout:
            raise RuntimeError("a cache is of a model without dropout: model.eval()")
        if self.transformer.graphs is not self._told and self.transformer.graphs != self._told:
            raise RuntimeError(
                "the model's graphs have changed since the cache was made: make another, KVCache(model, …)"
            )
        if not count:
            raise ValueError("a call with a cache needs at least one new node (got none)")
        if self.length + count > self.max_length:
            raise ValueError(
                f"the cache has room for max_length={self.max_length} nodes, of which {self.length} are taken (got "
                f"{count} more): make one with KVCache(model, max_length={self.length + count}) or more"
            )


def decoder_of(model: nn.Module) -> Transformer:
    """The Transformer of a model that continues a text."""
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    found = [model] if isinstance(model, Transformer) else [getattr(model, "decoder", None)]
    if not isinstance(found[0], Transformer):
        found = [part for part in model.modules() if isinstance(part, Transformer)]
    if len(found) != 1:
        raise TypeError(
            f"model must be a Transformer, or have one, or one that is its `decoder` (got a {type(model).__name__}, "
            f"which has {len(found)})"
        )
    return cast(Transformer, found[0])


def decodable(graph: OneGraph, layer: int, length: int) -> Graph:
    """The graph of so many nodes, the first of its own, if a text can be continued by it, node after node."""
    if isinstance(graph, Plan):
        raise ValueError(f"the graph of layer {layer} is {graph}, which a cache does not continue: give its .graph")
    if not isinstance(graph, Graph):
        raise ValueError(
            f"the graph of layer {layer} is a function of what the layer reads, {name_of(graph)}, which a cache does "
            f"not hold: use_cache=False computes all again for each node"
        )
    if _differs_by_entry(graph):
        raise ValueError(
            f"the graph of layer {layer} must be one for all rows of a batch (got {graph}): give each row a cache of "
            f"its own, or use_cache=False, which computes all again for each node"
        )
    if graph._unresolved:
        raise ValueError(
            f"the graph of layer {layer}, {graph}, is chosen by queries and keys, so that no key can be forgotten nor "
            f"found: use_cache=False computes all again for each node"
        )
    n, m = (length if own is None else own for own in graph.size)
    if min(n, m) < length:
        raise ValueError(
            f"the graph of layer {layer} must have at least max_length={length} nodes (got {graph} of size "
            f"{graph.size})"
        )
    if found := leaks(graph, n):
        _, key, query = found[0]
        raise ValueError(
            f"the graph of layer {layer} must be causal, as what comes later is not there yet: in {graph}, query "
            f"{query} hears key {key} (analysis.leaks); use_cache=False computes all again for each node"
        )
    return cut(None, bind(graph, n, m).sized(n, m), length)


def _differs_by_entry(graph: Graph) -> bool:
    """Whether entries of a batch have graphs of their own."""
    return entries_of(graph) is not None or any(map(_differs_by_entry, graph._children))


def cut(own: OneGraph | None, graph: Graph, count: int) -> Graph:
    """The first so many nodes of a graph; of one that is the same at any size, itself."""
    if isinstance(own, Graph) and own.size == (None, None) and not own._unbound:
        return own
    return graph if graph.size == (count, count) else graph.rows(0, count).T.rows(0, count).T
