"""Beam search: the likeliest of the texts that are found by keeping a few at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.generation.sampling import Sampling, Stop, require_finite, seen_in
from attngraph.generation.text import Text


@torch.no_grad()
def search(
    text: Text, count: int, beams: int, returned: int, stop: Stop, length_penalty: float, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Up to `count` new tokens (B · returned, new) of the best texts of each row, and their scores (B · returned,).

    As transformers' `early_stopping=False` has it: of the best `beams` continuations, those that end are finished, and
    so many others go on, until no row's best beam, at its length, scores above its worst finished text.
    """
    logits = text.logits()
    batch, vocab_size = logits.shape
    require_finite(logits, 0)
    first = torch.arange(batch, device=logits.device)[:, None]
    seen = seen_in(*text.prompt_tokens(), vocab_size) if sampling.penalizes else None
    rows = first.expand(batch, beams).flatten()
    text.reorder(rows)
    logits, seen = logits[rows], None if seen is None else seen[rows]
    kept = min(max(2, 1 + len(stop)) * beams, beams * vocab_size)  # so that enough of them do not end
    running = logits.new_full((batch, beams), -torch.inf)
    running[:, 0] = 0  # of beams that are alike, one counts
    finished = Finished(batch, beams, count, logits.device)
    live = torch.ones(batch, dtype=torch.bool, device=logits.device)
    for step in range(count):
        if step:
            logits = text.logits()
            require_finite(logits, step, (live[:, None] & (running > -torch.inf)).flatten())
        scores = logits.log_softmax(-1)
        if seen is not None:
            scores = sampling.penalized(scores, seen)
        scores = (running[:, :, None] + scores.view(batch, beams, vocab_size)).flatten(1)
        scores, best = scores.where(live[:, None], -torch.inf).topk(kept)
        beam, token = best // vocab_size, best % vocab_size
        new = torch.cat([text.new.view(batch, beams, step)[first, beam], token[..., None]], dim=2)
        ends = stop.ends(new) if step + 1 < count else torch.ones_like(token, dtype=torch.bool)
        finished.add(
            new[:, :beams], scores[:, :beams].where(ends[:, :beams], -torch.inf) / (step + 1) ** length_penalty
        )
        if step + 1 == count:
            break
        running, best = scores.masked_fill(ends, -torch.inf).topk(beams)
        rows, token = (first * beams + beam.gather(1, best)).flatten(), token.gather(1, best).flatten()
        live &= running[:, 0] / (step + 1) ** length_penalty > finished.scores[:, -1]
        if not live.any():
            break
        text.reorder(rows)
        text.append(token)
        seen = None if seen is None else seen[rows].scatter_(1, token[:, None], True)
    return finished.best(returned)


class Finished:
    """The best texts that have ended, of each row as many as there are beams, the best first."""

    def __init__(self, batch: int, beams: int, count: int, device: torch.device):
        self.tokens = torch.zeros(batch, beams, count, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, beams, dtype=torch.int64, device=device)
        self.scores = torch.full((batch, beams), -torch.inf, device=device)

    def add(self, tokens: Tensor, scores: Tensor) -> None:
        """More of them: tokens (B, beams, T), scores (B, beams), -inf for what has not ended."""
        length = tokens.shape[2]
        tokens = torch.cat([self.tokens, torch.nn.functional.pad(tokens, (0, self.tokens.shape[2] - length))], dim=1)
        lengths = torch.cat([self.lengths, torch.full_like(self.lengths, length)], dim=1)
        self.scores, best = torch.cat([self.scores, scores], dim=1).topk(self.scores.shape[1])
        self.tokens, self.lengths = tokens.take_along_dim(best[..., None], 1), lengths.gather(1, best)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The first so many of each row, filled up with their last token to the longest; and (B · count,) scores."""
        there = int((self.scores > -torch.inf).sum(1).min()) if len(self.scores) else count
        if there < count:
            raise ValueError(f"num_return_sequences must be at most the {there} texts that were found (got {count})")
        tokens, lengths = self.tokens[:, :count].flatten(0, 1), self.lengths[:, :count].flatten()
        place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=tokens.device)
        return tokens.gather(1, torch.minimum(place, lengths[:, None] - 1)), self.scores[:, :count].flatten()
