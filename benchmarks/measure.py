"""What every benchmark needs: timings in turn, peak memory, processes with limits, and a record of the machine."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def wait() -> None:
    """Until a GPU has done all that it was given, if one is in use: what is timed is then over."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call, to its very end."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def paired(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, warmup: int = 3) -> dict:
    """Times of two functions, called in turn so that both meet the same noise: ratio and milliseconds, with quartiles.

    Which of the two goes first alternates.
    """
    for _ in range(warmup):
        ours(), theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(repeats):
        for name, run in (("ours", ours), ("theirs", theirs)) if repeat % 2 else (("theirs", theirs), ("ours", ours)):
            times[name].append(seconds_of(run))
    return compared(times["ours"], times["theirs"])


def in_turn(runs: dict[str, Callable[[], object]], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of several functions, called in turn so that all meet the same noise, in another order each round.

    Else each would always find the caches as the same other one leaves them. One that has used up `seconds` drops out
    of later rounds, but not before its third turn. All are warm already.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            if len(times[name]) < 3 or sum(times[name]) < seconds:
                times[name].append(seconds_of(runs[name]))
    return times


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


def cost(run: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds of a call, and the MiB by which it raised the memory in use at its highest.

    On a GPU that is what PyTorch's allocator gave out. On a CPU it is resident memory, by the kernel's own high-water
    mark (VmHWM, reset through /proc/self/clear_refs), which misses no short peak as sampling would; what the allocator
    holds back from earlier calls is first returned, else the call would reuse it unseen. None where not on Linux.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = seconds_of(run)
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmHWM")
    except (OSError, AttributeError):
        before = None
    seconds = seconds_of(run)
    return seconds, None if before is None else (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def isolated(function: Callable[..., dict], *arguments, seconds: float, gib: float) -> dict:
    """What function(progress, *arguments) returns, run in a process of its own that is killed if it needs too much.

    The function calls progress(figures, seconds) before each step: this keeps the figures so far, which survive the
    process, and restarts the clock with a limit for that step. Its end, if not its own, is told as figures["failure"]:
    "over 12 GiB" of resident memory, "over 60 s" for a step, or the exception.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not once a process
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(("attngraph", "benchmarks."))])
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        figures = _watched(process, ours, seconds, gib)
        if not figures.get("failure", "").startswith("over "):
            process.join(10)  # ends by itself
        return figures
    finally:
        process.kill()
        process.join()


def _report(pipe: Connection, function: Callable[..., dict], arguments: tuple) -> None:
    """In the new process: run the function, and send its progress, then its result or its exception."""

    gc.freeze()  # what was imported is no garbage: collections are short

    def progress(figures: dict, seconds: float) -> None:
        pipe.send(("step", figures, seconds))

    try:
        pipe.send(("end", function(progress, *arguments), 0))
    except Exception as error:
        text = " ".join(str(error).split())
        pipe.send(("failed", f"{type(error).__name__}: {text[:300]}", 0))


def _watched(process: multiprocessing.Process, pipe: Connection, seconds: float, gib: float) -> dict:
    """The figures that a process sends, until it ends or passes a limit."""
    figures: dict = {}
    started, resident = time.monotonic(), psutil.Process(process.pid)
    while True:
        try:
            if pipe.poll(0.01):
                kind, sent, limit = pipe.recv()
                if kind == "end":
                    return sent
                if kind == "failed":
                    return {**figures, "failure": sent}
                figures, seconds, started = sent, limit, time.monotonic()
            elif resident.memory_info().rss > gib * 2**30:
                return {**figures, "failure": f"over {gib:g} GiB"}
            elif time.monotonic() - started > seconds:
                return {**figures, "failure": f"over {seconds:g} s"}
        except (EOFError, psutil.NoSuchProcess):
            process.join()
            return {**figures, "failure": f"ended by itself, exit code {process.exitcode}"}


def machine(device: str = "cpu") -> dict:
    """Where this was measured, and with which versions."""
    found = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in ("numba", "triton", "torch-geometric"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.device(device).type == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
        found["gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return found


def _processor() -> str:
    """As it calls itself, where that can be told."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(name: str, figures: dict, folder: Path = RESULTS, device: str = "cpu") -> Path:
    """Keep the figures of some sections under benchmarks/results, each with its machine, beside the other sections."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    new = {section: {**found, "machine": machine(device)} for section, found in figures.items()}
    path.write_text(json.dumps({**earlier, **new}, indent=2) + "\n")
    return path
