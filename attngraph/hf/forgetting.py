"""A layer of transformers' dynamic cache from which a key goes when no later query hears it. It needs transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attngraph.analysis import last_reader
from attngraph.graph.base import Graph
from attngraph.hf.masks import in_front

MOST_DEAD = 32  # tokens after which it is looked again, as to let keys go copies the others


class ForgettingLayer(DynamicLayer):
    """Keys and values that some later query hears; now and then the others go."""

    is_croppable = False
    forgets = True

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph
        self.attention_mask: Tensor | None = None
        self.length = 0
        """How many tokens there were."""
        self.looked = 0
        """And when it was looked for keys to let go of."""
        self.old = torch.empty(0, dtype=torch.int64)
        """Of the keys that were kept then, int64 (K,): where among the tokens, padding and all."""
        self.last = torch.empty(0, dtype=torch.int64)
        """The last query that hears each key of a text, of as many as were looked at."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any) -> Any:
        new = key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *arguments, **options)
        self.length += new
        if len(self.old) < self.looked:
            keys.attngraph_places = partial(places, self.old, self.looked, self.length)  # pyright: ignore
        if self.length - self.looked > MOST_DEAD:
            self._forget()
        return keys, values

    def _forget(self) -> None:
        """Let go of what no later query hears, where that is a good part."""
        if len(self.last) <= self.length:
            size = max(1024, 2 * self.length)
            self.last = last_reader(self.graph, size, size).to(self.device)
        self.old, self.looked = places(self.old.to(self.device), self.looked, self.length), self.length
        front = _in_front(self.attention_mask, self.device)
        place = self.old[:, None] - front  # in each text that begins elsewhere
        kept = ((self.last[place.clamp(min=0)] >= self.length - front) & (place >= 0)).any(1)
        if len(kept) - int(kept.sum()) > len(kept) // 8:
            index = kept.nonzero()[:, 0]
            self.old = self.old[index]
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys.index_select(-2, index), self.values.index_select(-2, index)

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


def places(old: Tensor, looked: int, length: int) -> Tensor:
    """Of keys, where among the tokens: some old ones, and all since."""
    return torch.cat([old, torch.arange(looked, length, device=old.device)])


def _in_front(attention_mask: Any, device: torch.device) -> Tensor:
    """How much padding is in front of the texts, int64 (different ones,), where a mask of tokens is given."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return torch.zeros(1, dtype=torch.int64, device=device)
    return in_front(attention_mask.bool())[:, 0].unique().to(device)
