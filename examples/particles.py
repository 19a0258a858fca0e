"""Predict how particles push each other: who hears whom is computed anew from the places of each batch.

    python examples/particles.py                       the 12 nearest, and beside them 12 at random, and all
    python examples/particles.py --graph "knn_graph(place, 6, loop=True)" --against      fewer, nothing beside them
    python examples/particles.py --quick                                                 fewer steps, seconds

Particles in a square repel those near them. From all places and charges a Transformer predicts all accelerations; no
two batches have the same places, so that no graph that is known before fits them. Everything is left in runs/NAME:
config.json, metrics.csv, accuracy.png, connectivity.png, forces.png, the particles with their edges and accelerations,
outcome.json, and for --resume the model; what other graphs led to is in runs/NAME-against-1, ….
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import command_line
import optimization
import reporting
import torch
import training
from torch import Tensor, nn

from attngraph import Full, Graph, draw, knn_graph
from attngraph.nn import Transformer, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACH = 0.1  # of the force: by so far it has fallen to 1 / e
OCTAVES = 5  # of the waves that tell a place
TESTED = 128  # sets to test by


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    quick = {"steps": 150, "evaluate_every": 50, "against": ["Random(12)"]}
    parser = command_line.parser_of(
        __doc__, free=("against",), quick=quick, name="particles", batch=16, steps=600, evaluate_every=100,
        dtype="float32",
    )  # fmt: skip
    add = parser.add_argument
    add("--graph", default="knn_graph(place, 12, loop=True)", help="who hears whom: the nearest, or an expression")
    add(
        "--against", nargs="*", default=["Random(12)", "Full()"], help="train the same on these graphs too, and compare"
    )
    add("--particles", type=int, default=64, help="in the square")
    add("--layers", type=int, default=2, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, particles=2, layers=1, heads=1, width=1)
    command_line.require_heads(given, parser)
    command_line.require_graphs(given, parser, lambda text: graph_of(text, given.particles, given.heads))
    return given


NEAREST = re.compile(r"knn_graph\( *place *, *(\d+) *(, *loop *= *True *)?\)")


def graph_of(text: str, particles: int, heads: int) -> Callable[[Tensor], Graph]:
    """What makes a graph of places (B, N, 2): the nearest of each, or always the same."""
    if nearest := NEAREST.fullmatch(text):
        count, loop = int(nearest[1]), nearest[2] is not None
        if not 0 < count < particles + loop:
            raise ValueError(f"--graph must have 1 to {particles - 1 + loop} of {particles} particles (got {text})")
        return lambda place: knn_graph(place, count, loop=loop)  # the one line
    if "knn_graph" in text:
        raise ValueError(f"--graph must be as knn_graph(place, 12, loop=True), or an expression (got {text})")
    graph = command_line.layer_graphs(text, 1, heads=heads)
    assert isinstance(graph, Graph)
    return lambda place: graph


def sets(count: int, particles: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places (B, N, 2) in the unit square, charges (B, N, 1), accelerations (B, N, 2) by a force of Gaussian range."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(count, particles, 2, generator=generator)
    charge = torch.rand(count, particles, 1, generator=generator) + 0.5
    apart = place[:, :, None] - place[:, None]
    distance = apart.norm(dim=-1, keepdim=True) + torch.eye(particles)[..., None]  # not 0 to itself
    force = charge[:, None] * apart / distance * torch.exp(-((distance / REACH) ** 2))
    return place, charge, force.sum(2)


class Particles(nn.Module):
    """Places and charges → accelerations (B, N, 2), in units of their spread."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.read = nn.Linear(4 * OCTAVES + 1, config.embed_dim)
        self.transformer = Transformer(config, Full())
        self.head = nn.Linear(config.embed_dim, 2)

    def forward(self, place: Tensor, charge: Tensor, graph: Graph) -> Tensor:
        """A place is told by its sines and cosines, from half a wave in the square on."""
        angles = (place[..., None] * torch.pi * 2.0 ** torch.arange(OCTAVES, device=place.device)).flatten(2)
        read = torch.cat([angles.sin(), angles.cos(), charge], -1)
        return self.head(self.transformer(self.read(read), graph))


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    config = TransformerConfig(
        embed_dim=args.width, num_layers=args.layers, num_heads=args.heads, position="none", dropout=args.dropout
    )
    model, graph = Particles(config).to(device), graph_of(args.graph, args.particles, args.heads)
    unseen = sets(TESTED, args.particles, training.TEST_SEED)
    unit = unseen[2].std()
    edges = reporting.edges_of([graph(unseen[0][:1])] * args.layers, args.particles)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}, {edges:,} edges")

    def predicted(place: Tensor, charge: Tensor) -> Tensor:
        return unit * model(place.to(device), charge.to(device), graph(place)).float().cpu()

    def loss(number: int) -> Tensor:
        place, charge, force = sets(args.batch, args.particles, training.batch_seed(args, number))
        return (predicted(place, charge) - force).square().mean() / unit**2

    def unexplained() -> float:
        place, charge, force = (part.split(16) for part in unseen)
        found = torch.cat([predicted(*each) for each in zip(place, charge, strict=True)])
        return (100 * (found - torch.cat(force)).square().mean() / unit**2).item()

    task = training.Task(
        model,
        loss,
        unexplained,
        device,
        identity={},
        record={"example": "particles", "edges": edges},
        unit="sets",
        per_batch=args.batch,
        score="unexplained",
        free=(*command_line.FREE, "against"),
    )
    with checkpoints.only_run(args):
        score, metrics = training.fit(args, task)
        print(f"{score:.2f}% of the variance of unseen accelerations unexplained, after {metrics.seconds:.0f} s")
        folder = Path(args.runs) / args.name
        curve = reporting.loss_curve(
            metrics, f"accelerations, {args.graph}", "mean square over variance", "unexplained [%]"
        )
        reporting.save_picture(curve, folder / "accuracy.png")
        model.eval()
        with torch.no_grad():
            first = [part[:1] for part in unseen]
            found = predicted(*first[:2])
        picture = forces_drawn(first[0], first[2][0], found[0], graph(first[0]), args.graph)
        reporting.save_picture(picture, folder / "forces.png")
        reporting.save_connectivity([graph(first[0])], args.particles, folder / "connectivity.png")
    return {"unexplained": score, "edges": edges, "seconds": metrics.seconds}


