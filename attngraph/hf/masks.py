"""What the masks of a Hugging Face model say: which tokens are real, of which text, and the model's own pattern.

transformers asks for one mask for each kind of layer, and hands it to the attention of each. Here it is no matrix of
pairs but a row of numbers, int64 (B, 1, 2, 1 + Q + K), which stays what it is when it is copied or moved:

| | [0] | [1 : 1 + Q] | [1 + Q :] |
|---|---|---|---|
| [:, 0, 0] | the kind of the model's own pattern | the place of each query in its text, -1: padding | of each key |
| [:, 0, 1] | its width | the number of its text | of each key |

A row more, of zeros, says to a compiled program, which can't look at numbers, that the pattern is more than causal, or
the texts are several. A pattern that has no kind becomes the matrix that "sdpa" gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal, Chunks, Window

# The model's own patterns, by the number of their kind, of a width.
KINDS: tuple[Callable[[int], Graph], ...] = (
    lambda width: Full(),
    lambda width: Causal(),
    lambda width: Causal() & Window(width - 1, 0),
    lambda width: Window(width, width),
    lambda width: Causal() & Chunks(width),
)
FULL, CAUSAL, SLIDING, LOCAL, CHUNKED = range(5)


class Places(NamedTuple):
    """Of queries or of keys."""

    place: Tensor
    """int64 (B, nodes): where in its text; -1 of padding."""
    text: Tensor
    """int64 (B, nodes): the number of its text."""


class Held(NamedTuple):
    """The keys that a cache still has."""

    graph: Graph
    """By which the others were let go."""
    old: Tensor
    """Where among the tokens those are that were there when it was looked: int64."""
    looked: int
    """How many tokens there were then."""
    length: int
    """And are now: all since are there."""

    def __call__(self) -> Tensor:
        """Where all of them are, int64 (K,)."""
        return torch.cat([self.old, torch.arange(self.looked, self.length, device=self.old.device)])


class Seen:
    """What a mask says, looked at once for all layers."""

    def __init__(self, own: Graph, queries: Places, keys: Places, plain: bool | None = None):
        self.own, self.queries, self.keys, self._plain = own, queries, keys, plain
        self._agrees: bool | None = None
        self.pairs: dict[Any, Tensor] = {}  # those that were asked for, by graph and places

    @classmethod
    def of(cls, mask: Tensor, num_queries: int) -> Seen:
        """From the numbers."""
        kind, width = mask[0, 0, :2, 0].tolist()
        places, texts = mask[:, 0, 0, 1:], mask[:, 0, 1, 1:]
        queries, keys = slice(num_queries), slice(num_queries, None)
        return cls(
            KINDS[kind](width), Places(places[:, queries], texts[:, queries]), Places(places[:, keys], texts[:, keys])
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.queries.place.shape[1], self.keys.place.shape[1]

    @cached_property
    def is_plain(self) -> bool:
        """Whether all keys are the first tokens of one text, and the queries its last."""
        if self._plain is not None:
            return self._plain
        n, m = self.sizes
        there = torch.arange(m, device=self.keys.place.device)
        if n > m or self.is_packed:
            return False
        return bool(((self.keys.place == there).all() & (self.queries.place == there[m - n :]).all()).item())

    @cached_property
    def is_packed(self) -> bool:
        """Whether there are several texts in a row."""
        return bool((self.keys.text != self.keys.text[:, :1]).any())

    @cached_property
    def is_whole(self) -> bool:
        """Whether queries and keys are the same tokens, one text in a row, padded or not."""
        n, m = self.sizes
        return n == m and not self.is_packed and torch.equal(self.queries.place, self.keys.place)

    @cached_property
    def keys_are_missing(self) -> bool:
        """Whether the first keys of a text are not there any more."""
        first = self.keys.place.where(self.real, torch.iinfo(torch.int64).max).amin(-1)
        return bool((first > 0).any())

    @property
    def real(self) -> Tensor:
        """Which keys are no padding, bool (B, K)."""
        return self.keys.place >= 0

    @cached_property
    def in_front(self) -> Tensor | None:
        """How much padding is in front, int64 (B, 1); None if nowhere any is."""
        front = in_front(self.real)
        return front if bool(front.any()) else None

    def agrees_with(self, position_ids: Tensor | None) -> bool:
        """Whether position_ids, int64 (B, N), begin again only where texts do; looked at once."""
        if self._agrees is None:
            self._agrees = True
            n, m = self.sizes
            if position_ids is not None and n == m and position_ids.shape[-1] == n and position_ids.ndim == 2:
                real = self.real[:, 1:] & self.real[:, :-1]
                again = position_ids[:, 1:] < position_ids[:, :-1]
                self._agrees = self.is_packed or not bool((again & real).any())
        return self._agrees

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Of packed texts, in each row."""
        return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in self.keys.text.cpu()]


