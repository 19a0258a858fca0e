"""`attend`, the one operation: it validates its inputs, finds the plan of the call, and runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from numbers import Real
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, amp
from torch.autograd import forward_ad

from attngraph.arguments import checked, shown
from attngraph.bias import Bias, DenseBias, kind_of, placed
from attngraph.graph.base import Graph
from attngraph.graph.text import tensors_are_fake
from attngraph.kernels.scoring import NORMALIZERS, SCORES
from attngraph.planning.backends.base import Results
from attngraph.planning.call import Call, Request, Transform, name_of
from attngraph.planning.edge_set import closed_form
from attngraph.planning.execution import run, run_traced
from attngraph.planning.planner import Plan, fitted, planned, traced

Score = str | Callable[[Tensor, Tensor], Tensor]
Normalizer = str | Callable[[Tensor], Tensor]


class _Options(TypedDict, total=False):
    """The options of `attend` on which the kind of its result does not depend."""

    bias: Bias | Tensor | None
    attention_mask: Tensor | None
    scale: float | None
    dropout_p: float
    score: Score
    normalize: Normalizer
    backend: str


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, graph: Graph | Plan, **options: Unpack[_Options]) -> Tensor: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, graph: Graph | Plan, *,
    return_lse: Literal[True], return_weights: bool = ..., **options: Unpack[_Options],
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, graph: Graph | Plan, *,
    return_lse: bool = ..., return_weights: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, ...]: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, graph: Graph | Plan, *,
    return_lse: bool = ..., return_weights: bool = ..., **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Plan,
    *,
    bias: Bias | Tensor | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    score: Score = "dot",
    normalize: Normalizer = "softmax",
    backend: str = "auto",
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention along the edges of a graph: each query node collects from the key nodes that it hears.

    out_i = Σ_j w_ij v_j over the edges j → i, with w_i = softmax_j(scale · q_i·k_j + bias_ij). A query that hears
    nobody gets exactly 0, and a gradient of 0.

    Args:
        q: queries (B, H, N, D), or (H, N, D).
        k: keys (B, Hkv, M, D), where H is a multiple of Hkv: consecutive query heads share a key head.
        v: values (B, Hkv, M, Dv).
        graph: who hears whom; its size, where it has one, is (N, M). Or a `plan` of a graph for such tensors.
        bias: added to the scores: `Alibi`, `RelativeBias`, `EdgeBias`, or a tensor that broadcasts to (B, H, N, M).
        attention_mask: bool (B, M): False for keys that are padding, which no query of their batch entry hears.
        scale: factor of the scores before the bias; by default 1/√D for the score "dot", 1 for others.
        dropout_p: the probability with which a weight is dropped, always applied: pass 0 when not training.
        score: "dot", "additive" (Σ tanh(q + k)), `Additive(weight)`, or a function of (q_i, k_j), each (B, H, E, D),
            to (B, H, E).
        normalize: "softmax", "sigmoid", "none", or an elementwise function of the scores.
        backend: "auto", "reference", "edges", "dense", "tiles" or "rows". What a named one can't do is an error.
        return_lse: also return log Σ_j exp(score_ij) (B, H, N), -inf where a query hears nobody. Differentiable.
        return_weights: also return w before dropout, (B, H, E) in `edge_index` order.

    Under `torch.autocast`, q, k and v are taken in its dtype.

    Returns:
        out (B, H, N, Dv), or a tuple (out, lse), (out, weights) or (out, lse, weights). Without the batch dimension
        where q has none.

    >>> q, k, v = torch.randn(3, 2, 4, 10, 8)
    >>> attend(q, k, v, Causal() & Window(3, 0)).shape
    torch.Size([2, 4, 10, 8])

    Raises:
        ValueError: sizes, devices or dtypes that do not fit, or a backend that can't do what is asked.
        TypeError: an argument of the wrong kind.
    """
    if isinstance(q, Tensor) and _autocasts(q.device.type):
        q, k, v = _in_autocast(q, k, v)
    unbatched = isinstance(q, Tensor) and q.ndim == 3
    if unbatched:
        q, k, v = (side[None] if isinstance(side, Tensor) else side for side in (q, k, v))
        attention_mask = attention_mask[None] if isinstance(attention_mask, Tensor) else attention_mask
    if isinstance(bias, Tensor):
        bias = DenseBias(bias)
    _check(q, k, v, graph, bias, attention_mask, scale, score, normalize, dropout_p)
    if not (type(backend) is str and type(return_lse) is bool and type(return_weights) is bool):
        backend, return_lse, return_weights = _options(backend, return_lse, return_weights)
    if return_lse and normalize != "softmax":
        raise ValueError(f"return_lse needs normalize='softmax' (got {normalize!r}): other weights have no common sum")
    factor = scale if scale is not None else max(q.shape[3], 1) ** -0.5 if score == "dot" else 1.0
    if score == "dot" and factor < torch.finfo(torch.float32).tiny:
        q, factor = _signed(q, factor)
    if bias is not None:
        bias = placed(bias, graph.graph if isinstance(graph, Plan) else graph, q, k)
    request = Request(factor, score, normalize, dropout_p, return_lse, return_weights, attention_mask)
    results = _run(q, k, v, graph, bias, _call(q, k, v, bias, request), request, backend)
    if not (return_lse or return_weights):
        return results[0][0] if unbatched else results[0]
    asked = (True, return_lse, return_weights)
    found = [part for part, wanted in zip(results, asked, strict=True) if wanted and part is not None]
    found = [part[0] for part in found] if unbatched else found
    return tuple(found)


