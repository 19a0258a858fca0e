"""A text that a model continues: its tokens so far, and the logits of the next one, with a cache or without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from attngraph.generation.kv_cache import KVCache, decoder_of
from attngraph.graph.base import require_ints
from attngraph.nn.checks import values_known
from attngraph.nn.padding import padding_in_front, padding_mask
from attngraph.nn.transformer import TransformerConfig


class Text:
    """The rows of a batch, which grow by a token at a time. Padding in front of all rows is left out.

    Args:
        model: as in `generate`, like the arguments below, which are checked here.
        tokens: (B, N).
        new: how many tokens there will be more, at most.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        new: int,
        *,
        attention_mask: Tensor | None = None,
        context: int | None = None,
        use_cache: bool = True,
        source: Tensor | None = None,
        source_attention_mask: Tensor | None = None,
    ):
        require_tokens(tokens)
        require_takes_tokens(model, source)
        require_ints(0, max_new_tokens=new)
        if context is not None:
            require_ints(1, context=context)
        mask, front = _mask_in_front(attention_mask, tokens)
        count = tokens.shape[1] - front
        shown = new and count + new - 1  # the last new token is shown to nobody
        shown = shown if context is None else min(context, shown)
        _check_positions(model, shown)
        self.model, self.context, self.prompt, self.length = model, context, count, count
        self._tokens = tokens.new_empty(len(tokens), count + new, dtype=torch.int64)
        self._tokens[:, :count] = tokens[:, front:]
        self._mask = None if mask is None else nn.functional.pad(mask[:, front:], (0, new), value=True)
        self._modules = list(model.modules())
        self._keeps_logits = "logits_to_keep" in _parameters(model, source)
        self._cache = KVCache(model, shown) if use_cache and shown and _takes_cache(model, source) else None
        self._entry = torch.arange(len(tokens), device=tokens.device)  # of which entry of the batch each row is
        self._memory, self._memory_mask = None, source_attention_mask
        if source is not None:
            if len(source) != len(tokens):
                raise ValueError(f"source must have the batch of tokens, {len(tokens)} (got {len(source)})")
            with evaluating(self._modules):
                self._memory = cast(Any, model).encode(source, attention_mask=source_attention_mask)
        elif source_attention_mask is not None:
            raise ValueError("source_attention_mask is of use only with a source")

    @property
    def new(self) -> Tensor:
        """The tokens after the prompt: (B, T)."""
        return self._tokens[:, self.prompt : self.length]

    def prompt_tokens(self) -> tuple[Tensor, Tensor | None]:
        """The tokens of the prompt, (B, N), and which of them are real."""
        return self._tokens[:, : self.prompt], None if self._mask is None else self._mask[:, : self.prompt]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Those of the next token, (B, V)."""
        if self._cache is not None and self.length > self._cache.max_length:  # its first tokens leave the context
            self._cache = None
        if self._cache is not None:
            return self._call(self._cache.length, cache=self._cache)
        return self._call(0 if self.context is None else max(self.length - self.context, 0))

    def append(self, tokens: Tensor) -> None:
        """One token more in each row, (B,)."""
        self._tokens[:, self.length] = tokens
        self.length += 1

    def reorder(self, rows: Tensor) -> None:
        """The rows with these numbers, in the place of all; some may be there several times."""
        self._tokens, self._entry = self._tokens[rows], self._entry[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        if self._cache is not None:
            self._cache.reorder(rows)

    def _call(self, first: int, **options: Any) -> Tensor:
        """The logits of a model that is shown the tokens from this one on."""
        tokens, mask, memory = self._tokens[:, first : self.length], self._mask, self._memory
        model: Any = _plain(self.model) if options else self.model  # a step is too short for a compiled one
        function = model if memory is None else model.decode
        if self._keeps_logits:
            options["logits_to_keep"] = 1
        goes_on = "cache" in options and first > 0  # a cache that knows what is padding, and the memory
        if mask is not None and not goes_on:
            options["attention_mask" if memory is None else "decoder_attention_mask"] = mask[:, first : self.length]
        with evaluating(self._modules), torch.inference_mode("cache" in options):
            if memory is None:
                return function(tokens, **options)[:, -1].float()
            if not goes_on:
                memory = memory[self._entry]
                if self._memory_mask is not None:
                    options["attention_mask"] = self._memory_mask[self._entry]
            return function(memory, tokens, **options)[:, -1].float()


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without dropout; afterwards each of the modules is as it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_tokens(tokens: Tensor) -> None:
    """Raise unless these are the tokens of prompts."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        got = tokens.dtype if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise TypeError(f"tokens must be a tensor of integers (got {got})")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (B, N) with at least one token each (got {tuple(tokens.shape)})")


def _plain(model: nn.Module) -> Any:
    """The model that was compiled, which takes anything; of others, itself."""
    return getattr(model, "_orig_mod", model)


def _parameters(model: nn.Module, memory: Tensor | None) -> Mapping[str, inspect.Parameter]:
    """The names that a model takes beside tokens; a script tells none."""
    plain = _plain(model)
    try:
        return inspect.signature(plain.forward if memory is None else plain.decode).parameters
    except (ValueError, TypeError):
        return {}


def _takes_cache(model: nn.Module, source: Tensor | None) -> bool:
    """Whether a model can be shown new tokens alone."""
    try:
        decoder_of(model)
    except TypeError:
        return False
    return "cache" in _parameters(model, source)


def require_takes_tokens(model: nn.Module, source: Tensor | None = None) -> None:
    """Raise TypeError unless tokens, and the source, are all that a model needs."""
    plain = _plain(model)
    translates = callable(getattr(plain, "encode", None)) and callable(getattr(plain, "decode", None))
    if source is not None:
        if not translates:
            raise TypeError(f"source is of models with encode and decode (got a {type(plain).__name__})")
        return
    try:
        signature = inspect.signature(plain.forward)
    except (ValueError, TypeError):  # of a script
        return
    try:
        signature.bind(None)
    except TypeError as error:
        hint = "; give the source as source=" if translates else ""
        raise TypeError(
            f"model must be one from tokens (B, N) to logits (B, N, V) (got a {type(plain).__name__}, whose forward is "
            f"{error}){hint}"
        ) from None


def _mask_in_front(mask: Tensor | None, tokens: Tensor) -> tuple[Tensor | None, int]:
    """The padding mask of prompts, bool (B, N), None where all is real; and how many tokens are padding in all rows."""
    mask = padding_mask("attention_mask", mask, tokens[..., None])
    if mask is None:
        return None, 0
    if values_known(mask) and not mask[:, -1].all():
        raise ValueError("attention_mask must be True or 1 for the last token of each prompt: pad prompts on the left")
    front = int(padding_in_front(mask).min()) if len(mask) else 0
    return None if mask[:, front:].all() else mask, front


def _check_positions(model: nn.Module, shown: int) -> None:
    """Raise before anything is computed, not when the positions are used up."""
    config = getattr(getattr(model, "decoder", model), "config", None)
    if isinstance(config, TransformerConfig) and config.position == "learned" and shown > (config.max_length or 0):
        raise ValueError(
            f"the model has {config.max_length} learned positions, and would be shown {shown} tokens: "
            f"context={config.max_length} shows it the last ones"
        )
