"""What the examples reach with their own settings: python -m benchmarks.examples, some minutes a section.

Nothing else should run beside it. The figure of each example, with its baselines, is kept beside the goals, in
lecture.json: examples/README.md is made of it by `python -m benchmarks.readme`.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any

import bert
import decisions
import diffusion
import gpt
import gradient_descent
import incontext
import lecture
import mlp_is_attention
import molecules
import notebook
import particles
import recall
import reporting
import sensors
import speech
import tokenizer
import torch
import translate
import vit
from torch import nn

from attngraph import Causal, parse
from benchmarks import measure, outcomes
from benchmarks.experiment import Figures, Goal, goals_experiment, run_sections

NAME = "examples"
SEEDS = (1, 2, 3)

Main = Callable[[Namespace], dict[str, Any]]


def runs(main: Main, options: Namespace, *given: str, name: str | None = None) -> list[dict[str, Any]]:
    """What an example returns for each seed, and the `wall` seconds of all that it did; in runs NAME-1, NAME-2, …"""
    module, found = sys.modules[main.__module__], []
    for seed in SEEDS:
        run = ["--runs", options.runs, "--name", f"{name or module.__name__}-{seed}", "--seed", str(seed)]
        begin = measure.now()
        found.append(main(module.settings([*run, *given])))
        found[-1]["wall"] = measure.now() - begin
    return found


def each(found: list[dict[str, Any]], *names: str) -> list[float]:
    """A figure of each seed: `each(found, "baselines", "bonds")`."""
    return [reduce(getitem, names, one) for one in found]


def listed(figures: Iterable[float], digits: int = 2) -> str:
    return ", ".join(f"{figure:.{digits}f}" for figure in figures)


def beside(found: list[dict[str, Any]], digits: int = 2) -> str:
    """The baselines, of each seed."""
    return "; ".join(f"{name} {listed(each(found, 'baselines', name), digits)}" for name in found[0]["baselines"])


def in_time(example: str, found: list[dict[str, Any]], seconds: float = 180) -> Goal:
    """Three minutes on two cores, if not said otherwise, with all that the example compares."""
    text = f"{example}.py: seconds with all that it is compared with, the slowest of three seeds"
    note = f"{listed(each(found, 'seconds'), 0)} of training without"
    return Goal(text, seconds, max(each(found, "wall")), at_most=True, note=note)


# -------------------------------------------------------------------------------------------------- message passing


def exact(options: Namespace) -> Iterator[Goal]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(20, 80), nn.GELU(), nn.Linear(80, 40), nn.Tanh(), nn.Linear(40, 20)).double()
    worst = max(mlp_is_attention.largest_difference(mlp, torch.randn(100, 20, dtype=torch.float64)))
    yield Goal("mlp_is_attention.py: largest difference of outputs and gradients", 1e-12, worst, at_most=True)
    for entry in lecture.LECTURE[:2]:  # custom.py and mlp_is_attention.py, which have no settings: for their outcomes
        failure = lecture.run(entry, Path(options.runs), whole=True)
        yield Goal(
            f"{entry.name}.py: runs that failed", 0, 0 if failure is None else 1, at_most=True, note=failure or ""
        )


# -------------------------------------------------------------------------------------------------------------- text


def predicted(options: Namespace) -> Iterator[Goal]:
    """`gpt.py`, as the demo trains it."""
    found = runs(gpt.train, options)
    loss = each(found, "validation_loss")
    text = "gpt.py: validation loss in nats a character, the worst of three seeds; nanoGPT's README has 1.88"
    yield Goal(text, 1.88, max(loss), at_most=True, note=f"{listed(loss, 3)}; {found[0]['source']}")
    yield in_time("gpt", found)


def masked(options: Namespace) -> Iterator[Goal]:
    """`bert.py`: what both sides are worth."""
    found = runs(bert.main, options)
    right, causal = each(found, "validation_accuracy"), each(found, "against")
    text = "bert.py: masked characters right under Full(), points above Causal(), the least of three seeds"
    least = min(both - one for both, one in zip(right, causal, strict=True))
    yield Goal(text, 8, least, note=f"{listed(right, 1)}% and {listed(causal, 1)}% of {found[0]['source']}")


def dates(options: Namespace) -> Iterator[Goal]:
    found = runs(translate.train, options)
    right = each(found, "exact_match")
    text = "translate.py: % of 2,000 unseen dates exactly right, the worst of three seeds"
    yield Goal(text, 99.5, min(right), note=listed(right))
    yield in_time("translate", found)


TOKENS = (256, 512, 1024, 2048)
WIDTH, LAYERS, CONTEXT, BATCH, STEPS = 96, 4, 128, 1536, 250  # the context in bytes, the batch in tokens


def subwords(options: Namespace) -> Iterator[Goal]:
    """`tokenizer.py`'s tokens under small GPTs that see as many bytes at once, and multiply as many numbers in all."""
    reached: dict[int, float] = {}
    for count in TOKENS:
        shards = Path(options.runs, f"shards-{count}")
        name = "tokenizer" if count == 512 else f"tokens-{count}"
        given = ["--runs", options.runs, "--name", name, "--tokens", str(count), "--shards", str(shards)]
        made = tokenizer.main(tokenizer.settings(given))
        if count == 512:
            yield Goal("tokenizer.py, 512 tokens: seconds of learning", 11, made["seconds"], at_most=True)
        context = round(CONTEXT / made["figure"])
        steps = round(STEPS * products(CONTEXT, 256) / products(context, count))
        shape = {
            "shards": shards, "layers": LAYERS, "width": WIDTH, "context": context, "steps": steps,
            "batch": round(BATCH / context), "evaluate-every": steps, "sample": 0,
        }  # fmt: skip
        found = runs(gpt.train, options, *(f"--{name}={value}" for name, value in shape.items()), name=f"on-{count}")
        bytes_a_token = gpt.Shards(shards, context).bytes_a_token
        bits = [nats / bytes_a_token / math.log(2) for nats in each(found, "validation_loss")]
        reached[count] = statistics.mean(bits)
        text = f"gpt.py on {count:,} tokens of tokenizer.py, at the compute of bytes: bits a byte, mean of three seeds"
        note = f"{listed(bits, 3)}; {steps} steps, {context} tokens at once"
        yield Goal(text, reached[256], reached[count], at_most=True, note=note)


