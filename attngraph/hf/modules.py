"""The attention modules of a Hugging Face model, and the graph that each is connected to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["intersect", "replace"]
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
CROSS = {"encoder_attn", "encdecattention", "encoder_attention"}  # what modules are called that hear another sequence
NOT_INSTALLED = "attngraph.hf.connect needs transformers 5.17 or newer: pip install 'transformers>=5.17'"


class Connection:
    """What an attention module runs on: its graph, and with its model's own pattern or in its place."""

    def __init__(self, name: str, graph: Graph, mode: Mode):
        self.name, self.graph, self.mode = name, graph, mode
        self._effective: dict[Graph, Graph] = {}
        self._causal: bool | None = None

    def effective(self, own: Graph) -> Graph:
        """The graph that runs, where the model's own pattern is this one."""
        if self.mode == "replace":
            return self.graph
        if own not in self._effective:
            self._effective[own] = own & self.graph
        return self._effective[own]

    def is_causal(self, n: int) -> bool:
        """Whether no query of n hears a later key; asked once."""
        if self._causal is None:
            sized = self.graph.sized(n, n) if None in self.graph.size else self.graph
            self._causal = sized.num_edges() == (sized & Causal()).num_edges()
        return self._causal

    def __repr__(self) -> str:
        return f"Connection({self.name}, {self.graph}, {self.mode})"


class Offset(NamedTuple):
    """What a module knows that hears another sequence."""

    before: int
    """How many queries came before those of this call."""
    has_cache: bool


def connection_of(module: nn.Module) -> Connection | None:
    """That of an attention module; None where only the model's own pattern counts."""
    return module.__dict__.get("attngraph_connection")


@checked
def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a Hugging Face model that call `AttentionInterface`, by the names that `connect` matches.

    Raises TypeError for what is no model of transformers, and ValueError where no module does.
    """
    root = pretrained(model)
    named: Iterable[tuple[str, nn.Module]] = root.named_modules()
    found: dict[str, nn.Module] = {plain_name(name): module for name, module in named if _calls_interface(type(module))}
    if not found:
        raise ValueError(
            f"{type(root).__name__} computes its attention by itself, not by transformers' AttentionInterface, so that "
            f"a graph would be ignored; attngraph.hf.load rebuilds some families, or give it to "
            f"attngraph.nn.Attention"
        )
    return found


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The model of transformers in a wrapper, or itself."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(NOT_INSTALLED) from error
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must be one of transformers, or a wrapper of one (got {shown(model)})")


def plain_name(name: str) -> str:
    """A module's name without those of its wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether a module hears another sequence."""
    marks = ("is_cross_attention", "is_cross")
    last = name.rpartition(".")[2].lower()
    return any(getattr(module, mark, False) is True for mark in marks) or last in CROSS or "cross" in last


def _calls_interface(kind: type[nn.Module]) -> bool:
    """Whether what a class computes looks its attention up, rather than compute it itself."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
