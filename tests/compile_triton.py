"""Compiles the Triton kernels for a GPU without one, and reports registers, spills, matrix products and wide loads.

    python tests/compile_triton.py tiles|rows [--arch 90 --bytes 2 --dim 64]

Ends with an error if a kernel keeps numbers outside of registers, multiplies tiles without the tensor cores or gathers
rows by less than 16 bytes, or is compiled anew for another number of nodes. The launch code is the real one, on tensors
of the CPU; nothing is launched.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))
from attngraph import Prefix, Window
from attngraph.kernels.triton import rows as rows_triton
from attngraph.kernels.triton import tiles as tiles_triton
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCT = {80: "HMMA", 90: "HGMMA|HMMA"}


def known_to_spill(kernel: str, bias: str | None, size: int, dim: int) -> bool:
    """What does not quite fit, whatever the blocks: gradients in float32, above all with a bias; none of training."""
    if size == 4:
        return kernel.startswith("_backward") and (bias is not None or dim in (32, 128))
    return size == 2 and (kernel, bias, dim) == ("_backward_rows", "offset", 256)


class Pretended:
    """A driver that only says what to compile for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextmanager
def compiled(arch: int):
    """Collects the kernels that are compiled instead of launched."""
    found, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        found.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(Pretended(arch))
    with patch.object(JITFunction, "run", compile_only), patch.object(tiles_triton, "architecture", lambda _: arch):
        yield found


def run(kernels: str, dim: int, dtype: torch.dtype, n: int, bias: str | None = None) -> None:
    """Forward and backward, with a bias and its gradient if there is one."""
    graph = Window(40, 0) | Prefix(3)
    bound, module = graph.at(n, n)[0], {"tiles": tiles_triton, "rows": rows_triton}[kernels]
    if kernels == "tiles":
        layout = Tiles(n, n, tabulate(bound, n, n, (128, 64)))
    else:
        with patch.dict("attngraph.planning.layouts.csr.HEAVY_DEGREE", cpu=30):
            layout = CSR.from_edges(*bound.list_edges(n, n), n, n)
            _ = layout.numbered  # both halves with heavy nodes
    q, k, v = torch.zeros(3, 1, 2, n, dim, dtype=dtype)
    shapes = {
        "offset": (2, 2 * n - 1),
        "edge": (1, 2, graph.num_edges(n, n)),
        "dense": (1, 2, n, n),
        "keys": (1, 2, 1, n),
    }
    given = None if bias is None else ("dense" if bias == "keys" else bias, torch.zeros(shapes[bias]))
    out, lse = module.forward(q, k, v, layout, given, 1.0)
    module.backward(q, k, v, out, lse, out, lse, layout, given, 1.0, bias is not None)


def report(kernel, arch: int) -> dict:
    """Registers a thread, bytes of them in memory, and how many instructions multiply matrices."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return {
        "kernel": kernel.metadata.name,
        "registers": registers,
        "spilled": stack + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "products": len(re.findall(rf"\b(?:{PRODUCT[arch]})\b", code)),
        "loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", code)),
        "shared": kernel.metadata.shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kernels", choices=("tiles", "rows"))
    parser.add_argument("--arch", type=int, default=90, choices=PRODUCT)
    parser.add_argument("--bytes", type=int, default=2, choices=(2, 4, 8), help="of a number")
    parser.add_argument("--dim", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--every", action="store_true", help="each bias with each dimension, not with 64 alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype, wrong = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[options.bytes], []
    for dim in (
        options.dim
        if options.bytes == 2 or options.kernels == "rows"
        else [each for each in options.dim if each <= 128]
    ):
        for bias in (None, "offset", "edge", "dense", "keys") if dim == 64 or options.every else (None,):
            with compiled(options.arch) as found:
                run(options.kernels, dim, dtype, 320, bias)
            for kernel in found:
                figures = report(kernel, options.arch)
                known = known_to_spill(figures["kernel"], bias, options.bytes, dim)
                main = figures["kernel"].startswith(("_forward", "_backward"))
                wanted = figures["products" if options.kernels == "tiles" else "loads"]
                sound = (known or not figures["spilled"]) and (wanted or not main)
                print(dim, dtype, bias, figures, "" if sound else "WRONG", flush=True)
                wrong += [] if sound else [figures]
    with compiled(options.arch) as found:
        for n in (320, 333, 4096):
            run(options.kernels, 64, dtype, n)
    kinds = {
        kernel.metadata.name: {id(one) for one in found if one.metadata.name == kernel.metadata.name}
        for kernel in found
    }
    wrong += [name for name, known in kinds.items() if len(known) > 1]
    if wrong:
        sys.exit(f"wrong: {wrong}")


if __name__ == "__main__":
    main()
