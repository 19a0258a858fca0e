"""How fast a machine is, in seconds: the constants from which backends estimate what a call takes.

They come from a table by kind of CPU or GPU. `attngraph.calibrate` (or ``python -m attngraph calibrate``) measures this
machine instead and keeps the result in a file; nothing else measures, and nothing else writes to the disk.
"""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from attngraph import cache

VARIABLE = "ATTNGRAPH_COSTS"
FILE = "costs.2.json"  # another name for each way of measuring


@dataclass(frozen=True)
class Costs:
    """Seconds of the steps of a forward pass, of one head of one batch entry; the larger part of them is linear in D.

    "Per dim" is for each number of a head's dimension D. The defaults are those of a CPU with AVX-512, two threads and
    float32. Set the environment variable ATTNGRAPH_COSTS to the name of a table in `DEFAULTS`, or to the path of a JSON
    file with some of these numbers; by default the file that `attngraph.calibrate` has written is read, if there is
    one.
    """

    flash_s_per_pair_dim: float = 1.7e-11
    """All-pairs attention without a mask, for each pair of a query and a key."""
    masked_s_per_pair_dim: float = 2.6e-11
    """All-pairs attention with a mask."""
    masked_s_per_call: float = 2.5e-5
    """And whatever the number of pairs."""
    tile_s_per_pair_dim: float = 1.5e-11
    """Tiles, for each pair of a tile, edge or not."""
    tile_s_per_result_dim: float = 1.05e-9
    """And for each query."""
    tile_s_per_call: float = 1e-4
    """And whatever the number of tiles; where tiles are not fused, for each group of alike rows of tiles."""
    row_s_per_edge: float = 1.7e-9
    """Edges one by one, for each edge."""
    row_s_per_edge_dim: float = 2.6e-11
    """And each number of its key and value."""
    row_s_per_fetch_dim: float = 1.7e-10
    """And each number of a key and value that are not in the cache."""
    row_s_per_result_dim: float = 1.8e-9
    """And for each query."""
    row_s_per_call: float = 1.6e-4
    """And whatever the number of edges."""
    gather_s_per_edge: float = 0.0
    """Vectors gathered along the edges, for each edge."""
    gather_s_per_edge_dim: float = 4e-9
    """And each number of its query, key and value."""
    gather_s_per_call: float = 2e-4
    """And whatever the number of edges."""
    merge_s_per_result_dim: float = 5.5e-10
    """Merging two partial results, or moving nodes to other places, for each query."""
    source: str = "the defaults for AVX-512"

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "source" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} of Costs must be seconds, at least 0 (got {value!r})")

    @staticmethod
    def here(device: torch.device | str = "cpu") -> Costs:
        """The costs by which plans for this device are made: as calibrated, else of the table for its kind."""
        device, setting = torch.device(device), os.environ.get(VARIABLE, "")
        threads = torch.get_num_threads()
        key = setting, device.type, str(device), threads
        return cache.COSTS.get_or_make(key, lambda: _here(setting, device, threads))