def in_front(real: Tensor) -> Tensor:
    """How many are False before the first True of each row: int64 (B, 1)."""
    return (real.cumsum(-1) == 0).sum(-1, keepdim=True)


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor:
    """As transformers' `AttentionMaskInterface` calls it; see above for what comes."""
    own = own_pattern(mask_function)
    if own is None and "chunked_attention" in (getattr(others.get("config"), "layer_types", None) or ()):
        raise ValueError("chunked attention, as of Llama 4, can't be compiled with a graph: call the model as it is")
    if own is None:
        from transformers.masking_utils import sdpa_mask

        found = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=cast(int, q_offset),
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask, device=device,
            **{**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )  # fmt: skip
        assert found is not None
        return found
    slots = torch.arange(kv_length, device=device) + kv_offset
    queries = torch.arange(q_length, device=device) + q_offset
    is_cross = own.kind == FULL and q_length != kv_length
    real = slots[None] < (queries[-1:] + 1)[:, None] if not is_cross else slots[None] >= 0
    real = real.expand(batch_size, -1)
    front = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
    if attention_mask is not None:
        seen = attention_mask.to(device=device, dtype=torch.bool)
        missing = kv_length + kv_offset - seen.shape[-1]
        padded = torch.nn.functional.pad(seen, (0, missing)) if missing > 0 else seen
        real = real & padded[:, kv_offset : kv_offset + kv_length]
        front = in_front(seen)
    of_keys = (slots - front).where(real, -1)
    of_queries = queries.expand(batch_size, -1) if is_cross else queries - front
    of_queries = of_queries.clamp(min=-1)
    texts = [torch.zeros_like(side) for side in (of_queries, of_keys)]
    if own.texts is not None:
        texts = [own.texts.to(device).expand(batch_size, -1)] * 2
        starts = (texts[0][:, 1:] != texts[0][:, :-1]).nonzero()
        begun = torch.zeros_like(of_keys)
        begun[starts[:, 0], starts[:, 1] + 1] = starts[:, 1] + 1
        of_keys = of_queries = slots - begun.cummax(-1).values
    places = torch.cat([of_queries, of_keys], 1)
    header = torch.tensor([[own.kind], [own.width]], device=device).expand(batch_size, 2, 1)
    numbers = torch.cat([header, torch.stack([places, torch.cat(texts, 1)], 1)], 2)[:, None]
    if own.kind > CAUSAL or own.texts is not None:
        numbers = torch.cat([numbers, torch.zeros_like(numbers[:, :, :1])], 2)
    if not torch.compiler.is_compiling():
        whole = attention_mask is None and own.texts is None and isinstance(q_offset, int) and kv_offset == 0
        plain = True if whole and not is_cross and q_offset + q_length == kv_length else None
        sides = Places(of_queries, texts[0]), Places(of_keys, texts[1])
        numbers.attngraph_seen = Seen(KINDS[own.kind](own.width), *sides, plain)  # type: ignore[attr-defined]
    return numbers


def says_places(mask: Tensor, m: int) -> bool:
    """Whether a mask is one that `mask` made, of m keys or more, rather than one of pairs."""
    return mask.dtype == torch.int64 and mask.ndim == 4 and mask.shape[3] > m


