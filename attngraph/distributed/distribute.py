"""`distribute`: graphs over the ranks of a process group."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import count
from typing import TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from attngraph.arguments import checked, shown
from attngraph.distributed import partition as partitions
from attngraph.distributed.exchange import Ranks
from attngraph.distributed.partition import Partition
from attngraph.distributed.routes import Routing
from attngraph.distributed.running import Way
from attngraph.distributed.sharded import ShardedPlan, agreed_on, require_same
from attngraph.distributed.strategies import Widths, asked, loads
from attngraph.graph.base import Graph, at_size, require_ints
from attngraph.graph.compose import Batched
from attngraph.graph.listing import count_edges
from attngraph.graph.predicate import alike_in_every_process
from attngraph.planning.call import Call
from attngraph.planning.costs import Costs

Group = DeviceMesh | dist.ProcessGroup

NUMBERS = count()  # of plans; those of the first rank count
MAX_WEIGHTED_RANKS = 64  # for which "auto" asks how many edges each has
MAX_METIS_EDGES = 1 << 24  # of a list for which "auto" asks METIS: some seconds


class _Options(TypedDict, total=False):
    m: int | None
    partition: str | Tensor
    key_partition: Tensor | None
    halo_rows: int | None
    move_queries: bool


@overload
def distribute(graphs: Graph, n: int, mesh: Group, **options: Unpack[_Options]) -> ShardedPlan: ...
@overload
def distribute(graphs: Sequence[Graph], n: int, mesh: Group, **options: Unpack[_Options]) -> list[ShardedPlan]: ...


@checked
def distribute(
    graphs: Graph | Sequence[Graph],
    n: int,
    mesh: Group,
    *,
    m: int | None = None,
    partition: str | Tensor = "auto",
    key_partition: Tensor | None = None,
    halo_rows: int | None = None,
    move_queries: bool = True,
) -> ShardedPlan | list[ShardedPlan]:
    """Graphs of n nodes over the ranks of a process group, each of which has some of the nodes: a plan for each graph.

    `attend(q, k, v, plan)` then takes the rows of the rank's own nodes, `plan.nodes`, and gives theirs, as one process
    with all nodes would; forward and backward. Of keys and values only those travel that a query of another rank hears;
    a query with edges to many keys of another rank goes there instead. All ranks make the same calls.

    Args:
        graphs: one, or several that layers take turns in; all have one partition.
        n: how many nodes there are in all.
        mesh: a `DeviceMesh` of one dimension, as `mesh["nodes"]`, or a process group.
        m: how many keys, where they are other nodes than the queries: a memory. Its nodes lie contiguously.
        partition: "contiguous"; "zigzag", equal work under `Causal`; "weighted", contiguous with as many edges on each;
            "metis", few edges between ranks (`pip install pymetis`); "auto", the one whose slowest rank is expected to
            be fastest; or the rank of each node, integers (n,).
        key_partition: of a memory, the rank of each of its nodes, integers (m,).
        halo_rows: how many rows of keys of others a rank may hold at a time: more travel in stages, the next while one
            is computed, as in ring attention. By default as many as it has itself.
        move_queries: whether queries may go to the ranks of their keys.

    Returns:
        A `ShardedPlan`, or a list of them, as `graphs` is one or several.

    Raises:
        ValueError: on every rank, if the ranks ask for different things; a graph whose edges queries and keys choose.
    """
    ranks = Ranks(mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh)
    given = [graphs] if isinstance(graphs, Graph) else list(graphs)
    require_ints(0, n=n)
    require_ints(1, **({} if halo_rows is None else {"halo_rows": halo_rows}))
    if not given:
        raise ValueError("distribute needs at least one graph (got none)")
    for graph in given:
        if not isinstance(graph, Graph):
            raise TypeError(f"graphs must be a Graph, or a list of them (got {shown(graph)})")
    keys = n if m is None else m
    device = _device(mesh)
    require_same(
        ranks,
        {
            "the graphs": "; ".join(map(alike_in_every_process, given)), "n": str(n), "m": str(m),
            "halo_rows": str(halo_rows), "the partition": _fact(partition),
            "the partition of keys": _fact(key_partition), "move_queries": str(move_queries),
        },
        "distribute",
        device,
    )  # fmt: skip
    for graph in given:
        if graph._unresolved or isinstance(graph, Batched):
            raise ValueError(
                f"distribute takes graphs that are known before queries and keys are, one for all entries of a batch "
                f"(got {graph})"
            )
        at_size(graph, n, keys)
    of_queries = _partition(partition, given, n, m, ranks, device)
    if m is not None:
        of_keys = partitions.contiguous(keys, ranks.count)
        of_keys = of_keys if key_partition is None else partitions.given(key_partition, keys, ranks.count)
    elif key_partition is not None:
        raise ValueError("key_partition is of a memory: give m, the number of its nodes, too")
    else:
        of_keys = of_queries
    plans = [_sharded(graph, ranks, of_queries, of_keys, halo_rows, move_queries, device) for graph in given]
    return plans[0] if isinstance(graphs, Graph) else plans


def _device(mesh: DeviceMesh | dist.ProcessGroup) -> torch.device:
    """Where a rank's rows are: a mesh says it, of a group its backend."""
    if isinstance(mesh, DeviceMesh):
        return torch.device(mesh.device_type)
    backend = dist.get_backend(mesh)
    if backend in ("gloo", "nccl"):
        return torch.device("cpu" if backend == "gloo" else "cuda")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a group of several backends


