"""Padding masks: which nodes of a batch are real, as transformers' `attention_mask` says it. No graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.nn.checks import require_range


def padding_mask(name: str, mask: Tensor | None, nodes: Tensor) -> Tensor | None:
    """The mask of nodes (B, N, D) as bool (B, N), True for real nodes; None, where all are real, stays None.

    Raises TypeError for what is neither bool nor integer, and ValueError for another shape and, on a CPU, for integers
    other than 0 and 1 (a GPU would have to stop and wait for the answer; there, all but 0 is real).
    """
    if mask is None:
        return None
    shape = tuple(nodes.shape[:-1])
    wanted = f"{name} must be a tensor of bool, or of integers 0 and 1, of shape {shape}: True or 1 for real nodes"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{wanted} (got a {type(mask).__name__})")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{wanted} (got {mask.dtype}); of a mask that is 1.0 for real nodes, mask.bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{wanted} (got shape {tuple(mask.shape)})")
    if mask.dtype == torch.bool:
        return mask
    require_range(wanted, 1, mask)
    return mask != 0


def positions_of(name: str, positions: Tensor | None, mask: Tensor | None, nodes: Tensor) -> Tensor:
    """The positions of nodes (B, N, D): (N,), (1, N) or (B, N). All padding is at 0, whatever its positions were.

    Where none are given they count from each row's first real node, so that padding in front takes no places.
    """
    shape, num_nodes = tuple(nodes.shape[:-1]), nodes.shape[-2]
    if positions is None:
        positions = torch.arange(num_nodes, device=nodes.device)
        if mask is not None:
            positions = positions - padding_in_front(mask)
    else:
        wanted = f"{name} must be a tensor of integers of shape ({num_nodes},) or {shape}"
        if not isinstance(positions, Tensor):
            raise TypeError(f"{wanted} (got a {type(positions).__name__})")
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise TypeError(f"{wanted} (got {positions.dtype})")
        if tuple(positions.shape) not in ((num_nodes,), (1, num_nodes), shape):
            raise ValueError(f"{wanted} (got shape {tuple(positions.shape)})")
        positions = positions.long()
    return positions if mask is None else positions.where(mask, 0)


def padding_in_front(mask: Tensor) -> Tensor:
    """How many nodes of each row are before its first real one: (B, 1)."""
    return (mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def rolled(nodes: Tensor, by: Tensor) -> Tensor:
    """Nodes (B, N) or (B, N, D) moved forward by so many places in each row, (B, 1); the first go behind the last."""
    index = (torch.arange(nodes.shape[1], device=nodes.device) + by) % max(nodes.shape[1], 1)
    return nodes.gather(1, index if nodes.ndim == 2 else index[..., None].expand_as(nodes))


def joint_padding_mask(memory_mask: Tensor | None, memory: Tensor, mask: Tensor | None, nodes: Tensor) -> Tensor | None:
    """The mask of keys that are the memory's nodes (B, M, D) and then the nodes (B, N, D): bool (B, M + N)."""
    if memory_mask is None and mask is None:
        return None
    if memory_mask is None:
        memory_mask = memory.new_ones(memory.shape[:-1], dtype=torch.bool)
    if mask is None:
        mask = nodes.new_ones(nodes.shape[:-1], dtype=torch.bool)
    return torch.cat([memory_mask, mask], dim=-1)
