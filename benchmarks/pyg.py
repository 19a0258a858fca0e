"""PyG's attention layers beside those of `attngraph.pyg`: training steps, as they are and compiled, of one state.

Sections of `benchmarks.goals`: python -m benchmarks.goals --section pyg --section molecules --section neighbors
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.experiment import Goal
from benchmarks.measure import Progress, cost, in_turn, isolated, milliseconds, ratios

NODES, EDGES, HEADS, DIM, FEATURES = 100_000, 1_600_000, 4, 32, 16
WIDTH, CLASSES = HEADS * DIM, 10
LAYERS: dict[str, tuple[str, int | None, float]] = {
    "TransformerConv": ("TransformerConv", None, 5),
    "GATv2Conv": ("GATv2Conv", None, 5),
    "GATConv": ("GATConv", None, 4),
    "TransformerConv, edge_dim=16": ("TransformerConv", FEATURES, 4),
    "GATv2Conv, edge_dim=16": ("GATv2Conv", FEATURES, 4),
    "GATConv, edge_dim=16": ("GATConv", FEATURES, 4),
}
PEERS = "PyG", "PyG compiled"
MEMORY_SHARE = 0.2
MOLECULES = 256  # graphs of a batch
SEEDS, FAN_OUT = 1024, (15, 10)


class Net(nn.Module):
    """Layers of one class, and a linear one for the classes."""

    def __init__(self, layer: Callable[..., nn.Module], edge_dim: int | None, depth: int):
        super().__init__()
        options = {} if edge_dim is None else {"edge_dim": edge_dim}
        self.layers = nn.ModuleList([layer(WIDTH, DIM, heads=HEADS, **options) for _ in range(depth)])
        self.classes = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        given = () if edge_attr is None else (edge_attr,)
        for layer in self.layers:
            x = layer(x, edge_index, *given).relu()
        return self.classes(x)


def contestants(name: str, depth: int, dynamic: bool | None = None) -> dict[str, nn.Module]:
    """A model of PyG's layers, the same compiled, and one of ours, of one state."""
    import torch_geometric.nn as theirs

    from attngraph import pyg as ours

    kind, edge_dim, _ = LAYERS[name]
    torch.manual_seed(0)
    models = {peer: Net(getattr(module, kind), edge_dim, depth) for peer, module in (("PyG", theirs), ("ours", ours))}
    models["ours"].load_state_dict(models["PyG"].state_dict())
    return {**models, "PyG compiled": torch.compile(models["PyG"], dynamic=dynamic)}


def without_attention(model: nn.Module) -> nn.Module:
    """The same model, in which each node hears its own value: what no attention, however fast, could go below."""
    found = copy.deepcopy(model)

    def attend(pending: Any) -> Tensor:
        q, k, v, *_ = pending.asked
        return v[: len(q)] + 0 * (q.mean() + k.mean())  # with the gradients of all

    for layer in cast(Any, found).layers:
        layer.attend = attend
    return found


def step(model: nn.Module, x: Tensor, target: Tensor, *edges: Tensor) -> float:
    """Forward and backward."""
    loss = cross_entropy(model(x, *edges)[: len(target)], target)
    loss.backward()
    model.zero_grad()
    return loss.item()


