"""The one Transformer: communicate along a graph, compute at each node, repeat. It never builds a mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from attngraph.arguments import check_fields, checked, shown
from attngraph.bias import Alibi, Bias, EdgeBias, RelativeBias
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.compose import Beside
from attngraph.graph.patterns import Tree
from attngraph.kernels.scoring import NORMALIZER_NAMES
from attngraph.nn.attention import Attention
from attngraph.nn.cached import Cached, CachedLayer
from attngraph.nn.checks import require_vectors, values_known
from attngraph.nn.computed import Graphs, OneGraph, graph_of, is_one, made_of, require_one_placement
from attngraph.nn.dropout import dropout
from attngraph.nn.feedforward import ACTIVATIONS, FeedForward
from attngraph.nn.padding import joint_padding_mask, padding_in_front, padding_mask, positions_of, rolled
from attngraph.nn.positions import AlibiPositions, LearnedPositions, RelativePositions, Rotary, SinusoidalPositions
from attngraph.nn.told import by_layer, tell_graphs
from attngraph.planning.planner import Plan

ALL_MEMORY = Full()  # made once: a compiled model need not make it
Placed = tuple[Tensor, tuple[Tensor, Tensor] | None, Alibi | RelativeBias | None]
"""Nodes, cos and sin, and a bias: what tells them where they stand."""
Biases = Bias | Tensor | Sequence[Bias | Tensor | None] | None
"""What is added to the scores: of all layers, or a list of one for each."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Every switch in which the classic Transformers differ, apart from their graph.

    | | GPT-2 | BERT | T5 | Llama |
    |---|---|---|---|---|
    | norm, norm_order | layer, pre | layer, post | rms, pre | rms, pre |
    | embed_norm, final_norm | no, yes | yes, no | no, yes | no, yes |
    | activation, gated | gelu_tanh | gelu | relu | silu, gated |
    | bias | all | all | none | none |
    | position | learned | learned | relative | rotary |
    | scale | 1/√head_dim | 1/√head_dim | 1 | 1/√head_dim |

    Args:
        embed_dim: width of the nodes' vectors.
        num_layers: how many blocks: attention, then a feed-forward layer.
        num_heads: query heads.
        num_kv_heads: key and value heads; by default as many as num_heads.
        head_dim: width of a head; by default embed_dim / num_heads.
        hidden_dim: width of the feed-forward layer; by default 4 · embed_dim.
        activation: of the feed-forward layer: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu" or "squared_relu".
        gated: whether the feed-forward layer multiplies what is activated by a second projection (Shazeer 2020).
        norm: LayerNorm, RMSNorm, or none, as in attention that is to be linear in what it hears.
        norm_eps: what norms add to the variance.
        norm_order: normalise what a block reads (pre), or the sum after it (post).
        embed_norm: normalise the embeddings before the first block, as BERT does.
        final_norm: normalise what the last block gives, as pre-norm models do.
        bias: what has a bias: the projections of attention, the feed-forward layer, the layer norms.
        qk_norm: normalise the queries and keys of each head (see `Attention`).
        scale: factor of the scores, of all layers or of each; by default 1/√head_dim.
        score: how a key answers a query (see `Attention`).
        normalize: how scores become weights: "softmax", "sigmoid", "none", "relu" or "squared_relu" (see `Attention`).
        position: how nodes know where they stand; by default "learned" where max_length is given, else "rotary" (Su
            et al. 2021), which needs an even head_dim. "none": a graph's nodes have no order but that of their edges.
        max_length: number of learned positions.
        rotary_base: of rotary positions: the base of the frequencies.
        rotary_scaling: of rotary positions: how frequencies are changed for longer texts, as in a checkpoint's
            rope_scaling.
        relative_buckets: of relative positions (T5): how many learned numbers a head has.
        relative_max_distance: of relative positions: the distance up to which buckets grow wider (T5's); None:
            clipped to one a distance.
        relative_bidirectional: of relative positions: whether keys before and after the query have numbers of their
            own.
        cross: a phase in which the nodes hear a memory, between hearing each other and computing. Without it, a
            memory is heard beside the nodes themselves, in one phase, and normalised as they are.
        dropout: of weights, hidden features and what each phase adds: the probability with which a number is dropped.
        init: "gpt2": N(0, 0.02²), divided by √(2·layers) where the residual stream is written to. "zero": there it
            starts at 0.

    >>> TransformerConfig(embed_dim=64, num_layers=2, num_heads=4).position
    'rotary'
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_dim: int | None = None
    activation: str = "gelu"
    gated: bool = False
    norm: Literal["layer", "rms", "none"] = "layer"
    norm_eps: float = 1e-5
    norm_order: Literal["pre", "post"] = "pre"
    embed_norm: bool = False
    final_norm: bool = True
    bias: tuple[str, ...] = ("q", "k", "v", "o", "ff", "norm")
    qk_norm: bool = False
    scale: float | tuple[float, ...] | None = None
    score: Literal["dot", "additive"] = "dot"
    normalize: Literal["softmax", "sigmoid", "none", "relu", "squared_relu"] = "softmax"
    position: Literal["none", "learned", "sinusoidal", "rotary", "alibi", "relative"] | None = None
    max_length: int | None = None
    rotary_base: float = 10000.0
    rotary_scaling: Mapping[str, Any] | None = None
    relative_buckets: int = 32
    relative_max_distance: int | None = 128
    relative_bidirectional: bool = True
    cross: bool = False
    dropout: float = 0.0
    init: Literal["gpt2", "zero"] = "gpt2"

    def __post_init__(self):
        check_fields(self)
        if self.position is None:
            object.__setattr__(self, "position", "rotary" if self.max_length is None else "learned")
        if not all(isinstance(name, str) for name in self.bias):
            raise TypeError(f"bias must be a list of names, such as ('q', 'k', 'v') (got {self.bias!r})")
        unknown = set(self.bias) - {"q", "k", "v", "o", "ff", "norm"}
        if unknown:
            raise ValueError(f"bias must name q, k, v, o, ff or norm (got {', '.join(sorted(unknown))})")
        if self.position != "rotary" and (self.rotary_scaling is not None or self.rotary_base != 10000.0):
            given = f"got position={self.position!r}, rotary_base={self.rotary_base:g}"
            raise ValueError(
                f"rotary_base and rotary_scaling are of rotary positions: give position='rotary' ({given})"
            )
        if self.position == "learned" and not self.max_length:
            raise ValueError("learned positions need max_length, the number of positions")
        choices = {
            "activation": tuple(ACTIVATIONS),
            "norm": ("layer", "rms", "none"),
            "norm_order": ("pre", "post"),
            "position": ("none", *POSITIONS),
            "score": ("dot", "additive"),
            "normalize": NORMALIZER_NAMES,
            "init": ("gpt2", "zero"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)} (got {getattr(self, name)!r})")
        object.__setattr__(self, "bias", tuple(self.bias))
        require_ints(1, **{name: getattr(self, name) for name in ("embed_dim", "num_layers", "num_heads")})
        for name in ("num_kv_heads", "head_dim", "hidden_dim", "max_length"):
            if getattr(self, name) is not None:
                require_ints(1, **{name: getattr(self, name)})
        if self.num_heads % (self.num_kv_heads or 1):
            given = f"got {self.num_heads} and {self.num_kv_heads}"
            raise ValueError(f"num_heads must be a multiple of num_kv_heads ({given})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability, at least 0 and below 1 (got {self.dropout})")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be a number of at least 0 (got {self.norm_eps})")
        if isinstance(self.scale, (tuple, list)):
            if len(self.scale) != self.num_layers:
                raise ValueError(
                    f"scale must be one number, or one for each of {self.num_layers} layers (got {len(self.scale)})"
                )
            object.__setattr__(self, "scale", tuple(self.scale))
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                given = f"{self.embed_dim} and {self.num_heads}"
                raise ValueError(f"embed_dim must be a multiple of num_heads (got {given}), or give head_dim")
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if self.position == "rotary" and (self.head_dim or 0) % 2:
            raise ValueError(
                f"rotary positions, the default, need an even head_dim (got {self.head_dim}): give head_dim, or "
                f"another position, such as 'learned' with max_length"
            )


POSITIONS = {
    "learned": lambda c: LearnedPositions(c.max_length, c.embed_dim),
    "sinusoidal": lambda c: SinusoidalPositions(c.embed_dim),
    "rotary": lambda c: Rotary(c.head_dim, c.rotary_base, c.rotary_scaling),
    "alibi": lambda c: AlibiPositions(c.num_heads),
    "relative": lambda c: RelativePositions(
        c.num_heads, c.relative_buckets, c.relative_max_distance, c.relative_bidirectional
    ),
}


class Block(nn.Module):
    """One layer: communicate (and with `cross`, hear the memory), then compute."""

    def __init__(self, config: TransformerConfig, layer: int = 0):
        super().__init__()
        self.config = config
        self.attention = _attention(config, layer)
        self.attention_norm = _norm(config)
        if config.cross:
            self.cross = _attention(config, layer)
            self.cross_norm = _norm(config)
        self.feedforward = FeedForward(
            config.embed_dim,
            config.hidden_dim or 4 * config.embed_dim,
            activation=config.activation,
            gated=config.gated,
            bias="ff" in config.bias,
            dropout=config.dropout,
        )
        self.feedforward_norm = _norm(config)

    def forward(
        self,
        x: Tensor,
        graph: OneGraph,
        *,
        bias: Bias | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        memory: Tensor | None = None,
        memory_graph: Graph | None = None,
        memory_attention_mask: Tensor | None = None,
        cache: CachedLayer | None = None,
    ) -> Tensor:
        """(B, N, embed_dim) → (B, N, embed_dim).

        `bias`, `attention_mask` and `rotary` are as in `Attention`; a function in the place of `graph` is given what
        the attention reads, in a pre-norm block the normalised x. Of a config with `cross`, `memory_graph` (by default
        `Full()`) and `memory_attention_mask` are those of the memory's phase; without, the keys are memory and nodes in
        one, normalised alike, and `graph` and `attention_mask` are of these.
        """

        def as_read(memory: Tensor) -> Tensor:
            return self.attention_norm(memory) if self.config.norm_order == "pre" else memory

        def communicate(h: Tensor) -> Tensor:
            keys = None if memory is None or self.config.cross else torch.cat([as_read(memory), h], dim=-2)
            options = {"bias": bias, "attention_mask": attention_mask, "rotary": rotary, "cache": cache}
            return self.attention(h, graph_of(graph, h), keys, **options)

        def hear_memory(h: Tensor) -> Tensor:
            heard = ALL_MEMORY if memory_graph is None else memory_graph
            kept = None if cache is None else cache.of_memory
            return self.cross(h, heard, memory, attention_mask=memory_attention_mask, cache=kept)

        x = self._add(x, self.attention_norm, communicate)
        if self.config.cross:
            x = self._add(x, self.cross_norm, hear_memory)
        return self._add(x, self.feedforward_norm, self.feedforward)

    def _add(self, x: Tensor, norm: nn.Module, phase: Callable[[Tensor], Tensor]) -> Tensor:
        """One phase around the residual stream."""
        if self.config.norm_order == "pre":
            return x + dropout(phase(norm(x)), self.config.dropout, self.training)
        return norm(x + dropout(phase(x), self.config.dropout, self.training))


class Transformer(nn.Module):
    """Layers of nodes that communicate along a graph and then compute. What the model *is* lies in the graph.

    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4)
    >>> gpt, bert = Transformer(config, Causal()), Transformer(config, Full())
    >>> local_then_global = Transformer(config, [Causal() & Window(8, 0), Causal()])
    >>> gpt(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])

    A program that `torch.export` made of it runs operators of this library: `import attngraph` before
    `torch.export.load`, which otherwise fails without a reason.

    Args:
        config: everything but the connectivity.
        graph: who hears whom: one graph for all layers, or one for each. A `PerHead` graph differs between heads. In
            the place of a graph, a function computes it from what the layer's attention reads, (B, N, embed_dim), the
            normalised vectors of a pre-norm layer: `lambda x: knn_graph(x, 8)` (Wang et al. 2019). If it is a module,
            its parameters are among the model's. It sees padding too, which nobody hears.
    """

    @checked
    def __init__(self, config: TransformerConfig, graph: Graphs):
        super().__init__()
        self.config = config
        self.graphs = graph
        tell_graphs(self, "graphs")
        self.position = POSITIONS[str(config.position)](config) if config.position != "none" else None
        self.embed_norm = _norm(config) if config.embed_norm else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = _norm(config) if config.final_norm else None
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        graph: Graphs | None = None,
        *,
        bias: Biases = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_graph: Graph | None = None,
        memory_positions: Tensor | None = None,
        memory_attention_mask: Tensor | None = None,
        cache: Cached | None = None,
        tree: Tree | None = None,
    ) -> Tensor:
        """x (B, N, embed_dim) → (B, N, embed_dim).

        Args:
            graph: this time on another graph than the model's own, as for a batch of packed documents.
            bias: added to the scores, as in `attend`, such as `EdgeBias.of(edge_index, values)`: one for all layers, or
                a list of one (or None) for each. Not in a model whose positions are a bias, "alibi" or "relative".
            positions: integers (N,) or (B, N), as for documents in a pack, each of which begins at 0; by default they
                count from each row's first real node; with a plan of `distribute` they are the numbers of its nodes.
                For learned, sinusoidal and rotary positions; the others go by the distance of nodes, which in a pack
                is the same.
            attention_mask: bool or integers 0 and 1, (B, N): True or 1 for real nodes, False or 0 for padding, which
                nobody hears. Without `positions`, the places of a graph of any size (`Prefix`, `Chunks`) are counted
                from each row's first real node too; a graph that knows its size names these very nodes, and so does a
                `bias` of edges or of pairs, with which all places are those in x.
            memory: (B, M, embed_dim), heard in the cross phase; or, of a config without one, beside the nodes, as
                `Beside(memory_graph, graph)`: rotary positions then go on from those of the memory.
            memory_graph: who hears which node of the memory, by default all.
            memory_positions: where the nodes of a memory beside the nodes are, (M,) or (B, M); by default its last real
                one is at -1.
            memory_attention_mask: which of the memory's nodes are real, (B, M).
            cache: a `KVCache` of this model: x are the nodes after those that it holds. The first call gives it the
                prompt, with its padding, and the memory, of which later calls need nothing.
            tree: with a cache, several ways to go on at once: x are the nodes of a tree, each of which hears its
                ancestors and what the cache holds, until `cache.accept` says which of them is the text.
        """
        if cache is not None and torch.compiler.is_compiling():  # each step has other numbers, which it would write in
            return torch.compiler.disable()(_called)(
                self, x, graph, bias=bias, positions=positions, attention_mask=attention_mask, memory=memory,
                memory_graph=memory_graph, memory_positions=memory_positions,
                memory_attention_mask=memory_attention_mask, cache=cache, tree=tree,
            )  # fmt: skip
        if cache is not None or tree is not None:
            is_given = not (graph is bias is positions is memory_positions is None)
            self._check_cached(cache, tree, attention_mask, is_given)
        if cache is not None and len(pieces := cache.pieces(x, tree)) > 1:
            if not (memory is attention_mask is None):
                raise ValueError(
                    f"positions among the keys that are kept need a prompt without padding or memory, or of at most "
                    f"{pieces[0]} nodes, of which none is forgotten (got {x.shape[-2]})"
                )
            return torch.cat([self(part, cache=cache) for part in x.split(pieces, dim=-2)], dim=-2)
        goes_on = cache is not None and cache.length > 0
        require_vectors("x", x, self.config.embed_dim)
        if memory is not None:
            require_vectors("memory", memory, self.config.embed_dim)
        if memory is None and not goes_on:
            if self.config.cross:
                raise ValueError("a model with config.cross needs a memory")
            if not (memory_graph is memory_positions is memory_attention_mask is None):
                raise ValueError(
                    "memory_graph, memory_positions and memory_attention_mask are of use only with a memory"
                )
        if positions is not None and not self.takes_positions:
            raise ValueError(f"positions can't be given: position={self.config.position!r} goes by the nodes' numbers")
        if memory_positions is not None and (self.config.cross or self.config.position != "rotary"):
            raise ValueError("memory_positions are of use only for rotary positions, in a model without a cross phase")
        graphs = self.graphs if graph is None else self._per_layer(graph)
        require_one_placement(graphs)
        biases = self._biases(bias)
        if cache is not None and goes_on:
            return self._goes_on(x, cache, tree)
        num_queries = x.shape[-2]
        mask = padding_mask("attention_mask", attention_mask, x)
        if not (memory_graph is None or isinstance(memory_graph, Graph)):
            raise TypeError(f"memory_graph must be a Graph (got {shown(memory_graph)})")
        memory_graph = ALL_MEMORY if memory_graph is None else memory_graph
        memory_mask = None
        if memory is not None:
            memory_mask = padding_mask("memory_attention_mask", memory_attention_mask, memory)
        if positions is None and self.takes_positions:
            positions = next((each.nodes for each in graphs if isinstance(each, Plan)), None)
        if positions is None and mask is None and self.config.position == "learned":
            self._check_length(num_queries)
        skipped = self._skipped(mask, positions, graphs, biases)
        if skipped is not None and mask is not None:
            x, mask = rolled(x, skipped), rolled(mask, skipped)
        if cache is not None:
            graphs = cache.start(x)
        positions = positions_of("positions", positions, mask, x)
        key_positions = positions
        if memory is not None and memory.shape[-2] and not self.config.cross:  # its nodes are keys before the own ones
            if self.config.position in ("alibi", "relative"):
                raise ValueError(f"a memory beside the nodes has no place in position={self.config.position!r}")
            memory_positions = _memory_positions(memory_positions, memory_mask, memory)
            key_positions = _joint_positions(memory_positions, positions)
            graphs = tuple(_beside(memory_graph.sized(None, memory.shape[-2]), each) for each in graphs)
            mask = joint_padding_mask(memory_mask, memory, mask, x)
        x = self._through(
            x,
            self._with_positions(x, positions, key_positions),
            graphs,
            biases,
            (None,) * len(graphs) if cache is None else cache.layers,
            attention_mask=mask,
            memory=memory,
            memory_graph=memory_graph,
            memory_attention_mask=memory_mask if self.config.cross else None,
        )
        if cache is not None:
            cache.keep(x, skipped, mask, memory, memory_graph, memory_mask)
        return x if skipped is None else rolled(x, -skipped)

    def _goes_on(self, x: Tensor, cache: Cached, tree: Tree | None) -> Tensor:
        """The same of nodes after those that a cache holds."""
        cache.begin(x, tree)
        if self.config.position == "rotary":
            placed = x, cache.rotation(x), None
        else:
            positions = cache.positions(x)
            placed = self._with_positions(x, positions, positions)
        x = self._through(x, placed, self.graphs, (None,) * len(self.graphs), cache.layers)
        cache.end(tree)
        return x

    def _through(
        self,
        x: Tensor,
        placed: Placed,
        graphs: Sequence[OneGraph],
        biases: Sequence[Bias | Tensor | None],
        caches: Sequence[CachedLayer | None],
        **options: Any,
    ) -> Tensor:
        """Through all layers, from nodes that know their places."""
        x, rotary, of_positions = placed
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        for layer, graph, bias, cache in zip(self.layers, graphs, biases, caches, strict=True):
            x = layer(x, graph, bias=of_positions if bias is None else bias, rotary=rotary, cache=cache, **options)
        return x if self.final_norm is None else self.final_norm(x)

    def _skipped(
        self,
        mask: Tensor | None,
        positions: Tensor | None,
        graphs: Sequence[OneGraph],
        biases: Sequence[Bias | Tensor | None],
    ) -> Tensor | None:
        """How many nodes in front of each row's first real one go behind, (B, 1), so that its places in the graph are
        its own; None where all stay, as where graphs or biases name these very nodes.
        """
        names_nodes = any(not isinstance(part, Graph) or part.size != (None, None) for part in graphs) or any(
            isinstance(each, Tensor | EdgeBias) for each in biases
        )
        if positions is not None or mask is None or names_nodes or (values_known(mask) and bool(mask[:, :1].all())):
            return None
        return padding_in_front(mask)

    def _with_positions(self, x: Tensor, positions: Tensor, key_positions: Tensor) -> Placed:
        """What tells nodes their places: added to x; or cos and sin that turn queries and keys; or a bias."""
        if self.position is None:
            return x, None, None
        dtype = torch.promote_types(x.dtype, torch.float32)  # in half precision, far nodes would get wrong angles
        match self.config.position:
            case "learned":
                return x + self.position(positions).to(x.dtype), None, None
            case "sinusoidal":
                return x + self.position(positions, dtype).to(x.dtype), None, None
            case "rotary":
                return x, self.position(key_positions, dtype), None
            case "alibi":
                return x, None, self.position(x.device, dtype)
        return x, None, self.position()

    def _biases(self, bias: Biases) -> tuple[Bias | Tensor | None, ...]:
        """One bias for each layer, or None."""
        layers, position = self.config.num_layers, self.config.position
        biases = tuple(bias) if isinstance(bias, list | tuple) else (cast(Bias | Tensor | None, bias),) * layers
        for each in biases:
            if not (each is None or isinstance(each, Bias | Tensor)):
                raise TypeError(
                    f"bias must be a tensor, an EdgeBias or another bias, or a list of one for each of {layers} layers "
                    f"(got {shown(each)})"
                )
        if len(biases) != layers:
            raise ValueError(f"bias must be one for all layers, or one for each of {layers} (got {len(biases)})")
        if position in ("alibi", "relative") and any(each is not None for each in biases):
            raise ValueError(f"bias can't be given: position={position!r} is a bias itself, and attention takes one")
        return biases

    def _check_cached(self, cache: Cached | None, tree: Tree | None, mask: Tensor | None, is_given: bool) -> None:
        """Raise unless a call with a cache can be one."""
        if cache is None:
            raise ValueError("tree is of use only with a cache, whose text it continues")
        if cache.transformer is not self:
            raise ValueError("the cache must be one of this model: KVCache(model, max_length=…) (it is of another)")
        if is_given:
            raise ValueError(
                "with a cache, graph, bias, positions and memory_positions can't be given: they are the model's own, "
                "of which the cache knows how they go on"
            )
        if not cache.length and tree is not None:
            raise ValueError("a tree continues a text: give the cache its prompt first")
        if cache.length and mask is not None:
            raise ValueError("attention_mask is of the prompt alone, the first call with a cache: later nodes are real")

    def _check_length(self, num_nodes: int) -> None:
        """Of nodes at 0, 1, 2, …, also where the numbers of a tensor can't be asked for."""
        longest = self.config.max_length
        if longest is not None and num_nodes > longest:
            raise ValueError(f"the model has {longest} learned positions but got {num_nodes} nodes")

    @property
    def takes_positions(self) -> bool:
        """Whether nodes have positions that can be given; otherwise their distances are those of their numbers."""
        return self.config.position in ("learned", "sinusoidal", "rotary")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "graph":  # which would do nothing
            raise AttributeError("a Transformer has no 'graph': set `graphs`, to one, or to one for each layer")
        if name == "graphs":  # a module among them too, which torch would take for a part of its own
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def graphs(self) -> tuple[OneGraph, ...]:
        """Who hears whom, for each layer; set it to one graph, or function, for all layers, or to one for each."""
        return self._graphs

    @graphs.setter
    def graphs(self, graph: Graphs) -> None:
        self._graphs = self._per_layer(graph)
        self._modules.pop("graph_modules", None)
        if modules := dict.fromkeys(each for each in self._graphs if isinstance(each, nn.Module)):
            self.graph_modules = nn.ModuleList(modules)

    def _per_layer(self, graph: Graphs) -> tuple[OneGraph, ...]:
        """One graph, or function, for each layer."""
        layers, heads = self.config.num_layers, self.config.num_heads
        graphs = (graph,) * layers if is_one(graph) else tuple(cast(Sequence, graph)) if _is_list(graph) else ()
        if not graphs and not _is_list(graph):
            raise TypeError(f"graph must be one graph, or one for each of {layers} layers (got {shown(graph)})")
        if isinstance(graph, tuple) and isinstance(getattr(graph, "graph", None), Graph):
            raise TypeError(f"graph must be a graph (got {shown(graph)}): did you mean its .graph?")
        for part in graphs:
            if not is_one(part):
                raise TypeError(
                    f"graph must be one graph, or one for each of {layers} layers (got a {type(part).__name__})"
                )
            if isinstance(part, Graph) and part.heads not in (None, heads):
                raise ValueError(f"graph has {part.heads} heads but the model {heads}: {part}")
        if len(graphs) != layers:
            raise ValueError(f"graph must be one graph, or one for each of {layers} layers (got {len(graphs)})")
        return graphs

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return by_layer(self.graphs)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The layers' matrices, as `config.init` says; after those of the modules in them, as `apply` does it."""
        for block in self.layers:
            assert isinstance(block, Block)
            residual = [block.attention.out, block.feedforward.down] + ([block.cross.out] if self.config.cross else [])
            for linear in (part for part in block.modules() if isinstance(part, nn.Linear)):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
                if self.config.init == "gpt2":
                    depth = (2 * self.config.num_layers) ** -0.5 if linear in residual else 1.0
                    nn.init.normal_(linear.weight, std=0.02 * depth)
                elif linear in residual:
                    nn.init.zeros_(linear.weight)


