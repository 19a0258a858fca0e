"""Attention among the nodes of each graph of a batch: nothing is padded, so that nothing can leak from padding."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch_geometric.nn as pyg
from torch import Tensor
from torch.nn import functional as F

from attngraph.arguments import checked
from attngraph.attention import attend
from attngraph.graph.base import Graph
from attngraph.graph.edge_list import of_sorted
from attngraph.graph.patterns import Documents
from attngraph.pyg.attending import is_hooked


def _check_length(name: str, batch: Tensor, x: Tensor) -> None:
    if len(batch) != len(x):
        raise ValueError(f"{name} must be the graph of each of the {len(x)} nodes of x (got {len(batch)})")


@checked
def from_batch(batch: Tensor) -> Documents:
    """All nodes of each graph of a batch hear each other: `Documents`, whose lengths are the graphs' numbers of nodes.

    Args:
        batch: of each node the graph to which it belongs, ascending, int64 (N,), as ``Data.batch``.

    >>> from_batch(torch.tensor([0, 0, 0, 2, 2]))
    Documents([3, 0, 2])

    Raises ValueError for a batch that is not sorted: its nodes do not lie one graph after the other.
    """
    return Documents(tuple(_counts(batch, None).tolist()))


def _counts(batch: Tensor, num_graphs: int | None) -> Tensor:
    """How many nodes each graph has."""
    if batch.ndim != 1 or batch.dtype not in (torch.int32, torch.int64):
        got = f"{batch.dtype}, shape {tuple(batch.shape)}"
        raise ValueError(f"batch must be the number of the graph of each node, int64 (N,) (got {got})")
    if not bool((batch[1:] >= batch[:-1]).all() and (batch[:1] >= 0).all()):
        raise ValueError(
            "batch must be ascending from 0 on, the nodes one graph after the other (got others): order = "
            "batch.argsort(stable=True), then x[order] and batch[order]"
        )
    return batch.bincount(minlength=num_graphs or 0)


def multihead(attention: torch.nn.MultiheadAttention, x: Tensor, y: Tensor, graph: Graph) -> Tensor:
    """What PyTorch's module makes of queries x (N, C) and of keys and values y (M, C), along the edges of a graph."""
    heads, weight, bias = attention.num_heads, attention.in_proj_weight, attention.in_proj_bias
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    sides = zip((x, y, y), weight.chunk(3), biases, strict=True)
    q, k, v = (F.linear(side, w, b).view(1, -1, heads, attention.head_dim).transpose(1, 2) for side, w, b in sides)
    out = attend(q, k, v, graph, dropout_p=attention.dropout if attention.training else 0.0)
    return attention.out_proj(out.transpose(1, 2).flatten(2).squeeze(0))


def lacks(attention: Any) -> str | None:
    """Why `multihead` can't stand for a module; None if it can."""
    if not isinstance(attention, torch.nn.MultiheadAttention):
        return f"{type(attention).__name__} is no attention along edges"
    if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
        return "kdim, vdim, add_bias_kv and add_zero_attn are not supported"
    if type(attention).forward is not torch.nn.MultiheadAttention.forward or "forward" in vars(attention):
        return f"{type(attention).__name__} has a forward() of its own"
    if is_hooked(attention):
        return "hooks look at its attention"
    return None


class GPSConv(pyg.GPSConv):
    """PyG's `GPSConv` (Rampášek et al. 2022), whose global attention is among the nodes of each graph as they are.

    PyG pads all graphs to the largest. With attn_type="performer" it is PyG's own.
    """

    of = pyg.GPSConv

    def falls_back(self) -> str | None:
        """Why it runs as PyG wrote it; None where it attends."""
        return lacks(self.attn)

    def forward(self, x: Tensor, edge_index: Any, batch: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As PyG's."""
        if self.falls_back() is not None:
            return super().forward(x, edge_index, batch, **kwargs)
        if batch is not None:
            _check_length("batch", batch, x)
        graph = Documents((len(x),)) if batch is None else from_batch(batch)
        out = self._with(x, multihead(cast(torch.nn.MultiheadAttention, self.attn), x, x, graph), self.norm2, batch)
        if self.conv is not None:
            out = self._with(x, self.conv(x, edge_index, **kwargs), self.norm1, batch) + out
        out = out + self.mlp(out)
        return self._normalized(out, self.norm3, batch)

    def _with(self, x: Tensor, h: Tensor, norm: Any, batch: Tensor | None) -> Tensor:
        """x and what was heard."""
        return self._normalized(F.dropout(h, self.dropout, self.training) + x, norm, batch)

    def _normalized(self, x: Tensor, norm: Any, batch: Tensor | None) -> Tensor:
        if norm is None:
            return x
        return norm(x, batch=batch) if self.norm_with_batch else norm(x)


class SetTransformerAggregation(pyg.aggr.SetTransformerAggregation):
    """PyG's `SetTransformerAggregation` (Lee et al. 2019): learned seeds hear the nodes of each graph, as they are."""

    of = pyg.aggr.SetTransformerAggregation

    def falls_back(self) -> str | None:
        """Why it runs as PyG wrote it; None where it attends."""
        blocks = [*(encoder.mab for encoder in self.encoders), self.pma.mab]
        if any(is_hooked(each) for each in (*self.encoders, self.pma, *blocks)):
            return "hooks look at its blocks"
        return next((reason for block in blocks if (reason := lacks(block.attn)) is not None), None)

    def forward(self, x: Tensor, index: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """As PyG's."""
        if index is None or x.ndim != 2 or self.falls_back() is not None:
            return super().forward(x, index, *args, **kwargs)
        dim_size = kwargs.get("dim_size", args[1] if len(args) > 1 else None)
        _check_length("index", index, x)
        counts = _counts(index, dim_size)
        if dim_size is not None and len(counts) > dim_size:
            raise ValueError(f"dim_size must be the number of graphs, {len(counts)} or more (got {dim_size})")
        graph, seeds = Documents(tuple(counts.tolist())), self.pma.seed.shape[1]
        for encoder in self.encoders:
            x = _block(encoder.mab, x, x, graph)
        x = self.pma.lin(x).relu()
        # Each seed of each graph hears the graph's nodes, which follow each other.
        each = counts.repeat_interleave(seeds)
        query = torch.arange(len(each), device=x.device).repeat_interleave(each)
        first = (counts.cumsum(0) - counts).repeat_interleave(seeds)
        place = torch.arange(len(query), device=x.device) - (each.cumsum(0) - each).repeat_interleave(each)
        graph = of_sorted(query * len(x) + first[query] + place, (len(each), len(x))).without_plans()
        out = _block(self.pma.mab, self.pma.seed[0].repeat(len(counts), 1), x, graph).unflatten(0, (-1, seeds))
        for decoder in self.decoders:
            out = decoder(out)
        return out.flatten(1, 2) if self.concat else out.mean(dim=1)


def _block(mab: Any, x: Tensor, y: Tensor, graph: Graph) -> Tensor:
    """PyG's `MultiheadAttentionBlock` along the edges of a graph."""
    out = multihead(mab.attn, x, y, graph) + x
    out = out if mab.layer_norm1 is None else mab.layer_norm1(out)
    out = out + mab.lin(out).relu()
    return out if mab.layer_norm2 is None else mab.layer_norm2(out)
