"""The ways to run the edges of one graph, what each is expected to take, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attngraph.graph.base import Graph, at_size
from attngraph.graph.compose import Disjoint
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.rewrite import simplify
from attngraph.kernels.available import why_not
from attngraph.planning import backends, explain
from attngraph.planning.backends import BACKENDS, Backend
from attngraph.planning.backends.base import INSTALLED
from attngraph.planning.call import Call
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet, closed_form
from attngraph.planning.layouts.blocks import TILE
from attngraph.planning.reordering import bandwidth_order, typical_band

MERGE_SAFETY_FACTOR = 1.25  # a plan of two parts must promise to be so much faster: estimates are no more exact
FLASH_SAFETY_FACTOR = 1.1  # so must another way than PyTorch's own kernel, where that fits the graph exactly
PAYS = 0.9  # of the time of rows: what tiles have to save before they are looked at in every row
MIN_REORDERED_EDGES, MAX_REORDERED_EDGES = 1 << 12, 1 << 24  # unless reorder=True: it takes seconds
MAX_CLOSED_PAIRS = 1 << 31  # of Causal() or Full(): beyond, looking at all their tiles takes longer than it is worth
MAX_MASKED_PAIRS = 1 << 31  # beyond, a mask takes 2 GiB


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


class Candidate(NamedTuple):
    """A way to run the edges of one graph: what it is expected to take, and how its parts are made."""

    name: str
    seconds: float
    build: Callable[[], list[Part]]


def seconds_of(graph: Graph, call: Call, costs: Costs) -> float:
    """What a call is expected to take, without layouts."""
    bound, _, _ = at_size(graph, call.num_queries, call.num_keys)
    groups = groups_of_heads(bound) if heads_may_part(call, "auto") else [(simplify(bound), None)]
    calls = [(own, call if heads is None else call._replace(heads=len(heads))) for own, heads in groups]
    return sum(Choice(own, each, "auto", None, costs).best.seconds for own, each in calls)


def heads_may_part(call: Call, name: str) -> bool:
    """Whether heads with graphs of their own may run one after the other."""
    allowed = [each for each in BACKENDS.values() if name in ("auto", each.name)]
    return any(each.merges and each.supports(call._replace(part=True)) is None for each in allowed)


def groups_of_heads(bound: Graph) -> list[tuple[Graph, tuple[int, ...] | None]]:
    """The different graphs of the heads, simplified, with the heads that have each; None: all of them."""
    if bound.heads is None:
        listed = bound.as_list() if isinstance(bound, Disjoint) else None
        return [(simplify(bound) if listed is None else listed, None)]
    groups: dict[Graph, list[int]] = {}
    for h in range(bound.heads):
        groups.setdefault(simplify(bound._head(h)), []).append(h)
    if len(groups) == 1:
        return [(simplify(bound._head(0)), None)]
    return [(graph, tuple(heads)) for graph, heads in groups.items()]


class Choice:
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
        if not self.ways:
            raise ValueError(
                f"backend={self.name!r} can't run {self.edges.graph}: {'; '.join(map(str, self.candidates.values()))}"
            )
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
        if self.name == "auto" and {"tiles", "rows"} <= able.keys():
            if self.edges.is_computed:
                self.candidates[able.pop("tiles").label] = (
                    "the graph is made for some calls alone: its edges are counted"
                )
            elif self.call.device.type == "cpu" and self.edges.blocks is not None and self.edges.blocks.queries % TILE:
                self.candidates[able.pop("tiles").label] = "its blocks of queries are no whole tiles"
            elif self._is_scattered(able["tiles"], able["rows"]):
                self.candidates[able.pop("tiles").label] = "too few edges in each of some rows of its tiles"
        # Tiles before those that only count: they list what can't be counted anyway.
        for backend in sorted(able.values(), key=lambda each: (each.name != "dense", not each.merges)):
            least = backend.overhead(self.edges, self.call, self.costs)
            if self.ways and least >= min(way.seconds for way in self.ways):
                self.candidates[backend.label] = f"at least {explain.time(least)}, as its calls alone take"
                continue
            seconds = backend.estimate(self.edges, self.call, self.costs)
            if (rest := backend.rest(self.call)) is not None:
                seconds += seconds_of(self.edges.graph, rest, self.costs)
            self._add(backend.label, seconds, lambda each=backend, s=seconds: [self._part(each, self.edges, s)])
        if self.name == "auto":
            self._ask_together(able)

    def _reason(self, backend: Backend, able: dict[str, Backend]) -> str | None:
        """Why a backend is not asked what it would take."""
        reason = backend.supports(self.call)
        if reason is None and self.name == "auto":
            reason = backend.only_by_name(self.call)
        reason = reason or backend.lacks(self.edges)
        if reason is None and self.name == "auto":
            reason = self._reason_of_blocks(backend, able)
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

    def _reason_of_blocks(self, backend: Backend, able: dict[str, Backend]) -> str | None:
        """Of listed blocks of keys: those that single queries hear would nearly all be tiles, each with few edges."""
        blocks = self.edges.blocks
        if blocks is None:
            return None
        if backend.name == "blocks":
            return "its blocks of queries are whole tiles" if blocks.queries % TILE == 0 else None
        if backend.name in ("tiles", "rows") and "blocks" in able:
            return f"{able['blocks'].label} can, and is faster"
        return None

    def _is_scattered(self, tiles: Backend, rows: Backend) -> bool:
        """Whether few edges of a list lie in tiles that pay, as some rows of tiles tell, nor would in another order."""
        if self.reorder or self.edges.some_rows(tiles.tiling) is None:
            return False
        some, _ = self.edges.sampled(tiles.tiling)
        sides = some.edges_per_tile, some.blocks_per_tile, self.call, self.costs
        one_by_one = rows.tile_seconds(*sides)
        if float(torch.minimum(tiles.tile_seconds(*sides), one_by_one).sum()) < PAYS * float(one_by_one.sum()):
            return False
        if not self._may_reorder or self.edges.count < MIN_REORDERED_EDGES:
            return True
        query, key = self.edges.to_edges()
        band = typical_band(torch.searchsorted(query, torch.arange(self.edges.n + 1)), key)
        height, width = tiles.tiling.tile
        per_row = self.edges.count * height // max(self.edges.n, 1)
        in_row = max(1, min(-(-self.edges.m // width), per_row, (2 * band + height) // width + 1))  # tiles
        edges, blocks = (torch.full((in_row,), per_row / in_row) for _ in range(2))
        sides = edges, blocks.clamp(max=height * width // math.prod(tiles.tiling.block)), self.call, self.costs
        return float(tiles.tile_seconds(*sides).sum()) >= PAYS * float(rows.tile_seconds(*sides).sum())

    @property
    def _may_reorder(self) -> bool:
        """Whether the nodes may be put into another order."""
        square = self.edges.n == self.edges.m
        return square and self.reorder is not False and not self.call.bias and not self.call.dropout

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
        if dense is not None and rows.label in looked and not self.call.bias and type(self.edges.graph) is not EdgeList:
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
        if not self._may_reorder or len(lie.table.row) or len(lie.query) < MIN_REORDERED_EDGES:
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
