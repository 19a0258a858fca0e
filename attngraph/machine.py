"""How fast this machine is: a handful of constants that are measured once, kept, and can be overridden."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from attngraph.kernels import tiles
from attngraph.kernels.merge import merge
from attngraph.patterns import Full, Random, Window
from attngraph.rows import Rows
from attngraph.tiles import Tiles, tabulate

VARIABLE = "ATTNGRAPH_MACHINE"


@dataclass(frozen=True)
class Machine:
    """Seconds that each backend takes for one head, forward; what `plan` computes costs from.

    The defaults are those of a server with two cores. Set the environment variable ATTNGRAPH_MACHINE to "default" to
    plan with them, to "measure" to measure again, or to the path of a JSON file with some of these numbers.
    """

    flash: float = 1.6e-11  # all-pairs attention without a mask: a pair, and a number of its dimension
    dense: float = 7.5e-11  # with a mask
    tile: float = 2.9e-11  # a pair of a tile
    strip: float = 2e-4  # a strip of rows of tiles
    edge: float = 4e-9  # an edge of rows
    edge_dim: float = 4e-10  # and a number of its dimension
    result: float = 1e-9  # a number of each query's result, of rows or tiles
    node: float = 1e-9  # a number of each node's, to merge two parts, or to reorder nodes
    call: float = 5e-4  # of rows, whatever their number
    source: str = "the defaults"

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "source" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} of a Machine must be seconds, at least 0 (got {value!r})")

    def rows(self, edges: int, dim: int, queries: int = 0) -> float:
        """The seconds of so many edges one by one, and of the results of so many queries."""
        return edges * (self.edge + self.edge_dim * dim) + queries * dim * self.result

    @staticmethod
    def here(device: torch.device | str = "cpu") -> Machine:
        """This machine: measured in its first use (a second), then read from the user's cache directory."""
        return _here(os.environ.get(VARIABLE, ""), torch.device(device), torch.get_num_threads())

    @staticmethod
    def measured(device: torch.device | str = "cpu") -> Machine:
        """This machine, measured now: some small graphs through each backend, about a second."""
        return _measured(torch.device(device))


# Arithmetic, not measured: from what an H200 multiplies (790 TFLOP/s in half precision) and copies (4.3 TB/s).
GPU = Machine(7e-15, 3e-14, 1e-14, 2e-5, 1e-10, 1e-12, 3e-12, 3e-12, 4e-5, "the defaults of a GPU")


@lru_cache
def _here(setting: str, device: torch.device, threads: int) -> Machine:
    gpu = device.type == "cuda"
    if setting == "default" or not (gpu or device.type == "cpu"):
        return GPU if gpu else Machine()
    if setting not in ("", "measure"):
        return Machine(**{**json.loads(Path(setting).read_text()), "source": setting})
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attngraph" / "machines.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    place = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()}, {threads} threads"
    name = f"{platform.node()} {place}, torch {torch.__version__}"
    if name not in known or setting == "measure":
        found = _measured(device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps({**known, name: asdict(found)}, indent=2))
            beside.replace(path)  # at once, also where several processes measure
        except OSError:
            pass  # nowhere to keep it: measured again in the next process
        return found
    return Machine(**known[name])


# ---------------------------------------------------------------------------------------------- the measurement


def _seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The least time of a call, after one to warm up: others who use the machine only add to it."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    run()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _tiles_of(graph, n: int, tile: tuple[int, int]) -> Tiles:
    bound, n, m = graph.at(n, n)
    return Tiles(n, m, tabulate(bound, n, m, tile))


@torch.no_grad()
def _measured(device: torch.device) -> Machine:
    gpu = device.type == "cuda"
    dim, n, heads, tile = (64, 16_384, 8, (128, 64)) if gpu else (64, 1024, 8, (64, 64))
    q, k, v = torch.randn(3, 1, heads, n, dim, device=device, dtype=torch.bfloat16 if gpu else None).unbind(0)
    flash = _seconds(lambda: scaled_dot_product_attention(q, k, v)) / (heads * n * n * dim)
    half = n // 2
    some, mask = tuple(side[:, :, :half] for side in (q, k, v)), torch.rand(half, half, device=device) < 0.5
    dense = _seconds(lambda: scaled_dot_product_attention(*some, attn_mask=mask)) / (heads * half * half * dim)

    of_rows = (GPU.edge, GPU.edge_dim, GPU.result, GPU.call) if gpu else _measured_rows()
    edge, edge_dim, result, call = of_rows
    one, band = _tiles_of(Full(), tile[1], tile), _tiles_of(Window(256, 0), n, tile)
    few = tuple(side[:, :, : tile[1]].contiguous() for side in (q, k, v))
    strip = _seconds(lambda: tiles.forward(*few, one, None, 0.125), 20)
    numbers = len(band.table.row) * tile[0] * tile[1] * dim * heads
    whole = _seconds(lambda: tiles.forward(q, k, v, band, None, 0.125), 10)
    each = max(whole - heads * n * dim * result, whole / 2) / numbers  # its strips included

    out, lse = torch.zeros_like(q, dtype=torch.float32), torch.zeros(1, heads, n, device=device)
    node = _seconds(lambda: merge(out, lse, v, lse)) / (heads * n * dim)
    source = f"this machine, measured on {time.strftime('%Y-%m-%d')}"
    return Machine(flash, dense, each, strip, edge, edge_dim, result, node, call, source)


def _measured_rows() -> tuple[float, float, float, float]:
    """The seconds of an edge, of each number of its dimension, of a number of a result, and of a call."""
    if find_spec("numba") is None:
        return Machine.edge, Machine.edge_dim, Machine.result, Machine.call
    from attngraph.kernels import rows_numba

    n, heads, degree, edges, results = 4096, 4, 16, {}, {}
    few, many = (Rows.of(*Random(each, num_keys=n).edges(n, n), n, n) for each in (1, degree + 1))
    little = Rows.of(torch.arange(1), torch.arange(1), 1, 1)
    for dim in (16, 64):
        sides = torch.randn(3, 1, heads, n, dim).unbind(0)
        run = lambda layout, *sides: rows_numba.forward(*sides, layout, None, 1.0)  # noqa: E731
        call = _seconds(lambda: run(little, *(side[:, :, :1] for side in sides)), 20)  # noqa: B023  called at once
        one, all = (_seconds(lambda: run(layout, *sides), 10) for layout in (few, many))  # noqa: B023
        edges[dim] = max(all - one, 0) / (heads * n * degree)
        results[dim] = max((one - call) / (heads * n) - edges[dim], 0) / dim
    edge_dim = max(edges[64] - edges[16], 0) / 48
    return max(edges[16] - 16 * edge_dim, 0), edge_dim, results[64], call
