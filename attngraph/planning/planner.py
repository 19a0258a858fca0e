"""Choosing how a graph runs: which parts of it by which backend. `plan` is the verb, `Plan` the answer.

The planner lists candidates (one backend for all edges; tiles beside rows; a flash kernel beside rows; reordered
nodes), asks the backends what each would take, and keeps the cheapest. All plans of a graph compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attngraph import cache
from attngraph.arguments import checked
from attngraph.draw import notebook
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, of_each_head
from attngraph.graph.patterns import Causal
from attngraph.graph.rewrite import simplify
from attngraph.kernels.available import why_not
from attngraph.kernels.contract import BiasKind
from attngraph.kernels.scoring import (
    ANY_FUNCTION,
    NORMALIZER_NAMES,
    SCORE_NAMES,
    Elementwise,
    Score,
    require_function,
    score_name,
)
from attngraph.planning import backends, explain
from attngraph.planning.backends import BACKENDS, Backend, kernel_for
from attngraph.planning.backends.base import INSTALLED, only_fused_attention
from attngraph.planning.call import Call, normalizer_name
from attngraph.planning.costly import plain_call, warn_if_costly
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet, closed_form
from attngraph.planning.layouts.materialized import edges_of_heads
from attngraph.planning.layouts.tiles import Tiles
from attngraph.planning.reordering import bandwidth_order

MERGE_SAFETY_FACTOR = 1.25  # a plan of two parts must promise to be so much faster: estimates are no more exact
FLASH_SAFETY_FACTOR = 1.1  # so must another way than PyTorch's own kernel, where that fits the graph exactly
MIN_REORDERED_EDGES, MAX_REORDERED_EDGES = 1 << 12, 1 << 24  # unless reorder=True: it takes seconds
MAX_CLOSED_PAIRS = 1 << 31  # of Causal() or Full(): beyond, looking at all their tiles takes longer than it is worth
MAX_MASKED_PAIRS = 1 << 31  # beyond, a mask takes 2 GiB
TRACED_PAIRS_PER_EDGE = 64  # in compiled programs, where sizes are symbols: an edge gathered costs as many masked pairs


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a graph's edges, and what runs them."""

    backend: Backend
    layout: Any
    edges: int
    pairs: int
    """Scores that are computed for each head."""
    seconds: float
    """Expected, forward, for all its heads of one batch entry."""
    why: str
    heads: tuple[int, ...] | None = None
    """None: all of them."""
    order: Tensor | None = None
    """The nodes in the order of the layout, where they were reordered."""
    edge_numbers: Tensor | None = None
    """Of each edge of these heads, its number among the edges that any head has."""

    @property
    def is_all(self) -> bool:
        """Whether it runs all heads, the nodes in their own order."""
        return self.heads is None and self.order is None


