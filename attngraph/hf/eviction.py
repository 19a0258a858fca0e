"""Caches of transformers from which a key goes when no later query hears it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attngraph.graph.patterns import Causal
from attngraph.hf.modules import attention_modules, connection_of, is_cross


def evict_from_cache(model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
    """Before a call of a model: let its cache, if it is still empty, forget what the graphs of its layers allow."""
    from transformers import Cache

    given = next((each for each in options.values() if isinstance(each, Cache)), None)
    given: Any = getattr(given, "self_attention_cache", given)
    if given is None:
        return
    if given.get_seq_length() == 0:
        _replace_layers(given, attention_modules(model))
    for layer in given.layers:
        if getattr(layer, "forgets", False):
            layer.attention_mask = options.get("attention_mask")


def _replace_layers(cache: Any, modules: Mapping[str, nn.Module]) -> None:
    """Give an empty cache layers that forget."""
    from transformers.cache_utils import DynamicLayer

    from attngraph.hf.forgetting import ForgettingLayer

    graphs = {}
    for name, module in modules.items():
        connection, layer = connection_of(module), getattr(module, "layer_idx", None)
        if connection is not None and layer is not None and not is_cross(name, module):
            graphs[layer] = connection.effective(Causal())
    for number, graph in graphs.items():
        while len(cache.layers) <= number and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
            cache.layers.append(DynamicLayer())
        if number < len(cache.layers) and type(cache.layers[number]) is DynamicLayer:
            cache.layers[number] = ForgettingLayer(graph)
