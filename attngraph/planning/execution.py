"""Running a plan: each of its parts by its backend, the results merged; forward and backward.

The backward pass needs of the forward pass only its result (out, lse), whatever the parts. An eager call holds its plan
until then; a compiled program has the handle of its graph, and its operators look the plan up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.bias import Bias, EdgeBias, require_edge_count, score_bias
from attngraph.edge_features import require_edges
from attngraph.graph.base import Graph
from attngraph.graph.dynamic import Folded, settled
from attngraph.graph.text import pack, unpack
from attngraph.kernels.contract import (
    BiasKind,
    Dropout,
    EdgeTerms,
    Gradients,
    Modifiers,
    ScoreBias,
    Transform,
)
from attngraph.kernels.memory import DTYPES, apart, like, nodes_first
from attngraph.kernels.scoring import LeakyReLU, SoftCap
from attngraph.planning.backends import BACKENDS, chooser_for
from attngraph.planning.backends.base import INSTALLED, Results
from attngraph.planning.call import Call, Request
from attngraph.planning.layouts.materialized import edges_of_heads
from attngraph.planning.planner import Plan, planned, planned_once


def run(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request, plan: Plan, call: Call) -> Results:
    """A call by its plan → out, lse, weights, the last two where they are asked for."""
    if plan.runs_whole(call):
        (part,) = plan.parts
        return part.backend.attend(q, k, v, part.layout, bias, request)
    q, k = (q, k) if plan.takes_no_dims else _with_dims(q, k)
    by_torch = plan.parts and not plan.parts[0].backend.merges  # it differentiates the forward pass
    if by_torch or not torch.is_grad_enabled():
        return _merged(q, k, v, bias, request, plan, lambda *sides: _forward_call(_Sides(*sides[:-1]), sides[-1], plan))
    return _merged(q, k, v, bias, request, plan, lambda *sides: _Attention.apply(*sides, plan))


def run_traced(
    graph: Graph | Plan, name: str, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request
) -> Results:
    """The same in a program that is being compiled: as one operator, which looks its plan up when it runs."""
    q, k = _with_dims(q, k)
    attention = lambda *sides: attend_forward(*sides[:-1], *sides[-1], *pack(graph), name)  # noqa: E731
    return _merged(q, k, v, bias, request, graph, attention)


def _with_dims(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of no numbers, whose scores are all 0, as vectors of one number that is."""
    return (q, k) if q.shape[3] else (pad(q, (0, 1)), pad(k, (0, 1)))


class _Sides(NamedTuple):
    """The tensors of a call; the first seven have gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    values: Tensor | None  # of the bias
    e: Tensor | None  # of `EdgeTerms`, with the next two
    to_key: Tensor | None
    to_value: Tensor | None
    attention_mask: Tensor | None
    seed: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Those that have gradients."""
        return self[:NUM_GRADIENTS]

    def with_differentiable(self, sides: Sequence[Tensor | None]) -> _Sides:
        """With these in their place."""
        return _Sides(*[*sides, *self[NUM_GRADIENTS:]])  # type: ignore[arg-type]


NUM_SIDES, NUM_GRADIENTS = len(_Sides._fields), 7


class _Options(NamedTuple):
    """The `Modifiers` of a call that are no tensors, as the operators of compiled programs take them."""

    kind: str  # of the bias; "" for none
    scale: float
    transform: str  # "" for none
    value: float  # of the transform
    normalize: str
    dropout_p: float

    def modifiers(self, sides: _Sides) -> Modifiers:
        """With the tensors."""
        values, seed = sides.values, sides.seed
        bias: Any = ScoreBias(self.kind, values) if self.kind and values is not None else None  # type: ignore[arg-type]
        transform: Any = Transform(self.transform, self.value) if self.transform else None  # type: ignore[arg-type]
        dropout = None if seed is None else Dropout(self.dropout_p, seed)
        edges = None if sides.e is None else EdgeTerms(sides.e, sides.to_key, sides.to_value)
        return Modifiers(self.scale, bias, sides.attention_mask, transform, self.normalize, dropout, edges)  # type: ignore[arg-type]


