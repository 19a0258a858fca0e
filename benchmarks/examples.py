"""What the examples reach with their own settings: python -m benchmarks.examples, some minutes a section.

Nothing else should run beside it. The figure of each example, with its baselines, is kept beside the goals, in
lecture.json: examples/README.md is made of it by `python -m benchmarks.readme`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

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
import sensors
import speech
import tokenizer
import torch
import training
import translate
import vit
from torch import nn

from attngraph import parse
from benchmarks import measure
from benchmarks.experiment import Figures, Goal, Records, goals_experiment, run_sections
from benchmarks.measure import seconds_of
from benchmarks.page import table

NAME = "examples"
SEEDS = (1, 2, 3)


def digits(options: Namespace) -> Iterator[Goal]:
    """`vit.py` on digits, with all patches and with those beside each other."""
    reached: dict[str, float] = {}
    for graph in ("Full()", "Neighborhood((4, 4), 1)"):
        found, seconds = [], []
        for seed in SEEDS:
            name = f"vit-{seed}" if graph == "Full()" else f"vit-near-{seed}"
            given = ["--runs", options.runs, "--name", name, "--graph", graph, "--seed", str(seed)]
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


def of_seed(name: str, seed: int) -> list[str]:
    """The run of an example that has this seed."""
    return ["--name", f"{name}-{seed}", "--seed", str(seed)]


def descent(options: Namespace) -> Iterator[Goal]:
    """`gradient_descent.py` on problems of three seeds."""
    found = []
    for seed in SEEDS:
        given = gradient_descent.settings(["--runs", options.runs, *of_seed("gradient_descent", seed)])
        found.append(gradient_descent.main(given))
    worst = max(each["figure"] for each in found)
    text = "gradient_descent.py: largest difference of 50 untrained layers from 50 steps, the worst of three seeds"
    others = "; ".join(f"{name} {figure:.2g}" for name, figure in found[0]["baselines"].items())
    yield Goal(text, 1e-12, worst, at_most=True, note=others)


def regression(options: Namespace) -> Iterator[Goal]:
    """`incontext.py`, of three seeds, beside ridge regression."""
    found = []
    for seed in SEEDS:
        given = incontext.settings(["--runs", options.runs, *of_seed("incontext", seed)])
        found.append(incontext.main(given))
    overall, last, seconds = ([each[name] for each in found] for name in ("figure", "last", "seconds"))
    others = "; ".join(f"{name} {figure:.3g}" for name, figure in found[0]["baselines"].items() if figure != 1)
    for place, each, wanted in (("of all numbers of pairs", overall, 1.1), ("at the last of 7 pairs", last, 1.15)):
        text = f"incontext.py: error over ridge regression's, {place}, the worst of three seeds"
        note = ", ".join(f"{figure:.3f}" for figure in each) + (f"; {others}" if each is overall else "")
        yield Goal(text, wanted, max(each), at_most=True, note=note)
    yield Goal("incontext.py: seconds of training, the slowest of three", 180, max(seconds), at_most=True)


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
        found = []
        for seed in SEEDS:
            given = {
                "shards": shards, "layers": LAYERS, "width": WIDTH, "context": context, "steps": steps, "seed": seed,
                "batch": round(BATCH / context), "evaluate-every": steps, "sample": 0, "runs": options.runs,
                "name": f"on-{count}-{seed}",
            }  # fmt: skip
            nats = gpt.train(gpt.settings([f"--{name}={value}" for name, value in given.items()]))["validation_loss"]
            found.append(nats / gpt.Shards(shards, context).bytes_a_token / math.log(2))
        reached[count] = statistics.mean(found)
        text = f"gpt.py on {count:,} tokens of tokenizer.py, at the compute of bytes: bits a byte, mean of three seeds"
        note = f"{', '.join(f'{each:.3f}' for each in found)}; {steps} steps, {context} tokens at once"
        yield Goal(text, reached[256], reached[count], at_most=True, note=note)


def products(context: int, vocabulary: int) -> int:
    """Multiplications for a token: of the layers' matrices, of causal attention, and of the head."""
    return LAYERS * (12 * WIDTH**2 + WIDTH * context) + WIDTH * vocabulary


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
        begin = measure.cpu_seconds()
        found.append(module.main(module.settings(arguments)))
        found[-1]["cpu"] = measure.cpu_seconds() - begin
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
        measure.record("lecture", outcomes(Path(options.runs)), options.out, options.device)
        if options.out == measure.RESULTS:
            keep_pictures(Path(options.runs))


