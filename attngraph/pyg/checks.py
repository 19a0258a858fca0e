"""What a layer is called with, beside what it was made for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attngraph.arguments import shown
from attngraph.pyg.edges import num_edges, values_of


def check(layer: Any, call: dict[str, Any]) -> None:
    """Raise unless the features of nodes and edges fit the layer, as PyG's errors do not tell."""
    name, x, edge_attr = type(layer).__name__, call.get("x"), call.get("edge_attr")
    if "edge_index" in call:
        _check_edge_index(call["edge_index"])
    sides = x if isinstance(x, tuple | list) else (x,)
    channels = getattr(layer, "in_channels", None)
    for side, features in enumerate(sides):
        wanted = channels[side] if isinstance(channels, tuple | list) else channels
        if isinstance(features, Tensor):
            _check_nodes(name, "x" if len(sides) == 1 else f"x[{side}]", features, wanted)
    if isinstance(edge_attr, Tensor):
        _check_edges(name, edge_attr, num_edges(call["edge_index"]), layer)
    elif getattr(layer, "needs_edge_attr", False) and values_of(call["edge_index"]) is None:
        raise ValueError(
            f"{name} was made with edge_dim={layer.edge_dim}, and needs the features of the edges: "
            f"edge_attr of shape (num_edges, {layer.edge_dim})"
        )


def _check_edge_index(edge_index: Any) -> None:
    if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided:
        if edge_index.ndim != 2 or edge_index.shape[0] != 2:
            hint = ": edge_index.T" if edge_index.ndim == 2 and edge_index.shape[1] == 2 else ""
            raise ValueError(f"edge_index must be (2, num_edges) (got shape {tuple(edge_index.shape)}){hint}")
        if edge_index.is_floating_point() or edge_index.dtype == torch.bool:
            raise ValueError(f"edge_index must hold integers (got {edge_index.dtype})")
    elif not isinstance(edge_index, Tensor) and not hasattr(edge_index, "coo"):
        raise TypeError(f"edge_index must be a tensor (2, num_edges), or a sparse matrix (got {shown(edge_index)})")


def _check_nodes(name: str, which: str, x: Tensor, channels: Any) -> None:
    if x.ndim != 2:
        hint = "; for many sets of features on one graph: attngraph.pyg.GraphAttention" if x.ndim == 3 else ""
        raise ValueError(f"{which} must be (num_nodes, channels) (got shape {tuple(x.shape)}){hint}")
    if isinstance(channels, int) and channels > 0 and x.shape[1] != channels:
        raise ValueError(f"{which} must have the {channels} channels that {name} was made for (got {tuple(x.shape)})")


def _check_edges(name: str, edge_attr: Tensor, count: int, layer: Any) -> None:
    shape, width = tuple(edge_attr.shape), edge_attr.shape[1] if edge_attr.ndim > 1 else 1
    if layer.edge_dim is None and layer.needs_edge_dim:
        raise ValueError(f"{name} takes no edge_attr (got shape {shape}), unless it is made for it: edge_dim={width}")
    if not edge_attr.is_floating_point():
        raise TypeError(f"edge_attr must hold floating-point numbers (got {edge_attr.dtype}): edge_attr.float()")
    if edge_attr.ndim not in (1, 2) or edge_attr.shape[0] != count:
        raise ValueError(f"edge_attr must be (num_edges, edge_dim), of {count} edges (got shape {shape})")
    if layer.edge_dim is not None and layer.edge_dim > 0 and width != layer.edge_dim:
        raise ValueError(f"edge_attr must have the edge_dim={layer.edge_dim} {name} was made for (got shape {shape})")
