"""Times in turn and peak memory: what `compare` and the benchmarks measure by."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call, to its very end: by CUDA events, if a GPU is in use."""
    if torch.cuda.is_initialized():
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, warmup: int = 0, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of several functions, called in turn so that all meet the same noise, in another order each round.

    Else each would always find the caches as the same other one leaves them; every second round has the order of the
    one before, reversed, so that of two functions each goes first equally often. One that has used up `seconds` drops
    out of later rounds, but not before its third turn.
    """
    for run in [*runs.values()] * warmup:
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    chance, order = random.Random(0), list(runs)
    for repeat in range(repeats):
        order = order[::-1] if repeat % 2 else chance.sample(order, len(order))
        for name in order:
            if len(times[name]) < 3 or sum(times[name]) < seconds:
                times[name].append(seconds_of(runs[name]))
    return times


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Quartiles of a / b, turn by turn, as far as both had turns."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=False)])


def milliseconds(seconds: list[float]) -> list[float]:
    """Quartiles."""
    return quartiles([1000 * each for each in seconds])


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def cost(run: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds of a call, and the MiB by which it raised the memory in use at its highest.

    On a GPU that is what PyTorch's allocator gave out. On a CPU it is resident memory, by the kernel's own high-water
    mark (VmHWM, reset through /proc/self/clear_refs), which misses no short peak as sampling would; what the allocator
    holds back from earlier calls is first returned, else the call would reuse it unseen. None where not on Linux.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = seconds_of(run)
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmHWM")
    except (OSError, AttributeError):
        return seconds_of(run), None
    seconds = seconds_of(run)
    return seconds, (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def failure(error: Exception, most: int = 300) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"
