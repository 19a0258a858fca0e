"""What must travel between ranks, and what each of them computes: from the expression of a graph alone.

An edge whose query is on one rank and whose key is on another is computed on either: its key moves to the query's rank,
or its query to the key's, whence a partial result comes home. Both ranks find the same, without a message: of a closed
form from the spans of keys that boxes of queries hear, at no cost for the nodes; of a list from its edges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attngraph.distributed.cover import minimum_vertex_cover
from attngraph.distributed.partition import Nodes, Partition
from attngraph.graph.algebra import Full
from attngraph.graph.base import Edges, Graph, at_size, bind
from attngraph.graph.boxes import EMPTY, FULL, Boxes, joined, spans_of_hubs
from attngraph.graph.compose import PerHead
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.listing import count_edges, list_edges, of_any_head

MOVED_WORK = 4  # how many times as many keys as queries have to travel less: a query that moves takes its work along
BLOCK_ROWS = 4096  # queries that hear keys of another rank at a time
MAX_BLOCKS = 32  # pairs of ranges with edges; in more, the edges are listed if they are few
MAX_LISTED_DEGREE = 256  # edges of a query, on average
MAX_RANGES = 16  # of one rank's nodes; in more, the edges of all are listed, rather than of each range


class Block(NamedTuple):
    """Edges that are computed at once: of some queries that a rank holds, and some keys."""

    graph: Graph
    queries: slice
    """Of those held."""
    keys: slice
    distance: int | None
    """By how much the number of key 0 is above that of query 0, of nodes that follow each other; else None."""
    edges: int
    """As `Graph.num_edges`, of any head."""
    numbers: Tensor | None = None
    """Of each edge, its number among those of the rank's own queries, where they are listed."""

    @property
    def size(self) -> tuple[int, int]:
        """How many queries and keys."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def num_distances(self) -> int:
        """How many different distances of a query and a key it has: of nodes that follow each other few."""
        return self.edges if self.distance is None else sum(self.size) - 1

    def distances(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of the numbers of all nodes held, those distances, key - query: of each offset, or of each edge."""
        if self.distance is not None:
            return torch.arange(1 - self.size[0], self.size[1]) + self.distance
        key, query = self.graph.edge_index(*self.size)
        return keys[self.keys][key] - queries[self.queries][query]


class Transfer(NamedTuple):
    """Rows that are sent to each rank and received from it."""

    sent: tuple[Nodes, ...]
    """To each rank."""
    received: tuple[Nodes, ...]
    """From each rank."""

    @property
    def held(self) -> Nodes:
        """What is received, in order."""
        return Nodes.joined(list(self.received))


class Stage(NamedTuple):
    """Some of the keys that travel, and what is computed by them."""

    keys: Transfer
    blocks: tuple[Block, ...]


class Route(NamedTuple):
    """What one rank computes, and what it sends and receives for that."""

    own: tuple[Block, ...]
    """Its own queries by its own keys."""
    stages: tuple[Stage, ...]
    """Its own queries by keys of others."""
    queries: Transfer
    """Queries that are sent to be computed elsewhere, and are received."""
    guests: tuple[Block, ...]
    """Queries of others by its own keys."""

    @property
    def edges(self) -> int:
        """How many it computes."""
        blocks = [*self.own, *self.guests, *(block for stage in self.stages for block in stage.blocks)]
        return sum(block.edges for block in blocks)

    @property
    def halo_rows(self) -> int:
        """Rows of keys that it receives in all."""
        return sum(stage.keys.held.total for stage in self.stages)


class Moves(NamedTuple):
    """What travels from and to one rank."""

    keys: Transfer
    queries: Transfer
    out_of: Edges | None
    """Of lists, the edges of the own queries."""
    into: Edges | None
    """And those of the own keys."""


class Crossing(NamedTuple):
    """What moves of the edges between the queries of one rank and the keys of another: a cover of them."""

    keys: Nodes
    queries: Nodes


