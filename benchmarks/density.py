"""Which backend wins, by density and size: bands and scattered edges, forward + backward, beside the planner's choice.

    python -m benchmarks.density        a minute on two cores; recorded in results/density.json

Batch 1, 4 heads of dimension 64. A backend that is expected to need more than `--limit` seconds a call, by the time it
took at a smaller size with the same share of pairs, is not tried.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

import attngraph
from attngraph import EdgeList, Full, Graph, Machine, Window, attend
from benchmarks.attention import PHASES, call_of, status
from benchmarks.measure import RESULTS, in_turn, isolated, quartiles, record, seconds_of

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


def cells(progress, options) -> dict:
    """Of each kind of graph, by size and density: the times of each backend in turn, and of the planner's choice."""
    device = torch.device(options.device)
    Machine.here(device)  # measured once on a machine, not within a cell
    found: dict = {kind: {"cells": [], "heads": HEADS, "dim": DIM, "phase": PHASES[1]} for kind in KINDS}
    expected: dict[tuple, float] = {}  # seconds of a call at the next size
    took = 0.0
    for n in SIZES[device.type]:
        if 4 * took > options.until - time.monotonic():  # as long as the last size, and four times the pairs
            break
        begun = time.monotonic()
        for kind, density in product(KINDS, DENSITIES):
            progress(found, 300.0)
            graph = KINDS[kind](n, density)
            if graph is not None:
                found[kind]["cells"].append(cell(graph, n, density, expected, kind, options))
        took = time.monotonic() - begun
    return found


def cell(graph: Graph, n: int, density: float, expected: dict[tuple, float], kind: str, options) -> dict:
    """One graph at one size."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    sides = [torch.randn(1, HEADS, n, DIM, device=options.device, dtype=dtype, requires_grad=at < 3) for at in range(4)]
    own: dict = {"n": n, "density": density, "edges": graph.num_edges(n, n), "failures": {}}
    calls = {}
    for backend in ("auto", *BACKENDS):
        if expected.get((kind, density, backend), 0.0) > options.limit:
            own["failures"][backend] = f"expected over {options.limit:g} s a call"
            continue
        made = attngraph.plan(graph, n, n, heads=HEADS, head_dim=DIM, device=options.device, backend=backend)
        calls[backend] = call_of(PHASES[1], lambda q, k, v, made=made: attend(q, k, v, made), sides)
        calls[backend]()
        expected[kind, density, backend] = 4 * seconds_of(calls[backend])
        if backend == "auto":
            own["chosen"] = [part.backend for part in made.parts]
    times = in_turn(calls, options.repeats, options.limit / 2)
    own["ms"] = {backend: quartiles([1000 * value for value in each]) for backend, each in times.items()}
    best = min((times[backend] for backend in BACKENDS if backend in times), key=lambda each: quartiles(each)[1])
    own["regret"] = quartiles([ours / theirs for ours, theirs in zip(times["auto"], best, strict=False)])
    return own


def run(options: argparse.Namespace) -> Path:
    """All cells that there is time for."""
    status("density")
    found = isolated(cells, options, seconds=300.0, gib=options.memory)
    if "failure" in found:
        print(f"density: {found.pop('failure')}")
    for kind, section in found.items():
        show(kind, section["cells"])
    return record(NAME, found, options.out, options.device)


def show(kind: str, found: list[dict]) -> None:
    """Print a table: a row a size, a column a density: who wins, how far ahead of the next, and the regret."""
    status()
    print(f"\n{kind}: the fastest backend, times as fast as the next; and auto's time over its")
    print(f"{'N':>8}" + "".join(f"{density:>20.1%}" for density in DENSITIES))
    for n in sorted({cell["n"] for cell in found}):
        row = {cell["density"]: cell for cell in found if cell["n"] == n}
        told = []
        for density in DENSITIES:
            if density not in row:
                told.append("")
                continue
            winner, ahead = winner_of(row[density])
            told.append(f"{winner} {ahead:.1f}, {row[density]['regret'][1]:.2f}")
        print(f"{n:>8}" + "".join(f"{text:>20}" for text in told))


def winner_of(cell: dict) -> tuple[str, float]:
    """The fastest named backend, and how many times as fast as the next one that was tried."""
    order = sorted((ms[1], backend) for backend, ms in cell["ms"].items() if backend != "auto")
    return order[0][1], order[1][0] / order[0][0] if len(order) > 1 else math.inf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds a call, and about that for all turns")
    parser.add_argument("--memory", type=float, default=18.0, help="GiB of resident memory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_arguments(parser)
    options = parser.parse_args()
    options.until = math.inf
    print(f"\nrecorded in {run(options)}")


if __name__ == "__main__":
    main()
