"""Attention over tiles by the kernel that is fastest here; the layout and the results are the same.

By Triton on a GPU; fused by Numba on a CPU, in float32 without a bias; else by PyTorch's own kernels.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attngraph.kernels.torch import tiles as tiles_torch
from attngraph.kernels.torch.tiles import Bias

WIDEST = {2: 256, 4: 128}  # by the bytes of a number, the dimension of a head whose blocks a GPU holds in registers


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """See `tiles_torch.forward`."""
    kernel, (q, k, v) = _kernel(q, k, v, bias=bias)
    with current(q.device):
        return kernel.forward(q, k, v, layout, bias, scale)


def backward(q, k, v, out, lse, dout, dlse, layout, bias: Bias, scale: float, bias_grad: bool):
    """See `tiles_torch.backward`."""
    kernel, (q, k, v, out, dout) = _kernel(q, k, v, out, dout, bias=bias)
    with current(q.device):
        return kernel.backward(q, k, v, out, lse, dout, dlse, layout, bias, scale, bias_grad)


def _kernel(*sides: Tensor, bias: Bias):
    """The kernel, and the tensors in a precision that it takes."""
    device, number, dim = sides[0].device.type, sides[0].dtype, max(side.shape[3] for side in sides)
    if device == "cuda" and dim <= WIDEST.get(number.itemsize, 0) and installed("triton"):
        from attngraph.kernels.triton import tiles as tiles_triton

        return tiles_triton, sides
    if device == "cpu" and number == torch.float32 and bias is None and installed("numba"):
        from attngraph.kernels.cpu import tiles as tiles_numba

        return tiles_numba, sides
    return tiles_torch, [side.to(torch.promote_types(number, torch.float32)) for side in sides]


def current(device: torch.device):
    """Where Triton launches: not where the tensors are, but on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def installed(name: str) -> bool:
    """Whether a package is there."""
    return find_spec(name) is not None
