"""Every system that the lecture names, each on its graph: all examples in their quick form, and a page of what came.

    python examples/lecture.py                     a quarter of an hour on two cores: runs/lecture/index.html
    python examples/lecture.py recall notebook     these alone; the page keeps what it has of the others
    python examples/lecture.py --whole vit         not in its quick form
    python examples/lecture.py --list              what there is, in the order of the lecture

The lecture says that all of this is one thing, nodes that hear one another along edges, and that what distinguishes the
systems is who may hear whom. Each example trains one of them, on a task of minutes, and prints its figure with what it
is to be compared with.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import command_line
import reporting

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """An example, and what it shows."""

    name: str
    part: str
    idea: str
    """What the lecture says of it; between quotation marks in its own words."""
    graph: str
    """The line that makes it this system."""
    quick: tuple[str, ...] = ("--quick",)
    """What makes it short."""


LECTURE = (
    Entry("custom", "Message passing", "attention is messages along the edges of any graph", "from_networkx(club)", ()),
    Entry("mlp_is_attention", "Message passing", "an MLP is attention over keys that no data make", "Full()", ()),
    Entry("gpt", "Text", "tokens that hear the past: the next one is predicted", "Causal()"),
    Entry("bert", "Text", "delete the mask, and it is an encoder: what is hidden is filled in", "Full()"),
    Entry("translate", "Text", "a decoder that also hears every node of an encoder", "Causal(), and cross: Full()"),
    Entry("tokenizer", "Text", "text becomes nodes: bytes, and the pairs of them that are frequent", "Causal()"),
    Entry("diffusion", "Text", "“I do a draft, then I do a better draft”", "Full()"),
    Entry("vit", "Chop up everything", "an image is a set of patches", "Full()"),
    Entry("speech", "Chop up everything", "a spectrogram is a set of slices", "Full(), then Causal() and cross"),
    Entry("sensors", "Chop up everything", "a car's camera and radar, thrown into one set", "Full()"),
    Entry("molecules", "Chop up everything", "graphs that are given, as bonds are", "bonds.with_global_nodes(1)"),
    Entry("decisions", "Chop up everything", "returns, states and actions are a text, too", "Causal()"),
    Entry("recall", "Connectivity from the data", "“the connectivity changes dynamically”", "TopK(8) & Causal()"),
    Entry("particles", "Connectivity from the data", "the same: who is near whom", "knn_graph(place, 12)"),
    Entry("notebook", "A notebook", "“give it a notebook”: a memory, read later", "Chunks(12) | ChunkEnds(12, 4)"),
    Entry("gradient_descent", "The inner loop", "linear attention is gradient descent", "Prefix(n)"),
    Entry("incontext", "The inner loop", "the same, learned: it learns while it reads", "Causal()"),
)


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=command_line.Help)
    names = [entry.name for entry in LECTURE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--whole", action="store_true", help="each by its own settings, up to three minutes")
    parser.add_argument("--runs", type=Path, default=Path("runs/lecture"), help="where the page and the runs are left")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in names]
    if unknown:
        parser.error(f"NAME must be of {', '.join(names)} (got {', '.join(unknown)})")
    return given


def listed() -> str:
    """The examples in the order of the lecture, a line each."""
    lines, part = [], None
    for entry in LECTURE:
        lines += [] if entry.part == part else [f"{entry.part}"]
        lines.append(f"  {entry.name + '.py':20}{entry.graph:34}{entry.idea}")
        part = entry.part
    return "\n".join(lines)


def run(entry: Entry, runs: Path, whole: bool) -> str | None:
    """Run it, what it prints into its log; why it failed, or None."""
    command = [sys.executable, str(HERE / f"{entry.name}.py"), "--runs", str(runs), "--name", entry.name]
    with open(runs / f"{entry.name}.log", "w", encoding="utf-8") as log:
        done = subprocess.run([*command, *(() if whole else entry.quick)], stdout=log, stderr=subprocess.STDOUT)
    if not done.returncode:
        mark(runs / entry.name / reporting.OUTCOME, quick=not whole and entry.quick != ())
        return None
    said = (runs / f"{entry.name}.log").read_text(encoding="utf-8").strip().splitlines()
    return f"it ended with {done.returncode}: {said[-1] if said else 'without a word'}"


def mark(outcome: Path, quick: bool) -> None:
    """Let an outcome say whether it is of a quick form."""
    if outcome.exists():
        known = {**json.loads(outcome.read_text(encoding="utf-8")), "quick": quick}
        checkpoints.write_whole(outcome, lambda path: path.write_text(json.dumps(known, indent=2)))


# ----------------------------------------------------------------------------------------------------------- the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
h2 { margin-top: 3rem; border-bottom: 1px solid #d1d5db } h3 { margin-bottom: 0 }
table { border-collapse: collapse } td, th { text-align: left; padding: .15rem 1.2rem .15rem 0 }
td.number { text-align: right; font-variant-numeric: tabular-nums } tr.figure { font-weight: 600 }
code { background: #f3f4f6; padding: .1rem .3rem } img { max-width: 100%; max-height: 26rem }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin-top: .8rem }
.failed { color: #b91c1c }
@media (prefers-color-scheme: dark) { body { background: #111827; color: #e5e7eb } code { background: #374151 }
  img { background: #fff } .failed { color: #f87171 } }
"""


