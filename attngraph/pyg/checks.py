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
    if "edge_index_dict" in call and not torch.compiler.is_compiling():
        _check_types(call.get("x_dict", {}), call["edge_index_dict"])
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


def tell_more(layer: Any, call: dict[str, Any]) -> None:
    """Raise what PyG's layer, or torch, has not told of a call that failed; nothing if all looks right."""
    x, name = call.get("x"), type(layer).__name__
    if x is None:
        return
    sides = tuple(x) if isinstance(x, tuple | list) else (x, x)
    channels = getattr(layer, "in_channels", None)
    if isinstance(channels, tuple | list) and isinstance(x, Tensor) and channels[0] != channels[1]:
        raise ValueError(
            f"x must be a pair (x_source, x_target), as {name} was made for {tuple(channels)} channels (got one tensor)"
        )
    if len(sides) != 2:
        raise ValueError(f"x must be a tensor, or a pair (x_source, x_target) (got {len(sides)} parts)")
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)
    for side in sides:
        if side is not None and not isinstance(side, Tensor):
            raise TypeError(f"x must be a tensor of features, or a pair (got {shown(side)})")
        if isinstance(side, Tensor) and not torch.is_autocast_enabled(side.device.type) and side.dtype != dtype:
            raise TypeError(f"x must be of the dtype of {name}'s parameters, {dtype} (got {side.dtype})")
    edge_index = call.get("edge_index")
    if isinstance(edge_index, Tensor) and edge_index.layout == torch.strided:
        targets = sides[1] if sides[1] is not None else None
        ends = edge_index if layer.flow == "source_to_target" else edge_index.flip(0)
        for end, nodes, side in zip(("source", "target"), ends, (sides[0], targets), strict=True):
            if isinstance(side, Tensor):
                _check_range(f"edge_index must name {end} nodes", nodes, len(side))


def _check_range(what: str, nodes: Tensor, count: int) -> None:
    least, most = (0, -1) if not nodes.numel() else map(int, torch.aminmax(nodes))
    if least < 0 or most >= count:
        raise IndexError(f"{what} from 0 to {count - 1}, as there are {count} of them (got {least} … {most})")


def _check_types(x_dict: Any, edge_index_dict: Any) -> None:
    """Sources and targets of each type of edges, which PyG numbers together: one too large is a node of another."""
    for kind, edge_index in edge_index_dict.items():
        if not (isinstance(edge_index, Tensor) and edge_index.layout == torch.strided and len(kind) == 3):
            continue
        for end, side, nodes in zip(("source", "target"), (kind[0], kind[2]), edge_index, strict=True):
            if side in x_dict:
                _check_range(f"edge_index_dict[{kind!r}] must name {end} nodes of {side!r}", nodes, len(x_dict[side]))


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
    weight = getattr(getattr(layer, "lin_edge", None), "weight", edge_attr)
    if edge_attr.dtype != weight.dtype and not torch.is_autocast_enabled(edge_attr.device.type):
        raise TypeError(
            f"edge_attr must be of the dtype of {name}'s parameters, {weight.dtype} (got {edge_attr.dtype})"
        )
    if edge_attr.ndim not in (1, 2) or edge_attr.shape[0] != count:
        raise ValueError(f"edge_attr must be (num_edges, edge_dim), of {count} edges (got shape {shape})")
    if layer.edge_dim is not None and layer.edge_dim > 0 and width != layer.edge_dim:
        raise ValueError(f"edge_attr must have the edge_dim={layer.edge_dim} {name} was made for (got shape {shape})")
