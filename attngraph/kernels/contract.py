"""What passes between layouts and kernels: a bias, the layouts as kernels read them, and the structs these are made of.

Kernels import nothing from above: `attngraph.planning.layouts` makes what is described here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

BiasKind = Literal["offset", "edge", "dense"]


class ScoreBias(NamedTuple):
    """What is added to the scores, after the scale.

    | kind | values | added to the score of query i and key j |
    |---|---|---|
    | "offset" | (H or 1, N + M - 1) | values[h, j - i + N - 1] |
    | "edge" | (B or 1, H or 1, E) | values[b, h, e], e the number of the edge in edge_index order |
    | "dense" | (B or 1, H or 1, N or 1, M) | values[b, h, i, j] |
    """

    kind: BiasKind
    values: Tensor

    def over_edges(self, query: Tensor, key: Tensor, n: int) -> Tensor:
        """What is added along all edges of a graph with n queries: (…, E)."""
        match self.kind:
            case "offset":
                return self.values[:, key - query + n - 1]
            case "dense":
                return self.values.expand(*self.values.shape[:2], n, -1)[..., query, key]
            case "edge":
                return self.values


class EdgeTerms(NamedTuple):
    """What is added to the key and to the value of an edge with features e: K e and V e."""

    values: Tensor
    """e, (B or 1, E, F), in edge_index order."""
    to_key: Tensor | None
    """K, (Hkv, D, F); None: nothing is added."""
    to_value: Tensor | None
    """V, (Hkv, Dv, F); None: nothing is added."""
    needs_grad: bool = False
    """Whether a backward pass is asked for the gradient of e."""

    @property
    def key_dim(self) -> int:
        """F, or 0 where nothing is added to keys."""
        return 0 if self.to_key is None else self.values.shape[2]

    @property
    def value_dim(self) -> int:
        """The same of values."""
        return 0 if self.to_value is None else self.values.shape[2]

    def to(self, dtype: torch.dtype) -> EdgeTerms:
        """In another precision."""
        to_key, to_value = (side if side is None else side.to(dtype) for side in (self.to_key, self.to_value))
        return EdgeTerms(self.values.to(dtype), to_key, to_value, self.needs_grad)

    def over_pairs(self, mask: Tensor) -> EdgeTerms:
        """With values (B or 1, N, M, F), those of the edges where the mask (N, M) is True."""
        values = self.values.new_zeros(len(self.values), *mask.shape, self.values.shape[2])
        values[:, mask] = self.values
        return self._replace(values=values)

    def added_to(self, vectors: Tensor, matrix: Tensor | None, part: int | slice = slice(None)) -> Tensor:
        """vectors (B, Hkv, E, D) of the edges, or of a part of them, with what K or V makes of their features."""
        if matrix is None:
            return vectors
        values = self.values[:, part]
        with torch.autocast(values.device.type, enabled=False):
            return vectors + values[:, None] @ matrix.mT


class Transform(NamedTuple):
    """An elementwise function of the scores after scale and bias.

    | kind | of a score s | its derivative |
    |---|---|---|
    | "softcap" | value · tanh(s / value) | 1 - tanh²(s / value) |
    | "leaky_relu" | s where s > 0, else value · s | 1, or value |
    """

    kind: Literal["softcap", "leaky_relu"]
    value: float


Normalizer = Literal["softmax", "sigmoid", "none", "relu", "squared_relu"]
"""How scores become weights: over the edges of a query, or each by itself: 1 / (1 + e⁻ˢ), s, max(s, 0), max(s, 0)²."""


class NodeNumbers(NamedTuple):
    """The numbers that the nodes at hand have in a larger graph, on the device of q."""

    queries: Tensor
    """int64 (N,)."""
    keys: Tensor
    """int64 (M,)."""


class Dropout(NamedTuple):
    """Which weights are dropped; see `kernels.dropout`."""

    p: float
    seed: Tensor
    """int64 (), at least 0, on the device of q."""
    heads: Tensor | None = None
    """int64 (H,), on the device of q: the numbers that the heads at hand have among those of the call. None: 0, 1, …"""
    nodes: NodeNumbers | None = None
    """Those of the nodes, which the random numbers go by. None: 0, 1, …"""


class Modifiers(NamedTuple):
    """What is done to the products q · k: they become scores s, weights w, and weights of which some are dropped.

    s = transform(scale · q·k + bias), w = normalize(s), 0 for padding; out = Σ w · kept / (1 - p) · v.
    """

    scale: float
    bias: ScoreBias | None = None
    attention_mask: Tensor | None = None
    """bool (B, M): False for keys that are padding, which no query of their batch entry hears. None: there are none."""
    transform: Transform | None = None
    normalize: Normalizer = "softmax"
    dropout: Dropout | None = None
    edges: EdgeTerms | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the scale is asked for."""
        return self[1:] == (None, None, None, "softmax", None, None)


