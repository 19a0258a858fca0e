"""What the examples reach with their own settings: python -m benchmarks.examples, a quarter of an hour on two cores.

Recorded in results/examples.json, section by section; nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import bert
import mlp_is_attention
import translate
import vit

from benchmarks.measure import RESULTS, machine

NAME = "examples"
SEEDS = (1, 2, 3)


def digits(runs: str) -> Iterator[dict]:
    """`vit.py` on digits, with all patches and with those beside each other."""
    reached = {}
    for graph in ("Full()", "Neighborhood((4, 4), 1)"):
        found = []
        for seed in SEEDS:
            start = time.perf_counter()
            given = ["--runs", runs, "--name", f"vit-{seed}", "--graph", graph, "--seed", str(seed)]
            found.append({**vit.train(vit.settings(given)), "whole": time.perf_counter() - start})
        reached[graph] = statistics.mean(each["test_accuracy"] for each in found)
        seconds, edges = max(each["whole"] for each in found), found[0]["edges"]
        each = ", ".join(f"{one['test_accuracy']:.2f}" for one in found)
        text = f"vit.py, digits, {graph} and CLS, {edges:,} edges: % right, mean of three seeds ({each})"
        yield figure(text, 99.2 if graph == "Full()" else reached["Full()"] - 0.3, reached[graph])
        if graph == "Full()":
            yield figure("vit.py, digits: seconds, the slowest of three", 90, seconds, at_most=True)


def dates(runs: str) -> Iterator[dict]:
    found = translate.train(translate.settings(["--runs", runs]))
    yield figure("translate.py: % of 2,000 unseen dates exactly right", 99.5, found["exact_match"])
    yield figure("translate.py: seconds of training", 180, found["seconds"], at_most=True)


def masked(runs: str) -> Iterator[dict]:
    found = bert.main(bert.settings(["--runs", runs]))
    text = "bert.py: masked characters right under Full() and under Causal(), points between them"
    figures = f" ({found['validation_accuracy']:.1f}% and {found['against']:.1f}%)"
    yield figure(text + figures, 8, found["validation_accuracy"] - found["against"])


def exact(runs: str) -> Iterator[dict]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(20, 80), nn.GELU(), nn.Linear(80, 40), nn.Tanh(), nn.Linear(40, 20)).double()
    worst = max(mlp_is_attention.largest_difference(mlp, torch.randn(100, 20, dtype=torch.float64)))
    yield figure("mlp_is_attention.py: largest difference of outputs and gradients", 1e-12, worst, at_most=True)


def figure(text: str, wanted: float, reached: float, at_most: bool = False) -> dict:
    yes = reached <= wanted if at_most else reached >= wanted
    return {"text": text, "wanted": wanted, "reached": reached, "at_most": at_most, "yes": yes}


SECTIONS: dict[str, Callable[[str], Iterator[dict]]] = {
    "exact": exact,
    "digits": digits,
    "dates": dates,
    "masked": masked,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="some; all by default")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in options.section or SECTIONS:
        with tempfile.TemporaryDirectory() as runs:
            figures = list(SECTIONS[name](runs))
        known[name] = {"figures": figures, "machine": machine()}
        path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for section in known.values():
        for each in section["figures"]:
            sign = "≤" if each["at_most"] else "≥"
            print(
                f"{'yes' if each['yes'] else 'no':4}{sign} {each['wanted']:<8.4g}{each['reached']:<8.4g} {each['text']}"
            )


if __name__ == "__main__":
    main()
