"""What an example reached: its figure beside its baselines, and the pictures of a training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from checkpoints import MODEL, write_whole

from attngraph import Graph, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from training import Metrics


def save_picture(figure: Figure, path: Path) -> None:
    """The whole picture or none."""
    write_whole(path, lambda aside: draw.save(figure, aside))


class Outcome(NamedTuple):
    """What an example reached, beside what it is to be compared with."""

    metric: str
    """What is measured, with its unit: "values right [%]"."""
    figure: float
    baselines: Mapping[str, float]
    """The same of others, by what they are: "Causal() & Window(7, 0)", "ridge regression"."""
    graph: str
    """The one line that differs."""
    edges: int
    """Of all layers, for one example."""
    seconds: float
    """Of training."""
    picture: str
    """The file in the run's folder that shows it best."""
    lower_is_better: bool = False


OUTCOME = "outcome.json"


def edges_of(graphs: Iterable[Graph], nodes: int) -> int:
    """Of all layers, as `settled` has them."""
    return sum(graph.num_edges(nodes, nodes) for graph in settled(graphs, nodes))


def settled(graphs: Iterable[Graph], nodes: int) -> list[Graph]:
    """Each of the graphs, or where queries and keys choose it, what random ones choose."""
    generator, found = torch.Generator().manual_seed(0), []
    for graph in graphs:
        heads = [] if graph.heads is None else [graph.heads]
        found.append(graph.resolve(*torch.randn(2, *heads, nodes, 8, generator=generator)))
    return found


def save_connectivity(graphs: Sequence[Graph], nodes: int, path: Path) -> None:
    """Who hears whom in each layer, the first so many nodes; of chosen graphs, what random queries and keys choose."""
    save_picture(draw.connectivity(settled(graphs, nodes), nodes), path)


def tell(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Print the figure with its baselines below it, and what the run has left; keep it as outcome.json, return that."""
    print(f"{outcome.metric:40}{outcome.figure:10.4g}   {outcome.graph}, {outcome.edges:,} edges")
    for name, figure in outcome.baselines.items():
        print(f"{'':40}{figure:10.4g}   {name}")
    kept = {**outcome._asdict(), "baselines": dict(outcome.baselines)}
    write_whole(folder / OUTCOME, lambda path: path.write_text(json.dumps(kept, indent=2)))
    print(left_in(folder))
    return kept


def beside(args: argparse.Namespace, train: Callable[[argparse.Namespace], dict]) -> dict[str, dict]:
    """What `train` returns on each graph of --against, all else the same, in runs of their own: NAME-against-1, …"""
    found = {}
    for number, graph in enumerate(args.against, 1):
        name = f"{args.name}-against-{number}"
        begun = args.resume and (Path(args.runs) / name / MODEL).exists()  # or the first was stopped before
        print(f"\nthe same model and budget under {graph}:")
        found[graph] = train(argparse.Namespace(**{**vars(args), "graph": graph, "name": name, "resume": begun}))
    return found


def loss_curve(metrics: Metrics, title: str, loss: str, score: str) -> Figure:
    """Training loss and score against the step; a score that is no loss has an axis of its own."""
    from matplotlib.figure import Figure

    ax = Figure(figsize=(6, 3.5), layout="constrained").subplots()
    lines = ax.plot(
        *zip(*metrics.column("training_loss"), strict=True),
        color=draw.BLUE,
        alpha=0.4,
        lw=0.8,
        label="training, each batch",
    )
    name = metrics.columns[4]
    other = ax if name.endswith("_loss") else ax.twinx()
    lines += other.plot(*zip(*metrics.column(name), strict=True), "o-", color="#c2410c", label=score)
    if other is not ax:
        other.set_ylabel(score)
        other.set_ylim(0, min(100.5, 1.1 * other.get_ylim()[1]))  # in percent, or an error
    ax.set(xlabel="step", ylabel=loss)
    draw.set_title(ax, title)
    ax.grid(alpha=0.3)
    ax.figure.legend(handles=lines, loc="outside lower center", ncols=2)  # no line of either axis is below it
    return ax.figure


def left_in(folder: Path) -> str:
    """What a run has left."""
    return f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if not path.name.startswith('.')))}"
