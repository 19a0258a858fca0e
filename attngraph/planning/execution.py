"""Running a plan: each of its parts by its backend, the results merged; forward and backward.

The backward pass needs of the forward pass only its result (out, lse), whatever the parts. An eager call holds its plan
until then; a compiled program has the handle of its graph, and its operators look the plan up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attngraph.bias import Bias, require_edge_count, score_bias
from attngraph.graph.base import Graph
from attngraph.graph.text import pack, unpack
from attngraph.kernels.contract import BiasKind, ScoreBias
from attngraph.kernels.memory import like, nodes_first
from attngraph.kernels.merge import merge
from attngraph.planning.backends.base import INSTALLED, Results
from attngraph.planning.call import Call, Request
from attngraph.planning.planner import Part, Plan, fitted, planned


def run(plan: Plan, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, call: Call, request: Request) -> Results:
    """A call by its plan → out, lse, weights, the last two where they are asked for."""
    if plan.runs_whole(call):
        (part,) = plan.parts
        return part.backend.attend(q, k, v, part.layout, bias, request)
    if plan.parts and not plan.parts[0].backend.merges:  # torch differentiates its forward pass
        return _merged(q, k, v, bias, request.scale, lambda *sides: _forward_call(plan, *sides))
    return _merged(q, k, v, bias, request.scale, lambda *sides: _Attention.apply(*sides, plan))


def run_traced(
    graph: Graph | Plan, name: str, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, request: Request
) -> Results:
    """The same in a program that is being compiled: as one operator, which looks its plan up when it runs."""
    return _merged(q, k, v, bias, request.scale, lambda *sides: attend_forward(*sides, *pack(graph), name))


def _merged(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, scale: float, attention: Any) -> Results:
    """`attention`(q, k, v, values, kind, scale) → out, lse; with what a bias adds to all keys of a query alike."""
    if not q.shape[3]:  # all scores are 0: as those of one number that is
        q, k = pad(q, (0, 1)), pad(k, (0, 1))
    exact = torch.promote_types(q.dtype, torch.float32)
    of_keys, of_query = score_bias(bias, q, k)
    kind, values = (None, None) if of_keys is None else (of_keys.kind, of_keys.values.to(exact))
    out, lse = attention(q, k, v, values, kind or "", float(scale))
    if of_query is not None:  # the same for all keys of a query: its weights do not change
        finite = of_query.masked_fill(of_query == -torch.inf, 0)
        out = out.masked_fill(of_query == -torch.inf, 0) + (0 * finite).to(q.dtype)  # NaN where it is NaN or inf
        lse = lse + of_query[..., 0].to(exact)
    return out, lse, None


# --------------------------------------------------------------------------------------------------------- eager

TWICE = "tiles, rows and plans can be differentiated once; backend='edges' and 'reference' again and again"


class _Attention(torch.autograd.Function):
    """Attention by a plan, which it holds for its backward pass."""

    @staticmethod
    def forward(ctx: Any, q, k, v, values, kind, scale, plan) -> tuple[Tensor, Tensor]:
        out, lse = _forward_call(plan, q, k, v, values, kind, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, values, out, lse)
        ctx.kind, ctx.scale, ctx.plan = kind, scale, plan
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        dout, dlse = grad_outputs
        q, k, v, values, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        options = ctx.kind, ctx.scale, ctx.plan, ctx.needs_input_grad[3]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Gradients.apply(dout, dlse, out, lse, q, k, v, values, *options)
        else:
            gradients = _backward_call(dout, dlse, out, lse, q, k, v, values, *options)
        return *gradients, None, None, None


class _Gradients(torch.autograd.Function):
    """The backward pass where it is to be differentiated itself, which it can't be."""

    @staticmethod
    def forward(ctx: Any, *arguments):
        return _backward_call(*arguments)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        raise RuntimeError(TWICE)


def _forward_call(plan: Plan, q, k, v, values, kind, scale) -> tuple[Tensor, Tensor]:
    """In the precision of the kernels, and back."""
    if kind == "edge":
        require_edge_count(values, plan.edges)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, values_ = _kernel_precision(q, k, v, values)
        out, lse = _forward(plan, q_, k_, v_, ScoreBias(kind, values_) if kind else None, scale)
    return _laid_out(out.to(q.dtype), q), lse.contiguous()


