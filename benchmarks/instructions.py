"""Tiles under each set of vector instructions of this CPU, beside PyTorch's attention and its matrix product.

Each set has a process of its own, in which PyTorch, its libraries and Numba know no other. A section of
`benchmarks.goals`: python -m benchmarks.goals --section window
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

import torch

from attngraph import Window, attend
from benchmarks.attention import GEMM, measured
from benchmarks.experiment import Goal
from benchmarks.measure import in_turn, ratios
from benchmarks.peers import AUTO, FLEX, PHASES, SDPA_CAUSAL, SDPA_MASK

N, LEFT, HEADS, DIM = 8192, 256, 8, 64
NAME = f"Window({LEFT}, 0), N = {N}"
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "",
}  # fmt: skip
FORWARD_FLOP, BACKWARD_FLOP = 4, 10  # for each edge and dimension: two products, and five


class Wanted(NamedTuple):
    """Times as fast as each, and shares of a matrix product's rate, forward and backward."""

    over_mask: tuple[float, float]
    over_causal: tuple[float, float]
    over_flex: float
    share: tuple[float, float]


WANTED = {
    "AVX-512": Wanted((24, 20), (9, 9), 2.2, (0.60, 0.50)),
    "AVX2": Wanted((30, 28), (13, 13), 2.4, (0.65, 0.55)),
}
DTYPES = {torch.float64: 2.1, torch.bfloat16: 1.1}  # at most how many times float32's time


def figures(repeats: int, limit: float, memory: float) -> dict:
    """Of the set that this process has: what it has over each contestant, its rate over a product's, and dtypes."""
    options = Namespace(
        peer=(AUTO, SDPA_MASK, SDPA_CAUSAL, FLEX), gemm=None, repeats=repeats, limit=limit, memory=memory,
        device="cpu", until=float("inf"),
    )  # fmt: skip
    ((_, by_phase),) = measured("window", [N], options)
    ours = {phase: found["contestants"][AUTO] for phase, found in by_phase.items()}
    if failures := [own["failure"] for own in ours.values() if "failure" in own]:
        return {"failure": failures[0]}
    forward, both = (ours[phase]["ms"][1] / 1000 for phase in PHASES)
    flop = by_phase[PHASES[0]]["edges"] * HEADS * DIM
    gemm = by_phase[PHASES[0]]["gemm_gflops"] * 1e9
    return {
        "over": {
            phase: {name: own.get("over_ours", own.get("failure")) for name, own in found["contestants"].items()}
            for phase, found in by_phase.items()
        },
        "share": [FORWARD_FLOP * flop / forward / gemm, BACKWARD_FLOP * flop / (both - forward) / gemm],
        "dtypes": {str(dtype): times for dtype, times in _dtypes(repeats).items()},
    }


def _dtypes(repeats: int) -> dict[torch.dtype, list[float]]:
    """The time of a step in each dtype, over that of float32."""
    graph, calls = Window(LEFT, 0), {}
    for dtype in (torch.float32, *DTYPES):
        q, k, v = (torch.randn(1, HEADS, N, DIM, dtype=dtype, requires_grad=True) for _ in range(3))
        gradient = torch.randn(1, HEADS, N, DIM, dtype=dtype)
        calls[dtype] = lambda q=q, k=k, v=v, g=gradient: torch.autograd.grad(attend(q, k, v, graph), (q, k, v), g)
    times = in_turn({str(dtype): call for dtype, call in calls.items()}, repeats, warmup=3)
    return {dtype: ratios(times[str(dtype)], times[str(torch.float32)]) for dtype in DTYPES}


def goals(options: Namespace) -> Iterator[Goal]:
    """Under AVX-512, where there is, and under AVX2."""
    here = torch.backends.cpu.get_cpu_capability()
    for name, wanted in WANTED.items():
        if name == "AVX-512" and here != "AVX512":
            continue
        with tempfile.TemporaryDirectory() as folder:
            own = {**AVX2, "NUMBA_CACHE_DIR": folder} if name == "AVX2" and here == "AVX512" else {}
            asked = str(options.repeats), str(options.limit), str(options.memory)
            command = [sys.executable, "-m", "benchmarks.instructions", *asked]
            done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
        last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
        found = json.loads(last) if done.returncode == 0 else {"failure": last[:200]}
        yield from _goals(f"{name}, {NAME}", wanted, found)


def _goals(name: str, wanted: Wanted, found: dict) -> Iterator[Goal]:
    def reached(read) -> float | str:
        figure = found["failure"] if "failure" in found else read()
        return figure[1] if isinstance(figure, list) else figure

    for place, phase in enumerate(PHASES):
        for peer, least in ((SDPA_MASK, wanted.over_mask[place]), (SDPA_CAUSAL, wanted.over_causal[place])):
            yield Goal(f"{name}, {phase}: times as fast as {peer}", least, reached(lambda: found["over"][phase][peer]))  # noqa: B023
    text = f"{name}, {PHASES[0]}: times as fast as {FLEX}"
    yield Goal(text, wanted.over_flex, reached(lambda: found["over"][PHASES[0]][FLEX]))
    for place, phase in enumerate(("forward", "backward")):
        text = f"{name}, {phase}: useful FLOP/s over those of a {GEMM['cpu']}³ GEMM"
        yield Goal(text, wanted.share[place], reached(lambda: found["share"][place]))  # noqa: B023
    for dtype, most in DTYPES.items():
        text = f"{name}, {PHASES[1]}, {str(dtype).removeprefix('torch.')}: times float32's"
        yield Goal(text, most, reached(lambda: found["dtypes"][str(dtype)]), at_most=True)  # noqa: B023


if __name__ == "__main__":
    print(json.dumps(figures(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))))
