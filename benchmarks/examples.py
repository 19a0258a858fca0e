"""What the examples reach with their own settings: python -m benchmarks.examples, a quarter of an hour on two cores.

Nothing else should run beside it.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator

import bert
import mlp_is_attention
import torch
import translate
import vit
from torch import nn

from benchmarks.experiment import Figures, Goal, goals_experiment, run_sections
from benchmarks.measure import seconds_of

NAME = "examples"
SEEDS = (1, 2, 3)


def digits(options: Namespace) -> Iterator[Goal]:
    """`vit.py` on digits, with all patches and with those beside each other."""
    reached: dict[str, float] = {}
    for graph in ("Full()", "Neighborhood((4, 4), 1)"):
        found, seconds = [], []
        for seed in SEEDS:
            given = ["--runs", options.runs, "--name", f"vit-{seed}", "--graph", graph, "--seed", str(seed)]
            seconds.append(seconds_of(lambda given=given, found=found: found.append(vit.train(vit.settings(given)))))
        reached[graph] = statistics.mean(each["test_accuracy"] for each in found)
        wanted = 99.2 if graph == "Full()" else reached["Full()"] - 0.3
        text = f"vit.py, digits, {graph} and CLS, {found[0]['edges']:,} edges: % right, mean of three seeds"
        note = ", ".join(f"{each['test_accuracy']:.2f}" for each in found)
        yield Goal(text, wanted, reached[graph], note=note)
        if graph == "Full()":
            yield Goal("vit.py, digits: seconds, the slowest of three", 90, max(seconds), at_most=True)


def dates(options: Namespace) -> Iterator[Goal]:
    found = translate.train(translate.settings(["--runs", options.runs]))
    yield Goal("translate.py: % of 2,000 unseen dates exactly right", 99.5, found["exact_match"])
    yield Goal("translate.py: seconds of training", 180, found["seconds"], at_most=True)


def masked(options: Namespace) -> Iterator[Goal]:
    found = bert.main(bert.settings(["--runs", options.runs]))
    right, causal = found["validation_accuracy"], found["against"]
    text = "bert.py: masked characters right under Full() and under Causal(), points between them"
    yield Goal(text, 8, right - causal, note=f"{right:.1f}% and {causal:.1f}%")


def exact(options: Namespace) -> Iterator[Goal]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(20, 80), nn.GELU(), nn.Linear(80, 40), nn.Tanh(), nn.Linear(40, 20)).double()
    worst = max(mlp_is_attention.largest_difference(mlp, torch.randn(100, 20, dtype=torch.float64)))
    yield Goal("mlp_is_attention.py: largest difference of outputs and gradients", 1e-12, worst, at_most=True)


SECTIONS = {"exact": exact, "digits": digits, "dates": dates, "masked": masked}


def run(options: Namespace) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory() as options.runs:
        yield from run_sections(SECTIONS, options)


EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run)

if __name__ == "__main__":
    EXPERIMENT.main()
