"""What every benchmark needs: fair pairs of timings, and a record of the machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def paired(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, warmup: int = 3) -> dict:
    """Times of two functions, called in turn so that both meet the same noise: ratio and milliseconds, with quartiles.

    Which of the two goes first alternates.
    """
    for _ in range(warmup):
        ours(), theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(repeats):
        for name, run in (("ours", ours), ("theirs", theirs)) if repeat % 2 else (("theirs", theirs), ("ours", ours)):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return compared(times["ours"], times["theirs"])


def compared(ours: list[float], theirs: list[float]) -> dict:
    """Median and quartiles of two lists of seconds, and of their ratio pair by pair."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "ratio": quartiles(ratios),
        "ours_ms": quartiles([1000 * seconds for seconds in ours]),
        "theirs_ms": quartiles([1000 * seconds for seconds in theirs]),
        "pairs": len(ratios),
    }


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def spread(three: list[float], digits: int = 3) -> str:
    """Quartiles as text: the median, and how far it varies."""
    return f"{three[1]:.{digits}f} ({three[0]:.{digits}f} … {three[2]:.{digits}f})"


def machine() -> dict:
    """Where this was measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def record(name: str, figures: dict) -> Path:
    """Keep the figures of some sections under benchmarks/results, each with its machine, beside the other sections."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    new = {section: {**found, "machine": machine()} for section, found in figures.items()}
    path.write_text(json.dumps({**earlier, **new}, indent=2) + "\n")
    return path
