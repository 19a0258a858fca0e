"""What ranks have to compute, hold and receive, by this and by other ways to attend over many devices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attngraph.arguments import checked
from attngraph.distributed import partition as partitions
from attngraph.distributed.partition import Partition
from attngraph.distributed.routes import Block, Route, Routing
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.planning.call import Call
from attngraph.planning.candidates import seconds_of
from attngraph.planning.costs import Costs
from attngraph.planning.explain import memory, time

BANDWIDTH = 1e10
"""Bytes that a rank receives a second, where nothing else is given: a network of 100 Gbit/s, most of it used."""
LATENCY = 2e-5
"""Seconds of an exchange, however little travels."""
MAX_RANKS_ASKED = 16  # of more, so many are asked, evenly among them


class Widths(NamedTuple):
    """The numbers that travel for a node."""

    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def key_bytes(self) -> int:
        """Of its key and value."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def query_bytes(self) -> int:
        """Of its query."""
        return self.heads * self.head_dim * self.dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Of its partial result, and the lse: at least in float32."""
        return self.heads * (self.head_dim + 1) * torch.promote_types(self.dtype, torch.float32).itemsize


class Load(NamedTuple):
    """What one forward pass of one batch entry asks of a rank."""

    rank: int
    rows: int
    edges: int
    """That it computes."""
    key_rows: int
    """Received."""
    queries: int
    """Of others, that it computes for them."""
    answers: int
    """Own queries of which other ranks compute a part."""
    bytes: int
    """Received, of all these."""
    own_seconds: float
    """Expected, while rows travel."""
    other_seconds: float
    """Expected, when they are there."""

    @property
    def travel_seconds(self) -> float:
        """Expected at `BANDWIDTH`."""
        return LATENCY + self.bytes / BANDWIDTH if self.bytes else 0.0

    @property
    def seconds(self) -> float:
        """Expected: the own part hides what travels meanwhile."""
        return max(self.own_seconds, self.travel_seconds) + self.other_seconds


def load_of(route: Route, rank: int, rows: int, widths: Widths, costs: Costs) -> Load:
    """The load of a route."""
    key_rows, queries = route.halo_rows, route.queries.held.total
    answers = sum(nodes.total for nodes in route.queries.sent)
    received = key_rows * widths.key_bytes + queries * widths.query_bytes + answers * widths.result_bytes
    others = [*route.guests, *(block for stage in route.stages for block in stage.blocks)]
    times = [sum(_seconds(block, widths, costs) for block in blocks) for blocks in (route.own, others)]
    return Load(rank, rows, route.edges, key_rows, queries, answers, received, *times)


def loads(
    graph: Graph, queries: Partition, keys: Partition, widths: Widths, costs: Costs, ranks: list[int]
) -> list[Load]:
    """Those of some ranks."""
    routing = Routing(graph, queries, keys, numbered=False, move_queries=True)
    return [load_of(routing.of(rank, ordered=True), rank, int(queries.counts[rank]), widths, costs) for rank in ranks]


def asked(ranks: int) -> list[int]:
    """All ranks, or of many some, the first and the last among them."""
    count = min(ranks, MAX_RANKS_ASKED)
    return sorted({number * (ranks - 1) // max(count - 1, 1) for number in range(count)})


def _seconds(block: Block, widths: Widths, costs: Costs) -> float:
    n, m = block.size
    dims = widths.head_dim, widths.head_dim
    call = Call(n, m, widths.heads, widths.kv_heads, *dims, widths.dtype, torch.device("cpu"), part=True)
    return seconds_of(block.graph, call, costs)


# ----------------------------------------------------------------------------------------------- beside others


class Strategy(NamedTuple):
    """One way to attend on a graph over ranks: what its busiest rank receives, holds and computes."""

    name: str
    received_bytes: float
    """In a forward pass of one batch entry."""
    held_bytes: float
    """Keys and values of others that it holds at once."""
    pairs: float
    """Pairs of a query and a key that it computes; where a mask decides, those without an edge too."""
    imbalance: float
    """The pairs of the busiest rank, over their mean."""
    limits: str
    """What it can't do here, or what it needs; "" for nothing."""


class Strategies(tuple[Strategy, ...]):
    """Ways side by side; as text a table."""

    def __str__(self) -> str:
        head = f"{'':24}{'receives':>12}{'holds':>12}{'pairs':>14}{'slowest / mean':>16}   limits"
        lines = [
            f"{each.name:24}{memory(each.received_bytes):>12}{memory(each.held_bytes):>12}{each.pairs:14.3g}"
            f"{each.imbalance:16.2f}   {each.limits}"
            for each in self
        ]
        return "\n".join([head, *lines])