def _called(model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
    """What a model makes of these."""
    return model(*arguments, **options)


def _is_list(graph: object) -> bool:
    return isinstance(graph, Iterable) and not isinstance(graph, Tensor)


def _beside(memory_graph: Graph, graph: OneGraph) -> OneGraph:
    """The nodes of a memory beside those that hear each other."""
    if isinstance(graph, Plan):
        raise ValueError("a memory beside the nodes needs a graph of both, not a plan of one")
    if isinstance(graph, Graph):
        return Beside(memory_graph, graph)
    return lambda x: Beside(memory_graph, made_of(graph, x))


def _memory_positions(positions: Tensor | None, mask: Tensor | None, memory: Tensor) -> Tensor:
    """Of the memory's nodes: (M,) or (B, M); by default those before 0."""
    found = positions_of("memory_positions", positions, mask, memory)
    return found if positions is not None else found - found.amax(-1, keepdim=True) - 1


def _joint_positions(memory_positions: Tensor, positions: Tensor) -> Tensor:
    """Of the memory's nodes and then of the nodes: (M + N,) or (B, M + N)."""
    batch = torch.broadcast_shapes(memory_positions.shape[:-1], positions.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (memory_positions, positions)], dim=-1)


def _attention(config: TransformerConfig, layer: int) -> Attention:
    return Attention(
        config.embed_dim,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        bias=config.bias,
        qk_norm=config.qk_norm,
        scale=config.scale[layer] if isinstance(config.scale, tuple) else config.scale,
        score=config.score,
        normalize=config.normalize,
        dropout=config.dropout,
    )


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "rms":
        return nn.RMSNorm(config.embed_dim, config.norm_eps)
    return nn.LayerNorm(config.embed_dim, config.norm_eps, bias="norm" in config.bias)
