"""Numbers of edges, as `attend` gives its attention weights, for libraries that have one number for each edge."""

from __future__ import annotations

import torch
from torch import Tensor


def of_edges(weights: Tensor, edges: int) -> Tensor:
    """The weights, known to be (E,), (H, E) or (B, H, E)."""
    if not 1 <= weights.ndim <= 3 or weights.shape[-1] != edges:
        raise ValueError(
            f"weights must have shape ({edges},), one for each edge, or (H, {edges}) or (B, H, {edges}) (got "
            f"{tuple(weights.shape)})"
        )
    return weights.detach()


def averaged(weights: Tensor, edges: int) -> Tensor:
    """One number for each edge, (E,): the mean of all heads and entries of the batch."""
    weights = of_edges(weights, edges)
    if weights.ndim == 1:
        return weights
    return weights.to(torch.promote_types(weights.dtype, torch.float32)).flatten(0, -2).mean(0)
