"""What a layer is called with, beside what it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attngraph.pyg.edges import num_edges, values_of


def check(layer: Any, call: dict[str, Any]) -> None:
    """Raise unless the features of nodes and edges fit the layer, as PyG's errors do not tell."""
    name, x, edge_attr = type(layer).__name__, call.get("x"), call.get("edge_attr")
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
    if edge_attr.ndim not in (1, 2) or edge_attr.shape[0] != count:
        raise ValueError(f"edge_attr must be (num_edges, edge_dim), of {count} edges (got shape {shape})")
    if layer.edge_dim is not None and layer.edge_dim > 0 and width != layer.edge_dim:
        raise ValueError(f"edge_attr must have the edge_dim={layer.edge_dim} {name} was made for (got shape {shape})")
