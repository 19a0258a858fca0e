"""The keys that each query hears, as a tensor: what `topk` gives, and nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import require_ints
from attngraph.graph.edge_list import EdgeList, of_neighbors


@checked
def from_neighbors(index: Tensor, num_keys: int | None = None) -> EdgeList:
    """A graph from the keys that each query hears: a graph that is computed, such as the nearest neighbours.

    Args:
        index: integers (N, k), for each query its keys in any order, -1 for none; or (B, N, k), for each entry of a
            batch: `attend` and models then take vectors (B, H, N, D), or (B, N, D), and each entry hears its own keys.
            Of numbers that are given twice, one counts.
        num_keys: how many keys there are (of each entry); by default as many as queries.

    >>> scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.0, 0.1, 0.2]])
    >>> from_neighbors(scores.topk(2).indices).mask().int()
    tensor([[0, 1, 1],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)

    Raises:
        ValueError: another shape, or numbers below -1 or beyond the keys.
        TypeError: numbers that are no integers.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index must hold integers (got {index.dtype})")
    if index.ndim not in (2, 3) or (index.ndim == 3 and not len(index)):
        raise ValueError(f"index must have shape (N, k), or (B, N, k) with B > 0 (got {tuple(index.shape)})")
    num_keys = index.shape[-2] if num_keys is None else num_keys
    require_ints(0, num_keys=num_keys)
    least, most = map(int, torch.aminmax(index)) if index.numel() else (-1, -1)
    if least < -1 or most >= num_keys:
        raise ValueError(
            f"index must name keys from 0 to {num_keys - 1}, as num_keys={num_keys} says, or -1 for none "
            f"(got {least} … {most})"
        )
    return of_neighbors(index.detach(), num_keys, some_are_none=least < 0)
