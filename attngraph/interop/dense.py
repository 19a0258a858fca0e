"""Dense masks and predicates (FlexAttention's `mask_mod`) as graphs. (The way out is the graph's own `mask`.)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attngraph.graph.base import Graph
from attngraph.graph.compose import PerHead
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.predicate import Predicate


def from_dense(mask: Tensor) -> Graph:
    """A graph from a mask (N, M) or (H, N, M) in which True, or any number but 0, is an edge; rows are queries.

    >>> from_dense(torch.tensor([[True, False], [True, True]]))
    EdgeList([[0, 0, 1], [0, 1, 1]], size=(2, 2))

    Raises ValueError for other shapes, and for infinities and NaN.
    """
    mask = torch.as_tensor(mask)
    if mask.ndim == 3:
        return PerHead(tuple(from_dense(head) for head in mask))
    if mask.ndim != 2:
        raise ValueError(f"from_dense takes a mask (N, M), or (H, N, M) for heads (got shape {tuple(mask.shape)})")
    if mask.is_floating_point() and not mask.isfinite().all():
        raise ValueError("from_dense takes a mask, True for an edge (got infinities or NaN): for a bias, mask > -inf")
    return EdgeList(mask.nonzero().flip(1).T, (mask.shape[0], mask.shape[1]))


def from_function(function: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int] | None = None) -> Graph:
    """A graph from a predicate of (q_idx, kv_idx), as FlexAttention's `mask_mod` without batch and head.

    A predicate can only be asked pair by pair: prefer the closed forms and their algebra, which can be reasoned about.

    >>> from_function(lambda q_idx, kv_idx: q_idx >= kv_idx).num_edges(4, 4)
    10
    """
    graph = Predicate(function)
    return graph if size is None else graph.sized(*size)