def _merged(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request, graph: Graph | Plan, attention: Any
) -> Results:
    """`attention`(*sides, options) → out, lse, with what a bias adds to all keys."""
    e, to_key, to_value = (None, None, None) if request.edge_features is None else request.edge_features[:3]
    if not (value_dim := v.shape[3]):
        v, to_value = pad(v, (0, 1)), None
    of_keys, of_query = graph.score_bias(bias, q, k) if isinstance(graph, Plan) else score_bias(bias, q, k)
    transform, normalize, dropout = request.parts.transform, str(request.normalize), request.dropout
    if of_query is not None and (transform is not None or normalize != "softmax"):  # as one more number of each vector
        q = torch.cat([q, (of_query / request.scale).to(q.dtype).expand(*q.shape[:3], 1)], 3)
        k, of_query = pad(k, (0, 1), value=1.0), None
    if to_key is not None:  # nothing is added to what keys have more
        to_key = pad(to_key, (0, 0, 0, k.shape[3] - to_key.shape[1]))
    kind, values = ("", None) if of_keys is None else (of_keys.kind, _exact(of_keys.values, q))
    kind_of_transform, value = ("", 0.0) if transform is None else transform
    seed, dropout_p = (None, 0.0) if dropout is None else (dropout.seed, dropout.p)
    options = _Options(kind, float(request.scale), kind_of_transform, value, normalize, dropout_p)
    e = None if to_key is to_value is None else e
    out, lse = attention(*_Sides(q, k, v, values, e, to_key, to_value, request.attention_mask, seed), options)
    out = out if value_dim else out[..., :0]
    if of_query is not None:  # the same for all keys of a query: its weights do not change
        finite = of_query.masked_fill(of_query == -torch.inf, 0)
        out = out.masked_fill(of_query == -torch.inf, 0) + (0 * finite).to(q.dtype)  # NaN where it is NaN or inf
        lse = lse + _exact(of_query[..., 0], q)
    return out, lse, None


