"""From logits to the next token: which tokens may be drawn, how likely each is, and where a text ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from attngraph.arguments import check_fields, shown
from attngraph.graph.base import require_ints


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits: penalty, temperature, top_k, top_p, min_p, in this order (see `generate`)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        check_fields(self)
        if self.top_k is not None:
            require_ints(1, top_k=self.top_k)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more (got {self.temperature})")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be a probability above 0 (got {self.top_p})")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be a probability (got {self.min_p})")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 (got {self.repetition_penalty})")

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens there have been."""
        return self.repetition_penalty not in (None, 1)

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Logits (B, V), after the penalty → tokens (B,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.kept(logits).softmax(-1), 1, generator=generator)[:, 0]

    def log_probability(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """That of each token (B,) in what it was drawn from; of the likeliest one in what it would have been drawn from
        at temperature 1."""
        kept = logits if self.temperature == 0 else self.kept(logits)
        return kept.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]

    def penalized(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (B, V), those of the tokens that have been seen, bool (B, V), made smaller."""
        penalty = 1.0 if self.repetition_penalty is None else float(self.repetition_penalty)
        return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def kept(self, logits: Tensor) -> Tensor:
        """Logits (B, V) by temperature, their highest 0, with -inf for tokens that are not to be drawn."""
        logits = (logits - logits.amax(-1, keepdim=True)) / max(float(self.temperature), torch.finfo(logits.dtype).tiny)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            top = logits.topk(self.top_k)  # of equal logits too, no more than k
            logits = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            unlikely = ordered.cumsum(-1) - ordered >= self.top_p  # all likelier ones have the probability already
            logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
        if self.min_p:
            logits = logits.masked_fill(logits < math.log(self.min_p), -torch.inf)
        return logits


def seen_in(tokens: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor:
    """Which tokens there are in each row of tokens (B, N), padding not counted: bool (B, V)."""
    real = tokens if mask is None else tokens.where(mask, vocab_size)
    seen = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, real.clamp(max=vocab_size), True)[:, :vocab_size]


class Stop:
    """Where texts end: after one of some tokens, or sequences of tokens."""

    def __init__(self, stop: int | Sequence[int | Sequence[int]] | None):
        given = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        self.sequences = [_sequence(each) for each in given]

    def __len__(self) -> int:
        return len(self.sequences)

    def ends(self, new: Tensor) -> Tensor:
        """Which of the rows of new tokens, int64 (…, T), end in one of the sequences: bool (…)."""
        found = torch.zeros(new.shape[:-1], dtype=torch.bool, device=new.device)
        for sequence in self.sequences:
            if len(sequence) <= new.shape[-1]:
                found |= (new[..., -len(sequence) :] == torch.tensor(sequence, device=new.device)).all(-1)
        return found


def _sequence(stop: int | Sequence[int]) -> tuple[int, ...]:
    """A token, or a sequence of them, as a sequence."""
    wanted = "stop must be a token, or a list of tokens and of lists of tokens"
    sequence = tuple(stop) if isinstance(stop, list | tuple | range) else (cast(int, stop),)
    for token in sequence:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{wanted} (got {shown(token)} in it)")
        if not 0 <= token < 2**63:
            raise ValueError(f"{wanted}, which are 0 or more (got {token})")
    if not sequence:
        raise ValueError(f"{wanted}, each of at least one (got an empty one)")
    return sequence


def require_finite(logits: Tensor, step: int, live: Tensor | None = None) -> None:
    """Raise ValueError where a row of logits (B, V) gives no token; of the rows that go on, bool (B,)."""
    highest = logits.amax(-1)
    bad = ~highest.isfinite() if live is None else ~highest.isfinite() & live
    if bad.any():
        raise ValueError(f"logits must be finite (new token {step + 1} got {highest.tolist()} as the highest)")