TABLE_THREADS = (
    2  # with which the tables for CPUs were measured, by `calibrate`, on one server under both instruction sets
)
AVX512 = Costs()
AVX2 = Costs(
    flash_s_per_pair_dim=2.5e-11, masked_s_per_pair_dim=3.2e-11, masked_s_per_call=2.5e-5,
    tile_s_per_pair_dim=2.6e-11, tile_s_per_result_dim=1.05e-9, tile_s_per_call=1e-4,
    row_s_per_edge=1.85e-9, row_s_per_edge_dim=3.3e-11, row_s_per_fetch_dim=1.65e-10, row_s_per_result_dim=1.85e-9,
    row_s_per_call=1.6e-4, gather_s_per_edge=0.0, gather_s_per_edge_dim=4e-9, gather_s_per_call=2e-4,
    merge_s_per_result_dim=7e-10, source="the defaults for AVX2",
)  # fmt: skip
# Not measured: AVX2's, with vectors of half the width for the same work.
NEON = replace(
    AVX2,
    **{
        name: 2 * getattr(AVX2, name)
        for name in ("flash_s_per_pair_dim", "masked_s_per_pair_dim", "tile_s_per_pair_dim", "row_s_per_edge_dim")
    },
    source="the defaults for NEON",
)
# Measured by `calibrate` on an H200, with torch 2.11 and Triton 3.6.
GPU = Costs(
    flash_s_per_pair_dim=8.6e-15, masked_s_per_pair_dim=2.2e-14, masked_s_per_call=6.4e-5,
    tile_s_per_pair_dim=1.05e-14, tile_s_per_result_dim=1.5e-12, tile_s_per_call=1.5e-4,
    row_s_per_edge=5.2e-12, row_s_per_edge_dim=5.3e-13, row_s_per_fetch_dim=3.2e-13, row_s_per_result_dim=4.2e-12,
    row_s_per_call=1.2e-4, gather_s_per_edge=0.0, gather_s_per_edge_dim=5.2e-12, gather_s_per_call=3.5e-4,
    merge_s_per_result_dim=1.02e-11, source="the defaults for a GPU",
)  # fmt: skip
DEFAULTS = {"avx512": AVX512, "avx2": AVX2, "neon": NEON, "gpu": GPU}


def kind_of(device: torch.device) -> str:
    """The table of `DEFAULTS` for a device."""
    if device.type != "cpu":
        return "gpu"
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "neon"
    return "avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "avx2"


def default_costs(kind: str, threads: int) -> Costs:
    """A table, for so many threads: work is divided among them, calls and merges are not."""
    table = DEFAULTS[kind]
    if kind == "gpu" or threads == TABLE_THREADS:
        return table
    shared = {
        field.name: getattr(table, field.name) * TABLE_THREADS / threads
        for field in fields(Costs)
        if field.name != "source" and not field.name.endswith("_per_call")
    }
    return replace(table, **shared, source=f"{table.source}, {threads} threads")


def _here(setting: str, device: torch.device, threads: int) -> Costs:
    if setting in DEFAULTS:
        return DEFAULTS[setting]
    if setting not in ("", "default"):
        return _from_file(setting)
    if setting == "":
        kept = _calibrated(device)
        if kept is not None:
            return kept
    return default_costs(kind_of(device), threads)


def _from_file(setting: str) -> Costs:
    try:
        return Costs(**{**json.loads(Path(setting).expanduser().read_text(encoding="utf-8")), "source": setting})
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        names = ", ".join(field.name for field in fields(Costs))
        raise ValueError(
            f"{VARIABLE} must be 'default', one of {', '.join(map(repr, DEFAULTS))}, or the path of a JSON file with "
            f"some of {names} (got {setting!r}: {error})"
        ) from None


# ----------------------------------------------------------------------------------------- what was calibrated here


def calibration_file() -> Path | None:
    """Where `attngraph.calibrate` keeps what it measured: in the user's cache directory, if there is a user's home."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return folder / "attngraph" / FILE


def machine_name(device: torch.device) -> str:
    """This machine as the file names it: what it runs on, and with what."""
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{platform.node()} {place}, torch {torch.__version__}"


def _calibrated(device: torch.device) -> Costs | None:
    path = calibration_file()
    if path is None or device.type not in ("cpu", "cuda"):
        return None
    try:
        return Costs(**json.loads(path.read_text(encoding="utf-8"))[machine_name(device)])
    except (OSError, KeyError):  # none yet
        return None
    except (ValueError, TypeError) as error:
        warnings.warn(
            f"the costs in {path} can't be read ({error}): defaults are taken; attngraph.calibrate() writes new ones",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def keep(costs: Costs, device: torch.device) -> Path | None:
    """Write costs to the file of this user, beside those of other machines; where, or None if there is no place."""
    path = calibration_file()
    if path is None:
        return None
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({**known, machine_name(device): asdict(costs)}, indent=2), encoding="utf-8")
        beside.replace(path)  # at once, also where several processes calibrate
    except OSError:
        return None
    cache.COSTS.clear()
    return path