def own_pairs(mask: Tensor, queries: Places, keys: Places) -> Tensor:
    """Which pairs a model's own pattern has, whichever it is, bool (B, 1, Q, K): without a look at the numbers."""
    kind, width = mask[:, 0, 0, :1, None], mask[:, 0, 1, :1, None]
    i, j = queries.place[:, :, None], keys.place[:, None]
    of_kind = (
        torch.ones_like(i == j),
        j <= i,
        (j <= i) & (i - j < width),
        (i - j).abs() <= width,
        (j <= i) & (i // width.clamp(min=1) == j // width.clamp(min=1)),
    )
    return torch.stack([found & (kind == number) for number, found in enumerate(of_kind)]).any(0)[:, None]


def places_in(pairs: Tensor) -> Places:
    """Of tokens whose own pattern is a mask of pairs, bool (B, N, N): a text begins where none before is heard."""
    begins = ~pairs.tril(-1).any(-1)
    there = torch.arange(pairs.shape[1], device=pairs.device)
    first = torch.where(begins, there, 0).cummax(-1).values
    return Places(there - first, begins.cumsum(-1))


def seen_in(mask: Tensor, num_queries: int) -> Seen:
    """What a mask says that `mask` made; looked at anew where it was copied."""
    found = getattr(mask, "attngraph_seen", None)
    if found is None:
        found = mask.attngraph_seen = Seen.of(mask, num_queries)  # type: ignore[attr-defined]
    return found


# --------------------------------------------------------------------------------------- the model's own pattern


class Own(NamedTuple):
    """A pattern of the model's."""

    kind: int
    width: int = 0
    texts: Tensor | None = None
    """The numbers of packed texts, (B, Q)."""


def own_pattern(function: Callable) -> Own | None:
    """Which one a mask function of transformers is; None, if none that has a kind."""
    from transformers import masking_utils as theirs

    bases = {theirs.causal_mask_function: CAUSAL, theirs.bidirectional_mask_function: FULL}
    if function in bases:
        return Own(bases[function])
    if torch.compiler.is_compiling():  # which can't look into functions
        return None
    kinds, widths, texts = set(), set(), None
    for part in _conjuncts(function):
        packed = _captured(part, "packed_sequence_mask_function", "packed_sequence_mask")
        overlay = next((found for each in OVERLAYS if (found := _overlay(part, *each))), None)
        if part in bases:
            kinds.add(bases[part])
        elif packed is not None:
            texts = packed
        elif overlay is not None:
            kinds.add(overlay[0])
            widths.add(overlay[1])
        else:
            return None
    kind = TOGETHER.get(frozenset(kinds))
    return None if kind is None or len(widths) > 1 else Own(kind, max(widths, default=0), texts)


OVERLAYS = (
    (SLIDING, "sliding_window_overlay", "sliding_window"),
    (LOCAL, "sliding_window_bidirectional_overlay", "sliding_window"),
    (CHUNKED, "chunked_overlay", "chunk_size"),
)
TOGETHER = {
    frozenset({FULL}): FULL, frozenset({CAUSAL}): CAUSAL, frozenset({CAUSAL, SLIDING}): SLIDING,
    frozenset({FULL, LOCAL}): LOCAL, frozenset({CAUSAL, CHUNKED}): CHUNKED,
}  # fmt: skip


def _overlay(function: Callable, kind: int, maker: str, variable: str) -> tuple[int, int] | None:
    width = _captured(function, maker, variable)
    return None if width is None else (kind, int(width))


def _conjuncts(function: Callable) -> Iterator[Callable]:
    """The functions that must all say yes."""
    parts = _captured(function, "and_masks", "mask_functions")
    inner = _captured(function, "remap_positions_for_packed_sequence", "mask_function")
    if parts is None and inner is None:
        yield function
    for part in (inner,) if parts is None else parts:
        if part is not None:
            yield from _conjuncts(part)


def _captured(function: Callable, maker: str, variable: str) -> Any:
    """What a closure of transformers.masking_utils, made by a function of this name, has captured."""
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        return None
    if not getattr(function, "__qualname__", "").startswith(f"{maker}.<locals>."):
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[variable].cell_contents if variable in cells else None
