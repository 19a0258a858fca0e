"""Ask for a return and get it: a Decision Transformer finds shortest paths, having seen random walks alone.

    python examples/decisions.py                                  30 places, 1,000 walks, a minute or two
    python examples/decisions.py --nodes 60 --walks 300           a larger map, and less to learn from
    python examples/decisions.py --name decisions --resume --steps 3000            longer

States, actions and the return to go are all nodes of one causal graph (Chen et al. 2021). The return is minus the steps
to the goal. At each place the model is asked for the best return that the walks had from there, and for no more; its
steps are drawn. Beside it the same model is trained on a graph in which nobody hears a return: it imitates the walks.
Walks that have not arrived after --longest steps show no way, and are left out. An action is the place to go to next;
only those that an edge leads to can be taken, in training and after: edges are given, and where to go is learned.

Everything is left in runs/NAME: config.json, metrics.csv, outcome.json, accuracy.png, asked.png, path.png,
connectivity.png, and the model, for DecisionTransformer.load and for --resume: model.safetensors and
optimizer-STEP.safetensors; and in runs/NAME-against what the other graph led to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import checkpoints
import command_line
import networkx
import optimization
import reporting
import torch
import training
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from attngraph import draw
from attngraph.models import DecisionTransformer
from attngraph.nn import TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOAL = 0  # the place that walks end at
PATHS = 10  # from each start
UNHEARD = "Causal() - Prefix(1) @ Strided(3)"  # of the nodes return, state, action, …, nobody hears a return


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    quick = {"nodes": 16, "walks": 400, "longest": 40, "steps": 200, "batch": 32, "width": 32}
    parser = command_line.parser_of(
        __doc__, free=("against",), quick=quick, name="decisions", batch=64, steps=1200, evaluate_every=400,
        optimizer="adamw", lr=0.002, adamw_lr=0.01,
    )  # fmt: skip
    add = parser.add_argument
    add("--nodes", type=int, default=30, help="places of the map")
    add("--walks", type=int, default=1000, help="random walks to learn from")
    add("--longest", type=int, default=50, help="steps after which a walk, or a path, has failed")
    add("--context", type=int, default=10, help="steps that the model sees at once, of three nodes each")
    add("--graph", default="Causal()", help="who hears whom; one for each layer, separated by commas")  # the one line
    add("--against", default=UNHEARD, help="train the same on this graph too; '' for none")
    add("--layers", type=int, default=2, help="of the Transformer")
    add("--heads", type=int, default=2, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, nodes=6, walks=1, longest=2, context=1, layers=1, heads=1, width=1)
    command_line.require_heads(given, parser)
    command_line.require_graphs(given, parser)
    command_line.require_causal(given, parser, 3 * given.context, "what is asked: the action")
    return given


# --------------------------------------------------------------------------------------------------- map and walks


class Map(NamedTuple):
    """Places, and who is beside whom: a small world (Watts & Strogatz 1998)."""

    edges: networkx.Graph
    beside: Tensor
    """Bool (nodes, nodes)."""
    distance: Tensor
    """Of each place to the goal, (nodes,)."""


def map_of(nodes: int, seed: int) -> Map:
    edges = networkx.connected_watts_strogatz_graph(nodes, 4, 0.1, seed=seed)
    distances = networkx.single_source_shortest_path_length(edges, GOAL)
    beside = torch.from_numpy(networkx.to_numpy_array(edges, nodelist=range(nodes)) > 0)
    return Map(edges, beside, torch.tensor([distances[node] for node in range(nodes)]))


class Walks(NamedTuple):
    """Where each was, (walks, longest + 1), at the goal to its end; and how many steps it took, (walks,)."""

    places: Tensor
    steps: Tensor
    """Twice the longest for those that failed."""

    def returns(self) -> Tensor:
        """To go from each place, (walks, longest); at the goal 0 or more."""
        return torch.arange(self.places.shape[1] - 1) - self.steps[:, None]


def walks_of(places: Tensor) -> Walks:
    """Walks by where they were."""
    at_goal, longest = places == GOAL, places.shape[1] - 1
    return Walks(places, torch.where(at_goal.any(1), at_goal.int().argmax(1), 2 * longest))


def random_walks(world: Map, starts: Tensor, longest: int, generator: torch.Generator) -> Walks:
    """Every step to any neighbour, until the goal."""
    places = [starts]
    for _ in range(longest):
        step = torch.multinomial(world.beside[places[-1]].float(), 1, generator=generator)[:, 0]
        places.append(step.where(places[-1] != GOAL, GOAL))
    return walks_of(torch.stack(places, 1))


def best_returns(walks: Walks, nodes: int) -> Tensor:
    """The best that any walk had from each place, (nodes,)."""
    places = walks.places[:, :-1]
    worst = torch.full((nodes,), -2 * (places.shape[1]))
    return worst.scatter_reduce(0, places.flatten(), walks.returns().flatten(), "amax").clamp(max=0)


# ------------------------------------------------------------------------------------------------------------- model


def build(args: argparse.Namespace) -> DecisionTransformer:
    config = TransformerConfig(
        embed_dim=args.width, num_layers=args.layers, num_heads=args.heads, position="none", dropout=args.dropout
    )
    graph = command_line.layer_graphs(args.graph, args.layers)
    return DecisionTransformer(
        config, num_states=args.nodes, num_actions=args.nodes, max_time=args.context, graph=graph
    )


def log_odds(
    model: DecisionTransformer, world: Map, places: Tensor, actions: Tensor, returns: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Of each next place, (B, T, nodes), -inf where no edge leads."""
    device = model.head.weight.device
    time = torch.arange(places.shape[1], device=device).expand(places.shape)
    keep = None if keep is None else keep.to(device)
    wish = returns.to(device)[..., None].neg().clamp(min=0).log1p()  # one step tells more of 3 than of 30
    found = model(places.to(device), actions.to(device), wish, time, attention_mask=keep)
    return found.float().masked_fill(~world.beside.to(device)[places.to(device)], -torch.inf)


