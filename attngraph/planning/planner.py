"""Choosing how a graph runs: which parts of it by which backend, at what cost. `plan` is the verb, `Plan` the answer.

A plan cuts a graph into disjoint sets of edges: bands and blocks for tiles, stray edges for rows, all-pairs for
PyTorch's dense attention. What it costs is computed from the counts of tiles and edges, and from how fast this machine
is (`attngraph.machine`). Every plan of a graph computes the same function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attngraph.graph.algebra import Intersection, Sized
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.boxes import require_memory
from attngraph.graph.patterns import Causal, Chunks, Documents, Full
from attngraph.graph.rewrite import simplify, split
from attngraph.kernels.tiles import installed
from attngraph.planning.costs import Machine
from attngraph.planning.layouts.csr import BYTES_PER_EDGE, CSR
from attngraph.planning.layouts.dense import Dense, edges_of_heads
from attngraph.planning.layouts.tiles import NO_MASK, Table, Tiles, tabulate, tabulate_edges, union
from attngraph.planning.reordering import bandwidth_order

BACKENDS = ("auto", "reference", "edges", "dense", "tiles", "rows")
PLANNED = ("dense", "tiles", "rows")  # what a plan is made of
TILES = {"cpu": (64, 64), "cuda": (128, 64)}  # smaller products are slow, larger ones waste more of a band
INSTALL_NUMBA = "pip install 'attngraph[cpu]'"


class Request(NamedTuple):
    """What a call of `attend` asks for that not every backend can do."""

    score: str | Callable = "dot"
    normalize: str | Callable = "softmax"
    dropout_p: float = 0.0
    return_lse: bool = False
    return_weights: bool = False

    def beyond(self, backend: str) -> str | None:
        """The first thing asked for that this backend can't do."""
        if backend in ("reference", "edges"):
            return None
        if self.score != "dot":
            return f"score={self.score!r}"
        if self.normalize != "softmax":
            return f"normalize={self.normalize!r}"
        if self.return_weights:
            return "return_weights=True"
        return f"dropout_p={self.dropout_p}" if self.dropout_p and backend != "dense" else None


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a graph's edges, and what runs them."""

    backend: str
    layout: Tiles | CSR | Dense
    edges: int
    seconds: float  # expected, forward, for one head of one batch entry
    why: str
    heads: tuple[int, ...] | None = None  # None: all of them
    order: Tensor | None = None  # the nodes in the order of the layout, where they were reordered
    number: Tensor | None = None  # of each edge of these heads, among the edges that any head has

    @property
    def pairs(self) -> int:
        """How many scores are computed for each head."""
        if self.backend == "tiles":
            return len(self.layout.table.row) * self.layout.tile[0] * self.layout.tile[1]
        return self.layout.pairs if self.backend == "dense" else self.edges


