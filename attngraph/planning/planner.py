"""Choosing how a graph runs: which parts of it by which backend. `plan` is the verb, `Plan` the answer.

The planner lists candidates (one backend for all edges; tiles beside rows; a flash kernel beside rows; reordered
nodes), asks the backends what each would take, and keeps the cheapest. All plans of a graph compute the same function.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import count
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attngraph import cache
from attngraph.arguments import checked
from attngraph.bias import Bias, placed, score_bias
from attngraph.edge_features import EdgeFeatures, edge_terms
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.dynamic import alike
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, of_each_head
from attngraph.graph.patterns import Causal
from attngraph.graph.rewrite import simplify
from attngraph.kernels.contract import BiasKind, EdgeTerms, Gradients, Modifiers, ScoreBias
from attngraph.kernels.scoring import (
    ANY_FUNCTION,
    NORMALIZER_NAMES,
    SCORE_NAMES,
    Elementwise,
    Score,
    require_function,
    score_name,
)
from attngraph.planning import backends, explain, in_parts
from attngraph.planning.backends import BACKENDS, Backend, kernel_for
from attngraph.planning.backends.base import only_fused_attention
from attngraph.planning.call import Call, normalizer_name
from attngraph.planning.candidates import Choice, Part, groups_of_heads, heads_may_part, seconds_of
from attngraph.planning.costly import plain_call, warn_if_costly
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import closed_form
from attngraph.planning.layouts.materialized import edges_of_heads
from attngraph.planning.layouts.tiles import Tiles

CHOICE_S_PER_SCORE = 3e-9  # of finding the best, beside the product
PLAN_PRODUCTS = 1 << 24  # of numbers of all pairs, which take as long on a CPU as a plan of a small list of edges
TRACED_PAIRS_PER_EDGE = 64  # in compiled programs, where sizes are symbols: an edge gathered costs as many masked pairs


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
    stands_for: Graph | None = None
    """A graph of about as many edges, which queries and keys choose: the plan is to be read, not run."""
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

    @cached_property
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

    @cached_property
    def takes_no_dims(self) -> bool:
        """Whether keys may be of dimension 0."""
        return all(part.backend.takes_no_dims for part in self.parts)

    @cached_property
    def takes_half(self) -> bool:
        """Whether it takes half precision as it is on a CPU, as one kernel that does runs all of it."""
        return len(self.parts) == 1 and self.parts[0].is_all and self.parts[0].backend.takes_half

    def score_bias(self, bias: Bias | None, q: Tensor, k: Tensor) -> tuple[ScoreBias | None, Tensor | None]:
        """A bias as `forward` takes it; and apart what is the same for all keys of a query: `bias.score_bias`."""
        return score_bias(bias, q, k)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        """As `in_parts.forward`."""
        return in_parts.forward(self.parts, q, k, v, modifiers)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
        modifiers: Modifiers, bias_grad: bool,
    ) -> Gradients:  # fmt: skip
        """As `in_parts.backward`."""
        return in_parts.backward(self.parts, q, k, v, out, lse, dout, dlse, modifiers, bias_grad)

    def require_unchanged(self) -> None:
        """Raise if what the graph's functions read has changed since, so that its edges may be others."""
        if self.graph._may_change and self._state != self.graph._state():
            raise ValueError(f"what {self.graph} reads has changed since the plan was made: make a new one")

    def fitted(self, call: Call, name: str = "auto") -> Plan:
        """A plan that was made by hand, for a call of another dtype too; raise if it can't run the call."""
        if self.stands_for is not None:
            raise ValueError(
                f"a plan of {self.stands_for} tells what to expect, as queries and keys choose its edges at each call: "
                f"attend with the graph itself"
            )
        self.require_sizes(call)
        if call.bias not in (None, self.call.bias):
            made = f"the plan was made for bias={self.call.bias!r}"
            raise ValueError(f"{made} (got one of kind {call.bias!r}): plan(…, bias={call.bias!r})")
        if call.edge_features and not self.call.edge_features:
            F = max(call.key_features, call.value_features)
            raise ValueError(f"the plan was made for edges without features: plan(…, edge_features={F})")
        if name != "auto":
            raise ValueError(
                f"a plan has chosen its backends: leave out backend={name!r}, or plan(…, backend={name!r})"
            )
        self.require_unchanged()
        call = call._replace(part=call.part or not self.runs_whole(call))
        reasons = [reason for part in self.parts if (reason := part.backend.supports(call)) is not None]
        if not self.parts and (reason := only_fused_attention(call)) is not None:
            raise _not_made_for(self, call, reason)
        if not reasons:
            return self
        others = [_another_kernel(part.backend, call) for part in self.parts]
        if any(other is None for other in others):
            raise _not_made_for(self, call, reasons[0])
        parts = zip(self.parts, others, strict=True)
        return replace(self, parts=tuple(replace(part, backend=other) for part, other in parts))

    def require_sizes(self, call: Call) -> None:
        """Raise unless it was made for so many nodes and heads, on this device."""
        made, given = ((each.num_queries, each.num_keys, each.heads) for each in (self.call, call))
        if made != given or call.device != self.call.device:
            raise ValueError(
                f"the plan was made for {made[0]} queries, {made[1]} keys and {made[2]} heads on {self.call.device} "
                f"(got {given[0]}, {given[1]} and {given[2]} on {call.device}); make one for these, or attend with the "
                f"graph itself"
            )

    @property
    def nodes(self) -> Tensor | None:
        """The numbers that its queries have in a larger graph, where they are a part of it: int64 (N,)."""
        return None

    @property
    def placement(self) -> tuple | None:
        """Which nodes' rows it takes, where they are not all: layers of one model must have one."""
        return None

    is_whole: ClassVar[bool] = True
    """Whether it has all nodes of its graph, so that weights and second derivatives can be asked for."""

    def placed(self, bias: Bias, q: Tensor, k: Tensor) -> Bias:
        """A bias for the nodes and edges of this plan: `bias.placed`."""
        return placed(bias, self.graph, q.shape[2], k.shape[2], q)

    def edge_terms(self, features: EdgeFeatures, q: Tensor, k: Tensor) -> EdgeTerms | None:
        """The features of the edges of this plan: `edge_features.edge_terms`."""
        return edge_terms(features, self.graph, q.shape[2], k.shape[2], q)

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
        other = replace(_made(self.graph, call, "auto", costs=self.costs), stands_for=self.stands_for)
        times = other.seconds / max(self.seconds, 1e-9)
        return f"{explain.explain(other)}\nexpected to take {times:.2f} times as long as this plan's own call"

    def __repr__(self) -> str:
        parts = ", ".join(f"{part.backend.name} {part.edges:,}" for part in self.parts)
        graph = self.graph if self.stands_for is None else self.stands_for
        return f"Plan({graph}, {self.call.num_queries} × {self.call.num_keys}: {parts or 'no edges'})"


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
    edge_features: int = 0,
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
        edge_features: the F of the `EdgeFeatures` that edges will have, or 0.
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
    require_ints(0, head_dim=head_dim, edge_features=edge_features)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype of a plan must be a floating-point torch.dtype (got {dtype!r})")
    _, n, m = at_size(graph, n, m)
    call = Call(
        n, m, heads, heads, head_dim, head_dim, dtype, _definite(torch.device(device)), bias,
        score=_name("score", score), normalize=_name("normalize", normalize), padding=padding, dropout=dropout,
        return_weights=return_weights, key_features=edge_features, value_features=edge_features,
    )  # fmt: skip
    if not graph._unresolved:
        return _made(graph, call, backend, reorder, costs)
    own, scores = alike(graph, n, m)
    made = _made(own, call, backend, reorder, costs)
    seconds = heads * scores * (made.costs.masked_s_per_pair_dim * head_dim / 2 + CHOICE_S_PER_SCORE)
    note = f"each call chooses by {scores:,} scores of each head, which takes about {explain.time(seconds)} besides"
    return replace(made, stands_for=graph, notes=(note, *made.notes))


