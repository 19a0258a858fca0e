"""Dense masks and predicates (FlexAttention's `mask_mod`) as graphs. (The way out is the graph's own `mask`.)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attngraph.arguments import checked
from attngraph.graph.base import Graph
from attngraph.graph.boxes import require_memory
from attngraph.graph.compose import PerHead
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import BYTES_PER_EDGE
from attngraph.graph.predicate import Predicate

MASKED = -1000  # what additive masks add where there is no edge, or less


def from_dense(mask: Tensor) -> Graph:
    """A graph from a mask (N, M) or (H, N, M) in which True, or any number but 0, is an edge; rows are queries.

    >>> from_dense(torch.tensor([[True, False], [True, True]]))
    EdgeList([[0, 0, 1], [0, 1, 1]], size=(2, 2))

    Raises ValueError for other shapes, for infinities and NaN, and for an additive mask (0 where there is an edge).
    """
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"from_dense takes a mask, a tensor of bools (got {type(mask).__name__}: {error})") from None
    if mask.ndim == 3:
        return PerHead(tuple(from_dense(head) for head in mask))
    if mask.ndim != 2:
        raise ValueError(f"from_dense takes a mask (N, M), or (H, N, M) for heads (got shape {tuple(mask.shape)})")
    if mask.is_floating_point() and not mask.isfinite().all():
        raise ValueError("from_dense takes a mask, True for an edge (got infinities or NaN): for a bias, mask > -inf")
    if mask.is_complex():
        raise TypeError(f"from_dense takes a mask of bools or real numbers (got {mask.dtype})")
    if mask.dtype != torch.bool and mask.numel() and mask.min() <= MASKED and not (mask > 0).any():
        raise ValueError(
            f"from_dense takes a mask, True for an edge (got an additive mask, of 0 and {mask.min().item():.3g}): "
            f"from_dense(mask == 0)"
        )
    require_memory(int(mask.count_nonzero()) * BYTES_PER_EDGE, "to list the edges of a mask")
    return EdgeList(mask.nonzero().flip(1).T, (mask.shape[0], mask.shape[1]))


@checked
def from_function(function: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int] | None = None) -> Graph:
    """A graph from a predicate of (q_idx, kv_idx), as FlexAttention's `mask_mod` without batch and head.

    A predicate can only be asked pair by pair: prefer the closed forms and their algebra, which can be reasoned about.

    >>> from_function(lambda q_idx, kv_idx: q_idx >= kv_idx).num_edges(4, 4)
    10
    """
    graph = Predicate(function)
    if size is None:
        return graph
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise TypeError(f"size must be (num_queries, num_keys), or None for any (got {size!r})")
    return graph.sized(*size)
