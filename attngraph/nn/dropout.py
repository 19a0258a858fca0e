"""Dropout of vectors. No graphs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from attngraph.kernels.available import why_not
from attngraph.nn.checks import values_known
from attngraph.planning.backends.base import INSTALLED

KERNEL = "attngraph.kernels.cpu.vector_dropout"
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`; on a CPU by a kernel that takes p to a multiple of 2^-16 and stores no mask."""
    if not training and 0 <= p <= 1:
        return x
    if not 0 < p < 1 or not _runs_kernel(x):
        return functional.dropout(x, p, training)
    return _Dropout.apply(x, p, torch.randint(2**63 - 1, (), device="cpu").item())


def _runs_kernel(x: Tensor) -> bool:
    """Whether Numba is there, and x has numbers that nothing traces or transforms."""
    if not values_known(x) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return x.dtype in DTYPES and INSTALLED["numba"] and why_not(KERNEL, "numba") is None


class _Dropout(torch.autograd.Function):
    """x ∘ kept / (1 - p) is linear: the gradient of x is the same function of that of out, by the same seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.given = p, seed
        return import_module(KERNEL).dropout(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        (dout,) = grad_outputs
        if values_known(dout):
            return _Dropout.apply(dout, *ctx.given), None, None
        ones = torch.ones(dout.shape, dtype=dout.dtype, device="cpu")  # a batch of gradients has one mask
        return dout * import_module(KERNEL).dropout(ones, *ctx.given), None, None