def products(context: int, vocabulary: int) -> int:
    """Multiplications for a token: of the layers' matrices, of causal attention, and of the head."""
    return LAYERS * (12 * WIDTH**2 + WIDTH * context) + WIDTH * vocabulary


def drafted(options: Namespace) -> Iterator[Goal]:
    """`diffusion.py`, and bert.py, which learns to fill one share of holes alone."""
    found = runs(diffusion.main, options)
    bits = each(found, "figure")
    text = "diffusion.py: bits a character at most, Full(), the worst of three seeds"
    yield Goal(text, 2.9, max(bits), at_most=True, note=f"{listed(bits, 3)}; {beside(found, 3)}")
    seconds = each(found, "seconds")
    text = "diffusion.py: seconds of training, the slowest of three seeds"
    yield Goal(text, 180, max(seconds), at_most=True, note=listed(seconds, 0))
    alone = each(runs(bert.main, options, "--against", "", name="bert-beside"), "validation_accuracy")
    fills = [one["filled"][0.15] for one in found]
    worst = max(without - filled for without, filled in zip(alone, fills, strict=True))
    text = "diffusion.py: % right of 15% masked, points below bert.py, the worst of three seeds"
    yield Goal(text, 3, worst, at_most=True, note=f"{listed(fills, 1)}; {listed(alone, 1)}")


# ----------------------------------------------------------------------------------------------- chop up everything


def digits(options: Namespace) -> Iterator[Goal]:
    """`vit.py` on digits, with all patches and with those beside each other."""
    reached: dict[str, float] = {}
    for graph, name in (("Full()", "vit"), ("Neighborhood((4, 4), 1)", "vit-near")):
        found = runs(vit.train, options, "--graph", graph, name=name)
        right = each(found, "test_accuracy")
        reached[graph] = statistics.mean(right)
        wanted = 99.2 if graph == "Full()" else reached["Full()"] - 0.3
        text = f"vit.py, digits, {graph} and CLS, {found[0]['edges']:,} edges: % right, mean of three seeds"
        yield Goal(text, wanted, reached[graph], note=listed(right))
        if graph == "Full()":
            yield in_time("vit", found, 90)


def spoken(options: Namespace) -> Iterator[Goal]:
    """`speech.py`: numbers in accents that were never heard."""
    found = runs(speech.main, options)
    wrong = each(found, "figure")
    text = "speech.py: % of the digits wrong in accents never heard, mean of three seeds"
    yield Goal(text, 1, statistics.mean(wrong), at_most=True, note=f"{listed(wrong)}; {beside(found)}")
    yield in_time("speech", found)


