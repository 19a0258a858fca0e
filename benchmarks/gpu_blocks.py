"""Which blocks each Triton kernel runs fastest with on this GPU: the tables `BLOCKS` of attngraph/kernels/triton.

    python -m benchmarks.gpu_blocks tiles --dim 64 128
    python -m benchmarks.gpu_blocks tiles --kind offset padding --dtype float32
    python -m benchmarks.gpu_blocks rows

Candidates are compiled first, by all processors; each is then checked against the blocks of the table, and timed.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from attngraph import Window
from attngraph.kernels.contract import Modifiers, ScoreBias
from attngraph.kernels.memory import like
from attngraph.kernels.triton import rows, tiles
from attngraph.kernels.triton.common import Upstream, compute_delta, ptr_and_strides
from benchmarks.gpu import random_edges
from benchmarks.internals import csr_of, tiles_of
from benchmarks.measure import failure, in_turn, milliseconds, on_all_processors

KERNELS = ("_fwd_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel")
KINDS = ("plain", "padding", "offset")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMALL = 512  # nodes with which a kernel is compiled: the same code serves all


class Setting(NamedTuple):
    """Of which tensors the kernels are timed."""

    family: str
    nodes: int
    heads: int
    dim: int
    dtype: str
    kind: str
    tile: tuple[int, int]


class Case(ABC):
    """A call's tensors; `run` launches one of its kernels."""

    table: Any  # how it runs else

    def __init__(self, setting: Setting, device: str = "cuda") -> None:
        chance = torch.Generator(device).manual_seed(0)
        n, dtype = setting.nodes, DTYPES[setting.dtype]
        self.q, self.k, self.v, self.dout = (
            torch.randn(1, setting.heads, n, setting.dim, generator=chance, device=device).to(dtype) for _ in range(4)
        )
        bias = mask = None
        if setting.kind == "offset":
            bias = ScoreBias("offset", torch.randn(setting.heads, 2 * n - 1, generator=chance, device=device))
        if setting.kind == "padding":
            mask = torch.ones(1, n, dtype=torch.bool, device=device)
        self.modifiers = Modifiers(setting.dim**-0.5, bias, mask)
        self.layout = self.make_layout(setting, device)
        out, self.lse = self.run("_fwd_kernel", None)
        self.upstream = Upstream(ptr_and_strides(self.dout), self.lse, compute_delta(out, self.dout, self.lse, None))

    @staticmethod
    @abstractmethod
    def make_layout(setting: Setting, device: str) -> Any: ...

    @staticmethod
    @abstractmethod
    def candidates(setting: Setting) -> Iterator[Any]:
        """What is tried."""

    @abstractmethod
    def run(self, kernel: str, blocks: Any) -> list[Tensor]:
        """The kernel's results; without blocks, with those of the table."""