NOTHING = Nodes(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


class Routing:
    """The routes of a graph over ranks: of queries by one partition, of keys by another, which may be the same.

    `numbered`: so that each edge has a number; `move_queries`: whether queries may move, or keys alone.
    """

    def __init__(self, graph: Graph, queries: Partition, keys: Partition, *, numbered: bool, move_queries: bool):
        self.graph, self.n, self.m = at_size(graph.sized(queries.n, keys.n))
        any_head = of_any_head(self.graph, self.n, self.m) if self.graph.heads else self.graph
        self.any_head, self.transposed = any_head, bind(any_head.T, self.m, self.n)
        self.queries, self.keys = queries, keys
        self.numbered, self.move_queries = numbered, move_queries
        self.listed = numbered or _has_lists(any_head, self.n, self.m) or max(queries.pieces, keys.pieces) > MAX_RANGES

    def own_edges(self, rank: int) -> Edges:
        """The edges of a rank's queries, sorted: each has its place among them as its number."""
        return self._edges_of(self.any_head, self.queries, rank, self.m)

    def num_edges(self, rank: int) -> int:
        """How many there are."""
        if self.queries.pieces > MAX_RANGES:
            return len(self.own_edges(rank)[0])
        return self._count(self.queries.ranges(rank))

    def of(
        self, rank: int, stage_rows: int | None = None, *, moves: Moves | None = None, ordered: bool = False
    ) -> Route:
        """What one rank does, of the keys that travel so many at a time.

        `moves`, if they are known; `ordered`: as if it held what it receives in the order of the nodes, so that there
        are few blocks, which an estimate asks alone.
        """
        keys, queries, out_of, into = self.moves(rank) if moves is None else moves
        own_queries, own_keys = self.queries.held(rank), self.keys.held(rank)
        stages = [
            Stage(some, self._blocks(own_queries, some.held.ascending if ordered else some.held, out_of))
            for some in _staged(keys, rank, stage_rows, int(self.keys.counts.max()))
        ]
        own = self._blocks(own_queries, own_keys, out_of)
        return Route(own, tuple(stages), queries, self._guest_blocks(queries.received, keys.sent, own_keys, into))

    def moves(self, rank: int) -> Moves:
        """What travels from and to a rank."""
        ranks, out_of, into = self.queries.ranks, None, None
        if self.listed:
            out_of = self.own_edges(rank)
            key, query = self._edges_of(self.transposed, self.keys, rank, self.n)
            into = query, key
            fetched = self._listed_covers(*out_of, self.keys.owners(out_of[1]), rank)
            owed = self._listed_covers(*into, self.queries.owners(query), rank)
        else:
            fetched, owed = self._crossings(rank)
        none = Crossing(NOTHING, NOTHING)
        fetched, owed = ([side.get(peer, none) for peer in range(ranks)] for side in (fetched, owed))
        keys = Transfer(tuple(each.keys for each in owed), tuple(each.keys for each in fetched))
        queries = Transfer(tuple(each.queries for each in fetched), tuple(each.queries for each in owed))
        return Moves(keys, queries, out_of, into)

    # --------------------------------------------------------------------------------------- of closed forms

    def _crossings(self, rank: int) -> tuple[dict[int, Crossing], dict[int, Crossing]]:
        """What moves of the edges from keys of each other rank to own queries, and from own keys to its queries."""
        own_queries, own_keys = self.queries.ranges(rank), self.keys.ranges(rank)
        heard = _peers(self.any_head, own_queries, self.keys, rank)
        hearing = _peers(self.transposed, own_keys, self.queries, rank)
        fetched = self._covers({peer: (own_queries, self.keys.ranges(peer)) for peer in heard})
        return fetched, self._covers({peer: (self.queries.ranges(peer), own_keys) for peer in hearing})

    def _covers(self, pairs: dict[int, tuple[list, list]]) -> dict[int, Crossing]:
        """Of the ranges of queries and of keys of each pair of ranks, the smaller side of the edges between them."""
        boxes = [(peer, *q, *k) for peer, (rows, columns) in pairs.items() for q in rows for k in columns]
        peer, top, bottom, left, right = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 5).T
        number, first, stop = spans_of_hubs(self.any_head, self.transposed, Boxes(top, bottom, left, right))
        keys, queries = _by_peer(peer[number], first, stop), {}
        if self.move_queries:  # the queries of the same boxes, at the keys that are heard
            boxes_of_keys = Boxes(first, stop, top[number], bottom[number])
            found = spans_of_hubs(self.transposed, self.any_head, boxes_of_keys)
            queries = _by_peer(peer[number][found[0]], *found[1:])
        crossings = {}
        for other, heard in keys.items():
            hearing = queries.get(other, NOTHING)
            moves = self.move_queries and MOVED_WORK * hearing.total <= heard.total
            crossings[other] = Crossing(NOTHING, hearing) if moves else Crossing(heard, NOTHING)
        return crossings

    # ---------------------------------------------------------------------------------------------- of lists

    def _edges_of(self, graph: Graph, side: Partition, rank: int, across: int) -> Edges:
        """The edges of a rank's rows in a graph, by row and column, sorted."""
        if side.pieces > MAX_RANGES:
            row, column = list_edges(graph, side.n, across)
            own = side.owners(row) == rank
            return row[own], column[own]
        return _edges_of_ranges(graph, side.ranges(rank), across)

    def _listed_covers(self, query: Tensor, key: Tensor, peer: Tensor, rank: int) -> dict[int, Crossing]:
        """The least cover of the edges of each other rank."""
        crossings = {}
        for other in peer.unique().tolist():
            if other != rank:
                between = peer == other
                crossings[other] = self._least_cover(query[between], key[between])
        return crossings

    def _least_cover(self, query: Tensor, key: Tensor) -> Crossing:
        queries, keys = query.unique(), key.unique()
        if not self.move_queries:
            return Crossing(Nodes.of(keys), NOTHING)
        row, column = torch.searchsorted(queries, query), torch.searchsorted(keys, key)
        in_queries, in_keys = minimum_vertex_cover(row, column, len(queries), len(keys))
        return Crossing(Nodes.of(keys[in_keys]), Nodes.of(queries[in_queries]))

    # ---------------------------------------------------------------------------------------------- blocks

    def _guest_blocks(
        self, received: tuple[Nodes, ...], sent: tuple[Nodes, ...], own: Nodes, into: Edges | None
    ) -> tuple[Block, ...]:
        """Those of the queries that came, by the own keys that did not go to their rank."""
        blocks, at = [], 0
        for queries, gone in zip(received, sent, strict=True):
            edges = None
            if into is not None and queries.total:
                kept = ~torch.isin(into[1], gone.numbers)
                edges = into[0][kept], into[1][kept]
            for block in self._blocks(queries, own, edges):
                moved = slice(block.queries.start + at, block.queries.stop + at)
                blocks.append(block._replace(queries=moved, numbers=None))
            at += queries.total
        return tuple(blocks)

    def _blocks(self, queries: Nodes, keys: Nodes, edges: Edges | None) -> tuple[Block, ...]:
        """The edges between nodes that a rank holds: a block of each pair of ranges that has some, or one of a list.

        Many small blocks would each be a call: of more than `MAX_BLOCKS` the edges are listed, if these are few.
        """
        if edges is not None:
            return self._listed_block(queries, keys, edges)
        if not len(queries.first) or not len(keys.first):
            return ()
        rows, columns = queries.merged.ranges, keys.merged.ranges
        pairs = torch.tensor([(*r, *c) for r in rows for c in columns], dtype=torch.int64).reshape(-1, 6)
        first, stop, _, begin, end, _ = pairs.T.contiguous()
        kind = self.any_head._classify_boxes(Boxes(first, stop, begin, end))
        pairs, kind = pairs[kind != EMPTY], kind[kind != EMPTY]
        if len(pairs) > MAX_BLOCKS:
            ranges = [(first, stop) for first, stop, _ in rows]
            size = sum(stop - first for first, stop in ranges)
            if self._count(ranges) <= MAX_LISTED_DEGREE * size:
                return self._listed_block(queries, keys, _edges_of_ranges(self.any_head, ranges, self.m))
        blocks = []
        for (first, stop, at, begin, end, place), is_full in zip(pairs.tolist(), (kind == FULL).tolist(), strict=True):
            for low, high in self._pieces(first, stop, begin, end, is_full):
                graph = self._block(low, high, begin, end, is_full)
                if edges_here := count_edges(graph, high - low, end - begin):
                    own = slice(at + low - first, at + high - first)
                    blocks.append(Block(graph, own, slice(place, place + end - begin), begin - low, edges_here))
        return tuple(blocks)

    def _count(self, ranges: list[tuple[int, int]]) -> int:
        """The edges of ranges of queries."""
        rows = [(bind(self.any_head.rows(*each), each[1] - each[0], self.m), each[1] - each[0]) for each in ranges]
        return sum(count_edges(graph, n, self.m) for graph, n in rows)

    def _pieces(self, first: int, stop: int, begin: int, end: int, is_full: bool) -> list[tuple[int, int]]:
        """The queries of a block, some at a time where they are not the keys, as results that merge lie beside others.

        Of keys elsewhere few queries may hear any; those before and after them are left out.
        """
        if (first, stop) == (begin, end):
            return [(first, stop)]
        low, high = first, stop
        if not is_full:
            _, top, bottom = spans_of_hubs(self.transposed, self.any_head, Boxes.one(begin, end, first, stop))
            if not len(top):
                return []
            low, high = int(top[0]), int(bottom[-1])
        return [(row, min(row + BLOCK_ROWS, high)) for row in range(low, high, BLOCK_ROWS)]

    def _block(self, first: int, stop: int, begin: int, end: int, is_full: bool) -> Graph:
        """The queries first … stop-1 and the keys begin … end-1."""
        is_one = not self.graph.heads
        if is_one and (is_full or int(self.graph._classify_boxes(Boxes.one(first, stop, begin, end))) == FULL):
            return Full().sized(stop - first, end - begin)
        return bind(self.graph.rows(first, stop).T.rows(begin, end).T, stop - first, end - begin)

    def _listed_block(self, queries: Nodes, keys: Nodes, edges: Edges) -> tuple[Block, ...]:
        """Those of some edges that lie between these queries and keys."""
        (row, has_row), (column, has_column) = _places(queries, edges[0]), _places(keys, edges[1])
        number = (has_row & has_column).nonzero()[:, 0]
        if not len(number):
            return ()
        n, m = queries.total, keys.total
        row, column = row[number], column[number]
        order = (row * m + column).argsort()
        row, column, number = row[order], column[order], number[order]
        graph = EdgeList(torch.stack([column, row]), (n, m), is_sorted=True)
        if self.graph.heads:
            member = self.graph.contains(edges[0][number], edges[1][number])
            graph = PerHead([EdgeList(graph.edge_index()[:, own], (n, m), is_sorted=True) for own in member])
        return (Block(graph, slice(0, n), slice(0, m), None, len(row), number),)