def page(runs: Path, failures: dict[str, str]) -> str:
    """What the runs in this folder have left, as one file of HTML."""
    body, part = [], None
    for entry in LECTURE:
        known = outcome_of(runs, entry.name)
        if known is None and entry.name not in failures:
            continue
        if entry.part != part:
            body.append(f"<h2>{html.escape(entry.part)}</h2>")
            part = entry.part
        body.append(f"<h3>{entry.name}.py</h3><p>{html.escape(entry.idea)}<br>")
        if entry.name in failures:
            body.append(f"<span class=failed>{html.escape(failures[entry.name])}</span></p>")
        elif known is not None:
            body += told(known, runs / entry.name)
    title = "One Transformer, and who hears whom"
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
    )
    text = """
        Nodes send messages along edges; what distinguishes these systems is who may hear whom. Each was trained for
        seconds (its quick form) or for minutes (whole): figures of quick forms show the mechanism, and are worse.
    """
    return "\n".join([head, f"<p>{text.strip()}</p>", *body, "</html>"])


def outcome_of(runs: Path, name: str) -> dict[str, Any] | None:
    """What a run has left; None where there was none."""
    path = runs / name / reporting.OUTCOME
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:  # damaged: as if it were not there
        return None


def told(known: dict[str, Any], folder: Path) -> Iterable[str]:
    """The graph, figure and baselines in a table, and the pictures."""
    form = "quick form" if known.get("quick") else "whole"
    yield (
        f"<code>{html.escape(known['graph'])}</code>, {known['edges']:,} edges; {known['seconds']:.0f} s, {form}</p>"
        f"<table>"
    )
    better = "lower" if known["lower_is_better"] else "higher"
    yield f"<tr><th>{html.escape(known['metric'])}, {better} is better</th></tr>"
    for name, figure in {"": known["figure"], **known["baselines"]}.items():
        kind = "" if name else " class=figure"
        yield f"<tr{kind}><td>{html.escape(name or known['graph'])}</td><td class=number>{figure:.4g}</td></tr>"
    yield "</table><div class=pictures>"
    for name in dict.fromkeys(["connectivity.png", known["picture"]]):
        if (folder / name).exists():
            content = base64.b64encode((folder / name).read_bytes()).decode()
            yield f'<img alt="{html.escape(Path(name).stem)}" src="data:image/png;base64,{content}">'
    yield "</div>"


def main(given: argparse.Namespace) -> dict[str, str]:
    """Run them one after the other; the page is there, and grows, from the first on. What failed, by name."""
    if given.list:
        print(listed())
        return {}
    checkpoints.made(given.runs)
    failures: dict[str, str] = {}
    for entry in LECTURE:
        if given.names and entry.name not in given.names:
            continue
        begin = time.perf_counter()
        print(f"{entry.name + '.py':22}", end="", flush=True)
        failure = run(entry, given.runs, given.whole)
        known = outcome_of(given.runs, entry.name)
        if failure or known is None:
            failures[entry.name] = failure or "it left no outcome.json"
            print(failures[entry.name])
        else:
            beside = ", ".join(f"{figure:.4g} {name}" for name, figure in known["baselines"].items())
            figure = f"{known['metric']} {known['figure']:.4g}"
            print(f"{time.perf_counter() - begin:4.0f} s   {figure} ({beside})")
        checkpoints.write_whole(
            given.runs / "index.html",
            lambda path: path.write_text(page(given.runs, failures), encoding="utf-8"),
        )
    print(f"in {given.runs}: index.html, and the run of each")
    return failures


if __name__ == "__main__":
    raise SystemExit(1 if main(settings()) else 0)
