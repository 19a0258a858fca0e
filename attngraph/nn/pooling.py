"""One vector for a whole graph, of those of its nodes."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from attngraph.arguments import shown
from attngraph.graph.base import require_ints
from attngraph.graph.compose import Batched, Disjoint
from attngraph.nn.checks import require_range
from attngraph.nn.padding import padding_mask

REDUCE = ("mean", "sum", "max")


def pool(
    x: Tensor,
    reduce: Literal["mean", "sum", "max"] = "mean",
    *,
    batch: Tensor | Disjoint | None = None,
    num_graphs: int | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """A vector for each graph of a batch: the mean, the sum, or the largest number, of the vectors of its nodes.

    - Of graphs packed side by side, x is (N, D) or (1, N, D), and `batch` tells to which graph each node belongs:
      int64 (N,), as `collate` and PyG give it, or the `Disjoint` graph itself. The result is (graphs, D), of
      `num_graphs` graphs, by default up to the last that has a node.
    - Of graphs that are entries of a batch, x is (B, N, D), and `attention_mask`, bool or integers 0 and 1, (B, N), is
      True or 1 for real nodes; without it all are. The result is (B, D).

    A graph without nodes gets 0.

    >>> x = torch.tensor([[1.0], [2.0], [6.0]])
    >>> pool(x, batch=torch.tensor([0, 1, 1]))
    tensor([[1.],
            [4.]])
    >>> pool(x[None], "max", attention_mask=torch.tensor([[True, True, False]]))
    tensor([[2.]])

    Raises ValueError for another shape and, on a CPU, for numbers outside of the graphs.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else shown(x)
        raise TypeError(f"x must be a tensor of floating-point numbers, the vectors of nodes (got {given})")
    if not isinstance(reduce, str) or reduce not in REDUCE:
        error = ValueError if isinstance(reduce, str) else TypeError
        raise error(f"reduce must be one of {', '.join(REDUCE)} (got {shown(reduce)})")
    if x.dtype == torch.float16:  # whose sums, and whose counts, pass its largest number
        exact = pool(x.float(), reduce, batch=batch, num_graphs=num_graphs, attention_mask=attention_mask)
        return exact.to(x.dtype)
    if batch is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask is of graphs that are entries of a batch, batch of packed ones: give one")
        return _of_packed(x, reduce, *_numbered(batch, num_graphs, x))
    if num_graphs is not None:
        raise ValueError("num_graphs is of packed graphs: give batch too")
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, D), or packed nodes with batch (got shape {tuple(x.shape)} without batch)")
    mask = padding_mask("attention_mask", attention_mask, x)
    mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    if reduce == "max":
        some = mask.any(1, keepdim=True)
        lowest = x.masked_fill(~mask[..., None], -torch.inf)
        return lowest.amax(1).where(some, 0) if x.shape[1] else x.sum(1)
    total = x.masked_fill(~mask[..., None], 0).sum(1)
    return total if reduce == "sum" else total / mask.sum(1, keepdim=True).clamp(min=1)


def _numbered(batch: Tensor | Disjoint, num_graphs: int | None, x: Tensor) -> tuple[Tensor, int]:
    """The graph of each node, and how many graphs there are."""
    if num_graphs is not None:
        require_ints(0, num_graphs=num_graphs)
    nodes = x.shape[-2] if x.ndim == 2 or (x.ndim == 3 and len(x) == 1) else None
    wanted = "batch must be integers (N,), the graph of each node of x (N, D) or (1, N, D), or a Disjoint graph"
    if isinstance(batch, Batched):
        raise ValueError("batch must be a graph of packed nodes; of entries of a batch, Batched, give attention_mask")
    if isinstance(batch, Disjoint):
        sizes = [graph.size[0] for graph in batch.graphs]
        if None in sizes or num_graphs not in (None, len(sizes)):
            raise ValueError(f"{wanted} whose parts know their size, {len(sizes)} of num_graphs={num_graphs}")
        num_graphs = len(sizes)
        batch = torch.arange(num_graphs).repeat_interleave(torch.tensor(cast(list[int], sizes)))
    if not isinstance(batch, Tensor):
        raise TypeError(f"{wanted} (got {shown(batch)})")
    if batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise TypeError(f"{wanted} (got {batch.dtype})")
    if nodes is None or tuple(batch.shape) != (nodes,):
        raise ValueError(f"{wanted} (got {tuple(batch.shape)} for x {tuple(x.shape)})")
    if num_graphs is None:
        num_graphs = int(batch.max()) + 1 if nodes else 0
    require_range(f"batch must be numbers from 0 to {num_graphs - 1}", num_graphs - 1, batch)
    return batch.to(x.device).long(), num_graphs


def _of_packed(x: Tensor, reduce: str, batch: Tensor, num_graphs: int) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    if reduce == "max":
        return x.new_zeros(num_graphs, x.shape[1]).scatter_reduce(
            0, batch[:, None].expand_as(x), x, "amax", include_self=False
        )
    total = x.new_zeros(num_graphs, x.shape[1]).index_add(0, batch, x)
    if reduce == "sum":
        return total
    return total / torch.bincount(batch, minlength=num_graphs).clamp(min=1)[:, None].to(x.dtype)
