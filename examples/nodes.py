"""Which community is a node of? A model of PyTorch Geometric, and the same model on this library's kernels.

    python examples/nodes.py                              TransformerConv, three seeds: about a minute on two cores
    python examples/nodes.py --layer GATv2Conv            or GATConv
    python examples/nodes.py --nodes 50000 --seeds 1      a larger graph

The graph is a stochastic block model: a third of a node's edges stay within its own community, the others lead
anywhere. A node's features are those of its community, hidden in noise; the mean of many neighbours tells more. Each
step trains on a half of the nodes, and the other half is the test. For each seed both models begin with the same
parameters: the second is a copy of the first, after one line, `attngraph.pyg.accelerate(model)`.

It prints the accuracy and the wall time of both, planning and evaluation included, and leaves nodes.png, the graph.
What Numba compiles once for a machine is told apart.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import command_line
import reporting
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv
from torch_geometric.utils import coalesce, remove_self_loops, to_undirected

from attngraph import cache, draw, from_edge_index
from attngraph.pyg import accelerate

LAYERS = {"TransformerConv": TransformerConv, "GATv2Conv": GATv2Conv, "GATConv": GATConv}


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=command_line.Help)
    add = parser.add_argument
    add("--layer", default="TransformerConv", choices=LAYERS, help="PyG's attention layer")
    add("--nodes", type=int, default=10_000, help="of the graph")
    add("--degree", type=int, default=30, help="neighbours of a node, about")
    add("--classes", type=int, default=10, help="communities, of the same size")
    add("--inside", type=float, default=0.3, help="share of the edges drawn within a community; others anywhere")
    add("--noise", type=float, default=5.0, help="of the features, beside 1 for what they tell")
    add("--width", type=int, default=128, help="features of a node within the model")
    add("--heads", type=int, default=4, help="of each layer")
    add("--epochs", type=int, default=10, help="steps of the optimiser: each has all nodes")
    add("--seeds", type=int, default=3, help="graphs and models to train")
    add("--out", type=Path, default=Path("runs/nodes"), help="where the picture goes")
    given = parser.parse_args(arguments)
    least = dict.fromkeys(("nodes", "degree", "classes", "width", "heads", "epochs", "seeds"), 1)
    command_line.require_at_least(given, parser, **least)
    command_line.require_heads(given, parser)
    return given


def block_model(args: argparse.Namespace) -> Data:
    """A stochastic block model with features; its edges are drawn one by one, as there are too many pairs."""
    y = torch.arange(args.nodes) * args.classes // args.nodes  # one community after the other
    source, anyone = torch.randint(args.nodes, (2, args.nodes * args.degree // 2))
    size = args.nodes // args.classes
    neighbor = (y[source] * size + torch.randint(size, source.shape)).clamp(max=args.nodes - 1)
    target = torch.where(torch.rand(source.shape) < args.inside, neighbor, anyone)
    edge_index = to_undirected(remove_self_loops(coalesce(torch.stack([source, target])))[0])
    x = torch.randn(args.classes, args.width)[y] / args.width**0.5
    x = x + args.noise * torch.randn_like(x) / args.width**0.5
    return Data(x=x, edge_index=edge_index, y=y, train_mask=torch.rand(args.nodes) < 0.5)


class Net(nn.Module):
    """Two layers of attention."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        layer, each = LAYERS[args.layer], args.width // args.heads
        self.first = layer(args.width, each, heads=args.heads)
        self.last = layer(args.width, args.classes, heads=args.heads, concat=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.last(self.first(x, edge_index).relu(), edge_index)


class Trained(NamedTuple):
    """What came of a model."""

    accuracy: float
    """On the nodes that it was not trained on, in percent."""
    seconds: float
    """Of all epochs and of the evaluation."""


def train(model: nn.Module, data: Data, epochs: int) -> Trained:
    """Train on all nodes at once, and test."""
    begin = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
    with torch.no_grad():
        right = model(data.x, data.edge_index).argmax(-1) == data.y
    return Trained(100 * right[~data.train_mask].float().mean().item(), time.perf_counter() - begin)


def main(args: argparse.Namespace) -> dict[str, list[Trained]]:
    """Train both models from the same parameters, for each seed; print how they compare."""
    found: dict[str, list[Trained]] = {"PyG": [], "attngraph": []}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        data, model = block_model(args), Net(args)
        other = copy.deepcopy(model)
        changed = accelerate(other)
        if not seed:
            print(f"{data.num_nodes:,} nodes, {data.num_edges:,} edges\n{changed}")
            print(f"kernels are loaded, or compiled: {train(copy.deepcopy(other), data, 1).seconds:.1f} s")
            cache.clear()  # what was planned of these edges
        for (name, results), each in zip(found.items(), (model, other), strict=True):
            results.append(train(each, data, args.epochs))
            print(f"seed {seed}  {name:9}  {results[-1].accuracy:5.1f}% right  {results[-1].seconds:6.1f} s")
    pyg, ours = ([mean(column) for column in zip(*results, strict=True)] for results in found.values())
    print(f"on average {pyg[0]:.1f}% and {ours[0]:.1f}% right, in {pyg[1]:.1f} and {ours[1]:.1f} s:", end=" ")
    print(f"{pyg[1] / ours[1]:.1f} times as fast")
    args.out.mkdir(parents=True, exist_ok=True)
    graph = from_edge_index(data.edge_index, num_nodes=data.num_nodes)
    reporting.save_picture(draw.connectivity(graph, title="communities, one after the other"), args.out / "nodes.png")
    print(reporting.left_in(args.out))
    return found


if __name__ == "__main__":
    main(settings())
