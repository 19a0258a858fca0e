"""The idea, told in loops: the definition of attention on a graph, and the oracle of every other kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout

from attngraph.kernels.scoring import NORMALIZERS, SCORES


def softmax(scores: Tensor) -> Tensor:
    """exp(s_j) / Σ_j exp(s_j), and 0 where every score is -inf."""
    return torch.ops.aten._safe_softmax(scores, -1)


def reference(q, k, v, graph, *, bias, scale, dropout_p, score, normalize) -> tuple[Tensor, Tensor, Tensor]:
    """Every node holds a query, a key and a value; each query node collects from the key nodes that it hears.

    q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, ·), lse (B, H, N), weights (B, H, N, M), in float64.
    """
    answer, weigh = SCORES.get(score, score), NORMALIZERS.get(normalize, normalize)
    q, k, v = (side.double().repeat_interleave(q.shape[1] // side.shape[1], dim=1) for side in (q, k, v))
    (B, H, N, D), M = q.shape, k.shape[2]
    out, lse, weights = v.new_zeros(B, H, N, v.shape[3]), q.new_full((B, H, N), -torch.inf), q.new_zeros(B, H, N, M)
    hears = graph.mask(N, M, q.device).expand(H, N, M)
    edge = hears.any(0).flatten().cumsum(0).view(N, M) - 1  # its number in edge_index order

    for i in range(N):
        scores = answer(q[:, :, [i]].expand(B, H, M, D), k) * scale  # every key answers the query of node i
        for h in range(H):
            j = hears[h, i].nonzero()[:, 0]  # but it hears only its in-neighbours; with none, all sums are empty
            heard = scores[:, h, j]
            if bias is not None:
                heard = heard + bias.at(torch.full_like(j, i), j, edge[i, j]).expand(B, H, -1)[:, h]
            lse[:, h, i] = heard.logsumexp(-1)
            weights[:, h, i, j] = weight = softmax(heard) if normalize == "softmax" else weigh(heard)
            out[:, h, i] = (dropout(weight, dropout_p)[..., None] * v[:, h, j]).sum(1)
    return out, lse, weights
