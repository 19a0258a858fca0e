"""The layers of a running cache: attention of new nodes over what each group of heads holds."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from attngraph.attention import attend
from attngraph.generation.slots import HeadGroup
from attngraph.graph.base import Graph
from attngraph.graph.compose import PerHead
from attngraph.graph.rewrite import simplify
from attngraph.kernels.scoring import Additive
from attngraph.nn.attention import Scoring
from attngraph.nn.positions import Rotary, rotate


class CachedLayer:
    """The keys and values of one layer, for its attention."""

    def __init__(self, rotary: Rotary | None):
        self.rotary = rotary
        self.groups: list[HeadGroup] = []
        self.prompt: tuple[Tensor, Tensor] | None = None
        self.cross: CachedLayer | None = None

    @property
    def holds_all(self) -> bool:
        """Whether all keys are there: a memory's, after the prompt."""
        return bool(self.groups) and not self.groups[0].track.brings_keys

    @property
    def turns(self) -> bool:
        """Whether queries and keys are turned here."""
        return self.rotary is not None

    @property
    def of_memory(self) -> CachedLayer:
        """The keys and values of the phase that hears a memory."""
        if self.cross is None:
            self.cross = CachedLayer(None)
        return self.cross

    def attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        graph: Graph,
        *,
        bias: Any = None,
        attention_mask: Tensor | None = None,
        scoring: Scoring,
    ) -> Tensor:
        """q (B, H, T, D), and the new nodes' keys and values, None where all are kept → (B, H, T, Dv).

        Of a prompt by its graph, as ever; later by what is in the slots.
        """
        if not self.groups:
            assert k is not None
            assert v is not None
            self.prompt = k, v
            if self.rotary is not None:
                turn = self.rotary(
                    torch.arange(k.shape[2], device=k.device), torch.promote_types(k.dtype, torch.float32)
                )
                q, k = rotate(q, *turn), rotate(k, *turn)
            return cast(Tensor, attend(q, k, v, graph, bias=bias, attention_mask=attention_mask, **scoring))
        first = self.groups[0]
        if len(self.groups) == 1:
            return first.attend(q, k, v, bias, scoring)
        out: Tensor | None = None
        for group in self.groups:
            heads = list(cast(tuple, group.track.heads))
            of_group = list(cast(tuple, group.kv_heads))
            own_k, own_v = (None if side is None else side[:, of_group] for side in (k, v))
            found = group.attend(q[:, heads], own_k, own_v, bias, of_heads(scoring, heads))
            out = q.new_empty(*q.shape[:3], found.shape[3]) if out is None else out
            out[:, heads] = found
        assert out is not None
        return out


def head_groups(
    graph: Graph, heads: int, kv_heads: int
) -> list[tuple[Graph, tuple[int, ...] | None, tuple[int, ...] | None]]:
    """The key heads whose query heads hear by the same graphs: that graph, the query heads and the key heads."""
    if graph.heads is None:
        return [(graph, None, None)]
    shared, groups = heads // kv_heads, dict[tuple[Graph, ...], list[int]]()
    for kv_head in range(kv_heads):
        own = tuple(simplify(graph.of_head(head)) for head in range(kv_head * shared, (kv_head + 1) * shared))
        groups.setdefault(own, []).append(kv_head)
    found = []
    for own, members in groups.items():
        queries = tuple(kv_head * shared + place for kv_head in members for place in range(shared))
        alike = len(set(own)) == 1
        found.append((own[0] if alike else PerHead(own * len(members)), queries, tuple(members)))
    return found


def of_heads(scoring: Scoring, heads: list[int]) -> Scoring:
    """How keys answer the queries of some heads."""
    if "score" not in scoring:
        return scoring
    return {**scoring, "score": Additive(cast(Tensor, scoring["score"].weight)[heads])}
