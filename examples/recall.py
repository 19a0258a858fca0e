"""Recall values by their keys: who is heard in the second layer is computed from the data, by its own scores.

    python examples/recall.py                         TopK(8), and beside it a window, random edges, the whole past
    python examples/recall.py --graph "BlockTopK(2, 4)" --against           pairs of tokens, nothing beside them
    python examples/recall.py --quick                                       fewer pairs, seconds

A text tells pairs of a key and a value, and then asks for the values of keys (multi-query associative recall, Arora et
al. 2024). In the first layer each token hears the one before, which tells each value its key. In the second, --graph
says who is heard: a few of the past are enough if the queries and keys of the layer choose them, and no few that are
known before will do. Everything is left in runs/NAME: config.json, metrics.csv, accuracy.png, connectivity.png,
edges.png, the edges chosen for one text, outcome.json, and for --resume the model; what other graphs led to is in
runs/NAME-against-1, ….
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import command_line
import optimization
import reporting
import torch
import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attngraph import Causal, EdgeList, Graph, Window, draw, record
from attngraph.nn import Transformer, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMBOLS = 64  # keys, and as many values
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+*"


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    quick = {"pairs": 12, "steps": 300, "evaluate_every": 60, "against": ["Causal() & Window(7, 0)"]}
    parser = command_line.parser_of(
        __doc__, free=("against",), quick=quick, name="recall", batch=32, steps=400, evaluate_every=100,
        optimizer="adamw", lr=0.003, dtype="float32",
    )  # fmt: skip
    add = parser.add_argument
    add("--graph", default="TopK(8) & Causal()", help="who hears whom in the second layer")  # the one line
    fixed = ["Causal() & Window(7, 0)", "Causal() & Random(16)", "Causal()"]
    add("--against", nargs="*", default=fixed, help="train the same on these graphs too, and compare")
    add("--pairs", type=int, default=32, help="of a key and a value, after which as many keys are asked")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, pairs=1, width=2)
    if given.pairs > SYMBOLS:
        parser.error(f"--pairs must be {SYMBOLS} or less, the number of keys (got {given.pairs})")
    if given.width % 2:
        parser.error(f"--width must be even (got {given.width})")
    command_line.require_graphs(given, parser, lambda text: command_line.layer_graphs(text, 1, heads=1))
    return given


def texts(count: int, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, 3 · pairs), a value being SYMBOLS more than its number; the values (B, pairs) of the last `pairs`."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, SYMBOLS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(SYMBOLS, (count, pairs), generator=generator)
    which = torch.randint(pairs, (count, pairs), generator=generator)
    told = torch.stack([keys, SYMBOLS + values], 2).flatten(1)
    return torch.cat([told, keys.gather(1, which)], 1), values.gather(1, which)


class Recall(nn.Module):
    """Tokens (B, N) → a logit of each value for each key that is asked, (B, N / 3, SYMBOLS)."""

    def __init__(self, width: int, graph: Graph):
        super().__init__()
        config = TransformerConfig(embed_dim=width, num_layers=1, num_heads=1, position="rotary", norm="rms", bias=())
        self.embed, self.head = nn.Embedding(2 * SYMBOLS, width), nn.Linear(width, SYMBOLS)
        self.first = Transformer(config, Causal() & Window(1, 0))
        self.second = Transformer(replace(config, position="none"), graph)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(self.first(self.embed(tokens)))
        return self.head(x[:, tokens.shape[1] * 2 // 3 :])


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    graph = command_line.layer_graphs(args.graph, 1)
    assert isinstance(graph, Graph)
    model = Recall(args.width, graph).to(device)
    edges = reporting.edges_of([*model.first.graphs, *model.second.graphs], 3 * args.pairs)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}, {edges:,} edges")

    def loss(number: int) -> Tensor:
        """Of texts that grow for the first half of the training."""
        step = number // args.accumulate
        pairs = min(args.pairs, 4 + 2 * args.pairs * step // args.steps)
        tokens, values = texts(args.batch, pairs, training.batch_seed(args, number))
        return cross_entropy(model(tokens.to(device)).float().flatten(0, 1), values.to(device).flatten())

    def right() -> float:
        tokens, values = texts(256, args.pairs, training.TEST_SEED)
        return 100 * (model(tokens.to(device)).argmax(-1).cpu() == values).float().mean().item()

    task = training.Task(
        model,
        loss,
        right,
        device,
        identity={},
        record={"example": "recall", "edges": edges},
        unit="texts",
        per_batch=args.batch,
        score="right",
        free=(*command_line.FREE, "against"),
    )
    with checkpoints.only_run(args):
        score, metrics = training.fit(args, task)
        print(f"{score:.1f}% of the values of unseen texts right, after {metrics.seconds:.0f} s")
        folder = Path(args.runs) / args.name
        curve = reporting.loss_curve(metrics, f"values recalled, {args.graph}", "loss [nats a value]", "right [%]")
        reporting.save_picture(curve, folder / "accuracy.png")
        graphs = [*model.first.graphs, *model.second.graphs]
        reporting.save_connectivity(graphs, 3 * args.pairs, folder / "connectivity.png")
        reporting.save_picture(edges_drawn(model.eval(), args, device), folder / "edges.png")
    return {"right": score, "edges": edges, "seconds": metrics.seconds}


@torch.no_grad()
def edges_drawn(model: Recall, args: argparse.Namespace, device: torch.device) -> Figure:
    """Whom each key that is asked hears in the second layer, of an unseen text; where its value stands is marked."""
    from matplotlib.figure import Figure

    tokens, _ = texts(1, args.pairs, training.TEST_SEED)
    with record(model, layers=["second.layers.0.attention"]) as recorded:
        model(tokens.to(device))
    heard, told, nodes = recorded["second.layers.0.attention"], 2 * args.pairs, tokens.shape[1]
    key, query = heard.graph.edge_index(nodes, nodes)
    asked = (query >= told).nonzero()[:, 0]
    graph = EdgeList(torch.stack([key[asked], query[asked] - told]), (nodes - told, nodes))
    names = [NAMES[token] if token < SYMBOLS else f"={NAMES[token - SYMBOLS]}" for token in tokens[0].tolist()]
    title = f"whom each key that is asked hears under {args.graph}; ○: its value"
    ax = Figure(figsize=(0.14 * nodes + 1.5, 0.14 * args.pairs + 1.5), layout="constrained").subplots()
    draw.attention(heard.weights[0, 0, asked].cpu(), graph, labels=names[told:], key_labels=names, ax=ax, title=title)
    place = (tokens[0, told:, None] == tokens[0, :told:2]).nonzero()
    ax.plot(2 * place[:, 1] + 1, place[:, 0], "o", mfc="none", mec="#c2410c", ms=8)
    return ax.figure


def main(args: argparse.Namespace) -> dict:
    """The graph and those beside it, and how they compare."""
    found, others = train(args), reporting.beside(args, train)
    folder = Path(args.runs) / args.name
    told = reporting.tell(
        folder,
        reporting.Outcome(
            metric=f"values right of {args.pairs} [%]",
            figure=found["right"],
            baselines={f"{graph}, {each['edges']:,} edges": each["right"] for graph, each in others.items()},
            graph=args.graph,
            edges=found["edges"],
            seconds=found["seconds"],
            picture="edges.png",
        ),
    )
    return {**found, **told, "against": others}


if __name__ == "__main__":
    main(settings())