class Gradients(NamedTuple):
    """What a backward pass gives."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None
    """Of the values of a bias, where asked for."""
    dedges: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    """Of `EdgeTerms`: e where asked for, K and V where there are any."""


# --------------------------------------------------------------------------------------------- of the reference


class GraphMask(Protocol):
    """Which pairs are edges, asked for all at once."""

    def mask(self, n: int, m: int, device: torch.device) -> Tensor:
        """bool (n, m), or (H, n, m)."""
        ...


class PairBias(Protocol):
    """What is added to the scores, asked for pair by pair; `edge` are the numbers of the edges in edge_index order."""

    def at(self, q_idx: Tensor, kv_idx: Tensor, edge: Tensor) -> Tensor:
        """(…, pairs)."""
        ...


# ------------------------------------------------------------------------------------------------------- tiles


class TileRows(NamedTuple):
    """Block-CSR: the tiles of each row r, those with masks from start[r] on, the full ones from full[r] on.

    Of the transposed adjacency matrix, rows are the columns of tiles.
    """

    start: Tensor  # int64 (rows + 1,)
    full: Tensor  # int64 (rows,)
    column: Tensor  # int32 (T,): the column of each tile
    mask: Tensor  # int32 (T,): the number of its mask, or -1 where it is full
    tile: Tensor  # int32 (T,): its place in the table
    order: Tensor  # int32 (rows,): the rows, those with the most tiles first


class Span(NamedTuple):
    """Runs of `width` adjacent tiles, one for each of `num_rows` rows of a strip: the b-th begins at first + b · step.

    Where they begin in no such order, `ids` (num_rows, width) names the tiles themselves.
    """

    num_rows: int
    width: int
    first: int
    step: int
    ids: Tensor | None

    @property
    def tiles(self) -> Tensor:
        """The tiles by number: int64 (num_rows, width)."""
        if self.ids is not None:
            return self.ids
        return self.first + torch.arange(self.num_rows)[:, None] * self.step + torch.arange(self.width)

    def cut(self, start: int, stop: int) -> Span:
        """Those of the rows start … stop - 1."""
        ids = None if self.ids is None else self.ids[start:stop]
        return Span(stop - start, self.width, self.first + start * self.step, self.step, ids)


class Strip(NamedTuple):
    """Rows of tiles with one shape, which one batched matrix product computes."""

    part: int  # 0 for the first tiles of each row; the results of later parts are merged into it
    rows: Span  # of width 1
    keys: Span
    mask: Tensor  # (width,), or (num_rows, width) where rows differ: the numbers of the masks
    tile: Tensor  # (num_rows, width): the places of the tiles in their table, -1 for padding
    has_empty_rows: bool  # whether a query may have no edge in its part of the strip

    def cut(self, start: int, stop: int) -> Strip:
        """The rows start … stop - 1."""
        mask = self.mask if self.mask.ndim == 1 else self.mask[start:stop]
        rows, keys = self.rows.cut(start, stop), self.keys.cut(start, stop)
        return Strip(self.part, rows, keys, mask, self.tile[start:stop], self.has_empty_rows)


class TileTable(Protocol):
    """All tiles, sorted by row, then column."""

    @property
    def row(self) -> Tensor:
        """int64 (T,)."""
        ...

    @property
    def column(self) -> Tensor:
        """int64 (T,)."""
        ...

    @property
    def words(self) -> Tensor:
        """The masks, packed: int32 (P, tile rows, tile columns / 32), bit c % 32 of word c // 32 for column c."""
        ...


class Grid(Protocol):
    """The plane of all pairs, cut into tiles."""

    @property
    def grid(self) -> tuple[int, int]:
        """How many rows and columns of tiles there are."""
        ...


