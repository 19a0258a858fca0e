"""Learn to learn: a Transformer that regresses in context, beside the best there is, and beside gradient descent.

    python examples/incontext.py                                   two minutes
    python examples/incontext.py --graph "Causal() & Window(1, 0)" --name near      pairs beyond the last are not heard
    python examples/incontext.py --quick                           seconds; it is on its way

Each problem is a line of its own, y = w·x + noise, and a model sees pairs (x, y) one after the other (Garg et al.
2022). Node i holds the pair that has just become known and the next x, whose y it is asked for; it hears the nodes
before it, `Causal()`. What it learns over many problems is how to learn from the pairs of one: no weight changes any
more while it reads. With Gaussian w and noise, nothing can do better than ridge regression.

Everything is left in runs/NAME: config.json, metrics.csv, error.png, the error against the number of pairs seen,
training.png, connectivity.png, outcome.json and the model, model.safetensors and optimizer-STEP.safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import command_line
import gradient_descent
import optimization
import reporting
import torch
import training
from torch import Tensor, nn

from attngraph import Prefix, draw
from attngraph.nn import Transformer, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    quick = {"steps": 200, "batch": 128, "problems": 1000}
    parser = command_line.parser_of(
        __doc__, free=("against",), name="incontext", quick=quick, batch=256, steps=1000, evaluate_every=250,
        optimizer="adamw", lr=0.003, warmup=50, dtype="float32",
    )  # fmt: skip
    add = parser.add_argument
    add("--graph", default="Causal()", help="who hears whom; one for each layer, separated by commas")
    add("--against", nargs="*", default=[], help="train the same on these graphs too, and compare")
    add("--layers", type=int, default=4, help="of the Transformer, and steps of gradient descent")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    add("--normalize", default="softmax", choices=["softmax", "none"], help="how scores become weights")
    add("--features", type=int, default=3, help="numbers in each x")
    add("--pairs", type=int, default=7, help="of x and y, in each problem")
    add("--noise", type=float, default=0.5, help="standard deviation of what is added to each y")
    add("--problems", type=int, default=4000, help="that are tested")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, layers=1, heads=1, width=1, features=1, pairs=2, noise=0, problems=1)
    command_line.require_heads(given, parser)
    size = given.pairs, given.pairs
    command_line.require_graphs(
        given, parser, lambda text: command_line.layer_graphs(text, given.layers, size, given.heads)
    )
    command_line.require_causal(given, parser, given.pairs, "what is asked: y")
    return given


def problems(count: int, args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """x (B, pairs, features) and y (B, pairs), with a w of each problem's own."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, args.features, 1, generator=generator)
    x = torch.randn(count, args.pairs, args.features, generator=generator)
    noise = torch.randn(count, args.pairs, generator=generator)
    return x, (x @ weights)[..., 0] + args.noise * noise


# ------------------------------------------------------------------------------------------------------------- model


class InContext(nn.Module):
    """What the y of each x is, by the pairs before it."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        config = TransformerConfig(
            embed_dim=args.width, num_layers=args.layers, num_heads=args.heads, normalize=args.normalize,
            position="none", dropout=args.dropout, init="zero",
        )  # fmt: skip
        size = args.pairs, args.pairs
        self.read = nn.Linear(2 * args.features + 1, args.width)
        self.transformer = Transformer(config, command_line.layer_graphs(args.graph, args.layers, size))
        self.head = nn.Linear(args.width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, n, features), (B, n) → (B, n): of the i-th x, from the pairs before it; the first have none, but 0."""
        pairs = torch.cat([x, y[..., None]], -1)[:, :-1]
        before = torch.cat([torch.zeros_like(pairs[:, :1]), pairs], 1)
        return self.head(self.transformer(self.read(torch.cat([x, before], -1))))[..., 0]


# ------------------------------------------------------------------------------------------------ what it is held to


def by_regression(x: Tensor, y: Tensor, penalty: float, last: int | None = None) -> Tensor:
    """What ridge regression on the pairs before each x says, or on so many of the last of them: (B, n)."""
    x, y = x.double(), y.double()[..., None]
    said = [torch.zeros_like(y[:, 0])]
    for seen in range(1, x.shape[1]):
        first = 0 if last is None else max(0, seen - last)
        weights = gradient_descent.ridge(x[:, first:seen], y[:, first:seen], penalty)
        said.append((x[:, seen : seen + 1] @ weights)[:, 0])
    return torch.cat(said, 1)


def by_descent(x: Tensor, y: Tensor, steps: int, rates: Tensor) -> Tensor:
    """What so many steps of gradient descent on them say, as layers of attention on Prefix(pairs seen): (B, n)."""
    x, y = x.double(), y.double()[..., None]
    said = [torch.zeros_like(y[:, 0])]
    for seen in range(1, x.shape[1]):
        given = gradient_descent.Problems(x[:, :seen], y[:, :seen], x[:, seen : seen + 1], y[:, seen : seen + 1])
        model = gradient_descent.written_down(x.shape[2], 1, steps, float(rates[seen]) / seen, Prefix(seen))
        said.append(gradient_descent.by_attention(model, given)[1][-1, :, 0])
    return torch.cat(said, 1)


