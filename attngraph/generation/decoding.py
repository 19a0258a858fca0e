"""Texts continued by a language model: at once, or token by token as they are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.generation.beams import search
from attngraph.generation.sampling import Sampling, Stop, require_finite, seen_in
from attngraph.generation.text import Text
from attngraph.graph.base import require_ints


class Scored(NamedTuple):
    """Tokens, and how likely they were."""

    tokens: Tensor
    """(B, N), as they come without scores."""
    scores: Tensor
    """The log-probability of each new token, (B, new); of beams, the score of each text, (B,)."""


@checked
def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    context: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: int | Sequence[int | Sequence[int]] | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    source: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    return_scores: bool = False,
) -> Tensor | Scored:
    """Continue each row of tokens (B, N) by up to `max_new_tokens` new ones: (B, N + new).

    Names that transformers has mean what they mean there, in its order: penalty, temperature, top_k, top_p, min_p.

    Args:
        model: tokens (B, N) → logits (B, N, V); with a mask, it also takes `attention_mask=`. With a `source`, an
            encoder–decoder, whose target is continued.
        attention_mask: bool or integers 0 and 1, (B, N), True or 1 for real tokens: prompts of different lengths are
            padded on the left. Each is continued as if it were alone.
        context: how many of the last tokens the model is shown; by default all.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample only from the k likeliest tokens.
        top_p: sample only from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        min_p: sample only from tokens at least so likely, as a share of the likeliest one's probability.
        repetition_penalty: divides the logits above 0 of tokens that the row has, and multiplies those below (Keskar et
            al. 2019).
        stop: a token after which a row ends, or a list of tokens and of sequences of new tokens. What has ended is
            filled up with its last token, and the result is as long as its longest row.
        num_beams: above 1, the likeliest text is searched for by keeping so many at each step; nothing is sampled.
        length_penalty: of beams: a text's score is its log-probability / length ** length_penalty.
        num_return_sequences: of beams: so many of the best texts of each row, one after the other.
        generator: the source of chance, on the tokens' device.
        use_cache: each step computes the new token alone, with a `KVCache`, in models that take one, as long as the
            text fits into the context; otherwise all is computed again. Graphs that differ with the number of nodes,
            as `Random` does, are those of the longest text.
        source: of an encoder–decoder: what `encode` takes.
        source_attention_mask: which of the source is real, (B, M).
        return_scores: also return, under what each token was drawn from, its log-probability (at temperature 0, that of
            the model; 0 after the end); of beams, the scores of the texts.

    Raises ValueError for settings out of range, for an empty prompt, for one that is padded on the right, for a model
    that a cache can't serve (see `KVCache`), and for logits from which no token can be taken (NaN, +inf, or -inf for
    all); TypeError for what is of another kind.

    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4)
    >>> model = GPT(config, vocab_size=65, graph=Causal() & (Window(8, 0) | Prefix(2)))
    >>> generate(model, torch.zeros(2, 1, dtype=torch.int64), 20, temperature=0.8, top_p=0.9).shape
    torch.Size([2, 21])
    """
    require_ints(1, num_beams=num_beams, num_return_sequences=num_return_sequences)
    if num_return_sequences > num_beams:
        raise ValueError(f"num_return_sequences must be at most num_beams={num_beams} (got {num_return_sequences})")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number (got {length_penalty})")
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    sampled = {name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p")} | {"generator": generator}
    given = [name for name, value in sampled.items() if value is not None]
    if num_beams > 1 and (given or temperature not in (0, 1)):
        raise ValueError(
            f"{', '.join(given) or 'temperature'} can't be given with num_beams={num_beams}: beams are the likeliest, "
            f"nothing is sampled"
        )
    ends = Stop(stop)
    text = Text(
        model,
        tokens,
        max_new_tokens,
        attention_mask=attention_mask,
        context=context,
        use_cache=use_cache,
        source=source,
        source_attention_mask=source_attention_mask,
    )
    tokens = tokens.long()
    if num_beams > 1 and not max_new_tokens:
        tokens = tokens.repeat_interleave(num_return_sequences, 0)
        new, scores = tokens[:, :0], torch.zeros(len(tokens), device=tokens.device)
    elif num_beams > 1:
        new, scores = search(text, max_new_tokens, num_beams, num_return_sequences, ends, length_penalty, sampling)
        tokens = tokens.repeat_interleave(num_return_sequences, 0)
    else:
        made = list(_drawn(text, max_new_tokens, sampling, ends, generator, return_scores))
        new = torch.stack([each.tokens for each in made], 1) if made else tokens[:, :0]
        scores = torch.stack([each.scores for each in made], 1) if made else tokens[:, :0].float()
    tokens = torch.cat([tokens, new], dim=1)
    return Scored(tokens, scores) if return_scores else tokens


@checked
def stream(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    context: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: int | Sequence[int | Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    source: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    return_scores: bool = False,
) -> Iterator[Tensor] | Iterator[Scored]:
    """The new tokens of `generate`, (B,) at a time, as they are made; its arguments, which are checked at once.

    It ends when all rows have. With scores, it yields `(tokens, scores)`, both (B,).

    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> model = GPT(TransformerConfig(embed_dim=64, num_layers=2, num_heads=4), vocab_size=65)
    >>> for token in stream(model, torch.zeros(1, 1, dtype=torch.int64), 3):
    ...     print(token.shape)
    torch.Size([1])
    torch.Size([1])
    torch.Size([1])
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    ends = Stop(stop)
    text = Text(
        model,
        tokens,
        max_new_tokens,
        attention_mask=attention_mask,
        context=context,
        use_cache=use_cache,
        source=source,
        source_attention_mask=source_attention_mask,
    )
    made = _drawn(text, max_new_tokens, sampling, ends, generator, return_scores)
    return made if return_scores else (each.tokens for each in made)


@torch.no_grad()
def _drawn(
    text: Text, count: int, sampling: Sampling, stop: Stop, generator: torch.Generator | None, with_scores: bool
) -> Iterator[Scored]:
    """So many new tokens (B,), one step after the other, with their log-probabilities where these are asked for."""
    live: Tensor | None = None  # (B,), once rows have ended
    seen: Tensor | None = None
    for step in range(count):
        logits = text.logits()
        require_finite(logits, step, live)
        if live is not None:
            logits = logits.where(live[:, None], 0.0)
        if sampling.penalizes:
            seen = seen_in(*text.prompt_tokens(), logits.shape[-1]) if seen is None else seen
            logits = sampling.penalized(logits, seen)
        tokens = sampling.draw(logits, generator)
        scores = sampling.log_probability(logits, tokens) if with_scores else tokens
        if live is not None:
            tokens, scores = tokens.where(live, text.new[:, -1]), scores.where(live, 0)
        text.append(tokens)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        yield Scored(tokens, scores)
        if stop:
            ended = stop.ends(text.new)
            live = ~ended if live is None else live & ~ended
            if not live.any():
                return