@dataclass(frozen=True, eq=False)
class Plan:
    """How one graph runs at one size on one device; `attend(q, k, v, plan)` runs it. See `plan`.

    Immutable, and never a change of meaning: every plan of a graph computes the same function.
    """

    graph: Graph
    n: int
    m: int
    heads: int
    head_dim: int
    device: torch.device
    parts: tuple[Part, ...]
    alternatives: dict[str, float | str]  # seconds of what was not chosen, or why it can't be
    edges: int
    machine: Machine
    bias: str | None = None  # the kind it was made for
    notes: tuple[str, ...] = ()
    text: str = field(init=False, default_factory=lambda: f"<plan {next(_NUMBERS)}>")  # another for each plan

    def __post_init__(self):
        LIVING[self.text] = self  # by which the operators find it

    def __reduce__(self):
        return Plan, tuple(getattr(self, each.name) for each in fields(self) if each.init)

    def __deepcopy__(self, memo) -> Plan:
        return self  # a value

    @property
    def nbytes(self) -> int:
        """How much memory the layouts take."""
        return sum(part.layout.nbytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """The expected time of one forward pass of all heads of one batch entry."""
        return sum(part.seconds * len(part.heads or range(self.heads)) for part in self.parts)

    def explain(self) -> str:
        """What runs, why, at what expected cost, and what the alternatives would have cost: a table to read."""
        return _explain(self)

    def __repr__(self) -> str:
        parts = ", ".join(f"{part.backend} {part.edges:,}" for part in self.parts)
        return f"Plan({self.graph.text}, {self.n} × {self.m}: {parts or 'no edges'})"


_NUMBERS = count(1)
LIVING: WeakValueDictionary[str, Plan] = WeakValueDictionary()


def plan(
    graph: Graph,
    n: int | None = None,
    m: int | None = None,
    *,
    heads: int = 1,
    head_dim: int = 64,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    bias: str | None = None,
    reorder: bool | None = None,
    machine: Machine | None = None,
) -> Plan:
    """How a graph runs at n queries and m keys: `attend` makes a plan of each graph by itself; this shows or fixes it.

    Args:
        graph: who hears whom; n and m may be left out where it knows them.
        heads: how many query heads, for the expected cost.
        head_dim: the dimension of keys and values, for the expected cost.
        device: where the tensors will be.
        backend: "auto", or "dense", "tiles" or "rows" for all edges.
        bias: the kind of bias that will be added, None, "offset" (Alibi, RelativeBias), "dense" or "edge" (EdgeBias):
            with the last the edges are not cut into parts, with any nodes are not reordered.
        reorder: whether the nodes of an EdgeList may be put into another order, so that its edges lie closer together;
            None is where it pays (SciPy's reverse Cuthill–McKee).
        machine: how fast this machine is; by default as measured once (see `Machine.here`).

    >>> print(plan(Window(256, 0), 100_000, 100_000, heads=8))
    Plan(Window(256, 0), 100000 × 100000: tiles 25,667,104)

    Raises:
        ValueError: sizes that do not fit, or a backend that can't run here.
        MemoryError: layouts that need more memory than there is, before they are made.
    """
    if backend not in ("auto", *PLANNED):
        raise ValueError(f"backend of a plan must be one of auto, {', '.join(PLANNED)} (got {backend!r})")
    if not isinstance(graph, Graph):
        raise TypeError(f"plan takes a Graph (got {graph if isinstance(graph, type) else type(graph).__name__})")
    if not (machine is None or isinstance(machine, Machine)):
        raise TypeError(f"machine must be a Machine, or None (got {machine!r})")
    if bias not in (None, "offset", "dense", "edge"):
        raise ValueError(f"bias of a plan must be None, 'offset', 'dense' or 'edge' (got {bias!r})")
    if reorder not in (None, True, False):
        raise ValueError(f"reorder must be True, False or None (got {reorder!r})")
    require_ints(1, heads=heads)
    require_ints(0, head_dim=head_dim)
    bound, n, m = graph.at(n, m)
    if bound.heads is not None and bound.heads != heads:
        raise ValueError(f"graph has {bound.heads} heads (got heads={heads})")
    device = _definite(torch.device(device))
    machine = machine or Machine.here(device)
    groups: dict[Graph, list[int]] = {}
    for h in range(bound.heads or 1):
        groups.setdefault(simplify(bound.head(h)), []).append(h)
    alone = len(groups) == 1 or bias is None  # dense with a bias is no part beside others
    choices = [
        _Choice(one, n, m, len(own) if bound.heads else heads, head_dim, device, backend, bias, reorder, alone, machine)
        for one, own in groups.items()
    ]
    parts, alternatives, notes = [], {}, []
    for choice, members in zip(choices, groups.values(), strict=True):
        chosen, others = choice.made()
        numbers = _numbers(graph, members[0], n, m) if bound.heads and bias == "edge" else None
        own = tuple(members) if bound.heads else None
        parts += [replace(part, heads=own, number=numbers) for part in chosen]
        for name, cost in others.items():
            known, times = alternatives.get(name, 0.0), len(members) if bound.heads else heads
            alternatives[name] = (
                next((each for each in (cost, known) if isinstance(each, str)), None) or known + cost * times
            )
        notes += [note for note in choice.notes if note not in notes]
    edges = sum(part.edges for part in parts) if not bound.heads else bound.count_edges(n, m)
    return Plan(graph, n, m, heads, head_dim, device, tuple(parts), alternatives, edges, machine, bias, tuple(notes))


def _definite(device: torch.device) -> torch.device:
    """The GPU that "cuda" means now, as tensors name theirs."""
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"a plan for {device} needs a GPU, and torch sees none; device='cpu' is here")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _numbers(graph: Graph, head: int, n: int, m: int) -> Tensor:
    """Of the edges that any head has, the numbers of this head's."""
    return edges_of_heads(graph, n, m, torch.device("cpu"))[2][head].nonzero()[:, 0]


