"""`attend`, the one operation: it validates, chooses a backend and calls its kernel. Only here are inputs validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, amp
from torch.autograd import forward_ad
from torch.nn.functional import pad

from attngraph.bias import Bias, DenseBias, EdgeBias
from attngraph.graph.base import Graph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.patterns import Causal
from attngraph.kernels.dense import dense, logsumexp
from attngraph.kernels.edge import edges
from attngraph.kernels.reference import reference
from attngraph.kernels.scoring import NORMALIZERS, SCORES
from attngraph.planning.execution import attend_forward, planned
from attngraph.planning.layouts import dense as layout
from attngraph.planning.planner import BACKENDS, Plan, Request, closed_form, fast_on


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Plan,
    *,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    score: str | Callable[[Tensor, Tensor], Tensor] = "dot",
    normalize: str | Callable[[Tensor], Tensor] = "softmax",
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
    if isinstance(bias, Tensor):
        bias = DenseBias(bias)
    _check(q, k, v, graph, bias, scale, score, normalize, dropout_p)
    if return_lse and normalize != "softmax":
        raise ValueError(f"return_lse needs normalize='softmax' (got {normalize!r}): other weights have no common sum")
    request = Request(score, normalize, dropout_p, return_lse, return_weights)
    if scale is None:
        scale = max(q.shape[3], 1) ** -0.5 if score == "dot" else 1.0
    run = RUN[_choose(backend, q, k, graph, bias, request)]
    out, lse, weights = run(q, k, v, graph, bias, scale, backend, request)
    asked = (True, return_lse, return_weights)
    found = [part[0] if unbatched else part for part, wanted in zip((out, lse, weights), asked, strict=True) if wanted]
    return found[0] if len(found) == 1 else tuple(found)


# ---------------------------------------------------------------------- one function a backend: layout, kernel


def _run_reference(q, k, v, graph, bias, scale, _, request):
    if isinstance(bias, EdgeBias):
        _check_edge_bias(bias, graph.num_edges(q.shape[2], k.shape[2]), q)
    elif bias is not None:
        bias = DenseBias(_over_pairs(bias, q, k, None).double())
    options = {"dropout_p": request.dropout_p, "score": request.score, "normalize": request.normalize}
    out, lse, weights = reference(q, k, v, graph, bias=bias, scale=scale, **options)
    if request.return_weights:
        key, query = graph.edge_index(q.shape[2], k.shape[2]).to(q.device)
        weights = weights[:, :, query, key].to(q.dtype)
    return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32)), weights


def _run_edges(q, k, v, graph, bias, scale, _, request):
    query, key, member = layout.edges(graph.text, q.shape[2], k.shape[2], q.device)
    if bias is not None:
        if isinstance(bias, EdgeBias):
            _check_edge_bias(bias, query.shape[0], q)
        elif isinstance(bias, DenseBias):
            bias = _full(bias, q, k)
        edge = torch.arange(query.shape[0], device=q.device)
        bias = _for_heads(bias.at(query, key, edge), q, edges=1)
    options = {"dropout_p": request.dropout_p, "score": request.score, "normalize": request.normalize}
    return edges(q, k, v, query, key, member, bias=bias, scale=scale, **options)


def _run_dense(q, k, v, graph, bias, scale, _, request):
    n, m, mask, graph = q.shape[2], k.shape[2], None, graph.graph if isinstance(graph, Plan) else graph
    closed = closed_form(graph)
    causal = type(closed) is Causal
    if closed is None or (causal and bias is not None):
        mask, causal = layout.mask(graph.text, n, m, q.device), False
    if bias is not None:
        bias = _over_pairs(bias, q, k, graph)
    out = dense(q, k, v, mask, causal=causal, bias=bias, scale=scale, dropout_p=request.dropout_p)
    lse = logsumexp(q, k, mask, causal=causal, bias=bias, scale=scale) if request.return_lse else None
    return out, lse, None


def _run_planned(q, k, v, graph, bias, scale, backend, request):
    if _dual(q, k, v):
        raise RuntimeError(
            "tiles, rows and plans have no forward-mode derivatives; backend='edges' and 'reference' have"
        )
    if not q.shape[3]:  # all scores are 0: as those of one number that is
        q, k = pad(q, (0, 1)), pad(k, (0, 1))
    kind, values, of_query = _planned_bias(bias, q, k)
    exact = torch.promote_types(q.dtype, torch.float32)
    values = None if values is None else values.to(exact)
    out, lse = attend_forward(q, k, v, values, kind, graph.text, backend, float(scale))
    if of_query is not None:  # the same for all that a query hears: its weights do not change
        heard = of_query.masked_fill(of_query == -torch.inf, 0)
        out = out.masked_fill(of_query == -torch.inf, 0) + (0 * heard).to(q.dtype)  # NaN where it is NaN or inf
        lse = lse + of_query[..., 0].to(exact)
    return out, lse, None


def _in_autocast(*sides: Tensor) -> list[Tensor]:
    """In autocast's dtype, as PyTorch's own attention takes them, whatever the backend."""
    dtype = torch.get_autocast_dtype(sides[0].device.type)
    eligible = lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64  # noqa: E731
    return [side.to(dtype) if eligible(side) else side for side in sides]


def _functorch() -> bool:
    """Whether a transform of `torch.func` runs, which custom operators with a gradient do not know."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device, some of which have none; a compiled program is not for those."""
    return (torch.compiler.is_compiling() or amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def _dual(*sides: Tensor) -> bool:
    """Whether forward-mode derivatives are asked for."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(side).tangent is not None for side in sides)


RUN = {
    "reference": _run_reference, "edges": _run_edges, "dense": _run_dense, "tiles": _run_planned, "rows": _run_planned,
    "plan": _run_planned,
}  # fmt: skip


def _choose(backend: str, q: Tensor, k: Tensor, graph: Graph | Plan, bias: Bias | None, request: Request) -> str:
    """The key of RUN for this request."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} (got {backend!r})")
    if isinstance(graph, Plan):
        return _choose_of_plan(backend, graph, bias, request)
    if backend != "auto":
        if beyond := request.beyond(backend):
            others = [name for name in BACKENDS[1:] if not request.beyond(name)]
            raise ValueError(
                f"backend={backend!r} can't do {beyond}; backend={others[-1]!r} and 'reference' can, and 'auto' chooses"
            )
        return backend
    if request.beyond("dense") or _dual(q, k):
        return "edges"
    if closed_form(graph) is not None and _for_flash(q, k, request):
        told = request.return_lse and q.device.type == "cuda"  # SDPA keeps it to itself there; a plan's kernels do not
        return "plan" if told and bias is None and not request.dropout_p and not _functorch() else "dense"
    sparse = isinstance(graph, EdgeList) and len(graph.code) * PAIRS_PER_EDGE < q.shape[2] * k.shape[2]
    unplanned = not fast_on(q.device) or (torch.compiler.is_compiling() and bias is not None) or _functorch()
    if request.beyond("tiles") or unplanned:
        return "edges" if sparse else "dense"
    if torch.compiler.is_compiling():
        return "plan"  # which is made in the operator: a compiled program serves many sizes
    parts = planned(graph.text, q, k, "auto", None if bias is None else _planned_kind(bias)).parts
    return "dense" if [part.backend for part in parts] == ["dense"] and not parts[0].layout.lengths else "plan"


