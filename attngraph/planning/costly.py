"""A warning, once, where an argument of `attend` costs far more than a call without it: how much, and what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from attngraph import cache
from attngraph.kernels.scoring import ANY_FUNCTION, TRANSFORMED
from attngraph.planning.call import Call

if TYPE_CHECKING:
    from attngraph.planning.planner import Plan

MOST_TIMES, MOST_BYTES = 4, 1 << 30
LEAST_SECONDS = 0.02  # below, a call costs too little to speak of


def plain_call(call: Call) -> Call:
    """The same without what costs more."""
    plain = call._replace(score="dot", normalize="softmax", dropout=False, return_weights=False, transform=None)
    return plain._replace(key_features=0, value_features=0)


def warn_if_costly(plan: Plan, plain_seconds: Callable[[], float]) -> None:
    """Warn, once for each argument, of a call that takes over 4 times the plain one, or over 1 GiB for one entry."""
    call = plan.call
    found = _reason(call)
    kept = sum(_bytes_per_pair(plan, part.backend.name) * part.edges for part in plan.parts) * call.heads
    if found is None or (kept <= MOST_BYTES and plan.seconds < LEAST_SECONDS) or cache.WARNED.get(found[0]):
        return
    times = plan.seconds / max(plain_seconds(), 1e-9)
    if times <= MOST_TIMES and kept <= MOST_BYTES:
        return
    cache.WARNED.keep(found[0], True)
    argument, remedy = found
    memory = f" and {kept / 2**30:.1f} GiB" if kept > MOST_BYTES else ""
    warnings.warn(
        f"{argument} is expected to take about {times:.0f} times the plain call{memory} for each batch entry, on "
        f"{str(plan.graph)[:80]}: {remedy}. plan(…).explain() shows what was asked",
        RuntimeWarning,
        stacklevel=5,
    )


def _reason(call: Call) -> tuple[str, str] | None:
    """The argument that keeps the fast kernels from running the call, and what to do about it."""
    if call.transform is not None:
        return (
            call.transform,
            "backward passes of kernels can't be transformed; torch.autograd.grad can be used instead",
        )
    if call.score == ANY_FUNCTION:
        return "score=a function", "Additive, SoftCap, LeakyReLU and Temperature are made by kernels"
    if call.score == TRANSFORMED:
        return "score=a function of a dot product", "SoftCap and LeakyReLU alone run in the kernels of attention"
    if call.normalize == ANY_FUNCTION:
        return "normalize=a function", "those with names run in the kernels: sigmoid, none, relu, squared_relu"
    if call.edge_features:
        return "edge_features", "rows on a CPU, with Numba, add them without vectors of all edges and heads"
    if call.dropout:
        return "dropout_p", "backend='auto' drops weights in its kernels"
    if call.score == "additive":
        return "score=Additive", "a dot product runs in tiles, where most pairs are edges"
    return None


def _bytes_per_pair(plan: Plan, backend: str) -> int:
    """What a backend holds for each edge and head, or each pair."""
    call, number = plan.call, max(plan.call.number_bytes, 4)
    match backend:
        case "edges":
            return number * (2 * call.head_dim + 2 * call.value_dim)
        case "steps":
            return 4 * number
        case "dense" if call.dropout:
            return 6 * number * call.num_queries * call.num_keys // max(plan.edges, 1)
    return 0
