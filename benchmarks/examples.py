"""What the examples reach with their own settings: python -m benchmarks.examples, a quarter of an hour on two cores.

Nothing else should run beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import pairwise
from types import ModuleType

import bert
import mlp_is_attention
import notebook
import particles
import recall
import torch
import translate
import vit
from torch import nn

from attngraph import parse
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


def told(figures: Iterable[float]) -> str:
    """One of each seed."""
    return ", ".join(f"{each:.2f}" for each in figures)


def of_seeds(found: list[dict], name: str) -> str:
    """A figure of each seed, as a note."""
    return told(each[name] for each in found)


def runs(module: ModuleType, options: Namespace, *given: str) -> list[dict]:
    """What an example's `main` returns, for each seed, and its CPU seconds."""
    name, found = module.__name__, []
    for seed in SEEDS:
        arguments = ["--runs", options.runs, "--name", f"{name}-{seed}", "--seed", str(seed), *given]
        begin = time.process_time()
        found.append(module.main(module.settings(arguments)))
        found[-1]["cpu"] = time.process_time() - begin
    return found


def of_others(found: list[dict], name: str) -> dict[str, list[float]]:
    """A figure of each seed, by the graphs of --against."""
    return {graph: [each["against"][graph][name] for each in found] for graph in found[0]["against"]}


def recalled(options: Namespace) -> Iterator[Goal]:
    """`recall.py`: connectivity that is computed from the data."""
    found = runs(recall, options)
    text = f"recall.py, 32 pairs, {found[0]['graph']}"
    worst, every = min(each["right"] for each in found), found[0]["against"]["Causal()"]
    yield Goal(f"{text}: % of the values right, the worst of three seeds", 99, worst, note=of_seeds(found, "right"))
    edges = recall.num_edges(parse(found[0]["graph"]), 3 * 32)
    yield Goal(f"{text}: edges of its layer over those of Causal()", 1 / 6, edges / every["edges"], True)
    others = of_others(found, "right")
    note = "; ".join(f"{graph} {told(right)}" for graph, right in others.items())
    best = max(max(right) for graph, right in others.items() if graph != "Causal()")
    yield Goal("recall.py, 32 pairs, a window and random edges: % right, the best of three seeds", 25, best, True, note)
    cpu = max(each["cpu"] for each in found)
    yield Goal("recall.py: CPU seconds with all that is beside it, the slowest seed", 180, cpu, at_most=True)


def pushed(options: Namespace) -> Iterator[Goal]:
    """`particles.py`: the nearest of each step."""
    found = runs(particles, options)
    text = f"particles.py, {found[0]['graph']}, {found[0]['edges']:,} edges"
    worst = max(each["unexplained"] for each in found)
    note = of_seeds(found, "unexplained")
    yield Goal(f"{text}: % of the variance unexplained, the worst of three seeds", 2.5, worst, at_most=True, note=note)
    others = of_others(found, "unexplained")
    ratios = [each["unexplained"] / each["against"]["Full()"]["unexplained"] for each in found]
    text = f"{text}: unexplained variance over that of Full(), the worst of three seeds"
    yield Goal(text, 1, max(ratios), at_most=True, note=f"Full() {told(others['Full()'])}")
    random = others["Random(12)"]
    yield Goal("particles.py, Random(12): % of the variance unexplained", 50, min(random), note=told(random))
    cpu = max(each["cpu"] for each in found)
    yield Goal("particles.py: CPU seconds with all that is beside it, the slowest seed", 180, cpu, at_most=True)


def noted(options: Namespace) -> Iterator[Goal]:
    """`notebook.py`: notes that later chunks hear, and longer texts."""
    found = runs(notebook, options)
    text = f"notebook.py, {found[0]['graph']}"
    worst = min(each["right"] for each in found)
    yield Goal(f"{text}: % of the values right, the worst of three seeds", 97, worst, note=of_seeds(found, "right"))
    by_length = {tokens: [each["lengths"][tokens] for each in found] for tokens in found[0]["lengths"]}
    note = "; ".join(f"{tokens} tokens {told(right)}" for tokens, right in by_length.items())
    longest = min(list(by_length.values())[-1])
    yield Goal(f"{text}: % right in texts 4 times as long as those of training", 90, longest, note=note)
    others = of_others(found, "right")
    note = "; ".join(f"{graph} {told(right)}" for graph, right in others.items())
    best = max(next(iter(others.values())))
    yield Goal("notebook.py, without notes: % of the values right, the best of three seeds", 10, best, True, note)
    cpu = max(each["cpu"] for each in found)
    yield Goal("notebook.py: CPU seconds with all that is beside it, the slowest seed", 180, cpu, at_most=True)


def more_notes(options: Namespace) -> Iterator[Goal]:
    """`notebook.py --sweep`."""
    given = ["--runs", options.runs, "--name", "sweep", "--against", "--sweep", "0", "1", "2", "4"]
    by_notes = notebook.main(notebook.settings(given))["notes"]
    right = [each["right"] for each in by_notes.values()]
    note = "; ".join(f"{notes} notes {figure:.2f}" for notes, figure in zip(by_notes, right, strict=True))
    least = min(after - before for before, after in pairwise(right))
    yield Goal("notebook.py: points that 1, 2 and 4 notes are better than fewer, the least", 0, least, note=note)


SECTIONS = {
    "exact": exact,
    "digits": digits,
    "dates": dates,
    "masked": masked,
    "recall": recalled,
    "particles": pushed,
    "notebook": noted,
    "notes": more_notes,
}


def run(options: Namespace) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory() as options.runs:
        yield from run_sections(SECTIONS, options)


EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run)

if __name__ == "__main__":
    EXPERIMENT.main()
