"""A graph for each attention module of a Hugging Face model, kept by the modules themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph
from attngraph.graph.text import parse, written
from attngraph.hf.eviction import evict_from_cache
from attngraph.hf.modules import (
    Connection,
    Mode,
    Offset,
    attention_modules,
    is_cross,
    pretrained,
    require_all_known,
)
from attngraph.models.saved import readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "attngraph"  # of the attention implementation, and of what a config keeps
Graphs = Graph | Mapping[str, Graph] | Callable[[nn.Module], Graph | None]


@checked
def connect(
    model: nn.Module, graph: Graphs | None = None, *, mode: Mode = "intersect", evict: bool = False
) -> nn.Module:
    """Run the attention of a Hugging Face model on a graph; the model is changed, and returned.

        connect(model, Causal() & (Window(256, 0) | Prefix(4)))
        connect(model, {"*.layers.*": Window(256, 0), "*.layers.11.*": Full()})    # where two match, the last counts
        connect(model, lambda module: Window(64 << module.layer_idx, 0))
        connect(model)                                                             # as its config says, after loading

    Nodes are the real tokens of each text: padding on either side takes no place, and where `position_ids` begin again,
    so does the graph. All else stays the model's: its parameters, positions, caches, dropout, heads, sinks and biases.
    Calls that can't be right are errors. The graphs are written into the model's config, as text, which
    `save_pretrained` keeps; `connect(model)` takes them from there.

    Args:
        model: any whose attention is called by transformers' `AttentionInterface`; it may be wrapped, by PEFT, FSDP or
            `torch.compile`.
        graph: for all modules of self-attention; or by patterns of module names (`*`, `?`), those of cross-attention
            too; or a function from a module to its graph, or None. What has none keeps the model's own pattern alone.
            A graph per head has as many heads as queries have.
        mode: "intersect": who may hear whom both by the model's own pattern (causal, sliding, full) and by the graph;
            "replace": by the graph alone, and padding.
        evict: keys that no later query hears leave the caches that `generate` makes (`analysis.last_reader`).

    Raises:
        ImportError: transformers is not there.
        TypeError: no model of transformers.
        ValueError: a model that does not use the interface, or not everywhere, by name; a pattern that no module
            matches.
    """
    root = pretrained(model)
    modules = attention_modules(model)
    require_all_known(root, modules)
    if graph is None:
        graph, mode, evict = _kept(root)
    given = _graphs_of(modules, graph)
    _register()
    disconnect(model)
    _own_config(root)
    before = str(root.config._attn_implementation), {name: _implementation(modules[name]) for name in modules}
    implement(root, modules, NAME)
    hooks = []
    for name, each in given.items():
        modules[name].__dict__["attngraph_connection"] = Connection(name, each, mode)
        if is_cross(name, modules[name]):
            hooks.append(modules[name].register_forward_pre_hook(_note_offset, with_kwargs=True))
    if any(is_cross(name, modules[name]) for name in given):
        hooks.append(root.register_forward_pre_hook(_require_no_padding_in_front, with_kwargs=True))
    _keep(root, graph if isinstance(graph, Mapping) else given, mode, evict, before)
    if evict:
        hooks.append(root.register_forward_pre_hook(evict_from_cache, with_kwargs=True))
    root.__dict__["attngraph_hooks"] = hooks
    return model


@checked
def disconnect(model: nn.Module) -> nn.Module:
    """Give a model that `connect` changed its own attention back; the model is returned."""
    root = pretrained(model)
    for module in root.modules():
        for name in ("attngraph_connection", "attngraph_offset"):
            module.__dict__.pop(name, None)
    for hook in root.__dict__.pop("attngraph_hooks", ()):
        hook.remove()
    if (before := root.__dict__.pop("attngraph_before", None)) is not None:
        implement(root, attention_modules(model), *before)
    if hasattr(root.config, NAME):
        delattr(root.config, NAME)
    return model


def implement(
    root: PreTrainedModel, modules: Mapping[str, nn.Module], name: str, others: Mapping[str, str] | None = None
) -> None:
    """Let a model's attention be computed by what is registered under a name, or of a module under another.

    Of some models older versions of transformers do not believe that they call the interface.
    """
    root.set_attn_implementation(name)
    for path, module in modules.items():
        own = name if others is None else others[path]
        if _implementation(module) != own:
            module.__dict__["config"]._attn_implementation = own


def _implementation(module: nn.Module) -> str:
    """By which name a module's attention is computed."""
    return module.__dict__["config"]._attn_implementation


