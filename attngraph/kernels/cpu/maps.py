"""Linear maps of the vectors of nodes, (B, N, H, ·), one for each head, by matrix products that write in place.

Matrices are (Hkv, D, F): consecutive heads share one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attngraph.kernels.memory import empty, zeros


def _of_heads(*sides: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
    """Each head, and its vectors of all nodes and entries: (B · N, ·)."""
    flat = [side.flatten(0, 1) for side in sides]
    for h in range(sides[0].shape[2]):
        yield h, [side[:, h] for side in flat]


def mapped(x: Tensor, matrices: Tensor) -> Tensor:
    """x (B, N, H, D) times the matrices (Hkv, D, F): (B, N, H, F)."""
    result, group = empty(*x.shape[:3], matrices.shape[2], like=x), x.shape[2] // len(matrices)
    for h, (x_h, result_h) in _of_heads(x, result):
        torch.mm(x_h, matrices[h // group], out=result_h)
    return result


def add_mapped(total: Tensor, x: Tensor, matrices: Tensor) -> None:
    """Add the same to total (B, N, H, F)."""
    group = x.shape[2] // len(matrices)
    for h, (x_h, total_h) in _of_heads(x, total):
        total_h.addmm_(x_h, matrices[h // group])


def map_gradient(x: Tensor, dresult: Tensor, matrices: Tensor) -> Tensor:
    """The gradient of the matrices, from that of what they make of x."""
    gradient, group = zeros(*matrices.shape, like=x), x.shape[2] // len(matrices)
    for h, (x_h, dresult_h) in _of_heads(x, dresult):
        gradient[h // group].addmm_(x_h.T, dresult_h)
    return gradient