def _name(option: Literal["score", "normalize"], given: Any) -> str:
    """A score or normaliser in a `Call`; "a function" stands for itself."""
    if isinstance(given, str) and given == ANY_FUNCTION:
        return given
    require_function(option, given, SCORE_NAMES if option == "score" else NORMALIZER_NAMES)
    return score_name(given) if option == "score" else normalizer_name(given)


def planned(graph: Graph, call: Call, name: str) -> Plan:
    """The plan of a call, made once; of those made here, the latest are kept."""
    if isinstance(graph, EdgeList) and graph.plans is not None:
        if (call[:-1], name) not in graph.plans:
            with cache.outside_of_transforms():
                graph.plans[call[:-1], name] = _made(graph.without_plans(), call, name)
        return graph.plans[call[:-1], name]
    plans = cache.PLANS if call.device.type == "cpu" else cache.PLANS_ON_GPU
    key = graph, graph._state() if graph._may_change else (), call[:-1], name
    found = plans.get(key)
    if found is None:
        with cache.outside_of_transforms():
            found = plans.keep(key, _made(graph, call, name))
            if name == "auto":
                warn_if_costly(found, lambda: seconds_of(graph, plain_call(call), found.costs))
    return found


def planned_once(graph: Graph, call: Call, name: str) -> Plan:
    """The plan of a graph that is made for one call: it is not kept."""
    with cache.outside_of_transforms():
        return _made(graph, call, name)


