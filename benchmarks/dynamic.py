"""What connectivity that is computed from the data is worth: python -m benchmarks.dynamic, some minutes on two cores.

    python -m benchmarks.dynamic --section particles --seeds 1

particles: the task and the model of examples/particles.py. The contestants differ in their graph alone: the 12 nearest,
computed anew for each batch, as many at random, or all. What is unexplained is the mean square of the error over that
of the accelerations, of particles that were never trained on.

recall: those of examples/recall.py. The graph of the second layer is what the contestants differ in: the 8 keys that
answer best, the 4 blocks of two that do, the 8 keys before, or all.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

import particles
import recall

from attngraph import parse
from benchmarks.experiment import Goal, goals_experiment
from benchmarks.measure import Progress, isolated
from benchmarks.page import number

NAME = "dynamic"

PARTICLES = {"nearest": "knn_graph(place, 12, loop=True)", "random": "Random(12)", "all": "Full()"}
RECALL = {
    "TopK(8)": "TopK(8) & Causal()",
    "BlockTopK(2, 4)": "BlockTopK(2, 4)",
    "window": "Causal() & Window(7, 0)",
    "all": "Causal()",
}
EXAMPLES = {"particles": (particles, "unexplained"), "recall": (recall, "right")}  # and the name of its score
PAIRS = 32


def trained(progress: Progress, example: str, graph: str, seed: int, *more: str) -> dict:
    """The `score` in percent and the `seconds` of a training by the example's own settings."""
    module, score = EXAMPLES[example]
    progress({}, 1800.0)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        given = ["--runs", folder, "--seed", str(seed), "--graph", graph, *more, "--against"]
        found = module.train(module.settings(given))
    return {"score": found[score], "seconds": found["seconds"]}


def by_contestant(example: str, graphs: dict[str, str], seeds: int) -> dict[str, list[dict]]:
    """Each one's trainings."""
    return {
        name: [isolated(trained, example, graph, seed, seconds=60.0, gib=8.0) for seed in range(seeds)]
        for name, graph in graphs.items()
    }


def particles_goals(options: Namespace) -> Iterator[Goal]:
    found = by_contestant("particles", PARTICLES, options.seeds)
    reached = {name: mean(each) for name, each in found.items()}
    nearest, every, random = (reached[name] for name in ("nearest", "all", "random"))
    text = "64 particles, the 12 nearest of each step"
    yield Goal(f"{text}: unexplained variance, %", 2.5, nearest, at_most=True, note=of_seeds(found))
    ratio = "not measured" if isinstance(nearest, str) or isinstance(every, str) else nearest / every
    yield Goal(f"{text}: unexplained variance over that of all 64", 1, ratio, at_most=True)
    yield Goal("64 particles, 12 at random: unexplained variance, %", 50, random)
    slowest = max((each.get("seconds", 0.0) for runs in found.values() for each in runs), default=0.0)
    yield Goal("64 particles: seconds of the slowest training", 180, slowest, at_most=True)


def recall_goals(options: Namespace) -> Iterator[Goal]:
    found = by_contestant("recall", RECALL, max(options.seeds, 3))
    edges = {name: recall.num_edges(parse(graph), 3 * PAIRS) for name, graph in RECALL.items()}
    for name in ("TopK(8)", "BlockTopK(2, 4)"):
        scores = [each.get("score", 0.0) for each in found[name]]
        text = f"recall of {PAIRS} values by {name}"
        yield Goal(f"{text}: right in the worst of {len(scores)} seeds, %", 99, min(scores), note=of_seeds(found))
        yield Goal(f"{text}: edges over those of all", 1 / 6, edges[name] / edges["all"], at_most=True)


def mean(found: list[dict]) -> float | str:
    """The score of all seeds, or the failure of one."""
    failures = [each["failure"] for each in found if "failure" in each]
    return failures[0] if failures else statistics.mean(each["score"] for each in found)


def of_seeds(found: dict[str, list[dict]]) -> str:
    """Each contestant's scores, as a note."""
    return "; ".join(
        f"{contestant} {', '.join(number(each.get('score', 'failed'), '.1f') for each in runs)}"
        for contestant, runs in found.items()
    )


SECTIONS = {"particles": particles_goals, "recall": recall_goals}
OPTIONS: dict[str, dict] = {"seeds": {"type": int, "default": 2, "help": "trainings of each contestant"}}
EXPERIMENT = goals_experiment(NAME, __doc__, SECTIONS, options=OPTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()
