"""Graphs that are given as a list of their edges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attngraph import cache
from attngraph.graph.algebra import contains_code
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.boxes import Boxes, classify, require_memory
from attngraph.graph.values import plain_int

ROWS_PER_STEP = 1 << 22  # rows of boxes whose edges are counted in one step: 32 MiB for each of a few tensors
_NUMBERS = count(1)  # of lists that are made for some calls alone, which nothing else is to be equal to
MAX_EDGES_TOLD, MAX_EDGES_WRITTEN = 16, 1000  # by `str` and `repr`; longer lists are named by their digest


class EdgeList(Graph):
    """The edges in a tensor (2, E): row 0 the key (source), row 1 the query (target), as in PyG.

    A graph is a set: the edges are sorted by query, then key, and an edge that is given twice is one edge. The given
    order stays available: column e of the given `edge_index` is edge `position[e]` of the graph, so that per-edge
    results come in the given order as ``result[..., graph.position]``; and edge e of the graph is column `order[e]`
    (of equal ones the first). `EdgeBias.of` takes values in the given order, for this and for other graphs. A size of
    one number stands for as many queries as keys.

    >>> graph = EdgeList([[2, 0, 2], [1, 1, 1]], size=3)
    >>> graph.edge_index()
    tensor([[0, 2],
            [1, 1]])
    >>> graph.position, graph.order
    (tensor([1, 0, 1]), tensor([1, 0]))
    >>> graph
    EdgeList([[0, 2], [1, 1]], size=(3, 3))

    It stays on the device of the given tensor: a plan for that device reads it there. What it lists is, as of every
    graph, on the default device.

    Raises ValueError for a shape other than (2, E), negative numbers and numbers beyond the size, and TypeError for
    numbers that are not integers. Columns that are sorted already are noticed; `is_sorted` makes it an error that they
    are not, by query, then key, each once.

    With `entries`, it is a graph for each entry of a batch, as `Batched` is: `size` and the edges are those of all
    entries, one after the other, of equal sizes, and no edge leads from one to another. See `from_neighbors`.
    """

    if TYPE_CHECKING:
        neighbors: Tensor | None
        """The keys of each query, int64 (N, k), where it is given so: they are listed when that is asked for."""
        entries: int | None
        """Of a batch, each with a graph of its own; None: one graph, for all of them."""
        plans: dict | None
        """Those of a graph that is made for some calls alone, which end with it; None: cached, as most are."""

    def __init__(
        self,
        edge_index: Tensor | Sequence[Sequence[int]],
        size: int | tuple[int, int],
        *,
        entries: int | None = None,
        is_sorted: bool = False,
    ):
        given = integer_tensor(edge_index)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"size must be a number of nodes, or (num_queries, num_keys) (got {size!r})")
        n, m = map(plain_int, sides)
        size = (n, m)
        require_ints(0, num_queries=n, num_keys=m)
        if n * m >= 1 << 63:
            raise ValueError(
                f"num_queries * num_keys must be below 2**63, so that a pair is one int64 (got size={size})"
            )
        for name, row, limit in (("key", given[0], m), ("query", given[1], n)):
            least, most = (0, 0) if not row.numel() else map(int, torch.aminmax(row))
            if row.numel() and not (least >= 0 and most < limit):
                raise ValueError(
                    f"edge_index must name {name} nodes from 0 to {limit - 1}, as size={size} says (got "
                    f"{least} … {most}); row 0 holds keys (sources), row 1 queries (targets)"
                )
        if entries is not None:
            _check_entries(given, size, entries)
        code, position, order = _sorted(given[1] * m + given[0], is_sorted)
        self._set(size=size, code=code, position=position, order=order, entries=entries, plans=None, neighbors=None)
        self.__post_init__()

    @cached_property
    def code(self) -> Tensor:
        """query · num_keys + key of each edge, ascending: int64 (E,)."""
        assert self.neighbors is not None
        with nullcontext() if torch.compiler.is_compiling() else cache.outside_of_transforms():
            return _code_of(self.neighbors, self._keys, self.entries or 1)

    @cached_property
    def position(self) -> Tensor:
        """The edge that each given column became: int64 (given,)."""
        return torch.arange(len(self.code), device=self.code.device)

    @cached_property
    def order(self) -> Tensor:
        """The column from which each edge came: int64 (E,)."""
        return self.position

    @property
    def max_edges(self) -> int:
        """At least as many as there are edges, and told without listing them."""
        return self.code.shape[0] if self.neighbors is None else self.neighbors.numel()

    def _own_size(self):
        return self.size

    @property
    def _keys(self) -> int:
        return cast(int, self.size[1])

    @property
    def query(self) -> Tensor:
        """The query of each edge, ascending: int64 (E,)."""
        return self.code // max(self._keys, 1)

    @property
    def key(self) -> Tensor:
        """The key of each edge, ascending for each query: int64 (E,)."""
        return self.code % max(self._keys, 1)

    @property
    def given(self) -> Tensor:
        """The edges in the order in which they were given, equal ones too: int64 (2, given)."""
        return torch.stack([self.key, self.query])[:, self.position]

    def contains(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return contains_code(self.code.to(q_idx.device), q_idx * self._keys + kv_idx)

    def mask(self, n: int | None = None, m: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """As `Graph.mask`, by its edges alone."""
        if n is None or m is None or (n, m) != self.size or type(self) is not EdgeList:
            return super().mask(n, m, device)
        require_memory(n * m, f"for a mask of {n} × {m}", None if device is None else torch.device(device))
        if self.neighbors is not None and self.entries in (None, 1):
            found = torch.zeros(n, m, dtype=torch.bool, device=device)
            return found.scatter_(1, self.neighbors.to(found.device), True)
        found = torch.zeros(n * m, dtype=torch.bool, device=device)
        return found.index_fill_(0, self.code.to(found.device), True).view(n, m)

    def _found_by_listing(self):
        return True

    def _classify_boxes(self, boxes):
        area, inside = (boxes.bottom - boxes.top) * (boxes.right - boxes.left), self._count_inside(boxes)
        return classify(inside == 0, inside == area)

    def _count_inside(self, boxes: Boxes) -> Tensor:
        """How many edges each box has: in every row, the edges between two columns lie together."""
        count, high, code = torch.zeros_like(boxes.top), boxes.bottom - boxes.top, self.code.to(boxes.top.device)
        step = max(1, ROWS_PER_STEP // int(high.max())) if len(high) else 1
        for some in torch.arange(len(high)).split(step):
            box = some.repeat_interleave(high[some])
            row = torch.arange(len(box)) - (high[some].cumsum(0) - high[some]).repeat_interleave(high[some])
            first = (boxes.top[box] + row) * self._keys
            left, right = (torch.searchsorted(code, first + side[box]) for side in (boxes.left, boxes.right))
            count.index_add_(0, box, right - left)
        return count

    def _edges(self, n, m):
        here = torch.get_default_device()
        return self.query.to(here), self.key.to(here)

    def _edges_of_rows(self, start, stop, n, m):
        low, high = torch.searchsorted(self.code, self.code.new_tensor([start * m, stop * m])).tolist()
        code = self.code[low:high].to(torch.get_default_device()) - start * m
        return code // max(m, 1), code % max(m, 1)

    def _count(self, n, m):
        return len(self.code)

    @cached_property
    def digest(self) -> str:
        """A hash of the edges and the size, the same on every device."""
        sums = (int(_mixed(self.code, seed).sum()) for seed in (1, 2))  # of a set: in any order
        return hashlib.sha256(str((self.size, len(self.code), *sums)).encode()).hexdigest()[:32]

    def _write(self, inner: Callable[[Graph], str]) -> str:
        if len(self.code) > MAX_EDGES_WRITTEN and inner in (repr, Graph.__repr__):
            return str(self)
        return f"EdgeList({[self.key.tolist(), self.query.tolist()]}, {self.told_size})"

    @property
    def told_size(self) -> str:
        """Its size, and its entries where it has some, as arguments of a call."""
        return f"size={self.size}" + ("" if self.entries is None else f", entries={self.entries}")

    def _write_key(self) -> str:
        return str(self) if self.plans is None else f"<list {next(_NUMBERS)}>"

    def _write_exported(self, tensors: list[Tensor]) -> str:
        tensors.append(self.code)
        return f"EdgeList(_{len(tensors) - 1}, {self.told_size})"

    def __str__(self) -> str:
        if len(self.code) <= MAX_EDGES_TOLD:
            return repr(self)
        return f"EdgeList(<{len(self.code)} edges, {self.digest}>, {self.told_size})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, EdgeList):
            return NotImplemented
        if self is other:
            return True
        same = self.digest == other.digest and self.entries == other.entries
        return same and torch.equal(self.code, other.code.to(self.code.device))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Cheaper than the digest, as most lists that are made for some calls alone are compared with no other."""
        return hash((self.size, len(self.code), int(self.code.sum())))

    def without_plans(self) -> EdgeList:
        """An equal graph that is made for some calls alone: what its plans hold, so that they end with it."""
        size = cast(tuple[int, int], self.size)
        return _restored(size, self.code, self.position, self.order, self.entries, plans={})

    def __reduce__(self) -> tuple:
        return _restored, (self.size, self.code, self.position, self.order, self.entries)