def without_plan(graph: Graph | Plan, call: Call, name: str) -> Backend | None:
    """What runs a list that is made for some calls alone, where that takes less time than a plan; else None."""
    if name != "auto" or not isinstance(graph, EdgeList) or graph.plans is None or call.device.type != "cpu":
        return None
    products = call.num_queries * call.num_keys * call.heads * (call.head_dim + call.value_dim)
    runs = products <= PLAN_PRODUCTS and not call.dropout and BACKENDS["dense"].supports(call) is None
    return BACKENDS["dense"] if runs else None


def traced(graph: Graph | Plan, call: Call, name: str) -> Backend | None:
    """The backend of a call that is being compiled, where sizes are symbols; None: an operator that looks up a plan."""
    if isinstance(graph, Plan):
        reason = only_fused_attention(call) or (None if name == "auto" else "it has chosen its backends")
        if reason is not None:
            raise ValueError(f"a plan can't run this call in a compiled program ({reason}); the graph itself can")
        if not torch.compiler.is_compiling():  # else when the program runs
            graph.require_sizes(call)
        return None
    if graph._unresolved:
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
    few = isinstance(graph, EdgeList) and graph.max_edges * TRACED_PAIRS_PER_EDGE < call.num_queries * call.num_keys
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


def _not_made_for(plan: Plan, call: Call, reason: str) -> ValueError:
    """The error of a plan that can't run a call: with what options another one is made, if that is what it lacks."""
    options = {name: getattr(call, name) for name in ("score", "normalize", "padding", "dropout", "return_weights")}
    more = [f"{name}={value!r}" for name, value in options.items() if value not in (False, getattr(plan.call, name))]
    remedy = f"plan(…, {', '.join(more)}), or " if more else ""
    return ValueError(f"{plan} can't run this call ({reason}); {remedy}attend with the graph itself chooses what can")


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


def _made(graph: Graph, call: Call, name: str, reorder: bool | None = None, costs: Costs | None = None) -> Plan:
    """The plan of a graph for a call, by the backend of this name, or the best for "auto"."""
    if name != "auto":
        require(name, call)
    costs = costs or Costs.here(call.device)
    bound, n, m = at_size(graph, call.num_queries, call.num_keys)
    if bound.heads is not None and bound.heads != call.heads:
        raise ValueError(f"graph has {bound.heads} heads (got heads={call.heads})")
    with call.device if call.device.type == "cuda" else nullcontext():  # layouts are made where they are used
        groups = groups_of_heads(bound) if heads_may_part(call, name) else [(simplify(bound), None)]
        choices = []
        for own_graph, heads in groups:
            own = call if heads is None else call._replace(heads=len(heads), part=len(groups) > 1)
            choices.append(Choice(own_graph, own, name, reorder, costs))
        parts, candidates, notes = [], {}, []
        for choice, (_, heads) in zip(choices, groups, strict=True):
            numbers = None
            if heads is not None and (call.bias == "edge" or call.edge_features):
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
