"""The attention that transformers calls: of a module's graph, by the places that the mask gives its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attngraph.attention import attend
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, bind
from attngraph.graph.compose import Disjoint
from attngraph.graph.patterns import Causal
from attngraph.hf.masks import Held, Places, Seen, in_front, own_pairs, places_in, says_places, seen_in
from attngraph.hf.modules import Offset, connection_of
from attngraph.kernels.scoring import SoftCap

FEW_QUERIES = 16  # up to so many, their edges are a mask for PyTorch's attention: no plan is made for each step


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers' `AttentionInterface` calls it: query (B, H, Q, D), key and value (B, Hkv, K, D) → out
    (B, Q, H, D), and the weights (B, H, Q, K), 0 where there is no edge, if they are asked for."""
    weights = bool(output_attentions) or _are_collected()
    call = _Call(module, query, key, value, dropout, scaling, position_bias, softcap, s_aux, weights)
    if attention_mask is None or says_places(attention_mask, key.shape[2]):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        out, weights = call.by_places(attention_mask, causal, others.get("position_ids"))
    else:
        out, weights = call.by_matrix(attention_mask)
    return out.transpose(1, 2).contiguous(), weights


def _are_collected() -> bool:
    """Whether a hook of transformers waits for weights: so output_attentions=True comes to most models."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    return any("attentions" in name for name in _active_collector.get() or ())


class _Call:
    """One call of a module."""

    def __init__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None,
        bias: Tensor | None, softcap: float | None, sinks: Tensor | None, weights: bool,
    ):  # fmt: skip
        self.q, self.k, self.v, self.bias, self.sinks, self.weights = q, k, v, bias, sinks, weights
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.softcap, self.dropout = softcap, dropout
        self.connection = connection_of(module)
        self.offset: Offset | None = module.__dict__.get("attngraph_offset")

    def effective(self, own: Graph) -> Graph:
        """The graph that runs."""
        return own if self.connection is None else self.connection.effective(own)

    # ------------------------------------------------------------------------------------ the ways it is computed

    def by_places(
        self, mask: Tensor | None, causal: bool, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """By what `masks.mask` says, or where there is no mask."""
        n, m = self.q.shape[2], self.k.shape[2]
        if torch.compiler.is_compiling():
            return self.compiled(mask, causal)
        if self.offset is not None:
            return self.across(None if mask is None else seen_in(mask, n).real)
        if mask is None:
            if causal and n != m:
                raise ValueError(f"{self.name}: queries and keys must be the same tokens without a mask (got {n}, {m})")
            return self.attend(self.effective(Causal() if causal else Full()))
        seen = seen_in(mask, n)
        if not seen.agrees_with(position_ids):
            raise ValueError(
                f"{self.name}: position_ids begin again, as in packed texts, which transformers tells apart only with "
                f"use_cache=False and without attention_mask: call the model so"
            )
        graph = self.effective(seen.own)
        if (held := getattr(self.k, "attngraph_held", None)) is not None:  # others are forgotten
            if held.graph not in (graph, self.effective(Causal())):
                raise ValueError(
                    f"{self.name}: the cache was made for {held.graph}, by which it has let keys go (got {graph}): "
                    f"begin with a new cache"
                )
            return self.masked(self.pairs(graph, seen, held))
        if seen.sizes != (n, m):
            raise ValueError(f"{self.name}: the mask must be of {n} queries and {m} keys (got {seen.sizes})")
        if seen.is_plain and (n == m or n > FEW_QUERIES):
            self.require_causal(graph, seen)
            return self.attend(graph if n == m else graph.sized(m, m).rows(m - n, m))
        if seen.is_packed and self.bias is None and not self.weights:
            return self.packed(graph, seen.lengths), None
        if seen.is_whole and (seen.in_front is None or (self.bias is None and not self.weights)):
            return self.padded(graph, seen.real, seen.in_front)
        if seen.own == Full() and n != m and self.connection is None:
            return self.attend(graph, seen.real)
        return self.masked(self.pairs(graph, seen))

    def across(self, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries of one sequence, some of them there already, and keys of another, real or not."""
        assert self.offset is not None
        n, m, done = self.q.shape[2], self.k.shape[2], self.offset.before
        graph = self.effective(Full())
        if self.offset.has_cache:  # as many queries as come, at most as many as the graph has
            size = graph.size[0] or done + n
            graph = graph.sized(size, m).rows(done, done + n)
        if self.connection is None or real is None:
            return self.attend(graph, real)
        front = in_front(real)  # the first real key is the first of the graph
        if self.weights and not torch.compiler.is_compiling() and bool(front.any()):
            raise ValueError(
                f"{self.name}: output_attentions needs keys that are padded on the right (got padding in front)"
            )
        index = (torch.arange(m, device=real.device) + front) % m
        moved = self.replaced(self.q, _taken(self.k, index), _taken(self.v, index))
        return moved.attend(graph, real.gather(1, index))

    def compiled(self, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor | None]:
        """The same while a program is compiled, which can't look at numbers."""
        n, m = self.q.shape[2], self.k.shape[2]
        if self.offset is not None:
            return self.across(None if mask is None else mask[:, 0, 0, 1 + n :] >= 0)
        graph = self.effective(Causal() if causal else Full())
        if mask is None:
            if causal and n != m:
                raise ValueError(f"{self.name}: queries and keys must be the same tokens without a mask (got {n}, {m})")
            return self.attend(graph)
        real = mask[:, 0, 0, 1 + n :] >= 0
        is_more = mask.shape[2] > 2  # the mask was made before: its pattern is more than causal
        if n != m and not causal and not is_more:
            return self.attend(graph, real)
        if n == m and not is_more:
            return self.padded(graph, real, in_front(real))
        places, texts = mask[:, 0, 0, 1:], mask[:, 0, 1, 1:]
        queries, keys = (Places(places[:, part], texts[:, part]) for part in (slice(n), slice(n, None)))
        if self.connection is not None and self.connection.mode == "replace":
            if n != m and not self.connection.is_causal_at_once:
                raise self.not_causal(self.connection.graph)
            return self.masked(pairs(self.connection.graph, queries, keys))
        found = pairs(self.effective(Full() if is_more else Causal()), queries, keys)
        return self.masked(found & own_pairs(mask, queries, keys) if is_more else found)

    def attend(self, graph: Graph, real: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """By a graph of all tokens, real or not."""
        n, m = self.q.shape[2], self.k.shape[2]
        bias = None if self.bias is None else self.bias.expand(-1, self.q.shape[1], n, m)
        try:
            found = attend(
                self.q, self.k, self.v, graph, bias=bias, attention_mask=real, scale=self.scale,
                score="dot" if self.softcap is None else SoftCap(self.softcap), sinks=self.sinks,
                dropout_p=self.dropout, return_weights=self.weights,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if not isinstance(found, tuple):
            return found, None
        return found[0], as_matrix(graph, found[1], n, m)

    def padded(self, graph: Graph, real: Tensor, front: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One text in a row; padding in front goes behind it meanwhile."""
        if front is None:
            return self.attend(graph, real)
        n = self.q.shape[2]
        index = (torch.arange(n, device=front.device) + front) % n
        sides = [_taken(side, index) for side in (self.q, self.k, self.v)]
        moved = self.replaced(*sides)
        out, weights = moved.attend(graph, real.gather(1, index))
        return _taken(out, (torch.arange(n, device=front.device) - front) % n), weights

    def packed(self, graph: Graph, lengths: list[list[int]]) -> Tensor:
        """Texts one after the other, in each row."""
        out = []
        for row, own in enumerate(lengths):
            sides = (side[row : row + 1] for side in (self.q, self.k, self.v))
            out.append(self.replaced(*sides).attend(Disjoint([graph.sized(length, length) for length in own]))[0])
        return torch.cat(out)

    def pairs(self, graph: Graph, seen: Seen, held: Held | None = None) -> Tensor:
        """Which pairs of queries and keys are edges, asked once for all layers with one graph.

        `held` says which of the keys are there; None: all.
        """
        key = graph, self.k.shape[2]  # what layers of one graph have forgotten is the same
        if key in seen.pairs:
            return seen.pairs[key]
        self.require_causal(graph, seen)
        keys = seen.keys if held is None else Places(*(side[:, held()] for side in seen.keys))
        try:
            found = pairs(graph, seen.queries, keys)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if held is None:
            self.require_all_keys(graph, seen, found)
        seen.pairs[key] = found
        return found

    def by_matrix(self, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """By a mask of pairs that the model made itself: bool, or added to the scores."""
        n, m = self.q.shape[2], self.k.shape[2]
        if mask.dtype == torch.int64:  # as people write them
            mask = mask != 0
        if mask.dtype != torch.bool:
            self.bias = mask if self.bias is None else mask + self.bias
            mask = mask > torch.finfo(mask.dtype).min / 2
        if self.connection is None:
            return self.masked(mask)
        if n != m or self.connection.mode == "replace":
            raise ValueError(
                f"{self.name}: a mask of pairs does not say which tokens are padding, or where they stand: it needs "
                f"mode='intersect' and use_cache=False, or a model that is not compiled, as by generate(…, "
                f"disable_compile=True) (got a mask of {n} × {m} and mode={self.connection.mode!r})"
            )
        tokens = places_in(mask[:, 0])
        return self.masked(mask & pairs(self.connection.graph, tokens, tokens))

    def masked(self, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """By a mask (B, 1 or H, Q, K) with all scores at hand."""
        q, k, v, bias = self.q, self.k, self.v, self.bias
        group = q.shape[1] // k.shape[1]
        if self.softcap is None and self.sinks is None and not self.weights:
            if q.shape[2] == 1 and group > 1 and mask.shape[1] == 1 and bias is None:  # heads of a group as queries
                folded = q.view(q.shape[0], k.shape[1], group, q.shape[3])
                out = scaled_dot_product_attention(folded, k, v, mask, self.dropout, scale=self.scale)
                return out.reshape(*q.shape[:3], v.shape[3]), None
            added = mask if bias is None else bias.to(q.dtype).masked_fill(~mask, -torch.inf)
            out = scaled_dot_product_attention(
                q, k, v, added, self.dropout, scale=self.scale, enable_gqa=group > 1
            )  # fmt: skip
            return out, None
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(exact) @ k.repeat_interleave(group, 1).to(exact).mT * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.to(exact).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = torch.ops.aten._safe_softmax(scores, -1)[..., : k.shape[2]].to(v.dtype)
        dropped = torch.nn.functional.dropout(weights, self.dropout)
        return dropped @ v.repeat_interleave(group, 1), weights

    # -------------------------------------------------------------------------------------------------- its parts

    @property
    def name(self) -> str:
        """What errors call the module."""
        return "attention" if self.connection is None else self.connection.name

    def replaced(self, q: Tensor, k: Tensor, v: Tensor) -> _Call:
        """The same of other nodes."""
        other = object.__new__(_Call)
        other.__dict__ |= self.__dict__ | {"q": q, "k": k, "v": v}
        return other

    def require_causal(self, graph: Graph, seen: Seen) -> None:
        """Raise if earlier queries, which are not here any more, would have heard the keys of these."""
        n, m = seen.sizes
        if self.connection is None or self.connection.mode == "intersect" or n == m or seen.own == Full():
            return
        if not self.connection.is_causal(m):
            raise self.not_causal(graph)

    def not_causal(self, graph: Graph) -> ValueError:
        """The error of a graph by which tokens hear later ones, that come when they are done."""
        return ValueError(
            f"{self.name}: with a cache of keys a graph must be causal, as earlier tokens can't hear later ones "
            f"(got {graph}): use_cache=False, mode='intersect', or ({graph}) & Causal()"
        )

    def require_all_keys(self, graph: Graph, seen: Seen, found: Tensor) -> None:
        """Raise if a cache has dropped keys that the graph gives to these queries."""
        if self.connection is None or self.connection.mode == "intersect" or not seen.keys_are_missing:
            return
        count = int(seen.queries.place.max()) + 1
        every = torch.arange(count, device=found.device).expand(len(seen.real), -1)
        if pairs(graph, seen.queries, Places(every, torch.zeros_like(every))).sum() != found.sum():
            raise ValueError(
                f"{self.name}: the model's sliding cache has dropped keys that {graph} gives to a query: "
                f"mode='intersect', or cache_implementation='dynamic' with a config without sliding_window"
            )


def pairs(graph: Graph, queries: Places, keys: Places) -> Tensor:
    """Which pairs are edges, bool (B, 1 or H, Q, K)."""
    size = max(queries.place.shape[1], keys.place.shape[1])
    if not torch.compiler.is_compiling():
        size = max(size, *(int(side.place.max()) + 1 for side in (queries, keys) if side.place.numel()))
    if graph._unresolved:
        raise ValueError(f"{graph}, which queries and keys choose, needs all of them: use_cache=False")
    for name, nodes in zip(("queries", "keys"), graph.size, strict=True):
        if nodes is not None and nodes < size:
            raise ValueError(f"graph {graph} must have as many {name} as there are tokens (got {nodes} and {size})")
    bound = bind(graph, size, size)
    found = bound.contains(queries.place[:, :, None].clamp(min=0), keys.place[:, None].clamp(min=0))
    found = found[:, None] if bound.heads is None else found.transpose(0, 1)
    alike = (queries.text[:, :, None] == keys.text[:, None]) & (keys.place >= 0)[:, None]
    return found & (alike & (queries.place >= 0)[..., None])[:, None]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """The nodes of x (B, H, N, D) in another order, (B, N), in each entry."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def as_matrix(graph: Graph, weights: Tensor, n: int, m: int) -> Tensor:
    """Weights of edges (B, H, E) as (B, H, N, M)."""
    source, target = graph.edge_index(n, m).to(weights.device)
    found = weights.new_zeros(*weights.shape[:2], n, m)
    found[:, :, target, source] = weights
    return found