@dataclass(frozen=True, eq=False)
class Plan:
    """How one graph runs at one size on one device; `attend(q, k, v, plan)` runs it. See `plan`.

    Immutable, and never a change of meaning: every plan of a graph computes the same function.
    """

    graph: Graph
    call: Call
    """What it was made for."""
    parts: tuple[Part, ...]
    candidates: dict[str, float | str]
    """What was asked, in seconds of a forward pass, or why it can't be; the chosen ones included."""
    chosen: tuple[str, ...]
    """Those of the candidates that were taken, for each group of heads with a graph of its own."""
    edges: int
    """As `graph.num_edges`."""
    edge_values: int
    """The edges that any head has: as many as an EdgeBias has values."""
    costs: Costs
    notes: tuple[str, ...] = ()
    _handle: Tensor = field(init=False)
    _state: tuple = field(init=False)
    """What a function that the graph is made of read when the plan was made."""

    def __post_init__(self):
        object.__setattr__(self, "_state", self.graph._state() if self.graph._may_change else ())
        handle = cache.COMPILED.register(f"<plan {next(_NUMBERS)}>", self)[2]
        object.__setattr__(self, "_handle", handle)

    def _write_traced(self, tensors: list[Tensor]) -> str:
        """As `Graph._write_traced`."""
        if torch.compiler.is_exporting():
            raise ValueError("a plan can't be part of an exported program, as it holds layouts: export with its graph")
        tensors.append(self._handle)
        return "_0"

    def __reduce__(self) -> tuple:
        return Plan, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    def __deepcopy__(self, memo: dict) -> Plan:
        return self  # a value

    @property
    def nbytes(self) -> int:
        """How much memory the layouts take."""
        return sum(getattr(part.layout, "nbytes", 0) for part in self.parts)

    @property
    def seconds(self) -> float:
        """The expected time of one forward pass of all heads of one batch entry."""
        return sum(part.seconds for part in self.parts)

    def runs_whole(self, call: Call) -> bool:
        """Whether a call runs by one backend's `attend`, which torch differentiates."""
        if len(self.parts) != 1 or not self.parts[0].is_all:
            return False
        return self.parts[0].backend.runs_whole(self.parts[0].layout, call)

    @property
    def in_steps(self) -> bool:
        """Whether scores come first, and attention by them next: see `planning.steps`."""
        return any(part.backend.name == "steps" for part in self.parts)

    @property
    def reads_by_head(self) -> bool:
        """Whether the values of an `EdgeBias` are read head after head, rather than all heads of an edge at once."""
        return all(part.backend.reads_by_head for part in self.parts)

    @property
    def tiles(self) -> Tiles | None:
        """All edges in tiles by which a kernel can make their scores too, if they are what runs."""
        if len(self.parts) != 1 or not self.parts[0].is_all or not self.parts[0].backend.makes_products:
            return None
        return self.parts[0].layout

    @property
    def takes_no_dims(self) -> bool:
        """Whether keys may be of dimension 0."""
        return all(part.backend.takes_no_dims for part in self.parts)

    def require_unchanged(self) -> None:
        """Raise if what the graph's functions read has changed since, so that its edges may be others."""
        if self.graph._may_change and self._state != self.graph._state():
            raise ValueError(f"what {self.graph} reads has changed since the plan was made: make a new one")

    @checked
    def explain(
        self,
        *,
        dropout_p: float | None = None,
        score: Score | None = None,
        normalize: str | Elementwise | None = None,
        padding: bool | None = None,
        return_weights: bool | None = None,
    ) -> str:
        """What runs, why, at what expected cost, and what else was asked and answered: a table to read.

        With options of `attend`, how a call with these would run, and how many times as long it is expected to take.
        """
        given = {
            "dropout": None if dropout_p is None else dropout_p > 0,
            "score": None if score is None else _name("score", score),
            "normalize": None if normalize is None else _name("normalize", normalize),
            "padding": padding,
            "return_weights": return_weights,
        }
        call = self.call._replace(**{name: value for name, value in given.items() if value is not None})
        if call == self.call:
            return explain.explain(self)
        other = _made(self.graph, call, "auto", costs=self.costs)
        times = other.seconds / max(self.seconds, 1e-9)
        return f"{explain.explain(other)}\nexpected to take {times:.2f} times as long as this plan's own call"

    def _repr_html_(self) -> str:
        """In a notebook: the graph's picture, its facts, and how it runs."""
        n, m = self.call.num_queries, self.call.num_keys
        facts, picture = notebook.graph_facts(self.graph, n, m), notebook.graph_picture(self.graph, n, m)
        return notebook.page(repr(self), facts, picture, self.explain())

    def __repr__(self) -> str:
        parts = ", ".join(f"{part.backend.name} {part.edges:,}" for part in self.parts)
        return f"Plan({self.graph}, {self.call.num_queries} × {self.call.num_keys}: {parts or 'no edges'})"


_NUMBERS = count(1)


