"""A camera and a radar in one set of nodes: where is what is asked for, also when a sensor fails?

    python examples/sensors.py                          sensors fail in training; beside it, models of one sensor alone
    python examples/sensors.py --name sure --training both --against          one that never saw a sensor fail
    python examples/sensors.py --name star --graph "Prefix(1) | Identity()" --against  readings hear the question alone

The camera tells classes and bearings well, and distances badly, by size; the radar distances well, and bearings badly;
both see what isn't there. A reading is a node, so is the question: each scene is a set of its own size, and a sensor
that fails is fewer nodes. Left in runs/NAME: config.json, metrics.csv, scene.png, errors.png, training.png,
connectivity.png, outcome.json, and the model; in runs/NAME-against-1 and so on those of the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import checkpoints
import command_line
import matplotlib
import optimization
import reporting
import torch
import training
from torch import Tensor, nn
from torch.nn.functional import one_hot

from attngraph import draw, record
from attngraph.nn import SinusoidalPositions, Transformer, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {
    "dropped": "sensors drop out in training",
    "camera": "trained on the camera alone",
    "radar": "trained on the radar alone",
    "both": "sensors never drop out in training",
}
METRIC = "error of the position [10 m]"


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: who hears whom in a scene, and which sensors it has in training."""
    quick = {"steps": 400, "batch": 32, "layers": 2, "against": ["both"]}
    parser = command_line.parser_of(
        __doc__, ("against",), quick, name="sensors", batch=64, steps=1500, evaluate_every=500, optimizer="adamw",
        lr=0.003,
    )  # fmt: skip
    add = parser.add_argument
    add("--graph", default="Full()", help="who hears whom: the question is node 0; one for each layer, or one for all")
    add("--training", default="dropped", choices=list(WAYS), help="which sensors the scenes to learn from have")
    add("--against", nargs="*", default=["camera", "radar", "both"], choices=list(WAYS), help="train the same so too")
    add("--layers", type=int, default=3, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, layers=1, heads=1, width=1)
    command_line.require_heads(given, parser)
    command_line.require_graphs(given, parser, names=["graph"])
    return given


# ------------------------------------------------------------------------------------------------------------ scenes

CLASSES = ("pedestrian", "cyclist", "car", "lorry")
CLUTTER = 4  # at most, of either sensor, that isn't there
CAMERA_BEARING, CAMERA_DISTANCE = 0.01, 0.3  # standard deviations; that of the camera's distance is relative
RADAR_BEARING, RADAR_DISTANCE = 0.1, 0.02
FAILS = 0.3  # share of the scenes to learn from in which one of the sensors does
NOBODY = len(CLASSES)  # the class of clutter
READINGS = len(CLASSES) + CLUTTER
TESTED = 4000  # scenes to test by


class Scenes(NamedTuple):
    """Readings (B, readings, 2) are a bearing [rad] and a distance [10 m]; those that are real come first."""

    camera: Tensor
    classes: Tensor  # of the camera's readings, int64 (B, readings)
    radar: Tensor
    real: Tensor  # bool (B, 2, readings), of the camera and of the radar
    asked: Tensor  # a class, int64 (B,)
    targets: Tensor  # (B, classes, 2): bearing and distance of one of each class

    def position(self) -> Tensor:
        """Where what is asked for is: to the right and ahead, (B, 2)."""
        return places(self.targets[torch.arange(len(self.asked)), self.asked])


def places(polar: Tensor) -> Tensor:
    """Bearing and distance (…, 2) → how far to the right, and ahead."""
    bearing, distance = polar.unbind(-1)
    return torch.stack([distance * bearing.sin(), distance * bearing.cos()], -1)


