"""Texts filled in by a model of masked tokens: a draft, and better ones, each from what was kept of the last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.generation.sampling import Sampling
from attngraph.generation.text import evaluating, require_takes_tokens, require_tokens
from attngraph.graph.base import require_ints
from attngraph.nn.padding import padding_mask

Order = Literal["random", "confidence"]


class Filled(NamedTuple):
    """A draft: the whole texts, and what of them is kept for the next one."""

    tokens: Tensor
    """(B, N), without masks."""
    kept: Tensor
    """Bool (B, N): what was given, and what the next draft builds on; at the last, all."""


@checked
def unmask(
    model: nn.Module,
    tokens: Tensor,
    mask_token: int,
    *,
    steps: int | None = None,
    order: Order = "random",
    remask: float = 0.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill in each `mask_token` of tokens (B, N): the texts, (B, N), in which all other tokens stay.

    A model of masked tokens, as `Encoder` or a `GPT` on `Full()`, is one of diffusion too: from a text of masks alone,
    it writes one (D3PM, Austin et al. 2021; MDLM, Sahoo et al. 2024). At each step every masked token is drawn from
    p(token | what is kept), and some of what was drawn is kept: of n masks, n · s / steps after step s. Tokens of one
    step are drawn independently of each other, so more steps are better; with as many as there are masks, in random
    order, each is drawn given all before it.

    Args:
        model: tokens (B, N) → logits (B, N, V); with a mask, it also takes `attention_mask=`.
        mask_token: the token that stands for what is to be filled in; it is never drawn.
        steps: how often the model is asked; by default once for each mask, of the row that has most.
        order: what of a draft is kept: "random", or with "confidence" what the model gave the highest probability
            (MaskGIT, Chang et al. 2022). The latter makes likelier and duller texts.
        remask: the share of what was filled in that is masked again before a step, random or least sure ones, as the
            order is; it falls linearly to 0 at the last step (ReMDM, Wang et al. 2025).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p, min_p: as in `generate`.
        attention_mask: bool or integers 0 and 1, (B, N), True or 1 for real tokens; masks in padding stay.
        generator: the source of chance, on the tokens' device.

    Raises ValueError for settings out of range, and for logits from which no token can be taken (NaN, +inf, or -inf for
    all); TypeError for what is of another kind.

    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=4, position="rotary")
    >>> model, mask = GPT(config, vocab_size=66, graph=Full()), 65
    >>> tokens = torch.tensor([[7, mask, mask, 8, mask]])
    >>> filled = unmask(model, tokens, mask, steps=2)
    >>> filled[0, [0, 3]], (filled == mask).any()
    (tensor([7, 8]), tensor(False))
    """
    made = drafts(
        model, tokens, mask_token, steps=steps, order=order, remask=remask, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, attention_mask=attention_mask, generator=generator,
    )  # fmt: skip
    found = tokens.long()
    for draft in made:
        found = draft.tokens
    return found


@checked
def drafts(
    model: nn.Module,
    tokens: Tensor,
    mask_token: int,
    *,
    steps: int | None = None,
    order: Order = "random",
    remask: float = 0.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Filled]:
    """The draft of each step of `unmask`, as it is made; its arguments, which are checked at once.

    The last has what `unmask` gives. Where nothing is masked, there is none.

    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> model = GPT(TransformerConfig(embed_dim=64, num_layers=2, num_heads=4), vocab_size=66, graph=Full())
    >>> for draft in drafts(model, torch.full((1, 9), 65), 65, steps=3):
    ...     print(draft.tokens.shape, int(draft.kept.sum()))
    torch.Size([1, 9]) 3
    torch.Size([1, 9]) 6
    torch.Size([1, 9]) 9
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    require_tokens(tokens)
    require_takes_tokens(model)
    require_ints(0, mask_token=mask_token)
    if steps is not None:
        require_ints(1, steps=steps)
    if not 0 <= remask < 1:
        raise ValueError(f"remask must be a share below 1 (got {remask})")
    real = padding_mask("attention_mask", attention_mask, tokens[..., None])
    masked = tokens == mask_token if real is None else (tokens == mask_token) & real
    most = int(masked.sum(1).max()) if len(masked) else 0
    if steps is None or (steps > most and not remask):  # a step for nothing
        steps = most
    text = _Masked(model, tokens.long(), masked, mask_token, real)
    return _drafts(text, steps if most else 0, order == "confidence", remask, sampling, generator)


class _Masked:
    """Rows of tokens (B, N), some of them masked; how sure the model was of those that it filled in."""

    def __init__(self, model: nn.Module, tokens: Tensor, masked: Tensor, mask_token: int, real: Tensor | None):
        self.model, self.modules, self.mask_token = model, list(model.modules()), mask_token
        self.tokens, self.masked = tokens.clone(), masked.clone()
        self.to_fill, self.given = masked.sum(1), ~masked  # (B,), (B, N)
        self.log_probability = torch.zeros(tokens.shape, device=tokens.device)
        self.options = {} if real is None else {"attention_mask": real}

    def logits(self, step: int) -> Tensor:
        """Those of the masked tokens, (masks, V), -inf for the mask itself."""
        with evaluating(self.modules):
            logits = self.model(self.tokens, **self.options)
        if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != self.tokens.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must give logits (B, N, V) of tokens {tuple(self.tokens.shape)} (got {got})")
        logits = logits[self.masked].float()
        if self.mask_token < logits.shape[-1]:
            logits[:, self.mask_token] = -torch.inf
        highest = logits.amax(-1)
        if (bad := highest[~highest.isfinite()]).numel():
            raise ValueError(f"logits must be finite (step {step + 1} got {float(bad[0])} as the highest of a token)")
        return logits

    def mask_again(self, which: Tensor) -> None:
        """Take back what was filled in, bool (B, N)."""
        self.tokens[which] = self.mask_token
        self.masked |= which

    def keep(self, which: Tensor, draft: Tensor, log_probability: Tensor) -> None:
        """Keep of a draft these of the masked tokens, bool (B, N)."""
        self.tokens = draft.where(which, self.tokens)
        self.log_probability = log_probability.where(which, self.log_probability)
        self.masked &= ~which


@torch.no_grad()
def _drafts(
    text: _Masked, steps: int, confident: bool, remask: float, sampling: Sampling, generator: torch.Generator | None
) -> Iterator[Filled]:
    """One step after the other."""

    def chance() -> Tensor:
        return torch.rand(text.tokens.shape, generator=generator, device=text.tokens.device)

    for step in range(steps):
        written = text.to_fill - text.masked.sum(1)
        if remask and 0 < step < steps - 1:
            share = remask * (1 - step / (steps - 1))
            among = ~text.masked & ~text.given
            text.mask_again(_first((written * share).long(), among, -text.log_probability if confident else chance()))
            written = text.to_fill - text.masked.sum(1)
        logits = text.logits(step)
        drawn = sampling.draw(logits, generator)
        log_probability = text.log_probability.clone()
        log_probability[text.masked] = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        draft = text.tokens.clone()
        draft[text.masked] = drawn
        more = text.to_fill * (step + 1) // steps - written
        text.keep(_first(more, text.masked, log_probability if confident else chance()), draft, log_probability)
        yield Filled(draft, ~text.masked)


def _first(count: Tensor, among: Tensor, rank: Tensor) -> Tensor:
    """So many of each row, (B,), of those that are among them, bool (B, N), with the highest ranks: bool (B, N)."""
    order = rank.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (place < count[:, None]) & among