# ------------------------------------------------------------------------------------------------- the examples' own

PICTURES = Path(lecture.__file__).parent / "pictures"


def runs_of(name: str, folder: Path) -> list[Path]:
    """An example's runs in this folder, which are called after it, or after it and a seed: `vit`, `vit-2`."""
    runs = [path.parent for path in folder.glob(f"{name}*/{training.OUTCOME}")]
    return sorted(run for run in runs if re.fullmatch(rf"{name}(-\d+)?", run.name))


def outcomes(folder: Path) -> Figures:
    """By example: the figure of each of its runs, the means of its baselines, and the most seconds."""
    found: Figures = {}
    for entry in lecture.LECTURE:
        told = [json.loads((run / training.OUTCOME).read_text(encoding="utf-8")) for run in runs_of(entry.name, folder)]
        if told:
            others = {name: statistics.mean(each["baselines"][name] for each in told) for name in told[0]["baselines"]}
            kept = {name: told[0][name] for name in ("metric", "graph", "edges", "lower_is_better")}
            figures, seconds = [each["figure"] for each in told], max(each["seconds"] for each in told)
            found[entry.name] = {**kept, "figures": figures, "baselines": others, "seconds": seconds}
    return found


def keep_pictures(folder: Path) -> None:
    """The graph of each example, as its first run drew it."""
    PICTURES.mkdir(exist_ok=True)
    for entry in lecture.LECTURE:
        drawn = [run / "connectivity.png" for run in runs_of(entry.name, folder)]
        if drawn and drawn[0].exists():
            shutil.copyfile(drawn[0], PICTURES / f"{entry.name}.png")


def page(records: Records) -> Iterator[str]:
    """A table for each part of the lecture: what it says, the graph, what was reached, and beside what."""
    known, head = records["lecture"], ["python examples/…", "the lecture", "who hears whom", "reached", "beside", "s"]
    for part in dict.fromkeys(entry.part for entry in lecture.LECTURE):
        yield from [f"## {part}", ""]
        rows = [row(entry, known.get(entry.name)) for entry in lecture.LECTURE if entry.part == part]
        yield from table(head, rows)


def row(entry: lecture.Entry, outcome: dict | None) -> list[str]:
    """An example's; without figures where none were recorded."""
    drawn = f'<img src="pictures/{entry.name}.png" alt="mask" width="140"><br>'
    drawn = drawn if (PICTURES / f"{entry.name}.png").exists() else ""
    cells = [f"[`{entry.name}.py`]({entry.name}.py)", entry.idea, f"{drawn}`{entry.graph}`"]
    if outcome is None:
        return [*cells, "", "", ""]
    better = "lower" if outcome["lower_is_better"] else "higher"
    each, mean = outcome["figures"], statistics.mean(outcome["figures"])
    seeds = f" ({', '.join(f'{figure:.4g}' for figure in each)})" if len(each) > 1 else ""
    reached = f"**{mean:.4g}**{seeds}: {outcome['metric']}, {better} is better; {outcome['edges']:,} edges"
    beside = "; ".join(f"{figure:.4g}: {name}" for name, figure in outcome["baselines"].items())
    return [*cells, reached, beside, f"{outcome['seconds']:.0f}"]


EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, run=run)

if __name__ == "__main__":
    EXPERIMENT.main()
