"""PyG's attention layers on the kernels of `attend`: constructors, parameters and results are PyG's own."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch_geometric.nn as pyg
from torch import Tensor
from torch_geometric.utils import scatter

from attngraph.pyg.along import Attention
from attngraph.pyg.attending import Attending, Pending, is_lazy
from attngraph.pyg.edges import columns_of


def _by_head(linear: Any, heads: int, features: Tensor) -> Tensor:
    """The map of edge features for each head: (H, C, F)."""
    if is_lazy(linear):
        linear(features[:1])
    return linear.weight.view(heads, linear.weight.shape[0] // heads, features.shape[1]).to(features.dtype)


def _dropout(layer: Any) -> float:
    return float(layer.dropout) if layer.training else 0.0


class TransformerConv(Attending, pyg.TransformerConv):
    """PyG's `TransformerConv` (Shi et al. 2021), of which no message of an edge is held: E × H × C numbers in PyG.

    Features of edges stay (E, edge_dim): q · (k + We) = q · k + (Wᵀq) · e, and Σ w (v + We) = Σ w v + W Σ w e.
    """

    @property
    def needs_edge_attr(self) -> bool:
        """Whether a call without features of its edges is an error."""
        return self.edge_dim is not None

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        q, k, v = arguments["query"], arguments["key"], arguments["value"]
        asked = Attention(q, k, v, scale=1 / math.sqrt(self.out_channels), dropout_p=_dropout(self))
        if edge_attr is None or self.lin_edge is None or not edge_attr.shape[1]:
            return asked
        each = _by_head(self.lin_edge, self.heads, edge_attr)
        return asked._replace(edge_attr=edge_attr, to_key=each, to_value=each)

    def attend(self, pending: Pending) -> Tensor:
        self._alpha = cast(Any, pending)  # which PyG's forward returns, if weights are asked for
        return Attending.attend(self, pending)


class GATConv(Attending, pyg.GATConv):
    """PyG's `GATConv` (Veličković et al. 2018): the score of an edge is LeakyReLU(a·x_i + b·x_j + c·e_ij).

    It is a dot product of two numbers, (a·x_i, 1) · (1, b·x_j), and a bias of the edges.
    """

    needs_edge_dim = False

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        (of_source, of_target), (v, _) = arguments["alpha"], arguments["x"]
        if of_target is None:
            count = len(of_source) if num_targets is None else num_targets
            of_target = of_source.new_zeros(count, self.heads)
        q = torch.stack([of_target, torch.ones_like(of_target)], -1)
        k = torch.stack([torch.ones_like(of_source), of_source], -1)
        asked = Attention(q, k, v, score="leaky_relu", slope=self.negative_slope, dropout_p=_dropout(self))
        if edge_attr is None or self.lin_edge is None:
            return asked
        each = (_by_head(self.lin_edge, self.heads, edge_attr) * self.att_edge[0, :, :, None]).sum(1)  # (H, F)
        return asked._replace(edge_scores=edge_attr @ each.T)


class GATv2Conv(Attending, pyg.GATv2Conv):
    """PyG's `GATv2Conv` (Brody et al. 2022): the score of an edge is a · LeakyReLU(x_i + x_j + We_ij)."""

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        v, q = arguments["x"]
        options = {"slope": self.negative_slope, "dropout_p": _dropout(self), "weight": self.att[0]}
        asked = Attention(q, v, v, score="additive", **options)
        if edge_attr is None or not edge_attr.shape[1]:
            return asked
        return asked._replace(edge_attr=edge_attr, to_key=_by_head(self.lin_edge, self.heads, edge_attr))


class AGNNConv(Attending, pyg.AGNNConv):
    """PyG's `AGNNConv` (Thekumparampil et al. 2018): the score of an edge is β cos(x_i, x_j)."""

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        x, x_norm = arguments["x"][:, None], arguments["x_norm"][:, None]
        return Attention(x_norm * self.beta, x_norm, x)

    def attend(self, pending: Pending) -> Tensor:
        return Attending.attend(self, pending).squeeze(1)