def scenes(count: int, generator: torch.Generator) -> Scenes:
    """One target of each class, seen by both sensors, among what only one of them sees."""

    def anywhere(nodes: int) -> Tensor:
        return torch.rand(count, nodes, 2, generator=generator) * 2 + torch.tensor([-1.0, 1.0])

    def noise() -> Tensor:
        return torch.randn(count, len(CLASSES), 2, generator=generator)

    targets, one = anywhere(len(CLASSES)), torch.tensor([0.0, 1.0])
    seen = targets * (1 + noise() * CAMERA_DISTANCE * one) + noise() * CAMERA_BEARING * (1 - one)
    echoes = targets + noise() * torch.tensor([RADAR_BEARING, RADAR_DISTANCE])
    clutter = torch.randint(CLUTTER + 1, (count, 2, 1), generator=generator)
    real = torch.arange(READINGS) < len(CLASSES) + clutter
    classes = torch.arange(READINGS).clamp(max=NOBODY).expand(count, -1)
    asked = torch.randint(len(CLASSES), (count,), generator=generator)
    camera, radar = (torch.cat([targets, anywhere(CLUTTER)], 1) for targets in (seen, echoes))
    return Scenes(camera, classes, radar, real, asked, targets)


def unseen_scenes() -> Scenes:
    """Those that test."""
    return scenes(TESTED, torch.Generator().manual_seed(training.TEST_SEED))


def working(count: int, way: str, generator: torch.Generator | None = None) -> Tensor:
    """Which sensors, camera and radar, work in each of so many scenes: bool (count, 2)."""
    if way != "dropped":
        return torch.tensor([way != "radar", way != "camera"]).expand(count, 2)
    chance = torch.rand(count, generator=generator)
    return torch.stack([chance > FAILS / 2, chance < 1 - FAILS / 2], 1)


def by_hand(given: Scenes) -> dict[str, float]:
    """The camera's bearing with a distance of the radar: of the likeliest echo, or of all, by their likelihood."""
    row = torch.arange(len(given.asked))
    bearing, distance = given.camera[row, given.asked].unbind(1)
    off = (given.radar[..., 0] - bearing[:, None]) / RADAR_BEARING
    far = (given.radar[..., 1] - distance[:, None]) / (CAMERA_DISTANCE * given.radar[..., 1])
    score = (-0.5 * (off.square() + far.square())).masked_fill(~given.real[:, 1], -torch.inf)
    nearest = given.radar[row, score.argmax(1), 1]
    weighted = (score.softmax(1) * given.radar[..., 1]).sum(1)
    names = ("by hand: the distance of the likeliest echo", "by hand: echoes weighted by their likelihood")
    found = (places(torch.stack([bearing, each], 1)) for each in (nearest, weighted))
    return {name: error(each, given) for name, each in zip(names, found, strict=True)}


def error(found: Tensor, given: Scenes) -> float:
    """The root of the mean squared distance from where it is."""
    return float((found - given.position()).square().sum(1).mean().sqrt())


# ------------------------------------------------------------------------------------------------------------- model