def _own_config(root: PreTrainedModel) -> None:
    """Give a model a config of its own: another, made of the same one, would do as it says."""
    copies: dict[int, Any] = {}
    copy.deepcopy(root.config, copies)
    for module in root.modules():
        if id(config := module.__dict__.get("config")) in copies:
            module.__dict__["config"] = copies[id(config)]


def _note_offset(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
    """How many queries came before those of this call: with a cache, a decoder's own keys say it."""
    cache = next((each for each in (*options.values(), *arguments) if hasattr(each, "self_attention_cache")), None)
    done = 0
    if cache is not None:
        hidden = arguments[0] if arguments else options["hidden_states"]
        done = int(cache.self_attention_cache.get_seq_length()) - hidden.shape[1]
    module.__dict__["attngraph_offset"] = Offset(max(done, 0), cache is not None)


def _require_no_padding_in_front(model: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
    """Raise where a decoder's text begins with padding: modules that hear another sequence are not told of it."""
    mask = options.get("decoder_attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] and not bool(mask[:, 0].all()):
        raise ValueError(
            "decoder_attention_mask must begin with real tokens where cross-attention has a graph, whose queries are "
            "numbered from the first on: pad on the right"
        )


def _graphs_of(modules: Mapping[str, nn.Module], graph: Graphs) -> dict[str, Graph]:
    """The graph of each module that has one."""
    found: dict[str, Graph] = {}
    if isinstance(graph, Graph):
        inside = {name: graph for name, module in modules.items() if not is_cross(name, module)}
        return inside or dict.fromkeys(modules, graph)
    if isinstance(graph, Mapping):
        for pattern, each in graph.items():
            matched = [name for name in modules if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"{pattern!r} must match a module of attention: {', '.join(modules)}")
            found |= dict.fromkeys(matched, each)
    else:
        found = {name: each for name, module in modules.items() if (each := graph(module)) is not None}
    for name, each in found.items():
        if not isinstance(each, Graph):
            raise TypeError(f"the graph of {name} must be a Graph (got {shown(each)})")
    if not found:
        raise ValueError("graph must give at least one module of attention a graph (got none)")
    return found


def _register() -> None:
    """Make the implementation known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from attngraph.hf.attending import attention
    from attngraph.hf.masks import mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# -------------------------------------------------------------------------------------------------- in its config


def _keep(root: PreTrainedModel, graphs: Mapping[str, Graph], mode: Mode, evict: bool, before: Any) -> None:
    """Write the graphs into the model's config."""
    root.__dict__["attngraph_before"] = before
    try:
        texts = {name: readable(graph, written(graph), parse) for name, graph in graphs.items()}
    except ValueError as error:
        warnings.warn(f"the model's config keeps no graph that can't be written as text: {error}", stacklevel=4)
        return
    setattr(root.config, NAME, {"graphs": texts, "mode": mode, "evict": evict})


def _kept(root: PreTrainedModel) -> tuple[dict[str, Graph], Mode, bool]:
    """What a config keeps."""
    found = getattr(root.config, NAME, None)
    if isinstance(found, dict) and all(isinstance(each, str) for each in found.values()):
        raise ValueError("the model's config keeps graphs of attngraph.hf.save: attngraph.hf.load reads them")
    if not isinstance(found, dict) or found.keys() != {"graphs", "mode", "evict"}:
        raise ValueError(
            f"connect needs a graph, or a model whose config keeps one, as connect writes it (got {shown(found)})"
        )
    return {name: parse(text) for name, text in found["graphs"].items()}, found["mode"], found["evict"]
