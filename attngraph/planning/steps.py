"""Attention in two steps, through one number for each edge and head: its score, or its weight.

Any score is a bias of the edges, on vectors that are all zero: so what no kernel fuses (an additive score, a function)
is scores first, then attention by them, with all that attention has. And the weights of any attention follow from its
scores and its lse. What a pair makes of its vectors comes from a kernel, or streams over a part of the edges at a time:
nothing of size E · D or N · M is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from attngraph.bias import Alibi, Bias, DenseBias, EdgeBias, RelativeBias, Shifted, over_edges
from attngraph.edge_features import check_edge_terms
from attngraph.graph.base import Graph
from attngraph.graph.text import pack, unpack
from attngraph.kernels.contract import EdgeTerms
from attngraph.kernels.edge import streamed, weights_by
from attngraph.kernels.memory import apart
from attngraph.kernels.scoring import Additive, dot
from attngraph.planning.backends import makes_products, products_of, products_of_tiles
from attngraph.planning.backends.base import Results
from attngraph.planning.call import Request
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.materialized import EdgesOfHeads, csr_of_heads, edges_of_heads
from attngraph.planning.layouts.tiles import Tiles
from attngraph.planning.planner import Plan

MOST_NUMBERS = 1 << 24  # weights that are made at once where they are reduced, if one head has no more
LEAST_WEIGHT = torch.finfo(torch.float32).tiny  # below, a weight has no share in an entropy
Reduction = Literal["mean", "entropy", "received"]
Attention = Callable[[Tensor, Tensor, Tensor, Bias, Request], Results]


def in_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Plan,
    bias: Bias | None,
    request: Request,
    attention: Attention,
) -> Results:
    """A call whose scores, or weights, are made first: then `attention` by them, along a graph or by its plan."""
    edges = edges_of_heads(_own(graph), q.shape[2], k.shape[2], q.device)
    by_head = not isinstance(graph, Plan) or graph.reads_by_head
    given, weights = edge_scores(q, k, edges, graph, bias, request, by_head=by_head), None
    own = request._replace(scale=1.0, score="dot", return_weights=False, edge_features=_of_values(request))
    if not isinstance(request.normalize, str):
        given = weights = _where_heard(weights_by(request.normalize, given), edges, request)
        own = own._replace(normalize="none")
    elif request.return_weights and request.normalize != "softmax":
        weights = _where_heard(weights_by(request.normalize, given), edges, request)
    zero_q, zero_k = q.new_zeros(*q.shape[:3], 0), k.new_zeros(*k.shape[:3], 0)
    out, lse, _ = attention(zero_q, zero_k, v, EdgeBias.sorted(given), own)
    if request.return_weights and weights is None:
        weights = _softmax(given, lse, edges, request)
    return out, lse, weights if weights is None else weights.to(q.dtype)


# --------------------------------------------------------------------------------------------- weights by themselves


def edge_weights(
    q: Tensor, k: Tensor, lse: Tensor | None, graph: Graph | Plan, bias: Bias | None, request: Request
) -> Tensor:
    """The weights of an attention whose lse (B, H, N) is known, before dropout: (B, H, E) in `edge_index` order."""
    edges = edges_of_heads(_own(graph), q.shape[2], k.shape[2], q.device)
    return _weights(q, k, lse, edges, graph, bias, request).to(q.dtype)


def _of_values(request: Request) -> EdgeTerms | None:
    """The features of edges that are left once their scores are made."""
    features = request.edge_features
    return None if features is None or features.to_value is None else features._replace(to_key=None)


def _own(graph: Graph | Plan) -> Graph:
    """The graph itself, or that of a plan."""
    return graph.graph if isinstance(graph, Plan) else graph


def _weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    edges: EdgesOfHeads,
    graph: Graph | Plan,
    bias: Bias | None,
    request: Request,
    heads: Tensor | None = None,
) -> Tensor:
    """As `edge_weights`, in at least float32; `heads` as in `edge_scores`."""
    plain = bias is None and request.score == "dot" and request.normalize == "softmax" and not request.key_features
    if plain and lse is not None and _has_kernel(q, k):  # in one pass
        known = lse.masked_fill(lse == -torch.inf, 0)
        options = "", 0.0, float(request.scale)
        weights = _Products.apply(q, k, None, known, None, None, options, _dots(q, k, graph), edges, True)
        return _where_heard(weights, edges, request)
    scores = edge_scores(q, k, edges, graph, bias, request, heads)
    if request.normalize == "softmax":
        return _softmax(scores, lse, edges, request)
    return _where_heard(weights_by(request.normalize, scores), edges, request)


def reduced_weights(
    how: str, q: Tensor, k: Tensor, lse: Tensor | None, graph: Graph | Plan, bias: Bias | None, request: Request
) -> Tensor:
    """Their mean over the heads (B, E), their entropy (B, H, N), or what each key receives (B, H, M).

    Of so many heads at a time as have at most `MOST_NUMBERS` weights, or of one; the backward pass computes them again.
    A score that is no dot product is computed for all heads at once.
    """
    n, m, heads, group = q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1]
    edges = edges_of_heads(_own(graph), n, m, q.device)
    apart_by_head = request.parts.pair == "dot" and _own(graph).heads is None and not request.key_features

    def of_heads(q: Tensor, k: Tensor, lse: Tensor | None, bias: Bias | None, first: Tensor) -> Tensor:
        weights = _weights(q, k, lse, edges, graph, bias, request, first)
        match how:
            case "mean":
                return weights.sum(1) / heads
            case "received":
                return _sum_at(weights, edges.key, m)
        if _is_transformed():
            return _sum_at(-weights * weights.clamp(min=LEAST_WEIGHT).log(), edges.query, n)
        return _Entropy.apply(weights, edges.query, n)

    whole = not apart_by_head or torch.compiler.is_compiling() or _is_transformed()  # a compiler sees to the memory
    of_group = 0 if whole else len(edges.query) * len(q) * group
    if of_group * k.shape[1] <= MOST_NUMBERS:
        return of_heads(q, k, lse, bias, torch.arange(heads, device=q.device)[:, None]).to(q.dtype)
    found, groups = [], max(1, MOST_NUMBERS // of_group)  # at a time
    for first in range(0, k.shape[1], groups):
        own = slice(first * group, (first + groups) * group)
        sides = q[:, own], k[:, first : first + groups], None if lse is None else lse[:, own], _of_heads(bias, own)
        numbers = torch.arange(heads, device=q.device)[own, None]
        found.append(checkpoint(of_heads, *sides, numbers, use_reentrant=False))
        if how == "mean" and first:
            found = [found[0] + found[1]]
    return (found[0] if how == "mean" else torch.cat(found, 1)).to(q.dtype)


def at_queries(x: Tensor, k: Tensor, graph: Graph | Plan) -> Tensor:
    """Of numbers of the queries (B, H, N), those of the query of each edge, (B, H, E)."""
    return _at(x, edges_of_heads(_own(graph), x.shape[2], k.shape[2], x.device).query)


def _at(x: Tensor, nodes: Tensor) -> Tensor:
    """Of numbers (B, H, nodes), those of the nodes of the edges, (B, H, E)."""
    return x.index_select(2, nodes)


def _softmax(scores: Tensor, lse: Tensor | None, edges: EdgesOfHeads, request: Request) -> Tensor:
    """exp(scores - lse) of edges that are heard."""
    assert lse is not None
    return _where_heard((scores - _at(lse.masked_fill(lse == -torch.inf, 0), edges.query)).exp(), edges, request)


class _Entropy(torch.autograd.Function):
    """-Σ_j w_ij log w_ij, with 0 log 0 = 0: weights (B, H, E), query (E,) → (B, H, n)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, query: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(weights, query)
        return _sum_by_query(weights.clamp(min=LEAST_WEIGHT).log_().mul_(weights).neg_(), query, n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        weights, query = ctx.saved_tensors
        return (weights.clamp(min=LEAST_WEIGHT).log() + 1).neg() * _at(grad_outputs[0], query), None, None


def _where_heard(weights: Tensor, edges: EdgesOfHeads, request: Request) -> Tensor:
    """Weights of 0 for the edges of other heads, and of padding."""
    if edges.member.shape[0]:
        weights = weights.masked_fill(~edges.member, 0)
    if request.attention_mask is not None:
        weights = weights.masked_fill(~request.attention_mask[:, None, edges.key], 0)
    return weights


def _sum_at(x: Tensor, nodes: Tensor, count: int) -> Tensor:
    """(B, H, E) summed at the nodes of the edges: (B, H, count)."""
    return x.new_zeros(*x.shape[:2], count).index_add(2, nodes, x)


def _sum_by_query(x: Tensor, query: Tensor, n: int) -> Tensor:
    """The same for edges that are sorted by query, five times as fast on a CPU; torch can't transform it."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _sum_at(x, query, n)
    first = torch.searchsorted(query, torch.arange(n + 1, device=query.device))
    return torch.segment_reduce(x, "sum", offsets=first.expand(*x.shape[:2], -1).contiguous(), axis=2)


def _of_heads(bias: Bias | None, heads: slice) -> Bias | None:
    """A bias of some heads."""
    match bias:
        case Alibi():
            return replace(bias, slopes=bias.slopes[heads] if len(bias.slopes) > 1 else bias.slopes)
        case RelativeBias():
            return replace(bias, table=bias.table[heads] if len(bias.table) > 1 else bias.table)
        case Shifted():
            return replace(bias, bias=_of_heads(bias.bias, heads))
        case EdgeBias() | DenseBias():
            axis = bias.values.ndim - (2 if isinstance(bias, EdgeBias) else 3)
            if axis >= 0 and bias.values.shape[axis] > 1:
                return replace(bias, values=bias.values.movedim(axis, 0)[heads].movedim(0, axis))
    return bias


# ---------------------------------------------------------------------------------------------- scores by themselves


def edge_scores(
    q: Tensor,
    k: Tensor,
    edges: EdgesOfHeads,
    graph: Graph | Plan,
    bias: Bias | None,
    request: Request,
    heads: Tensor | None = None,
    by_head: bool = True,
) -> Tensor:
    """The scores after scale, bias and transforms: (B, H, E) in `edge_index` order, of at least float32.

    `heads` (H, 1) are the numbers of the heads, where they are not all. They lie in memory head after head, or edge
    after edge, where a kernel makes them.
    """
    pair, transforms = request.parts
    exact = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        features = request.edge_features if request.key_features else None
        if features is not None:
            check_edge_terms(features, len(edges.query))
        scores = _pair_scores(pair, q, k, features, edges, graph, request.scale, by_head).to(exact)
        if bias is not None:
            scores = scores + over_edges(bias, q, k, edges.query, edges.key).to(exact)
        heads = torch.arange(q.shape[1], device=q.device)[:, None] if heads is None else heads
        for transform in transforms:
            scores = transform(scores, heads)
    return scores


def _pair_scores(
    pair: Any,
    q: Tensor,
    k: Tensor,
    features: EdgeTerms | None,
    edges: EdgesOfHeads,
    graph: Graph | Plan,
    scale: float,
    by_head: bool,
) -> Tensor:
    """scale · what each pair makes of its vectors, (B, H, E): by a kernel where there is one."""
    weight, activation, slope, function = None, "", 0.0, dot if pair == "dot" else pair
    if pair == "additive":
        pair = function = Additive(q.new_ones(q.shape[3]))
    if isinstance(pair, Additive):
        weight = pair.weight.expand(q.shape[1], q.shape[3])
        activation, slope = pair.fused or "a function", pair.negative_slope
    fused = isinstance(pair, Additive) and pair.fused is not None
    known = pair == "dot" or fused if features is None else fused and q.device.type == "cpu"
    options = activation, slope, float(scale)
    values, to_key = (None, None) if features is None else (features.values, features.to_key)
    if known and torch.compiler.is_compiling() and makes_products(q):
        return products(q, k, weight, values, to_key, edges.query, *options, *pack(_own(graph)))
    if known and _has_kernel(q, k):
        layout = _dots(q, k, graph) if weight is None else csr_of_heads(_own(graph), q.shape[2], k.shape[2], q.device)
        return _Products.apply(q, k, weight, None, values, to_key, options, layout, edges, by_head)
    if q.dtype in (torch.float16, torch.bfloat16) and (pair == "dot" or features is not None):
        q, k = q.float(), k.float()
    return streamed(function, q, k, edges.query, edges.key, features) * scale


def _is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether a kernel makes the scores of an eager call."""
    if torch.compiler.is_compiling() or _is_transformed():
        return False
    return bool(q.numel() and k.numel()) and makes_products(q)


def _dots(q: Tensor, k: Tensor, graph: Graph | Plan) -> CSR | Tiles:
    """The edges as a kernel of dot products reads them: the tiles of a plan that has them."""
    if isinstance(graph, Plan) and graph.tiles is not None:
        return graph.tiles
    return csr_of_heads(_own(graph), q.shape[2], k.shape[2], q.device)


class _Products(torch.autograd.Function):
    """`products` of a kernel: q (B, H, N, D), k (B, Hkv, M, D), weight (H, D) or None → (B, H, E).

    With lse (B, H, N), w = exp(product - lse); then dproduct = w · dw, and dlse = -Σ_j w_ij dw_ij. With values (B or 1,
    E, F) and to_key (Hkv, D, F), k_ij = k_j + K e_ij.
    """

    @staticmethod
    def forward(ctx: Any, q, k, weight, lse, values, to_key, options, layout: CSR | Tiles, edges, by_head: bool):
        found = _products(q, k, weight, _of_keys(values, to_key), layout, *options, lse=lse, by_head=by_head)
        ctx.save_for_backward(q, k, weight, lse, values, to_key, None if lse is None else found)
        ctx.options, ctx.layout, ctx.edges = options, layout, edges
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any):
        (q, k, weight, lse, values, to_key, weights), (grad,) = ctx.saved_tensors, grad_outputs
        sides, needed = (q, k, weight, lse, values, to_key), ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _differentiable_gradients(grad, sides, needed, ctx.options, ctx.edges)
        else:
            dproducts = grad if weights is None else grad * weights
            dlse = None if lse is None else -_sum_by_query(dproducts, ctx.edges.query, lse.shape[2])
            features = _of_keys(values, to_key, needed[4])
            found = _products_backward(dproducts, q, k, weight, features, ctx.layout, *ctx.options)
            gradients = *found[:3], dlse, *found[3:]
        return *gradients, None, None, None, None


