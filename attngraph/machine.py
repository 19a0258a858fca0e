"""How fast this machine is: a handful of constants that are measured once, kept, and can be overridden."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from attngraph.graph import Graph
from attngraph.kernels import tiles
from attngraph.kernels.merge import merge
from attngraph.patterns import Chunks, Full, Random
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
    dense: float = 2.3e-11  # with a mask
    tile: float = 1.7e-11  # tiles: a pair, and a number of its dimension
    tile_result: float = 1e-9  # and a number of a query's result
    strip: float = 3e-4  # and a strip of rows of tiles, or a call, whatever its size
    edge: float = 5e-10  # rows: an edge
    edge_dim: float = 2.1e-10  # and a number of its dimension
    edge_result: float = 2e-9  # and a number of a query's result
    call: float = 5e-5  # and a call
    node: float = 3e-10  # a number of each node's, to merge two parts, or to reorder nodes
    source: str = "the defaults"

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "source" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} of a Machine must be seconds, at least 0 (got {value!r})")

    def rows(self, edges: int, dim: int, queries: int = 0) -> float:
        """The seconds of so many edges one by one, and of the results of so many queries."""
        return edges * (self.edge + self.edge_dim * dim) + queries * dim * self.edge_result

    @staticmethod
    def here(device: torch.device | str = "cpu") -> Machine:
        """This machine: measured in its first use (a second), then read from the user's cache directory."""
        return _here(os.environ.get(VARIABLE, ""), torch.device(device), torch.get_num_threads())

    @staticmethod
    def measured(device: torch.device | str = "cpu") -> Machine:
        """This machine, measured now: some small graphs through each backend, about a second."""
        return _measured(torch.device(device))


# Arithmetic, not measured: from what an H200 multiplies (790 TFLOP/s in half precision) and copies (4.3 TB/s).
GPU = Machine(
    flash=7e-15, dense=3e-14, tile=1e-14, tile_result=3e-12, strip=2e-5,
    edge=1e-10, edge_dim=1e-12, edge_result=3e-12, call=4e-5, node=3e-12, source="the defaults of a GPU",
)  # fmt: skip
NAME = "machines.2.json"  # where they are kept: another for each way of measuring


@lru_cache
def _here(setting: str, device: torch.device, threads: int) -> Machine:
    gpu = device.type == "cuda"
    if setting == "default" or not (gpu or device.type == "cpu"):
        return GPU if gpu else Machine()
    if setting not in ("", "measure"):
        return Machine(**{**json.loads(Path(setting).read_text()), "source": setting})
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attngraph" / NAME
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


def _seconds(*runs: Callable[[], object], rounds: int = 15) -> list[float]:
    """The least time of each call, by turns, after one to warm up: others who use the machine only add to it."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    least = [math.inf] * len(runs)
    for turn in range(rounds + 1):
        for at, run in enumerate(runs):
            wait()
            start = time.perf_counter()
            run()
            wait()
            least[at] = min(least[at], time.perf_counter() - start) if turn else math.inf
    return least


def _tiles_of(graph: Graph, n: int, tile: tuple[int, int]) -> Tiles:
    bound, n, m = graph.at(n, n)
    return Tiles(n, m, tabulate(bound, n, m, tile))


@torch.no_grad()
def _measured(device: torch.device) -> Machine:
    gpu = device.type == "cuda"
    dim, n, heads, tile = (64, 16_384, 8, (128, 64)) if gpu else (64, 1024, 8, (64, 64))
    q, k, v = torch.randn(3, 1, heads, n, dim, device=device, dtype=torch.bfloat16 if gpu else None).unbind(0)
    half, mask = n // 2, torch.rand(n // 2, n // 2, device=device) < 0.5
    some, few = (tuple(side[:, :, :size].contiguous() for side in (q, k, v)) for size in (half, tile[1]))
    one, full, blocks = (
        _tiles_of(Full(), tile[1], tile),
        _tiles_of(Full(), n, tile),
        _tiles_of(Chunks(tile[0]), n, tile),
    )
    out, lse = torch.zeros_like(q, dtype=torch.float32), torch.zeros(1, heads, n, device=device)
    flash, dense, strip, many, least, node = _seconds(
        lambda: scaled_dot_product_attention(q, k, v),
        lambda: scaled_dot_product_attention(*some, attn_mask=mask),
        lambda: tiles.forward(*few, one, None, 0.125),
        lambda: tiles.forward(q, k, v, full, None, 0.125),
        lambda: tiles.forward(q, k, v, blocks, None, 0.125),
        lambda: merge(out, lse, v, lse),
    )
    results, pairs = heads * n * dim, heads * tile[0] * tile[1]
    each = max(many - least, 0) / (pairs * dim * (len(full.table.row) - len(blocks.table.row)))
    tile_result = max(least - strip - each * pairs * dim * len(blocks.table.row), 0) / results
    edge, edge_dim, edge_result, call = (GPU.edge, GPU.edge_dim, GPU.edge_result, GPU.call) if gpu else _measured_rows()
    return Machine(
        flash / (results * n), dense / (heads * half * half * dim), each, tile_result, strip,
        edge, edge_dim, edge_result, call, node / results, f"this machine, measured on {time.strftime('%Y-%m-%d')}",
    )  # fmt: skip


def _measured_rows() -> tuple[float, float, float, float]:
    """The seconds of an edge, of each number of its dimension, of a number of a result, and of a call."""
    if find_spec("numba") is None:
        return Machine.edge, Machine.edge_dim, Machine.edge_result, Machine.call
    from attngraph.kernels import rows_numba

    n, heads, narrow, wide = 4096, 4, 16, 64
    few, many = (Rows.of(*Random(each, num_keys=n).edges(n, n), n, n) for each in (1, 33))
    little = Rows.of(torch.arange(1), torch.arange(1), 1, 1)
    sides = [torch.randn(3, 1, heads, n, dim).unbind(0) for dim in (narrow, wide)]
    one = [side[:, :, :1].contiguous() for side in sides[0]]
    call, *least = _seconds(
        lambda: rows_numba.forward(*one, little, None, 1.0),
        *(partial(rows_numba.forward, *own, layout, None, 1.0) for own in sides for layout in (few, many)),
    )
    in_narrow, in_wide = ((all - some) / (heads * n * 32) for some, all in (least[:2], least[2:]))  # seconds of an edge
    edge_dim = max(in_wide - in_narrow, 0) / (wide - narrow)
    edge_result = max((least[2] - call) / (heads * n) - in_wide, 0) / wide
    return max(in_narrow - narrow * edge_dim, 0), edge_dim, edge_result, call
