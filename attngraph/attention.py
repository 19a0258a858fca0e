"""`attend`, the one operation: it validates its inputs, finds the plan of the call, and runs it."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from numbers import Real
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import Tensor, amp
from torch.autograd import forward_ad

from attngraph import cache
from attngraph.arguments import checked, shown
from attngraph.bias import Bias, DenseBias, kind_of, placed
from attngraph.edge_features import EdgeFeatures, check_features, edge_terms
from attngraph.graph.algebra import Empty
from attngraph.graph.base import Graph
from attngraph.graph.dynamic import Folded, may_fold, settled
from attngraph.graph.text import tensors_are_fake
from attngraph.kernels.contract import Dropout
from attngraph.kernels.scoring import (
    NORMALIZER_NAMES,
    PAIR_FUNCTIONS,
    Additive,
    Elementwise,
    LeakyReLU,
    Score,
    SoftCap,
    Temperature,
    parts_of,
    require_function,
    score_name,
)
from attngraph.packing import entries_of, entry_size, packed, packed_bias, takes_batch, unpacked
from attngraph.planning.backends import chooser_for
from attngraph.planning.backends.base import Results
from attngraph.planning.call import Call, Request, Transform, normalizer_name
from attngraph.planning.edge_set import closed_form
from attngraph.planning.execution import run, run_traced
from attngraph.planning.planner import Plan, planned, planned_once, traced, without_plan
from attngraph.planning.steps import Reduction, at_queries, edge_weights, in_steps, reduced_weights

Normalizer = str | Elementwise


class _Options(TypedDict, total=False):
    """The options of `attend` on which the kind of its result does not depend."""

    bias: Bias | Tensor | None
    attention_mask: Tensor | None
    scale: float | None
    dropout_p: float
    generator: torch.Generator | None
    score: Score
    normalize: Normalizer
    sinks: Tensor | None
    reduce: Reduction | None
    edge_features: EdgeFeatures | None
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
    generator: torch.Generator | None = None,
    score: Score = "dot",
    normalize: Normalizer = "softmax",
    sinks: Tensor | None = None,
    edge_features: EdgeFeatures | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_weights: bool = False,
    reduce: Reduction | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention along the edges of a graph: each query node collects from the key nodes that it hears.

    out_i = Σ_j w_ij v_j over the edges j → i, with w_i = softmax_j(scale · q_i·k_j + bias_ij). A query that hears
    nobody gets exactly 0, and a gradient of 0.

    Args:
        q: queries (B, H, N, D), or (H, N, D).
        k: keys (B, Hkv, M, D), where H is a multiple of Hkv: consecutive query heads share a key head.
        v: values (B, Hkv, M, Dv).
        graph: who hears whom; its size, where it has one, is (N, M). Or a `plan` of a graph for such tensors; or
            `Batched`, a graph for each entry of the batch: weights are then (1, H, E), of its own `edge_index`.
        bias: added to the scores: `Alibi`, `RelativeBias`, `EdgeBias`, or a tensor that broadcasts to (B, H, N, M).
        attention_mask: bool (B, M): False for keys that are padding, which no query of their batch entry hears; or
            integers (B,), how many keys of each entry come before its padding. Where each entry has a graph of its own,
            `Batched` says so, and its padding costs nothing at all.
        scale: factor of the scores before the bias; by default 1/√D for the score "dot", 1 for others.
        dropout_p: the probability with which a weight is dropped, always applied: pass 0 when not training. Which are
            dropped is a function of (seed, batch, head, query, key), the same on every backend.
        generator: what the seed of the dropout is drawn from; by default torch's own, so that `torch.manual_seed`
            repeats a run.
        score: "dot", "additive" (Σ tanh(q + k)), `Additive(weight)`, or a function of (q_i, k_j), each (B, H, E, D),
            to (B, H, E), which runs over a part of the edges at a time; and any of these with an elementwise function
            after scale and bias: `SoftCap(50.0, of="dot")`, `LeakyReLU`, `Temperature`.
        normalize: "softmax", "sigmoid", "none", "relu", "squared_relu", or an elementwise function of the scores
            (B, H, E), which may have numbers for each head, (H, 1).
        sinks: a logit for each head (H,), which takes weight and gives no value: w_i = softmax_j over the scores and
            it (gpt-oss, Xiao et al. 2024). Differentiable. `return_lse` includes it.
        edge_features: `EdgeFeatures`, which are added to the key and the value of each edge by linear maps: k_ij = k_j
            + K e_ij, v_ij = v_j + V e_ij. Differentiable; no vectors of all edges and heads are made.
        backend: "auto", "reference", "edges", "dense", "tiles", "rows" or "steps". What it can't do is an error.
        return_lse: also return log Σ_j exp(score_ij) (B, H, N), -inf where a query hears nobody. Differentiable.
        return_weights: also return w before dropout, (B, H, E) in `edge_index` order.
        reduce: with `return_weights`, what is to be returned in their place, made of few heads at a time: "mean"
            over the heads (B, E), "entropy" -Σ_j w_ij log w_ij of each query (B, H, N), or "received", Σ_i w_ij, what
            each key receives (B, H, M).

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
    kind = None
    plain = bias is attention_mask is generator is sinks is reduce is edge_features is None
    if plain and return_lse is return_weights is False:
        kind = _kind(q, k, v, graph, scale, dropout_p, score, normalize, backend)
        if kind is not None and (known := cache.CALLS.get(kind)) is not None:
            call, request = known
            return _run(q, k, v, None, request, graph, backend, call)[0]
    if isinstance(q, Tensor) and _autocasts(q.device.type):
        q, k, v = _in_autocast(q, k, v)
    unbatched = isinstance(q, Tensor) and q.ndim == 3
    if unbatched:
        q, k, v = (side[None] if isinstance(side, Tensor) else side for side in (q, k, v))
        attention_mask = attention_mask[None] if isinstance(attention_mask, Tensor) else attention_mask
    attention_mask = _of_lengths(attention_mask, k)
    added = DenseBias(bias) if isinstance(bias, Tensor) else bias
    if isinstance(graph, Graph) and graph._unresolved and isinstance(q, Tensor) and not len(q):
        graph = Empty()  # nobody is there to choose
    if isinstance(graph, Graph) and graph._unresolved:
        of_all_heads = bias is edge_features is None and not return_weights and _is_same_for_heads(score, normalize)
        of_all_heads = of_all_heads and (scale is None or (isinstance(scale, Real) and scale > 0))  # else q is turned
        sizes = [side.shape[2] for side in (q, k) if isinstance(side, Tensor) and side.ndim == 4]
        if len(sizes) == 2 and backend == "auto" and not torch.compiler.is_compiling():
            graph = settled(graph, *sizes)
        if graph._unresolved and not (of_all_heads and len(sizes) == 2 and may_fold(graph, *sizes)):
            graph = graph.resolve(q, k, attention_mask)
    batch = q.shape[0] if takes_batch(graph, q) else None
    if batch is not None:
        q, k, v, attention_mask, added = _packed(q, k, v, attention_mask, added, graph)
    _check(q, k, v, graph, added, attention_mask, scale, score, normalize, dropout_p, generator, sinks)
    if edge_features is not None:
        check_features(edge_features, q, k, v)
    if not (type(backend) is str and type(return_lse) is bool and type(return_weights) is bool):
        backend, return_lse, return_weights = _options(backend, return_lse, return_weights)
    _check_returned(graph, normalize, sinks, return_lse, return_weights, reduce)
    is_dot = parts_of(score).pair == "dot"
    factor = scale if scale is not None else max(q.shape[3], 1) ** -0.5 if is_dot else 1.0
    is_turned = is_dot and factor < torch.finfo(torch.float32).tiny
    if is_turned:
        q, factor = _signed(q, factor)
    if added is not None:
        added = graph.placed(added, q, k) if isinstance(graph, Plan) else placed(added, graph, *_sizes(q, k), q)
    terms = None
    if edge_features is not None:
        is_plan = isinstance(graph, Plan)
        terms = graph.edge_terms(edge_features, q, k) if is_plan else edge_terms(edge_features, graph, *_sizes(q, k), q)
    dropout = None if dropout_p == 0 else Dropout(float(dropout_p), _seed(q, generator))
    needs_lse = return_lse or sinks is not None or (return_weights and normalize == "softmax")
    makes_weights = return_weights and reduce is None
    request = Request(factor, score, normalize, dropout, needs_lse, makes_weights, attention_mask, terms)
    call = _call(q, k, v, added, request)
    if kind is not None and dropout is None and batch is None and not (unbatched or is_turned):
        cache.CALLS.keep(kind, (call, request))
    out, lse, weights = _run(q, k, v, added, request, graph, backend, call)
    weights = weights if request.return_weights else None
    if sinks is not None and lse is not None:
        lse, share = _with_sinks(lse, sinks)
        out = (out * share[..., None]).to(out.dtype)
        weights = weights if weights is None else (weights * at_queries(share, k, graph)).to(weights.dtype)
    if return_weights and weights is None:
        ran = graph if call.compiled else _planned(graph, call, backend)
        if reduce is None:
            weights = edge_weights(q, k, lse, ran, added, request)
        else:
            weights = reduced_weights(reduce, q, k, lse, ran, added, request)
    if batch is not None:
        out, lse = unpacked(out, batch), None if lse is None else unpacked(lse, batch)
        weights = unpacked(weights, batch) if weights is not None and reduce in ("entropy", "received") else weights
    asked = ((out, True), (lse, return_lse), (weights, return_weights))
    results = [part.squeeze(0) if unbatched else part for part, wanted in asked if wanted and part is not None]
    return tuple(results) if return_lse or return_weights else results[0]


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int]:
    """How many queries and keys."""
    return q.shape[2], k.shape[2]


def _packed(q, k, v, attention_mask, bias, graph: Any) -> tuple:
    """The arguments of a call whose entries have graphs of their own, as those of one graph."""
    n, m = entry_size(graph)
    for name, side, size in (("q", q, n), ("k", k, m), ("v", v, m)):
        if isinstance(side, Tensor) and side.ndim == 4 and side.shape[2] != size:
            raise ValueError(
                f"{name} must have the {size} nodes of the largest graph in the batch (got {side.shape[2]})"
            )
    q, k, v = (packed(side) if isinstance(side, Tensor) and side.ndim == 4 else side for side in (q, k, v))
    if isinstance(attention_mask, Tensor):
        attention_mask = attention_mask.flatten()[None]
    return q, k, v, attention_mask, packed_bias(bias, graph, q)


def _run(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request, graph: Graph | Plan, name: str, call: Call
) -> Results:
    """By the plan of the call; in a program that is being compiled, as far as it can be known there."""
    if isinstance(graph, Graph) and graph._unresolved and not call.compiled:
        return _run_chosen(q, k, v, request, graph, name)
    if call.compiled:
        backend = traced(graph, call, name)
        if backend is None:
            return run_traced(graph, name, q, k, v, bias, request)
        assert isinstance(graph, Graph)
        if backend.name == "steps":
            attention = partial(_run, graph=graph, name="auto", call=call.after_scores)
            return in_steps(q, k, v, graph, bias, request, attention)
        layout = backend.traced_layout(graph, call.num_queries, call.num_keys, call.device)
        return backend.attend(q, k, v, layout, bias, request)
    if (backend := without_plan(graph, call, name)) is not None:
        assert isinstance(graph, Graph)
        layout = backend.traced_layout(graph, call.num_queries, call.num_keys, call.device)
        return backend.attend(q, k, v, layout, bias, request)
    made = _planned(graph, call, name)
    if made.in_steps:
        rest = planned(made.graph, call.after_scores, "auto")
        attention = partial(run, plan=rest, call=call.after_scores)
        return in_steps(q, k, v, rest, bias, request, attention)
    return run(q, k, v, bias, request, made, call)


def _run_chosen(q: Tensor, k: Tensor, v: Tensor, request: Request, graph: Graph, name: str) -> Results:
    """By the graph that queries and keys choose, of all heads and entries at once."""
    folded = Folded.of(graph, q, k, request.attention_mask, chooser_for(q))
    sides = folded.queries(q), folded.keys(k), folded.keys(v)
    request = request._replace(attention_mask=folded.mask(request.attention_mask, k))
    call = _call(*sides, None, request)
    out, lse, _ = _run(*sides, None, request, planned_once(folded.graph, call, name), "auto", call)
    return folded.of_queries(out, q.shape[2]), None if lse is None else folded.of_queries(lse, q.shape[2]), None


def _kind(q, k, v, graph: Any, *options: object) -> tuple | None:
    """All that decides whether a call with nothing but these options can run, and how, as a key; else None.

    So that its arguments are checked when the first of its kind comes, and not again.
    """
    if torch.compiler.is_compiling() or not type(q) is type(k) is type(v) is Tensor:
        return None
    if isinstance(graph, Graph):
        if graph._unresolved:
            return None
        of_graph = graph.size, graph.heads, entries_of(graph)
    else:
        of_graph = type(graph)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active() or tensors_are_fake():
        return None
    types = tuple(map(type, options))
    if torch._C._is_any_autocast_enabled() or not PLAIN_TYPES.issuperset(types):
        return None
    of_tensors = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    return *of_tensors, of_graph, options, types


PLAIN_TYPES = {type(None), bool, int, float, str}  # options that are no objects


def _is_same_for_heads(score: Score, normalize: Normalizer) -> bool:
    """Whether scores become weights alike in all heads: numbers for each head need to know which is which."""
    if not isinstance(score, str | SoftCap | LeakyReLU) or not isinstance(normalize, str):
        return False
    parts = parts_of(score)
    return isinstance(parts.pair, str) and all(isinstance(each, SoftCap | LeakyReLU) for each in parts.transforms)


def _planned(graph: Graph | Plan, call: Call, name: str) -> Plan:
    """The plan of a call that is not being compiled."""
    return graph.fitted(call, name) if isinstance(graph, Plan) else planned(graph, call, name)


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request) -> Call:
    """What decides how the call may run."""
    _, heads, n, dim = q.shape
    _, kv_heads, m, value_dim = v.shape
    return Call(
        n, m, heads, kv_heads, dim, value_dim, q.dtype, q.device, kind_of(bias), score_name(request.score),
        normalizer_name(request.normalize), request.attention_mask is not None, request.dropout is not None,
        request.return_weights, _transform(q, k, v), _is_traced(q), key_features=request.key_features,
        value_features=request.value_features, return_lse=request.return_lse,
    )  # fmt: skip


def _seed(q: Tensor, generator: torch.Generator | None) -> Tensor:
    """What decides which weights are dropped: int64 (), drawn where q is."""
    if q.device.type == "meta":
        return torch.empty((), dtype=torch.int64, device="meta")
    return torch.randint(2**63 - 1, (), device=q.device, generator=generator)


def _with_sinks(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """lse with a logit more, and the share of the weights that is left: both (B, H, N)."""
    sinks, deaf = sinks.to(lse.dtype)[:, None], lse == -torch.inf
    known = lse.masked_fill(deaf, 0)  # -inf less -inf would be NaN
    both = torch.where(deaf, sinks, torch.logaddexp(known, sinks))
    return both, torch.sigmoid(known - sinks).masked_fill(deaf, 0)


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


def _check(q, k, v, graph, bias, attention_mask, scale, score, normalize, dropout_p, generator, sinks) -> None:
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
    parts = parts_of(score)
    require_function("score", parts.pair, PAIR_FUNCTIONS)
    if isinstance(parts.pair, Additive):
        weight = parts.pair.weight
        if weight.shape not in ((D,), (H, D), (1, D)) or not weight.is_floating_point() or weight.device != q.device:
            raise ValueError(
                f"the weight of Additive must be floating-point numbers ({D},) or ({H}, {D}) on {q.device} (got "
                f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device})"
            )
    for transform in parts.transforms:
        if isinstance(transform, Temperature) and transform.value.numel() not in (1, H):
            got = tuple(transform.value.shape)
            raise ValueError(f"Temperature must have one value for each of {H} heads, or one (got {got})")
    require_function("normalize", normalize, NORMALIZER_NAMES)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a number (got {shown(dropout_p)})")
    if not 0 <= float(dropout_p) < 1:
        raise ValueError(f"dropout_p must be a probability below 1 (got {dropout_p})")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator or None (got {shown(generator)})")
    if generator is not None and generator.device.type != q.device.type:
        raise ValueError(f"generator must be on q's device, {device} (got one on {generator.device})")
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.is_floating_point()):
        raise TypeError(f"sinks must be a tensor of floating-point numbers, one for each head (got {shown(sinks)})")
    if sinks is not None and (sinks.shape != (H,) or sinks.device != q.device):
        got = f"shape {tuple(sinks.shape)} on {sinks.device}"
        raise ValueError(f"sinks must be one number for each of the {H} heads, ({H},), on {device} (got {got})")


def _check_size(graph: Graph, N: int, M: int, H: int) -> None:
    """Raise unless a graph fits so many queries, keys and heads; a compiled program counts its nodes when it runs."""
    later = torch.compiler.is_compiling() and closed_form(graph) is None  # so that it serves graphs of every size
    own_n, own_m = (None, None) if later else graph.size
    if own_n is not None and own_n != N:
        hint = f"build the graph for {N} of them"
        if N and own_n % N == 0 and own_n > N:
            hint += ", or, where it is one of all entries of a batch, Batched([…]) of one for each"
        raise ValueError(f"graph has {own_n} query nodes but q has {N}; {hint}")
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
    wanted = (
        f"attention_mask must be a tensor of bool of shape {shape} on {k.device}: True for real keys; or of integers "
        f"of shape {shape[:1]}: lengths"
    )
    if not isinstance(mask, Tensor):
        raise TypeError(f"{wanted} (got a {type(mask).__name__})")
    if mask.dtype != torch.bool:
        raise TypeError(f"{wanted} (got {mask.dtype}); of integers 0 and 1, mask.bool()")
    if mask.shape != shape or mask.device != k.device:
        raise ValueError(f"{wanted} (got shape {tuple(mask.shape)} on {mask.device})")


def _of_lengths(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """A mask as it is, or of lengths, int64 (B,), that of the first so many keys of each entry: bool (B, M)."""
    if not (isinstance(mask, Tensor) and isinstance(k, Tensor) and k.ndim == 4 and mask.ndim == 1):
        return mask
    if mask.is_floating_point() or mask.dtype == torch.bool or mask.shape != k.shape[:1] or mask.device != k.device:
        return mask
    known = mask.device.type == "cpu" and not (_is_traced(mask) or torch._C._are_functorch_transforms_active())
    if known and len(mask) and not 0 <= int(mask.min()) <= int(mask.max()) <= k.shape[2]:
        raise ValueError(f"attention_mask of lengths must be from 0 to {k.shape[2]}, the number of keys (got {mask})")
    return torch.arange(k.shape[2], device=k.device) < mask[:, None]


def _check_returned(graph, normalize, sinks, return_lse, return_weights, reduce) -> None:
    """Raise unless what is to be returned exists."""
    if return_weights and isinstance(graph, Plan) and not graph.is_whole:
        raise ValueError(f"{graph} returns no weights: they stay on the ranks that made them")
    if return_lse and normalize != "softmax":
        raise ValueError(f"return_lse needs normalize='softmax' (got {normalize!r}): other weights have no common sum")
    if sinks is not None and normalize != "softmax":
        raise ValueError(f"sinks need normalize='softmax' (got {normalize!r}): other weights share no sum with them")
    if reduce is None:
        return
    if not (isinstance(reduce, str) and reduce in get_args(Reduction)):
        raise ValueError(f"reduce must be None or one of {', '.join(get_args(Reduction))} (got {shown(reduce)})")
    if not return_weights:
        raise ValueError(f"reduce={reduce!r} is about what return_weights returns: return_weights=True")
    if reduce == "entropy" and normalize != "softmax":
        raise ValueError(f"reduce='entropy' needs normalize='softmax' (got {normalize!r}): others are no probabilities")
