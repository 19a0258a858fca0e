"""Measuring how fast this machine is: small graphs through each backend, some seconds in all."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import psutil
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attngraph.arguments import checked
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, at_size
from attngraph.graph.patterns import Chunks, Identity, Random, Window
from attngraph.kernels.contract import Modifiers
from attngraph.kernels.merge import merge
from attngraph.planning.backends import BACKENDS, kernel_for
from attngraph.planning.call import Call, Request
from attngraph.planning.costs import Costs, default_costs, keep, kind_of
from attngraph.planning.edge_set import EdgeSet
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

ROUNDS = 10  # of which the least time counts: whoever else uses the machine only adds to it


@checked
def calibrate(device: torch.device | str = "cpu", *, verbose: bool = True) -> Costs:
    """Measure this machine, and keep what was found: plans that are made from now on go by it.

    It takes some seconds, in which nothing else should run; a machine that is busy before it begins is a warning. The
    file lies in the user's cache directory; where, is printed if `verbose`. Without a place to write, the result serves
    if it is passed to `plan(…, costs=…)`.
    """
    device = torch.device(device)
    if (busy := psutil.cpu_percent(interval=0.5) * (psutil.cpu_count() or 1) / 100) > MAX_BUSY_CORES:
        warnings.warn(
            f"other programs keep {busy:.1f} cores of this machine busy: what is measured now is slower than the "
            f"machine is; calibrate again when it is idle",
            stacklevel=3,
        )
    found = measured(device)
    path = keep(found, device)
    if verbose:
        print("no place to keep it: pass it on, plan(…, costs=…)" if path is None else f"kept in {path}")
    return found


MAX_BUSY_CORES = 0.3


@torch.no_grad()
def measured(device: torch.device) -> Costs:
    """The costs of this machine, measured now; where noise hides one, that of the table: nothing costs nothing."""
    known = default_costs(kind_of(device), torch.get_num_threads())
    source = f"this machine, calibrated on {time.strftime('%Y-%m-%d')}"
    found = {**_of_pairs(device), **_of_rows(device), **_of_gathering(device)}
    clear = {name: seconds for name, seconds in found.items() if seconds > 0}
    return replace(known, source=source, **clear)


def _seconds(*runs: Callable[[], object]) -> list[float]:
    """The least time of each call, by turns, right after another of the same, as small calls run in a model."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    least = [math.inf] * len(runs)
    for _ in range(ROUNDS):
        for at, run in enumerate(runs):
            run()
            wait()
            start = time.perf_counter()
            run()
            wait()
            least[at] = min(least[at], time.perf_counter() - start)
    return least


def _call(q: Tensor) -> Call:
    _, heads, n, dim = q.shape
    return Call(n, n, heads, heads, dim, dim, q.dtype, q.device)


def _tiles_of(graph: Graph, n: int, tile: tuple[int, int]) -> Tiles:
    bound, n, m = at_size(graph, n, n)
    return Tiles(n, m, tabulate(bound, n, m, tile))


