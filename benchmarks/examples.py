"""What the examples reach with their own settings: python -m benchmarks.examples, a quarter of an hour on two cores.

Nothing else should run beside it.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator

import bert
import decisions
import diffusion
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


def shortest_paths(options: Namespace) -> Iterator[Goal]:
    """`decisions.py`: asked for the best that the data have, and what is reached."""
    found = []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"decisions-{seed}", "--seed", str(seed)]
        found.append(decisions.main(decisions.settings(given)))
    worst = min(each["figure"] for each in found)
    note = ", ".join(f"{each['figure']:.1f}" for each in found)
    text = "decisions.py, 30 places, 1,000 walks: % of paths that are shortest, the worst of three seeds"
    yield Goal(text, 95, worst, note=note)
    yield Goal(
        "decisions.py: paths that fail, of all three seeds", 0, sum(each["failed"] for each in found), at_most=True
    )
    beside = statistics.mean(each["baselines"][decisions.UNHEARD] for each in found)
    text = "decisions.py: the same without returns, mean of three seeds"
    steps = [each["steps"] for each in found]
    note = ", ".join(f"{each[decisions.UNHEARD]:.1f} steps, and {each['Causal()']:.2f} with returns" for each in steps)
    yield Goal(text, 50, beside, at_most=True, note=note)
    yield Goal(
        "decisions.py: seconds of training, the slowest of three", 180, max(each["seconds"] for each in found),
        at_most=True,
    )  # fmt: skip
    ratios, notes = [], []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"map-{seed}", "--seed", str(seed), "--against", ""]
        steps = decisions.main(decisions.settings([*given, "--nodes", "60", "--walks", "300"]))["steps"]
        data = steps["asked for, the best in the data"]
        ratios.append(steps["Causal()"] / data)
        notes.append(f"{steps['Causal()']:.2f} of {data:.2f}, shortest {steps['shortest']:.2f}")
    text = "decisions.py, 60 places, 300 walks: mean steps over those of the best in the data from each start"
    yield Goal(text, 1, max(ratios), at_most=True, note="; ".join(notes))


def drafted(options: Namespace) -> Iterator[Goal]:
    """`diffusion.py`, and bert.py, which learns to fill one share of holes alone."""
    found = []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"diffusion-{seed}", "--seed", str(seed)]
        found.append(diffusion.main(diffusion.settings(given)))
    worst = max(each["figure"] for each in found)
    note = ", ".join(f"{each['figure']:.3f}, left to right {min(each['baselines'].values()):.3f}" for each in found)
    text = "diffusion.py: bits a character at most, Full(), the worst of three seeds"
    yield Goal(text, 2.9, worst, at_most=True, note=note)
    seconds = max(each["seconds"] for each in found)
    yield Goal("diffusion.py: seconds of training, the slowest of three", 180, seconds, at_most=True)
    given = ["--runs", options.runs, "--name", "bert-beside", "--against", ""]
    alone = bert.main(bert.settings(given))["validation_accuracy"]
    fills = [each["filled"][0.15] for each in found]
    text = "diffusion.py: % right of 15% masked, points below bert.py, the worst of three seeds"
    yield Goal(
        text, 3, alone - min(fills), at_most=True, note=f"{', '.join(f'{each:.1f}' for each in fills)}; {alone:.1f}"
    )


SECTIONS = {
    "exact": exact,
    "digits": digits,
    "dates": dates,
    "masked": masked,
    "decisions": shortest_paths,
    "diffusion": drafted,
}


def run(options: Namespace) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory() as options.runs:
        yield from run_sections(SECTIONS, options)


EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run)

if __name__ == "__main__":
    EXPERIMENT.main()
