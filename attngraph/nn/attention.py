"""Communicate: one round of messages along the edges of a graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.attention import attend
from attngraph.bias import Bias
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.positions import query_offset
from attngraph.kernels.scoring import NORMALIZER_NAMES, Additive
from attngraph.nn.cached import CachedLayer
from attngraph.nn.checks import require_vectors
from attngraph.nn.positions import rotate
from attngraph.planning.planner import Plan

Rotation = tuple[Tensor, Tensor]
"""cos and sin, as `Rotary` gives them."""


class Scoring(TypedDict, total=False):
    """How a key answers a query, and what weight the answer gets, as options of `attend`."""

    scale: float | None
    score: Additive
    normalize: str


class Attention(nn.Module):
    """Multi-head attention on a graph: every node asks with a query, and collects values from the nodes it hears.

    out = W_o · concat_h attend(W_q x, W_k y, W_v y, graph), where y is x itself, or the memory.

    Args:
        embed_dim: width of the nodes' vectors.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads (Ainslie et al. 2023); by default as many.
        head_dim: width of a head; by default embed_dim / num_heads.
        memory_dim: width of the memory's vectors; by default embed_dim.
        bias: which of the projections "q", "k", "v", "o" have a bias.
        qk_norm: normalise the queries and keys of each head, with learned gains (Henry et al. 2020; Qwen3).
        scale: factor of the scores; by default 1/√head_dim.
        score: how a key answers a query: "dot", or "additive", w · tanh(q + k) with a learned w for each head (Bahdanau
            et al. 2015), which takes time and memory in proportion to the edges, and is not scaled by default.
        normalize: how scores become weights: "softmax" over the keys that a query hears, or each by itself: "sigmoid",
            "none" (the score is the weight: linear attention), "relu" or "squared_relu".
        dropout: probability with which a weight is dropped in training.

    >>> layer = Attention(64, num_heads=4)
    >>> layer(torch.randn(2, 10, 64), Causal()).shape
    torch.Size([2, 10, 64])
    """

    @checked
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        memory_dim: int | None = None,
        bias: Collection[str] = ("q", "k", "v", "o"),
        qk_norm: bool = False,
        scale: float | None = None,
        score: Literal["dot", "additive"] = "dot",
        normalize: Literal["softmax", "sigmoid", "none", "relu", "squared_relu"] = "softmax",
        dropout: float = 0.0,
    ):
        super().__init__()
        require_ints(1, embed_dim=embed_dim, num_heads=num_heads)
        widths = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "memory_dim": memory_dim}
        require_ints(1, **{name: width for name, width in widths.items() if width is not None})
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads (got {embed_dim} and {num_heads}), or give head_dim"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads (got {num_heads} and {num_kv_heads})")
        if score not in ("dot", "additive"):
            raise ValueError(f"score must be dot or additive (got {score!r})")
        if normalize not in NORMALIZER_NAMES:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZER_NAMES)} (got {normalize!r})")
        self.scale, self.normalize, self.dropout = scale, normalize, dropout
        self.score_weight = nn.Parameter(torch.empty(num_heads, self.head_dim)) if score == "additive" else None
        memory_dim = memory_dim or embed_dim
        self.query = nn.Linear(embed_dim, self.num_heads * self.head_dim, bias="q" in bias)
        self.key = nn.Linear(memory_dim, self.num_kv_heads * self.head_dim, bias="k" in bias)
        self.value = nn.Linear(memory_dim, self.num_kv_heads * self.head_dim, bias="v" in bias)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.out = nn.Linear(self.num_heads * self.head_dim, embed_dim, bias="o" in bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What is its own; its projections have their own initialisation."""
        if self.score_weight is not None:
            nn.init.ones_(self.score_weight)

    def forward(
        self,
        x: Tensor,
        graph: Graph | Plan,
        memory: Tensor | None = None,
        *,
        bias: Bias | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary: Rotation | None = None,
        return_weights: bool = False,
        cache: CachedLayer | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, N, embed_dim), memory (B, M, memory_dim) or None → (B, N, embed_dim).

        `bias` and `attention_mask` are as in `attend`; `rotary` is a pair (cos, sin), each (M, head_dim), of the keys,
        as `Rotary` gives it: the queries stand where `graph.rows(start, stop)` begins, else they are the last keys.
        With `return_weights`, a tuple of the output and the weights (B, H, E) before dropout, in the order of
        `graph.edge_index`; those of a whole model are kept by `attngraph.record`. With a `cache`, as `KVCache` has one
        for each layer, x are the nodes after those whose keys it holds.
        """
        require_vectors("x", x, self.query.in_features)
        if memory is not None:
            require_vectors("memory", memory, self.key.in_features)
        if cache is not None:
            if isinstance(graph, Plan):
                raise ValueError(f"a call with a cache needs a graph (got {graph}): give its .graph")
            if return_weights:
                raise ValueError(
                    "weights are not known in a call with a cache (return_weights=True, or record): run the whole text "
                    "without one, generate(…, use_cache=False)"
                )
            return self._from_cache(x, memory, cache, graph, rotary, bias, attention_mask)
        if rotary is not None and not (
            isinstance(rotary, tuple | list) and [isinstance(side, Tensor) for side in rotary] == [True, True]
        ):
            raise TypeError(f"rotary must be two tensors, (cos, sin), as Rotary gives them (got {shown(rotary)})")
        start = None if rotary is None or isinstance(graph, Plan) else query_offset(graph)
        q, k, v = self.project(x, x if memory is None else memory, rotary, start)
        dropout_p = self.dropout if self.training else 0.0
        found = attend(
            q, k, v, graph, bias=bias, attention_mask=attention_mask, dropout_p=dropout_p,
            return_weights=return_weights, **self.scoring,
        )  # fmt: skip
        out, weights = found if isinstance(found, tuple) else (found, None)
        out = self.out(out.transpose(-3, -2).flatten(-2))
        return out if weights is None else (out, weights)

    def _from_cache(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: CachedLayer,
        graph: Graph,
        rotary: Rotation | None,
        bias: Bias | Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """The same of nodes that hear what a cache holds, and each other."""
        rotary = None if cache.turns else rotary
        k, v = (None, None) if cache.holds_all else self.keys_and_values(x if memory is None else memory, rotary)
        q = self.queries(x, rotary)
        q = q if v is None or q.dtype == v.dtype else q.to(v.dtype)
        out = cache.attend(q, k, v, graph, bias=bias, attention_mask=attention_mask, scoring=self.scoring)
        return self.out(out.transpose(-3, -2).flatten(-2))

    @property
    def scoring(self) -> Scoring:
        """How a key answers a query, and what weight the answer gets, as options of `attend`."""
        if self.score_weight is None:
            return {"scale": self.scale, "normalize": self.normalize}
        scale = 1.0 if self.scale is None else self.scale
        return {"scale": scale, "score": Additive(self.score_weight), "normalize": self.normalize}

    def project(
        self, x: Tensor, memory: Tensor, rotary: Rotation | None = None, start: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of x, and the keys and values of the memory: see `queries` and `keys_and_values`."""
        k, v = self.keys_and_values(memory, rotary)
        return self.queries(x, rotary, start).to(v.dtype), k, v

    def queries(self, x: Tensor, rotary: Rotation | None = None, start: int | None = None) -> Tensor:
        """The queries (B, H, N, D) of x; of cos and sin, they have those from `start` on, by default the last."""
        q = self.query(x).reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(-3, -2)
        if self.query_norm is not None:  # in the gains' precision, also under autocast
            q = self.query_norm(q.to(self.query_norm.weight.dtype))
        if rotary is not None:
            count, queries = rotary[0].shape[-2], q.shape[-2]
            if count != queries:
                first = count - queries if start is None else start
                rotary = rotary[0].narrow(-2, first, queries), rotary[1].narrow(-2, first, queries)
            q = rotate(q, *rotary)
        return q

    def keys_and_values(self, memory: Tensor, rotary: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values (B, Hkv, M, D) of the memory, which may be x itself."""
        heads = *memory.shape[:-1], self.num_kv_heads, self.head_dim
        k = self.key(memory).reshape(heads).transpose(-3, -2)
        v = self.value(memory).reshape(heads).transpose(-3, -2)
        if self.key_norm is not None:
            k = self.key_norm(k.to(self.key_norm.weight.dtype))
        if rotary is not None:
            k = rotate(k, *rotary)
        return k if k.dtype == v.dtype else k.to(v.dtype), v

    def extra_repr(self) -> str:
        """What `print(layer)` says of it."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        scale = "" if self.scale is None else f", scale={self.scale:.4g}"
        score = "dot" if self.score_weight is None else "additive"
        normalize = "" if self.normalize == "softmax" else f", normalize={self.normalize}"
        return f"{heads}, score={score}{scale}{normalize}, dropout={self.dropout}"