def best_rates(args: argparse.Namespace) -> Tensor:
    """For each number of pairs, the rate of gradient descent that leaves the smallest error on other problems."""
    x, y = problems(args.problems, args, training.TUNING_SEED)
    rates = torch.logspace(-2, 0.5, 26)
    errors = torch.stack([errors_of(by_descent(x, y, args.layers, rate.expand(args.pairs)), y) for rate in rates])
    return rates[errors.argmin(0)]


def errors_of(said: Tensor, y: Tensor) -> Tensor:
    """The mean squared error for each number of pairs seen, (n,)."""
    return (said.double() - y).square().mean(0)


# ---------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns its outcome, and the error over ridge regression's of all
    numbers of pairs and of the last.
    """
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    model = InContext(args).to(device)
    x, y = problems(args.problems, args, training.TEST_SEED)
    best = errors_of(by_regression(x, y, args.noise**2), y)
    print(f"problems  {args.pairs} pairs of {args.features} features, noise {args.noise:g}")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}")
    share = (best.mean() / best).float().to(device)  # of the loss: what can be known well counts as much as what can't

    def loss(number: int) -> Tensor:
        x, y = (part.to(device) for part in problems(args.batch, args, training.batch_seed(args, number)))
        return ((model(x, y).float() - y).square() * share).mean()

    def errors() -> Tensor:
        parts = zip(x.split(500), y.split(500), strict=True)
        return errors_of(torch.cat([model(*(side.to(device) for side in part)).float().cpu() for part in parts]), y)

    task = training.Task(
        model,
        loss,
        lambda: float(errors().mean() / best.mean()),
        device,
        identity={},
        record={"example": "incontext"},
        unit="problems",
        per_batch=args.batch,
        score="error_over_ridge",
        free=(*command_line.FREE, "against"),
    )
    with checkpoints.only_run(args):
        _, metrics = training.fit(args, task)
        model.eval()
        with torch.no_grad():
            found = errors()
        outcome = report(args, model, found, best, metrics)
    return {"outcome": outcome, "overall": outcome.figure, "last": float(found[-1] / best[-1])}


def report(
    args: argparse.Namespace, model: InContext, found: Tensor, best: Tensor, metrics: training.Metrics
) -> reporting.Outcome:
    """Pictures, and the figure beside those of other methods."""
    folder = Path(args.runs) / args.name
    x, y = problems(args.problems, args, training.TEST_SEED)
    others = {
        "ridge regression, the best there is": best,
        f"{args.layers} steps of gradient descent": errors_of(by_descent(x, y, args.layers, best_rates(args)), y),
        "the last pair alone: Identity() at best": errors_of(by_regression(x, y, args.noise**2, 1), y),
        "least squares": errors_of(by_regression(x, y, 0.0), y),
    }
    reporting.save_picture(error_curve(args, found, others), folder / "error.png")
    reporting.save_picture(
        reporting.loss_curve(metrics, f"regression in context, {args.graph}", "loss", "error over ridge regression's"),
        folder / "training.png",
    )
    graphs = model.transformer.graphs
    reporting.save_connectivity(graphs, args.pairs, folder / "connectivity.png")
    for name, errors in {"pairs seen": torch.arange(args.pairs), f"{args.graph}, trained": found, **others}.items():
        print(f"{name:40}" + "".join(f"{float(each):9.3g}" for each in errors))
    edges = reporting.edges_of(graphs, args.pairs)
    others.pop("least squares")  # of as many pairs as features, its mean error has no bound
    return reporting.Outcome(
        "error over ridge regression's", float(found.mean() / best.mean()),
        {name: float(each.mean() / best.mean()) for name, each in others.items()},
        args.graph, edges, metrics.seconds, "error.png", True,
    )  # fmt: skip


def error_curve(args: argparse.Namespace, found: Tensor, others: Mapping[str, Tensor]) -> Figure:
    """The error against the number of pairs seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for (name, errors), style in zip(others.items(), ("k-", "k--", "k-.", "k:"), strict=True):
        ax.plot(errors, style, lw=1.2, label=name)
    ax.plot(found, "o-", color=draw.BLUE, label=f"{args.layers} layers on {args.graph}, trained")
    ax.axhline(args.noise**2, color="#9ca3af", lw=0.8, label="the noise alone")
    most = 1.3 * float(found.max())  # that of least squares, of as many pairs as features, has no bound
    ax.set(xlabel="pairs seen", ylabel="mean squared error of the next y", ylim=(0, most), xticks=range(args.pairs))
    draw.set_title(ax, f"regression in context, {args.features} features, noise {args.noise:g}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def main(args: argparse.Namespace) -> dict:
    """On this graph, and on those that it is to be compared with."""
    found, others = train(args), reporting.beside(args, train)
    beside = {f"trained on {graph}": each["overall"] for graph, each in others.items()}
    outcome, folder = found["outcome"], Path(args.runs) / args.name
    told = reporting.tell(folder, outcome._replace(baselines={**outcome.baselines, **beside}))
    print(f"at the last pair {found['last']:.3f}")
    return {**told, "last": found["last"]}


if __name__ == "__main__":
    main(settings())
