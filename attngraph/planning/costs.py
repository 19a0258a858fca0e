"""How fast this machine is: a handful of constants that are measured once, kept, and can be overridden."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from attngraph.graph.base import Graph
from attngraph.graph.patterns import Chunks, Full, Identity, Random, Window
from attngraph.kernels import rows, tiles
from attngraph.kernels.merge import merge
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

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
    strip: float = 8e-4  # and a strip of rows of tiles, or a call, whatever its size
    edge: float = 7e-10  # rows: an edge
    edge_dim: float = 4e-11  # and a number of its dimension
    fetch: float = 1.5e-10  # and a number of a key that was not used just before
    edge_result: float = 2e-9  # and a number of a query's result
    call: float = 2.5e-4  # and a call
    node: float = 6e-10  # a number of each node's, to merge two parts, or to reorder nodes
    source: str = "the defaults"

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "source" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} of a Machine must be seconds, at least 0 (got {value!r})")

    def rows(self, edges: int, fetched: int, dim: int, queries: int = 0) -> float:
        """The seconds of so many edges one by one, whose keys are fetched so often, and of the results of queries."""
        return edges * (self.edge + self.edge_dim * dim) + (fetched * self.fetch + queries * self.edge_result) * dim

    @staticmethod
    def here(device: torch.device | str = "cpu") -> Machine:
        """This machine: measured in its first use (some seconds), then read from the user's cache directory."""
        return _here(os.environ.get(VARIABLE, ""), torch.device(device), torch.get_num_threads())

    @staticmethod
    def measured(device: torch.device | str = "cpu") -> Machine:
        """This machine, measured now: some small graphs through each backend, some seconds."""
        return _measured(torch.device(device))


# Arithmetic, not measured: from what an H200 multiplies (790 TFLOP/s in half precision) and copies (4.3 TB/s).
GPU = Machine(
    flash=7e-15, dense=3e-14, tile=1e-14, tile_result=3e-12, strip=2e-5,
    edge=5e-11, edge_dim=5e-13, fetch=5e-13, edge_result=3e-12, call=4e-5, node=3e-12, source="the defaults of a GPU",
)  # fmt: skip
NAME = "machines.2.json"  # where they are kept: another for each way of measuring


@lru_cache
def _here(setting: str, device: torch.device, threads: int) -> Machine:
    gpu = device.type == "cuda"
    if setting == "default" or not (gpu or device.type == "cpu"):
        return GPU if gpu else Machine()
    if setting not in ("", "measure"):
        try:
            return Machine(**{**json.loads(Path(setting).expanduser().read_text()), "source": setting})
        except (OSError, ValueError, TypeError) as error:
            names = ", ".join(each.name for each in fields(Machine))
            raise ValueError(
                f"{VARIABLE} must be 'default', 'measure' or the path of a JSON file with some of {names} "
                f"(got {setting!r}: {error})"
            ) from None
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attngraph" / NAME
    place = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()}, {threads} threads"
    name = f"{platform.node()} {place}, torch {torch.__version__}"
    try:
        known = json.loads(path.read_text())
        kept = Machine(**known[name])
    except (OSError, ValueError, TypeError, KeyError) as error:  # none yet, or not one of ours
        known, kept = known if isinstance(error, KeyError) else {}, None
    if kept is None or setting == "measure":
        found = _measured(device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps({**known, name: asdict(found)}, indent=2))
            beside.replace(path)  # at once, also where several processes measure
        except OSError:
            pass  # nowhere to keep it: measured again in the next process
        return found
    return kept


# ---------------------------------------------------------------------------------------------- the measurement


def _seconds(*runs: Callable[[], object], rounds: int = 10) -> list[float]:
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
    sides = torch.randn(3, 1, heads, 8 * n, dim, device=device, dtype=torch.bfloat16 if gpu else None).unbind(0)
    few, some, most = (tuple(side[:, :, :size].contiguous() for side in sides) for size in (tile[1], n // 2, n))
    mask = torch.rand(n // 2, n // 2, device=device) < 0.5
    one, full = (_tiles_of(Full(), size, tile) for size in (tile[1], n))
    blocks = _tiles_of(Chunks(tile[0]), 8 * n, tile)
    out, lse = torch.zeros_like(sides[0], dtype=torch.float32), torch.zeros(1, heads, 8 * n, device=device)
    flash, dense, strip, of_full, of_blocks, node = _seconds(
        lambda: scaled_dot_product_attention(*most),
        lambda: scaled_dot_product_attention(*some, attn_mask=mask),
        lambda: tiles.forward(*few, one, None, 0.125),
        lambda: tiles.forward(*most, full, None, 0.125),
        lambda: tiles.forward(*sides, blocks, None, 0.125),
        lambda: merge(out, lse, sides[2], lse),
    )
    # of_full and of_blocks are strip + tiles · of a tile + numbers of results · of one: two equations.
    results, share = heads * n * dim, len(blocks.table.row) / len(full.table.row)
    tile_result = max(of_blocks - strip - share * (of_full - strip), 0) / (results * (8 - share))
    each = max(of_full - strip - tile_result * results, 0) / (len(full.table.row) * heads * tile[0] * tile[1] * dim)
    return replace(
        GPU if gpu else Machine(),
        flash=flash / (results * n), dense=dense / (results * n / 4),
        tile=each, tile_result=tile_result, strip=strip, node=node / (8 * results),
        source=f"this machine, measured on {time.strftime('%Y-%m-%d')}", **_measured_rows(device),
    )  # fmt: skip


def _measured_rows(device: torch.device) -> dict[str, float]:
    """What edges one by one cost, by the names of a Machine."""
    gpu = device.type == "cuda"
    if not gpu and find_spec("numba") is None:
        return {}
    heads, n, dtype = (4, 1 << 17, torch.bfloat16) if gpu else (4, 8192, None)

    def run(graph, n, dim):
        with device:
            layout = CSR.from_graph(*graph.at(n, n))
            return partial(rows.forward, *torch.randn(3, 1, heads, n, dim, dtype=dtype).unbind(0), layout, None, 1.0)

    call, *found = _seconds(
        run(Identity(), 64, 16),
        *(run(Window(degree - 1, 0), n, dim) for dim in (16, 64) for degree in (4, 132)),
        *(run(Random(degree), n, 64) for degree in (4, 36)),
    )
    narrow, wide = ((many - few) / (heads * n * 128) for few, many in (found[:2], found[2:4]))
    far, edge_dim = (found[5] - found[4]) / (heads * n * 32), max(wide - narrow, 0) / 48
    return {
        "edge": max(narrow - 16 * edge_dim, 0),
        "edge_dim": edge_dim,
        "fetch": max(far - wide, 0) / 64,
        "edge_result": max((found[2] - call) / (heads * n) - 4 * wide, 0) / 64,
        "call": call,
    }
