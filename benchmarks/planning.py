"""What it costs to plan a graph: python -m benchmarks.planning

Seconds and MiB of `plan`, from the graph to its layouts, each in a process of its own; a graph is planned once, however
often it runs. FlexAttention's counterpart is its block mask, which benchmarks/attention.py times as `prepare`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import groupby
from textwrap import shorten

from attngraph import Causal, Chunks, Global, Prefix, Random, Window, parse, plan
from benchmarks import pictures
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import Progress, cost, isolated, now, quartiles
from benchmarks.page import Keep, folded, number, picture, spread, table
from benchmarks.peers import FLEX

NAME = "planning"
GRAPHS = {
    "window": Window(256, 0),
    "window + sinks": Causal() & (Window(256, 0) | Prefix(4)),
    "BigBird": Window(192, 192) | Global(tuple(range(64))) | Random(3),
    "mixed": Window(256, 0) | Prefix(4) | Random(8),
    "causal chunks": Causal() & Chunks(512),
}
SIZES = (4096, 32_768, 262_144, 1_000_000)


def alone(progress: Progress, text: str, n: int, device: str, repeats: int) -> dict:
    """Each time from nothing: `plan` keeps nothing, as `attend` does."""

    def once(n: int = n) -> None:
        plan(parse(text), n, n, heads=8, head_dim=64, device=device)

    once(1000)  # what is imported and compiled at the first plan
    seconds, mib = zip(*(cost(once) for _ in range(repeats)), strict=True)
    return {"seconds": list(seconds), "mib": list(mib)}


def run(options: Namespace) -> Iterator[Figures]:
    for name, graph in GRAPHS.items():
        for n in SIZES:
            if now() > options.until:
                break
            found = isolated(alone, str(graph), n, options.device, options.repeats, seconds=120.0, gib=12.0)
            figures: dict = {"name": name, "graph": str(graph), "n": n}
            if "failure" in found:
                figures["failure"] = found["failure"]
            else:
                mib = None if None in found["mib"] else max(found["mib"])
                figures |= {"s": quartiles(found["seconds"]), "mib": mib}
            yield {f"{name}, {n}": figures}


def row_of(figures: dict) -> list[str]:
    seconds = figures.get("failure") or spread(figures["s"], 4)
    graph = f"`{shorten(figures['graph'], 60, placeholder=' …')}`"
    return [figures["name"], graph, f"{figures['n']:,}", seconds, number(figures.get("mib"))]


def render(records: Records, keep: Keep) -> Iterator[str]:
    """What planning costs, beside FlexAttention's block masks."""
    found = records[NAME]
    if not found:
        return
    by_name = {name: list(each) for name, each in groupby(found.values(), key=lambda each: each["name"])}
    block_masks = [
        (key.split(",")[0], figures["n"], own["prepare_s"])
        for key, figures in records["attention"].items()
        if figures["phase"] == "forward" and "prepare_s" in (own := figures["contestants"].get(FLEX, {}))
    ]
    yield from ["## Planning", "", "Once for a graph, however often it runs:", ""]
    caption = "plan(graph, N, N): seconds with quartiles, and memory, each from nothing"
    yield from picture(keep, "planning", pictures.planning(by_name, block_masks), caption)
    rows = [row_of(figures) for sizes in by_name.values() for figures in sizes]
    rows += [[f"FlexAttention's block mask, {name}", "", f"{n:,}", f"{s:.4f}", ""] for name, n, s in block_masks]
    yield from folded("every figure", table(["", "graph", "N", "seconds (quartiles)", "MiB at most"], rows))


EXPERIMENT = Experiment(NAME, __doc__, run, render, {"repeats": {"default": 3}, "device": {}}, headline="s")

if __name__ == "__main__":
    EXPERIMENT.main()
