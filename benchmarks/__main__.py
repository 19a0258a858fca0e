"""Dense against sparse on this machine, as one page: python -m benchmarks [--device cuda], or make bench

Writes runs/bench/report.html and report.md, whole in themselves, and the records that they are made of beside them.
Each section has its share of the time; what there was no time for is named in the report. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch

from benchmarks import attention, density, planning, quality, report, steps

WORKLOADS = (
    "window + sinks", "BigBird", "power law", "neighbourhood", "documents", "uniform", "mixed", "clusters",
    "small world", "window", "causal",
)  # fmt: skip
SIZES = {"cpu": [512, 2048, 8192], "cuda": [2048, 8192, 32_768, 131_072]}

# Of the time, by when a section begins nothing new.
SECTIONS = {
    "steps": (steps.run, 0.10),
    "planning": (planning.run, 0.20),
    "quality": (quality.run, 0.42),
    "density": (density.run, 0.56),
    "crossover": (attention.run, 0.86),
}


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", choices=list(SIZES), help="where to measure; by default %(default)s")
    add("--minutes", type=float, default=10.0, help="about how long it may take, or inf; by default %(default)g")
    add("--section", action="append", choices=list(SECTIONS), help="a part of the report; all by default")
    add("--workload", action="append", choices=WORKLOADS, help="a graph for time against size; all, if there is time")
    add("--n", type=int, nargs="+", help=f"numbers of nodes for these; by default {SIZES}")
    add("--steps", type=int, default=250, help="of training, to compare quality; by default %(default)s")
    add("--seeds", type=int, default=2, help="runs of each graph, to compare quality; by default %(default)s")
    add("--text", help="what to train on, to compare quality; by default that of examples/gpt.py")
    add("--limit", type=float, default=1.0, help="seconds a call, and about that for all turns; by default %(default)g")
    add("--repeats", type=int, default=7, help="turns of each contestant; by default %(default)s")
    add("--memory", type=float, default=18.0, help="GiB that all contestants may take; by default %(default)g")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of report and records; by default %(default)s")
    given = parser.parse_args(arguments)
    for name in ("minutes", "limit", "memory", "steps", "seeds", "repeats"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name} must be more than 0 (got {getattr(given, name)})")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none; --device cpu is here")
    if given.n and min(given.n) < 16:
        parser.error(f"--n must be 16 nodes or more (got {min(given.n)})")
    return given


def main(arguments: list[str] | None = None) -> None:
    options = settings(arguments)
    options.peer, options.phase, options.quick = None, "both", False
    options.workload, options.n = options.workload or list(WORKLOADS), options.n or SIZES[options.device]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").touch()
    except OSError as error:
        raise SystemExit(
            f"{options.out} must be a folder to write to ({error.strerror}); --out names another"
        ) from None
    begun = time.monotonic()
    try:
        measure(options, begun)
    except KeyboardInterrupt:
        print("\nstopped; the report has what was recorded before")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"\nafter {(time.monotonic() - begun) / 60:.1f} minutes, load {busy:.1f}: {report.write(options.out)}")


def measure(options: argparse.Namespace, begun: float) -> None:
    """Section after section, each in its share of the time."""
    for name, (run, share) in SECTIONS.items():
        if options.section and name not in options.section:
            continue
        options.until = begun + 60 * options.minutes * share
        print(f"\n{name}\n{'-' * len(name)}", flush=True)
        run(options)


if __name__ == "__main__":
    main()
