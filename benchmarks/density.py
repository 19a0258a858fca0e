"""Which backend wins, by density and size: bands and scattered edges, forward + backward, beside the planner's choice.

    python -m benchmarks.density        a minute on two cores; recorded in results/density.json

Batch 1, 4 heads of dimension 64. A backend that is expected to need more than `--limit` seconds a call, by the time it
took at a smaller size with the same share of pairs, is not tried.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
import torch

from attngraph import EdgeList, Full, Graph, Window, attend, plan
from benchmarks import pictures
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.internals import backends_of
from benchmarks.measure import Progress, in_turn, isolated, milliseconds, now, ratios, seconds_of
from benchmarks.page import Keep, aligned, folded, picture, spread, status, table
from benchmarks.peers import PHASES, call_of

NAME = "density"
BACKENDS = ("dense", "tiles", "rows")
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # shares of all pairs
SIZES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (1024, 2048, 4096, 8192, 16_384)}
HEADS, DIM = 4, 64


def band(n: int, density: float) -> Graph | None:
    """The window nearest to this share of all pairs; all of them are Full. None where the narrowest has far more."""
    if density == 1:
        return Full()
    width = round(n * (1 - math.sqrt(1 - density)) - 0.5)  # n + 2wn - w(w + 1) edges
    return None if density * n < 0.6 else Window(max(width, 0), max(width, 0))


def scattered(n: int, density: float) -> Graph:
    """Edges drawn evenly among all pairs."""
    if density == 1:
        pair = np.arange(n * n)
    else:
        pair = np.unique(np.random.default_rng(0).integers(n * n, size=round(density * n * n)))
    return EdgeList(np.stack([pair % n, pair // n]), size=n)


KINDS = {"a band": band, "scattered edges": scattered}


def cells(progress: Progress, options: Namespace) -> dict:
    """Of each kind of graph, by size and density: the times of each backend in turn, and of the planner's choice."""
    device = torch.device(options.device)
    found: dict = {kind: {"cells": [], "heads": HEADS, "dim": DIM, "phase": PHASES[1]} for kind in KINDS}
    expected: dict[tuple, float] = {}  # seconds of a call at the next size
    took = 0.0
    for n in SIZES[device.type]:
        if 4 * took > options.until - now():  # as long as the last size, and four times the pairs
            break
        begun = now()
        for kind, density in product(KINDS, DENSITIES):
            progress(found, 300.0)
            graph = KINDS[kind](n, density)
            if graph is not None:
                found[kind]["cells"].append(cell(graph, n, density, expected, kind, options))
        took = now() - begun
    return found


def cell(graph: Graph, n: int, density: float, expected: dict[tuple, float], kind: str, options: Namespace) -> dict:
    """One graph at one size."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    sides = [torch.randn(1, HEADS, n, DIM, device=options.device, dtype=dtype, requires_grad=at < 3) for at in range(4)]
    own: dict = {"n": n, "density": density, "edges": graph.num_edges(n, n), "failures": {}}
    calls = {}
    for backend in ("auto", *BACKENDS):
        if expected.get((kind, density, backend), 0.0) > options.limit:
            own["failures"][backend] = f"expected over {options.limit:g} s a call"
            continue
        made = plan(graph, n, n, heads=HEADS, head_dim=DIM, device=options.device, backend=backend)
        calls[backend] = call_of(PHASES[1], partial(attend, graph=made), sides)
        calls[backend]()
        expected[kind, density, backend] = 4 * seconds_of(calls[backend])
        if backend == "auto":
            own["chosen"] = backends_of(made)
    times = in_turn(calls, options.repeats, seconds=options.limit / 2)
    own["ms"] = {backend: milliseconds(each) for backend, each in times.items()}
    best = min((backend for backend in BACKENDS if backend in times), key=lambda backend: own["ms"][backend][1])
    own["regret"] = ratios(times["auto"], times[best])
    return own


def run(options: Namespace) -> Iterator[Figures]:
    """All cells that there is time for."""
    status(NAME)
    found = isolated(cells, options, seconds=300.0, gib=options.memory)
    if "failure" in found:
        print(f"{NAME}: {found.pop('failure')}")
    yield found


def show(kind: str, section: dict) -> str:
    """A row a size, a column a density: who is fastest, how far ahead of the next, and auto's time over its."""
    found, rows = section["cells"], []
    for n in sorted({cell["n"] for cell in found}):
        row = {cell["density"]: cell for cell in found if cell["n"] == n}
        cells = ["{} {:.1f}, {:.2f}".format(*fastest(cell), cell["regret"][1]) for cell in row.values()]
        by_density = dict(zip(row, cells, strict=True))
        rows.append([str(n), *(by_density.get(density, "") for density in DENSITIES)])
    title = f"\n{kind}: the fastest backend, times as fast as the next; and auto's time over its"
    return "\n".join([title, *aligned(["N", *(f"{density:.1%}" for density in DENSITIES)], rows)])


def fastest(cell: dict) -> tuple[str, float]:
    """The fastest named backend, and how many times as fast as the next one that was tried."""
    order = sorted((ms[1], backend) for backend, ms in cell["ms"].items() if backend != "auto")
    return order[0][1], order[1][0] / order[0][0] if len(order) > 1 else math.inf


def regrets(records: Records) -> list[tuple[str, list[float]]]:
    """auto's time over that of the best backend, of each cell."""
    return [
        (f"{kind}, {cell['density']:.1%}, N = {cell['n']:,}", cell["regret"])
        for kind, section in records[NAME].items()
        for cell in section["cells"]
    ]


def render(records: Records, keep: Keep) -> Iterator[str]:
    """Which backend wins."""
    found = records[NAME]
    if not found:
        return
    one = next(iter(found.values()))
    yield from ["## Which backend wins, by density and size", ""]
    caption = (
        f"the fastest backend of each cell, and how many times as fast as the next one; {one['phase']}, batch 1, "
        f"{one['heads']} heads of dimension {one['dim']}, {'bfloat16' if 'device' in one['machine'] else 'float32'}"
    )
    kinds = {
        kind: [(cell["n"], cell["density"], *fastest(cell)) for cell in section["cells"]]
        for kind, section in found.items()
    }
    yield from picture(keep, "density", pictures.heat_map(kinds), caption)
    rows = []
    for kind, section in found.items():
        for cell in section["cells"]:
            times = {**cell["failures"], **{backend: spread(ms, 2) for backend, ms in cell["ms"].items()}}
            row = [kind, f"{cell['n']:,}", f"{cell['density']:.1%}", f"{cell['edges']:,}"]
            row += [times.get(backend, "") for backend in ("auto", *BACKENDS)]
            rows.append([*row, " + ".join(cell["chosen"])])
    columns = [f"{backend}, ms" for backend in BACKENDS]
    yield from folded(
        "every figure", table(["", "N", "density", "edges", "auto, ms (quartiles)", *columns, "auto is"], rows)
    )


OPTIONS: dict[str, dict] = {"repeats": {"default": 5}, "limit": {"default": 1.0}, "memory": {}, "device": {}}
EXPERIMENT = Experiment(NAME, __doc__, run, render, OPTIONS, show)

if __name__ == "__main__":
    EXPERIMENT.main()
