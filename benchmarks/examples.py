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
import molecules
import sensors
import speech
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


def gaps(options: Namespace) -> Iterator[Goal]:
    """`molecules.py`: the gap on its graph, and beside it on the bonds alone, on an expander and on all pairs."""
    found, seconds = [], []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"molecules-{seed}", "--seed", str(seed)]
        if seed != SEEDS[0]:
            given += ["--against", "bonds"]
        seconds.append(seconds_of(lambda given=given: found.append(molecules.main(molecules.settings(given)))))
    errors, bonds = [each["figure"] for each in found], [each["baselines"]["bonds"] for each in found]
    others = ", ".join(f"{name} {figure:.4f}" for name, figure in found[0]["baselines"].items())
    note = f"{', '.join(f'{each:.4f}' for each in errors)}; of the first beside {others}"
    text = f"molecules.py, {found[0]['graph']}: error of the gap in β, mean of three seeds"
    yield Goal(text, 0.035, statistics.mean(errors), at_most=True, note=note)
    share = statistics.mean(errors) / statistics.mean(bonds)
    note = f"{', '.join(f'{each:.4f}' for each in bonds)} on the bonds alone"
    yield Goal("molecules.py: its error over that on the bonds alone", 0.6, share, at_most=True, note=note)
    full = found[0]["baselines"]["Full()"]
    yield Goal("molecules.py: its error over that on all pairs, one seed", 0.6, errors[0] / full, at_most=True)
    yield Goal("molecules.py: seconds with all that it is compared with", 180, seconds[0], at_most=True)


def circulants(options: Namespace) -> Iterator[Goal]:
    """`molecules.py`: graphs that only positions tell apart."""
    right, chance = [], []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"csl-{seed}", "--seed", str(seed)]
        given += ["--task", "csl", "--steps", "150", "--walks", "24"]
        told = molecules.main(molecules.settings(given))
        right.append(told["figure"])
        chance += told["baselines"].values()
    yield Goal("molecules.py, CSL with random-walk positions: % right, the worst of three seeds", 100, min(right))
    text = "molecules.py, CSL without positions: % right, the farthest from 10 of three seeds"
    yield Goal(text, 10, max(chance, key=lambda each: abs(each - 10)), at_most=True)


def fusion(options: Namespace) -> Iterator[Goal]:
    """`sensors.py`: with both sensors, and with one as good as a model that knows no other."""
    found, seconds = [], []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"sensors-{seed}", "--seed", str(seed)]
        if seed != SEEDS[0]:
            given += ["--against", "camera", "radar"]
        seconds.append(seconds_of(lambda given=given: found.append(sensors.main(sensors.settings(given)))))
    both, hand = [each["figure"] for each in found], found[0]["baselines"]
    note = f"{', '.join(f'{each:.3f}' for each in both)}; "
    note += ", ".join(f"{name} {figure:.3f}" for name, figure in hand.items() if name.startswith("by hand"))
    text = "sensors.py, camera and radar: error of the position in 10 m, mean of three seeds"
    yield Goal(text, 0.27, statistics.mean(both), at_most=True, note=note)
    for sensor in ("camera", "radar"):
        own, alone = ([each["found"][way][sensor] for each in found] for way in ("dropped", sensor))
        undropped = found[0]["found"]["both"][sensor]
        note = f"{statistics.mean(own):.3f} and {statistics.mean(alone):.3f}; {undropped:.3f} where none dropped out"
        text = f"sensors.py, the {sensor} alone: error over that of a model trained on it alone, mean of three seeds"
        yield Goal(text, 1.05, statistics.mean(own) / statistics.mean(alone), at_most=True, note=note)
    yield Goal("sensors.py: seconds with all that it is compared with", 180, seconds[0], at_most=True)


def spoken(options: Namespace) -> Iterator[Goal]:
    """`speech.py`: numbers in accents that were never heard."""
    found, seconds = [], []
    for seed in SEEDS:
        given = ["--runs", options.runs, "--name", f"speech-{seed}", "--seed", str(seed)]
        if seed != SEEDS[0]:
            given += ["--against"]
        seconds.append(seconds_of(lambda given=given: found.append(speech.main(speech.settings(given)))))
    note = ", ".join(f"{each['figure']:.2f}" for each in found) + "; "
    note += ", ".join(f"{name} {figure:.2f}" for name, figure in found[0]["baselines"].items())
    text = "speech.py: % of the digits wrong in accents never heard, mean of three seeds"
    yield Goal(text, 1, statistics.mean(each["figure"] for each in found), at_most=True, note=note)
    yield Goal("speech.py: seconds with all that it is compared with", 180, seconds[0], at_most=True)


SECTIONS = {
    "exact": exact,
    "digits": digits,
    "dates": dates,
    "masked": masked,
    "gaps": gaps,
    "circulants": circulants,
    "fusion": fusion,
    "spoken": spoken,
}


def run(options: Namespace) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory() as options.runs:
        yield from run_sections(SECTIONS, options)


EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run)

if __name__ == "__main__":
    EXPERIMENT.main()
