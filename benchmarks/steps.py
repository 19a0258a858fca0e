"""Training steps of a GPT and of a ViT, on dense and on sparse graphs: python -m benchmarks.steps

Whole steps: forward, backward, AdamW. Three of each model and size, with the same parameters: every pair in question
is an edge (causal; all patches), on PyTorch's flash kernels; a sparse graph, by attngraph; and the same sparse graph as
a mask for scaled_dot_product_attention, built once, which is how it is written without attngraph.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import attngraph
from attngraph import Causal, Full, Graph, Neighborhood, Prefix, Window
from attngraph.models import GPT, ViT
from attngraph.nn import TransformerConfig
from benchmarks.measure import RESULTS, cost, in_turn, isolated, quartiles, record, spread

NAME = "steps"
CONTESTANTS = ("dense graph", "sparse graph", "sparse graph as a mask")
SIZES = {"GPT": (256, 1024, 4096), "ViT": (256, 1024, 4096)}  # tokens; patches


def gpt_graphs(n: int) -> tuple[Graph, Graph]:
    return Causal(), Causal() & (Window(64, 0) | Prefix(4))


def vit_graphs(n: int) -> tuple[Graph, Graph]:
    return Full(), Neighborhood((math.isqrt(n),) * 2, 3)


GRAPHS = {"GPT": gpt_graphs, "ViT": vit_graphs}


def model_of(kind: str, n: int, graph: Graph) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of four layers, 128 wide, an input of n tokens or patches, and what is to be predicted."""
    torch.manual_seed(0)
    config = TransformerConfig(embed_dim=128, num_layers=4, num_heads=4, position="rotary")
    if kind == "GPT":
        tokens = torch.randint(65, (1, n + 1))
        return GPT(config, vocab_size=65, graph=graph), tokens[:, :-1], tokens[0, 1:]
    side = math.isqrt(n)
    config = TransformerConfig(embed_dim=128, num_layers=4, num_heads=4, max_length=n + 1)
    model = ViT(config, 10, image_size=4 * side, patch_size=4, graph=graph)
    return model, torch.randn(1, 3, 4 * side, 4 * side), torch.randint(10, (1,))


def contestants(kind: str, n: int, device: str, names: tuple[str, ...] = CONTESTANTS) -> dict[str, Callable[[], float]]:
    """A training step of each, which returns its loss."""
    dense, sparse = GRAPHS[kind](n)
    steps = {}
    for name in names:
        model, inputs, targets = model_of(kind, n, dense if name == CONTESTANTS[0] else sparse)
        model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model=model, inputs=inputs, targets=targets, optimizer=optimizer) -> float:
            with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
                loss = cross_entropy(model(inputs).flatten(0, -2), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        steps[name] = masked(step, model, n + (kind == "ViT"), device) if name == CONTESTANTS[2] else step
    return steps


def masked(step: Callable[[], float], model: nn.Module, n: int, device: str) -> Callable[[], float]:
    """The same step where attention is PyTorch's, with the graph as a mask."""
    mask = model.transformer.graphs[0].mask(n, n, device)

    def attention(q, k, v, graph, *, bias, scale, dropout_p):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def other() -> float:
        with patch.object(attngraph.nn.attention, "attend", attention):
            return step()

    return other


def alone(progress, kind: str, n: int, options) -> dict:
    """Times of each contestant in turn, and the memory of a step."""
    progress({}, 300.0)
    steps = contestants(kind, n, options.device)
    losses = {name: step() for name, step in steps.items()}
    if abs(losses[CONTESTANTS[1]] - losses[CONTESTANTS[2]]) > 1e-2:
        raise ValueError(f"the two sparse models must have the same loss (got {losses})")
    progress({}, 3600.0)
    memory = {name: cost(step)[1] for name, step in steps.items()}
    times = in_turn(steps, options.repeats, options.limit)
    ms = {name: quartiles([1000 * value for value in each]) for name, each in times.items()}
    over = {name: quartiles([a / b for a, b in zip(times[name], times[CONTESTANTS[1]], strict=False)]) for name in ms}
    dense, sparse = GRAPHS[kind](n)
    edges = {"dense": dense.num_edges(n, n), "sparse": sparse.num_edges(n, n)}
    return {"kind": kind, "n": n, "graphs": [str(dense), str(sparse)], "edges": edges, "ms": ms,
            "over_sparse": over, "extra_mib": memory, "turns": min(map(len, times.values()))}  # fmt: skip


def run(options: argparse.Namespace) -> Path:
    path = options.out / f"{NAME}.json"
    for kind, sizes in SIZES.items():
        for n in sizes:
            if time.monotonic() > options.until:
                break
            found = isolated(alone, kind, n, options, seconds=300.0, gib=options.memory)
            path = record(NAME, {f"{kind}, {n}": {"kind": kind, "n": n, **found}}, options.out, options.device)
            told = (f"{name} {spread(ms, 1)} ms" for name, ms in found.get("ms", {}).items())
            print(f"{kind} step, {n} nodes: {found.get('failure') or ', '.join(told)}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--limit", type=float, default=3.0, help="about so many seconds for all turns of each")
    parser.add_argument("--memory", type=float, default=18.0, help="GiB of resident memory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    options.until = math.inf
    print(f"recorded in {run(options)}")


if __name__ == "__main__":
    main()
