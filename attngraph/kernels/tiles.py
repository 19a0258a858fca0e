"""Attention over tiles by the kernel that is fastest here; the layout and the results are the same.

By Triton on a GPU; fused by Numba on a CPU, in float32 without a bias; else by PyTorch's own kernels.
"""

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
    if q.device.type == "cuda" and q.dtype != torch.float64 and installed("triton"):
        from attngraph.kernels import tiles_triton

        return tiles_triton
    if q.device.type == "cpu" and q.dtype == torch.float32 and bias is None and installed("numba"):
        from attngraph.kernels import tiles_numba

        return tiles_numba
    return tiles_torch


@lru_cache
def installed(name: str) -> bool:
    """Whether a package is there."""
    return find_spec(name) is not None
