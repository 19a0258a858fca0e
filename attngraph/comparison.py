"""One graph, and attention on it as others compute it: time, memory, and whether all agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attngraph.analysis import is_causal
from attngraph.arguments import checked
from attngraph.attention import attend
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.boxes import require_memory
from attngraph.graph.patterns import Causal
from attngraph.interop.flex import to_block_mask
from attngraph.measuring import cost, failure, in_turn, milliseconds, ratios
from attngraph.planning.costs import Costs
from attngraph.planning.planner import plan

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FORWARD, BOTH = "forward", "forward + backward"
BOTH_OVER_FORWARD = 3.5  # the time of both passes over that of the forward one, about
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}  # largest relative difference of right results; half precision: 3e-2
OURS, PYG = "attngraph", "PyG"
RECOMPILES = 256  # of FlexAttention in a process: beyond PyTorch's limit, 8, it would run uncompiled


class Timing(NamedTuple):
    """How one contestant did in one phase."""

    name: str
    phase: str
    """"forward" or "forward + backward"."""
    ms: tuple[float, float, float] | None
    """Milliseconds a call: first quartile, median, third quartile; None if it failed."""
    over_ours: float | None
    """Its time over ours, turn by turn, the median."""
    mib: float | None
    """By how many MiB a call raised the memory in use at its highest; None where that can't be known."""
    failure: str = ""
    """Why there are no figures."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; as text, a table."""

    title: str
    timings: tuple[Timing, ...]

    def __str__(self) -> str:
        head = ("", "", "ms (quartiles)", "over ours", "MiB")
        lines = [head, *(_row(timing) for timing in self.timings)]
        whole = [line for line in lines if len(line) == len(head)]  # a failure runs through the last columns
        widths = [max(map(len, column)) for column in zip(*(line[:2] for line in lines), strict=True)]
        widths += [max(map(len, column)) for column in zip(*(line[2:] for line in whole), strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines)
        return "\n".join([self.title, *(line.rstrip() for line in padded)])

    __repr__ = __str__


def _row(timing: Timing) -> tuple[str, ...]:
    if timing.ms is None:
        return timing.phase, timing.name, timing.failure
    low, middle, high = timing.ms
    over = "" if timing.over_ours is None else f"{timing.over_ours:.2f}"
    mib = "" if timing.mib is None else f"{timing.mib:.1f}"
    return timing.phase, timing.name, f"{middle:.2f} ({low:.2f} … {high:.2f})", over, mib


@checked
def compare(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    batch: int = 1,
    heads: int = 8,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 7,
    limit: float = 10.0,
) -> Comparison:
    """Attention on a graph, forward and backward, beside what PyTorch and PyG offer, on this machine, now.

    Contestants, as far as they can run: `attend`; PyTorch's `scaled_dot_product_attention` with a dense mask and, where
    all edges are causal, with `is_causal` (which computes all causal pairs); FlexAttention, compiled; and what PyG's
    TransformerConv does, gather, softmax over each node's edges, add up. Results are compared with one another; then
    all run in turn. Nothing else should run meanwhile. It takes some seconds, and where FlexAttention is compiled, half
    a minute more.

    Args:
        graph: who hears whom; n and m may be left out where it knows them.
        batch, heads, head_dim, dtype, device: of q, k and v, which are random.
        repeats: turns of each.
        limit: seconds; what takes longer a call, or is expected to, is left out, and said so.

    >>> print(compare(Causal() & Window(16, 0), 256, heads=2, head_dim=16, repeats=3))  # doctest: +SKIP
    Causal() & Window(16, 0), 256 × 256: 4,216 edges (6.4%); batch 1, 2 heads of 16, float32 on cpu
                        ms (quartiles)        over ours  MiB
    forward  attngraph  0.25 (0.24 … 0.26)    1.00       0.1
    …
    """
    require_ints(1, batch=batch, heads=heads, head_dim=head_dim, repeats=repeats)
    if not limit > 0:
        raise ValueError(f"limit must be a number of seconds above 0 (got {limit})")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, such as torch.bfloat16 (got {dtype})")
    _, n, m = at_size(graph, n, m)
    if n == 0 or m == 0:
        raise ValueError(f"n and m must be at least 1: there is nothing to compare (got {n} and {m})")
    if graph.heads not in (None, heads):
        raise ValueError(f"graph has {graph.heads} heads (got heads={heads})")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch can use (got {device}, and torch sees no GPU)")
    vectors = 12 * (n + m) * batch * heads * head_dim * dtype.itemsize  # inputs, results and gradients
    require_memory(vectors, f"for q, k, v and their gradients at {n:,} × {m:,}", device)
    edges = graph.num_edges(n, m)
    share = edges / max(n * m * (graph.heads or 1), 1)
    match = _Match(graph, n, m, edges, (batch, heads, head_dim), dtype, device, repeats, limit)
    where = f"batch {batch}, {heads} heads of {head_dim}, {str(dtype).removeprefix('torch.')} on {device}"
    title = f"{graph}, {n:,} × {m:,}: {edges:,} edges ({share:.2%}); {where}"
    with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        return Comparison(title, tuple(match.timings()))


class _TooSlow(Exception):
    """A call takes longer than its limit."""


@dataclass
class _Match:
    """Contestants on one graph; `expected` seconds of a forward call guard against calls that can't be stopped."""

    graph: Graph
    n: int
    m: int
    edges: int
    shape: tuple[int, int, int]  # batch, heads, head_dim
    dtype: torch.dtype
    device: torch.device
    repeats: int
    limit: float

    def timings(self) -> Iterator[Timing]:
        batch, heads, dim = self.shape
        chance = torch.Generator(self.device).manual_seed(0)
        q, k, v, dout = (
            torch.randn(batch, heads, nodes, dim, generator=chance, device=self.device).to(self.dtype)
            for nodes in (self.n, self.m, self.m, self.n)
        )
        # In memory, PyG's layers have the nodes first; the heads first suit the others.
        of_pyg = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in (q, k, v, dout)]
        contestants = {OURS: self.ours, "SDPA with a mask": self.sdpa, "SDPA is_causal, all pairs": self.sdpa_causal}
        contestants |= {"FlexAttention": self.flex, PYG: self.pyg}
        built: dict[str, Attend | Exception] = {}
        for name, build in contestants.items():
            try:
                built[name] = build()
            except Exception as error:
                built[name] = error
        for phase in (FORWARD, BOTH):
            sides = {name: [q, k, v, dout] for name in contestants} | {PYG: of_pyg}
            for side in (*sides[OURS][:3], *of_pyg[:3]):
                side.requires_grad_(phase == BOTH)
            calls: dict[str, Callable[[], list[Tensor]]] = {}
            failures: dict[str, str] = {}
            memory: dict[str, float | None] = {}
            results: dict[str, list[Tensor]] = {}
            for name, attention in built.items():
                try:
                    if isinstance(attention, Exception):
                        raise attention
                    calls[name] = partial(_call, phase, attention, *sides[name])
                    results[name] = calls[name]()  # compiled, and warm
                    seconds, memory[name] = cost(calls[name])
                    if seconds > self.limit:
                        raise _TooSlow(f"a call took {seconds:.2g} s, and may take {self.limit:g}")
                except Exception as error:
                    calls.pop(name, None)
                    built[name] = error
                    failures[name] = str(error) if isinstance(error, _TooSlow) else failure(error, 130)
            for name, error in self.errors(results).items():
                failures[name] = f"wrong by {error:.1g}"
                calls.pop(name, None)
            times = in_turn(calls, self.repeats, seconds=self.limit)
            for name in contestants:
                if name not in calls:
                    yield Timing(name, phase, None, None, None, failures[name])
                    continue
                low, middle, high = milliseconds(times[name])
                over = ratios(times[name], times[OURS])[1] if OURS in times else None
                yield Timing(name, phase, (low, middle, high), over, memory[name])

    def errors(self, results: dict[str, list[Tensor]]) -> dict[str, float]:
        """Whose results are not those of the first other contestant, and how far from them."""
        same = {name: found for name, found in results.items() if "all pairs" not in name or self.graph == Causal()}
        names = sorted(same, key=lambda name: name == OURS)
        allowed, wrong = EXACT.get(self.dtype, 3e-2), {}
        for name in names[1:]:
            for found, right in zip(same[name], same[names[0]], strict=True):
                scale = right.abs().max().clamp(min=1) if right.numel() else 1
                error = float(((found - right).abs().max() if right.numel() else 0) / scale)
                if not error < allowed:  # NaN is wrong
                    wrong[name] = max(error, wrong.get(name, 0.0))
        return wrong

    # ------------------------------------------------------------------------------------------------- contestants

    def ours(self) -> Attend:
        made = plan(
            self.graph, self.n, self.m,
            heads=self.shape[1], head_dim=self.shape[2], dtype=self.dtype, device=self.device,
        )  # fmt: skip
        return partial(attend, graph=made)

    def sdpa(self) -> Attend:
        self.guard(self.costs.masked_s_per_pair_dim * self.n * self.m)
        return partial(scaled_dot_product_attention, attn_mask=self.graph.mask(self.n, self.m, self.device))

    def sdpa_causal(self) -> Attend:
        if not (self.n == self.m and is_causal(self.graph, self.n)):
            raise _TooSlow("not all edges are causal")
        self.guard(self.costs.flash_s_per_pair_dim * self.n * self.m / 2)
        return partial(scaled_dot_product_attention, is_causal=True)

    def flex(self) -> Attend:
        from torch.nn.attention.flex_attention import flex_attention  # takes longer than all of attngraph

        block_mask = to_block_mask(self.graph, self.n, self.m, device=self.device)
        self.guard(self.costs.masked_s_per_pair_dim * self.n * self.m * (1 - block_mask.sparsity() / 100))
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask)

    def pyg(self) -> Attend:
        if self.graph.heads is not None:
            raise _TooSlow("heads with graphs of their own are not one edge_index")
        self.guard(self.costs.gather_s_per_edge_dim * self.edges)
        batch, heads, dim = self.shape
        require_memory(3 * self.edges * heads * dim * self.dtype.itemsize, "for vectors of every edge", self.device)
        key, query = self.graph.edge_index(self.n, self.m).to(self.device)
        attention = gather_scatter(query, key, self.n, dim**-0.5)

        def by_nodes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outs = [attention(*(side[b].transpose(0, 1) for side in (q, k, v))) for b in range(batch)]
            return torch.stack(outs).transpose(1, 2)

        return by_nodes

    @property
    def costs(self) -> Costs:
        return Costs.here(self.device)

    def guard(self, seconds_per_dim: float) -> None:
        """Refuse what is expected to take too long."""
        batch, heads, dim = self.shape
        expected = BOTH_OVER_FORWARD * seconds_per_dim * batch * heads * dim
        if expected > self.limit:
            raise _TooSlow(f"expected to take {expected:.2g} s a call, and may take {self.limit:g}")


def _call(phase: str, attention: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """The result (forward), or the gradients of q, k and v."""
    if phase == FORWARD:
        with torch.no_grad():
            return [attention(q, k, v)]
    return list(torch.autograd.grad(attention(q, k, v), (q, k, v), dout))


def gather_scatter(query: Tensor, key: Tensor, num_queries: int, scale: float, sort: bool = True) -> Attend:
    """What PyG's TransformerConv does between its projections, along edges (E,), (E,): q, k, v (N, H, D) → (N, H, D).

    With `sort`, edges come sorted by query, and softmax goes by the first edge of each node; else by query.
    """
    from torch_geometric.utils import softmax

    ptr = torch.nn.functional.pad(torch.bincount(query, minlength=num_queries).cumsum(0), (1, 0)) if sort else None

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q.index_select(0, query) * k.index_select(0, key)).sum(-1) * scale  # (E, H)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = softmax(scores, None if sort else query, ptr, num_nodes=num_queries).to(v.dtype)
        out = v.new_zeros(num_queries, *v.shape[1:])
        return out.index_add(0, query, v.index_select(0, key) * weights[..., None])

    return attention
