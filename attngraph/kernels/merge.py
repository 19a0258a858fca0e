"""Attention over disjoint sets of edges, put together exactly from the parts' (out, lse)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Add a part to what is there, in place: out (..., D), lse (...).

    lse = logaddexp(lse₁, lse₂), out = Σ exp(lse_i - lse) · out_i; -inf and 0 where no part hears anybody.
    """
    both = torch.logaddexp(lse, more_lse)
    by = both.masked_fill(both == -torch.inf, 0)
    out.mul_((lse - by).exp_()[..., None]).addcmul_(more_out, (more_lse - by).exp_()[..., None])
    lse.copy_(both)