def _check_entries(given: Tensor, size: tuple[int, int], entries: int) -> None:
    """Raise unless the nodes are those of entries of equal sizes, and each edge within one."""
    require_ints(1, entries=entries)
    if size[0] % entries or size[1] % entries:
        raise ValueError(f"the size of EdgeList must be that of {entries} entries of equal sizes (got size={size})")
    key, query = (row // max(side // entries, 1) for row, side in zip(given, size[::-1], strict=True))
    if bool((key != query).any()):
        raise ValueError(
            "no edge may lead from one entry to another: the nodes of all entries are numbered one after the other"
        )


def _sorted(given: Tensor, is_sorted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers in any order → (ascending, each once; the place of each given one; the first given one of each)."""
    columns = torch.arange(len(given), device=given.device)
    if bool((given[1:] > given[:-1]).all()):
        return given, columns, columns
    if is_sorted:
        raise ValueError(
            "is_sorted=True says that the columns of edge_index are sorted by row 1, then row 0, each once "
            "(got others); leave it out, and they are sorted here"
        )
    narrow = given.to(torch.int32) if len(given) and int(given.max()) < 1 << 31 else given  # sorted in half the time
    code, order = narrow.sort(stable=True)
    code = code.to(torch.int64)
    is_new = torch.ones_like(code, dtype=torch.bool)
    torch.ne(code[1:], code[:-1], out=is_new[1:])
    if bool(is_new.all()):
        return code, torch.empty_like(order).scatter_(0, order, columns), order
    position = torch.empty_like(order).scatter_(0, order, is_new.cumsum(0) - 1)
    return code[is_new], position, order[is_new]


def _restored(
    size: tuple[int, int],
    code: Tensor,
    position: Tensor,
    order: Tensor,
    entries: int | None = None,
    plans: dict | None = None,
) -> EdgeList:
    return _of(size=size, code=code, position=position, order=order, entries=entries, plans=plans, neighbors=None)


def _of(**values: Any) -> EdgeList:
    """The graph with these attributes."""
    graph = object.__new__(EdgeList)
    graph._set(**values)
    graph.__post_init__()
    return graph


def of_edge_index(edge_index: Tensor | Sequence[Sequence[int]], num_nodes: int | tuple[int, int] | None) -> EdgeList:
    """The graph of an `edge_index`, remembered as `from_edge_index` says."""
    given, num_nodes = integer_tensor(edge_index), plain_int(num_nodes)
    if isinstance(edge_index, Tensor) and edge_index.is_cuda and not edge_index.is_inference():
        state = (*given.shape, edge_index.data_ptr(), edge_index._version)
    else:
        state = fingerprint(given)
    known = cache.EDGE_INDEX.get(edge_index) if isinstance(edge_index, Tensor) else None
    graphs = known[1] if known is not None and known[0] == state else {}
    wanted = repr(num_nodes)
    if wanted not in graphs:
        if num_nodes is None:
            num_nodes = int(given.max()) + 1 if given.numel() else 0
        graphs = {**graphs, wanted: EdgeList(given, num_nodes)}
        if isinstance(edge_index, Tensor):
            cache.EDGE_INDEX[edge_index] = state, graphs
    return graphs[wanted]


def of_sorted(code: Tensor, size: tuple[int, int], entries: int | None = None) -> EdgeList:
    """The graph of these edges, query · num_keys + key, ascending."""
    position = torch.arange(len(code), device=code.device)
    return _restored(size, code, position, position, entries)


def of_neighbors(index: Tensor, num_keys: int, some_are_none: bool = True) -> EdgeList:
    """The graph of the keys of each query, (N, k) or (B, N, k), -1 for none, where some are."""
    entries, rows = None if index.ndim == 2 else len(index), index.flatten(0, -2).to(torch.int64, copy=True)
    size = rows.shape[0], (entries or 1) * num_keys
    if some_are_none or torch.compiler.is_compiling():
        code = _code_of(rows, size[1], entries or 1)
        return _of(size=size, code=code, neighbors=None, entries=entries, plans={})
    return _of(size=size, neighbors=rows, entries=entries, plans={})


def _code_of(rows: Tensor, m: int, entries: int) -> Tensor:
    """The edges, query · m + key, ascending, from the keys of each query in its entry, -1 for none."""
    if rows.shape[1] > 1 and not bool((rows[:, 1:] >= rows[:, :-1]).all()):
        rows = rows.sort(1).values
    query = torch.arange(len(rows), device=rows.device)[:, None]
    code = query * m + rows
    if entries > 1:
        code += query // max(len(rows) // entries, 1) * (m // entries)
    is_edge = rows >= 0
    is_edge[:, 1:] &= rows[:, 1:] != rows[:, :-1]
    return code.flatten() if bool(is_edge.all()) else code[is_edge]


def fingerprint(given: Tensor) -> tuple[int, ...]:
    """What changes with the numbers of a tensor of integers: its shape, and their sum with weights that look random."""
    flat, weights = given.reshape(-1), _weights(BLOCK, given.device)
    whole = flat.numel() // BLOCK * BLOCK
    sums = (flat[:whole].view(-1, BLOCK) * weights).sum(1)
    total = (sums * _weights(len(sums), given.device)).sum() + (flat[whole:] * weights[: flat.numel() - whole]).sum()
    return *given.shape, int(total)


BLOCK = 1 << 14  # numbers that share their weights with those of other blocks, which are weighted in turn


def _weights(count: int, device: torch.device) -> Tensor:
    """int64 (count,), odd or even at random."""
    weights = torch.arange(1, count + 1, device=device).mul_(-0x61C8864680B583EB)  # the golden ratio's
    return weights.bitwise_xor_(weights >> 29)


def _mixed(code: Tensor, seed: int) -> Tensor:
    """Each int64 as another that looks random, another for each seed, by SplitMix64 (Steele et al. 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        code = code + seed * 0x1E3779B97F4A7C15
        code = (code ^ (code >> shift & (1 << 64 - shift) - 1)) * factor
    return code


def integer_tensor(edge_index: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """(2, E) int64."""
    try:
        given = torch.as_tensor(edge_index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"edge_index must be a tensor (2, E) of node numbers ({error})") from None
    if given.numel() == 0:
        given = given.to(torch.int64)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"edge_index must hold integers (got {given.dtype})")
    if given.ndim != 2 or given.shape[0] != 2:
        square = given.ndim == 2 and given.shape[0] == given.shape[1]
        hint = "; a (N, N) mask: from_dense(mask)" if square else ""
        hint = "; of one edge a row: edge_index.T" if given.ndim == 2 and given.shape[1] == 2 else hint
        raise ValueError(f"edge_index must have shape (2, E) (got {tuple(given.shape)}){hint}")
    return given.detach().to(torch.int64)
