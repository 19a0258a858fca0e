"""Dense against sparse on this machine, as one page: python -m benchmarks [--device cuda], or make bench

    python -m benchmarks                    the report, in about ten minutes
    python -m benchmarks --quick            some of it, in a minute and a half
    python -m benchmarks --graph "Causal() & Window(64, 0)" --nodes 1024 4096      the same of a graph of your own
    python -m benchmarks NAME [options]     one experiment; --help lists its options; the same as -m benchmarks.NAME

Writes runs/bench/report.html and report.md, whole in themselves, and the records that they are made of beside them.
Each section has its share of the time; what there was no time for is named in the report. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import math
import os
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

from benchmarks import attention, density, planning, quality, report, steps
from benchmarks.experiment import Experiment, settings
from benchmarks.measure import now
from benchmarks.peers import FLEX, PEERS, PYG_COMPILED

# Every experiment, each in a module of its name: they need packages that the report does not.
EXPERIMENTS = {
    "attention": "graphs of every kind beside SDPA, FlexAttention, PyG and padded tables",
    "density": "which backend wins, by density and size, beside the planner's choice",
    "planning": "time and memory of plan()",
    "steps": "training steps on dense and on sparse graphs",
    "quality": "validation loss against the edges that a graph keeps",
    "overhead": "attend() over bare SDPA, small sizes",
    "goals": "what is to be reached on a CPU",
    "examples": "what the examples reach",
    "dynamic": "connectivity that is computed from the data",
    "devices": "what a graph over several processes takes",
    "train_gpt": "nanoGPT's recipe, the demo's, the bigram",
    "compilers": "a tile's product by compilers of vector code",
    "floors": "what a GPU must take at least, by arithmetic",
    "gpu": "what is to be reached on a GPU",
}
# Those of the report, and of its time, by when each begins nothing new.
REPORT = {
    "steps": (steps.EXPERIMENT, 0.10),
    "planning": (planning.EXPERIMENT, 0.20),
    "quality": (quality.EXPERIMENT, 0.42),
    "density": (density.EXPERIMENT, 0.56),
    "crossover": (attention.EXPERIMENT, 0.86),
}
SIZES = {"cpu": [512, 2048, 8192], "cuda": [2048, 8192, 32_768, 131_072]}
ORDER = (
    "window + sinks", "BigBird", "power law", "neighbourhood", "documents", "uniform", "mixed", "clusters",
    "small world", "window", "causal",
)  # fmt: skip
QUICK, QUICK_MINUTES = ("window + sinks", "power law"), 1.2
OPTIONS: dict[str, dict] = {
    "device": {},
    "minutes": {"default": 10.0, "help": "about how long it may take, or inf"},
    "section": {"choices": list(REPORT)},
    "workload": {**attention.OPTIONS["workload"], "help": "a graph for time against size; all, if there is time"},
    "graph": attention.OPTIONS["graph"],
    "n": {**attention.OPTIONS["n"], "help": f"numbers of nodes for these; by default {SIZES}"},
    "quick": {"action": "store_true", "help": "two graphs, or yours, without FlexAttention and PyG compiled: 90 s"},
    **{name: quality.OPTIONS[name] for name in ("steps", "seeds", "text")},
    "limit": {"default": 1.0},
    "repeats": {"default": 7},
    "memory": {},
    "out": {"default": Path("runs/bench"), "help": "folder of report and records"},
}


def experiment(name: str) -> Experiment:
    return import_module(f"benchmarks.{name}").EXPERIMENT


def report_settings(arguments: list[str] | None = None) -> Namespace:
    """Of the report: the options of all its experiments."""
    each = "; ".join(f"{name}: {text}" for name, text in EXPERIMENTS.items())
    title = (__doc__ or "").split("\n")[0]
    options = settings("", f"{title}. Or one experiment, python -m benchmarks NAME: {each}", OPTIONS, arguments)
    sizes, peer = SIZES[options.device], None
    if options.graph or options.quick:  # of the other sections, none is about one graph, and none is quick
        options.section = options.section or ["crossover"]
    if options.quick:
        options.minutes = min(options.minutes, QUICK_MINUTES)
        options.workload, sizes = options.workload or list(QUICK), sizes[:2]
        peer = [peer.name for peer in PEERS if peer.name not in (FLEX, PYG_COMPILED)]  # which compile for each size
    options.workload = options.workload or list(ORDER)
    options.n = options.n or (None if options.graph else sizes)  # a graph of one's own may know its size
    return Namespace(**vars(options), peer=peer, gemm=None)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in EXPERIMENTS:
        experiment(arguments[0]).main(arguments[1:])
        return
    options = report_settings(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").touch()
    except OSError as error:
        raise SystemExit(
            f"{options.out} must be a folder to write to ({error.strerror}); --out names another"
        ) from None
    begun = now()
    try:
        measure(options)
    except KeyboardInterrupt:
        print("\nstopped; the report has what was recorded before")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    print(f"\nafter {(now() - begun) / 60:.1f} minutes, load {busy:.1f}: {report.write(options.out)}")


def measure(options: Namespace) -> None:
    """Section after section, each in its share of the time."""
    begun = now()
    for name, (each, share) in REPORT.items():
        if not options.section or name in options.section:
            options.until = begun + 60 * options.minutes * share
            print(f"\n{name}\n{'-' * len(name)}", flush=True)
            each.execute(options)


if __name__ == "__main__":
    main()
