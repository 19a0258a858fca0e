"""Any MLP is attention: over keys that do not depend on the data, with an elementwise normaliser. Exactly.

    python examples/mlp_is_attention.py        how far the two are from each other, for three MLPs

A hidden unit is a key node. Its input weights are its key, its output weights are its value; a data point asks with
itself as the query, the score is the unit's pre-activation, and where softmax would stand is the activation:

    W₂ · activation(W₁ x + b₁)  =  Σ_j activation(k_j · q) v_j      k_j = (W₁[j], b₁[j]),  v_j = W₂[:, j],  q = (x, 1)

All data points hear all units: the graph is Full(). A pruned unit is a missing column of edges.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import reporting
import torch
from torch import Tensor, nn

from attngraph import Full, Graph, attend, draw


def as_attention(mlp: nn.Sequential, x: Tensor, graph: Graph = Full()) -> Tensor:  # noqa: B008  a graph is a value
    """What the MLP (Linear, activation, Linear, …, Linear) computes of x (N, in), by `attend` alone: (N, out).

    The graph says which hidden units, of every layer, a data point hears.
    """
    linear, activations = [layer for layer in mlp if isinstance(layer, nn.Linear)], list(mlp[1::2])
    if list(mlp[::2]) != linear or len(linear) < 2 or len(mlp) % 2 == 0:
        raise ValueError(f"as_attention takes Linear, activation, Linear, …, Linear (got {mlp})")
    keys, key_bias = linear[0].weight, linear[0].bias  # (hidden, in), (hidden,)
    for activation, values in zip(activations, linear[1:], strict=True):
        constant = keys.new_zeros(len(keys)) if key_bias is None else key_bias
        query = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)[None]  # (1, N, in + 1): one head
        key = torch.cat([keys, constant[:, None]], dim=1)[None]
        x = attend(query, key, values.weight.T[None], graph, scale=1.0, normalize=activation)[0]
        if values.bias is not None:
            x = x + values.bias
        keys, key_bias = torch.eye(len(values.weight), dtype=x.dtype, device=x.device), None  # x is the pre-activation
    return x


def largest_difference(mlp: nn.Sequential, x: Tensor) -> tuple[float, float]:
    """Between the MLP and its attention: of the outputs, and of the gradients of x and of every parameter."""
    results = []
    for run in (mlp, lambda x: as_attention(mlp, x)):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        results.append((out, torch.autograd.grad(out.square().sum(), [leaf, *mlp.parameters()])))
    (out, gradients), (expected, expected_gradients) = results
    of_gradients = max(float((a - b).abs().max()) for a, b in zip(gradients, expected_gradients, strict=True))
    return float((out - expected).detach().abs().max()), of_gradients


MLPS = {
    "GELU, one hidden layer": (20, nn.GELU(), 80, 20),
    "ReLU, three hidden layers": (20, nn.ReLU(), 50, 40, 30, 7),
    "tanh, two hidden layers": (20, nn.Tanh(), 50, 40, 7),
}


def main(args: argparse.Namespace) -> dict:
    """Three MLPs in float64; beside them, what softmax would make of the same keys and values."""
    folder, worst, other = args.runs / args.name, 0.0, 0.0
    torch.manual_seed(0)
    begin = time.perf_counter()
    for name, (first, activation, *rest) in MLPS.items():
        linear = [nn.Linear(*pair) for pair in pairwise([first, *rest])]
        layers = [each for layer in linear for each in (layer, activation)][:-1]
        mlp, x = nn.Sequential(*layers).double(), torch.randn(100, first, dtype=torch.float64)
        out, gradients = largest_difference(mlp, x)
        print(f"{name:32} outputs differ by {out:.1e}, gradients by {gradients:.1e}")
        worst = max(worst, out, gradients)
        with torch.no_grad():
            weights = nn.Sequential(*(nn.Softmax(1) if layer is activation else layer for layer in layers))
            other = max(other, float((weights(x) - mlp(x)).abs().max()))
    folder.mkdir(parents=True, exist_ok=True)
    picture = draw.connectivity(Full(), 10, 80, title="10 data points hear 80 hidden units")
    reporting.save_picture(picture, folder / "connectivity.png")
    others = {"softmax in the place of the activation": other}
    seconds = time.perf_counter() - begin
    metric = "largest difference from the MLP"
    return reporting.tell(
        folder, reporting.Outcome(metric, worst, others, "Full()", 100 * 80, seconds, "connectivity.png", True)
    )


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: %(default)s)")
    parser.add_argument("--name", default="mlp_is_attention", help="the run's folder below --runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(settings())
