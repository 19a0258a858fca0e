"""Gather along each edge, reduce at each query: the generic layer, for any score and normaliser. Memory O(E·H·D)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attngraph.kernels.contract import Dropout, EdgeTerms
from attngraph.kernels.dropout import keep_factor, kept
from attngraph.kernels.scoring import Elementwise, Score, normalizer, parts_of


def scores_by(score: Callable[[Tensor, Tensor], Tensor], q_i: Tensor, k_j: Tensor) -> Tensor:
    """score(q_i, k_j), if it is a number for each edge."""
    return _like(score(q_i, k_j), q_i.shape[:3], "score must give one number for each batch entry, head and edge")


def weights_by(normalize: str | Elementwise, scores: Tensor) -> Tensor:
    """Of an elementwise normaliser, if it is one."""
    return _like(normalizer(normalize)(scores), scores.shape, "normalize must give a weight for each score")


def _like(found: object, shape: tuple[int, ...], wanted: str) -> Tensor:
    """What a function gave, if it has the shape that it should have."""
    if not isinstance(found, Tensor) or found.shape != shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{wanted}, {tuple(shape)} (got {got})")
    return found


CHUNK_NUMBERS = 1 << 23  # of the vectors of those edges that are gathered at a time


def streamed(
    score: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    features: EdgeTerms | None = None,
) -> Tensor:
    """score(q_i, k_ij) of each edge, (B, H, E), over a part of the edges at a time; the backward pass runs them again.

    A program that is being compiled takes all edges at once, and its compiler sees to the memory.
    """
    group, edges = q.shape[1] // k.shape[1], query.shape[0]

    def of_part(q: Tensor, k: Tensor, query: Tensor, key: Tensor, part: slice) -> Tensor:
        k_j = k[:, :, key]
        if features is not None:
            k_j = features.added_to(k_j, features.to_key, part).to(k.dtype)
        return scores_by(score, q[:, :, query], k_j.repeat_interleave(group, dim=1))

    if torch.compiler.is_compiling():
        return of_part(q, k, query, key, slice(None))
    step = max(1, CHUNK_NUMBERS // max(1, q.shape[0] * q.shape[1] * q.shape[3]))
    if edges <= step:
        return of_part(q, k, query, key, slice(None))
    slices = [slice(first, first + step) for first in range(0, edges, step)]
    parts = zip(query.split(step), key.split(step), slices, strict=True)
    return torch.cat([checkpoint(of_part, q, k, *part, use_reentrant=False) for part in parts], -1)  # type: ignore


def edges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    key: Tensor,
    member: Tensor,
    *,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    score: Score,
    normalize: str | Elementwise,
    features: EdgeTerms | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), edges (E,), member (H | 0, E), bias (…, E) → out, lse, weights (B, H, E).

    attention_mask (B, M) is False for keys that nobody hears.
    `_i` is at the query of each edge, `_j` at its key. Half precision is computed in float32.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q_i = q.to(dtype)[:, :, query]  # (B, H, E, D)
    k_j, v_j = k.to(dtype)[:, :, key], v.to(dtype)[:, :, key]
    if features is not None:
        k_j, v_j = features.added_to(k_j, features.to_key), features.added_to(v_j, features.to_value)
    k_j, v_j = k_j.repeat_interleave(group, dim=1), v_j.repeat_interleave(group, dim=1)
    parts, heads = parts_of(score), torch.arange(q.shape[1], device=q.device)[:, None]
    scores = scores_by(parts.function, q_i, k_j) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    for transform in parts.transforms:
        scores = transform(scores, heads)

    lse, heard = None, member if member.shape[0] else None
    if attention_mask is not None:
        real = attention_mask[:, None, key]
        heard = real if heard is None else heard & real
    if normalize == "softmax":
        if heard is not None:
            scores = scores.masked_fill(~heard, -torch.inf)
        weights, lse = _softmax(scores, query, q.shape[2])
    else:
        weights = weights_by(normalize, scores)
        if heard is not None:
            weights = weights.masked_fill(~heard, 0)
    used = weights
    if dropout is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        used = weights * kept(dropout, batch, heads, query, key) * keep_factor(dropout.p)
    messages = used[..., None] * v_j
    out = messages.new_zeros(*q.shape[:3], v.shape[3]).index_add(2, query, messages)
    return out.to(q.dtype), lse, weights.to(q.dtype)


def _softmax(scores: Tensor, query: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Softmax over the edges of each query: (B, H, E) → weights (B, H, E), lse (B, H, N); -inf where there are none."""
    detached = scores.detach()
    row_max = detached.new_full((*scores.shape[:2], n), -torch.inf)
    row_max = row_max.scatter_reduce(2, query.expand_as(scores), detached, "amax")
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)  # a query without edges
    p = (scores - row_max[:, :, query]).exp()
    row_sum = p.new_zeros(row_max.shape).index_add(2, query, p)
    has_edge = row_sum != 0
    row_sum = torch.where(has_edge, row_sum, 1)
    lse = (row_max + row_sum.log()).masked_fill(~has_edge, -torch.inf)
    return p / row_sum[:, :, query], lse
