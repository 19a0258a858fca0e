"""The edges of any graph by the fastest way known: some parts of an expression by lines, others by lists.

`split` takes those parts out of an expression that are best listed. What is left is counted by its lines, or found box
by box, and agrees with the whole in all pairs but those of the lists, each of which is looked at once. So the cost of
an expression is that of its parts, whatever operations stand between them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from attngraph.graph import counting
from attngraph.graph.base import Edges, Graph, bind, defines
from attngraph.graph.boxes import require_memory

PAIRS_PER_STEP = 1 << 24  # pairs (query, key) that a scan of a predicate looks at in one step: 16 MiB of bools
BYTES_PER_PAIR = 16  # about what `contains` takes for each
BYTES_PER_NODE = 32  # about what counting takes for each node
BYTES_PER_EDGE = 60  # about what listing takes for each edge, temporary tensors included
LONG_SECONDS = 30  # of a scan that warns
MAX_PAIRS = 1 << 40  # that are looked at one by one: hours


Answer = TypeVar("Answer")


class Listed(NamedTuple):
    """A graph whose edges are listed, and where they lie in a larger one."""

    graph: Graph
    n: int
    m: int
    row: int = 0
    """Of the larger one, the query that is its first query, or its first key if it lies transposed."""
    column: int = 0
    is_transposed: bool = False

    def moved(self, rows: int, columns: int) -> Listed:
        """The same, further down and to the right."""
        return self._replace(row=self.row + rows, column=self.column + columns)

    @property
    def transposed(self) -> Listed:
        """The same after queries and keys changed places."""
        return self._replace(row=self.column, column=self.row, is_transposed=not self.is_transposed)

    @property
    def cost(self) -> int:
        """About how many edges are to be listed."""
        return self.graph._count(self.n, self.m) if defines(self.graph, "_count") else self.n * self.m

    def edges(self, n: int, m: int) -> Edges:
        """Those within the n queries and m keys of the larger graph."""
        if self.is_transposed:
            key, query = self.graph._edges(self.n, self.m)
        else:
            start, stop = max(0, -self.row), min(self.n, n - self.row)
            if start == 0 and stop == self.n:
                query, key = self.graph._edges(self.n, self.m)
            else:
                query, key = self.graph._edges_of_rows(start, max(start, stop), self.n, self.m)
                query = query + start
        query, key = query + self.row, key + self.column
        inside = (query >= 0) & (query < n) & (key >= 0) & (key < m)
        return query[inside], key[inside]


IsListed = Callable[[Graph, int, int], bool]
Split = tuple[Graph, tuple[Listed, ...]]


def split(graph: Graph, n: int, m: int, is_listed: IsListed | None = None) -> tuple[Graph, Edges]:
    """A graph, to be found box by box, that agrees with this one in all pairs but those of a list, sorted.

    `is_listed` says which parts of the expression are listed: by default those whose edges are found by listing them.

    >>> from attngraph import parse
    >>> split(parse("Causal() & (Window(8, 0) | Random(2, 0, 9))"), 9, 9)[0]
    Causal() & (Window(8, 0) | Empty().sized(None, 9))
    """
    rest, listed = graph._split(n, m, is_listed or _is_found_by_listing)
    return rest, merge_edges([each.edges(n, m) for each in dict.fromkeys(listed)], m)


def _is_found_by_listing(graph: Graph, n: int, m: int) -> bool:
    return graph._found_by_listing()


def has_lists_alone(graph: Graph, n: int, m: int) -> bool:
    """Whether a graph can't be counted by its lines, and its edges can be listed."""
    return defines(graph, "_edges") and graph._breakpoints(n, m) is None


def by_lines(graph: Graph, n: int, m: int) -> tuple[Graph, Edges, Edges] | None:
    """A graph that can be counted by its lines, and the edges, sorted, that this one has and lacks besides; or None."""
    rest, listed = graph._split(n, m, has_lists_alone)
    if rest._breakpoints(n, m) is None or any(each.graph is graph for each in listed):
        return None
    if not listed:
        return rest, no_edges(), no_edges()
    query, key = merge_edges([each.edges(n, m) for each in dict.fromkeys(listed)], m)
    here, there = graph.contains(query, key), rest.contains(query, key)
    more, less = here & ~there, there & ~here
    return rest, (query[more], key[more]), (query[less], key[less])


def list_edges(graph: Graph, n: int, m: int) -> Edges:
    """All edges, sorted, of a graph that is bound to its size; where heads have graphs of their own, those of any."""
    if graph.heads:
        return list_edges(of_any_head(graph, n, m), n, m)
    parts = by_lines(graph, n, m)
    found = None if parts is None else counting.edges(parts[0], n, m)
    if parts is None or found is None:
        return graph._edges(n, m)
    _, more, less = parts
    if len(less[0]):
        kept = ~torch.isin(found[0] * m + found[1], less[0] * m + less[1], assume_unique=True)
        found = found[0][kept], found[1][kept]
    return merge_edges([found, more], m) if len(more[0]) else found


