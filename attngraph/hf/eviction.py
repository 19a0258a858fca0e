"""Caches of transformers from which a key goes when no later query hears it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal, Window
from attngraph.hf.modules import attention_modules, connection_of, is_cross


def evict_from_cache(model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
    """Before a call of a model: let its cache, if it is still empty, forget what the graphs of its layers allow."""
    from transformers import Cache

    given = next((each for each in options.values() if isinstance(each, Cache)), None)
    given: Any = getattr(given, "self_attention_cache", given)
    if given is None:
        return
    if given.get_seq_length() == 0:
        config: Any = model.config
        most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
        _replace_layers(given, attention_modules(model), most)
    for layer in given.layers:
        if getattr(layer, "forgets", False):
            layer.attention_mask = options.get("attention_mask")


def _replace_layers(cache: Any, modules: Mapping[str, nn.Module], most: int) -> None:
    """Give an empty cache layers that forget."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    from attngraph.hf.forgetting import ForgettingLayer, LastQueries

    shared: dict[Graph, LastQueries] = {}

    def forgetting(graph: Graph) -> ForgettingLayer:
        return ForgettingLayer(shared.setdefault(graph, LastQueries(graph, most)))

    for name, module in modules.items():
        connection, number = connection_of(module), getattr(module, "layer_idx", None)
        if connection is None or number is None or is_cross(name, module):
            continue
        while len(cache.layers) <= number and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[number] if number < len(cache.layers) else None
        if type(layer) is DynamicLayer:
            cache.layers[number] = forgetting(connection.effective(Causal()))
        elif type(layer) is DynamicSlidingWindowLayer:
            own = Causal() & Window(layer.sliding_window - 1, 0)
            cache.layers[number] = forgetting(connection.effective(own))
