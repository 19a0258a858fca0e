"""Attention in the place of the messages of a PyG layer: a mixin, and what each layer has to say for it."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from attngraph.attention import attend
from attngraph.bias import EdgeBias
from attngraph.edge_features import EdgeFeatures
from attngraph.pyg.checks import check
from attngraph.pyg.edges import Edges, columns_of, values_of

HOOKS = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
METHODS = ("message", "aggregate", "update", "edge_update", "message_and_aggregate")


class Attention(NamedTuple):
    """What a layer asks of `attend`, of one set of features: q (…, N, H, D), k and v (…, M, H, ·)."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    edge_scores: Tensor | None = None
    """Added to the scores of the edges, as they were given: (E, H)."""
    edge_attr: Tensor | None = None
    """Features of the edges, as they were given: (E, F)."""
    to_key: Tensor | None = None
    """What makes a part of their keys of them: (H, D, F)."""
    to_value: Tensor | None = None
    """And of their values: (H, Dv, F)."""


class Pending(NamedTuple):
    """In place of weights that PyG makes before it sends messages by them: they are made with these, later."""

    arguments: dict[str, Any]


class Attending(MessagePassing):
    """A mixin before the layer of PyG that it makes attend: ``class GATConv(Attending, torch_geometric.nn.GATConv)``.

    The layer projects its features and makes its output as PyG wrote it; between the two, where PyG sends messages
    along the edges, it attends. Where something asks for the messages, they are sent: see `falls_back`.
    """

    of: ClassVar[Any]
    """PyG's own layer."""
    signature: ClassVar[inspect.Signature]
    """That of its `forward`."""
    needs_edge_dim: ClassVar[bool] = True
    """Whether edge features are an error in a layer that was made for none; else they are left out, as in PyG."""
    _wants_weights: bool = False
    """While a call runs that asks for weights."""
    _weights: Tensor | None = None
    """And what they are, (E, H) as the edges were given."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # PyG writes a `propagate` for each class that has none of its own, and comes back to the old one by these names.
        for name in ("propagate", "edge_updater"):
            own = cls.__dict__.get(name, Attending.__dict__[name])
            for place in (name, f"_orig_{name}", f"_jinja_{name}"):
                setattr(cls, place, own)
        if cls.__bases__[0] is Attending:
            cls.of = cls.__bases__[1]
            cls.signature = inspect.signature(cls.of.forward)
            cls.forward = functools.wraps(cls.of.forward)(Attending.__dict__["forward"])

    # ---------------------------------------------------------------------------------------- what each layer says

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None) -> Attention:
        """The attention that stands for the messages which PyG would make of these arguments of `propagate`."""
        raise NotImplementedError

    def has_none(self) -> str | None:
        """Why a layer made like this has no attention that kernels know; None if it has."""
        return None

    # ------------------------------------------------------------------------------------------ what happens to all

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PyG's."""
        call = self.signature.bind(self, *args, **kwargs).arguments
        check(self, call)
        if call.get("return_attention_weights") is False:  # None in PyG: any bool there asks for weights
            call["return_attention_weights"] = None
        self._wants_weights = bool(call.get("return_attention_weights"))
        try:
            result = self.of.forward(**call)
            if isinstance(result, tuple) and isinstance(result[1], tuple) and isinstance(result[1][1], Pending):
                result = result[0], (result[1][0], self._weights)
            return result
        finally:
            self._wants_weights, self._weights = False, None

    def falls_back(self) -> str | None:
        """Why messages are sent as in PyG, which holds a vector for each; None where attention takes their place."""
        if self.explain:
            return "an explainer looks at its messages"
        if torch.jit.is_tracing():
            return "it is traced"
        if any(getattr(self, f"_{name}_forward{kind}_hooks") for name in HOOKS for kind in ("", "_pre")):
            return "hooks look at its messages"
        if self.decomposed_layers > 1:
            return f"its messages are made in {self.decomposed_layers} parts"
        if self.aggr not in ("add", "sum"):
            return f"it takes the {self.aggr} of what comes, which is no attention"
        for name in METHODS:
            if name in vars(self) or getattr(type(self), name) is not getattr(self.of, name):
                return f"it has a {name}() of its own"
        return self.has_none()

    def edge_updater(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """In layers that make weights before messages: put off until both are known."""
        if self.falls_back() is not None or (self._wants_weights and not is_plain(edge_index)):
            return MessagePassing.edge_updater(self, edge_index, size=size, **kwargs)
        return Pending(kwargs)

    def propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """Attention along the edges: (N, H, D)."""
        pending = kwargs.get("alpha")
        if self.falls_back() is not None or (isinstance(pending, Tensor) and "x" in kwargs):
            return MessagePassing.propagate(self, edge_index, size=size, **kwargs)
        self._check_input(edge_index, size)
        arguments = {**kwargs, **pending.arguments} if isinstance(pending, Pending) else kwargs
        edge_attr = arguments.get("edge_attr")
        edge_attr = values_of(edge_index) if edge_attr is None else edge_attr
        return self.attend(self.attention(arguments, edge_attr), edge_index, size)

    @torch.compiler.disable
    def attend(self, asked: Attention, edge_index: Any, size: Any) -> Tensor:
        """Along these edges: (…, N, H, Dv)."""
        num_sources, num_targets = sizes(asked, size)
        edges = Edges.between(columns_of(edge_index, self.flow), num_sources, num_targets)
        q, k, v = (x if x.ndim == 4 else x[None] for x in asked[:3])
        q, k, v = (x.transpose(1, 2) for x in (q, edges.of_sources(k), edges.of_sources(v)))
        options = dict(asked.options)
        if asked.edge_scores is not None:
            options["bias"] = EdgeBias.sorted(edges.sorted(asked.edge_scores).T)
        if asked.edge_attr is not None:
            features = edges.sorted(asked.edge_attr)
            options["edge_features"] = EdgeFeatures.sorted(features, to_key=asked.to_key, to_value=asked.to_value)
        if not self._wants_weights:
            out = cast(Tensor, attend(q, k, v, edges.graph, **options))
        else:
            out, weights = cast("tuple[Tensor, Tensor]", attend(q, k, v, edges.graph, return_weights=True, **options))
            weights = edges.as_given(weights.transpose(1, 2))
            self._weights = weights if asked.q.ndim == 4 else weights[0]
        out = out.transpose(1, 2).contiguous()
        return out if asked.q.ndim == 4 else out[0]

    def __prepare_scriptable__(self) -> Any:
        """For TorchScript, PyG's own layer with the same parameters."""
        plain = copy.copy(self)
        plain.__class__, plain.inspector = self.of, copy.copy(self.inspector)
        plain.inspector._cls = self.of  # whose source PyG reads
        plain._set_jittable_templates(raise_on_error=True)
        return plain


def is_plain(edge_index: Any) -> bool:
    """Whether it is a tensor of node numbers, rather than a sparse matrix."""
    return isinstance(edge_index, Tensor) and edge_index.layout == torch.strided


def sizes(asked: Attention, size: Any) -> tuple[int, int]:
    """How many sources and targets there are; `size` is (num_sources, num_targets), or None."""
    found = asked.k.shape[-3], asked.q.shape[-3]
    for name, said, is_so in zip(("source", "target"), size or (None, None), found, strict=True):
        if said is not None and said != is_so:
            raise ValueError(f"size must be (num_sources, num_targets) (got {tuple(size)} for {is_so} {name} nodes in x)")
    return found