# ------------------------------------------------------------------------------------------------- the choice

Edges = tuple[Tensor, Tensor]  # (query, key)


class _Listed(NamedTuple):
    """Listed edges and the tiles they lie in."""

    query: Tensor
    key: Tensor
    tile: Tensor  # of each edge
    edges: Tensor  # of each tile
    blocks: Tensor  # of each tile: how many of its blocks hold edges

    def chosen(self, which: Tensor) -> Edges:
        return self.query[which], self.key[which]


class _Way(NamedTuple):
    """A cut of the edges: what runs in tiles, what in rows; and the expected seconds."""

    tiles: Table  # of those found box by box
    tiled: Edges  # of those listed, numbered in `order`
    loose: Table  # tiles whose edges run in rows
    rows: Edges
    weight: float  # of the tiles, in full ones
    fetched: int  # keys of rows that come from afar: of a tile, each once
    order: Tensor | None
    seconds: float


class _Choice:
    """The ways to run one graph without heads of its own, bound to its size; seconds are of one head."""

    def __init__(self, graph, n, m, heads, head_dim, device, backend, bias, reorder, may_be_dense, machine):
        self.graph, self.n, self.m, self.heads, self.dim = graph, n, m, heads, head_dim
        self.backend, self.bias, self.reorder, self.machine = backend, bias, reorder, machine
        self.may_be_dense = may_be_dense
        self.notes: list[str] = []
        self.device, self.tile = device, TILES.get(device.type, TILES["cpu"])
        fused = "triton" if device.type == "cuda" else "numba"
        self.no_rows = None if fast_on(device) else f"rows run on a CPU, or on a GPU by Triton, not on {device}"
        if device.type == "cpu" and not installed("numba"):
            self.no_rows = f"rows need numba: {INSTALL_NUMBA}"
        self.fused = fast_on(device) and installed(fused) and (bias is None or fused == "triton")  # tiles in one call
        # Of a tile, the blocks that are computed where they hold edges.
        self.block = SKIPPED if self.fused and device.type == "cpu" else self.tile
        self.closed, self.packed = (None, None) if bias else (closed_form(graph), packed_form(graph, n, m))

    def made(self) -> tuple[list[Part], dict[str, float | str]]:
        """The parts, and what else was possible at what cost, or why not."""
        if self.backend == "dense" and not self.may_be_dense:
            raise ValueError("a plan of backend='dense' has no bias with one graph per head; backend='tiles' has")
        if self.backend == "dense" or (self.backend == "auto" and self.may_be_dense and not self._may_be_tiles()):
            return [self._dense()], {}
        if self.backend == "rows" and self.no_rows:
            raise ValueError(f"backend='rows' can't run here: {self.no_rows}; backend='tiles' can")
        with self.device if self.device.type == "cuda" else nullcontext():  # layouts are made where they are used
            return self._found()

    def _may_be_tiles(self) -> bool:
        """Whether other ways than dense are worth a look."""
        if self.closed is None:
            return fast_on(self.device)
        few = self.n * self.m <= MOST_CLOSED_PAIRS  # a GPU's flash kernel can't be beaten where all pairs are edges
        return few and self.fused and self.device.type == "cpu"

    def _found(self) -> tuple[list[Part], dict[str, float | str]]:
        """The same, by looking at the edges."""
        if self.backend == "rows":
            return self._listed_alone(), {}
        self._find()
        return self._best() if self.backend == "auto" else (self._built(self._cut(self.backend)), {})

    def _listed_alone(self) -> list[Part]:
        """All edges in rows, however many."""
        layout = CSR.from_graph(self.graph, self.n, self.m)
        edges, key = len(layout.by_query.neighbor), layout.by_query.neighbor[:FEW]
        query = torch.searchsorted(layout.by_query.start, torch.arange(len(key)), right=True) - 1
        fetched = int(self._keys(self._in_tiles(query, key.long()).edges).sum()) * edges // max(len(key), 1)
        return [Part("rows", layout, edges, self._rows_seconds(edges, fetched), ONE_BY_ONE)] if edges else []

    def _find(self) -> None:
        """The edges: those of bands and blocks as a table of tiles, the others as a list."""
        banded, scattered = split(self.graph)
        self.around = closed_form(banded)  # what the stray edges are beside, where a kernel knows it
        self.banded = tabulate(banded, self.n, self.m, self.tile)
        query, key = (side.to(self.banded.row.device) for side in scattered.list_edges(self.n, self.m))
        stray = ~banded.contains(query, key)
        self.listed = self._in_tiles(query[stray], key[stray])

    def _in_tiles(self, query: Tensor, key: Tensor) -> _Listed:
        (high, wide), (tile_high, tile_wide), blocks = self.block, self.tile, -(-self.m // self.block[1])
        block, of_edge, inside = torch.unique(
            query // high * blocks + key // wide, return_inverse=True, return_counts=True
        )
        row, column = block // blocks // (tile_high // high), block % blocks // (tile_wide // wide)
        _, of_block, count = torch.unique(
            row * -(-self.m // tile_wide) + column, return_inverse=True, return_counts=True
        )
        edges = torch.zeros_like(count).index_add_(0, of_block, inside)
        return _Listed(query, key, of_block[of_edge], edges, count)

    def _best(self) -> tuple[list[Part], dict[str, float | str]]:
        ways: dict[str, _Way] = {"tiles": self._cut("tiles")}
        costs: dict[str, float | str] = {}
        if self.may_be_dense:
            costs["dense"] = self._dense_seconds()
        if self.no_rows:
            self.notes.append(f"{self.no_rows}. Without them, stray edges run in tiles of their own")
            costs["rows"] = self.no_rows
        else:
            ways["rows"] = self._cut("rows")
            cut = self._cut("tiles + rows")
            if self.bias != "edge" and cut.seconds not in (way.seconds for way in ways.values()):
                ways["tiles + rows"] = cut
            if self.around is not None and self.closed is None and not self.bias:
                beside = self._cut("rows", banded=self.banded.chosen(self.banded.row < 0))
                costs["dense + rows"] = self._merged(self._flash_seconds(self.around) + beside.seconds)
        if (reordered := self._reordered()) is not None:
            ways["reordered"] = reordered
        costs.update((name, way.seconds) for name, way in ways.items())
        best = min((name for name, cost in costs.items() if not isinstance(cost, str)), key=costs.__getitem__)
        if self.closed is not None and costs[best] * CLEAR > costs["dense"]:
            best = "dense"
        if best == "dense + rows":
            parts = [self._flash(self.around, int(self.banded.edges.sum())), *self._built(beside)]
        else:
            parts = [self._dense()] if best == "dense" else self._built(ways[best])
        return parts, {name: cost for name, cost in costs.items() if name != best}

    def _cut(self, how: str, listed: _Listed | None = None, order: Tensor | None = None, banded: Table | None = None):
        """All edges in tiles, or all in rows, or those in tiles that are cheaper than their edges one by one."""
        listed, banded = listed or self.listed, self.banded if banded is None else banded
        table_edges, blocks = banded.edges, banded.occupied(*self.block)
        dense, close = self._in(how, table_edges, blocks), self._in(how, listed.edges, listed.blocks)
        tiles, loose, far = banded.chosen(dense), banded.chosen(~dense), ~close[listed.tile]
        weight = float(self._weight(torch.cat([blocks[dense], listed.blocks[close]])).sum())
        apart = torch.cat([table_edges[~dense], listed.edges[~close]])
        count, stray, fetched = int(dense.sum() + close.sum()), int(apart.sum()), int(self._keys(apart).sum())
        rows = 1
        if not self.fused:
            rows = len(torch.unique(torch.cat([tiles.row, listed.query[~far] // self.tile[0]])))
        seconds = self._tile_seconds(weight, rows) + self._rows_seconds(stray, fetched)
        if count and stray:
            seconds = self._merged(seconds)
        if order is not None:
            seconds += self.machine.node * self.dim * self.n * 4  # q, k, v and out change places
        stray = listed.chosen(far) if order is None else tuple(order[side] for side in listed.chosen(far))
        return _Way(tiles, listed.chosen(~far), loose, stray, weight, fetched, order, seconds)

    def _in(self, how: str, edges: Tensor, blocks: Tensor) -> Tensor:
        """Which tiles, with so many edges in so many blocks, are computed as tiles."""
        if how != "tiles + rows":
            return torch.full_like(edges, how == "tiles", dtype=torch.bool)
        tile = self._pair_seconds() * self.tile[0] * self.tile[1]
        return self._weight(blocks) * tile <= self.machine.rows(edges.double(), self._keys(edges).double(), self.dim)

    def _weight(self, blocks: Tensor) -> Tensor:
        """The cost of tiles with so many blocks, over that of a full one."""
        share = blocks.double() * (self.block[0] * self.block[1] / (self.tile[0] * self.tile[1]))
        return ALWAYS + (1 - ALWAYS) * share

    def _keys(self, edges: Tensor) -> Tensor:
        """How many keys are fetched for the edges of a tile, each once: one by one, but no more than there are."""
        return edges.clamp(max=self.tile[1])

    def _reordered(self) -> _Way | None:
        """A cut after the nodes were put into an order in which edges lie close together."""
        query, key = self.listed.query, self.listed.key
        square = self.n == self.m and not len(self.banded.row) and len(query) >= FEWEST_TO_REORDER
        if self.reorder is False or self.bias or not square:
            return None
        if len(query) > MOST_TO_REORDER and not self.reorder:
            self.notes.append(
                f"the nodes were not reordered: for {len(query):,} edges it takes long; reorder=True does"
            )
            return None
        if not installed("scipy"):
            self.notes.append("the nodes were not reordered: that needs SciPy, pip install scipy")
            return None
        order = bandwidth_order(query, key, self.n)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(self.n))
        way = self._cut("tiles" if self.no_rows else "tiles + rows", self._in_tiles(place[query], place[key]), order)
        return way._replace(seconds=0.0) if self.reorder else way

    def _built(self, way: _Way) -> list[Part]:
        """The layouts of a cut."""
        parts = []
        table = way.tiles
        if len(way.tiled[0]):
            listed = tabulate_edges(*way.tiled, self.tile)
            table = union(table, listed) if len(table.row) else listed
        if len(table.row):
            layout, edges = Tiles(self.n, self.m, table), int(table.edges.sum())
            full, fill = int((table.mask == NO_MASK).sum()), edges / (len(table.row) * self.tile[0] * self.tile[1])
            why = f"{len(table.row):,} tiles, {full:,} full; {fill:.0%} of their pairs are edges; "
            why += f"{len(table.words):,} distinct masks"
            strips = 1 if self.fused else len(layout.strips)
            why += "" if self.fused else f", {strips:,} strips"
            if way.order is not None:
                why += "; nodes reordered"
            seconds = self._tile_seconds(way.weight, strips)
            parts.append(Part("tiles", layout, edges, seconds, why, order=way.order))
        query, key = way.rows
        stray = len(query) + int(way.loose.edges.sum())
        require_memory(stray * BYTES_PER_EDGE, f"for the {stray:,} edges of {self.graph.text} in rows")
        if len(way.loose.row):
            query, key = (
                torch.cat(side) for side in zip((query, key), way.loose.list_edges(self.n, self.m), strict=True)
            )
        if len(query):
            code = (query * self.m + key).sort().values
            layout = CSR.from_edges(code // self.m, code % self.m, self.n, self.m)
            why = f"{ONE_BY_ONE}: gathering each costs less than the tile around it"
            parts.append(Part("rows", layout, len(query), self._rows_seconds(len(query), way.fetched), why))
        return parts

    def _dense(self) -> Part:
        edges = self.graph.count_edges(self.n, self.m)
        if self.closed is not None:
            return self._flash(self.closed, edges)
        if self.packed is not None:
            closed, lengths = self.packed
            layout = Dense(closed, self.n, self.m, type(closed).__name__.lower(), lengths)
            why = f"{len(lengths):,} documents of {len({*lengths}):,} lengths, each length a call of the flash kernel"
            return Part("dense", layout, edges, self._dense_seconds(), why)
        layout = Dense(self.graph, self.n, self.m, None)
        return Part("dense", layout, edges, self._dense_seconds(), "all pairs, with a mask")

    def _flash(self, closed: Graph, edges: int) -> Part:
        layout = Dense(closed, self.n, self.m, type(closed).__name__.lower())
        why = f"{closed.text} is what the flash kernel does"
        return Part("dense", layout, edges, self._flash_seconds(closed), why)

    # seconds

    def _dense_seconds(self) -> float | str:
        if self.closed is not None:
            return self._flash_seconds(self.closed)
        if self.packed is not None:
            closed, lengths = self.packed
            seconds = sum(count * self._flash_seconds(closed, length) for length, count in Counter(lengths).items())
            calls = len({*lengths}) * self.machine.strip / self.heads
            return seconds + calls + 4 * self.machine.node * self.dim * self.n  # q, k, v and out change places
        if self.n * self.m > MOST_DENSE_PAIRS and self.backend == "auto":
            return f"its mask would have {self.n * self.m:,} entries"
        return self.machine.dense * self.dim * self.n * self.m + self.machine.call / self.heads

    def _flash_seconds(self, closed: Graph, length: int | None = None) -> float:
        n, m = (self.n, self.m) if length is None else (length, length)
        pairs = n * m
        if type(closed) is Causal:
            pairs = min(pairs, n * (m + FLASH_KEYS) // 2)
        return self.machine.flash * self.dim * pairs

    def _pair_seconds(self) -> float:
        return self.machine.tile * self.dim

    def _tile_seconds(self, tiles: float, rows: int) -> float:
        """Of as much as so many full tiles in so many rows of them."""
        if not tiles:
            return 0.0
        strips = min(rows, MOST_STRIPS) / self.heads  # a call is for all heads
        pairs, results = tiles * self.tile[0] * self.tile[1], self.n * self.dim
        return self._pair_seconds() * pairs + self.machine.strip * strips + self.machine.tile_result * results

    def _merged(self, seconds: float) -> float:
        """Of two parts, which take so many seconds by themselves."""
        return DOUBT * (seconds + self.machine.node * self.dim * self.n)

    def _rows_seconds(self, edges: int, fetched: int) -> float:
        """Of so many edges. Keys are fetched once a tile, if those of a row of tiles stay near; else by most edges."""
        if self.device.type == "cpu" and 8 * self.dim * fetched * self.tile[0] > NEAR * self.n:
            fetched = max(fetched, int(AGAIN * edges))
        return self.machine.rows(edges, fetched, self.dim, self.n) + self.machine.call / self.heads if edges else 0.0


def fast_on(device: torch.device) -> bool:
    """Whether tiles have a kernel of their own there."""
    return device.type == "cpu" or (device.type == "cuda" and installed("triton"))


def closed_form(graph: Graph) -> Graph | None:
    """Causal() or Full(), where the graph is one of them."""
    plain = graph.graph if type(graph) is Sized else graph
    return plain if type(plain) is Full or (type(plain) is Causal and plain.offset == 0) else None


def packed_form(graph: Graph, n: int, m: int) -> tuple[Graph, tuple[int, ...]] | None:
    """Causal() or Full(), and the lengths of the documents in which each is by itself, where the graph is that."""
    parts = graph.graphs if type(graph) is Intersection else (graph,)
    plain = [part.graph if type(part) is Sized else part for part in parts]
    apart = [part for part in plain if type(part) is Documents or (type(part) is Chunks and not part.offset)]
    within = closed_form(next((part for part in plain if part not in apart), Full()))
    if len(apart) != 1 or len(plain) > 2 or within is None or n != m:
        return None
    if type(apart[0]) is Documents:
        return within, tuple(length for length in apart[0].lengths if length)
    whole, rest = divmod(n, apart[0].chunk)
    return within, (apart[0].chunk,) * whole + (rest,) * (rest > 0)


MOST_DENSE_PAIRS = 1 << 31  # beyond, a mask alone takes 2 GiB
MOST_CLOSED_PAIRS = 1 << 31  # of Causal() or Full(): beyond, looking at their tiles takes longer than it is worth
FLASH_KEYS = 512  # that the flash kernel of a CPU takes at once, also where only one of them is heard
FEWEST_TO_REORDER, MOST_TO_REORDER = 1 << 12, 1 << 24  # edges, as long as nobody asks for it: it takes seconds
FEW = 1 << 20  # edges from which it is guessed how close together they lie
ONE_BY_ONE = "edges one by one"
NEAR = 400_000  # bytes of keys and values that stay in the cache of a CPU's core from one query to the next
AGAIN = 0.7  # of the edges fetch their key again where they do not stay
SKIPPED = 8, 32  # queries or keys: the blocks of a tile that the CPU's kernel skips where they hold no edge
ALWAYS = 0.2  # of the time of a full tile, whatever is skipped
DOUBT = 1.25  # a cut must promise to be so much faster than one part: the costs are no more exact than that
CLEAR = 1.1  # another way than PyTorch's own kernel, where that fits exactly, must promise to be so much faster
MOST_STRIPS = 16  # kinds of rows of tiles, as far as they are guessed before they are made


# ----------------------------------------------------------------------------------------------- the explanation


def _explain(plan: Plan) -> str:
    lines = [
        f"{plan.graph.text}: {plan.n:,} queries, {plan.m:,} keys, {plan.edges:,} edges "
        f"({plan.edges / max(plan.n * plan.m, 1):.2%} of all pairs)",
        f"{plan.heads} heads of dimension {plan.head_dim} on {plan.device}; layouts of {_bytes(plan.nbytes)}",
        "",
        f"{'part':8}{'heads':>6}{'edges':>16}{'pairs computed':>18}{'GFLOP':>10}{'bytes':>10}{'expected':>12}   why",
    ]
    for part in plan.parts:
        heads = len(part.heads or range(plan.heads))
        flops = 4 * part.pairs * plan.head_dim * heads
        moved = part.layout.nbytes + 4 * plan.head_dim * heads * 2 * (plan.n + plan.m)
        lines.append(
            f"{part.backend:8}{heads:6}{part.edges:16,}{part.pairs:18,}{flops / 1e9:10.2f}{_bytes(moved):>10}"
            f"{_time(part.seconds * heads):>12}   {part.why}"
        )
    if plan.alternatives:
        lines += ["", "instead:"]
        for name, cost in sorted(plan.alternatives.items(), key=lambda each: (isinstance(each[1], str), str(each[0]))):
            lines.append(f"  {name:16}{cost if isinstance(cost, str) else _time(cost)}")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(
        [*lines, f"expected times: one forward pass of one batch entry, with the speeds of {plan.machine.source}"]
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    return ""