def _has_lists(graph: Graph, n: int, m: int) -> bool:
    """Whether edges of a graph are found by listing them."""
    return graph._breakpoints(n, m) is None


def _peers(graph: Graph, ranges: list[tuple[int, int]], others: Partition, rank: int) -> list[int]:
    """The other ranks whose columns a box of some rows may have edges with."""
    if not ranges:
        return []
    pieces = len(others.first)
    top, bottom = (side.repeat_interleave(pieces) for side in torch.tensor(ranges).T)
    left, right = (side.repeat(len(ranges)) for side in (others.first, others.stop))
    found = graph._classify_boxes(Boxes(top, bottom, left, right)) != EMPTY
    return [peer for peer in others.owner.repeat(len(ranges))[found].unique().tolist() if peer != rank]


def _by_peer(peer: Tensor, first: Tensor, stop: Tensor) -> dict[int, Nodes]:
    """Ranges of each rank."""
    peer, first, stop = joined(peer, first, stop)
    ranks, counts = peer.unique_consecutive(return_counts=True)
    sides = zip(first.split(counts.tolist()), stop.split(counts.tolist()), strict=True)
    return {rank: Nodes(*side) for rank, side in zip(ranks.tolist(), sides, strict=True)}


def _edges_of_ranges(graph: Graph, ranges: list[tuple[int, int]], across: int) -> Edges:
    """The edges of ranges of rows, sorted."""
    found = [(NOTHING.first, NOTHING.first)]
    for first, stop in ranges:
        row, column = list_edges(bind(graph.rows(first, stop), stop - first, across), stop - first, across)
        found.append((row + first, column))
    row, column = (torch.cat(side) for side in zip(*found, strict=True))
    return row, column


