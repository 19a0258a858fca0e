"""The attention layers of a model that exists, on the kernels of `attend`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch_geometric.nn import MessagePassing

from attngraph.arguments import checked
from attngraph.pyg import layers, sets

LAYERS: dict[type, Any] = {
    layer.of: layer
    for layer in (
        layers.AGNNConv,
        layers.GATConv,
        layers.GATv2Conv,
        layers.HGTConv,
        layers.SuperGATConv,
        layers.TransformerConv,
        sets.GPSConv,
        sets.SetTransformerAggregation,
    )
}
"""PyG's own layer → ours of the same name."""


class Accelerated(NamedTuple):
    """What `accelerate` did, by the names of the modules."""

    changed: dict[str, str]
    """The layers that attend now, and their class."""
    left: dict[str, str]
    """The layers that are what they were, and why."""

    def __str__(self) -> str:
        lines = [f"{name or 'model'}: {what}" for name, what in self.changed.items()]
        return "\n".join([*lines, *(f"{name or 'model'} is left: {why}" for name, why in self.left.items())])


@checked
def accelerate(model: torch.nn.Module) -> Accelerated:
    """Let the attention layers of a PyG model attend by this library's kernels: in place, with their parameters.

    A layer becomes the class of the same name of `attngraph.pyg`; it stays a PyG layer, of the same state, and may be
    trained, saved and explained as before. Layers that are no attention, or whose class is not PyG's own, are left.

    >>> from torch_geometric.nn import GAT
    >>> print(accelerate(GAT(16, 32, num_layers=2, v2=True)))
    convs.0: GATv2Conv
    convs.1: GATv2Conv
    """
    changed, left = {}, {}
    for name, module in model.named_modules():
        old = type(module)
        if (new := LAYERS.get(old)) is None:
            if (reason := _why_left(module)) is not None:
                left[name] = reason
            continue
        module.__class__ = new
        for method in ("propagate", "edge_updater"):  # PyG sets them on a layer that was explained
            vars(module).pop(method, None)
        reason = cast(Any, module).falls_back()
        if reason is None or getattr(module, "explain", None):
            changed[name] = new.__name__
        else:
            module.__class__, left[name] = old, f"{old.__name__}: {reason}"
    return Accelerated(changed, left)


def _why_left(module: torch.nn.Module) -> str | None:
    """Why a module is not changed; None for what is no layer of a graph, or attends already."""
    kind = type(module).__name__
    if isinstance(module, tuple(LAYERS.values())):
        return None
    known = next((base for base in LAYERS if isinstance(module, base)), None)
    if known is not None:
        return f"{kind} is a class of its own, made of {known.__name__}"
    return f"{kind} has no attention" if isinstance(module, MessagePassing) else None