def _run(
    q: Tensor, k: Tensor, v: Tensor, graph: Graph | Plan, bias: Bias | None, call: Call, request: Request, name: str
) -> Results:
    """By the plan of the call; in a program that is being compiled, as far as it can be known there."""
    if call.compiled:
        backend = traced(graph, call, name)
        if backend is None:
            return run_traced(graph, name, q, k, v, bias, request)
        assert isinstance(graph, Graph)
        layout = backend.traced_layout(graph, call.num_queries, call.num_keys, call.device)
        return backend.attend(q, k, v, layout, bias, request)
    made = fitted(graph, call, name) if isinstance(graph, Plan) else planned(graph, call, name)
    return run(made, q, k, v, bias, call, request)


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request) -> Call:
    """What decides how the call may run."""
    _, heads, n, dim = q.shape
    _, kv_heads, m, value_dim = v.shape
    return Call(
        n, m, heads, kv_heads, dim, value_dim, q.dtype, q.device, kind_of(bias),
        name_of(request.score), name_of(request.normalize), request.attention_mask is not None, request.dropout_p > 0,
        request.return_weights, _transform(q, k, v), _is_traced(q), return_lse=request.return_lse,
    )  # fmt: skip


def _signed(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores by a scale above 0: PyTorch's kernels mask some scores before they are scaled (torch 2.14)."""
    if scale < -torch.finfo(torch.float32).tiny:
        return -q, -scale
    return q * 0, 1.0


def _is_traced(q: Tensor) -> bool:
    """Whether the call is being compiled, or asked for shapes alone: no kernel can read its tensors."""
    return torch.compiler.is_compiling() or q.device.type == "meta" or tensors_are_fake()


def _in_autocast(*sides: Tensor) -> list[Tensor]:
    """In autocast's dtype, as PyTorch's own attention takes them, whatever the backend."""
    dtype = torch.get_autocast_dtype(sides[0].device.type)
    return [side.to(dtype) if _is_cast(side) else side for side in sides]


def _is_cast(side: object) -> bool:
    """Whether autocast changes the dtype of an argument."""
    return isinstance(side, Tensor) and side.is_floating_point() and side.dtype != torch.float64


def _autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device, some of which have none; a compiled program is not for those."""
    return (torch.compiler.is_compiling() or amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def _transform(*sides: Tensor) -> Transform | None:
    """What differentiates or maps the call from outside, if backward passes of our own are in its way."""
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(side).tangent is not None for side in sides):
        return "forward-mode"
    return "torch.func" if torch._C._are_functorch_transforms_active() else None


# -------------------------------------------------------------------------------------------------- validation


def _check(q, k, v, graph, bias, attention_mask, scale, score, normalize, dropout_p) -> None:
    """Raise unless the arguments of `attend` fit each other."""
    dtype = device = None
    for name, side in (("q", q), ("k", k), ("v", v)):
        if not isinstance(side, Tensor):
            raise TypeError(f"{name} must be a tensor (got {type(side).__name__})")
        if side.ndim != 4:
            raise ValueError(
                f"q, k and v must all have shape (B, heads, nodes, D), or all (heads, nodes, D) "
                f"(got {side.ndim} dimensions for {name})"
            )
        if not side.is_floating_point():
            raise TypeError(f"q, k and v must hold floating-point numbers (got a {name} of {side.dtype})")
        if dtype is None:
            dtype, device = side.dtype, side.device
        elif side.dtype != dtype or side.device != device:
            raise ValueError(
                f"q, k and v must have one dtype and one device (got q {dtype} on {device}, "
                f"{name} {side.dtype} on {side.device})"
            )
    if not isinstance(graph, Graph | Plan):
        hint = "a mask becomes one by from_dense(mask)"
        if isinstance(graph, type) and issubclass(graph, Graph):
            hint = f"did you mean {graph.__name__}()?"
        elif isinstance(getattr(graph, "graph", None), Graph):
            hint = "did you mean its .graph?"
        raise TypeError(f"graph must be a Graph (got {type(graph).__name__}); {hint}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number (got a tensor); multiply q by the tensor instead, and scale=1")
    if not (scale is None or isinstance(scale, Real | torch.SymFloat | torch.SymInt)):
        raise TypeError(f"scale must be a number (got {shown(scale)})")
    if not (bias is None or isinstance(bias, Bias)):
        raise TypeError(f"bias must be a tensor or Alibi, RelativeBias or EdgeBias (got {type(bias).__name__})")
    if isinstance(bias, DenseBias) and not bias.values.is_floating_point():
        raise TypeError(f"a bias is added to the scores (got {bias.values.dtype}); a mask is a graph, from_dense(mask)")
    for field in () if bias is None else fields(bias):
        values = getattr(bias, field.name)
        if isinstance(values, Tensor) and (values.device != q.device or not values.is_floating_point()):
            raise ValueError(
                f"a bias must hold floating-point numbers on q's device, {q.device} "
                f"(got {values.dtype} on {values.device})"
            )
    if isinstance(scale, Real) and not abs(float(scale)) <= torch.finfo(torch.promote_types(dtype, torch.float32)).max:
        raise ValueError(f"scale must be finite in the precision of the scores (got {scale!r} for {dtype})")
    (B, H, N, D), (Bk, Hkv, M, Dk), (Bv, Hv, Mv, _) = q.shape, k.shape, v.shape
    if not B == Bk == Bv:
        raise ValueError(f"q, k and v must have the same batch size (got q {B}, k {Bk}, v {Bv})")
    if Dk != D:
        raise ValueError(f"q and k must have the same head dimension (got {D} and {Dk})")
    if Hv != Hkv or Mv != M:
        raise ValueError(f"k and v must have the same heads and nodes (got {tuple(k.shape)} and {tuple(v.shape)})")
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"the number of query heads must be a multiple of the key heads (got {H} and {Hkv})")
    if attention_mask is not None:
        _check_attention_mask(attention_mask, k)
    if isinstance(graph, Graph):
        _check_size(graph, N, M, H)
    _check_option("score", score, SCORES)
    _check_option("normalize", normalize, NORMALIZER_NAMES)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a number (got {shown(dropout_p)})")
    if not 0 <= float(dropout_p) < 1:
        raise ValueError(f"dropout_p must be a probability below 1 (got {dropout_p})")


def _check_size(graph: Graph, N: int, M: int, H: int) -> None:
    """Raise unless a graph fits so many queries, keys and heads; a compiled program counts its nodes when it runs."""
    later = torch.compiler.is_compiling() and closed_form(graph) is None  # so that it serves graphs of every size
    own_n, own_m = (None, None) if later else graph.size
    if own_n is not None and own_n != N:
        raise ValueError(f"graph has {own_n} query nodes but q has {N}; build the graph for {N} of them")
    if own_m is not None and own_m != M:
        raise ValueError(f"graph has {own_m} key nodes but k has {M}; build the graph for {M} of them")
    if graph.heads is not None and graph.heads != H:
        raise ValueError(f"graph has {graph.heads} heads but q has {H}; give PerHead one graph for each head")


@checked
def _options(backend: str, return_lse: bool, return_weights: bool) -> tuple[str, bool, bool]:
    """The same, if they are what they are called."""
    return backend, return_lse, return_weights


def _check_attention_mask(mask: object, k: Tensor) -> None:
    """Raise unless it is a bool for each key of each batch entry, on the device of the keys."""
    shape = k.shape[0], k.shape[2]
    wanted = f"attention_mask must be a tensor of bool of shape {shape} on {k.device}: True for real keys"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{wanted} (got a {type(mask).__name__})")
    if mask.dtype != torch.bool:
        raise TypeError(f"{wanted} (got {mask.dtype}); of integers 0 and 1, mask.bool()")
    if mask.shape != shape or mask.device != k.device:
        raise ValueError(f"{wanted} (got shape {tuple(mask.shape)} on {mask.device})")


NORMALIZER_NAMES = ("softmax", *NORMALIZERS)


def _check_option(name: str, given: object, names: Collection[str]) -> None:
    """Raise unless a score or normaliser is known by name, or a function."""
    if given not in names if isinstance(given, str) else not callable(given):
        raise ValueError(f"{name} must be a function or one of {', '.join(names)} (got {shown(given)})")
