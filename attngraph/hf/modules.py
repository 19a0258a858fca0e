"""The attention modules of a Hugging Face model, and the graph that each is connected to."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from attngraph.analysis.causality import is_causal_by_form
from attngraph.arguments import checked, shown
from attngraph.graph.base import Graph
from attngraph.graph.patterns import Causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["intersect", "replace"]
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
CROSS = {"encoder_attn", "encdecattention", "encoder_attention"}  # what modules are called that hear another sequence
# Keywords of the interface that models call, and what they pass on: with another one they mean something else.
KEYWORDS = {"query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "position_bias", "softcap"}
KEYWORDS |= {"s_aux", "sliding_window", "output_attentions", "position_ids", "deterministic"}
KEYWORDS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
RECURRENT = ("linear", "lightning", "delta", "mamba")  # in names of classes that hear the past without edges
NOT_INSTALLED = "attngraph.hf.connect needs transformers 5.17 or newer: pip install 'transformers>=5.17'"


class Connection:
    """What an attention module runs on: its graph, and with its model's own pattern or in its place."""

    def __init__(self, name: str, graph: Graph, mode: Mode):
        self.name, self.graph, self.mode = name, graph, mode
        self._effective: dict[Graph, Graph] = {}
        self.is_causal_at_once = is_causal_by_form(graph)
        """Whether it is causal whatever its size."""
        self._causal_up_to = 0

    def effective(self, own: Graph) -> Graph:
        """The graph that runs, where the model's own pattern is this one."""
        if self.mode == "replace":
            return self.graph
        if own not in self._effective:
            self._effective[own] = own & self.graph
        return self._effective[own]

    @property
    def own(self) -> list[Graph]:
        """The model's own patterns that it was called with, in mode "intersect"."""
        return list(self._effective)

    def is_causal(self, n: int) -> bool:
        """Whether no query of n hears a later key; asked of twice as many at once, as a sequence grows."""
        if self.is_causal_at_once or n <= self._causal_up_to:
            return True
        for size in (2 * n, n) if None in self.graph.size else (n,):
            sized = self.graph.sized(size, size) if None in self.graph.size else self.graph
            if sized.num_edges() == (sized & Causal()).num_edges():
                self._causal_up_to = size
                return True
        return False

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
    found = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    if not found:
        raise TypeError(f"model must be one of transformers, or a wrapper of one (got {shown(model)})")
    first, *others = found
    if apart := [name for name in others if first and not name.startswith(f"{first}.")]:
        raise ValueError(
            f"model must hold one model of transformers (got {first} and {apart[0]}): connect each by itself"
        )
    return found[first]


def require_all_known(root: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """Raise for a model with attention that a graph would miss, or that means more than the interface says."""
    for name, module in modules.items():
        if more := sorted(_keywords(type(module)) - KEYWORDS):
            raise ValueError(
                f"{name} calls its attention with {', '.join(more)}, which a graph does not know, and would ignore: "
                f"{type(root).__name__} can't be connected"
            )
    if missed := [*_apart(root, modules)]:
        raise ValueError(
            f"{type(root).__name__} computes some of its attention by itself, not by transformers' AttentionInterface, "
            f"so that a graph would be ignored there: {', '.join(missed[:4])}{', …' * (len(missed) > 4)}; connect the "
            f"part that does call it, such as model.language_model"
        )


def _apart(root: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The modules that compute attention by themselves: neither around nor inside one that calls the interface."""
    for name, module in root.named_modules():
        kind, plain = type(module).__name__.lower(), plain_name(name)
        if (
            "attention" not in kind
            or any(word in kind for word in RECURRENT)
            or "attention" in plain.rpartition(".")[0]
        ):
            continue
        computes = any(isinstance(child, nn.Linear) for child in module.modules())
        related = any(f"{each}.".startswith(f"{plain}.") or f"{plain}.".startswith(f"{each}.") for each in modules)
        if computes and not related:
            yield plain


def _keywords(kind: type[nn.Module]) -> set[str]:
    """By which keywords the code of a class calls the attention that it has looked up."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, SyntaxError):  # without its source
        return set()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "attention_interface"]
    return {keyword.arg for call in named for keyword in call.keywords if keyword.arg is not None}


def plain_name(name: str) -> str:
    """A module's name without those of its wrappers."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether a module hears another sequence."""
    marks = ("is_cross_attention", "is_cross")
    parts = name.lower().split(".")
    named = any("cross" in part and ("att" in part or part == parts[-1]) for part in parts)
    return named or any(getattr(module, mark, False) is True for mark in marks) or parts[-1] in CROSS


def _calls_interface(kind: type[nn.Module]) -> bool:
    """Whether what a class computes looks its attention up, rather than compute it itself."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
