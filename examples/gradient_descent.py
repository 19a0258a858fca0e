"""Layers of attention without a softmax are steps of gradient descent: exactly, and nothing is trained.

    python examples/gradient_descent.py                     50 layers beside 50 steps, in seconds
    python examples/gradient_descent.py --layers 200 --rate 0.1
    python examples/gradient_descent.py --graph "Full()"    questions that are heard too: no gradient descent any more

Linear regression in context (von Oswald et al. 2023): the nodes are n examples and some questions. A node holds its x,
and its residual: y less what is predicted so far, where the y of a question, which nobody knows, is taken for 0. In
each layer all nodes hear the examples, `Prefix(n)`, and the score is the weight (`normalize="none"`):

    residual_i ← residual_i - rate/n · Σ_j (x_i · x_j) residual_j

This is what a step of gradient descent on the examples' squared errors, W ← W + rate/n · Σ_j residual_j x_jᵀ, does to
every prediction W x_i. So the model is a `Transformer` whose weights can be written down, and its depth is an inner
loop. It leaves loss.png, the error after each layer and each step, connectivity.png and outcome.json in runs/NAME.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import checkpoints
import command_line
import reporting
import torch
from torch import Tensor

from attngraph import Graph, Prefix, draw, parse
from attngraph.nn import Transformer, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=command_line.Help, epilog=command_line.GRAPHS)
    add = parser.add_argument
    add("--graph", help="who hears whom; by default Prefix(--examples)")
    add("--against", nargs="*", default=["Full()"], help="other graphs, to compare; none after a bare --against")
    add("--layers", type=int, default=50, help="of attention, and steps of gradient descent")
    add("--rate", type=float, default=0.25, help="of gradient descent")
    add("--examples", type=int, default=20, help="pairs of x and y, with which each problem is given")
    add("--questions", type=int, default=10, help="x whose y is asked for")
    add("--features", type=int, default=8, help="numbers in each x")
    add("--outputs", type=int, default=2, help="numbers in each y")
    add("--noise", type=float, default=1.0, help="standard deviation of what is added to each y")
    add("--problems", type=int, default=200, help="over which errors are means")
    add("--seed", type=int, default=0, help="of the problems")
    add("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    add("--name", default="gradient_descent", help="the run's folder below --runs")
    add("--quick", action="store_true", help="20 problems")
    given = parser.parse_args(arguments)
    command_line.require_name(given, parser)
    given.problems = min(given.problems, 20) if given.quick else given.problems
    counts = ("layers", "examples", "questions", "features", "outputs", "problems")
    command_line.require_at_least(given, parser, **dict.fromkeys(counts, 1), rate=0, noise=0)
    given.graph = given.graph or str(Prefix(given.examples))
    nodes = given.examples + given.questions
    for text in (given.graph, *given.against):
        try:
            parse(text).mask(nodes, nodes)
        except ValueError as error:
            parser.error(f"--graph and --against must be graphs of {nodes} nodes (got {text}: {error})")
    return given


# ---------------------------------------------------------------------------------------------------------- problems


class Problems(NamedTuple):
    """y = W x + noise, with a W of each problem's own."""

    x: Tensor
    """Of the examples, (B, n, features)."""
    y: Tensor
    """(B, n, outputs)."""
    asked: Tensor
    """The x of the questions, (B, m, features)."""
    answers: Tensor
    """Their y, which no method is given, (B, m, outputs)."""