@torch.no_grad()
def paths(
    model: DecisionTransformer,
    world: Map,
    starts: Tensor,
    asked: Tensor,
    longest: int,
    *,
    generator: torch.Generator,
    best: Tensor | None = None,
) -> Walks:
    """Where the model goes when it is asked for these returns, (starts,), and then for what remains of them.

    Each step is drawn. With the best returns of all places, it is asked at each for the best from there.
    """
    places, returns, seen = starts[:, None], asked[:, None], slice(-model.time.num_embeddings, None)
    while places.shape[1] <= longest and (live := places[:, -1] != GOAL).any():
        actions = torch.cat([places[:, 1:], places[:, -1:]], 1)  # the last is heard by nobody
        odds = log_odds(model, world, places[live, seen], actions[live, seen], returns[live, seen])[:, -1].cpu()
        step = torch.multinomial(odds.softmax(-1), 1, generator=generator)[:, 0]
        places = pad(places, (0, 1), value=GOAL)
        places[live, -1] = step
        remains = returns[:, -1:] + 1 if best is None else best[places[:, -1:]]  # each step has cost one
        returns = torch.cat([returns, remains], 1)
    return walks_of(pad(places, (0, longest + 1 - places.shape[1]), value=GOAL))


# ---------------------------------------------------------------------------------------------------------- training


class Crops(NamedTuple):
    """Parts of walks: (size, context) each. What begins anywhere in a walk is a walk too."""

    places: Tensor
    actions: Tensor
    returns: Tensor
    keep: Tensor
    """False after the end."""


def crops(walks: Walks, size: int, context: int, generator: torch.Generator) -> Crops:
    longest = walks.places.shape[1] - 1
    walk = torch.randint(len(walks.places), (size, 1), generator=generator)
    moves = walks.steps[walk].clamp(max=longest)
    begin = (torch.rand(size, 1, generator=generator) * moves).long()
    step = begin + torch.arange(context)
    at = step.clamp(max=longest - 1)
    return Crops(walks.places[walk, at], walks.places[walk, at + 1], at - walks.steps[walk], step < moves)


class Trained(NamedTuple):
    model: DecisionTransformer
    reached: Walks
    """PATHS from each start, asked at each place for the best return that the data have from there."""
    metrics: training.Metrics
    edges: int