def count_edges(graph: Graph, n: int, m: int) -> int:
    """The number of edges of a graph that is bound to its size; where heads have their own, of those of any."""
    if graph.heads:
        return count_edges(of_any_head(graph, n, m), n, m)
    found = counting.count(graph, n, m)
    if found is not None:
        return found
    parts = None if defines(graph, "_count") else by_lines(graph, n, m)
    found = None if parts is None else counting.count(parts[0], n, m)
    if parts is None or found is None:
        return graph._count(n, m)
    return found + len(parts[1][0]) - len(parts[2][0])


def count_keys(graph: Graph, n: int, m: int) -> Tensor:
    """How many keys each query of a graph that is bound to its size, one for all heads, hears: int64 (n,)."""
    require_memory(n * BYTES_PER_NODE, f"for the degrees of {graph} at {n} × {m}")
    parts = by_lines(graph, n, m)
    found = None if parts is None else counting.in_degrees(parts[0], n, m)
    if parts is not None and found is not None:
        more, less = (torch.bincount(query, minlength=n) for query, _ in parts[1:])
        return found + more - less
    if defines(graph, "_edges"):
        return torch.bincount(graph._edges(n, m)[0], minlength=n)
    return torch.cat([torch.empty(0, dtype=torch.int64), *(inside.sum(1) for _, inside in scanned(graph, n, m))])


def lists_rows(graph: Graph, n: int, m: int) -> bool:
    """Whether the edges of some queries cost as much as they are, not as much as those of all queries."""
    rest, listed = graph._split(n, m, has_lists_alone)
    apart = (not each.is_transposed and defines(each.graph, "_edges_of_rows") for each in listed)
    return rest._breakpoints(n, m) is not None and all(apart)


def of_any_head(graph: Graph, n: int, m: int) -> Graph:
    """The union of the graphs of all heads."""
    different = tuple(dict.fromkeys(graph._head(h) for h in range(cast(int, graph.heads))))
    return bind(algebra.Union(different) if len(different) > 1 else graph._head(0), n, m)


def of_each_head(graph: Graph, n: int, m: int, ask: Callable[[Graph, int, int], Answer]) -> list[Answer]:
    """The answer of each head's graph at this size; of the graph itself, where all heads have one."""
    heads = [bind(graph._head(h), n, m) for h in range(graph.heads or 1)]
    answers = {head: ask(head, n, m) for head in dict.fromkeys(heads)}
    return [answers[head] for head in heads]


def scanned(graph: Graph, n: int, m: int, device: torch.device | str | None = None) -> Iterator[tuple[int, Tensor]]:
    """The mask, some queries at a time: the first of them, and their rows (some, m), or (H, some, m)."""
    if n * m > MAX_PAIRS:
        raise ValueError(
            f"all {n * m:,} pairs of {graph} would have to be looked at one by one (at most {MAX_PAIRS:,} are): use "
            f"fewer nodes, rows of it, graph.rows(start, stop), or closed forms; a class may define _edges"
        )
    step, began = max(1, PAIRS_PER_STEP // max(m * (graph.heads or 1), 1)), time.perf_counter()
    require_memory(min(step, n) * m * BYTES_PER_PAIR, f"to look at the {m:,} keys of a query of {graph}")
    key = torch.arange(m, device=device)[None]
    for start in range(0, n, step):
        yield start, graph.contains(torch.arange(start, min(start + step, n), device=device)[:, None], key)
        if start == 0:
            warn_if_long(graph, n * m, (time.perf_counter() - began) * n / step)


def warn_if_long(graph: Graph, pairs: int, seconds: float) -> None:
    """Warn where looking at all pairs is expected to take long."""
    if seconds > LONG_SECONDS:
        warnings.warn(
            f"{pairs:,} pairs of {graph} are looked at one by one, which takes about {seconds:.0f} s: a class that "
            f"defines _classify_boxes, _breakpoints or _edges is found without",
            stacklevel=2,
        )


def sort_edges(query: Tensor, key: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Edges by query, then key."""
    order = (query * m + key).argsort()
    return query[order], key[order]


def no_edges() -> Edges:
    """An empty list of edges."""
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)


def merge_edges(parts: list[Edges], m: int) -> Edges:
    """The union of several lists of edges, sorted."""
    if not parts:
        return no_edges()
    edges = sum(len(query) for query, _ in parts)
    require_memory(edges * BYTES_PER_EDGE, f"to sort {edges:,} edges")
    code = torch.unique(torch.cat([query * m + key for query, key in parts]))
    return code // max(m, 1), code % max(m, 1)


from attngraph.graph import algebra  # noqa: E402  which derives from Graph, and lists