def _sharded(
    graph: Graph, ranks: Ranks, queries: Partition, keys: Partition, halo_rows: int | None, move_queries: bool,
    device: torch.device,
) -> ShardedPlan:  # fmt: skip
    routing = Routing(graph, queries, keys, numbered=False, move_queries=move_queries)
    moves, stage_rows = routing.moves(ranks.rank), None
    own = torch.tensor([moves.keys.held.total, next(NUMBERS)], device=device)
    halo, numbers = ranks.to_all(own, "agreeing on what travels").T
    limit = halo_rows if halo_rows is not None else max(int(keys.counts.max()), 1)
    if int(halo.max()) > limit:
        stage_rows = max(limit // 2, 1)  # two stages are held at a time
    route = routing.of(ranks.rank, stage_rows, moves=moves)
    agreed = agreed_on(route, ranks, device)
    edges = routing.num_edges(ranks.rank)
    own, own_keys = (int(side.counts[ranks.rank]) for side in (queries, keys))
    way = Way(route, queries.held(ranks.rank), keys.held(ranks.rank), agreed)
    return ShardedPlan(
        graph, Call(own, own_keys, 1, 1, 64, 64, torch.float32, device), (), {}, ("sharded",), edges, edges,
        Costs.here(device), ranks=ranks, partition=queries, key_partition=keys, move_queries=move_queries,
        stage_rows=stage_rows, number=int(numbers[0]), ways={False: way},
    )  # fmt: skip


def _fact(given: object) -> str:
    """What an argument is, to be compared."""
    if not isinstance(given, Tensor):
        return str(given)
    return f"a tensor {tuple(given.shape)} with checksum {zlib.crc32(given.cpu().contiguous().numpy().tobytes()):08x}"


def _partition(
    given: str | Tensor, graphs: list[Graph], n: int, m: int | None, ranks: Ranks, device: torch.device
) -> Partition:
    if isinstance(given, Tensor):
        return partitions.given(given, n, ranks.count)
    if given == "auto":
        return _best(graphs, n, m, ranks, device)
    return partitions.named(given, graphs[0], n, n if m is None else m, ranks.count)


def _best(graphs: list[Graph], n: int, memory: int | None, ranks: Ranks, device: torch.device) -> Partition:
    """The partition whose slowest rank is expected to be the fastest; rank 0 decides, as it may know its speed best."""
    m = n if memory is None else memory
    names = ["contiguous"]
    if ranks.count > 1:
        names += ["zigzag"] if n >= 2 * ranks.count else []
        names += ["weighted"] if ranks.count <= MAX_WEIGHTED_RANKS else []
        if memory is None and find_spec("pymetis") is not None and any(_is_list(graph, n, m) for graph in graphs):
            names.append("metis")
    choice = 0
    if ranks.rank == 0 and len(names) > 1:
        times = []
        for name in names:
            made = partitions.named(name, graphs[0], n, m, ranks.count)
            keys = made if memory is None else partitions.contiguous(m, ranks.count)
            by_rank = [loads(graph, made, keys, Widths(), Costs.here(device), asked(ranks.count)) for graph in graphs]
            times.append(max(sum(load.seconds for load in own) for own in zip(*by_rank, strict=True)))
        choice = min(range(len(names)), key=times.__getitem__)
    choice = int(ranks.from_first(torch.tensor([choice], device=device), "choosing a partition"))
    if names[choice] != "metis":
        return partitions.named(names[choice], graphs[0], n, m, ranks.count)
    owner = torch.zeros(n, dtype=torch.int64)
    if ranks.rank == 0:
        made = partitions.metis(graphs[0], n, m, ranks.count)
        owner = made.owners(torch.arange(n))
    return Partition.of("metis", ranks.from_first(owner.to(device), "sharing a partition").cpu(), ranks.count)


def _is_list(graph: Graph, n: int, m: int) -> bool:
    """Whether a graph is found by listing edges, of which there are few enough for METIS."""
    bound, n, m = at_size(graph, n, m)
    return bound._breakpoints(n, m) is None and count_edges(bound, n, m) <= MAX_METIS_EDGES