@checked
def plan(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    bias: BiasKind | None = None,
    padding: bool = False,
    dropout: bool = False,
    score: Score = "dot",
    normalize: str | Elementwise = "softmax",
    return_weights: bool = False,
    reorder: bool | None = None,
    costs: Costs | None = None,
) -> Plan:
    """How a graph runs at n queries and m keys: `attend` makes a plan of each graph by itself; this shows or fixes it.

    Args:
        graph: who hears whom; n and m may be left out where it knows them.
        heads: how many query heads, for the expected cost.
        head_dim: the dimension of keys and values, for the expected cost.
        dtype: of the tensors.
        device: where the tensors will be.
        backend: "auto", or the one backend for all edges.
        bias: the kind of bias that will be added, None, "offset" (Alibi, RelativeBias), "dense" or "edge" (EdgeBias):
            with the last the edges are not cut into parts, with any nodes are not reordered.
        padding: whether an attention_mask will leave out keys.
        dropout: whether weights will be dropped.
        score, normalize: as in `attend`; "a function" stands for one of your own.
        return_weights: whether weights will be asked for.
        reorder: whether the nodes of an EdgeList may be put into another order, so that its edges lie closer together;
            None is where it pays (SciPy's reverse Cuthill–McKee).
        costs: how fast the machine is; by default see `Costs.here`.

    >>> print(plan(Window(256, 0), 100_000, 100_000, heads=8))
    Plan(Window(256, 0), 100000 × 100000: tiles 25,667,104)

    Raises:
        ValueError: sizes that do not fit, or a backend that can't run here.
        MemoryError: layouts that need more memory than there is, before they are made.
    """
    require_ints(1, heads=heads)
    require_ints(0, head_dim=head_dim)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype of a plan must be a floating-point torch.dtype (got {dtype!r})")
    _, n, m = at_size(graph, n, m)
    call = Call(
        n, m, heads, heads, head_dim, head_dim, dtype, _definite(torch.device(device)), bias,
        score=_name("score", score), normalize=_name("normalize", normalize), padding=padding, dropout=dropout,
        return_weights=return_weights,
    )  # fmt: skip
    return _made(graph, call, backend, reorder, costs)


def _name(option: Literal["score", "normalize"], given: Any) -> str:
    """A score or normaliser in a `Call`; "a function" stands for itself."""
    if isinstance(given, str) and given == ANY_FUNCTION:
        return given
    require_function(option, given, SCORE_NAMES if option == "score" else NORMALIZER_NAMES)
    return score_name(given) if option == "score" else normalizer_name(given)


def planned(graph: Graph, call: Call, name: str) -> Plan:
    """The plan of a call, made once; of those made here, the latest are kept."""
    plans = cache.PLANS if call.device.type == "cpu" else cache.PLANS_ON_GPU
    key = graph, graph._state() if graph._may_change else (), call[:-1], name
    found = plans.get(key)
    if found is None:
        with cache.outside_of_transforms():
            found = plans.keep(key, _made(graph, call, name))
            if name == "auto":
                warn_if_costly(found, lambda: _seconds(graph, plain_call(call), found.costs))
    return found


def traced(graph: Graph | Plan, call: Call, name: str) -> Backend | None:
    """The backend of a call that is being compiled, where sizes are symbols; None: an operator that looks up a plan."""
    if isinstance(graph, Plan):
        reason = only_fused_attention(call) or (None if name == "auto" else "it has chosen its backends")
        if reason is not None:
            raise ValueError(f"a plan can't run this call in a compiled program ({reason}); the graph itself can")
        if not torch.compiler.is_compiling():  # else when the program runs
            _require_same_sizes(graph, call)
        return None
    if name != "auto":
        require(name, call)
        found = kernel_for(name, call)
        if found is None or (found.merges and name != "dense"):
            return None
        if type(found).traced_layout is Backend.traced_layout:
            raise ValueError(f"backend={name!r} can't run this call: it has no layout for compiled programs")
        return found
    dense, edges, steps = BACKENDS["dense"], BACKENDS["edges"], BACKENDS["steps"]
    has_dense = dense.supports(call) is None
    closed = closed_form(graph)
    if has_dense and closed is not None and not call.dropout and not (call.padding and isinstance(closed, Causal)):
        return dense
    if (kernel_for("tiles", call) is not None and call.device.type == "cpu") or kernel_for("rows", call) is not None:
        return None
    if steps.supports(call) is None:
        return steps
    if not has_dense:
        return edges
    few = isinstance(graph, EdgeList) and len(graph.code) * TRACED_PAIRS_PER_EDGE < call.num_queries * call.num_keys
    return edges if few else dense


