"""Speculative decoding: a cheap guess proposes how a text goes on; one pass of the model says how far it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.generation.kv_cache import KVCache
from attngraph.generation.sampling import Stop, require_finite
from attngraph.generation.text import evaluating, require_tokens
from attngraph.graph.base import require_ints
from attngraph.graph.patterns import Tree


class Proposal(NamedTuple):
    """A tree of ways in which a text may go on."""

    tokens: Sequence[int]
    """One a node."""
    parents: Sequence[int]
    """The node before each, -1 for those that follow the text; as in `Tree`, but parents come before their children."""


Draft = Callable[[Tensor, int], Proposal]
"""From the text so far, int64 (N,), and a depth to what may follow, in no path longer than the depth."""


@torch.no_grad()
@checked
def speculate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    draft: nn.Module | Draft | None = None,
    stop: int | Sequence[int | Sequence[int]] | None = None,
) -> Tensor:
    """Continue one text, tokens (1, N), by the likeliest tokens, several in a pass: (1, N + new).

    What comes out is what `generate(…, temperature=0)` gives, token for token up to rounding, whatever is proposed: the
    proposals are the nodes of a `Tree` that continues the text, one pass of the model gives the likeliest token after
    each of them, and the path that agrees is accepted (SpecInfer, Miao et al. 2024).

    Args:
        model: a model that a `KVCache` serves.
        draft: what proposes: by default `PromptLookup()`; a smaller model of the same tokens, as `DraftModel` takes it;
            or a function from the text, int64 (N,), and a depth to a `Proposal` of no longer paths.
        stop: as in `generate`.

    >>> from attngraph.models import GPT
    >>> from attngraph.nn import TransformerConfig
    >>> model = GPT(TransformerConfig(embed_dim=64, num_layers=2, num_heads=4), vocab_size=65)
    >>> prompt = torch.arange(8)[None]
    >>> torch.equal(speculate(model, prompt, 50), generate(model, prompt, 50, temperature=0))
    True
    """
    require_tokens(tokens)
    if len(tokens) != 1:
        raise ValueError(f"tokens must be one text, of shape (1, N) (got {tuple(tokens.shape)})")
    require_ints(0, max_new_tokens=max_new_tokens)
    if not max_new_tokens:
        return tokens.long()
    if callable(getattr(model, "decode", None)):
        raise TypeError(f"model must be one from tokens to logits (got a {type(model).__name__}, which needs a source)")
    ends, prompt = Stop(stop), tokens.shape[1]
    longest = prompt + max_new_tokens
    cache = KVCache(model, max_length=longest - 1)
    if draft is None:
        draft = PromptLookup()
    elif isinstance(draft, nn.Module):
        draft = DraftModel(draft, max_length=longest)
    text = tokens.new_empty(longest, dtype=torch.int64)
    text[:prompt] = tokens[0]
    length = prompt
    with evaluating(list(model.modules())):
        new = _likeliest(model(tokens, cache=cache, logits_to_keep=1)[0], 0)
        while True:
            for token in new:
                text[length] = token
                length += 1
                if length == longest or ends.ends(text[prompt:length]):
                    return text[None, :length]
            new = _verified(model, cache, text[:length], draft, longest - length - 1, length - prompt)


def _verified(model: nn.Module, cache: KVCache, text: Tensor, draft: Draft, depth: int, step: int) -> list[int]:
    """The next tokens, at least one, by one pass over the text's last token, which the cache lacks, and a proposal."""
    proposal = draft(text, depth) if depth else Proposal([], [])
    if not isinstance(proposal, tuple) or len(proposal) != 2:
        raise TypeError(f"draft must return a Proposal, (tokens, parents) (got {shown(proposal)})")
    tokens, parents = proposal
    if not tokens:
        return _likeliest(model(text[None, -1:], cache=cache)[0], step)
    nodes = torch.cat([text[-1:], torch.tensor(tokens, device=text.device)])
    tree = Tree((-1, *(parent + 1 for parent in parents)))
    following = _likeliest(model(nodes[None], cache=cache, tree=tree)[0], step)
    children = {(parent + 1, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True), 1)}
    path = [0]
    while (child := children.get((path[-1], following[path[-1]]))) is not None:
        path.append(child)
    cache.accept(path)
    return [following[node] for node in path]


def _likeliest(logits: Tensor, step: int) -> list[int]:
    """The likeliest token by each row of logits (T, V)."""
    require_finite(logits, step)
    return logits.argmax(-1).tolist()


class PromptLookup:
    """Proposes what followed the text's last tokens where they stood before (Saxena 2023): no second model is needed.

    Args:
        length: how many tokens are proposed; from one place, the last where the most tokens agree. Where the text
            between there and the end is shorter, it is repeated.
        ngram: how many tokens have to agree, at most; at least one has to.

    >>> PromptLookup(length=4)(torch.tensor([7, 1, 2, 3, 9, 1, 2]), 10).tokens
    [3, 9, 1, 2]
    """

    @checked
    def __init__(self, length: int = 16, ngram: int = 3):
        require_ints(1, length=length, ngram=ngram)
        self.length, self.ngram = length, ngram

    def __call__(self, text: Tensor, depth: int) -> Proposal:
        """A path, or nothing where no token has been there before."""
        for count in range(min(self.ngram, len(text) - 1), 0, -1):
            before = text[:-1].unfold(0, count, 1)  # (places, count)
            found = (before == text[-count:]).all(1).nonzero()
            if len(found):
                first = int(found[-1, 0]) + count
                place = first + torch.arange(min(self.length, depth), device=text.device) % (len(text) - first)
                tokens = text[place].tolist()
                return Proposal(tokens, range(-1, len(tokens) - 1))
        return Proposal([], [])


class DraftModel:
    """Proposes by a smaller model: its likeliest next tokens, of each its likeliest next ones, and so on.

    Args:
        model: a model that a `KVCache` serves, of the same tokens.
        max_length: of the text, with what is new.
        branches: how many children a node has: those of the text's end, then of their children, ….
    """

    @checked
    def __init__(self, model: nn.Module, max_length: int, branches: Sequence[int] = (3, 2, 1, 1)):
        for each in branches:
            require_ints(1, branches=each)
        self.model, self.branches = model, tuple(branches)
        self.cache, self._text = KVCache(model, max_length), torch.empty(0, dtype=torch.int64)
        self._modules = list(model.modules())

    @torch.no_grad()
    def __call__(self, text: Tensor, depth: int) -> Proposal:
        """A tree of at most so many levels. What the text has in common with that of the call before is kept."""
        held = self.cache.length
        if len(text) <= held or not torch.equal(text[:held], self._text[:held]):  # another text
            self.cache = KVCache(self.model, self.cache.max_length)
        self._text = text.clone()
        tokens: list[int] = []
        parents: list[int] = []
        level: Sequence[int] = [-1]
        with evaluating(self._modules):
            logits = self.model(text[None, self.cache.length :], cache=self.cache, logits_to_keep=1)[0]
            for count in self.branches[:depth]:
                if tokens:
                    nodes = torch.tensor([tokens], device=text.device)
                    logits = self.model(nodes, cache=self.cache, tree=Tree(parents))[0, level[0] :]
                    self.cache.accept([])
                count = min(count, logits.shape[-1])
                best = logits.topk(count).indices.tolist()
                first = len(tokens)
                for parent, children in zip(level, best, strict=True):
                    tokens += children
                    parents += [parent] * count
                level = range(first, len(tokens))
        return Proposal(tokens, parents)
