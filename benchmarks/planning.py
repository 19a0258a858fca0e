"""What it costs to plan a graph: python -m benchmarks.planning

Seconds and MiB of `plan`, from the graph to its layouts, each in a process of its own; a graph is planned once, however
often it runs. FlexAttention's counterpart is its block mask, which benchmarks/attention.py times as `prepare`.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from attngraph import Causal, Chunks, Global, Machine, Prefix, Random, Window, parse, plan
from benchmarks.measure import RESULTS, cost, isolated, quartiles, record, spread

NAME = "planning"
GRAPHS = {
    "window": Window(256, 0),
    "window + sinks": Causal() & (Window(256, 0) | Prefix(4)),
    "BigBird": Window(192, 192) | Global(range(64)) | Random(3),
    "mixed": Window(256, 0) | Prefix(4) | Random(8),
    "causal chunks": Causal() & Chunks(512),
}
SIZES = (4096, 32_768, 262_144, 1_000_000)
REPEATS = 3


def alone(progress, text: str, n: int, device: str, repeats: int) -> dict:
    """Each time from nothing: `plan` keeps nothing, as `attend` does."""
    Machine.here(device)  # measured once on a machine, not once a plan

    def once(n: int = n) -> None:
        plan(parse(text), n, n, heads=8, head_dim=64, device=device)

    once(1000)  # what is imported and compiled at the first plan
    seconds, mib = zip(*(cost(once) for _ in range(repeats)), strict=True)
    return {"seconds": list(seconds), "mib": list(mib)}


def run(options: argparse.Namespace) -> Path:
    path = options.out / f"{NAME}.json"
    for name, graph in GRAPHS.items():
        for n in SIZES:
            if time.monotonic() > options.until:
                break
            found = isolated(alone, graph.text, n, options.device, options.repeats, seconds=120.0, gib=12.0)
            told: dict = {"name": name, "graph": graph.text, "n": n}
            if "failure" in found:
                told["failure"] = found["failure"]
            else:
                told |= {"s": quartiles(found["seconds"]), "mib": None if None in found["mib"] else max(found["mib"])}
            print(f"plan {name}, {n:,} nodes: {told.get('failure') or spread(told['s'], 3)} s")
            path = record(NAME, {f"{name}, {n}": told}, options.out, options.device)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="plans of each graph and size")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    options.until = math.inf
    print(f"recorded in {run(options)}")


if __name__ == "__main__":
    main()