def require(name: str, call: Call) -> None:
    """Raise unless a backend of this name can run the call."""
    if name not in backends.names():
        raise ValueError(f"backend must be one of auto, {', '.join(backends.names())} (got {name!r})")
    if kernel_for(name, call) is not None:
        return
    reasons = backends.reasons(name, call)
    alike = len(set(reasons.values())) == 1
    why = [*reasons.values()][:1] if alike else [f"{label}: {reason}" for label, reason in reasons.items()]
    *others, last = [repr(other) for other in backends.names()[::-1] if kernel_for(other, call) is not None]
    able = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(f"backend={name!r} can't run this call: {'; '.join(why)}; backend={able} can, and 'auto' chooses")


def fitted(plan: Plan, call: Call, name: str = "auto") -> Plan:
    """A plan that was made by hand, for a call of another dtype too; raise if it can't run the call."""
    _require_same_sizes(plan, call)
    if call.bias not in (None, plan.call.bias):
        made = f"the plan was made for bias={plan.call.bias!r}"
        raise ValueError(f"{made} (got one of kind {call.bias!r}): plan(…, bias={call.bias!r})")
    if name != "auto":
        raise ValueError(f"a plan has chosen its backends: leave out backend={name!r}, or plan(…, backend={name!r})")
    plan.require_unchanged()
    call = call._replace(part=call.part or not plan.runs_whole(call))
    reasons = [reason for part in plan.parts if (reason := part.backend.supports(call)) is not None]
    if not plan.parts and (reason := only_fused_attention(call)) is not None:
        raise _not_made_for(plan, call, reason)
    if not reasons:
        return plan
    others = [_another_kernel(part.backend, call) for part in plan.parts]
    if any(other is None for other in others):
        raise _not_made_for(plan, call, reasons[0])
    parts = zip(plan.parts, others, strict=True)
    return replace(plan, parts=tuple(replace(part, backend=other) for part, other in parts))


def _not_made_for(plan: Plan, call: Call, reason: str) -> ValueError:
    """The error of a plan that can't run a call: with what options another one is made, if that is what it lacks."""
    options = {name: getattr(call, name) for name in ("score", "normalize", "padding", "dropout", "return_weights")}
    more = [f"{name}={value!r}" for name, value in options.items() if value not in (False, getattr(plan.call, name))]
    remedy = f"plan(…, {', '.join(more)}), or " if more else ""
    return ValueError(f"{plan} can't run this call ({reason}); {remedy}attend with the graph itself chooses what can")


def _require_same_sizes(plan: Plan, call: Call) -> None:
    """Raise unless a plan was made for so many nodes and heads, on this device."""
    made, given = ((each.num_queries, each.num_keys, each.heads) for each in (plan.call, call))
    if made != given or call.device != plan.call.device:
        raise ValueError(
            f"the plan was made for {made[0]} queries, {made[1]} keys and {made[2]} heads on {plan.call.device} (got "
            f"{given[0]}, {given[1]} and {given[2]} on {call.device}); make one for these, or attend with the graph "
            f"itself"
        )


def _another_kernel(backend: Backend, call: Call) -> Backend | None:
    """The first backend that reads the same layouts and can run the call."""
    other = kernel_for(backend.name, call)
    return other if other is not None and other.tiling.tile == backend.tiling.tile else None


