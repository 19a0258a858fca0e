"""What a graph over several processes takes: python -m benchmarks.devices, some minutes on two idle cores.

    python -m benchmarks.devices --section scaling

scaling: one rank with 65,536 nodes of a window, and two ranks with as many each, one thread a rank, forward and
backward; and two processes beside each other that share nothing, which meet the same memory. memory: by how much a call
raises a rank's resident memory, beside its rows and those that come. planning: one of 8,192 ranks of a billion tokens.
hubs: rows of a window and two global nodes over 8 ranks.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from attngraph import Causal, Global, Prefix, Window, attend, measuring
from attngraph.distributed import distribute, partition
from attngraph.distributed.routes import Routing
from benchmarks import measure
from benchmarks.experiment import Goal, goals_experiment

NAME = "devices"
NODES, HEADS, DIM = 65_536, 8, 64
WINDOW = Causal() & Window(256, 0)
TURNS = 7


def step(graph: Any, nodes: int) -> Callable[[], None]:
    """Forward and backward of a rank's rows."""
    q, k, v = (torch.randn(1, HEADS, nodes, DIM, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, HEADS, nodes, DIM)

    def run() -> None:
        torch.autograd.grad(attend(q, k, v, graph), (q, k, v), dout)

    return run


def turns(rank: int) -> dict[str, list[float]]:
    """Seconds of a step: rank 0 alone, both apart, and both on one graph; in turn."""
    apart = step(WINDOW, NODES)
    shared = step(distribute(WINDOW, 2 * NODES, dist.group.WORLD, partition="contiguous"), NODES)
    runs = {"alone": apart if rank == 0 else lambda: None, "apart": apart, "together": shared}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            dist.barrier()
            begun = measure.now()
            run()
            dist.barrier()
            if turn:  # the first compiles and plans
                times[name].append(measure.now() - begun)
    return times


def scaling(options: Namespace) -> Iterator[Goal]:
    """Efficiency: the time of one rank over that of two with twice the nodes."""
    times = measure.on_ranks(2, turns)[0]
    share = measuring.ratios(times["alone"], times["together"])
    beside = measuring.ratios(times["apart"], times["together"])
    milliseconds = ", ".join(f"{name} {measuring.milliseconds(each)[1]:,.0f} ms" for name, each in times.items())
    text = f"two ranks with {NODES:,} nodes each of a window of 256: time of one rank with as many, over theirs"
    yield Goal(text, 0.9, share[1], note=f"quartiles {share}; {milliseconds}")
    text = "the same, over two processes beside each other that share nothing"
    yield Goal(text, 0.9, beside[1], note=f"quartiles {beside}")


def raised(rank: int) -> dict[str, float]:
    """MiB by which a forward pass raises a rank's memory, and of what it must hold."""
    graph = Causal() & (Window(256, 0) | Prefix(4))
    plan = distribute(graph, 2 * NODES, dist.group.WORLD, partition="contiguous")
    q, k, v = (torch.randn(1, HEADS, NODES, DIM) for _ in range(3))
    with torch.no_grad():
        attend(q, k, v, plan)  # plans, and kernels compiled
        _, most = measuring.cost(lambda: attend(q, k, v, plan))
    row = HEADS * DIM * 4
    route = plan.way().route
    travels = 2 * (route.halo_rows + sum(n.total for n in route.stages[0].keys.sent)) * row / 2**20
    return {
        "raised": most or 0.0,
        "rows": 4 * NODES * row / 2**20,
        "out": NODES * (row + HEADS * 4) / 2**20,
        "halo": travels,
    }


def memory(options: Namespace) -> Iterator[Goal]:
    """Beside what is its own, and what comes."""
    for rank, found in enumerate(measure.on_ranks(2, raised)):
        held = found["rows"] - found["out"] + found["raised"]  # q, k and v, and what the call raised
        share = held / (found["rows"] + found["halo"])
        note = f"raised {found['raised']:.0f} MiB, out is {found['out']:.0f}; rows that travel {found['halo']:.1f} MiB"
        text = f"rank {rank}, {NODES:,} nodes, forward: memory held over own rows of q, k, v and out, and what travels"
        yield Goal(text, 1.1, share, at_most=True, note=note)


def planning(options: Namespace) -> Iterator[Goal]:
    """The ranks at the ends and in the middle; rank 0 owes its first keys to all others."""
    graph, parts = Causal() & (Window(100, 0) | Prefix(4)), partition.contiguous(10**9, 8192)
    for rank in (0, 4096, 8191):
        begun = measure.now()
        route = Routing(graph, parts, parts, numbered=False, move_queries=True).of(rank)
        seconds = measure.now() - begun
        text = f"the route of rank {rank} of 8,192 at 10⁹ tokens of {graph}: seconds"
        yield Goal(text, 3, seconds, at_most=True, note=f"{route.halo_rows} rows of others")
        sides = [
            side for each in (route.queries, *(s.keys for s in route.stages)) for side in (*each.sent, *each.received)
        ]
        tensors = {id(t): t.nbytes for nodes in sides for t in nodes}
        yield Goal(f"the same: MiB of its tables, rank {rank}", 1, sum(tensors.values()) / 2**20, at_most=True)


def hubs(options: Namespace) -> Iterator[Goal]:
    """Moving queries and keys, beside keys alone."""
    graph, parts = Window(64, 64) | Global([0, 1]), partition.contiguous(NODES, 8)
    rows = []
    for moves in (True, False):
        routing = Routing(graph, parts, parts, numbered=False, move_queries=moves)
        routes = [routing.of(rank) for rank in range(8)]
        rows.append([route.halo_rows + route.queries.held.total for route in routes])
    note = f"in all {sum(rows[0]):,} and {sum(rows[1]):,} rows"
    text = f"{graph} on {NODES:,} nodes over 8 ranks: rows that the busiest receives, over those of keys alone"
    yield Goal(text, 1 / 20, max(rows[0]) / max(rows[1]), at_most=True, note=note)


SECTIONS = {"scaling": scaling, "memory": memory, "planning": planning, "hubs": hubs}
EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()
