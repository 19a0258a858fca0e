"""What an experiment is: it runs, what it finds is recorded, records are rendered; and the options that they share."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.page import Keep, number, spread, status, table

Figures = dict[str, dict]  # what was found, by what it is of

# What argparse is told of an option that several experiments have; each says which, and with what default.
SHARED: dict[str, dict] = {
    "repeats": {"type": int, "help": "turns of each contestant"},
    "limit": {"type": float, "help": "seconds a call, and about that for all turns"},
    "memory": {"type": float, "default": 18.0, "help": "GiB of resident memory of all contestants"},
    "device": {"default": "cpu", "choices": ("cpu", "cuda"), "help": "where to measure"},
    "section": {"action": "append", "help": "a part of it; may be repeated; all by default"},
    "minutes": {"type": float, "default": math.inf, "help": "begin nothing new after so many"},
    "out": {"type": Path, "default": measure.RESULTS, "help": "folder of the record"},
    "compare": {"type": Path, "metavar": "BEFORE.json", "help": "run nothing: an earlier record beside that of --out"},
}


def settings(
    name: str, text: str, options: dict[str, dict], arguments: list[str] | None = None, device: str = "cpu"
) -> Namespace:
    """The options of a command line; what makes no sense is an error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks{name and '.'}{name}",
        description=text.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for option, given in options.items():
        told = {**SHARED.get(option, {}), **given}
        parser.add_argument(f"--{option}", *told.pop("also", ()), **told)
    parser.set_defaults(device=device)
    found = parser.parse_args(arguments)
    for option, value in vars(found).items():
        least = 15 if option == "n" else 0
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, (int, float)) and not isinstance(each, bool) and not each > least:
                parser.error(f"--{option} must be more than {least} (got {each})")
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("a GPU is required, and torch sees none")
    found.until = measure.now() + 60 * found.minutes
    return found


class Records(dict[str, Figures]):
    """What was recorded in a folder, by experiment; read when asked for; empty where nothing was."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __missing__(self, name: str) -> Figures:
        self[name] = measure.recorded(self.folder / f"{name}.json")
        return self[name]


IN_THE_KEY = ("text", "section", "name", "kind", "graph", "graphs", "n", "phase")


def summary(key: str, figures: dict) -> str:
    """All figures in a line."""
    return f"{key}: {_plain({name: value for name, value in figures.items() if name not in IN_THE_KEY})}"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return " … ".join(map(_plain, value)) if isinstance(value, list) else number(value, ".4g")


@dataclass(frozen=True)
class Experiment:
    """A question, how it is measured, and how the answer reads.

    `run` yields figures as they are found, by what they are of; each is shown and recorded at once. `render` gives the
    Markdown of a page from what was recorded, pictures by way of `keep`. `show` gives a figure as text for a terminal,
    and `headline` names the one by which two records are compared.
    """

    name: str
    text: str | None  # the module's docstring, whose first line describes it
    run: Callable[[Namespace], Iterator[Figures]]
    render: Callable[[Records, Keep], Iterator[str]]
    options: dict[str, dict] = field(default_factory=dict)
    show: Callable[[str, dict], str] = summary
    headline: str = ""
    device: str = "cpu"  # where there is no such option

    def settings(self, arguments: list[str] | None = None) -> Namespace:
        everywhere = {"minutes": {}, "out": {}, **({"compare": {}} if self.headline else {})}
        return settings(self.name, self.text or "", {**self.options, **everywhere}, arguments, self.device)

    def record(self, figures: Figures, options: Namespace, known: Iterable[str] = ()) -> Path:
        """Keep them in the folder of the options; `known` are those that this run has recorded before."""
        return measure.record(self.name, figures, options.out, options.device, known)

    def execute(self, options: Namespace) -> None:
        """Run; show and record each figure when it is found."""
        known: list[str] = []
        for figures in self.run(options):
            status()
            for key, found in figures.items():
                print(self.show(key, found), flush=True)
            self.record(figures, options, known)
            known += figures

    def main(self, arguments: list[str] | None = None) -> None:
        options = self.settings(arguments)
        if self.headline and options.compare:
            print("\n".join(self.compared(measure.recorded(options.compare), Records(options.out)[self.name])))
            return
        self.execute(options)
        print(f"\nrecorded in {options.out / self.name}.json")

    def compared(self, before: Figures, after: Figures) -> list[str]:
        """A table of two records: what was found of each, and the later over the earlier."""
        rows = []
        for key in {**before, **after}:
            pair = [record.get(key, {}).get(self.headline) for record in (before, after)]
            pair = [each[1] if isinstance(each, list) else each for each in pair]  # the median of three quartiles
            numbers = [each for each in pair if isinstance(each, (int, float))]
            ratio = f"{numbers[1] / numbers[0]:.3f}" if len(numbers) == 2 and numbers[0] else ""
            rows.append([key, *(number(each, ".4g") for each in pair), ratio])
        return table([self.name, "before", "after", "ratio"], rows)


# ------------------------------------------------------------------------------------------------------------ goals


@dataclass(frozen=True)
class Goal:
    """A number that was wanted, and what was reached: a number, or why there is none."""

    text: str
    wanted: float | str
    reached: float | str
    at_most: bool = False
    note: str = ""
    ours_ms: list[float] | None = None
    theirs_ms: list[float] | None = None
    predicted_ms: float | None = None

    @property
    def yes(self) -> bool:
        if isinstance(self.reached, str) or isinstance(self.wanted, str):
            return False
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted

    def figures(self, section: str) -> dict:
        """As JSON, which has no infinity and no NaN."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        for name in ("wanted", "reached"):
            if isinstance(found[name], float) and not math.isfinite(found[name]):
                found[name] = str(found[name])
        return {**found, "yes": self.yes, "section": section}


