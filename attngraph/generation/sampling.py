"""Sampling from a language model, token by token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.graph.base import require_ints
from attngraph.nn.checks import values_known
from attngraph.nn.padding import padding_mask
from attngraph.nn.transformer import TransformerConfig


@torch.no_grad()
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
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of tokens (B, N) by `max_new_tokens` sampled ones: (B, N + max_new_tokens).

    Args:
        model: tokens (B, N) → logits (B, N, V); with a mask, it also takes `attention_mask=`.
        attention_mask: bool or integers 0 and 1, (B, N), True or 1 for real tokens: prompts of different lengths are
            padded on the left. Each is continued as if it were alone.
        context: how many of the last tokens the model is shown; by default all.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample only from the k likeliest tokens.
        top_p: sample only from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        generator: the source of chance, on the tokens' device.

    Raises ValueError for settings out of range, for an empty prompt, for one that is padded on the right, and for
    logits from which no token can be taken (NaN, +inf, or -inf for all); TypeError for what is of another kind.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        got = tokens.dtype if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise TypeError(f"tokens must be a tensor of integers (got {got})")
    _check_takes_tokens(model)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (B, N) with at least one token each (got {tuple(tokens.shape)})")
    require_ints(0, max_new_tokens=max_new_tokens)
    require_ints(1, **{name: value for name, value in (("context", context), ("top_k", top_k)) if value is not None})
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more (got {temperature})")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a probability above 0 (got {top_p})")
    mask = padding_mask("attention_mask", attention_mask, tokens[..., None])
    if mask is not None and values_known(mask) and not mask[:, -1].all():
        raise ValueError("attention_mask must be True or 1 for the last token of each prompt: pad prompts on the left")
    shown = max_new_tokens and tokens.shape[1] + max_new_tokens - 1
    if mask is not None:
        shown -= int(mask.int().argmax(-1).min())
    _check_positions(model, shown if context is None else min(context, shown))
    tokens = tokens.long()
    with _evaluating(model):
        for step in range(max_new_tokens):
            options = {} if mask is None else {"attention_mask": mask[:, -context:] if context else mask}
            logits = model(tokens[:, -context:] if context else tokens, **options)[:, -1].float()
            highest = logits.amax(-1)
            if not highest.isfinite().all():
                raise ValueError(f"logits must be finite (new token {step + 1} got {highest.tolist()} as the highest)")
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)
            else:
                probabilities = _truncated((logits - highest[:, None]) / float(temperature), top_k, top_p).softmax(-1)
                next_token = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, next_token], dim=1)
            mask = mask if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return tokens


def _check_takes_tokens(model: nn.Module) -> None:
    """Raise TypeError unless tokens are all that a model needs."""
    plain = getattr(model, "_orig_mod", model)  # of a compiled one, which takes anything
    try:
        signature = inspect.signature(plain.forward)
    except (ValueError, TypeError):  # of a script
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"model must be one from tokens (B, N) to logits (B, N, V) (got a {type(plain).__name__}, whose forward is "
            f"{error}); how a model with a source and a target is decoded, also by beam search, is in "
            f"examples/translate.py"
        ) from None


def _check_positions(model: nn.Module, shown: int) -> None:
    """Raise before anything is computed, not when the positions are used up."""
    config = getattr(model, "config", None)
    if isinstance(config, TransformerConfig) and config.position == "learned" and shown > (config.max_length or 0):
        raise ValueError(
            f"the model has {config.max_length} learned positions, and would be shown {shown} tokens: "
            f"context={config.max_length} shows it the last ones"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each of its modules is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _truncated(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (B, V) with -inf for tokens that are not to be sampled."""
    if top_k is not None and top_k < logits.shape[-1]:
        top = logits.topk(top_k)  # of equal logits too, no more than k
        logits = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        unlikely = ordered.cumsum(-1) - ordered >= top_p  # all likelier tokens together have the probability already
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    return logits
