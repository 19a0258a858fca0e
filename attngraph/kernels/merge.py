"""Attention over disjoint sets of edges, put together exactly from the parts' (out, lse)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add a part to what is there, in place: out (..., D), lse (...).

    lse = logaddexp(lse₁, lse₂), out = Σ exp(lse_i - lse) · out_i; -inf and 0 where no part has an edge.
    """
    new_lse = torch.logaddexp(lse, part_lse)
    shift = new_lse.masked_fill(new_lse == -torch.inf, 0)  # exp(-inf - 0) is 0, exp(-inf + inf) were NaN
    alpha, part_alpha = (lse - shift).exp_(), (part_lse - shift).exp_()
    out.mul_(alpha[..., None]).addcmul_(part_out, part_alpha[..., None])
    lse.copy_(new_lse)
