"""Graphs over ranks: as one process, with what crosses a border and nothing else on the wire."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from graphs import GRAPHS
from ranks import Ranks, assert_close, free_port, gradients, joined

from attngraph import (
    Alibi,
    Batched,
    Causal,
    EdgeBias,
    EdgeFeatures,
    Full,
    Global,
    LeakyReLU,
    PerHead,
    Prefix,
    Random,
    RelativeBias,
    SoftCap,
    TopK,
    Window,
    attend,
    from_edge_index,
    from_function,
)
from attngraph.distributed import CommunicationError, compare_strategies, distribute
from attngraph.distributed import partition as partitions
from attngraph.distributed.cover import minimum_vertex_cover
from attngraph.distributed.partition import Nodes, Partition
from attngraph.distributed.routes import Routing

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
PARTITIONS = "contiguous", "zigzag", "scattered"


@pytest.fixture(scope="module")
def ranks():
    made = Ranks(4)
    yield made
    made.close()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def owner(name, n, count):
    """What `partition` of `distribute` is."""
    return torch.randint(count, (n,), generator=torch.Generator().manual_seed(1)) if name == "scattered" else name


# ------------------------------------------------------------------------------------------------- as one process


def as_one_process(group, partition, halo_rows):
    for case in KNOWN:
        H, n, m = case.graph.heads or 4, case.n, case.m
        q, k, v = randn(2, H, n, 8), randn(2, max(H // 2, 1), m, 8, seed=1), randn(2, max(H // 2, 1), m, 5, seed=2)
        dout = randn(2, H, n, 5, seed=3)
        expected = gradients(lambda *s, g=case.graph: attend(*s, g, backend="reference"), [q, k, v], dout)
        plan = distribute(
            case.graph, n, group, m=None if n == m else m, partition=owner(partition, n, group.size()),
            halo_rows=halo_rows,
        )  # fmt: skip
        own, own_keys = plan.nodes, plan.key_nodes
        sides = [q[:, :, own], k[:, :, own_keys], v[:, :, own_keys]]
        expected = [x[:, :, rows] for x, rows in zip(expected, (own, own, own_keys, own_keys), strict=True)]
        found = gradients(lambda *s, p=plan: attend(*s, p), sides, dout[:, :, own])
        try:
            assert_close(found, expected)
            again = gradients(lambda *s, p=plan: attend(*s, p), sides, dout[:, :, own])
            assert all(torch.equal(*both) for both in zip(found, again, strict=True)), "other bits"
            assert torch.equal(plan.gather(plan.scatter(q)), q)
        except AssertionError as error:
            raise AssertionError(f"{case.graph} at {n} × {m}: {error}") from None


KNOWN = [case for case in GRAPHS if not (case.graph._unresolved or isinstance(case.graph, Batched))]


@pytest.mark.share(7)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("halo_rows", [None, 3])
def test_every_graph_is_what_one_process_makes_of_it(ranks, count, partition, halo_rows):
    ranks.run(count, as_one_process, partition, halo_rows)


N, H = 45, 4
OPTIONS = (
    "bias of edges",
    "edges in any order",
    "Alibi",
    "relative",
    "features",
    "padding",
    "dropout",
    "softcap",
    "sigmoid",
    "sinks",
    "many",
)
MIXED = [
    Window(3, 3) | Global([0, 1]),
    Causal() & (Window(5, 0) | Random(2)),
    PerHead([Causal(), Window(4, 4), Causal() & Window(3, 0), Global([3])]),
]


def with_options(group, graph, name, partition):
    """Attention with an option, of all nodes on one process and of own ones on this rank, and its gradients."""
    source, target = graph.edge_index(N, N)
    plan = distribute(graph, N, group, partition=owner(partition, N, group.size()))
    own = torch.isin(target, plan.nodes)
    learned = {
        "edges": randn(H, len(source), seed=4), "slopes": randn(H, seed=5).abs(), "table": randn(H, 9, seed=6),
        "e": randn(len(source), 3, seed=7), "to_key": randn(2, 8, 3, seed=8), "to_value": randn(2, 5, 3, seed=9),
        "sinks": randn(H, seed=10),
    }  # fmt: skip
    mask = torch.arange(N) < torch.tensor([[N], [N - 7]])

    def run(local):
        given = {key: value.clone().requires_grad_() for key, value in learned.items()}
        edges, e = (given["edges"][:, own], given["e"][own]) if local else (given["edges"], given["e"])
        options = {}
        if name in ("bias of edges", "many"):
            options["bias"] = EdgeBias.sorted(edges)
        if name == "edges in any order":
            options["bias"] = EdgeBias.of(torch.stack([source, target]).flip(1), given["edges"].flip(-1))
        if name in ("Alibi", "relative"):
            options["bias"] = Alibi(given["slopes"]) if name == "Alibi" else RelativeBias(given["table"])
        if name == "features":
            options["edge_features"] = EdgeFeatures.sorted(e, to_key=given["to_key"], to_value=given["to_value"])
        if name in ("padding", "many"):
            options["attention_mask"] = mask[:, plan.nodes] if local else mask
        if name in ("dropout", "many"):  # rank 0 draws the seed, whatever the others' generators say
            seed = 5 + (group.rank() if local else 0)
            options |= {"dropout_p": 0.3, "generator": torch.Generator().manual_seed(seed)}
        if name in ("softcap", "many"):
            options["score"] = SoftCap(2.0)
        if name == "sigmoid":
            options["normalize"] = "sigmoid"
        if name == "sinks":
            options["sinks"] = given["sinks"]
        sides = [randn(2, H, N, 8), randn(2, 2, N, 8, seed=1), randn(2, 2, N, 5, seed=2)]
        dout = randn(2, H, N, 5, seed=3)
        if local:
            sides, dout = [plan.scatter(side) for side in sides], plan.scatter(dout)
        sides = [side.requires_grad_() for side in sides]
        out = attend(*sides, plan if local else graph, **options, **({} if local else {"backend": "reference"}))
        asked = [*sides, *given.values()]
        found = torch.autograd.grad((out * dout).sum(), asked, allow_unused=True, materialize_grads=True)
        return [out.detach(), *found]

    found, expected = run(True), run(False)
    for shared in found[4:]:
        dist.all_reduce(shared, group=group)
    expected = [x[:, :, plan.nodes] if number < 4 else x for number, x in enumerate(expected)]
    assert_close(found, expected)


@pytest.mark.share(5)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("graph", MIXED, ids=lambda graph: str(graph)[:30])
def test_every_option_of_attend(ranks, graph, name, partition):
    ranks.run(3, with_options, graph, name, partition)


def in_half_precision(group):
    graph, (q, k, v) = Causal() & (Window(9, 0) | Prefix(2)), randn(3, 1, 4, 50, 16)
    plan = distribute(graph, 50, group)
    out = attend(*(plan.scatter(side).bfloat16() for side in (q, k, v)), plan)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), plan.scatter(attend(q, k, v, graph)), rtol=0, atol=0.04)
    sides = [plan.scatter(side).float().requires_grad_() for side in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        attend(*sides, plan).float().sum().backward()
    assert all(side.grad.isfinite().all() for side in sides)


def test_half_precision_and_autocast(ranks):
    ranks.run(2, in_half_precision)


# --------------------------------------------------------------------------------------------------- what travels


def bytes_of(group, graph, n, move_queries=True):
    plan = distribute(graph, n, group, move_queries=move_queries)
    q, k, v = (plan.scatter(side).requires_grad_() for side in randn(3, 1, 2, n, 8).float())
    attend(q, k, v, plan)  # the first call compares what the ranks ask
    plan.ranks.received_bytes = 0
    out = attend(q, k, v, plan)
    forward, plan.ranks.received_bytes = plan.ranks.received_bytes, 0
    out.sum().backward()
    route = plan.way().route
    keys, hosted = route.halo_rows, route.queries.held.total
    answers = sum(nodes.total for nodes in route.queries.sent)
    sent = sum(nodes.total for stage in route.stages for nodes in stage.keys.sent)
    needed = 4 * 2 * (keys * 16 + hosted * 8 + answers * (8 + 1))
    needed_backward = 4 * 2 * (keys * 16 + sent * 16 + hosted * (8 + 8 + 1 + 8) + answers * 8)
    assert (forward, plan.ranks.received_bytes) == (needed, needed_backward)
    return keys + hosted + answers, plan.explain(heads=2, head_dim=8)


@pytest.mark.parametrize(
    "graph", [Causal() & Window(40, 0), Window(9, 9) | Global([0, 7]), Causal(), Random(3)], ids=str
)
def test_what_travels_is_what_is_needed(ranks, graph):
    ranks.run(3, bytes_of, graph, 301)


def test_the_halo_of_a_window_does_not_grow_with_the_text(ranks):
    found = [[rows for rows, _ in ranks.run(3, bytes_of, Causal() & Window(40, 0), n)] for n in (300, 900)]
    assert found[0] == found[1] == [0, 40, 40]


def test_hubs_travel_rather_than_all_that_they_hear(ranks):
    hubs = Window(8, 8) | Global([0, 1])
    moving, staying = (ranks.run(4, bytes_of, hubs, 2000, move) for move in (True, False))
    busiest = [max(rows for rows, _ in found) for found in (moving, staying)]
    assert 20 * busiest[0] <= busiest[1]
    assert "busiest of 4 ranks computes 1.0" in moving[0][1]


def test_hubs_of_65_536_nodes_over_8_ranks_take_no_more_rows_than_a_minimum_vertex_cover():
    graph, parts = Window(64, 64) | Global([0, 1]), partitions.contiguous(65_536, 8)
    rows = {}
    for moves in (True, False):
        routing = Routing(graph, parts, parts, numbered=False, move_queries=moves)
        rows[moves] = [routing.of(rank) for rank in range(8)]
    received = {
        moves: [route.halo_rows + route.queries.held.total for route in routes] for moves, routes in rows.items()
    }
    assert sum(received[True]) == 924  # each pair of ranks by König's theorem, on the listed edges
    assert 20 * max(received[True]) <= max(received[False])
    edges = [route.edges for route in rows[True]]
    assert sum(edges) == graph.num_edges(65_536, 65_536)
    assert max(edges) <= 1.01 * sum(edges) / 8


def test_a_cover_is_the_least():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows, columns = torch.randint(1, 9, (2,), generator=generator).tolist()
        edges = torch.rand(rows, columns, generator=generator) < 0.35
        row, column = edges.nonzero().T
        in_rows, in_columns = minimum_vertex_cover(row, column, rows, columns)
        assert (in_rows[row] | in_columns[column]).all()
        least = min(
            bin(chosen).count("1") + int(edges[[not chosen >> i & 1 for i in range(rows)]].any(0).sum())
            for chosen in range(1 << rows)
        )
        assert int(in_rows.sum() + in_columns.sum()) == least


def test_zigzag_shares_the_work_of_causal():
    for name, imbalance in (("contiguous", 1.75), ("zigzag", 1.0)):
        parts = partitions.named(name, Causal(), 4096, 4096, 4)
        edges = [Routing(Causal(), parts, parts, numbered=False, move_queries=True).of(r).edges for r in range(4)]
        assert max(edges) * 4 / sum(edges) == pytest.approx(imbalance, abs=0.01)


def test_weighted_and_metis_partitions():
    graph = Causal()
    parts = partitions.weighted(graph, 1000, 1000, 4)
    edges = [Routing(graph, parts, parts, numbered=False, move_queries=False).num_edges(rank) for rank in range(4)]
    assert max(edges) < 1.2 * sum(edges) / 4
    pytest.importorskip("pymetis")
    side = 16  # a mesh whose nodes are shuffled
    place = torch.randperm(side * side, generator=torch.Generator().manual_seed(0)).view(side, side)
    pairs = [(place[:, 1:], place[:, :-1]), (place[1:], place[:-1])]
    both = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in pairs], 1)
    mesh = from_edge_index(torch.cat([both, both.flip(0)], 1), side * side)
    rows = {}
    for name in ("contiguous", "metis"):
        parts = partitions.named(name, mesh, side * side, side * side, 4)
        routing = Routing(mesh, parts, parts, numbered=False, move_queries=False)
        rows[name] = sum(routing.of(rank).halo_rows for rank in range(4))
    assert rows["metis"] < rows["contiguous"] / 4


def test_nodes_as_ranges():
    nodes = Nodes.of(torch.tensor([3, 4, 5, 9, 2, 3]))
    assert nodes.ranges == [(3, 6, 0), (9, 10, 3), (2, 4, 4)]
    assert nodes.numbers.tolist() == [3, 4, 5, 9, 2, 3]
    assert [piece.numbers.tolist() for piece in nodes.cut(4)] == [[3, 4, 5, 9], [2, 3]]
    for parts in (partitions.zigzag(11, 3), Partition.of("given", torch.tensor([2, 0, 0, 2, 1]), 3)):
        rows = [parts.nodes(rank) for rank in range(3)]
        assert torch.cat(rows).sort().values.tolist() == list(range(parts.n))
        for rank, own in enumerate(rows):
            assert (parts.owners(own) == rank).all()
            assert parts.rows(own).tolist() == list(range(len(own)))


@pytest.mark.parametrize("rank", [0, 1, 4096, 8191])
def test_a_plan_of_one_of_8192_ranks_of_a_billion_tokens(rank):
    graph, parts = Causal() & (Window(100, 0) | Prefix(4)), partitions.contiguous(10**9, 8192)
    route = Routing(graph, parts, parts, numbered=False, move_queries=True).of(rank)
    assert route.halo_rows == (0 if rank == 0 else 100 if rank == 1 else 104) or (rank == 1 and route.halo_rows == 104)
    assert sum(nodes.total for nodes in route.stages[0].keys.sent) == (
        4 * 8191 + 100 if rank == 0 else 100 * (rank < 8191)
    )


def test_strategies_side_by_side():
    found = {each.name: each for each in compare_strategies(Causal() & Window(100, 0), 1_000_000, 8)}
    assert found["halo, contiguous"].received_bytes == 100 * 2 * 8 * 64 * 4
    assert found["all-gather"].received_bytes == found["ring"].received_bytes == 875_000 * 2 * 8 * 64 * 4
    assert "no more than 2 ranks" in str(compare_strategies(Causal(), 1000, 4, kv_heads=2))


# --------------------------------------------------------------------------------------- with the rest of PyTorch


def with_two_kinds_of_layers(group, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint

    from attngraph.models import GPT
    from attngraph.nn import TransformerConfig

    n, graph, ranks = 50, Causal() & (Window(7, 0) | Prefix(2)), 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "nodes"))
    tokens = torch.randint(31, (4, n + 1), generator=torch.Generator().manual_seed(0))

    def made(graphs):
        torch.manual_seed(0)
        config = TransformerConfig(embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2)
        model = GPT(config, vocab_size=31).double()
        model.transformer.graphs = graphs
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model

    one = made([graph, graph, Causal()])
    expected = cross_entropy(one(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()

    local, full = distribute([graph, Causal()], n, mesh["nodes"])
    model = made([local, local, full])
    run = model
    if kind == "DDP":
        run = DistributedDataParallel(model)
    if kind == "FSDP2":
        everyone = mesh["dp", "nodes"]._flatten("all")
        for block in model.transformer.layers:
            fully_shard(block, mesh=everyone)
        fully_shard(model, mesh=everyone)
    if kind == "compiled":
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    mine = tokens.chunk(2)[mesh["dp"].get_local_rank()]
    inputs, targets = plan_rows(local, mine[:, :-1]), plan_rows(local, mine[:, 1:])
    out = checkpoint(run, inputs, use_reentrant=False) if kind == "checkpointed" else run(inputs)
    loss = cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="sum") / tokens[:, 1:].numel()
    averaged = kind in ("DDP", "FSDP2")  # they divide the sum of all ranks' gradients by their number
    (loss * ranks if averaged else loss).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, expected.detach(), rtol=0, atol=1e-10)
    for parameter, other in zip(model.parameters(), one.parameters(), strict=True):
        gradient = parameter.grad
        if kind == "FSDP2":
            gradient = gradient.full_tensor()
        elif not averaged:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, other.grad, rtol=0, atol=1e-10)


def plan_rows(plan, tokens):
    return plan.scatter(tokens, dim=1)


@pytest.mark.parametrize("kind", ["plain", "DDP", "FSDP2", "checkpointed", "compiled"])
def test_a_gpt_on_two_graphs_over_a_mesh(ranks, kind):
    ranks.run(4, with_two_kinds_of_layers, kind)


def saved_or_loaded(group, path, saves):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    from attngraph.models import GPT
    from attngraph.nn import TransformerConfig

    torch.manual_seed(0 if saves else 1)
    plan = distribute(Causal() & Window(7, 0), 40, group)
    model = GPT(TransformerConfig(embed_dim=32, num_layers=2, num_heads=4), vocab_size=31).double()
    model.transformer.graphs = plan
    torch.nn.init.normal_(model.scores.weight)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    state = get_model_state_dict(model)
    if saves:
        dcp.save(state, checkpoint_id=path, process_group=group)
    else:
        dcp.load(state, checkpoint_id=path, process_group=group)
        set_model_state_dict(model, state)
    tokens = torch.arange(40)[None] % 31
    return plan.gather(model(plan.scatter(tokens, dim=1))).sum().item()


def test_a_checkpoint_of_four_ranks_goes_on_with_two(ranks, tmp_path):
    saved = ranks.run(4, saved_or_loaded, str(tmp_path / "checkpoint"), True)
    loaded = ranks.run(2, saved_or_loaded, str(tmp_path / "checkpoint"), False)
    assert saved == pytest.approx([loaded[0]] * 4, rel=1e-12)


def graph_attention(group):
    """A GAT of two layers (Veličković et al. 2018), whose scores are a_i + b_j, as a product of two numbers."""
    edges = torch.randint(60, (2, 240), generator=torch.Generator().manual_seed(0)).unique(dim=1)
    graph, x = from_edge_index(edges, 60), randn(60, 6)
    weights = [randn(4, 6, 8, seed=1), randn(4, 32, 8, seed=2)]
    attention = [randn(2, 4, 8, seed=3), randn(2, 4, 8, seed=4)]

    def layers(x, graph):
        for w, (a, b) in zip(weights, attention, strict=True):
            h = torch.einsum("nd,hde->hne", x, w)  # (H, N, E)
            at_query, at_key = ((h * side[:, None]).sum(-1) for side in (a, b))
            q, k = (
                torch.stack([at_query, torch.ones_like(at_query)], -1),
                torch.stack([torch.ones_like(at_key), at_key], -1),
            )
            x = attend(q, k, h, graph, scale=1.0, score=LeakyReLU(0.2)).transpose(0, 1).flatten(1).relu()
        return x

    plan = distribute(graph, 60, group, partition=owner("scattered", 60, group.size()))
    torch.testing.assert_close(plan.gather(layers(plan.scatter(x), plan)), layers(x, graph), rtol=0, atol=1e-10)


def test_a_gat_on_a_partitioned_graph(ranks):
    ranks.run(3, graph_attention)


# -------------------------------------------------------------------------------------------------------- failures


def different(group, what):
    rank = group.rank()
    n, graph = 40, Window(3, 3)
    options = {}
    if what == "the graphs" and rank == 1:
        graph = Window(3, 2)
    if what == "n" and rank == 1:
        n = 41
    if what == "the partition" and rank == 1:
        options["partition"] = "zigzag"

    def ask():
        plan = distribute(graph, n, group, **options)
        q = torch.zeros(1, 3 if what == "heads" and rank == 1 else 2, len(plan.nodes), 8)
        q = q.double() if what == "dtype" and rank == 1 else q
        attend(q, q, q, plan)

    with pytest.raises(ValueError, match=f"all 3 ranks .*: {what} is not the same on rank 1"):
        ask()


@pytest.mark.parametrize("what", ["the graphs", "n", "the partition", "heads", "dtype"])
def test_ranks_that_ask_for_different_things_are_told_who(ranks, what):
    ranks.run(3, different, what)


def calls_that_differ(group, what):
    """Of two plans, after calls of both kinds that are alike."""
    rank, graphs = dist.get_rank(group), [Window(3, 3), Window(5, 1)]
    plans = distribute(graphs, 41, group, partition="contiguous")
    q = plans[0].scatter(randn(2, 2, 41, 8))
    for plan in plans:
        for batch in (1, 2):
            attend(q[:batch], q[:batch], q[:batch], plan)
    options, plan = {}, plans[0]
    if rank == 1:
        if what == "plan":
            plan = plans[1]
        if what == "batch":
            q = q[:1]
        if what == "dtype":
            q = q.float()
        options |= {"scale": {"scale": 0.5}, "dropout_p": {"dropout_p": 0.5}, "score": {"score": SoftCap(2.0)}}.get(
            what, {}
        )
        if what == "bias":
            options["bias"] = Alibi.geometric(2)
    with pytest.raises(ValueError, match=f"all 3 ranks .*: {what} is not the same on rank 1"):
        attend(q, q, q, plan, **options)
    q = q[:1].double()
    attend(q, q, q, plans[0])  # and they go on


@pytest.mark.parametrize("what", ["plan", "batch", "dtype", "scale", "score", "dropout_p", "bias"])
def test_calls_that_differ_later_are_told_too(ranks, what):
    ranks.run(3, calls_that_differ, what)


def functions(group):
    """Functions are compared by what they read, not by how many were made before."""
    rank = dist.get_rank(group)
    for _ in range(rank):
        from_function(lambda i, j: i >= j)
    for reach in (4, 5):
        distribute(from_function(lambda i, j, reach=reach: (i - j).abs() < reach), 40, group)
        distribute(from_function(lambda i, j: (i - j).abs() < reach), 40, group)  # noqa: B023
    own = rank + 3
    with pytest.raises(ValueError, match="the graphs is not the same on all ranks"):
        distribute(from_function(lambda i, j: (i - j).abs() < own), 40, group)
    many = from_edge_index(torch.randint(1000, (2, 50_000), generator=torch.Generator().manual_seed(rank)), 1000)
    with pytest.raises(ValueError) as told:
        distribute(many, 1000, group)
    assert len(str(told.value)) < 1000


def test_graphs_are_compared_by_what_they_are(ranks):
    ranks.run(3, functions)


def one_placement(group):
    from attngraph.models import GPT
    from attngraph.nn import TransformerConfig

    here, there = (distribute(Causal(), 40, group, partition=name) for name in ("contiguous", "zigzag"))
    again = distribute(Window(3, 0), 40, group, partition="contiguous")
    model = GPT(TransformerConfig(embed_dim=16, num_layers=2, num_heads=2), vocab_size=31)
    tokens = here.scatter(torch.randint(31, (1, 40), generator=torch.Generator().manual_seed(0)), 1)
    for graphs in ([here, there], [here, Causal()], [Causal(), here]):
        model.transformer.graphs = graphs
        with pytest.raises(ValueError, match="all layers must take the rows of the same nodes"):
            model(tokens)
    model.transformer.graphs = [here, again]
    model(tokens)


def test_layers_of_different_partitions_are_an_error(ranks):
    ranks.run(2, one_placement)


def biased_and_compiled(group, position):
    from attngraph.models import GPT
    from attngraph.nn import TransformerConfig

    plan = distribute(Causal(), 40, group)
    model = GPT(
        TransformerConfig(embed_dim=16, num_layers=1, num_heads=2, position=position), vocab_size=31, graph=plan
    )
    tokens = plan.scatter(torch.randint(31, (1, 40), generator=torch.Generator().manual_seed(0)), 1)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
    torch.testing.assert_close(found, model(tokens))


@pytest.mark.parametrize("position", ["alibi", "relative"])
def test_a_bias_compiles_on_a_new_plan(ranks, position):
    ranks.run(2, biased_and_compiled, position)


@pytest.mark.parametrize(
    ("partition", "count"), [*((each, 3) for each in PARTITIONS), ("zigzag", 24), ("contiguous", 24)]
)
@pytest.mark.parametrize(
    "graph",
    [
        Causal(),
        Full(),
        Causal() & (Window(9, 0) | Prefix(2)),
        Window(3, 3) | Global([0, 50]),
        Random(3),
        PerHead([Causal(), Window(5, 5)]),
    ],
    ids=str,
)
def test_each_edge_is_computed_once(graph, partition, count):
    n = 120
    own = owner(partition, n, count)
    made = (
        partitions.given(own, n, count) if isinstance(own, torch.Tensor) else getattr(partitions, partition)(n, count)
    )
    routing = Routing(graph, made, made, numbered=False, move_queries=True)
    every = graph.num_edges(n, n) if not graph.heads else (graph.graphs[0] | graph.graphs[1]).num_edges(n, n)
    for rows in (None, 7):
        routes = [routing.of(rank, rows) for rank in range(count)]
        assert sum(route.edges for route in routes) == every
    for one, route in enumerate(routes):
        for other, peer in enumerate(routes):
            assert route.queries.sent[other].total == peer.queries.received[one].total


@pytest.mark.parametrize(
    ("graph", "n", "count", "partition"),
    [
        (Causal(), 65_536, 64, "zigzag"),
        (Causal(), 65_536, 64, "contiguous"),
        (Full(), 32_768, 40, "contiguous"),
        (Window(64, 64) | Global([0, 1]), 10**8, 1024, "contiguous"),
    ],
    ids=str,
)
def test_dense_graphs_and_hubs_over_many_ranks_are_planned_without_their_edges(graph, n, count, partition):
    made = getattr(partitions, partition)(n, count)
    routing = Routing(graph, made, made, numbered=False, move_queries=True)
    begun = time.process_time()
    for rank in (0, count - 1):
        routing.of(rank, max(n // count // 2, 1))
        routing.of(rank, ordered=True)
    assert time.process_time() - begun < 10


def twice(plan, q):
    q = q.clone().requires_grad_()
    torch.autograd.grad(attend(q, q, q, plan).sum(), q, create_graph=True)


def refusals(group):
    graph, few = Causal(), torch.zeros(1, 2, 7, 8)
    plan = distribute(graph, 40, group)
    own = plan.scatter(torch.zeros(1, 2, 40, 8))
    rows = len(plan.nodes)
    cases = [
        (ValueError, f"has {rows} queries and {rows} keys", lambda: attend(few, few, few, plan)),
        (ValueError, "returns no weights", lambda: attend(own, own, own, plan, return_weights=True)),
        (ValueError, "returns no weights", lambda: attend(own, own, own, plan, return_weights=True, reduce="entropy")),
        (ValueError, "can be differentiated once", lambda: twice(plan, own)),
        (ValueError, "no score='additive'", lambda: attend(own, own, own, plan, score="additive")),
        (ValueError, "leave out backend", lambda: attend(own, own, own, plan, backend="rows")),
        (ValueError, "a bias of all pairs", lambda: attend(own, own, own, plan, bias=torch.zeros(rows, 40))),
        (ValueError, "known before queries and keys are", lambda: distribute(TopK(2), 40, group)),
        (ValueError, "the rank of each of 40 nodes", lambda: distribute(graph, 40, group, partition=torch.zeros(3))),
        (ValueError, "from 0 to 1", lambda: distribute(graph, 40, group, partition=torch.full((40,), 2))),
        (ValueError, "partition must be 'auto'", lambda: distribute(graph, 40, group, partition="best")),
        (ValueError, "at least one graph", lambda: distribute([], 40, group)),
        (ValueError, "give m", lambda: distribute(graph, 40, group, key_partition=torch.zeros(40).long())),
        (ValueError, "same number of query nodes", lambda: distribute(graph.sized(30, 30), 40, group)),
        (TypeError, "belongs to a process group", lambda: __import__("pickle").dumps(plan)),
        (TypeError, "graphs must be a Graph", lambda: distribute([graph, 3], 40, group)),
        (ValueError, "all 40 nodes in dimension -2", lambda: plan.scatter(own)),
        (ValueError, "all 40 nodes in dimension -2", lambda: plan.scatter(torch.zeros(1, 40))),
        (ValueError, "plan.own_edges", lambda: attend(own, own, own, plan, bias=EdgeBias.sorted(torch.zeros(2, 820)))),
        (ValueError, "must be a multiple of kv_heads", lambda: plan.explain(heads=4, kv_heads=3)),
        (ValueError, "heads must be", lambda: plan.explain(heads=0)),
    ]  # fmt: skip
    for kind, message, ask in cases:
        with pytest.raises(kind, match=message):
            ask()
    small = torch.arange(40, dtype=torch.int16)
    assert torch.equal(plan.gather(plan.scatter(small, 0), 0), small)
    assert __import__("copy").copy(plan) is plan
    assert "sent" in plan.explain()


def test_what_cannot_be_is_told(ranks):
    ranks.run(2, refusals)


def dies(rank, port, answers, how):
    joined(rank, 3, port)
    graph, q = Window(8, 8), torch.randn(1, 2, 30, 8)
    attend(q, q, q, distribute(graph, 90, dist.group.WORLD, partition="contiguous"))  # kernels are compiled first
    plan = distribute(graph, 90, dist.new_group(timeout=timedelta(seconds=4)), partition="contiguous")
    attend(q, q, q, plan)
    dist.barrier()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(8)
        os._exit(0)
    began = time.monotonic()
    try:
        for _ in range(100):
            attend(q, q, q, plan)
    except CommunicationError as error:
        answers.put((rank, time.monotonic() - began, str(error)))
        answers.close()
        answers.join_thread()
    os._exit(0)


def survivors(how):
    """What the ranks say that are left: rank, seconds and message of each."""
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=dies, args=(rank, port, answers, how)) for rank in range(3)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in range(2)]
    for process in processes:
        process.join(20)
    return found


@pytest.mark.parametrize(("how", "within"), [("killed", 2.0), ("stalled", 7.0)])
def test_who_survives_a_rank_raises(how, within):
    for _ in range(3):  # on a busy machine, one of them meets no other program
        found = survivors(how)
        for rank, _, message in found:
            assert "Window(8, 8)" in message
            assert f"failed on rank {rank} of 3" in message
            assert "last checkpoint" in message
        if max(seconds for _, seconds, _ in found) < within:
            break
    else:
        pytest.fail(f"they took {[seconds for _, seconds, _ in found]} s")


def test_a_full_graph_says_what_it_needs():
    found = compare_strategies(Full(), 4096, 4)
    assert found[0].received_bytes == found[2].received_bytes  # everything travels


@pytest.mark.slow
def test_the_example_goes_on_from_its_checkpoint(tmp_path):
    example = Path(__file__).parents[1] / "examples" / "distributed.py"
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40, encoding="utf-8")
    given = ["--text", str(text), "--save", str(tmp_path / "kept"), "--every", "2", "--layers", "2", "--width", "32"]
    for steps, begun in (("3", 0), ("5", 3)):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += [f"--master-port={free_port()}"]
        command += [str(example), *given, "--length", "200", "--steps", steps, "--last", "Causal()"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"over 2 ranks, from step {begun}" in done.stdout
        assert f"step {int(steps) - 1:4}  loss" in done.stdout
        assert done.stdout.count("ShardedPlan(") == 2  # of the two graphs


@pytest.mark.slow
def test_torchrun_starts_again_after_a_death(tmp_path):
    """A rank is killed after a checkpoint; all ranks start again, and end."""
    example = Path(__file__).parents[1] / "examples" / "distributed.py"
    text, kept = tmp_path / "text.txt", tmp_path / "kept"
    text.write_text("to be or not to be, that is the question. " * 40, encoding="utf-8")
    given = ["--text", str(text), "--save", str(kept), "--every", "2", "--layers", "1", "--width", "32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += [f"--master-port={free_port()}", str(example), *given, "--length", "200", "--steps", "400"]
    with (tmp_path / "told").open("w+") as told:
        run = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
        until = time.monotonic() + 120
        while not list(kept.rglob(".metadata")) and time.monotonic() < until:
            time.sleep(0.2)
        workers = [each for each in psutil.Process(run.pid).children() if str(example) in each.cmdline()]
        workers[-1].kill()
        assert run.wait(180) == 0, told.seek(0) or told.read()[-3000:]
        told.seek(0)
        said = told.read()
    assert "from step 0" in said
    assert said.count("over 2 ranks, from step") == 2
    assert "step  399  loss" in said
