"""Attention edge by edge by the kernel of the device: Triton on a GPU, Numba on a CPU; the results are the same."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from torch import Tensor

from attngraph.kernels.tiles import current
from attngraph.kernels.torch.tiles import Bias


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """See `rows_numba.forward`."""
    with current(q.device):
        return _kernel(q).forward(q, k, v, layout, bias, scale)


def backward(q, k, v, out, lse, dout, dlse, layout, bias: Bias, scale: float, bias_grad: bool):
    """See `rows_numba.backward`."""
    with current(q.device):
        return _kernel(q).backward(q, k, v, out, lse, dout, dlse, layout, bias, scale, bias_grad)


def _kernel(q: Tensor) -> ModuleType:
    return import_module(f"attngraph.kernels.{'triton' if q.device.type == 'cuda' else 'cpu'}.rows")