class Fusion(nn.Module):
    """A question and readings hear each other; the question's vector says where."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        config = TransformerConfig(
            embed_dim=args.width, num_layers=args.layers, num_heads=args.heads, position="none", dropout=args.dropout
        )
        self.question = nn.Embedding(len(CLASSES), args.width)
        self.waves = SinusoidalPositions(16, base=100)  # numbers as waves, of which close ones can be told apart
        self.camera = nn.Linear(2 * 16 + len(CLASSES) + 1, args.width)
        self.radar = nn.Linear(2 * 16, args.width)
        self.transformer = Transformer(config, command_line.layer_graphs(args.graph, args.layers))
        self.head = nn.Linear(args.width, 2)

    def forward(self, given: Scenes, works: Tensor) -> Tensor:
        """Scenes, and which of the two sensors work, bool (B, 2) → positions (B, 2)."""
        classes = one_hot(given.classes, len(CLASSES) + 1).float()
        camera, radar = (self.waves(30 * reading).flatten(2) for reading in (given.camera, given.radar))
        readings = [self.camera(torch.cat([camera, classes], 2)), self.radar(radar)]
        nodes = torch.cat([self.question(given.asked)[:, None], *readings], 1)
        real = torch.cat([works.new_ones(len(works), 1), (given.real & works[..., None]).flatten(1)], 1)
        some = real.any(0)  # what is in none of the scenes needs no place
        return self.head(self.transformer(nodes[:, some], attention_mask=real[:, some])[:, 0])


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, and leave the run's folder behind. Returns errors with both sensors, and with one of them."""
    device, unseen = optimization.best_device(args.device), unseen_scenes()
    torch.manual_seed(args.seed)
    model = Fusion(args).to(device)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, {args.graph}, {WAYS[args.training]}")

    def on_device(given: Scenes) -> Scenes:
        return Scenes(*(part.to(device) for part in given))

    def loss(number: int) -> Tensor:
        chance = training.batch_generator(args, number)
        given = on_device(scenes(args.batch, chance))
        works = working(args.batch, args.training, chance).to(device)
        return (model(given, works).float() - given.position()).square().sum(1).mean()

    def error_of(way: str) -> float:
        return error(model(on_device(unseen), working(len(unseen.asked), way).to(device)).float().cpu(), unseen)

    task = training.Task(
        model,
        loss,
        lambda: error_of("both" if args.training == "dropped" else args.training),
        device,
        identity={},
        record={"example": "sensors"},
        unit="scenes",
        per_batch=args.batch,
        score="error",
        free=(*command_line.FREE, "against"),
    )
    with checkpoints.only_run(args):
        _, metrics = training.fit(args, task)
        model.eval()
        with torch.no_grad():
            found = {way: error_of(way) for way in ("both", "camera", "radar")}
        told = ", ".join(f"{way} {figure:.3f}" for way, figure in found.items())
        print(f"{METRIC}: {told}, after {metrics.seconds:.0f} s")
        folder = Path(args.runs) / args.name
        reporting.save_picture(
            reporting.loss_curve(metrics, WAYS[args.training], "loss", METRIC), folder / "training.png"
        )
        reporting.save_picture(draw_scene(model, device), folder / "scene.png")
        reporting.save_connectivity(model.transformer.graphs, 1 + 2 * READINGS, folder / "connectivity.png")
    return {**found, "seconds": metrics.seconds}


def main(args: argparse.Namespace) -> dict:
    """With sensors that drop out in training, and beside it other ways."""
    found, folder = {args.training: train(args)}, Path(args.runs) / args.name
    for number, way in enumerate(args.against, 1):
        name = f"{args.name}-against-{number}"
        begun = args.resume and (Path(args.runs) / name / checkpoints.MODEL).exists()  # or the first was stopped before
        print(f"\nthe same model and budget, {WAYS[way]}:")
        found[way] = train(argparse.Namespace(**{**vars(args), "training": way, "name": name, "resume": begun}))
    hand, own, nodes = by_hand(unseen_scenes()), found[args.training], 1 + 2 * len(CLASSES) + CLUTTER
    reporting.save_picture(draw_errors(found, min(hand.values())), folder / "errors.png")
    baselines = hand | {f"{sensor} alone": own[sensor] for sensor in ("camera", "radar")}
    for way in args.against:
        heard = (way,) if way in ("camera", "radar") else ("both", "camera", "radar")
        baselines |= {f"{sensor}{' alone' * (sensor != 'both')}, {WAYS[way]}": found[way][sensor] for sensor in heard}
    graphs = Fusion(args).transformer.graphs
    edges = reporting.edges_of(graphs, nodes)
    outcome = reporting.Outcome(
        METRIC, own["both"], baselines, args.graph, edges, own["seconds"], "scene.png", lower_is_better=True
    )
    return {**reporting.tell(folder, outcome), "found": found}


