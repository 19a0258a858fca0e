"""Attention over tiles: fused by Numba where it can be (on a CPU, float32, no bias), else by PyTorch's own kernels."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attngraph.kernels import tiles_torch
from attngraph.kernels.tiles_torch import Bias


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """See `tiles_torch.forward`."""
    return _kernel(q, bias).forward(q, k, v, layout, bias, scale)


def backward(q, k, v, out, lse, dout, dlse, layout, bias: Bias, scale: float, bias_grad: bool):
    """See `tiles_torch.backward`."""
    return _kernel(q, bias).backward(q, k, v, out, lse, dout, dlse, layout, bias, scale, bias_grad)


def _kernel(q: Tensor, bias: Bias):
    if bias is not None or q.dtype != torch.float32 or q.device.type != "cpu" or not _numba():
        return tiles_torch
    from attngraph.kernels import tiles_numba

    return tiles_numba


@lru_cache
def _numba() -> bool:
    return find_spec("numba") is not None
