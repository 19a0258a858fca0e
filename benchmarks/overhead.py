"""What `attend` costs over bare scaled_dot_product_attention, where it calls just that: Causal and Full.

    python -m benchmarks.overhead                   recorded in results/overhead.json
    python -m benchmarks.overhead --out runs/after; python -m benchmarks.overhead --out runs/after --compare BEFORE.json

Batch 1, 8 heads of dimension 64, from 64 to 1024 nodes; pairs of calls in turn, of small sizes proportionally more. The
goal is at most 1.02 times its time at N = 1024.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch.nn.functional import scaled_dot_product_attention

from attngraph import Causal, Full, attend
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import paired
from benchmarks.page import Keep, spread, table
from benchmarks.peers import PHASES, call_of

NAME = "overhead"
GRAPHS = (Causal(), Full())
SIZES = (64, 128, 256, 512, 1024)
HEADS, DIM = 8, 64


def run(options: Namespace) -> Iterator[Figures]:
    torch.manual_seed(0)
    for graph, n in product(GRAPHS, options.n or SIZES):
        sides = [torch.randn(1, HEADS, n, DIM, requires_grad=at < 3) for at in range(4)]
        for phase in PHASES:
            ours = call_of(phase, partial(attend, graph=graph), sides)
            theirs = call_of(phase, partial(scaled_dot_product_attention, is_causal=graph == Causal()), sides)
            for mine, right in zip(ours(), theirs(), strict=True):
                torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)
            repeats = options.repeats * max(1, max(SIZES) // n)
            sizes = {"graph": str(graph), "n": n, "phase": phase, "heads": HEADS, "dim": DIM}
            yield {f"{graph}, N = {n}, {phase}": {**sizes, **paired(ours, theirs, repeats, warmup=10)}}


def render(records: Records, keep: Keep) -> Iterator[str]:
    found: dict[tuple[str, int], dict[str, str]] = {}
    for figures in records[NAME].values():
        found.setdefault((figures["graph"], figures["n"]), {})[figures["phase"]] = spread(figures["ratio"])
    yield from ["## Beside bare SDPA", ""]
    yield from ["`python -m benchmarks.overhead`, H = 8, D = 64: the time of `attend` over that of bare SDPA", ""]
    rows = [[f"`{graph}`, N = {n}", *map(each.get, PHASES)] for (graph, n), each in sorted(found.items())]
    yield from table(["", *PHASES], rows)


OPTIONS: dict[str, dict] = {
    "repeats": {"default": 60, "help": "pairs of calls at N = 1024; at N = 64 sixteen times as many"},
    "n": {"type": int, "nargs": "+", "help": f"numbers of nodes; by default {SIZES}"},
}
EXPERIMENT = Experiment(NAME, __doc__, run, render, OPTIONS, headline="ratio")

if __name__ == "__main__":
    EXPERIMENT.main()
