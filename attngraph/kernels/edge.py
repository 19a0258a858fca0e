"""Gather along each edge, reduce at each query: the generic layer, for any score and normaliser. Memory O(E·H·D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from attngraph.kernels.scoring import Normalizer, Score, normalizer, score_function


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
    dropout_p: float,
    score: str | Score,
    normalize: str | Normalizer,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), edges (E,), member (H | 0, E), bias (…, E) → out, lse, weights (B, H, E).

    attention_mask (B, M) is False for keys that nobody hears.
    `_i` is at the query of each edge, `_j` at its key. Half precision is computed in float32.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q_i = q.to(dtype)[:, :, query]  # (B, H, E, D)
    k_j = k.to(dtype)[:, :, key].repeat_interleave(group, dim=1)
    v_j = v.to(dtype)[:, :, key].repeat_interleave(group, dim=1)
    scores = score_function(score)(q_i, k_j) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)

    lse, heard = None, member if member.shape[0] else None
    if attention_mask is not None:
        real = attention_mask[:, None, key]
        heard = real if heard is None else heard & real
    if normalize == "softmax":
        if heard is not None:
            scores = scores.masked_fill(~heard, -torch.inf)
        weights, lse = _softmax(scores, query, q.shape[2])
    else:
        weights = normalizer(normalize)(scores)
        if heard is not None:
            weights = weights.masked_fill(~heard, 0)
    messages = dropout(weights, dropout_p)[..., None] * v_j
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