def agree(models: dict[str, nn.Module], *inputs: Tensor) -> None:
    """Raise unless all have one loss."""
    losses = {name: step(model, *inputs) for name, model in models.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise ValueError(f"the models must have the same loss (got {losses})")


def over_ours(times: dict[str, list[float]]) -> dict[str, Any]:
    """Of each peer, how many times as long as ours; and milliseconds of all."""
    return {
        "times": {name: ratios(own, times["ours"]) for name, own in times.items() if name != "ours"},
        **{f"{name}_ms": milliseconds(own) for name, own in times.items()},
    }


# ------------------------------------------------------------------------------------------------------ large graphs


def large_alone(progress: Progress, name: str, repeats: int, limit: float) -> dict:
    """Steps of three layers on one graph, and the memory that each takes."""
    progress({}, 1800.0)
    torch.manual_seed(0)
    edge_index, edge_dim = torch.randint(NODES, (2, EDGES)), LAYERS[name][1]
    inputs = [torch.randn(NODES, WIDTH), torch.randint(CLASSES, (NODES,)), edge_index]
    inputs += [] if edge_dim is None else [torch.randn(EDGES, edge_dim)]
    models = contestants(name, 3)
    agree(models, *inputs)
    memory = {peer: cost(partial(step, models[peer], *inputs))[1] for peer in ("ours", "PyG")}
    runs = {peer: partial(step, model, *inputs) for peer, model in models.items()}
    return {**over_ours(in_turn(runs, repeats, seconds=limit)), "mib": memory}


def large_goals(options: Namespace) -> Iterator[Goal]:
    """The table of whole models."""
    setting = f"3 layers, {NODES:,} nodes, {EDGES:,} edges, H = {HEADS}, C = {DIM}, training step"
    for name, (_, _, wanted) in LAYERS.items():
        found = isolated(large_alone, name, options.repeats, options.limit, seconds=1800.0, gib=options.memory)
        for peer in PEERS:
            text = f"{name}, {setting}: times as fast as {peer}"
            own = {"ours_ms": found.get("ours_ms"), "theirs_ms": found.get(f"{peer}_ms")}
            yield Goal(text, wanted if peer == "PyG" else 1, found.get("failure") or found["times"][peer][1], **own)
        text, mib = f"{name}, {setting}: peak memory over PyG's", found.get("mib", {})
        share = found.get("failure") or mib["ours"] / mib["PyG"]
        note = f"{mib['ours']:,.0f} of {mib['PyG']:,.0f} MiB" if mib else ""
        yield Goal(text, MEMORY_SHARE, share, at_most=True, note=note)


# -------------------------------------------------------------------------------------------- new graphs at each step


def molecules(seed: int) -> list[Tensor]:
    """A batch of rings with side chains: features, a class for each node, edges both ways."""
    from torch_geometric.data import Batch, Data

    chance = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(MOLECULES):
        n = int(torch.randint(20, 61, (), generator=chance))
        child = torch.arange(1, n)
        parent = (child - torch.randint(1, 4, (n - 1,), generator=chance)).clamp(min=0)
        rings = torch.randint(n, (2, n // 8), generator=chance)
        one_way = torch.cat([torch.stack([parent, child]), rings], 1)
        graphs.append(Data(x=torch.randn(n, WIDTH), edge_index=torch.cat([one_way, one_way.flip(0)], 1).unique(dim=1)))
    batch: Any = Batch.from_data_list(graphs)
    return [batch.x, torch.randint(CLASSES, (batch.num_nodes,)), batch.edge_index]


def neighborhood(seed: int) -> list[Tensor]:
    """What a NeighborLoader gives of a random graph: seeds first, then those whom they hear, and so on, renumbered."""
    chance = torch.Generator().manual_seed(seed)
    nodes = torch.randperm(NODES, generator=chance)[:SEEDS]
    place = torch.full((NODES,), -1)
    place[nodes] = torch.arange(SEEDS)
    heard, columns = nodes, []
    for count in FAN_OUT:
        source = torch.randint(NODES, (len(heard), count), generator=chance)  # of a random graph: each hears any
        new = source.unique()
        new = new[place[new] < 0]
        place[new] = torch.arange(len(nodes), len(nodes) + len(new))
        nodes = torch.cat([nodes, new])
        columns.append(torch.stack([place[source.flatten()], place[heard].repeat_interleave(count)]))
        heard = new
    x = torch.randn(len(nodes), WIDTH)
    return [x, torch.randint(CLASSES, (SEEDS,)), torch.cat(columns, 1)]


def new_alone(progress: Progress, name: str, make: Callable[[int], list[Tensor]], depth: int, repeats: int) -> dict:
    """Steps on graphs that no contestant has seen before: sorting, planning and all that a first call takes."""
    progress({}, 1800.0)
    models = contestants(name, depth, dynamic=True)  # sizes are new at each step
    for seed in range(3):
        agree(models, *make(seed))
    models["without attention"] = without_attention(models["ours"])
    batches = {peer: iter([make(3 + turn) for turn in range(repeats)]) for peer in models}
    runs = {peer: lambda model=model, own=batches[peer]: step(model, *next(own)) for peer, model in models.items()}
    return over_ours(in_turn(runs, repeats))


def new_goals(options: Namespace, make: Callable, depth: int, setting: str, wanted: float) -> Iterator[Goal]:
    """Of three layers."""
    for name in ("TransformerConv", "GATv2Conv", "GATConv"):
        found = isolated(new_alone, name, make, depth, options.repeats, seconds=1800.0, gib=options.memory)
        for peer in PEERS:
            text, least = f"{name}, {setting}: times as fast as {peer}", wanted if peer == "PyG" else 1
            own = {"ours_ms": found.get("ours_ms"), "theirs_ms": found.get(f"{peer}_ms")}
            least_ms = found.get("without attention_ms")
            note = "" if least_ms is None else f"without any attention, ours would take {least_ms[1]:.0f} ms"
            yield Goal(text, least, found.get("failure") or found["times"][peer][1], note=note, **own)


def molecules_goals(options: Namespace) -> Iterator[Goal]:
    """Batches of small graphs."""
    text = f"{MOLECULES} graphs of 20–60 nodes, new at each step, 3 layers, H = {HEADS}, C = {DIM}, training step"
    return new_goals(options, molecules, 3, text, 2)


def neighbors_goals(options: Namespace) -> Iterator[Goal]:
    """Batches of sampled neighbours."""
    fans = "/".join(map(str, FAN_OUT))
    text = f"{SEEDS:,} nodes of {NODES:,} and {fans} neighbours, new at each step, 2 layers, training step"
    return new_goals(options, neighborhood, 2, text, 1.5)


SECTIONS = {"pyg": large_goals, "molecules": molecules_goals, "neighbors": neighbors_goals}