def _for_flash(q: Tensor, k: Tensor, request: Request) -> bool:
    """Whether Causal() or Full() runs by PyTorch's own kernel without a look at its plan.

    On a CPU, tiles are faster in long calls in full precision, and in those alone.
    """
    if q.device.type != "cpu" or request.beyond("tiles") or torch.compiler.is_compiling() or _functorch():
        return True
    return q.numel() * k.shape[2] < SHORT_CALL or q.dtype.itemsize < 4


def _choose_of_plan(backend: str, plan: Plan, bias: Bias | None, request: Request) -> str:
    kind = None if bias is None else _planned_kind(bias)
    if kind not in (None, plan.bias):
        raise ValueError(f"the plan was made for bias={plan.bias!r} (got one of kind {kind!r}): plan(…, bias={kind!r})")
    if backend != "auto":
        raise ValueError(
            f"a plan has chosen its backends: leave out backend={backend!r}, or plan(…, backend={backend!r})"
        )
    for part in plan.parts:
        if beyond := request.beyond(part.backend):
            raise ValueError(f"{plan} can't do {beyond}; attend with the graph itself chooses a backend that can")
    whole = request.dropout_p or kind  # which dense does as a whole, not as a part
    return "dense" if whole and any(part.backend == "dense" for part in plan.parts) else "plan"


