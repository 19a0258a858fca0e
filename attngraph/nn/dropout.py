"""Dropout of vectors. No graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BITS = 16  # of the random number that decides of one of x


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As `torch.nn.functional.dropout`, most of whose time on a CPU its numbers take: here 64 bits make four.

    p is taken to a multiple of 2^-16, and what is kept is divided by what that leaves, so that the mean is x.
    """
    dropped = round(p * 2**BITS)
    if not training or p == 0 or not 0 < dropped < 2**BITS or not _runs_now(x):
        return functional.dropout(x, p, training)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.int16)[: x.numel()].view(x.shape).float().ge_(dropped - 2 ** (BITS - 1))
    return x * mask.mul_(2**BITS / (2**BITS - dropped)).to(x.dtype)


def _runs_now(x: Tensor) -> bool:
    """Whether it is on a CPU, and neither compiled nor transformed."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
