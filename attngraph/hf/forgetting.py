"""A layer of transformers' dynamic cache from which a key goes when no later query hears it. It needs transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attngraph.analysis import last_reader
from attngraph.graph.base import Graph
from attngraph.hf.masks import Held, in_front

FURTHEST = 1 << 20  # tokens that are thought of, if a model allows more
MOST_DEAD = 32  # tokens after which it is looked again, as to let keys go copies the others


class LastQueries:
    """The last query that hears each key of a graph, of as many tokens as there may be; layers share it."""

    def __init__(self, graph: Graph, most: int = 0):
        self.graph, self.most = graph, most
        self.found = torch.empty(0, dtype=torch.int64)

    def of(self, length: int, device: torch.device) -> Tensor:
        """int64, of more than so many keys."""
        if len(self.found) <= length:
            size = max(1024, min(self.most, FURTHEST), 2 * length)
            self.found = last_reader(self.graph, size, size)
        self.found = self.found.to(device)
        return self.found


class ForgettingLayer(DynamicLayer):
    """Keys and values that some later query hears; now and then the others go."""

    is_croppable = False
    forgets = True

    def __init__(self, last_queries: LastQueries):
        super().__init__()
        self.graph, self.last_queries = last_queries.graph, last_queries
        self.attention_mask: Tensor | None = None
        self.length = 0
        """How many tokens there were."""
        self.looked = 0
        """And when it was looked for keys to let go of."""
        self.old = torch.empty(0, dtype=torch.int64)
        """Of the keys that were kept then, int64 (K,): where among the tokens, padding and all."""
        self.last = torch.empty(0, dtype=torch.int64)
        """The last query that hears each key of a text, of as many as it was looked at with."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any) -> Any:
        new = key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *arguments, **options)
        self.length += new
        if len(self.old) < self.looked:
            keys.attngraph_held = Held(self.graph, self.old, self.looked, self.length)  # pyright: ignore
        if self.length - self.looked > MOST_DEAD:
            self._forget()
        return keys, values

    def _forget(self) -> None:
        """Let go of what no later query hears, where that is a good part."""
        here = Held(self.graph, self.old.to(self.device), self.looked, self.length)()
        if len(self.last) <= self.length:
            self._look_further(here)
        self.old, self.looked = here, self.length
        front = _in_front(self.attention_mask, self.device)
        place = self.old[:, None] - front  # in each text that begins elsewhere
        kept = ((self.last[place.clamp(min=0)] >= self.length - front) & (place >= 0)).any(1)
        if len(kept) - int(kept.sum()) > len(kept) // 8:
            index = kept.nonzero()[:, 0]
            self.old = self.old[index]
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys.index_select(-2, index), self.values.index_select(-2, index)

    def _look_further(self, here: Tensor) -> None:
        """Find the last queries of more tokens; what is not here any more must have no later one."""
        self.last = self.last_queries.of(self.length, self.device)
        gone = torch.ones(self.looked, dtype=torch.bool, device=self.device)
        gone[here[here < self.looked]] = False
        if self.attention_mask is None and bool((self.last[: self.looked][gone] >= self.length).any()):
            raise ValueError(
                f"{self.graph} gives keys to a later query that were let go at {self.length} tokens: connect(…, "
                f"evict=False), or a config whose max_position_embeddings says how many tokens there may be"
            )

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.length, self.looked, self.old = 0, 0, self.old[:0]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a cache that forgets keys can't go back: connect(…, evict=False) for assisted decoding")


def _in_front(attention_mask: Any, device: torch.device) -> Tensor:
    """How much padding is in front of the texts, int64 (different ones,), where a mask of tokens is given."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return torch.zeros(1, dtype=torch.int64, device=device)
    return in_front(attention_mask.bool())[:, 0].unique().to(device)
