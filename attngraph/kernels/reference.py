"""The idea, told in loops: the definition of attention on a graph, and the oracle of every other kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.kernels.contract import Dropout, EdgeTerms, GraphMask, PairBias
from attngraph.kernels.dropout import keep_factor, kept
from attngraph.kernels.scoring import Elementwise, Score, normalizer, parts_of


def softmax(scores: Tensor) -> Tensor:
    """exp(s_j) / Σ_j exp(s_j), and 0 where every score is -inf."""
    return torch.ops.aten._safe_softmax(scores, -1)


def logsumexp(scores: Tensor) -> Tensor:
    """log Σ_j exp(s_j); where every score is -inf, -inf with a gradient of 0, not NaN."""
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0).logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: GraphMask,
    *,
    bias: PairBias | None,
    attention_mask: Tensor | None,
    scale: float,
    dropout: Dropout | None,
    score: Score,
    normalize: str | Elementwise,
    features: EdgeTerms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every node holds a query, a key and a value; each query node collects from the key nodes that it hears.

    q (B, H, N, D), k and v (B, Hkv, M, ·), attention_mask (B, M), False for keys that nobody hears → out (B, H, N, ·),
    lse (B, H, N), weights (B, H, N, M), in float64.
    """
    parts, weights_of = parts_of(score), softmax if normalize == "softmax" else normalizer(normalize)
    (B, H, N, D), M, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    out, lse, weights = v.new_zeros(B, H, N, v.shape[3]), q.new_full((B, H, N), -torch.inf), q.new_zeros(B, H, N, M)
    adjacency = graph.mask(N, M, q.device).expand(H, N, M)
    edge = adjacency.any(0).flatten().cumsum(0).view(N, M) - 1  # its number in edge_index order
    if features is not None:
        features = features.to(torch.float64).over_pairs(adjacency.any(0))

    for i in range(N):
        k_i, v_i = k, v
        if features is not None:
            k_i, v_i = features.added_to(k, features.to_key, i), features.added_to(v, features.to_value, i)
        k_i, v_i = k_i.repeat_interleave(group, dim=1), v_i.repeat_interleave(group, dim=1)
        scores = parts.function(q[:, :, [i]].expand(B, H, M, D), k_i) * scale  # every key answers the query of node i
        for h in range(H):
            j = adjacency[h, i].nonzero()[:, 0]  # but it hears only its in-neighbours; with none, all sums are empty
            s = scores[:, h, j]
            if bias is not None:
                s = s + bias.at(torch.full_like(j, i), j, edge[i, j]).expand(B, H, -1)[:, h]
            for transform in parts.transforms:
                s = transform(s, j.new_tensor(h))
            real = torch.ones_like(s, dtype=torch.bool) if attention_mask is None else attention_mask[:, j]
            s = s.masked_fill(~real, -torch.inf)
            lse[:, h, i] = logsumexp(s)
            of_heads = s[:, None].expand(B, H, -1)  # a function may have numbers of its own for each head
            p = weights_of(s) if normalize == "softmax" else weights_of(of_heads)[:, h]
            weights[:, h, i, j] = p = p.masked_fill(~real, 0)
            if dropout is not None:
                batch = torch.arange(B, device=q.device)[:, None]
                p = p * kept(dropout, batch, j.new_tensor(h), j.new_tensor(i), j) * keep_factor(dropout.p)
            out[:, h, i] = (p[..., None] * v_i[:, h, j]).sum(1)
    return out, lse, weights
