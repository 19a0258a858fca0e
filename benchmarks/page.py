"""Markdown: the tables and paragraphs that pages and terminals show of a record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from textwrap import shorten

Keep = Callable[[str, bytes], str]  # keeps a picture of this name, and gives the target of its link


def spread(three: list[float], digits: int = 3) -> str:
    """Quartiles as text: the median, and how far it varies."""
    return f"{three[1]:.{digits}f} ({three[0]:.{digits}f} … {three[2]:.{digits}f})"


def number(value: object, text: str = ".1f") -> str:
    """A number in this format; nothing for None; a text, such as a failure, on one short line."""
    if isinstance(value, (int, float)):
        return format(value, text if isinstance(value, float) else "")
    return "" if value is None else shorten(str(value), 120, placeholder=" …")


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def aligned(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The same for a terminal."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return ["  ".join(line).rstrip() for line in padded]


def prose(paragraph: str) -> list[str]:
    return [" ".join(paragraph.split()), ""]


def picture(keep: Keep, name: str, content: bytes, caption: str) -> list[str]:
    return [f"![{caption}]({keep(name, content)})", "", f"*{caption}*", ""]


def folded(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{summary}</summary>", "", *lines, "</details>", ""]


def described(machine: dict) -> str:
    """A machine and its versions, in a line."""
    own = machine.get("device", machine["processor"])
    where = f"{own}, {machine['gib']} GiB" + ("" if "device" in machine else f", {machine['threads']} threads")
    shown = ("driver", "cuda", "torch", "python", "numba", "triton", "torch-geometric")
    versions = ", ".join(f"{name} {machine[name]}" for name in shown if name in machine)
    return f"{where}; {versions}; {machine['date']}"


def status(text: str = "") -> None:
    """What is running, on a line of the terminal that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"{text:78}", end="\r", file=sys.stderr, flush=True)