def _exact(x: Tensor, q: Tensor) -> Tensor:
    """In the precision of the scores."""
    return x.to(torch.promote_types(q.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------------- eager


class _Attention(torch.autograd.Function):
    """Attention by a plan, which it holds for its backward pass."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *sides, ctx.options, ctx.plan = given
        out, lse = _forward_call(_Sides(*sides), ctx.options, ctx.plan)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*sides, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        dout, dlse = grad_outputs
        *sides, out, lse = ctx.saved_tensors
        dout, needed = torch.zeros_like(out) if dout is None else dout, ctx.needs_input_grad
        given = _Sides(*sides), ctx.options, ctx.plan
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _differentiable_gradients(dout, dlse, *given, needed[:NUM_GRADIENTS])
        else:
            *gradients, dedges = _backward_call((dout, dlse, out, lse), *given, needed[3], needed[4])
            gradients += dedges
        return *gradients, None, None, None, None


def _differentiable_gradients(dout, dlse, sides: _Sides, options: _Options, plan: Plan, needs_grad):
    """The gradients of the sides, gathered along the edges: they can be differentiated again and again."""
    plan.require_unchanged()
    if not plan.is_whole:
        raise ValueError(f"{plan} can be differentiated once: create_graph=True needs all nodes on one rank")
    q, k = sides.q, sides.k
    layout = edges_of_heads(plan.graph, q.shape[2], k.shape[2], q.device)
    own = apart(*sides.differentiable)
    with _without_autocast(q.device.type):
        exact = sides.with_differentiable(kernel_precision(None, *own))
        modifiers, bias = options.modifiers(exact), None
        if modifiers.bias is not None:
            bias = EdgeBias.sorted(modifiers.bias.over_edges(layout.query, layout.key, q.shape[2]))
        score = {"": "dot", "softcap": SoftCap(options.value or 1.0), "leaky_relu": LeakyReLU(options.value)}
        request = Request(
            options.scale, score[options.transform], options.normalize, modifiers.dropout,
            return_lse=True, attention_mask=sides.attention_mask, edge_features=modifiers.edges,
        )  # fmt: skip
        out, lse, _ = BACKENDS["edges"].attend(*exact[:3], layout, bias, request)
    found = (out, dout), (lse, dlse)
    results = [(part, grad.to(part.dtype)) for part, grad in found if part is not None and grad is not None]
    results = [(part, gradient) for part, gradient in results if part.requires_grad]
    asked = [side for side, needed in zip(own, needs_grad, strict=True) if needed]
    outs, gradients = zip(*results, strict=True)
    found = iter(torch.autograd.grad(outs, asked, gradients, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in needs_grad]


def _forward_call(sides: _Sides, options: _Options, plan: Plan) -> tuple[Tensor, Tensor]:
    """In the precision of the kernels, and back."""
    q = sides.q
    if options.kind == "edge" and sides.values is not None:
        require_edge_count(sides.values, plan.edge_values)
    if sides.e is not None:
        require_edges(sides.e, plan.edge_values)
    with _without_autocast(q.device.type):
        exact = sides.with_differentiable(kernel_precision(plan, *sides.differentiable))
        out, lse = plan.forward(*exact[:3], options.modifiers(exact))
    return _laid_out(out.to(q.dtype), q), lse.contiguous()


def _backward_call(
    results: tuple, sides: _Sides, options: _Options, plan: Plan, bias_grad: bool, edge_grad: bool
) -> Gradients:
    """The gradients, from (dout, dlse, out, lse); of the values of a bias and of e only where asked for."""
    dout, dlse, out, lse = results
    with _without_autocast(dout.device.type):
        *own, dout_, out_ = kernel_precision(plan, *sides.differentiable, dout, out)
        exact = sides.with_differentiable(own)
        modifiers = options.modifiers(exact)
        if modifiers.edges is not None:
            modifiers = modifiers._replace(edges=modifiers.edges._replace(needs_grad=edge_grad))
        dq, dk, dv, dbias, dedges = plan.backward(*exact[:3], out_, lse, dout_, dlse, modifiers, bias_grad)
    dq, dk, dv = (_laid_out(part.to(side.dtype), side) for part, side in zip((dq, dk, dv), sides[:3], strict=True))
    found = zip((dbias, *dedges), sides[3:NUM_GRADIENTS], strict=True)
    dbias, *dedges = (x if x is None or side is None else x.to(side.dtype) for x, side in found)
    return Gradients(dq, dk, dv, dbias, (dedges[0], dedges[1], dedges[2]))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Turns it off, where it is on."""
    is_on = torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def _laid_out(x: Tensor, other: Tensor) -> Tensor:
    """x (B, H, N, D) in memory as `like` gives it; x itself where it is so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if nodes_first(other) else x.contiguous()


def kernel_precision(plan: Plan | None, *sides: Any) -> list[Any]:
    """Half precision as float32, but where all kernels of the plan take it as it is."""
    dtype, device = sides[0].dtype, sides[0].device.type
    takes_half = INSTALLED["triton"] if device == "cuda" else device == "cpu" and plan is not None and plan.takes_half
    if dtype in DTYPES or takes_half:
        return list(sides)
    return [side if side is None else side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]


# ------------------------------------------------------------------------------------------ in compiled programs


class _Known(NamedTuple):
    """What a compiled program's operators run by: a plan, of all heads and entries as one where these choose edges."""

    plan: Plan
    folded: Folded | None

    @staticmethod
    def of(pack: tuple[str, list[Tensor], str], sides: _Sides, options: _Options) -> _Known:
        """From the text and tensors that name the graph."""
        (graph, tensors, name), folded, mask = pack, None, sides.attention_mask
        found = unpack(graph, tensors)
        if isinstance(found, Graph) and found._unresolved and name == "auto":
            found = settled(found, sides.q.shape[2], sides.k.shape[2])
        if isinstance(found, Graph) and found._unresolved:
            folded = Folded.of(found, sides.q, sides.k, mask, chooser_for(sides.q))
            sides = _folded(sides, folded)
        q, k, v, *_ = sides
        features = [0 if matrix is None else matrix.shape[2] for matrix in (sides.to_key, sides.to_value)]
        bias: BiasKind | None = options.kind or None  # type: ignore[assignment]
        call = Call(
            q.shape[2], k.shape[2], q.shape[1], k.shape[1], k.shape[3], v.shape[3],
            q.dtype, q.device, bias, options.transform or "dot", options.normalize,
            padding=mask is not None, dropout=options.dropout_p > 0, part=True,  # whatever runs, forward and backward
            key_features=features[0], value_features=features[1],
        )  # fmt: skip
        if folded is not None:
            return _Known(planned_once(folded.graph, call, name), folded)
        return _Known(found.fitted(call) if isinstance(found, Plan) else planned(found, call, name), None)


@torch.library.custom_op("attngraph::attend_forward", mutates_args=())
def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, values: Tensor | None, e: Tensor | None, to_key: Tensor | None,
    to_value: Tensor | None, attention_mask: Tensor | None, seed: Tensor | None,
    kind: str, scale: float, transform: str, value: float, normalize: str, dropout_p: float,
    graph: str, tensors: list[Tensor], name: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, H, N, D), k and v (B, Hkv, M, ·), values and kind of a `ScoreBias`, … → out (B, H, N, Dv), lse."""
    options = _Options(kind, scale, transform, value, normalize, dropout_p)
    sides = _Sides(q, k, v, values, e, to_key, to_value, attention_mask, seed)
    plan, folded = _Known.of((graph, tensors, name), sides, options)
    if folded is None:
        return _forward_call(sides, options, plan)
    out, lse = _forward_call(_folded(sides, folded), options, plan)
    return folded.of_queries(out, q.shape[2]).contiguous(), folded.of_queries(lse, q.shape[2]).contiguous()


def _folded(sides: _Sides, folded: Folded) -> _Sides:
    """Those of all heads and entries as one."""
    mask = folded.mask(sides.attention_mask, sides.k)
    q, k, v = folded.queries(sides.q), folded.keys(sides.k), folded.keys(sides.v)
    return sides._replace(q=q, k=k, v=v, attention_mask=mask)


@attend_forward.register_fake
def _(q, k, v, *rest):
    return like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("attngraph::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, values: Tensor | None, e: Tensor | None, to_key: Tensor | None,
    to_value: Tensor | None, attention_mask: Tensor | None, seed: Tensor | None,
    kind: str, scale: float, transform: str, value: float, normalize: str, dropout_p: float,
    graph: str, tensors: list[Tensor], name: str, bias_grad: bool, edge_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v, the bias's values with bias_grad, e with edge_grad, K and V; else empty tensors."""
    options, results = _Options(kind, scale, transform, value, normalize, dropout_p), (dout, dlse, out, lse)
    sides = _Sides(q, k, v, values, e, to_key, to_value, attention_mask, seed)
    plan, folded = _Known.of((graph, tensors, name), sides, options)
    if folded is not None:
        results = [side if side is None else folded.queries(side) for side in results]
        dq, dk, dv, *_ = _backward_call(tuple(results), _folded(sides, folded), options, plan, False, False)
        dq, dk, dv = folded.of_queries(dq, q.shape[2]), folded.sum_of_keys(dk, k), folded.sum_of_keys(dv, v)
        dq, dk, dv, of_values = dq.contiguous(), dk.contiguous(), dv.contiguous(), (None,) * 4
    else:
        dq, dk, dv, dbias, dedges = _backward_call(results, sides, options, plan, bias_grad, edge_grad)
        of_values = dbias, *dedges
    dbias, de, dto_key, dto_value = (q.new_empty(0) if side is None else side.contiguous() for side in of_values)
    return dq, dk, dv, dbias, de, dto_key, dto_value


@attend_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, values, e, to_key, to_value, attention_mask, seed, *rest):
    bias_grad, edge_grad = rest[-2:]
    asked = values if bias_grad else None, e if edge_grad else None, to_key, to_value
    of_values = [q.new_empty(0 if side is None else side.shape) for side in asked]
    return *(like(side, side.shape[3]) for side in (q, k, v)), *of_values


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    *given, graph, tensors, name = inputs
    sides, ctx.options, ctx.graph = given[:NUM_SIDES], given[NUM_SIDES:], (graph, name)
    ctx.save_for_backward(*output, *sides, *tensors)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    out, lse, *saved = ctx.saved_tensors
    sides, tensors, (graph, name) = saved[:NUM_SIDES], saved[NUM_SIDES:], ctx.graph
    dout = torch.zeros_like(out) if dout is None else dout
    asked = ctx.needs_input_grad[:NUM_GRADIENTS]
    gradients = attend_backward(dout, dlse, out, lse, *sides, *ctx.options, graph, tensors, name, *asked[3:5])
    gradients = [side if wanted else None for side, wanted in zip(gradients, asked, strict=True)]
    others = [None] * (NUM_SIDES - NUM_GRADIENTS + len(ctx.options) + 1)
    return *gradients, *others, [None] * len(tensors), None


def _not_twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("compiled programs can be differentiated once; attend outside of torch.compile again and again")


attend_forward.register_autograd(_gradients, setup_context=_save)
attend_backward.register_autograd(_not_twice)