class TilesCase(Case):
    """Window(1024, 0)."""

    @staticmethod
    def make_layout(setting: Setting, device: str) -> Any:
        return tiles_of(Window(min(1024, setting.nodes // 4), 0), setting.nodes, setting.tile, device)

    @staticmethod
    def candidates(setting: Setting) -> Iterator[tiles.Blocks]:
        single = setting.dtype == "float32"
        for block_m, block_n, warps, stages in product((128, 64, 32), (128, 64, 32), (4, 8), (1, 2, 3, 4)):
            is_in_tile = block_m <= setting.tile[0] and block_n <= setting.tile[1]
            is_sensible = 1024 <= block_m * block_n <= (4096 if single else 16384) and (stages <= 2) == single
            if is_in_tile and (is_sensible or (not single and stages == 2)):
                yield tiles.Blocks(block_m, block_n, warps, stages)

    def run(self, kernel: str, blocks: tiles.Blocks | None) -> list[Tensor]:
        chosen = tiles.block_sizes
        with patch.object(tiles, "block_sizes", lambda *given: blocks or chosen(*given)):
            if kernel == "_fwd_kernel":
                return list(tiles.forward(self.q, self.k, self.v, self.layout, self.modifiers))
            launcher = tiles._Launcher(self.q, self.k, self.v, self.layout, self.modifiers)
            results = [like(side, side.shape[3]) for side in ([self.q] if kernel == KERNELS[1] else [self.k, self.v])]
            own = [*map(ptr_and_strides, results), launcher.bias, self.modifiers.scale, False]
            launcher.launch(getattr(tiles, kernel), self.upstream, *own)
            return results


class RowsCase(Case):
    """32 edges a node, all equally likely."""

    @staticmethod
    def make_layout(setting: Setting, device: str) -> Any:
        return csr_of(random_edges(setting.nodes, 32 * setting.nodes), setting.nodes, device)

    @staticmethod
    def candidates(setting: Setting) -> Iterator[rows.Blocks]:
        for numbers, warps in product((512, 1024, 2048, 4096), (1, 2, 4)):
            if 8 <= numbers // (32 * warps) <= 64:
                yield rows.Blocks(numbers, warps)

    def run(self, kernel: str, blocks: rows.Blocks | None) -> list[Tensor]:
        with patch.dict(rows.BLOCKS, {kernel: blocks} if blocks else {}):
            launcher = rows._Launcher(self.q, self.k, self.v, self.layout, self.modifiers)
            if kernel == "_fwd_kernel":
                return list(launcher.forward(like(self.q, self.v.shape[3])))
            if kernel == "_bwd_dq_kernel":
                return [launcher.backward_dq(self.upstream, like(self.q, self.q.shape[3]), None)]
            grads = like(self.k, self.k.shape[3]), like(self.v, self.v.shape[3])
            return list(launcher.backward_dkdv(self.upstream, *grads, None))


CASES: dict[str, type[Case]] = {"tiles": TilesCase, "rows": RowsCase}


def compile_one(job: tuple[Setting, str, Any]) -> None:
    setting, kernel, blocks = job
    with suppress(Exception):  # told when it is timed
        CASES[setting.family](setting._replace(nodes=SMALL)).run(kernel, blocks)
        torch.cuda.synchronize()


def timed(case: Case, kernel: str, tried: list[Any]) -> list[tuple[float, str]]:
    """Milliseconds of the table's blocks and of each candidate, fastest first; failures last."""
    runs: dict[str, Callable[[], object]] = {"the table's": partial(case.run, kernel, None)}
    found, right = [], case.run(kernel, None)
    for blocks in tried:
        try:
            results = case.run(kernel, blocks)
            apart = max(float((a.float() - b.float()).abs().max()) for a, b in zip(results, right, strict=True))
            if not apart < 0.05:
                raise AssertionError(f"differs by {apart:.3g}")
            runs[str(blocks)] = partial(case.run, kernel, blocks)
        except Exception as error:
            found.append((float("inf"), f"{blocks}: {failure(error, 60)}"))
    found += [(milliseconds(each)[1], name) for name, each in in_turn(runs, 5, warmup=1).items()]
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_blocks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", choices=CASES)
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128], help="head dimensions")
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=["plain"])
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=KERNELS)
    parser.add_argument("--tile", type=int, nargs=2, default=(128, 64), help="queries and keys")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--top", type=int, default=4, help="how many to print")
    options = parser.parse_args()
    nodes, heads = (65_536, 16) if options.family == "tiles" else (1_000_000, 4)
    settings = [
        Setting(options.family, nodes, heads, dim, options.dtype, kind, tuple(options.tile))
        for dim, kind in product(options.dim, options.kind)
    ]
    case_of = CASES[options.family]
    jobs = [
        (setting, kernel, blocks)
        for setting in settings
        for kernel in options.kernel
        for blocks in case_of.candidates(setting)
    ]
    on_all_processors(compile_one, jobs)
    for setting in settings:
        case = case_of(setting)
        for kernel in options.kernel:
            print(f"{kernel}, {setting}")
            for place, (ms, name) in enumerate(timed(case, kernel, list(case_of.candidates(setting)))):
                if place < options.top or "table" in name or ms == float("inf"):
                    print(f"    {ms:.3f} ms {name}", flush=True)


if __name__ == "__main__":
    main()