def _of_keys(values: Tensor | None, to_key: Tensor | None, needs_grad: bool = False) -> EdgeTerms | None:
    """Features of edges that are added to their keys, if there are some."""
    return None if values is None else EdgeTerms(values, to_key, None, needs_grad)


def _differentiable_gradients(grad, sides, needs_grad, options: tuple, edges: EdgesOfHeads) -> list[Any]:
    """The gradients of the sides of `_Products`, along all edges at once: they can be differentiated again."""
    activation, slope, scale = options
    q, k, weight, lse, values, to_key = sides = apart(*sides)
    function, features = dot if weight is None else Additive(weight, activation, slope), _of_keys(values, to_key)
    k_of_edges = k[:, :, edges.key] if features is None else features.added_to(k[:, :, edges.key], to_key)
    k_of_heads = k_of_edges.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    found = function(q[:, :, edges.query], k_of_heads) * scale
    found = found if lse is None else (found - _at(lse, edges.query)).exp()
    asked = [side for side, needed in zip(sides, needs_grad, strict=True) if needed]
    gradients = iter(torch.autograd.grad(found, asked, grad.to(found.dtype), create_graph=True))
    return [next(gradients) if needed else None for needed in needs_grad]


def _products(
    q: Tensor, k: Tensor, weight: Tensor | None, features: EdgeTerms | None, layout: CSR | Tiles,
    activation: str, slope: float, scale: float, lse: Tensor | None = None, by_head: bool = True,
) -> Tensor:  # fmt: skip
    q, k = (side.detach() if q.device.type == "cuda" else side.detach().to(_exact(side)) for side in (q, k))
    weight = None if weight is None else weight.detach().to(q.dtype)
    if isinstance(layout, Tiles):
        return products_of_tiles().products(q, k, layout, scale, lse)
    more = {} if features is None else {"features": features}
    return products_of(q).products(q, k, weight, layout, scale, activation, slope, lse, by_head, **more)


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, weight: Tensor | None, features: EdgeTerms | None, layout: CSR | Tiles,
    activation: str, slope: float, scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients of q, k, weight, values and to_key, that of values where asked for."""
    q_, k_ = (side.detach() if q.device.type == "cuda" else side.detach().to(_exact(side)) for side in (q, k))
    weight_ = None if weight is None else weight.detach().to(q_.dtype)
    if isinstance(layout, Tiles):
        dq, dk = products_of_tiles().products_backward(grad, q_, k_, layout, scale)
        return dq.to(q.dtype), dk.to(k.dtype), None, None, None
    more = {} if features is None else {"features": features}
    given = grad, q_, k_, weight_, layout, scale, activation, slope
    dq, dk, dweight, *dfeatures = products_of(q).products_backward(*given, **more)
    dweight = None if weight is None else dweight.to(weight.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dweight, *(dfeatures or (None, None))


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------------------------------------ in compiled programs


@torch.library.custom_op("attngraph::products", mutates_args=())
def products(
    q: Tensor, k: Tensor, weight: Tensor | None, values: Tensor | None, to_key: Tensor | None, query: Tensor,
    activation: str, slope: float, scale: float, graph: str, tensors: list[Tensor],
) -> Tensor:  # fmt: skip
    """As `_Products`, in a program that is being compiled: `query` (E,) says how many edges there are."""
    layout = csr_of_heads(unpack(graph, tensors), q.shape[2], k.shape[2], q.device)
    return _products(q, k, weight, _of_keys(values, to_key), layout, activation, slope, scale).contiguous()


@products.register_fake
def _(q, k, weight, values, to_key, query, *rest):
    return q.new_empty(*q.shape[:2], query.shape[0], dtype=_exact(q))


@torch.library.custom_op("attngraph::products_backward", mutates_args=())
def products_backward(
    grad: Tensor, q: Tensor, k: Tensor, weight: Tensor | None, values: Tensor | None, to_key: Tensor | None,
    activation: str, slope: float, scale: float, graph: str, tensors: list[Tensor], values_grad: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, weight, values and to_key; each empty where there is none, or none is asked for."""
    layout = csr_of_heads(unpack(graph, tensors), q.shape[2], k.shape[2], q.device)
    features = _of_keys(values, to_key, values_grad)
    gradients = _products_backward(grad.contiguous(), q, k, weight, features, layout, activation, slope, scale)
    return [q.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients]


@products_backward.register_fake
def _(grad, q, k, weight, values, to_key, activation, slope, scale, graph, tensors, values_grad):
    sides = q, k, weight, values if values_grad else None, to_key
    return [q.new_empty(0) if side is None else side.new_empty(side.shape) for side in sides]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *sides, _, activation, slope, scale, ctx.graph, tensors = inputs
    ctx.options = activation, slope, scale
    ctx.save_for_backward(*sides, *tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    sides, tensors = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
    found = products_backward(grad, *sides, *ctx.options, ctx.graph, tensors, ctx.needs_input_grad[3])
    gradients = [gradient if asked else None for gradient, asked in zip(found, ctx.needs_input_grad, strict=False)]
    return *gradients, None, None, None, None, None, [None] * len(tensors)


def _not_twice(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("compiled programs can be differentiated once; attend outside of torch.compile again and again")


products.register_autograd(_gradients, setup_context=_save)
products_backward.register_autograd(_not_twice)