def _places(held: Nodes, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each node among those held, and whether it is there."""
    numbers = held.numbers
    if not len(numbers):
        return torch.zeros_like(nodes), torch.zeros_like(nodes, dtype=torch.bool)
    order = numbers.argsort()
    at = torch.searchsorted(numbers[order], nodes.contiguous()).clamp(max=len(order) - 1)
    return order[at], numbers[order][at] == nodes


def _staged(keys: Transfer, rank: int, rows: int | None, most: int) -> list[Transfer]:
    """The transfer in stages of at most so many rows from one rank each, the next rank's first; all at once without.

    In a stage all ranks send to, and receive from, the rank at one distance around a ring (Liu et al. 2023, "Ring
    attention"), so that each has as many stages, and knows what the others do in each.
    """
    if rows is None:
        return [keys]
    ranks, stages = len(keys.sent), []
    for distance in range(1, ranks):
        to, source = (rank + distance) % ranks, (rank - distance) % ranks
        sent, received = keys.sent[to].cut(rows), keys.received[source].cut(rows)
        for piece in range(-(-most // rows)):
            sides = []
            for peer, pieces in ((to, sent), (source, received)):
                nodes = [NOTHING] * ranks
                nodes[peer] = pieces[piece] if piece < len(pieces) else NOTHING
                sides.append(tuple(nodes))
            stages.append(Transfer(*sides))
    return stages
