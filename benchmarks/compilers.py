"""One product of a tile, by compilers of vector code, on one core: python -m benchmarks.compilers

(64, 64) = (64, 64) · (64, 64) in float32, again and again on arrays that stay in the first cache: what attention over
tiles spends its time on. Sums stay in registers but for plain loops. C needs gcc or clang, Mojo its command; what is
not installed is named. See docs/compilers.md.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numba import njit

from attngraph.kernels.cpu.tiles_steps import FASTMATH_FLAGS, product
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import in_turn, milliseconds
from benchmarks.page import Keep, number, spread, table

NAME = "compilers"
SIZE, TIMES = 64, 20_000
FLOP = 2 * SIZE**3

C = """
typedef float V __attribute__((vector_size(4 * LANES), aligned(4)));
void product(float *restrict s, const float *restrict x, const float *restrict y) {
  for (long r = 0; r < 64; r += ROWS) for (long c = 0; c < 64; c += 2 * LANES) {
    V sums[ROWS][2] = {0};
    for (long t = 0; t < 64; t++) {
      V low = *(const V *)(y + t * 64 + c), high = *(const V *)(y + t * 64 + c + LANES);
      for (int i = 0; i < ROWS; i++) {
        sums[i][0] += x[(r + i) * 64 + t] * low;
        sums[i][1] += x[(r + i) * 64 + t] * high;
      }
    }
    for (int i = 0; i < ROWS; i++) {
      *(V *)(s + (r + i) * 64 + c) = sums[i][0];
      *(V *)(s + (r + i) * 64 + c + LANES) = sums[i][1];
    }
  }
}
#include <stdio.h>
#include <stdlib.h>
int main(int count, char **arguments) {
  float *s = aligned_alloc(64, 16384), *x = aligned_alloc(64, 16384), *y = aligned_alloc(64, 16384);
  for (int i = 0; i < 4096; i++) { x[i] = i % 7; y[i] = i % 5; }
  for (long n = atol(arguments[1]); n > 0; n--) product(s, x, y);
  printf("%f\\n", s[100]);
}
"""
MOJO = """
from std.memory import alloc
from std.sys import argv
from std.utils import StaticTuple

comptime Floats = UnsafePointer[Float32, MutUntrackedOrigin]
comptime Lanes = SIMD[DType.float32, LANES]

def product(s: Floats, x: Floats, y: Floats):
    for r in range(0, 64, ROWS):
        for c in range(0, 64, 2 * LANES):
            var sums = StaticTuple[Lanes, 2 * ROWS](fill=Lanes(0))
            for t in range(64):
                var low = y.load[width=LANES](t * 64 + c)
                var high = y.load[width=LANES](t * 64 + c + LANES)
                comptime for i in range(ROWS):
                    var a = Lanes(x[(r + i) * 64 + t])
                    sums[2 * i] = a.fma(low, sums[2 * i])
                    sums[2 * i + 1] = a.fma(high, sums[2 * i + 1])
            comptime for i in range(ROWS):
                s.store((r + i) * 64 + c, sums[2 * i])
                s.store((r + i) * 64 + c + LANES, sums[2 * i + 1])

def main() raises:
    var s = alloc[Float32](4096)
    var x = alloc[Float32](4096)
    var y = alloc[Float32](4096)
    for i in range(4096):
        x[i] = Float32(i % 7)
        y[i] = Float32(i % 5)
    for _ in range(Int(argv()[1])):
        product(s, x, y)
    print(s[100])
"""


@njit(fastmath=FASTMATH_FLAGS, nogil=True)
def by_ours(times, s, x, y, bits):
    for _ in range(times):
        product(s, x, 0, y, SIZE, bits)


@njit(fastmath=True, nogil=True)
def by_loops(times, s, x, y):
    for _ in range(times):
        for i in range(SIZE):
            for j in range(SIZE):
                s[i * SIZE + j] = 0
            for t in range(SIZE):
                for j in range(SIZE):
                    s[i * SIZE + j] += x[i * SIZE + t] * y[t * SIZE + j]


def contestants(folder: Path) -> dict[str, Callable[[], object] | str]:
    """Each as a run of `TIMES` products that gives s[100], or why it is not here."""
    x, y = ((np.arange(SIZE * SIZE) % period).astype(np.float32) for period in (7, 5))
    s, bits = np.zeros(SIZE * SIZE, np.float32), np.full(SIZE, 2**64 - 1, np.uint64)
    a, b = (torch.from_numpy(side).view(SIZE, SIZE) for side in (x, y))
    out = torch.empty(SIZE, SIZE)
    has_512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    lanes, rows = (16, 8) if has_512 else (8, 4)

    def in_numba(run: Callable, *more) -> Callable[[], object]:
        return lambda: (run(TIMES, s, x, y, *more), float(s[100]))[1]

    def by_torch() -> float:
        for _ in range(TIMES):
            torch.mm(a, b, out=out)
        return float(out.view(-1)[100])

    def program(name: str, text: str, compiler: str | None, *command: str) -> Callable[[], object] | str:
        if compiler is None:
            return f"no {name} here"
        source, binary = folder / command[-1], folder / f"{name}.out"
        source.write_text(text.replace("LANES", str(lanes)).replace("ROWS", str(rows)), encoding="utf-8")
        built = [compiler, *command[:-1], "-o", str(binary), str(source)]
        done = subprocess.run(built, capture_output=True, text=True)
        if done.returncode:
            return f"{name}: {done.stderr.strip().splitlines()[-1][:100]}"
        return lambda: float(subprocess.run([binary, str(TIMES)], capture_output=True, text=True, check=True).stdout)

    c_compiler = shutil.which("gcc") or shutil.which("clang")
    return {
        "Numba, LLVM IR of ours": in_numba(by_ours, bits),
        "Numba, plain loops": in_numba(by_loops),
        "C, vector extensions": program("C", C, c_compiler, "-O3", "-march=native", "-ffast-math", "product.c"),
        "Mojo, SIMD": program("Mojo", MOJO, shutil.which("mojo"), "build", "product.mojo"),
        "torch.mm": by_torch,
    }


def run(options: Namespace) -> Iterator[Figures]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict] = {}
        for name, each in contestants(Path(folder)).items():
            found[name] = {"failure": each} if isinstance(each, str) else {"call": each}
        runs = {name: own.pop("call") for name, own in found.items() if "call" in own}
        results = {name: each() for name, each in runs.items()}  # the first calls compile
        if len(set(results.values())) > 1:
            raise ValueError(f"all must have the same number (got {results})")
        times = in_turn(runs, options.repeats, warmup=1)
    for name, own in found.items():
        if name in times:
            own["gflops"] = [TIMES * FLOP / ms / 1e6 for ms in reversed(milliseconds(times[name]))]
        yield {name: {**own, "section": NAME}}


def render(records: Records, keep: Keep) -> Iterator[str]:
    if not records[NAME]:
        return
    yield from [
        "## Compilers of vector code",
        "",
        "`python -m benchmarks.compilers`: a tile's product on one core.",
        "",
    ]
    rows = [
        [name, spread(own["gflops"], 1) if "gflops" in own else own["failure"]] for name, own in records[NAME].items()
    ]
    yield from table(["", "GFLOP/s (quartiles)"], rows)


def show(name: str, own: dict) -> str:
    return f"{name:26}{number(own['gflops'][1], '.1f') + ' GFLOP/s' if 'gflops' in own else own['failure']}"


EXPERIMENT = Experiment(NAME, __doc__, run, render, {"repeats": {"default": 9}}, show, headline="gflops")

if __name__ == "__main__":
    EXPERIMENT.main()