def _of_pairs(device: torch.device) -> dict[str, float]:
    """All pairs, tiles and merging, by the names of `Costs`."""
    gpu = device.type == "cuda"
    dim, n, heads, tile = (64, 16_384, 8, (128, 64)) if gpu else (64, 1024, 8, (64, 64))
    q, k, v = torch.randn(3, 1, heads, 8 * n, dim, device=device, dtype=torch.bfloat16 if gpu else None).unbind(0)
    few, some, most = ([side[:, :, :size].contiguous() for side in (q, k, v)] for size in (tile[1], n // 2, n))
    mask = torch.rand(n // 2, n // 2, device=device) < 0.5
    no_pair = torch.zeros(tile[1], tile[1], dtype=torch.bool, device=device)
    one_tile, all_tiles = _tiles_of(Full(), tile[1], tile), _tiles_of(Full(), n, tile)
    diagonal = _tiles_of(Chunks(tile[0]), 8 * n, tile)
    out, lse = torch.zeros_like(q, dtype=torch.float32), torch.zeros(1, heads, 8 * n, device=device)
    tiles = kernel_for("tiles", _call(q))
    assert tiles is not None
    flash, masked, masked_call, call, of_full, of_diagonal, merging = _seconds(
        lambda: scaled_dot_product_attention(most[0], most[1], most[2]),
        lambda: scaled_dot_product_attention(some[0], some[1], some[2], attn_mask=mask),
        lambda: scaled_dot_product_attention(few[0], few[1], few[2], attn_mask=no_pair),
        lambda: tiles.forward(few[0], few[1], few[2], one_tile, Modifiers(0.125)),
        lambda: tiles.forward(most[0], most[1], most[2], all_tiles, Modifiers(0.125)),
        lambda: tiles.forward(q, k, v, diagonal, Modifiers(0.125)),
        lambda: merge(out, lse, v, lse),
    )
    # of_full and of_diagonal are a call, so many tiles, and so many results: two equations.
    results, tile_count = heads * n * dim, len(all_tiles.table.row)
    share = len(diagonal.table.row) / tile_count
    per_result = max(of_diagonal - call - share * (of_full - call), 0) / (results * (8 - share))
    per_pair = max(of_full - call - per_result * results, 0) / (tile_count * heads * tile[0] * tile[1] * dim)
    per_masked_pair = masked / (results * n / 4)
    of_one_tile = (per_pair * tile[1] + per_result) * heads * tile[0] * dim
    return {
        "flash_s_per_pair_dim": flash / (results * n),
        "masked_s_per_pair_dim": per_masked_pair,
        "masked_s_per_call": max(masked_call - per_masked_pair * heads * tile[1] ** 2 * dim, 0),
        "tile_s_per_pair_dim": per_pair,
        "tile_s_per_result_dim": per_result,
        "tile_s_per_call": max(call - of_one_tile, 0),
        "merge_s_per_result_dim": merging / (8 * results),
    }


def _of_rows(device: torch.device) -> dict[str, float]:
    """Edges one by one, by the names of `Costs`."""
    gpu = device.type == "cuda"
    heads, n, dtype = (4, 1 << 17, torch.bfloat16) if gpu else (4, 8192, torch.float32)
    probe = torch.empty(1, heads, n, 64, dtype=dtype, device=device)
    rows = kernel_for("rows", _call(probe))
    if rows is None:
        return {}

    def run(graph: Graph, n: int, dim: int) -> Callable[[], object]:
        with device:
            layout = CSR.from_graph(*at_size(graph, n, n))
            q, k, v = torch.randn(3, 1, heads, n, dim, dtype=dtype).unbind(0)
            return partial(rows.forward, q, k, v, layout, Modifiers(1.0))

    call, narrow_few, narrow_many, wide_few, wide_many, far_few, far_many = _seconds(
        run(Identity(), 64, 16),
        *(run(Window(degree - 1, 0), n, dim) for dim in (16, 64) for degree in (4, 132)),
        *(run(Random(degree), n, 64) for degree in (4, 36)),
    )
    narrow, wide = (
        (many - few) / (heads * n * 128) for few, many in ((narrow_few, narrow_many), (wide_few, wide_many))
    )
    far, per_dim = (far_many - far_few) / (heads * n * 32), max(wide - narrow, 0) / 48
    return {
        "row_s_per_edge": max(narrow - 16 * per_dim, 0),
        "row_s_per_edge_dim": per_dim,
        "row_s_per_fetch_dim": max(far - wide, 0) / 64,
        "row_s_per_result_dim": max((wide_few - call) / (heads * n) - 4 * wide, 0) / 64,
        "row_s_per_call": call,
    }


def _of_gathering(device: torch.device) -> dict[str, float]:
    """Vectors gathered along edges, by the names of `Costs`."""
    heads, n, degree = 4, 4096, 8

    def run(graph: Graph, n: int, dim: int) -> Callable[[], object]:
        q, k, v = torch.randn(3, 1, heads, n, dim, device=device).unbind(0)
        edges = BACKENDS["edges"]
        layout = edges.build(EdgeSet(*at_size(graph, n, n)), _call(q))
        return lambda: edges.attend(q, k, v, layout, None, Request(scale=1.0))

    call, narrow, wide = _seconds(run(Identity(), 16, 16), run(Random(degree), n, 16), run(Random(degree), n, 64))
    edges = heads * n * degree
    per_dim = max(wide - narrow, 0) / (edges * 3 * 48)
    return {
        "gather_s_per_edge": max((narrow - call) / edges - 3 * 16 * per_dim, 0),
        "gather_s_per_edge_dim": per_dim,
        "gather_s_per_call": call,
    }