SHORT_CALL = 1 << 26  # B · H · N · M · D of a millisecond
PAIRS_PER_EDGE = 64  # gathering one edge costs about as much as this many pairs of a dense product


# ------------------------------------------------------------------------------------------------------ biases


def _planned_kind(bias: Bias) -> str:
    return "edge" if isinstance(bias, EdgeBias) else "dense" if isinstance(bias, DenseBias) else "offset"


def _planned_bias(bias: Bias | None, q: Tensor, k: Tensor) -> tuple[str, Tensor | None, Tensor | None]:
    """A bias as kernels take it: its kind and values; and apart, what of it is the same for all keys, (…, N, 1)."""
    n, m = q.shape[2], k.shape[2]
    if bias is None:
        return "", None, None
    kind = _planned_kind(bias)
    if kind == "offset":  # of j - i alone
        ahead = torch.arange(1 - n, m, device=q.device) if n and m else torch.arange(0, device=q.device)
        return kind, _for_heads(bias.at((-ahead).clamp(min=0), ahead.clamp(min=0)), q, edges=1), None
    values = _for_heads(bias.values, q, edges=1 if kind == "edge" else 2)
    values = values.view(*[1] * (2 + (kind == "dense") + 1 - values.ndim), *values.shape)
    if kind == "edge":
        return kind, values, None
    if values.shape[2] not in (1, n) or values.shape[3] not in (1, m):
        raise ValueError(f"a bias tensor must broadcast to (B, H, {n}, {m}) (got {tuple(bias.values.shape)})")
    return ("", None, values) if values.shape[3] == 1 != m else (kind, values, None)


def _over_pairs(bias: Bias, q: Tensor, k: Tensor, graph: Graph) -> Tensor:
    """A bias for all pairs: a tensor that broadcasts to (B, H, N, M)."""
    n, m = q.shape[2], k.shape[2]
    if isinstance(bias, DenseBias):
        return _full(bias, q, k).values
    if isinstance(bias, EdgeBias):
        query, key, _ = layout.edges(graph.text, n, m, q.device)
        _check_edge_bias(bias, query.shape[0], q)
        values = bias.values.new_zeros(*bias.values.shape[:-1], n * m).index_copy(-1, query * m + key, bias.values)
        return _for_heads(values.unflatten(-1, (n, m)), q, edges=2)
    query, key = torch.arange(n, device=q.device)[:, None], torch.arange(m, device=q.device)[None]
    return _for_heads(bias.at(query, key), q, edges=2)


def _full(bias: DenseBias, q: Tensor, k: Tensor) -> DenseBias:
    """A dense bias with its last two dimensions written out."""
    values, n, m = bias.values, q.shape[2], k.shape[2]
    if values.shape[-2] not in (1, n) or values.shape[-1] not in (1, m):
        raise ValueError(f"a bias tensor must broadcast to (B, H, {n}, {m}) (got {tuple(values.shape)})")
    return DenseBias(_for_heads(values.expand(*values.shape[:-2], n, m), q, edges=2))