def train(args: argparse.Namespace, world: Map, walks: Walks) -> Trained:
    """Train on the walks under --graph, and leave a checkpoint in the run's folder."""
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    try:
        model = build(args).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    nodes = 3 * args.context
    edges = reporting.edges_of(model.transformer.graphs, nodes)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}")
    starts = torch.arange(1, args.nodes).repeat(PATHS)
    best = best_returns(walks, args.nodes).clamp(min=-args.longest)

    def loss(number: int) -> Tensor:
        batch = crops(walks, args.batch, args.context, training.batch_generator(args, number))
        odds = log_odds(model, world, *batch)
        return cross_entropy(odds[batch.keep.to(device)], batch.actions[batch.keep].to(device))

    def reached() -> Walks:
        chance = torch.Generator().manual_seed(args.seed)
        return paths(model, world, starts, best[starts], args.longest, generator=chance, best=best)

    task = training.Task(
        model,
        loss,
        lambda: shortest(reached(), world),
        device,
        identity={"nodes": args.nodes, "walks": args.walks, "longest": args.longest},
        record={"example": "decisions", "edges": edges},
        unit="walks",
        per_batch=args.batch,
        score="shortest_paths",
        free=(*command_line.FREE, "against"),
    )
    _, metrics = training.fit(args, task)
    model.eval()
    return Trained(model, reached(), metrics, edges)


def shortest(found: Walks, world: Map) -> float:
    """How many took a shortest path, in percent."""
    return 100 * float((found.steps == world.distance[found.places[:, 0]]).float().mean())


def main(args: argparse.Namespace) -> dict:
    """Both graphs, if there are two."""
    world = map_of(args.nodes, args.seed)
    chance = torch.Generator().manual_seed(args.seed)
    walks = random_walks(world, torch.randint(1, args.nodes, (args.walks,), generator=chance), args.longest, chance)
    walks = Walks(*(each[walks.steps <= args.longest] for each in walks))  # the others show no way
    if not len(walks.steps):
        raise SystemExit(f"none of --walks {args.walks} arrives in --longest {args.longest} steps; take more of either")
    print(f"map       {args.nodes} places, {args.walks:,} random walks, of which {len(walks.steps):,} arrive")
    with checkpoints.only_run(args):
        ours, without = train(args, world, walks), None
        if args.against:
            name = f"{args.name}-against"
            begun = args.resume and (Path(args.runs) / name / checkpoints.MODEL).exists()  # or the first was stopped
            other = argparse.Namespace(**{**vars(args), "graph": args.against, "name": name, "resume": begun})
            print(f"\nthe same model and budget under {args.against}:")
            with checkpoints.only_run(other):
                without = train(other, world, walks)
        return report(args, world, walks, ours, without)


# --------------------------------------------------------------------------------------------------- what it learned


def report(args: argparse.Namespace, world: Map, walks: Walks, ours: Trained, without: Trained | None) -> dict:
    """Figures beside each other, and pictures."""
    folder, chance = Path(args.runs) / args.name, torch.Generator().manual_seed(args.seed)
    starts = torch.arange(1, args.nodes)
    data = -best_returns(walks, args.nodes)[1:]
    again = random_walks(world, starts.repeat(PATHS), args.longest, chance)
    steps = {"asked for, the best in the data": data, args.graph: ours.reached.steps}
    baselines = {}
    if without is not None:
        baselines[args.against], steps[args.against] = shortest(without.reached, world), without.reached.steps
    baselines["random walks"], steps["random walks"] = shortest(again, world), again.steps
    steps["shortest"] = world.distance[1:]
    print(f"\nsteps to the goal, mean over starts ({2 * args.longest} where it is not reached)")
    for name, each in steps.items():
        failed = f", {int((each > args.longest).sum())} of {len(each)} fail" if (each > args.longest).any() else ""
        print(f"{each.float().mean():8.2f}   {name}{failed}")
    means = {name: float(each.float().mean()) for name, each in steps.items()}
    curve = reporting.loss_curve(ours.metrics, args.graph, "loss [nats a step]", "shortest paths [%]")
    reporting.save_picture(curve, folder / "accuracy.png")
    reporting.save_connectivity(ours.model.transformer.graphs, 3 * args.context, folder / "connectivity.png")
    reporting.save_picture(asked_and_reached(args, world, ours, -data, means), folder / "asked.png")
    reporting.save_picture(path_picture(world, walks, ours.reached), folder / "path.png")
    found = reporting.Outcome(
        "shortest paths taken [%]",
        shortest(ours.reached, world),
        baselines,
        args.graph,
        ours.edges,
        ours.metrics.seconds,
        "path.png",
    )
    failed = int((ours.reached.steps > args.longest).sum())
    return reporting.tell(folder, found) | {"steps": means, "failed": failed}