def _definite(device: torch.device) -> torch.device:
    """The GPU that "cuda" means now, as tensors name theirs."""
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"a plan for {device} needs a GPU, and torch sees none; device='cpu' is here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


# ---------------------------------------------------------------------------------------------------- candidates


class Candidate(NamedTuple):
    """A way to run the edges of one graph: what it is expected to take, and how its parts are made."""

    name: str
    seconds: float
    build: Callable[[], list[Part]]


def _made(graph: Graph, call: Call, name: str, reorder: bool | None = None, costs: Costs | None = None) -> Plan:
    """The plan of a graph for a call, by the backend of this name, or the best for "auto"."""
    if name != "auto":
        require(name, call)
    costs = costs or Costs.here(call.device)
    bound, n, m = at_size(graph, call.num_queries, call.num_keys)
    if bound.heads is not None and bound.heads != call.heads:
        raise ValueError(f"graph has {bound.heads} heads (got heads={call.heads})")
    with call.device if call.device.type == "cuda" else nullcontext():  # layouts are made where they are used
        groups = _groups(bound) if _merges(call, name) else {simplify(bound): None}
        choices = []
        for own_graph, heads in groups.items():
            own = call if heads is None else call._replace(heads=len(heads), part=len(groups) > 1)
            choices.append(_Choice(own_graph, own, name, reorder, costs))
        parts, candidates, notes = [], {}, []
        for choice, heads in zip(choices, groups.values(), strict=True):
            numbers = None
            if heads is not None and call.bias == "edge":
                numbers = edges_of_heads(graph, n, m, torch.device("cpu")).member[heads[0]].nonzero()[:, 0]
            parts += [replace(part, heads=heads, edge_numbers=numbers) for part in choice.parts()]
            notes += [note for note in choice.notes if note not in notes]
            for label, answer in choice.candidates.items():
                known = candidates.get(label, 0.0)
                either = answer if isinstance(answer, str) else known
                candidates[label] = either if isinstance(either, str) else either + answer
    count = sum(part.edges for part in parts) if bound.heads is None else count_edges(bound, n, m)
    edges = count if bound.heads is None else sum(of_each_head(bound, n, m, count_edges))
    chosen = tuple(dict.fromkeys(choice.best.name for choice in choices))
    return Plan(graph, call, tuple(parts), candidates, chosen, edges, count, costs, tuple(notes))


def _seconds(graph: Graph, call: Call, costs: Costs) -> float:
    """What a call is expected to take, without layouts."""
    bound, _, _ = at_size(graph, call.num_queries, call.num_keys)
    groups = _groups(bound) if _merges(call, "auto") else {simplify(bound): None}
    calls = {own: call if heads is None else call._replace(heads=len(heads)) for own, heads in groups.items()}
    return sum(_Choice(own, each, "auto", None, costs).best.seconds for own, each in calls.items())


def _merges(call: Call, name: str) -> bool:
    """Whether heads with graphs of their own may run one after the other."""
    allowed = [each for each in BACKENDS.values() if name in ("auto", each.name)]
    return any(each.merges and each.supports(call._replace(part=True)) is None for each in allowed)


def _groups(bound: Graph) -> dict[Graph, tuple[int, ...] | None]:
    """The different graphs of the heads, simplified, with the heads that have each; None: all of them."""
    if bound.heads is None:
        return {simplify(bound): None}
    groups: dict[Graph, list[int]] = {}
    for h in range(bound.heads):
        groups.setdefault(simplify(bound._head(h)), []).append(h)
    if len(groups) == 1:
        return {simplify(bound._head(0)): None}
    return {graph: tuple(heads) for graph, heads in groups.items()}


