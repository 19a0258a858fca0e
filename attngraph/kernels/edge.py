"""Gather along each edge, reduce at each query: the generic layer, for any score and normaliser. Memory O(E·H·D)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from attngraph.kernels.scoring import NORMALIZERS, SCORES


def edges(
    q, k, v, query, key, member, *, bias, scale, dropout_p, score, normalize
) -> tuple[Tensor, Tensor | None, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), edges (E,), member (H | 0, E), bias (…, E) → out, lse, weights (B, H, E).

    `_i` is at the query of each edge, `_j` at its key. Half precision is computed in float32.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q_i = q.to(dtype)[:, :, query]  # (B, H, E, D)
    k_j, v_j = (side.to(dtype)[:, :, key].repeat_interleave(group, dim=1) for side in (k, v))
    scores = SCORES.get(score, score)(q_i, k_j) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)

    lse = None
    if normalize == "softmax":
        if member.shape[0]:
            scores = scores.masked_fill(~member, -torch.inf)
        weights, lse = _softmax(scores, query, q.shape[2])
    else:
        weights = NORMALIZERS.get(normalize, normalize)(scores)
        if member.shape[0]:
            weights = weights.masked_fill(~member, 0)
    messages = dropout(weights, dropout_p)[..., None] * v_j
    out = messages.new_zeros(*q.shape[:3], v.shape[3]).index_add(2, query, messages)
    return out.to(q.dtype), lse, weights.to(q.dtype)


def _softmax(scores: Tensor, query: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Softmax over the edges of each query: (B, H, E) → weights (B, H, E), lse (B, H, N); -inf where there are none."""
    at = query.expand_as(scores)
    top = scores.detach().new_full((*scores.shape[:2], n), -torch.inf).scatter_reduce(2, at, scores.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0)  # a query that hears nobody
    power = (scores - top[:, :, query]).exp()
    total = power.new_zeros(top.shape).index_add(2, query, power)
    heard = total != 0
    lse = (top + torch.where(heard, total, 1).log()).masked_fill(~heard, -torch.inf)
    return power / torch.where(heard, total, 1)[:, :, query], lse