def problems(args: argparse.Namespace) -> Problems:
    """Gaussian numbers throughout: ridge regression with the noise's variance is the best there is."""
    generator = torch.Generator().manual_seed(args.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(args.problems, *shape, generator=generator, dtype=torch.float64)

    weights, x = normal(args.features, args.outputs), normal(args.examples + args.questions, args.features)
    y = x @ weights + args.noise * normal(args.examples + args.questions, args.outputs)
    return Problems(x[:, : args.examples], y[:, : args.examples], x[:, args.examples :], y[:, args.examples :])


# ----------------------------------------------------------------------------------------------------- the two loops


def written_down(
    features: int, outputs: int, layers: int, scale: float, graph: Graph, normalize: str = "none"
) -> Transformer:
    """The Transformer that descends: queries and keys are x, values are residuals, and nothing is computed between."""
    width = features + outputs
    config = TransformerConfig(
        embed_dim=width, num_layers=layers, num_heads=1, hidden_dim=1, norm="none", bias=(), scale=scale,
        normalize=normalize, position="none", init="zero",
    )  # fmt: skip
    model = Transformer(config, graph).double()
    of_x = torch.cat([torch.ones(features), torch.zeros(outputs)]).diag()
    of_residual = torch.eye(width) - of_x
    with torch.no_grad():
        for block in model.layers:
            attention = block.get_submodule("attention")
            for name, matrix in {"query": of_x, "key": of_x, "value": of_residual, "out": -of_residual}.items():
                attention.get_parameter(f"{name}.weight").copy_(matrix)
    return model


@torch.no_grad()
def by_attention(model: Transformer, given: Problems) -> tuple[Tensor, Tensor]:
    """What is predicted after each layer, from 0 on, of examples and of questions: (layers + 1, B, n or m, outputs)."""
    n, features = given.x.shape[1:]
    known = torch.cat([given.y, torch.zeros_like(given.answers)], 1)
    nodes = torch.cat([torch.cat([given.x, given.asked], 1), known], -1)
    after = [nodes]
    for block, graph in zip(model.layers, model.graphs, strict=True):
        after.append(block(after[-1], graph))
    predicted = known - torch.stack(after)[..., features:]
    return predicted[:, :, :n], predicted[:, :, n:]


def by_descent(given: Problems, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """The same of gradient descent from W = 0, its gradients found by autograd."""
    weights = torch.zeros(len(given.x), given.x.shape[2], given.y.shape[2], dtype=given.x.dtype, requires_grad=True)
    after = [weights.detach()]
    for _ in range(steps):
        loss = (given.x @ weights - given.y).square().sum() / (2 * given.x.shape[1])
        (gradient,) = torch.autograd.grad(loss, weights)
        weights = (weights - rate * gradient).detach().requires_grad_()
        after.append(weights.detach())
    each = torch.stack(after)
    return given.x @ each, given.asked @ each


def ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The W that minimises ‖x W - y‖² + penalty ‖W‖², (B, features, outputs); of penalty 0, the smallest such."""
    if not penalty:
        return torch.linalg.pinv(x) @ y
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype), x.mT @ y)


# ------------------------------------------------------------------------------------------------------------ report


def main(args: argparse.Namespace) -> dict:
    """Both loops, how far they are from each other, and what other graphs and the softmax make of the same weights."""
    folder, given = args.runs / args.name, problems(args)
    checkpoints.made(folder)
    nodes, graph = args.examples + args.questions, parse(args.graph)
    steps = by_descent(given, args.layers, args.rate)

    def layers(graph: Graph, normalize: str = "none") -> tuple[Tensor, Tensor]:
        shape = args.features, args.outputs, args.layers, args.rate / args.examples
        return by_attention(written_down(*shape, graph, normalize), given)

    def difference(found: tuple[Tensor, Tensor]) -> float:
        """The largest, of any prediction after any layer."""
        return max(float((one - other).abs().max()) for one, other in zip(found, steps, strict=True))

    begin = time.perf_counter()
    found = layers(graph)
    seconds = time.perf_counter() - begin
    others = {text: difference(layers(parse(text))) for text in args.against}
    others[f"{args.graph}, with a softmax"] = difference(layers(graph, "softmax"))
    reporting.save_picture(curves(args, given, found, steps), folder / "loss.png")
    reporting.save_picture(draw.connectivity(graph, nodes), folder / "connectivity.png")
    edges = args.layers * graph.num_edges(nodes, nodes)
    metric = "largest difference from descent"
    told = reporting.Outcome(metric, difference(found), others, args.graph, edges, seconds, "loss.png", True)
    return reporting.tell(folder, told)


def curves(
    args: argparse.Namespace, given: Problems, found: tuple[Tensor, Tensor], steps: tuple[Tensor, Tensor]
) -> Figure:
    """The error after each layer and after each step; beside them, that of solutions in closed form."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for colour, name, side, true in (
        (draw.BLUE, "examples", 0, given.y),
        ("#c2410c", "questions", 1, given.answers),
    ):
        of_layers, of_steps = ((each[side] - true).square().mean((1, 2, 3)) for each in (found, steps))
        ax.plot(of_steps, color=colour, lw=1.2, label=f"{name}, gradient descent")
        ax.plot(of_layers, "o", color=colour, ms=3.5, mfc="none", label=f"{name}, attention on {args.graph}")
    for style, name, penalty in (("--", "ridge regression", args.noise**2), (":", "least squares", 0.0)):
        errors = (given.asked @ ridge(given.x, given.y, penalty) - given.answers).square()
        ax.axhline(float(errors.mean()), color="#c2410c", ls=style, lw=1, label=f"questions, {name}")
    ax.set(xlabel="layers of attention, or steps of gradient descent", ylabel="mean squared error", yscale="log")
    draw.set_title(ax, f"{args.examples} examples of {args.features} features, rate {args.rate:g}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(settings())
