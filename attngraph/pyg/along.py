"""`attend` along an `edge_index`, as PyG's layers ask for it: eagerly, and as an operator of compiled programs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attngraph.attention import attend
from attngraph.bias import EdgeBias
from attngraph.edge_features import EdgeFeatures
from attngraph.kernels.scoring import Additive, LeakyReLU, Score
from attngraph.pyg.edges import Edges


class Attention(NamedTuple):
    """What a layer asks of `attend`: q (…, N, H, D), k and v (…, M, H, ·), of one set of features or of several."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float = 1.0
    score: str = "dot"
    """ "dot"; "leaky_relu", of a dot product; or "additive", weight · LeakyReLU(q + k)."""
    slope: float = 0.0
    """Of the LeakyReLU, below 0."""
    dropout_p: float = 0.0
    weight: Tensor | None = None
    """Of an additive score: (H, D)."""
    edge_scores: Tensor | None = None
    """Added to the scores of the edges, as they were given: (E, H)."""
    edge_attr: Tensor | None = None
    """Features of the edges, as they were given: (E, F)."""
    to_key: Tensor | None = None
    """What makes a part of their keys of these: (H, D, F)."""
    to_value: Tensor | None = None
    """And of their values: (H, Dv, F)."""


def weights_along(asked: Attention, columns: Tensor) -> Tensor:
    """The weights before dropout, (…, E, H), as the edges were given: of values of no numbers."""
    own = asked._replace(v=asked.v[..., :0], to_value=None, dropout_p=0.0)
    own = own._replace(edge_attr=None) if own.to_key is None else own
    return attend_along(own, columns, True)[1]


def attend_along(asked: Attention, columns: Tensor, wants_weights: bool = False) -> tuple[Tensor, Tensor]:
    """Along edges (2, E) → out (…, N, H, Dv), and weights (…, E, H) as the edges were given: (0,) unless wanted."""
    if not torch.compiler.is_compiling():
        return _attend(asked, columns, wants_weights)
    seed = torch.randint(2**31 - 1, ()) if asked.dropout_p else None
    return edge_attention(columns, wants_weights, seed, *asked)


