"""Sampling from a language model, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    context: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of tokens (B, N) by `max_new_tokens` sampled ones: (B, N + max_new_tokens).

    Args:
        model: tokens (B, N) → logits (B, N, V).
        context: how many of the last tokens the model is shown; by default all.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample only from the k likeliest tokens.
        top_p: sample only from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        generator: the source of chance, on the tokens' device.

    Raises ValueError for settings out of range and for an empty prompt.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (B, N) with at least one token each (got {tuple(tokens.shape)})")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more (got {temperature})")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more (got {top_k})")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a probability above 0 (got {top_p})")
    training = model.training
    model.eval()  # no dropout
    for _ in range(max_new_tokens):
        logits = model(tokens if context is None else tokens[:, -context:])[:, -1].float()
        if temperature == 0:
            next_token = logits.argmax(-1, keepdim=True)
        else:
            probabilities = _truncated(logits / temperature, top_k, top_p).softmax(-1)
            next_token = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, next_token], dim=1)
    model.train(training)
    return tokens


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