def fusion(options: Namespace) -> Iterator[Goal]:
    """`sensors.py`: with both sensors, and with one as good as a model that knows no other."""
    found = runs(sensors.main, options)
    both = each(found, "figure")
    text = "sensors.py, camera and radar: error of the position in 10 m, mean of three seeds"
    yield Goal(text, 0.27, statistics.mean(both), at_most=True, note=f"{listed(both, 3)}; {beside(found, 3)}")
    for sensor in ("camera", "radar"):
        own, alone, lost = (statistics.mean(each(found, "found", way, sensor)) for way in ("dropped", sensor, "both"))
        note = f"{own:.3f} and {alone:.3f}; {lost:.3f} where none dropped out"
        text = f"sensors.py, the {sensor} alone: error over that of a model trained on it alone, mean of three seeds"
        yield Goal(text, 1.05, own / alone, at_most=True, note=note)
    yield in_time("sensors", found)


def gaps(options: Namespace) -> Iterator[Goal]:
    """`molecules.py`: the gap on its graph, and beside it on the bonds alone, on an expander and on all pairs."""
    found = runs(molecules.main, options)
    errors = each(found, "figure")
    text = f"molecules.py, {found[0]['graph']}: error of the gap in β, mean of three seeds"
    note = f"{listed(errors, 4)}; {beside(found, 4)}"
    yield Goal(text, 0.035, statistics.mean(errors), at_most=True, note=note)
    for graph in ("bonds", "Full()"):
        share = statistics.mean(errors) / statistics.mean(each(found, "baselines", graph))
        yield Goal(f"molecules.py: its error over that of {graph}, means of three seeds", 0.6, share, at_most=True)
    yield in_time("molecules", found)


def circulants(options: Namespace) -> Iterator[Goal]:
    """`molecules.py`: graphs that only positions tell apart."""
    found = runs(molecules.main, options, "--task", "csl", "--steps", "150", "--walks", "24", name="csl")
    right = min(each(found, "figure"))
    yield Goal("molecules.py, CSL with random-walk positions: % right, the worst of three seeds", 100, right)
    chance = [figure for one in found for figure in one["baselines"].values()]
    text = "molecules.py, CSL without positions: % right, the farthest from 10 of three seeds"
    yield Goal(text, 10, max(chance, key=lambda figure: abs(figure - 10)), at_most=True)


def shortest_paths(options: Namespace) -> Iterator[Goal]:
    """`decisions.py`: asked for the best that the data have, and what is reached."""
    found = runs(decisions.main, options)
    right = each(found, "figure")
    text = "decisions.py, 30 places, 1,000 walks: % of paths that are shortest, the worst of three seeds"
    yield Goal(text, 95, min(right), note=listed(right, 1))
    failed = sum(each(found, "failed"))
    yield Goal("decisions.py: paths that fail, of all three seeds", 0, failed, at_most=True)
    text = "decisions.py: % of paths that are shortest without returns, mean of three seeds"
    steps = [
        f"{one[decisions.UNHEARD]:.1f} steps, and {one['Causal()']:.2f} with returns" for one in each(found, "steps")
    ]
    without = statistics.mean(each(found, "baselines", decisions.UNHEARD))
    yield Goal(text, 50, without, at_most=True, note=", ".join(steps))
    yield in_time("decisions", found)
    larger = ["--against", "", "--nodes", "60", "--walks", "300"]
    ratios, notes = [], []
    for steps in each(runs(decisions.main, options, *larger, name="map"), "steps"):
        data = steps["asked for, the best in the data"]
        ratios.append(steps["Causal()"] / data)
        notes.append(f"{steps['Causal()']:.2f} of {data:.2f}, shortest {steps['shortest']:.2f}")
    text = "decisions.py, 60 places, 300 walks: mean steps over those of the best in the data from each start"
    yield Goal(text, 1, max(ratios), at_most=True, note="; ".join(notes))


# ------------------------------------------------------------------------------------- connectivity from the data


def recalled(options: Namespace) -> Iterator[Goal]:
    """`recall.py`: connectivity that is computed from the data."""
    found = runs(recall.main, options)
    text, right = f"recall.py, 32 pairs, {found[0]['graph']}", each(found, "right")
    yield Goal(f"{text}: % of the values right, the worst of three seeds", 99, min(right), note=listed(right))
    edges = reporting.edges_of([parse(found[0]["graph"])], 3 * 32)
    share = edges / Causal().num_edges(3 * 32, 3 * 32)
    yield Goal(f"{text}: edges of its layer over those of Causal()", 1 / 6, share, at_most=True)
    others = {graph: each(found, "against", graph, "right") for graph in found[0]["against"]}
    best = max(max(right) for graph, right in others.items() if graph != "Causal()")
    text = "recall.py, 32 pairs, a window and random edges: % right, the best of three seeds"
    yield Goal(text, 25, best, at_most=True, note=beside(found))
    yield in_time("recall", found)


