"""Attention in the place of the messages of a PyG layer: a mixin, and what each layer has to say for it."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch_geometric import EdgeIndex
from torch_geometric.nn import Linear, MessagePassing

from attngraph.pyg.along import Attention, attend_along, weights_along
from attngraph.pyg.checks import check, tell_more
from attngraph.pyg.edges import columns_of, values_of

HOOKS = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")
LINEAR = (Linear.forward, torch.nn.Linear.forward)
METHODS = ("message", "aggregate", "update", "edge_update", "message_and_aggregate")


class Pending:
    """In place of weights, which PyG makes before it sends messages by them: made if somebody asks for them."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments  # of `edge_updater`
        self.asked: Attention | None = None
        self.columns: Tensor | None = None

    def weights(self) -> Tensor:
        """Those of the attention that took the place of the messages, (E, H) as the edges were given."""
        assert self.asked is not None
        assert self.columns is not None
        return weights_along(self.asked, self.columns)


class Attending(MessagePassing):
    """A mixin before the layer of PyG that it makes attend: ``class GATConv(Attending, torch_geometric.nn.GATConv)``.

    The layer projects its features and makes its output as PyG wrote it; between the two, where PyG sends messages
    along the edges, it attends. Where something asks for the messages, they are sent: see `falls_back`.
    """

    of: ClassVar[Any]
    """PyG's own layer."""
    names: ClassVar[tuple[str, ...]]
    """The arguments of its `forward`."""
    needs_edge_dim: ClassVar[bool] = True
    """Whether edge features are an error in a layer that was made for none; else they are left out, as in PyG."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # PyG writes a `propagate` for each class that has none of its own, and keeps the old one by these names.
        for name in ("propagate", "edge_updater"):
            own = cls.__dict__.get(name, Attending.__dict__[name])
            for place in (name, f"_orig_{name}", f"_jinja_{name}"):
                setattr(cls, place, own)
        if cls.__bases__[0] is Attending:
            cls.of = cls.__bases__[1]
            cls.names = tuple(inspect.signature(cls.of.forward).parameters)[1:]
            cls.forward = _forward_of(cls.of)

    # ---------------------------------------------------------------------------------------- what each layer says

    def attention(self, arguments: dict[str, Any], edge_attr: Tensor | None, num_targets: int | None) -> Attention:
        """The attention that stands for the messages which PyG would make of these arguments of `propagate`.

        edge_attr (E, F); num_targets where the call says it.
        """
        raise NotImplementedError

    def has_none(self) -> str | None:
        """Why a layer made like this has no attention that kernels know; None if it has."""
        return None

    # ------------------------------------------------------------------------------------------ what happens to all

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PyG's."""
        call = dict(zip(self.names, args, strict=False))
        if len(args) > len(self.names) or call.keys() & kwargs.keys():
            return self.of.forward(self, *args, **kwargs)  # which tells of the error
        call |= kwargs
        check(self, call)
        if call.get("return_attention_weights") is False:  # None in PyG: any bool there asks for weights
            call["return_attention_weights"] = None
        if torch.compiler.is_compiling():
            return self._with_weights(self.of.forward(self, **call))
        if self._why_pyg(call) is not None:
            plain = self._as_pyg()
            before = dict(plain.__dict__)
            result = plain.forward(**call)
            made = {name: x for name, x in plain.__dict__.items() if x is not before.get(name)}
            self.__dict__.update(made)  # what PyG's layer keeps of a call, such as SuperGATConv for its loss
            return result
        try:
            return self._with_weights(self.of.forward(self, **call))
        except (RuntimeError, IndexError, TypeError, AttributeError, ValueError):
            tell_more(self, call)  # raises, if it can tell more
            raise

    def _with_weights(self, result: Any) -> Any:
        """With weights in place of those that are pending."""
        if isinstance(result, tuple) and isinstance(result[1], tuple) and isinstance(result[1][1], Pending):
            return result[0], (result[1][0], result[1][1].weights())
        return result

    def falls_back(self) -> str | None:
        """Why messages are sent as in PyG, which holds a vector for each; None where attention takes their place."""
        if self.explain:
            return "an explainer looks at its messages"
        if torch._C._get_tracing_state() is not None:
            return "it is traced"
        if any(getattr(self, f"_{name}_forward{kind}_hooks") for name in HOOKS for kind in ("", "_pre")):
            return "hooks look at its messages"
        if self.decomposed_layers > 1:
            return f"its messages are made in {self.decomposed_layers} parts"
        if self.aggr not in ("add", "sum"):
            return f"it takes the {self.aggr} of what comes, which is no attention"
        if getattr(self, "dropout", 0) == 1 and self.training:
            return "it drops all weights"
        if (reason := why_no_matrix(getattr(self, "lin_edge", None))) is not None:
            return reason
        if (name := self._own_method()) is not None:
            return f"it has a {name}() of its own"
        return self.has_none()

    def _own_method(self) -> str | None:
        """A method by which a subclass, or this layer alone, does what PyG's layer does otherwise; None without."""
        for name in METHODS:
            if name in self.__dict__ or getattr(type(self), name) is not getattr(self.of, name):
                return name
        return None

    def _why_pyg(self, call: dict[str, Any]) -> str | None:
        """Why PyG's own layer serves a call: if messages are asked for, or weights in a sparse matrix."""
        if self._own_method() is not None:
            return None
        if call.get("return_attention_weights") and not is_plain(call.get("edge_index")):
            return "weights are asked for in a sparse matrix: give edge_index as a tensor (2, num_edges)"
        if self.flow == "target_to_source" and isinstance(call.get("x"), tuple | list):
            return 'x is a pair, and flow="target_to_source": give edge_index.flip(0) to flow="source_to_target"'
        return self.falls_back()

    def edge_updater(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """In layers that make weights before messages: put off until both are known."""
        if self.falls_back() is not None:
            return MessagePassing.edge_updater(self, edge_index, size=size, **self._for_messages(kwargs))
        return Pending(kwargs)

    def propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """Attention along the edges: (N, H, D)."""
        if self.falls_back() is not None:
            return MessagePassing.propagate(self, edge_index, size=size, **self._for_messages(kwargs))
        pending = kwargs.get("alpha", Pending({}))
        told = self._check_input(edge_index, size)
        size = tuple(told) if isinstance(edge_index, EdgeIndex) else size  # which brings its own
        if size is not None and len(size) != 2:
            raise ValueError(f"size must be (num_sources, num_targets) (got {size})")
        arguments = {**kwargs, **pending.arguments}
        size = size if is_plain(edge_index) else (edge_index.size(1), edge_index.size(0))
        size = size if self.flow == "source_to_target" else None
        edge_attr = arguments.get("edge_attr")
        edge_attr = values_of(edge_index) if edge_attr is None else edge_attr
        edge_attr = edge_attr[:, None] if edge_attr is not None and edge_attr.ndim == 1 else edge_attr
        asked = self.attention(arguments, edge_attr, None if size is None else size[1])
        for name, side, said in zip(("source", "target"), (asked.k, asked.q), size or (None, None), strict=True):
            if said is not None and said != side.shape[-3]:
                raise ValueError(
                    f"size must be (num_sources, num_targets) (got {size} for {side.shape[-3]} {name}s in x)"
                )
        pending.asked, pending.columns = asked, columns_of(edge_index, self.flow)
        return self.attend(pending)

    def _for_messages(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A pair is of sources and targets, whatever the flow; PyG's slow path takes it by rows of edge_index."""
        if self.flow == "source_to_target":
            return arguments
        return {name: x[::-1] if isinstance(x, tuple) else x for name, x in arguments.items()}

    def attend(self, pending: Pending) -> Tensor:
        """Along the edges that are known now: (…, N, H, Dv)."""
        assert pending.asked is not None
        assert pending.columns is not None
        return attend_along(pending.asked, pending.columns)[0]

    def _as_pyg(self) -> Any:
        """PyG's own layer with the same parameters and hooks."""
        plain = copy.copy(self)
        plain.__class__, plain.inspector = self.of, copy.copy(self.inspector)
        plain.inspector._cls = self.of  # whose source PyG reads
        for name in ("propagate", "edge_updater"):
            plain.__dict__.pop(name, None)  # else PyG takes them for methods that its class has not written yet
        plain._set_jittable_templates()
        if self.explain or self.decomposed_layers > 1:  # as PyG does when it is told so
            plain.propagate = MessagePassing.propagate.__get__(plain)
        return plain

    __prepare_scriptable__ = _as_pyg  # for TorchScript


def _forward_of(layer: Any) -> Any:
    """A `forward` with the arguments and the text of a layer's own."""

    @functools.wraps(layer.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Attending.forward(self, *args, **kwargs)

    return forward


def why_no_matrix(linear: Any) -> str | None:
    """Why what a layer makes of edge features is not all in a matrix; None if it is, or there is nothing."""
    if linear is None:
        return None
    if getattr(linear, "bias", None) is not None or getattr(type(linear), "forward", None) not in LINEAR:
        return f"its lin_edge, {type(linear).__name__}, is more than a matrix"
    if not is_lazy(linear) and (is_hooked(linear) or "forward" in vars(linear)):
        return "hooks look at what it makes of edge features"
    return None


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether somebody looks at what comes into a module, or out of it."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def is_lazy(linear: Any) -> bool:
    """Whether a linear map of PyG waits for its first input to know its size."""
    return isinstance(linear.weight, UninitializedParameter)


def is_plain(edge_index: Any) -> bool:
    """Whether it is a tensor of node numbers, rather than a sparse matrix."""
    return isinstance(edge_index, Tensor) and edge_index.layout == torch.strided