@checked
def compare_strategies(
    graph: Graph,
    n: int,
    ranks: int,
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Strategies:
    """What a graph of n nodes over so many ranks takes, by this library and by the ways of others, each at its best.

    Bytes are those of one forward pass of one batch entry, on the rank that receives most; of more than 16 ranks, 16
    are asked. All-gather (torchtitan's context parallelism over FlexAttention) brings all keys and values to every
    rank; ring attention (Liu et al. 2023) passes them round, a rank's share at a time; Ulysses (Jacobs et al. 2023)
    exchanges nodes for heads, so that no more ranks than key heads can take part.

    >>> print(compare_strategies(Window(100, 0), 1_000_000, 8)[0].received_bytes)
    409600
    """
    require_ints(1, n=n, ranks=ranks, heads=heads, head_dim=head_dim)
    at_size(graph, n, n)
    widths = Widths(heads, heads if kv_heads is None else kv_heads, head_dim, dtype)
    found = [_halo(name, graph, n, ranks, widths) for name in ("contiguous", "zigzag")]
    even = partitions.contiguous(n, ranks)
    routing = Routing(graph, even, even, numbered=False, move_queries=False)
    of_rank = [routing.num_edges(rank) for rank in asked(ranks)]
    mean = sum(of_rank) / len(of_rank)
    busiest, balance = max(of_rank), max(of_rank) / max(mean, 1e-9)
    rows, share = n - n // ranks, -(-n // ranks)
    gathered = rows * widths.key_bytes
    found += [
        Strategy("all-gather", gathered, gathered, busiest, balance, ""),
        Strategy("ring", gathered, 2 * share * widths.key_bytes, busiest, balance, f"{ranks - 1} exchanges in turn"),
    ]
    exchanged = share * (2 * widths.query_bytes + widths.key_bytes) * (ranks - 1) / ranks
    limits = f"no more than {widths.kv_heads} ranks" if ranks > widths.kv_heads else ""
    found.append(Strategy("Ulysses", exchanged, n * widths.key_bytes / ranks, mean, 1.0, limits))
    return Strategies(found)


def _halo(name: str, graph: Graph, n: int, ranks: int, widths: Widths) -> Strategy:
    made = partitions.contiguous(n, ranks) if name == "contiguous" else partitions.zigzag(n, ranks)
    found = loads(graph, made, made, widths, Costs(), asked(ranks))
    edges = [load.edges for load in found]
    most = max(load.bytes for load in found)
    held = max(min(load.key_rows, load.rows) for load in found) * widths.key_bytes
    return Strategy(f"halo, {name}", most, held, max(edges), max(edges) / max(sum(edges) / len(edges), 1e-9), "")


# --------------------------------------------------------------------------------------------------- as a table


def explained(title: str, load: Load, edges: list[int], route: Route, widths: Widths, costs: Costs) -> str:
    """A load, and the edges that each rank computes, as a table to read."""
    mean, stages = sum(edges) / len(edges), len(route.stages)
    keys_sent = sum(nodes.total for stage in route.stages for nodes in stage.keys.sent)
    sent = keys_sent * widths.key_bytes + load.answers * widths.query_bytes + load.queries * widths.result_bytes
    in_stages = f"   in {stages} stages" if stages > 1 and load.key_rows else ""
    lines = [
        title,
        f"{load.rows:,} rows, {load.edges:,} edges computed here; the busiest of {len(edges)} ranks computes "
        f"{max(edges) / max(mean, 1e-9):.2f} times the mean",
        "",
        f"{'rows that travel, forward':28}{'received':>12}{'sent':>12}",
        f"{'keys and values':28}{load.key_rows:12,}{keys_sent:12,}{in_stages}",
        f"{'queries':28}{load.queries:12,}{load.answers:12,}",
        f"{'their results':28}{load.answers:12,}{load.queries:12,}",
        f"{'of one batch entry':28}{memory(load.bytes):>12}{memory(sent):>12}",
        "backward, the same keys again, and gradients back",
        "",
        f"expected, forward: own part {time(load.own_seconds)}, while {time(load.travel_seconds)} of travel at "
        f"{memory(BANDWIDTH)}/s; then {time(load.other_seconds)}: {time(load.seconds)} in all, by {costs.source}",
    ]
    return "\n".join(lines)
