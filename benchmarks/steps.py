"""Training steps of a GPT and of a ViT, on dense and on sparse graphs: python -m benchmarks.steps

Whole steps: forward, backward, AdamW. Three of each model and size, with the same parameters: every pair in question
is an edge (causal; all patches), on PyTorch's flash kernels; a sparse graph, by attngraph; and the same sparse graph as
a mask for scaled_dot_product_attention, built once, which is how it is written without attngraph.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import groupby
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import attngraph
from attngraph import Causal, Full, Graph, Neighborhood, Prefix, Window
from attngraph.models import GPT, ViT
from attngraph.nn import TransformerConfig
from benchmarks import pictures
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import Progress, cost, in_turn, isolated, milliseconds, now, ratios
from benchmarks.page import Keep, folded, number, picture, prose, spread, table

NAME = "steps"
CONTESTANTS = ("dense graph", "sparse graph", "sparse graph as a mask")
SIZES = {"GPT": (256, 1024, 4096), "ViT": (256, 1024, 4096)}  # tokens; patches


# Of each kind, by number of nodes: the graph of all pairs, and the sparse one.
GRAPHS: dict[str, Callable[[int], tuple[Graph, Graph]]] = {
    "GPT": lambda n: (Causal(), Causal() & (Window(64, 0) | Prefix(4))),
    "ViT": lambda n: (Full(), Neighborhood((math.isqrt(n),) * 2, 3)),
}


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
        step = training_step(model, inputs, targets, device)
        if name == CONTESTANTS[2]:
            step = on_other_attention(step, as_mask(model, n + (kind == "ViT"), device))
        steps[name] = step
    return steps


def training_step(model: nn.Module, inputs: Tensor, targets: Tensor, device: str) -> Callable[[], float]:
    """Forward, backward, AdamW; in bfloat16 on a GPU. Gives the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def as_mask(model: nn.Module, n: int, device: str) -> Callable[..., Tensor]:
    """PyTorch's attention in the place of `attend`, with the model's graph as a mask."""
    mask = model.transformer.graphs[0].mask(n, n, device)

    def attention(q, k, v, graph, *, bias, attention_mask, scale, normalize, dropout_p, return_weights):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    return attention


def on_other_attention(step: Callable[[], float], attention: Callable[..., Tensor]) -> Callable[[], float]:
    """The same step with `attend` replaced within the layers."""

    def other() -> float:
        with patch.object(attngraph.nn.attention, "attend", attention):
            return step()

    return other


def alone(progress: Progress, kind: str, n: int, options: Namespace) -> dict:
    """Times of each contestant in turn, and the memory of a step."""
    progress({}, 300.0)
    steps = contestants(kind, n, options.device)
    losses = {name: step() for name, step in steps.items()}
    if abs(losses[CONTESTANTS[1]] - losses[CONTESTANTS[2]]) > 1e-2:
        raise ValueError(f"the two sparse models must have the same loss (got {losses})")
    progress({}, 3600.0)
    memory = {name: cost(step)[1] for name, step in steps.items()}
    times = in_turn(steps, options.repeats, seconds=options.limit)
    dense, sparse = GRAPHS[kind](n)
    return {
        "graphs": [str(dense), str(sparse)],
        "edges": {"dense": dense.num_edges(n, n), "sparse": sparse.num_edges(n, n)},
        "ms": {name: milliseconds(each) for name, each in times.items()},
        "over_sparse": {name: ratios(each, times[CONTESTANTS[1]]) for name, each in times.items()},
        "extra_mib": memory,
        "turns": min(map(len, times.values())),
    }


def run(options: Namespace) -> Iterator[Figures]:
    for kind, sizes in SIZES.items():
        for n in sizes:
            if now() > options.until:
                break
            found = isolated(alone, kind, n, options, seconds=300.0, gib=options.memory)
            yield {f"{kind}, {n}": {"kind": kind, "n": n, **found}}


def render(records: Records, keep: Keep) -> Iterator[str]:
    """Whole training steps."""
    found = list(records[NAME].values())
    done = [each for each in found if "ms" in each]
    if not done:
        return
    yield from ["## A training step", ""]
    yield from prose(f"""
        Forward, backward and AdamW of four layers, 128 wide, four heads, batch 1. Dense graphs are PyTorch's own flash
        kernels; the sparse ones are `{done[0]["graphs"][1]}` for the GPT and `Neighborhood(…, 3)` with a CLS node for
        the ViT.
    """)
    by_kind = {kind: list(each) for kind, each in groupby(done, key=lambda each: each["kind"])}
    yield from picture(keep, NAME, pictures.steps(by_kind), "a whole training step, by the number of nodes")
    rows = []
    for each in found:
        for name in CONTESTANTS:
            row = [each["kind"], f"{each['n']:,}", name]
            if "failure" in each:
                rows.append([*row, each["failure"], "", ""])
                continue
            ratio, mib = spread(each["over_sparse"][name], 2), number(each["extra_mib"][name])
            rows.append([*row, spread(each["ms"][name], 1), ratio, mib])
    head = ["", "nodes", "", "ms (quartiles)", "over the sparse graph's", "MiB"]
    yield from folded("every figure", table(head, rows))


OPTIONS: dict[str, dict] = {"repeats": {"default": 9}, "limit": {"default": 3.0}, "memory": {}, "device": {}}
EXPERIMENT = Experiment(NAME, __doc__, run, render, OPTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()