def forces_drawn(place: Tensor, force: Tensor, found: Tensor, graph: Graph, title: str) -> Figure:
    """The particles of a set (1, N, 2) with their edges, and accelerations (N, 2), beside those that were predicted."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    left, right = Figure(figsize=(10, 4.8), layout="constrained").subplots(1, 2, width_ratios=[1.1, 1])
    x, y = place[0].T
    lines = place[0][graph.edge_index(len(x), len(x)).T]
    left.add_collection(LineCollection(lines.tolist(), colors=draw.BLUE, alpha=0.15, linewidths=0.6))
    scale = {"angles": "xy", "scale_units": "xy", "scale": 8, "zorder": 3}
    left.quiver(x, y, *force.T, color="#b0b4bb", width=0.01, label="true", **scale)
    left.quiver(x, y, *found.T, color="#c2410c", width=0.004, label="predicted", **scale)
    left.plot(x, y, "o", color=draw.BLUE, ms=3)
    left.set(xlabel="x [side of the square]", ylabel="y [side of the square]", aspect="equal")
    ends = torch.cat([place[0], place[0] + force / 8, place[0] + found / 8])  # of all arrows
    (low, high), margin = (ends.amin(0), ends.amax(0)), 0.03
    left.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
    draw.set_title(left, f"{title}, and accelerations")
    left.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2)
    right.plot(force.flatten(), found.flatten(), "o", ms=3, color="#c2410c")
    ends = [force.min(), force.max()]
    right.plot(ends, ends, color="#b0b4bb", zorder=0)
    right.set(xlabel="true component of an acceleration", ylabel="predicted component", aspect="equal")
    draw.set_title(right, "x and y of the accelerations of one set")
    right.grid(alpha=0.3)
    return left.figure


def main(args: argparse.Namespace) -> dict:
    """The graph and those beside it, and how they compare."""
    found, others = train(args), reporting.beside(args, train)
    folder = Path(args.runs) / args.name
    told = reporting.tell(
        folder,
        reporting.Outcome(
            metric="unexplained variance [%]",
            figure=found["unexplained"],
            baselines={f"{graph}, {each['edges']:,} edges": each["unexplained"] for graph, each in others.items()},
            graph=args.graph,
            edges=found["edges"],
            seconds=found["seconds"],
            picture="forces.png",
            lower_is_better=True,
        ),
    )
    return {**told, **found, "against": others}


if __name__ == "__main__":
    main(settings())