Section = Callable[[Namespace], Iterable[Goal]]
TO_ITS_END = "measured to its end"


def run_sections(sections: Mapping[str, Section], options: Namespace) -> Iterator[Figures]:
    """The goals of each section asked for; a section that raises has one more, which was not reached."""
    for name in options.section or sections:
        if measure.now() > options.until:
            return
        try:
            for goal in sections[name](options):
                yield {goal.text: goal.figures(name)}
        except Exception as error:
            failed = Goal(f"{name}: {TO_ITS_END}", 1, measure.failure(error, 500))
            yield {failed.text: failed.figures(name)}


def goals_experiment(name: str, text: str | None, sections: Mapping[str, Section], **more) -> Experiment:
    """An experiment whose figures are goals, section by section."""

    def run(options: Namespace) -> Iterator[Figures]:
        return run_sections(sections, options)

    def render(records: Records, keep: Keep) -> Iterator[str]:
        yield from [f"`python -m benchmarks.{name}`:", ""]
        yield from table(*goal_rows(records[name]))

    options = {"section": {"choices": list(sections)}, **more.pop("options", {})}
    given = {"run": run, "render": render, **more}
    return Experiment(name, text, options=options, show=show_goal, headline="reached", **given)


def limit_of(goal: dict) -> str:
    return f"{'≤' if goal['at_most'] else '≥'} {number(goal['wanted'], 'g')}"


def text_of(goal: dict) -> str:
    return goal["text"] + (f" ({goal['note']})" if goal.get("note") else "")


def show_goal(key: str, goal: dict) -> str:
    """Wanted, reached and times in a line."""
    times = [f"{name} {spread(goal[f'{name}_ms'], 2)} ms" for name in ("ours", "theirs") if goal.get(f"{name}_ms")]
    times += [f"predicted {goal['predicted_ms']:.2f} ms"] if goal.get("predicted_ms") else []
    line = f"{'yes' if goal['yes'] else 'no':4}{limit_of(goal):8} {number(goal['reached'], '.3g'):8} {text_of(goal)}"
    return "   ".join([line, ", ".join(times)]).rstrip()


def goal_rows(goals: Figures) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table; with times, where some were recorded."""
    head, rows = ["", "goal", "reached", ""], []
    timed = any("ours_ms" in goal for goal in goals.values())
    for goal in goals.values():
        row = [text_of(goal), limit_of(goal), number(goal["reached"], ".3g"), "✓" if goal["yes"] else "not reached"]
        if timed:
            ours, theirs = (goal.get(name, [None] * 3)[1] for name in ("ours_ms", "theirs_ms"))
            row += [number(each, ".2f") for each in (ours, theirs, goal.get("predicted_ms"))]
        rows.append(row)
    return head + ["ours", "theirs", "predicted"] * timed, rows
