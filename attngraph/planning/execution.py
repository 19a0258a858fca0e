"""Running a plan: each of its parts by its kernel, the results merged; forward and backward as one pair of operators.

For `torch.compile` a plan is one opaque call that takes the graph as text, so that a compiled program serves every
graph size. The backward pass needs of the forward pass only its result (out, lse), whatever the parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from threading import Lock

import torch
from torch import Tensor

from attngraph.graph.text import from_text
from attngraph.kernels.contract import ScoreBias
from attngraph.kernels.memory import like, nodes_first
from attngraph.kernels.merge import merge
from attngraph.kernels.tiles import installed
from attngraph.planning.planner import LIVING, Plan, plan

KERNELS = {"dense": "dense", "tiles": "tiles", "rows": "rows"}  # each with forward and backward
MOST_PLANS = 64
MOST_BYTES = {"cpu": 1 << 31, "cuda": 1 << 34}  # of all layouts that are kept for a kind of device

Bias = tuple[str, Tensor] | None


# ---------------------------------------------------------------------------------------------- the plans kept

_KEPT: OrderedDict[tuple, Plan] = OrderedDict()
_LOCK = Lock()


def planned(text: str, q: Tensor, k: Tensor, backend: str, bias: str | None) -> Plan:
    """The plan for a graph's text, made once; of those made here, the latest are kept."""
    if (given := LIVING.get(text)) is not None:
        return given
    key = (text, q.shape[2], k.shape[2], q.shape[1], q.shape[3], str(q.device), backend, bias)
    with _LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
            return _KEPT[key]
    made = plan(
        from_text(text), q.shape[2], k.shape[2],
        heads=q.shape[1], head_dim=q.shape[3], device=q.device, backend=backend, bias=bias,
    )  # fmt: skip
    with _LOCK:
        _KEPT[key] = made
        most = MOST_BYTES.get(q.device.type, MOST_BYTES["cpu"])
        while len(_KEPT) > MOST_PLANS or (len(_KEPT) > 1 and sum(kept.nbytes for kept in _KEPT.values()) > most):
            _KEPT.popitem(last=False)
    return made


# ------------------------------------------------------------------------------------------------ the operators


@torch.library.custom_op("attngraph::attend_forward", mutates_args=())
def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kind: str, graph: str, backend: str, scale: float
) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), bias of its kind (see `kernels.tiles_torch`) → out (B, H, N, ·), lse."""
    chosen = planned(graph, q, k, backend, kind or None)
    if kind == "edge" and bias.shape[-1] != chosen.edges:
        raise ValueError(
            f"EdgeBias needs one value for each of the graph's {chosen.edges} edges, in edge_index order (got "
            f"{bias.shape[-1]}); an EdgeList merges edges given twice: values[..., graph.order]"
        )
    with torch.autocast(q.device.type, enabled=False):
        wide = _wide(q, k, v, bias)
        out, lse = _forward(chosen, *wide[:3], ScoreBias(kind, wide[3]) if kind else None, scale)
    return _laid_out(out.to(q.dtype), q), lse.contiguous()


@attend_forward.register_fake
def _(q, k, v, bias, kind, graph, backend, scale):
    return (
        like(q, v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
    )


@torch.library.custom_op("attngraph::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kind: str, graph: str, backend: str, scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and, with bias_grad, of the bias; else an empty tensor."""
    chosen = planned(graph, q, k, backend, kind or None)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, bias_, dout_, out_ = _wide(q, k, v, bias, dout, out)
        given = ScoreBias(kind, bias_) if kind else None
        dq, dk, dv, dbias = _backward(chosen, q_, k_, v_, out_, lse, dout_, dlse, given, scale, bias_grad)
    dbias = dbias.to(bias.dtype) if bias_grad else q.new_empty(0)
    found = (_laid_out(more.to(q.dtype), side) for more, side in zip((dq, dk, dv), (q, k, v), strict=True))
    return *found, dbias.contiguous()


@attend_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, bias, kind, graph, backend, scale, bias_grad):
    return *(like(side, side.shape[3]) for side in (q, k, v)), q.new_empty(bias.shape if bias_grad else 0)