# ---------------------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def draw_scene(model: Fusion, device: torch.device) -> Figure:
    """From above: what both sensors read, in the colour of how much the question hears it, and what it says."""
    from matplotlib.figure import Figure

    given = Scenes(*(part[:1].to(device) for part in unseen_scenes()))
    with record(model) as recorded:
        said = model(given, torch.ones(1, 2, dtype=torch.bool, device=device))[0].cpu()
    heard = recorded[-1]
    edges, weight = heard.edge_index, torch.zeros(1 + 2 * READINGS)
    (node,) = torch.cat([torch.ones(1, dtype=torch.bool), given.real[0].flatten().cpu()]).nonzero(as_tuple=True)
    weight[node[edges[0, edges[1] == 0]]] = heard.weights[0].mean(0)[edges[1] == 0].float().cpu()
    camera, radar = weight[1:].view(2, READINGS)
    ax = Figure(figsize=(8, 5.5), layout="constrained").subplots()
    colors = matplotlib.colormaps["viridis_r"]
    scale = matplotlib.colors.Normalize(0, float(weight[1:].max()))
    step = torch.linspace(-1, 1, 20)
    for number in given.real[0, 0].nonzero()[:, 0].tolist():
        bearing, distance = given.camera[0, number].cpu()
        line = torch.stack([bearing.expand(20), distance * (1 + CAMERA_DISTANCE * step)], 1)
        ax.plot(*places(line).T, color=colors(scale(float(camera[number]))), lw=2, ls="--" if number >= NOBODY else "-")
    for number in given.real[0, 1].nonzero()[:, 0].tolist():
        bearing, distance = given.radar[0, number].cpu()
        arc = torch.stack([bearing + RADAR_BEARING * step, distance.expand(20)], 1)
        ax.plot(*places(arc).T, color=colors(scale(float(radar[number]))), lw=4, solid_capstyle="butt")
    targets = zip(CLASSES, places(given.targets[0].cpu()).tolist(), strict=True)
    for number, (name, place) in enumerate(sorted(targets, key=lambda target: target[1])):
        ax.plot(*place, "o", color="#111827", ms=4)
        offset, side = ((5, 5), "left") if number % 2 else ((-5, -9), "right")  # neighbours don't cover each other
        ax.annotate(name, place, offset, textcoords="offset points", fontsize=8, ha=side)
    ax.plot(*said, "x", color="#c2410c", ms=11, mew=2.5, label=f"where the {CLASSES[given.asked[0]]} is said to be")
    ax.plot(0, 0, "^", color="#111827", ms=10, label="the car with the sensors")
    ax.plot([], [], color="#6b7280", lw=2, label="camera: bearing, and distance by size; dashed: no target")
    ax.plot([], [], color="#6b7280", lw=4, label="radar: distance, and bearing roughly")
    ax.plot([], [], "o", color="#111827", ms=4, label="where targets are")
    ax.set(xlabel="to the right [10 m]", ylabel="ahead [10 m]", aspect="equal")
    draw.set_title(ax, f"a scene, and whom the question “where is the {CLASSES[given.asked[0]]}?” hears")
    ax.figure.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    shown = matplotlib.cm.ScalarMappable(scale, colors)
    label = "attention of the question, last layer, mean of heads"
    ax.figure.colorbar(shown, ax=ax, orientation="horizontal", aspect=40, label=label)
    return ax.figure


def draw_errors(found: dict[str, dict[str, float]], hand: float) -> Figure:
    """Errors with both sensors and with one, by how the model was trained."""
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7.5, 4), layout="constrained").subplots()
    sensors, width = ("both", "camera", "radar"), 0.8 / len(found)
    for place, (way, errors) in enumerate(found.items()):
        heard = [(x, errors[each]) for x, each in enumerate(sensors) if way in ("dropped", "both", each)]
        at = [x + width * (place - (len(found) - 1) / 2) for x, _ in heard]
        bars = ax.bar(at, [figure for _, figure in heard], width, label=WAYS[way])
        ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    ax.hlines(hand, -0.45, 0.45, color="#111827", ls=":", label="both, by hand")
    ax.set_xticks(range(3), ["both sensors", "the camera alone", "the radar alone"])
    ax.set(ylabel=METRIC)
    draw.set_title(ax, "by which sensors work, and which did in training")
    ax.legend(fontsize=8)
    return ax.figure


if __name__ == "__main__":
    main(settings())