class TilesLayout(Grid, Protocol):
    """The adjacency matrix as tiles; those at the border may reach beyond it."""

    @property
    def tile(self) -> tuple[int, int]:
        """How many queries and keys a tile has."""
        ...

    @property
    def table(self) -> TileTable:
        """The tiles by number."""
        ...

    @property
    def num_edges(self) -> int:
        """How many edges they have."""
        ...

    @property
    def by_query(self) -> TileRows:
        """The tiles of each row of tiles."""
        ...

    @property
    def by_key(self) -> TileRows:
        """The tiles of each column of tiles."""
        ...

    @property
    def masks(self) -> Tensor:
        """The masks unpacked: bool (P + 2, tile rows, tile columns); the last two are a full and an empty one."""
        ...

    @property
    def words_by_key(self) -> Tensor:
        """The masks transposed, packed: int32 (P, tile columns, tile rows / 32)."""
        ...

    @property
    def spans(self) -> Tensor | None:
        """The keys of each query of a mask as a span, its first | the one after its last << 16: int32 (P, tile rows);
        None where some are no span."""
        ...

    @property
    def spans_by_key(self) -> Tensor | None:
        """The same of the masks transposed: int32 (P, tile columns)."""
        ...

    @property
    def first_edge(self) -> Tensor:
        """The number of the first edge in each row of each tile: int64 (T, tile rows)."""
        ...

    @property
    def first_edge_of_word(self) -> Tensor:
        """The same for each word of a mask: int64 (T, tile rows, tile columns / 32)."""
        ...

    @property
    def strips(self) -> list[Strip]:
        """The tiles in the order in which batched matrix products run over them."""
        ...

    @property
    def empty_rows(self) -> Tensor:
        """The rows of tiles that have no tiles."""
        ...

    @property
    def kept(self) -> dict[Any, Any]:
        """What kernels make of it once, for as long as it lives."""
        ...

    def on(self, device: torch.device) -> TilesLayout:
        """The same on another device."""
        ...


# ------------------------------------------------------------------------------------------------------ blocks


class BlocksLayout(Grid, Protocol):
    """Blocks of keys, and the queries that hear each: block j is heard by query[start[j]] … query[start[j + 1] - 1].

    Nodes are those of `entries` of equal sizes, one after the other; no query hears a block of another entry.
    """

    @property
    def n(self) -> int:
        """How many queries."""
        ...

    @property
    def m(self) -> int:
        """How many keys; the last block may reach beyond."""
        ...

    @property
    def entries(self) -> int:
        """How many entries."""
        ...

    @property
    def block(self) -> int:
        """How many keys a block has, a multiple of 64."""
        ...

    @property
    def num_blocks(self) -> int:
        """How many blocks."""
        ...

    @property
    def causal(self) -> bool:
        """Whether keys after a query are left out."""
        ...

    @property
    def start(self) -> Tensor:
        """int64 (blocks + 1,)."""
        ...

    @property
    def query(self) -> Tensor:
        """Of each block ascending: int32 (visits,)."""
        ...


# --------------------------------------------------------------------------------------------------------- CSR


class Adjacency(NamedTuple):
    """CSR or CSC: node x has the edges start[x] … start[x + 1] - 1, to `neighbor`, ascending.

    The work is cut into units of about one size, as the graph alone decides: so no thread waits for a hub, and sums
    are taken in the same order by any number of threads. A unit takes of each of its nodes the edges that lie between
    two of its own; of a node with more than `heavy` edges, a unit has one piece. Units of pieces come first.
    """

    start: Tensor  # (nodes + 1,) int64
    neighbor: Tensor  # (E,) int32 where the other side's nodes allow it
    edge: Tensor  # (E,) the number of each edge in edge_index order; (0,) where that is 0, 1, 2, …
    units: Tensor  # (units, 4) int64: first node, node after the last, first edge, edge after the last
    pieces: Tensor  # (heavy nodes, 3) int64: node, its first unit, the unit after its last
    heavy: int  # edges above which a node is cut into pieces

    @property
    def num_pieces(self) -> int:
        """How many of the units, the first ones, are pieces of heavy nodes."""
        return int(self.pieces[-1, 2]) if len(self.pieces) else 0


class CSRLayout(Protocol):
    """The edges one by one."""

    @property
    def by_query(self) -> Adjacency:
        """CSR: the keys of each query."""
        ...

    @property
    def by_key(self) -> Adjacency:
        """CSC: the queries of each key."""
        ...

    @property
    def numbered(self) -> Adjacency:
        """`by_key`, with the number of each edge."""
        ...


# ------------------------------------------------------------------------------------------------------- dense


class DenseLayout(Protocol):
    """All pairs of n queries and m keys."""

    @property
    def n(self) -> int:
        """How many queries."""
        ...

    @property
    def m(self) -> int:
        """How many keys."""
        ...

    @property
    def closed(self) -> str | None:
        """ "causal" or "full", which need no mask; else None."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of packed documents, each of the closed form; () is one."""
        ...

    def documents(self, device: torch.device) -> Iterator[tuple[Tensor, DenseLayout]]:
        """For each length, the nodes (documents, length) of the documents that have it, and the layout of one."""
        ...

    def mask(self, device: torch.device) -> Tensor | None:
        """The edges as a bool tensor (n, m); None where `closed` is not."""
        ...
