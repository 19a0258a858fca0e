"""The figure of each example, with its baselines, as its runs left it: the tables of examples/README.md."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import lecture
import reporting

from benchmarks.experiment import Figures, Records
from benchmarks.page import table

PICTURES = Path(lecture.__file__).parent / "pictures"


def runs_of(name: str, folder: Path) -> list[Path]:
    """An example's runs in this folder, which are called after it, or after it and a seed: `vit`, `vit-2`."""
    runs = [path.parent for path in folder.glob(f"{name}*/{reporting.OUTCOME}")]
    return sorted(run for run in runs if re.fullmatch(rf"{name}(-\d+)?", run.name))


def outcomes(folder: Path) -> Figures:
    """By example: the figure of each of its runs, the means of its baselines, and the most seconds."""
    found: Figures = {}
    for entry in lecture.LECTURE:
        told = [
            json.loads((run / reporting.OUTCOME).read_text(encoding="utf-8")) for run in runs_of(entry.name, folder)
        ]
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
    drawn = f'<img src="pictures/{entry.name}.png" alt="who hears whom" width="140"><br>'
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
