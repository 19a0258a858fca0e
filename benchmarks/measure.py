"""The only place that measures: times in turn, peak memory, processes with limits, the machine, and the record."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

# Times and memory are measured as `attngraph.compare` measures them.
from attngraph.measuring import cost, failure, in_turn, milliseconds, quartiles, ratios, seconds_of  # noqa: F401

RESULTS = Path(__file__).parent / "results"
Progress = Callable[[dict, float], None]  # of an isolated function: figures so far, and seconds for the next step


def now() -> float:
    """Seconds by a clock that all processes of a machine share, for deadlines."""
    return time.monotonic()


def cpu_seconds() -> float:
    """Seconds that the processors have worked for this process."""
    return time.process_time()


def paired(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, warmup: int = 3) -> dict:
    """Times of two functions, called in turn: ratio and milliseconds, with quartiles."""
    times = in_turn({"ours": ours, "theirs": theirs}, repeats, warmup=warmup)
    return compared(times["ours"], times["theirs"])


def compared(ours: list[float], theirs: list[float]) -> dict:
    """Median and quartiles of two lists of seconds, and of their ratio pair by pair."""
    return {
        "ratio": ratios(ours, theirs),
        "ours_ms": milliseconds(ours),
        "theirs_ms": milliseconds(theirs),
        "pairs": len(ours),
    }


def on_all_processors(function: Callable[[Any], None], jobs: Sequence[Any]) -> None:
    """Call it with each of the jobs, in processes of their own."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(function, jobs, chunksize=2))


def on_ranks(count: int, function: Callable[[int], Any]) -> list[Any]:
    """What function(rank) returns on each of so many processes of one process group (gloo), one thread each."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_rank, args=(rank, count, port, function, theirs)))
        processes[-1].start()
        pipes.append(ours)
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return found


def _rank(rank: int, count: int, port: int, function: Callable[[int], Any], pipe: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    pipe.send(function(rank))
    dist.destroy_process_group()


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
        pipe.send(("failed", failure(error), 0))


def _watched(process: BaseProcess, pipe: Connection, seconds: float, gib: float) -> dict:
    """The figures that a process sends, until it ends or passes a limit."""
    figures: dict = {}
    started, resident = now(), psutil.Process(process.pid)
    while True:
        try:
            if pipe.poll(0.01):
                kind, sent, limit = pipe.recv()
                if kind == "end":
                    return sent
                if kind == "failed":
                    return {**figures, "failure": sent}
                figures, seconds, started = sent, limit, now()
            elif resident.memory_info().rss > gib * 2**30:
                return {**figures, "failure": f"over {gib:g} GiB"}
            elif now() - started > seconds:
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


def record(
    name: str, figures: dict[str, dict], folder: Path = RESULTS, device: str = "cpu", known: Iterable[str] = ()
) -> Path:
    """Keep figures in folder/name.json, each with its machine, beside what is there already.

    What is there of the same section (`figures[…]["section"]`, where they have one) is replaced, but for the `known`.
    """
    folder.mkdir(exist_ok=True, parents=True)
    path, known = folder / f"{name}.json", set(known)
    sections = {found["section"] for found in figures.values() if "section" in found}
    earlier = recorded(path)
    kept = {key: earlier[key] for key in earlier if key in known or earlier[key].get("section") not in sections}
    new = {key: {**found, "machine": machine(device)} for key, found in figures.items()}
    path.write_text(json.dumps({**kept, **new}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def recorded(path: Path) -> dict[str, dict]:
    """What a file of figures holds; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