def _for_heads(values: Tensor, q: Tensor, edges: int) -> Tensor:
    """The same values, if their leading dimensions fit (B, H); else an error."""
    lead = values.shape[: values.ndim - edges]
    fits = all(given in (1, own) for given, own in zip(reversed(lead), (q.shape[1], q.shape[0]), strict=False))
    if len(lead) > 2 or not fits:
        raise ValueError(f"a bias must fit {q.shape[1]} heads and a batch of {q.shape[0]} (got one for {tuple(lead)})")
    return values


def _check_edge_bias(bias: EdgeBias, count: int, q: Tensor) -> None:
    if torch.compiler.is_compiling():
        torch._check(bias.values.shape[-1] == count)
    elif bias.values.shape[-1] != count:
        raise ValueError(
            f"EdgeBias needs one value for each of the graph's {count} edges, in edge_index order (got "
            f"{bias.values.shape[-1]}); an EdgeList merges edges given twice: values[..., graph.order]"
        )
    _for_heads(bias.values, q, edges=1)


# -------------------------------------------------------------------------------------------------- validation


def _check(q, k, v, graph, bias, scale, score, normalize, dropout_p) -> None:
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
        if side.dtype != q.dtype or side.device != q.device:
            raise ValueError(
                f"q, k and v must have one dtype and one device (got q {q.dtype} on {q.device}, "
                f"{name} {side.dtype} on {side.device})"
            )
        if side.shape[0] != q.shape[0]:
            raise ValueError(f"q, k and v must have the same batch size (got q {q.shape[0]}, {name} {side.shape[0]})")
    if isinstance(graph, Plan):
        _check_plan(graph, q, k)
        graph = graph.graph
    if not isinstance(graph, Graph):
        hint = "a mask becomes one by from_dense(mask)"
        if isinstance(graph, type) and issubclass(graph, Graph):
            hint = f"did you mean {graph.__name__}()?"
        raise TypeError(f"graph must be a Graph (got {type(graph).__name__}); {hint}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number (got a tensor); multiply q by the tensor instead, and scale=1")
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
    (_, H, N, D), (_, Hkv, M, Dk) = q.shape, k.shape
    if Dk != D:
        raise ValueError(f"q and k must have the same head dimension (got {D} and {Dk})")
    if v.shape[1] != Hkv or v.shape[2] != M:
        raise ValueError(f"k and v must have the same heads and nodes (got {tuple(k.shape)} and {tuple(v.shape)})")
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"the number of query heads must be a multiple of the key heads (got {H} and {Hkv})")
    for name, side, own, given in (("query", "q", graph.size[0], N), ("key", "k", graph.size[1], M)):
        if own is not None and own != given:
            raise ValueError(
                f"graph has {own} {name} nodes but {side} has {given}; build the graph for {given} of them"
            )
    if graph.heads is not None and graph.heads != H:
        raise ValueError(f"graph has {graph.heads} heads but q has {H}; give PerHead one graph for each head")
    for name, given, names in (("score", score, SCORES), ("normalize", normalize, ("softmax", *NORMALIZERS))):
        if given not in names if isinstance(given, str) else not callable(given):
            raise ValueError(f"{name} must be a function or one of {', '.join(names)} (got {given!r})")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a probability below 1 (got {dropout_p})")


def _check_plan(plan: Plan, q: Tensor, k: Tensor) -> None:
    made, given = (plan.n, plan.m, plan.heads), (q.shape[2], k.shape[2], q.shape[1])
    if made != given or plan.device != q.device:
        raise ValueError(
            f"the plan was made for {made[0]} queries, {made[1]} keys and {made[2]} heads on {plan.device} (got "
            f"{given[0]}, {given[1]} and {given[2]} on {q.device}); make one for these, or attend with the graph itself"
        )