def _attend(
    asked: Attention, columns: Tensor, wants_weights: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    edges = Edges.between(columns, asked.k.shape[-3], asked.q.shape[-3])
    dtype = torch.promote_types(torch.promote_types(asked.q.dtype, asked.k.dtype), asked.v.dtype)
    sides = asked.q.to(dtype), edges.of_sources(asked.k.to(dtype)), edges.of_sources(asked.v.to(dtype))
    q, k, v = ((side if side.ndim == 4 else side[None]).transpose(1, 2) for side in sides)
    options: dict[str, Any] = {"scale": asked.scale, "dropout_p": asked.dropout_p, "score": _score(asked)}
    if generator is not None:
        options["generator"] = generator
    if asked.edge_scores is not None:
        options["bias"] = EdgeBias.sorted(edges.sorted(asked.edge_scores).T)
    if asked.edge_attr is not None:
        features = edges.sorted(asked.edge_attr)
        options["edge_features"] = EdgeFeatures.sorted(features, to_key=asked.to_key, to_value=asked.to_value)
    weights = q.new_empty(0)
    with torch.autocast(q.device.type, enabled=False):  # what the layer made under it decides, as in PyG
        if wants_weights:
            found = attend(q, k, v, edges.graph, return_weights=True, **options)
            out, weights = cast("tuple[Tensor, Tensor]", found)
            weights = edges.as_given(weights.transpose(1, 2))
            weights = weights if asked.q.ndim == 4 else weights.squeeze(0)
        else:
            out = cast(Tensor, attend(q, k, v, edges.graph, **options))
    out = out.transpose(1, 2).contiguous()
    return (out if asked.q.ndim == 4 else out.squeeze(0)), weights  # whose gradient is a view, unlike that of out[0]


def _score(asked: Attention) -> Score:
    match asked.score:
        case "leaky_relu":
            return LeakyReLU(asked.slope, of="dot")
        case "additive":
            assert asked.weight is not None
            return Additive(asked.weight, "leaky_relu", asked.slope)
    return "dot"


# ------------------------------------------------------------------------------------------- in compiled programs


@torch.library.custom_op("attngraph::edge_attention", mutates_args=())
def edge_attention(
    columns: Tensor, wants_weights: bool, seed: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, scale: float, score: str, slope: float, dropout_p: float,
    weight: Tensor | None, edge_scores: Tensor | None, edge_attr: Tensor | None,
    to_key: Tensor | None, to_value: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend_along`, whose edges are known when the program runs."""
    rest = scale, score, slope, dropout_p, weight, edge_scores, edge_attr, to_key, to_value
    out, weights = _attend(Attention(q, k, v, *rest), columns, wants_weights, _generator(seed))
    return out.clone(), weights.contiguous()


@edge_attention.register_fake
def _(columns, wants_weights, seed, q, k, v, *rest):
    shape = (*q.shape[:-3], columns.shape[1], q.shape[-2]) if wants_weights else (0,)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(shape)


@torch.library.custom_op("attngraph::edge_attention_backward", mutates_args=())
def edge_attention_backward(
    dout: Tensor, dweights: Tensor, columns: Tensor, wants_weights: bool, seed: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, scale: float, score: str, slope: float, dropout_p: float,
    weight: Tensor | None, edge_scores: Tensor | None, edge_attr: Tensor | None,
    to_key: Tensor | None, to_value: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of all tensors, of those that are there: attention is computed once more for them."""
    sides = [q, k, v, weight, edge_scores, edge_attr, to_key, to_value]
    with torch.enable_grad(), _differentiable():
        sides = [None if side is None else side.detach().requires_grad_() for side in sides]
        q, k, v, *rest = cast(Any, sides)
        asked = Attention(q, k, v, scale, score, slope, dropout_p, *rest)
        results = _attend(asked, columns, wants_weights, _generator(seed))
        given = [side for side in sides if side is not None]
        found = zip(results, (dout, dweights), strict=True)
        outputs, gradients = zip(*(pair for pair in found if pair[0].requires_grad), strict=True)
        found = torch.autograd.grad(outputs, given, gradients, allow_unused=True)
    return [
        side.new_zeros(side.shape) if own is None else own.contiguous().clone()
        for side, own in zip(given, found, strict=True)
    ]


@edge_attention_backward.register_fake
def _(dout, dweights, columns, wants_weights, seed, q, k, v, scale, score, slope, dropout_p, *rest):
    return [side.new_empty(side.shape) for side in (q, k, v, *rest) if side is not None]


@contextmanager
def _differentiable() -> Iterator[None]:
    """An operator runs below autograd: back to where torch remembers what leads to its results."""
    with torch._C._PreserveDispatchKeyGuard():
        for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


def _generator(seed: Tensor | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator(seed.device).manual_seed(int(seed))


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    columns, ctx.wants_weights, seed, q, k, v, *ctx.numbers, weight, scores, attr, to_key, to_value = inputs
    ctx.save_for_backward(columns, seed, q, k, v, weight, scores, attr, to_key, to_value)


def _gradients(ctx: Any, dout: Tensor, dweights: Tensor) -> tuple:
    columns, seed, q, k, v, *rest = ctx.saved_tensors
    given = edge_attention_backward(
        dout.contiguous(), dweights.contiguous(), columns, ctx.wants_weights, seed, q, k, v, *ctx.numbers, *rest
    )
    found = iter(given)
    dq, dk, dv, *others = (None if side is None else next(found) for side in (q, k, v, *rest))
    return None, None, None, dq, dk, dv, None, None, None, None, *others


edge_attention.register_autograd(_gradients, setup_context=_save)