class SuperGATConv(Attending, pyg.SuperGATConv):
    """PyG's `SuperGATConv` (Kim and Oh 2021) with attention_type="SD": the score of an edge is
    LeakyReLU(x_i · x_j / √C). With "MX", messages are sent as in PyG.
    """

    def has_none(self) -> str | None:
        return None if self.attention_type == "SD" else 'attention_type="MX" makes scores that no kernel knows'

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        x, scale = arguments["x"], 1 / math.sqrt(self.out_channels)
        return Attention(x, x, x, scale, "leaky_relu", self.negative_slope, _dropout(self))


class HGTConv(Attending, pyg.HGTConv):
    """PyG's `HGTConv` (Hu et al. 2020): the score of an edge is p_r x_i · x_j / √D, in which p_r is of its type."""

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        q, k, v = arguments["q"], arguments["k"], arguments["v"]
        return Attention(q, k, v, 1 / math.sqrt(q.shape[2]))

    def propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """A source is of one type of edges, so that its key may have the factor p_r of these."""
        if self.falls_back() is not None:
            return Attending.propagate(self, edge_index, size, **kwargs)
        k, factor = kwargs["k"], kwargs.pop("edge_attr")
        factor = scatter(factor, columns_of(edge_index, self.flow)[0], 0, k.shape[0], "mean")
        out = Attending.propagate(self, edge_index, size, **{**kwargs, "k": k * factor[..., None]})
        return out.flatten(1)


class GraphAttention(TransformerConv):
    """`TransformerConv` on many sets of features, each (N, C), that share one graph: x (B, N, C) → (B, N, H · C).

    Features of edges, (E, edge_dim), are shared too; weights are (B, E, H). With x (N, C) it is `TransformerConv`.
    """

    _entries: int | None = None
    """While a call runs: how many sets of features there are."""

    def forward(self, x: Any, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        """x (B, N, C), or a pair (B, M, C), (B, N, C)."""
        sides: tuple[Tensor, ...] = tuple(x) if isinstance(x, tuple | list) else (x,)
        if not any(isinstance(side, Tensor) and side.ndim == 3 for side in sides):
            return super().forward(x, edge_index, *args, **kwargs)
        shapes = [tuple(side.shape) if isinstance(side, Tensor) else None for side in sides]
        channels = self.in_channels if isinstance(self.in_channels, tuple | list) else [self.in_channels] * len(sides)
        for shape, wanted in zip(shapes, channels, strict=False):
            fits = shape is not None and len(shape) == 3 and wanted in (-1, shape[2]) and shape[0] == len(sides[0]) > 0
            if not fits:
                raise ValueError(f"x must be (B, num_nodes, {wanted}), of one B above 0 on both sides (got {shapes})")
        call = {**dict(zip(self.names, (x, edge_index, *args), strict=False)), **kwargs}
        if (reason := self._why_pyg(call) or self.falls_back()) is not None:
            raise ValueError(f"GraphAttention takes features (B, N, C) where it attends, but {reason}")
        self._entries = len(sides[0])
        try:
            flat = [side.flatten(0, 1) for side in sides]
            result = super().forward(tuple(flat) if len(flat) > 1 else flat[0], edge_index, *args, **kwargs)
        finally:
            self._entries = None
        out, *weights = result if isinstance(result, tuple) else (result,)
        out = out.unflatten(0, (len(sides[0]), -1))
        return (out, *weights) if weights else out

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        asked = super().attention(arguments, edge_attr, num_targets)
        if self._entries is None:
            return asked
        q, k, v = (side.unflatten(0, (self._entries, -1)) for side in asked[:3])
        return asked._replace(q=q, k=k, v=v)

    def attend(self, pending: Pending) -> Tensor:
        out = super().attend(pending)
        return out if self._entries is None else out.flatten(0, 1)