class _Choice:
    """The candidates for one graph that is bound to its size, and the best of them."""

    def __init__(self, graph: Graph, call: Call, name: str, reorder: bool | None, costs: Costs):
        self.call, self.name, self.reorder, self.costs = call, name, reorder, costs
        self.edges = EdgeSet(graph, call.num_queries, call.num_keys)
        self.notes: list[str] = []
        self.candidates: dict[str, float | str] = {}
        self.ways: list[Candidate] = []
        self._ask()
        self.best = self._best()

    def parts(self) -> list[Part]:
        """The parts of the best candidate."""
        found = self.best.build()
        return [part for part in found if part.edges or part.backend.runs_whole(part.layout, self.call)]

    def _best(self) -> Candidate:
        best = min(self.ways, key=lambda way: way.seconds)
        flash = next((way for way in self.ways if way.name == "dense"), None)
        if self.edges.closed_form is not None and flash is not None:
            return flash if best.seconds * FLASH_SAFETY_FACTOR > flash.seconds else best
        return best

    def _add(self, name: str, seconds: float, build: Callable[[], list[Part]]) -> None:
        self.candidates[name] = seconds
        self.ways.append(Candidate(name, seconds, build))

    def _ask(self) -> None:
        """Every backend, those that know their cost without a look at the edges first; then what they do together."""
        able: dict[str, Backend] = {}
        for label, backend in BACKENDS.items():
            if self.name not in ("auto", backend.name):
                continue
            reason = self._reason(backend, able)
            if reason is None:
                able[backend.name] = backend
            else:
                self.candidates[label] = reason
        # Tiles before those that only count: they list what can't be counted anyway.
        for backend in sorted(able.values(), key=lambda each: (each.name != "dense", not each.merges)):
            least = backend.overhead(self.edges, self.call, self.costs)
            if self.ways and least >= min(way.seconds for way in self.ways):
                self.candidates[backend.label] = f"at least {explain.time(least)}, as its calls alone take"
                continue
            seconds = backend.estimate(self.edges, self.call, self.costs)
            if (rest := backend.rest(self.call)) is not None:
                seconds += _seconds(self.edges.graph, rest, self.costs)
            self._add(backend.label, seconds, lambda each=backend, s=seconds: [self._part(each, self.edges, s)])
        if self.name == "auto":
            self._ask_together(able)

    def _reason(self, backend: Backend, able: dict[str, Backend]) -> str | None:
        """Why a backend is not asked what it would take."""
        reason = backend.supports(self.call)
        if reason is None and self.name == "auto":
            reason = backend.only_by_name(self.call)
        if reason is None and backend.name in able:
            return f"{able[backend.name].label} can, and is faster"
        if reason is None and self.name == "auto" and backend.name != "dense":
            pairs = self.call.num_queries * self.call.num_keys
            if closed_form(self.edges.graph) is not None and pairs > MAX_CLOSED_PAIRS:
                return "a flash kernel does just this, and there are too many tiles to look at"
        masked = backend.name == "dense" and self.edges.closed_form is None and self.edges.documents is None
        if reason is None and self.name == "auto" and masked:
            pairs = self.call.num_queries * self.call.num_keys
            return f"its mask would have {pairs:,} entries" if pairs > MAX_MASKED_PAIRS else None
        return reason

    def _ask_together(self, able: dict[str, Backend]) -> None:
        """Candidates of two parts, and of reordered nodes."""
        tiles, rows, dense = able.get("tiles"), able.get("rows"), able.get("dense")
        looked = {way.name for way in self.ways}
        if rows is None and tiles is not None:
            why = "; ".join(backends.reasons("rows", self.call).values())
            self.notes.append(f"no rows ({why}): single edges run in tiles of their own")
        if rows is None:
            return
        if tiles is not None and tiles.label in looked and self.call.bias != "edge":
            self._ask_tiles_and_rows(tiles, rows, self.edges, "tiles + rows")
            if (reordered := self._reordered(tiles)) is not None:
                self._ask_tiles_and_rows(tiles, rows, reordered, "reordered")
        if dense is not None and rows.label in looked and not self.call.bias:
            self._ask_flash_and_rows(dense, rows)

    def _ask_tiles_and_rows(self, tiles: Backend, rows: Backend, edges: EdgeSet, name: str) -> None:
        """Each tile by the backend that is cheaper for its edges."""
        tiling = tiles.tiling
        lie = edges.tabulated(tiling)
        sides = lie.edges_per_tile, lie.blocks_per_tile, self.call, self.costs
        in_tiles = tiles.tile_seconds(*sides) <= rows.tile_seconds(*sides)
        cut = [(tiles, edges.select(tiling, in_tiles)), (rows, edges.select(tiling, ~in_tiles))]
        cut = [(backend, some) for backend, some in cut if some.count]
        if len(cut) < 2 and edges.order is None:
            return  # it is one of the candidates above
        times = [backend.estimate(some, self.call, self.costs) for backend, some in cut]
        seconds = sum(times) if len(cut) < 2 else self._merged(sum(times))
        if edges.order is not None:
            moved = 4 * self.costs.merge_s_per_result_dim * self.call.head_dim * edges.n  # q, k, v and out
            seconds = 0.0 if self.reorder else seconds + moved * self.call.heads
        self._add(name, seconds, lambda: [self._part(*each, s) for each, s in zip(cut, times, strict=True)])

    def _ask_flash_and_rows(self, dense: Backend, rows: Backend) -> None:
        """Causal() or Full() by a flash kernel, and the listed edges beside it by rows."""
        banded = self.edges.banded
        if self.edges.closed_form is not None or closed_form(banded) is None or len(self.edges.beside_bands[1][0]):
            return
        tiling = rows.tiling
        lie = self.edges.tabulated(tiling)
        listed = torch.arange(len(lie.edges_per_tile)) >= len(lie.table.row)
        around, beside = EdgeSet(banded, self.edges.n, self.edges.m), self.edges.select(tiling, listed)
        cut = [(dense, around), (rows, beside)]
        times = [backend.estimate(some, self.call, self.costs) for backend, some in cut]
        build = lambda: [self._part(*each, s) for each, s in zip(cut, times, strict=True)]  # noqa: E731
        self._add("dense + rows", self._merged(sum(times)), build)

    def _merged(self, seconds: float) -> float:
        """Of two parts, which take so many seconds by themselves."""
        results = self.call.num_queries * self.call.head_dim * self.call.heads
        return MERGE_SAFETY_FACTOR * (seconds + self.costs.merge_s_per_result_dim * results)

    def _reordered(self, tiles: Backend) -> EdgeSet | None:
        """The edges after the nodes were put into an order in which they lie close together, if that may pay."""
        lie = self.edges.tabulated(tiles.tiling)
        square = self.edges.n == self.edges.m and not len(lie.table.row) and len(lie.query) >= MIN_REORDERED_EDGES
        if self.reorder is False or self.call.bias or self.call.dropout or not square:
            return None
        if len(lie.query) > MAX_REORDERED_EDGES and not self.reorder:
            edges = f"{len(lie.query):,} edges"
            self.notes.append(f"the nodes were not reordered: for {edges} it takes long; reorder=True does")
            return None
        missing = "that needs SciPy, pip install scipy"
        if not INSTALLED["scipy"] or (missing := why_not("scipy.sparse.csgraph", "scipy")):
            self.notes.append(f"the nodes were not reordered: {missing}")
            return None
        return self.edges.reordered(bandwidth_order(lie.query, lie.key, self.edges.n), tiles.tiling)

    def _part(self, backend: Backend, edges: EdgeSet, seconds: float) -> Part:
        """A part of the plan: its layout is built now."""
        layout = backend.build(edges, self.call)
        why, pairs = backend.describe(edges, layout, self.call), backend.pairs(edges, layout)
        order = edges.order if backend.name == "tiles" else None  # the list of edges names nodes by their own numbers
        return Part(backend, layout, edges.count, pairs, seconds, why, order=order)
