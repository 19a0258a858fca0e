"""Memory for the results of kernels: how it lies; on a CPU from NumPy, which asks for huge pages.

The first touch of a huge page is far cheaper than that of as many small ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def nodes_first(x: Tensor) -> bool:
    """Whether a tensor (B, H, N, D) lies in memory as (B, N, H, D), as a model makes its heads."""
    return x.stride(1) < x.stride(2)


def like(x: Tensor, dim: int) -> Tensor:
    """An empty tensor (B, H, N, dim) that lies in memory as x does."""
    B, H, N, _ = x.shape
    return x.new_empty(B, N, H, dim).transpose(1, 2) if nodes_first(x) else x.new_empty(B, H, N, dim)


def empty(*shape: int, like: Tensor) -> Tensor:
    """A CPU tensor of the other's dtype, float32 or float64, with anything in it."""
    return torch.from_numpy(np.empty(shape, DTYPES[like.dtype]))


def zeros(*shape: int, like: Tensor) -> Tensor:
    """The same, with zeros."""
    return torch.from_numpy(np.zeros(shape, DTYPES[like.dtype]))


def apart(*sides: Any) -> list[Any]:
    """Tensors of which gradients are asked one by one, though one may be made of another, or be another."""
    return [side if side is None else side.view_as(side) for side in sides]