def _backward_call(dout, dlse, out, lse, q, k, v, values, kind, scale, plan, bias_grad):
    """The gradients of q, k, v and, with bias_grad, of the bias's values; else None."""
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, values_, dout_, out_ = _kernel_precision(q, k, v, values, dout, out)
        bias = ScoreBias(kind, values_) if kind else None
        dq, dk, dv, dbias = _backward(plan, q_, k_, v_, out_, lse, dout_, dlse, bias, scale, bias_grad)
    dq, dk, dv = (_laid_out(part.to(q.dtype), side) for part, side in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, None if dbias is None else dbias.to(values.dtype).contiguous()


def _laid_out(x: Tensor, other: Tensor) -> Tensor:
    """x (B, H, N, D) in memory as `like` gives it; x itself where it is so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if nodes_first(other) else x.contiguous()


def _kernel_precision(*sides: Any) -> list[Any]:
    """Half precision as float32, but where kernels multiply it so."""
    if sides[0].device.type == "cuda" and INSTALLED["triton"]:
        return list(sides)
    return [side if side is None else side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]


# ------------------------------------------------------------------------------------------ in compiled programs


def _known_plan(graph: str, tensors: list[Tensor], name: str, q: Tensor, k: Tensor, v: Tensor, kind: str) -> Plan:
    """The plan that a compiled program runs by, from the text and tensors that name its graph."""
    found = unpack(graph, tensors)
    bias: BiasKind | None = kind or None  # type: ignore[assignment]
    heads, kv_heads = q.shape[1], k.shape[1]
    sizes = q.shape[2], k.shape[2], heads, kv_heads, q.shape[3], v.shape[3]
    call = Call(*sizes, q.dtype, q.device, bias, part=True)  # by forward and backward, whatever runs
    return fitted(found, call) if isinstance(found, Plan) else planned(found, call, name)


@torch.library.custom_op("attngraph::attend_forward", mutates_args=())
def attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: Tensor | None,
    kind: str,
    scale: float,
    graph: str,
    tensors: list[Tensor],
    name: str,
) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), the values and kind of a `ScoreBias` → out (B, H, N, Dv), lse."""
    return _forward_call(_known_plan(graph, tensors, name, q, k, v, kind), q, k, v, values, kind, scale)


@attend_forward.register_fake
def _(q, k, v, values, kind, scale, graph, tensors, name):
    return like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("attngraph::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, values: Tensor | None, kind: str, scale: float, graph: str,
    tensors: list[Tensor], name: str, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and, with bias_grad, of the bias's values; else an empty tensor."""
    plan = _known_plan(graph, tensors, name, q, k, v, kind)
    dq, dk, dv, dbias = _backward_call(dout, dlse, out, lse, q, k, v, values, kind, scale, plan, bias_grad)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@attend_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, values, kind, scale, graph, tensors, name, bias_grad):
    return *(like(side, side.shape[3]) for side in (q, k, v)), q.new_empty(values.shape if bias_grad else 0)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, values, kind, scale, graph, tensors, name = inputs
    ctx.options = kind, scale, graph, name
    ctx.save_for_backward(*output, q, k, v, values, *tensors)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    out, lse, q, k, v, values, *tensors = ctx.saved_tensors
    kind, scale, graph, name = ctx.options
    dout = torch.zeros_like(out) if dout is None else dout
    bias_grad = ctx.needs_input_grad[3]
    options = kind, scale, graph, tensors, name, bias_grad
    dq, dk, dv, dbias = attend_backward(dout, dlse, out, lse, q, k, v, values, *options)
    return dq, dk, dv, dbias if bias_grad else None, None, None, None, [None] * len(tensors), None


def _not_twice(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(TWICE)


attend_forward.register_autograd(_gradients, setup_context=_save)
attend_backward.register_autograd(_not_twice)


# -------------------------------------------------------------------------------------------- part after part


def _parts(plan: Plan, q: Tensor, k: Tensor) -> tuple[Part, ...]:
    """The parts that have anything to compute."""
    return plan.parts if q.shape[:3].numel() and k.shape[2] else ()


def _forward(plan: Plan, q, k, v, bias: ScoreBias | None, scale: float) -> tuple[Tensor, Tensor]:
    parts = _parts(plan, q, k)
    if len(parts) == 1 and parts[0].is_all:
        return parts[0].backend.forward(q, k, v, parts[0].layout, bias, scale)
    exact = torch.promote_types(q.dtype, torch.float32)
    out = lse = None
    if not parts or parts[0].heads:  # else the first part's results are the first sums
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=exact)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=exact)
    for part in parts:
        view = _View(part, q, k)
        sides = view.queries(q), view.keys(k), view.keys(v)
        part_out, part_lse = part.backend.forward(*sides, part.layout, view.bias(bias), scale)
        part_out, part_lse = view.in_own_order(part_out).to(exact), view.in_own_order(part_lse).to(exact)
        if out is None or lse is None:
            out, lse = part_out, part_lse
        elif part.heads is None:
            merge(out, lse, part_out, part_lse)
        else:
            heads_out, heads_lse = out[:, view.heads], lse[:, view.heads]
            merge(heads_out, heads_lse, part_out, part_lse)
            out[:, view.heads], lse[:, view.heads] = heads_out, heads_lse
    assert out is not None
    assert lse is not None
    return out, lse


