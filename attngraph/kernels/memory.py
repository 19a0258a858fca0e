"""Memory for the results of CPU kernels, from NumPy: it asks for huge pages, whose first touch is far cheaper."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def empty(*shape: int, like: Tensor) -> Tensor:
    """A CPU tensor of the other's dtype, with anything in it."""
    return torch.from_numpy(np.empty(shape, _dtype(like)))


def zeros(*shape: int, like: Tensor) -> Tensor:
    """The same, with zeros."""
    return torch.from_numpy(np.zeros(shape, _dtype(like)))


def _dtype(like: Tensor) -> type:
    return {torch.float32: np.float32, torch.float64: np.float64}[like.dtype]