def asked_and_reached(
    args: argparse.Namespace, world: Map, ours: Trained, best: Tensor, means: dict[str, float]
) -> Figure:
    """Mean steps of paths, drawn step by step, that were asked to take more and more."""
    from matplotlib.figure import Figure

    chance, starts = torch.Generator().manual_seed(args.seed), torch.arange(1, args.nodes)
    starts = starts.repeat(PATHS)
    more = [extra for extra in (0, 2, 4, 8, 12, 16, 24) if extra < args.longest]
    asked = [float((extra - best).float().mean()) for extra in more]
    reached = [
        paths(ours.model, world, starts, (best - extra).repeat(PATHS), args.longest, generator=chance).steps
        for extra in more
    ]
    reached = [float(steps.float().mean()) for steps in reached]
    ax = Figure(figsize=(5.5, 4), layout="constrained").subplots()
    ax.plot(asked, reached, "o-", color=draw.BLUE, label=args.graph)
    ax.axline((asked[0], asked[0]), slope=1, color="gray", lw=0.8, ls=":", label="what is asked")
    for color, name in zip(("#c2410c", "#15803d"), (args.against, "random walks"), strict=True):
        if name in means:
            ax.axhline(means[name], color=color, lw=1, ls="--", label=name)
    ax.set(xlabel="steps asked for, mean over starts", ylabel="steps to the goal, mean over starts", ylim=(0, None))
    draw.set_title(ax, "steps that the return asks for, and steps that are taken")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    return ax.figure


def path_picture(world: Map, walks: Walks, reached: Walks) -> Figure:
    """The map, the path from the start that is farthest from the goal, and the best walk from there in the data."""
    from matplotlib.figure import Figure

    place = networkx.spring_layout(world.edges, seed=0, iterations=200)
    ax = Figure(figsize=(6, 5), layout="constrained").subplots()
    for a, b in world.edges.edges:
        ax.plot(*zip(place[a], place[b], strict=True), color="0.8", lw=1, zorder=1)
    chosen = int(world.distance[reached.places[:, 0]].argmax())
    start, steps = int(reached.places[chosen, 0]), int(reached.steps[chosen])
    shown = ((f"taken, {steps} steps", reached.places[chosen].tolist()[: steps + 1], draw.BLUE, "-"),)
    returns = walks.returns().masked_fill(walks.places[:, :-1] != start, -(10**6))
    walk, step = divmod(int(returns.argmax()), returns.shape[1])
    if (end := int(walks.steps[walk])) < walks.places.shape[1]:
        best = walks.places[walk, step : end + 1].tolist()
        shown = (*shown, (f"best in the data, {end - step} steps", best, "#c2410c", ":"))
    for name, nodes, color, style in shown:
        ax.plot(*zip(*[place[node] for node in nodes], strict=True), style, color=color, lw=3, label=name, zorder=2)
    dots = ax.scatter(
        *zip(*[place[node] for node in range(len(place))], strict=True),
        c=world.distance,
        s=160,
        cmap="Blues_r",
        edgecolors="0.4",
        zorder=3,
    )
    for node, name in ((start, "start"), (GOAL, "goal")):
        ax.annotate(name, place[node], xytext=(8, 8), textcoords="offset points", fontsize=10, zorder=4)
    ax.figure.colorbar(
        dots, label="steps to the goal, at least", shrink=0.8, ticks=range(int(world.distance.max()) + 1)
    )
    draw.set_title(ax, f"from {start} to {GOAL}, a shortest path takes {int(world.distance[start])} steps")
    ax.legend(fontsize=8)
    ax.set_axis_off()
    return ax.figure


if __name__ == "__main__":
    main(settings())