def _backward(plan: Plan, q, k, v, out, lse, dout, dlse, bias: ScoreBias | None, scale: float, bias_grad: bool):
    parts = _parts(plan, q, k)
    if len(parts) == 1 and parts[0].is_all:
        return parts[0].backend.backward(q, k, v, out, lse, dout, dlse, parts[0].layout, bias, scale, bias_grad)
    exact, totals, dbias = torch.promote_types(q.dtype, torch.float32), None, None
    if not parts or parts[0].heads:
        totals = [torch.zeros_like(side, dtype=exact) for side in (q, k, v)]
    if bias_grad and bias is not None:
        dbias = torch.zeros_like(bias.values, dtype=torch.promote_types(bias.values.dtype, torch.float32))
    for part in parts:
        view = _View(part, q, k)
        part_out, part_lse, part_dout = (view.queries(side) for side in (out, lse, dout))
        part_dlse = None if dlse is None else view.queries(dlse)
        *gradients, part_dbias = part.backend.backward(
            view.queries(q), view.keys(k), view.keys(v), part_out, part_lse, part_dout, part_dlse,
            part.layout, view.bias(bias), scale, bias_grad,
        )  # fmt: skip
        gradients = [view.in_own_order(side).to(exact) for side in gradients]
        if totals is None:
            totals = gradients
        else:
            heads = view.heads, view.key_heads, view.key_heads
            for total, own, side in zip(totals, heads, gradients, strict=True):
                total.index_add_(1, own, side) if part.heads else total.add_(side)
        if dbias is not None and bias is not None and part_dbias is not None:
            view.add_bias_gradient(dbias, bias.kind, part_dbias)
    assert totals is not None
    return *totals, dbias


class _View:
    """What one part of a plan sees: its heads, its nodes in its order, its edges."""

    def __init__(self, part: Part, q: Tensor, k: Tensor):
        group = q.shape[1] // k.shape[1]
        self.part = part
        self.heads = torch.tensor(part.heads or range(q.shape[1]), device=q.device)
        # With heads of its own, each query head has its key head beside it; else the groups stay together.
        self.key_heads = self.heads // group if part.heads else torch.arange(k.shape[1], device=q.device)
        self.order = None if part.order is None else part.order.to(q.device)
        self.edges = None if part.edge_numbers is None else part.edge_numbers.to(q.device)

    def queries(self, x: Tensor) -> Tensor:
        """Of x (B, H, N, …), the heads and nodes of this part."""
        x = x.index_select(1, self.heads) if self.part.heads else x
        return x if self.order is None else x.index_select(2, self.order)

    def keys(self, x: Tensor) -> Tensor:
        """Of x (B, Hkv, M, …), the same."""
        x = x.index_select(1, self.key_heads) if self.part.heads else x
        return x if self.order is None else x.index_select(2, self.order)

    def in_own_order(self, x: Tensor) -> Tensor:
        """Results of this part, (B, H, N, …), the nodes in the order of the graph again."""
        if self.order is None:
            return x
        place = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(x.shape[2], device=x.device))
        return x.index_select(2, place)

    def bias(self, bias: ScoreBias | None) -> ScoreBias | None:
        """The values of this part's heads and edges."""
        if bias is None or not self.part.heads:
            return bias
        axis = 0 if bias.kind == "offset" else 1
        values = bias.values.index_select(axis, self.heads) if bias.values.shape[axis] > 1 else bias.values
        return ScoreBias(bias.kind, values if self.edges is None else values[..., self.edges])

    def add_bias_gradient(self, total: Tensor, kind: BiasKind, gradient: Tensor) -> None:
        """Add the gradient of `bias` to that of all heads and edges."""
        gradient = gradient.to(total.dtype)
        if self.edges is not None:
            of_all_edges = gradient.new_zeros(*gradient.shape[:-1], total.shape[-1])
            gradient = of_all_edges.index_copy_(-1, self.edges, gradient)
        axis = 0 if kind == "offset" else 1
        if self.part.heads and total.shape[axis] > 1:
            total.index_add_(axis, self.heads, gradient)
        else:
            total += gradient
