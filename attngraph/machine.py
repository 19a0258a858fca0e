"""How fast this machine is: a handful of constants that are measured once, kept, and can be overridden."""

from __future__ import annotations

import json
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
    node: float = 1e-9  # a number of each node's, to merge two parts, or to reorder nodes
    call: float = 5e-4  # of rows, whatever their number
    source: str = "the defaults"

    def rows(self, edges: int, dim: int) -> float:
        """The seconds of so many edges one by one."""
        return edges * (self.edge + self.edge_dim * dim)

    @staticmethod
    def here() -> Machine:
        """This machine: measured in its first use (a second), then read from the user's cache directory."""
        return _here(os.environ.get(VARIABLE, ""), torch.get_num_threads())

    @staticmethod
    def measured() -> Machine:
        """This machine, measured now: some small graphs through each backend, about a second."""
        return _measured()


@lru_cache
def _here(setting: str, threads: int) -> Machine:
    if setting == "default":
        return Machine()
    if setting not in ("", "measure"):
        return Machine(**{**json.loads(Path(setting).read_text()), "source": setting})
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attngraph" / "machines.json"
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    name = f"{platform.node()} {platform.machine()}, {threads} threads, torch {torch.__version__}"
    if name not in known or setting == "measure":
        found = _measured()
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
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _tiles_of(graph, n: int) -> Tiles:
    bound, n, m = graph.at(n, n)
    return Tiles(n, m, tabulate(bound, n, m, (64, 64)))


@torch.no_grad()
def _measured() -> Machine:
    dim, n = 64, 2048
    q, k, v = torch.randn(3, 1, 1, n, dim).unbind(0)
    flash = _seconds(lambda: scaled_dot_product_attention(q, k, v)) / (n * n * dim)
    some, mask = tuple(side[:, :, :1024] for side in (q, k, v)), torch.rand(1024, 1024) < 0.5
    dense = _seconds(lambda: scaled_dot_product_attention(*some, attn_mask=mask)) / (1024 * 1024 * dim)

    one, band = _tiles_of(Full(), 64), _tiles_of(Window(256, 0), n)
    few = tuple(side[:, :, :64].contiguous() for side in (q, k, v))
    strip = _seconds(lambda: tiles.forward(*few, one, None, 0.125), 20)
    numbers = len(band.table.row) * 64 * 64 * dim
    tile = _seconds(lambda: tiles.forward(q, k, v, band, None, 0.125)) / numbers  # its strips included

    out, lse = torch.zeros_like(q), torch.zeros(1, 1, n)
    node = _seconds(lambda: merge(out, lse, v, lse)) / (n * dim)
    edge, edge_dim, call = _measured_rows()
    return Machine(
        flash, dense, tile, strip, edge, edge_dim, node, call, f"this machine, measured on {time.strftime('%Y-%m-%d')}"
    )


def _measured_rows() -> tuple[float, float, float]:
    """The seconds of an edge, of each number of its dimension, and of a call."""
    if find_spec("numba") is None:
        return Machine.edge, Machine.edge_dim, Machine.call
    from attngraph.kernels import rows_numba

    n, degree, times = 4096, 16, {}
    query, key = Random(degree, num_keys=n).edges(n, n)
    whole, little = Rows.of(query, key, n, n), Rows.of(query[:16], key[:16], 1, n)
    for dim in (16, 64):
        q, k, v = torch.randn(3, 1, 4, n, dim).unbind(0)
        run = lambda layout, q=q, k=k, v=v: rows_numba.forward(q[:, :, : layout.n], k, v, layout, None, 1.0)  # noqa: E731
        call = _seconds(lambda: run(little), 20)  # noqa: B023  called at once
        times[dim] = max(_seconds(lambda: run(whole)) - call, 0) / (4 * n * degree)  # noqa: B023
    edge_dim = max(times[64] - times[16], 0) / 48
    return max(times[16] - 16 * edge_dim, 0), edge_dim, call
