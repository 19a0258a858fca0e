"""A plan as a table to read: what runs, why, what it is expected to take, and what else was asked and answered."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from attngraph.graph.listing import count_edges, of_each_head

if TYPE_CHECKING:
    from attngraph.planning.planner import Plan


def explain(plan: Plan) -> str:
    """See `Plan.explain`."""
    call = plan.call
    pairs = call.num_queries * call.num_keys * (plan.graph.heads or 1)
    graph = plan.graph if plan.stands_for is None else f"{plan.stands_for}, expected as {plan.graph}"
    lines = [
        f"{graph}: {call.num_queries:,} queries, {call.num_keys:,} keys, {_edges(plan)} "
        f"({plan.edges / max(pairs, 1):.2%} of all pairs)",
        f"{call.heads} heads of dimension {call.head_dim}, {_options(plan)} on {call.device}; "
        f"layouts of {memory(plan.nbytes)}",
        "",
        f"{'part':16}{'heads':>6}{'edges':>16}{'pairs computed':>18}{'GFLOP':>10}{'bytes':>10}{'expected':>12}   why",
    ]
    for part in plan.parts:
        heads = len(part.heads or range(call.heads))
        flops = 4 * part.pairs * call.mean_dim * heads
        nodes = 2 * (call.num_queries + call.num_keys)
        moved = getattr(part.layout, "nbytes", 0) + int(call.number_bytes * call.mean_dim) * heads * nodes
        lines.append(
            f"{part.backend.label:16}{heads:6}{part.edges:16,}{part.pairs:18,}{flops / 1e9:10.2f}{memory(moved):>10}"
            f"{time(part.seconds):>12}   {part.why}"
        )
    lines += ["", "asked:"]
    by_head = any(part.heads for part in plan.parts)  # then each of their graphs has its own choice
    if by_head:
        lines.append(f"  {'heads apart':18}{time(plan.seconds)}  <- chosen: {', '.join(plan.chosen)}")
    for name, answer in sorted(plan.candidates.items(), key=lambda each: (isinstance(each[1], str), str(each[0]))):
        mark = "  <- chosen" if name in plan.chosen and not by_head else ""
        lines.append(f"  {name:18}{answer if isinstance(answer, str) else time(answer)}{mark}")
    lines += [f"note: {note}" for note in plan.notes]
    lines.append(f"expected times: one forward pass of one batch entry, by {plan.costs.source}")
    return "\n".join(lines)


def _edges(plan: Plan) -> str:
    """How many; where heads have each their own graph, of which heads."""
    if plan.graph.heads is None:
        return f"{plan.edges:,} edges"
    counts = Counter(of_each_head(plan.graph, plan.call.num_queries, plan.call.num_keys, count_edges))
    return f"{plan.edges:,} edges of all heads, " + " + ".join(f"{of} × {each:,}" for each, of in counts.items())


def _options(plan: Plan) -> str:
    """The options of the call that decide what can run it."""
    call = plan.call
    options = [str(call.dtype).removeprefix("torch.")]
    options += [f"bias {call.bias!r}"] if call.bias else []
    options += [f"score {call.score!r}"] if call.score != "dot" else []
    options += [f"normalize {call.normalize!r}"] if call.normalize != "softmax" else []
    options += ["padding"] if call.padding else []
    options += ["dropout"] if call.dropout else []
    options += ["weights returned"] if call.return_weights else []
    options += [f"under {call.transform}"] if call.transform else []
    return ", ".join(options)


def time(seconds: float) -> str:
    """A duration, for people."""
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def memory(size: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