def _laid_out(x: Tensor, other: Tensor) -> Tensor:
    """x (B, H, N, D) in memory as `like` gives it; x itself where it is so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if nodes_first(other) else x.contiguous()


def _remember(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, bias, *ctx.options = inputs
    ctx.plan = LIVING.get(inputs[5])  # stays alive until the backward pass
    ctx.save_for_backward(*output, q, k, v, bias)


def _gradients(ctx, dout, dlse):
    out, lse, q, k, v, bias = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = attend_backward(dout, dlse, out, lse, q, k, v, bias, *ctx.options, bias_grad)
    return dq, dk, dv, dbias if bias_grad else None, None, None, None, None


def _no_second(ctx, *gradients):
    raise RuntimeError(
        "tiles, rows and plans can be differentiated once; backend='edges' and 'reference' again and again"
    )


attend_forward.register_autograd(_gradients, setup_context=_remember)
attend_backward.register_autograd(_no_second)


# -------------------------------------------------------------------------------------------- part after part


def _kernel(name: str) -> Callable:
    return import_module(f"attngraph.kernels.{KERNELS[name]}")


def _wide(*sides: Tensor | None) -> list[Tensor | None]:
    """Half precision as float32, but where kernels multiply it so."""
    if sides[0].device.type == "cuda" and installed("triton"):
        return list(sides)
    return [side if side is None else side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]


def _forward(chosen: Plan, q, k, v, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    parts = chosen.parts if q.shape[:3].numel() and k.shape[2] else ()
    if len(parts) == 1 and parts[0].heads is None and parts[0].order is None:
        return _kernel(parts[0].backend).forward(q, k, v, parts[0].layout, bias, scale)
    wide, out, lse = torch.promote_types(q.dtype, torch.float32), None, None
    if not parts or parts[0].heads:  # else the first part's results are the first sums
        out, lse = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    for part in parts:
        view = _View(part, q, k)
        found = _kernel(part.backend).forward(
            view.queries(q), view.keys(k), view.keys(v), part.layout, view.bias(bias), scale
        )
        more_out, more_lse = (view.back_in_order(side).to(wide) for side in found)
        if out is None:
            out, lse = more_out, more_lse
        elif part.heads is None:
            merge(out, lse, more_out, more_lse)
        else:
            own_out, own_lse = out[:, view.heads], lse[:, view.heads]
            merge(own_out, own_lse, more_out, more_lse)
            out[:, view.heads], lse[:, view.heads] = own_out, own_lse
    return out, lse


def _backward(chosen: Plan, q, k, v, out, lse, dout, dlse, bias: Bias, scale: float, bias_grad: bool):
    parts = chosen.parts if q.shape[:3].numel() and k.shape[2] else ()
    if len(parts) == 1 and parts[0].heads is None and parts[0].order is None:
        return _kernel(parts[0].backend).backward(
            q, k, v, out, lse, dout, dlse, parts[0].layout, bias, scale, bias_grad
        )
    wide, totals = torch.promote_types(q.dtype, torch.float32), None
    if not parts or parts[0].heads:
        totals = [torch.zeros_like(side, dtype=wide) for side in (q, k, v)]
    dbias = torch.zeros_like(bias[1], dtype=torch.promote_types(bias[1].dtype, torch.float32)) if bias_grad else None
    for part in parts:
        view = _View(part, q, k)
        of_queries = (side if side is None else view.queries(side) for side in (out, lse, dout, dlse))
        sides = view.queries(q), view.keys(k), view.keys(v), *of_queries
        *more, more_bias = _kernel(part.backend).backward(*sides, part.layout, view.bias(bias), scale, bias_grad)
        more = [view.back_in_order(side).to(wide) for side in more]
        if totals is None:
            totals = more
        else:
            for total, heads, side in zip(totals, (view.heads, view.key_heads, view.key_heads), more, strict=True):
                total.index_add_(1, heads, side) if part.heads else total.add_(side)
        if bias_grad:
            view.add_bias(dbias, bias[0], more_bias)
    return *totals, dbias


class _View:
    """What one part of a plan sees: its heads, its nodes in its order, its edges."""

    def __init__(self, part, q: Tensor, k: Tensor):
        group = q.shape[1] // k.shape[1]
        self.part = part
        self.heads = torch.tensor(part.heads or range(q.shape[1]), device=q.device)
        # With heads of its own, each query head has its key head beside it; else the groups stay together.
        self.key_heads = self.heads // group if part.heads else torch.arange(k.shape[1], device=q.device)
        self.order = None if part.order is None else part.order.to(q.device)
        if self.order is not None:
            self.back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(q.shape[2], device=q.device))

    def queries(self, x: Tensor) -> Tensor:
        """Of x (B, H, N, …), the heads and nodes of this part."""
        x = x.index_select(1, self.heads) if self.part.heads else x
        return x if self.order is None else x.index_select(2, self.order)

    def keys(self, x: Tensor) -> Tensor:
        """Of x (B, Hkv, M, …), the same."""
        x = x.index_select(1, self.key_heads) if self.part.heads else x
        return x if self.order is None else x.index_select(2, self.order)

    def back_in_order(self, x: Tensor) -> Tensor:
        """The nodes in their own order again."""
        return x if self.order is None else x.index_select(2, self.back)

    def bias(self, bias: Bias) -> Bias:
        """The values of this part's heads and edges."""
        if bias is None or not self.part.heads:
            return bias
        kind, values = bias
        axis = 0 if kind == "offset" else 1
        values = values.index_select(axis, self.heads) if values.shape[axis] > 1 else values
        return ScoreBias(kind, values if self.part.number is None else values[..., self.part.number.to(values.device)])

    def add_bias(self, total: Tensor, kind: str, more: Tensor) -> None:
        """Add the gradient of `bias` to that of all heads and edges."""
        more = more.to(total.dtype)
        if self.part.number is not None:
            wide = more.new_zeros(*more.shape[:-1], total.shape[-1])
            more = wide.index_copy_(-1, self.part.number.to(more.device), more)
        axis = 0 if kind == "offset" else 1
        if self.part.heads and total.shape[axis] > 1:
            total.index_add_(axis, self.heads, more)
        else:
            total += more