def pushed(options: Namespace) -> Iterator[Goal]:
    """`particles.py`: the nearest of each step."""
    found = runs(particles.main, options)
    text, missed = f"particles.py, {found[0]['graph']}, {found[0]['edges']:,} edges", each(found, "unexplained")
    worst = f"{text}: % of the variance unexplained, the worst of three seeds"
    yield Goal(worst, 2.5, max(missed), at_most=True, note=f"{listed(missed)}; {beside(found)}")
    full, random = (each(found, "against", graph, "unexplained") for graph in ("Full()", "Random(12)"))
    text = f"{text}: unexplained variance over that of Full(), the worst of three seeds"
    yield Goal(text, 1, max(own / other for own, other in zip(missed, full, strict=True)), at_most=True)
    yield Goal("particles.py, Random(12): % of the variance unexplained, the least of three seeds", 50, min(random))
    yield in_time("particles", found)


# -------------------------------------------------------------------------------------------------------- a notebook


def noted(options: Namespace) -> Iterator[Goal]:
    """`notebook.py`: notes that later chunks hear, and longer texts."""
    found = runs(notebook.main, options)
    text, right = f"notebook.py, {found[0]['graph']}", each(found, "right")
    note = f"{listed(right)}; {beside(found)}"
    yield Goal(f"{text}: % of the values right, the worst of three seeds", 97, min(right), note=note)
    by_length = {tokens: each(found, "lengths", tokens) for tokens in found[0]["lengths"]}
    note = "; ".join(f"{tokens} tokens {listed(right)}" for tokens, right in by_length.items())
    longest = min(by_length[max(by_length)])
    yield Goal(f"{text}: % right in texts 4 times as long as those of training", 90, longest, note=note)
    best = max(each(found, "against", next(iter(found[0]["against"])), "right"))
    yield Goal("notebook.py, without notes: % of the values right, the best of three seeds", 10, best, at_most=True)
    yield in_time("notebook", found)


def more_notes(options: Namespace) -> Iterator[Goal]:
    """`notebook.py --sweep`."""
    found = runs(notebook.main, options, "--against", "--sweep", "0", "1", "2", "4", name="sweep")
    by_notes = {notes: statistics.mean(each(found, "notes", notes, "right")) for notes in found[0]["notes"]}
    note = "; ".join(f"{notes} notes {right:.2f}" for notes, right in by_notes.items())
    least = min(more - fewer for fewer, more in pairwise(by_notes.values()))
    text = "notebook.py: points that 1, 2 and 4 notes are better than fewer, the least, means of three seeds"
    yield Goal(text, 0, least, note=note)


# ---------------------------------------------------------------------------------------------------- the inner loop


def descent(options: Namespace) -> Iterator[Goal]:
    """`gradient_descent.py` on problems of three seeds."""
    found = runs(gradient_descent.main, options)
    text = "gradient_descent.py: largest difference of 50 untrained layers from 50 steps, the worst of three seeds"
    note = "; ".join(f"{name} {figure:.2g}" for name, figure in found[0]["baselines"].items())
    yield Goal(text, 1e-12, max(each(found, "figure")), at_most=True, note=note)


def regression(options: Namespace) -> Iterator[Goal]:
    """`incontext.py` beside ridge regression."""
    found = runs(incontext.main, options)
    for name, place, wanted in (("figure", "of all numbers of pairs", 1.1), ("last", "at the last of 7 pairs", 1.15)):
        errors = each(found, name)
        text = f"incontext.py: error over ridge regression's, {place}, the worst of three seeds"
        note = listed(errors, 3) + (f"; {beside(found, 3)}" if name == "figure" else "")
        yield Goal(text, wanted, max(errors), at_most=True, note=note)
    yield in_time("incontext", found)


SECTIONS = {
    "exact": exact,
    "digits": digits,
    "dates": dates,
    "masked": masked,
    "predicted": predicted,
    "descent": descent,
    "regression": regression,
    "subwords": subwords,
    "gaps": gaps,
    "circulants": circulants,
    "fusion": fusion,
    "spoken": spoken,
    "recall": recalled,
    "particles": pushed,
    "notebook": noted,
    "decisions": shortest_paths,
    "diffusion": drafted,
    "notes": more_notes,
}


def run(options: Namespace) -> Iterator[Figures]:
    with tempfile.TemporaryDirectory() as options.runs:
        yield from run_sections(SECTIONS, options)
        measure.record("lecture", outcomes.outcomes(Path(options.runs)), options.out, options.device)
        if options.out == measure.RESULTS:
            outcomes.keep_pictures(Path(options.runs))


EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run)

if __name__ == "__main__":
    EXPERIMENT.main()
