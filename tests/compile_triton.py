"""Compiles the Triton kernels for a GPU without one, and reports registers, spills, matrix products and wide loads.

    python tests/compile_triton.py tiles|rows|products [--arch 90 --bytes 2 --dim 64 --bias edge --modifier dropout]

Ends with an error if a kernel keeps more numbers outside of registers than `SPILLS` says, multiplies tiles without the
tensor cores or gathers rows by less than 16 bytes, or is compiled anew for another number of nodes. The launch code is
the real one, on tensors of the CPU; nothing is launched.
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
from attngraph.graph.base import at_size
from attngraph.graph.listing import list_edges
from attngraph.kernels.contract import Dropout, Modifiers, ScoreBias, Transform
from attngraph.kernels.triton import products as products_triton
from attngraph.kernels.triton import rows as rows_triton
from attngraph.kernels.triton import tiles as tiles_triton
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORES = {80: "HMMA", 90: "HGMMA|HMMA"}  # instructions that multiply matrices
BIASES = (None, "offset", "edge", "dense", "keys", "padding")
DROPOUT = {"dropout": Dropout(0.1, torch.tensor(7))}
SOFTCAP = {"transform": Transform("softcap", 50.0)}
MODIFIERS = {
    "dropout": DROPOUT,
    "softcap": SOFTCAP,
    "leaky_relu": {"transform": Transform("leaky_relu", 0.2)},
    "softcap+dropout": SOFTCAP | DROPOUT,
    "sigmoid": {"normalize": "sigmoid"},
    "sigmoid+dropout": {"normalize": "sigmoid"} | DROPOUT,
    "squared_relu": {"normalize": "squared_relu"},
}

# What does not quite fit, whatever the blocks: the kernels of tiles in float32, which multiplies three times as TF32.
# By version of Triton: by architecture, kernel and dimension, and by bias, bytes of a thread outside of registers.
SPILLS = {  # the newest version last
    "3.6": {
        (80, "_fwd_kernel", 128): {None: 24},
        (80, "_bwd_dq_kernel", 32): {"offset": 32},
        (80, "_bwd_dq_kernel", 64): {"offset": 8},
        (80, "_bwd_dq_kernel", 128): {"offset": 80, "edge": 8},
        (80, "_bwd_dkdv_kernel", 32): {None: 8, "offset": 8, "edge": 16, "dense": 48, "keys": 64},
        (80, "_bwd_dkdv_kernel", 128): {None: 32, "offset": 48, "edge": 56},
        (90, "_fwd_kernel", 128): {None: 40},
        (90, "_bwd_dq_kernel", 64): {"offset": 8},
        (90, "_bwd_dq_kernel", 128): {None: 16},
        (90, "_bwd_dkdv_kernel", 64): {None: 8},
        (90, "_bwd_dkdv_kernel", 128): {None: 16},
    },
    "3.8": {
        (80, "_fwd_kernel", 32): {None: 8},
        (80, "_bwd_dq_kernel", 32): {"offset": 16},
        (80, "_bwd_dq_kernel", 64): {"offset": 8},
        (80, "_bwd_dq_kernel", 128): {"offset": 80, "edge": 48, "dense": 48, "keys": 32, "padding": 24},
        (80, "_bwd_dkdv_kernel", 32): {None: 40, "offset": 8, "edge": 32, "dense": 48, "keys": 64, "padding": 8},
        (80, "_bwd_dkdv_kernel", 128): {None: 24, "offset": 16, "edge": 24, "dense": 24, "keys": 56, "padding": 88},
        (90, "_bwd_dq_kernel", 32): {"offset": 8},
        (90, "_bwd_dq_kernel", 128): {None: 16, "offset": 112, "edge": 48, "dense": 56, "keys": 56, "padding": 8},
        (90, "_bwd_dkdv_kernel", 32): {"offset": 8, "edge": 24, "dense": 32, "keys": 48, "padding": 48},
        (90, "_bwd_dkdv_kernel", 128): {None: 16, "offset": 32, "edge": 40, "dense": 80, "keys": 136, "padding": 128},
    },
}
# In half precision, by kernel and dimension: on an H200 the fastest of all blocks tried, although they spill.
FASTEST_THOUGH_SPILLING = {
    (90, "_bwd_dkdv_kernel", 32): 40,
    (90, "_bwd_dkdv_kernel", 64): 160,
    (90, "_fwd_kernel", 128): 272,
    (90, "_bwd_dkdv_kernel", 128): 256,
}

# With a modifier, in any version: by architecture, kernel, bytes of a number and dimension; nearly all in float32,
# whose products are three of TF32. No blocks that were tried hold these in registers.
MODIFIED_SPILLS = {
    (80, "_bwd_dkdv_kernel", 4, 32): {
        "dropout": 168, "softcap": 16, "leaky_relu": 24, "softcap+dropout": 152, "sigmoid": 16,
        "sigmoid+dropout": 136, "squared_relu": 16,
    },
    (80, "_bwd_dq_kernel", 4, 128): {"dropout": 32, "leaky_relu": 24, "softcap+dropout": 24, "sigmoid+dropout": 16},
    (80, "_bwd_dkdv_kernel", 4, 128): {
        "dropout": 328, "softcap": 32, "leaky_relu": 32, "softcap+dropout": 320, "sigmoid": 40,
        "sigmoid+dropout": 304, "squared_relu": 48,
    },
    (90, "_bwd_dkdv_kernel", 2, 32): {"squared_relu": 8},
    (90, "_fwd_kernel", 4, 64): {"sigmoid": 16, "squared_relu": 16},
    (90, "_bwd_dq_kernel", 4, 128): {"dropout": 32, "leaky_relu": 16, "softcap+dropout": 8, "sigmoid": 8},
    (90, "_bwd_dkdv_kernel", 4, 128): {
        "dropout": 328, "softcap": 32, "leaky_relu": 32, "softcap+dropout": 328, "sigmoid": 32, "sigmoid+dropout": 312,
        "squared_relu": 48,
    },
}  # fmt: skip


def known_to_spill(kernel: str, bias: str | None, modifier: str | None, arch: int, itemsize: int, dim: int) -> int:
    """How many bytes a kernel of tiles may spill; a version without a table goes by the newest."""
    if modifier is not None:
        return MODIFIED_SPILLS.get((arch, kernel, itemsize, dim), {}).get(modifier, 0)
    if itemsize == 2:
        return FASTEST_THOUGH_SPILLING.get((arch, kernel, dim), 0) if bias is None else 0
    version = ".".join(triton.__version__.split(".")[:2])
    table = SPILLS.get(version, list(SPILLS.values())[-1])
    return table.get((arch, kernel, dim), {}).get(bias, 0)


class OfflineDriver:
    """A driver without a device: it only says what to compile for."""

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
    kernels, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(OfflineDriver(arch))
    with patch.object(JITFunction, "run", compile_only), patch.object(tiles_triton, "architecture", lambda _: arch):
        yield kernels


def run(
    family: str, dim: int, dtype: torch.dtype, n: int, bias: str | None = None, modifier: str | None = None
) -> None:
    """Forward and backward, with a bias and its gradient if there is one; a "bias" of padding is a mask."""
    graph = Window(40, 0) | Prefix(3)
    bound = at_size(graph, n, n)[0]
    if family == "tiles":
        layout = Tiles(n, n, tabulate(bound, n, n, (128, 64)))
    else:
        with patch.dict("attngraph.planning.layouts.csr.HEAVY_DEGREE", cpu=30):
            layout = CSR.from_edges(*list_edges(bound, n, n), n, n)
            _ = layout.numbered  # both halves with heavy nodes
    q, k, v = torch.zeros(3, 1, 2, n, dim, dtype=dtype)
    if family == "products":
        run_products(q, k, layout, modifier or "")
        return
    module = {"tiles": tiles_triton, "rows": rows_triton}[family]
    shapes = {
        "offset": (2, 2 * n - 1),
        "edge": (1, 2, graph.num_edges(n, n)),
        "dense": (1, 2, n, n),
        "keys": (1, 2, 1, n),
    }
    if bias == "padding":
        modifiers = Modifiers(1.0, attention_mask=torch.ones(1, n, dtype=torch.bool))
    else:
        kind = "dense" if bias == "keys" else bias
        modifiers = Modifiers(1.0, None if bias is None else ScoreBias(kind, torch.zeros(shapes[bias])))
    if modifier is not None:
        modifiers = modifiers._replace(**MODIFIERS[modifier])
    out, lse = module.forward(q, k, v, layout, modifiers)
    module.backward(q, k, v, out, lse, out, lse, layout, modifiers, modifiers.bias is not None)


def run_products(q: torch.Tensor, k: torch.Tensor, layout: CSR, activation: str) -> None:
    """The scores of all edges and their gradients."""
    weight = torch.zeros(q.shape[1], q.shape[3], dtype=q.dtype) if activation else None
    dproducts = products_triton.products(q, k, weight, layout, 1.0, activation)
    products_triton.products_backward(dproducts, q, k, weight, layout, 1.0, activation)


def report(kernel, arch: int) -> dict:
    """Registers of a thread, bytes of it outside of registers, and how many instructions multiply matrices or load 16
    bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spilled": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "products": len(re.findall(rf"\b(?:{TENSOR_CORES[arch]})\b", code)),
        "loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", code)),
        "shared": kernel.metadata.shared,
    }


def _cuobjdump(option: str, file: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout


def check_code(
    family: str, arch: int, dtype: torch.dtype, dim: int, bias: str | None, modifier: str | None
) -> list[dict]:
    """The kernels whose code is not as it should be, all of them printed."""
    wrong = []
    with compiled(arch) as kernels:
        run(family, dim, dtype, 320, bias, modifier)
    for kernel in kernels:
        figures = report(kernel, arch)
        allowed = 0
        if family == "tiles":
            allowed = known_to_spill(figures["kernel"], bias, modifier, arch, dtype.itemsize, dim)
        is_main = figures["kernel"] in ("_fwd_kernel", "_bwd_dq_kernel", "_bwd_dkdv_kernel", "_bwd_dk_kernel")
        wanted = figures["products" if family == "tiles" else "loads"]
        is_sound = figures["spilled"] <= allowed and (wanted > 0 or not is_main)
        print(arch, dim, dtype, bias, modifier, figures, "" if is_sound else "WRONG", flush=True)
        if not is_sound:
            wrong.append(figures)
    return wrong


def compiled_anew(family: str, arch: int, dtype: torch.dtype, dim: int) -> list[str]:
    """The kernels that are compiled again for another number of nodes."""
    with compiled(arch) as kernels:
        for n in (320, 333, 4096):
            run(family, dim, dtype, n)
    versions = {}
    for kernel in kernels:
        versions.setdefault(kernel.metadata.name, set()).add(id(kernel))
    return [name for name, ids in versions.items() if len(ids) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=("tiles", "rows", "products"))
    parser.add_argument("--arch", type=int, default=90, choices=TENSOR_CORES)
    parser.add_argument("--bytes", type=int, default=2, choices=(2, 4, 8), help="of a number")
    parser.add_argument("--dim", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--bias", nargs="+", choices=("none", *BIASES[1:]), help="default: all with 64, none elsewhere")
    parser.add_argument("--modifier", nargs="+", choices=(*MODIFIERS, "tanh"), help="of products, the activation")
    parser.add_argument("--every", action="store_true", help="each bias with each dimension, not with 64 alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype, wrong = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[options.bytes], []
    dims = options.dim
    if options.family == "tiles":
        dims = [dim for dim in dims if dim <= max(tiles_triton.BLOCKS[options.arch]["_fwd_kernel", options.bytes])]
    for dim in dims:
        has_all = (dim == 64 or options.every) and options.family != "products" and not options.modifier
        biases = BIASES if has_all else (None,)
        if options.bias:
            biases = [None if bias == "none" else bias for bias in options.bias]
        for bias in biases:
            for modifier in options.modifier or (None,):
                wrong += check_code(options.family, options.arch, dtype, dim, bias, modifier)
        if None in biases and not options.modifier:
            wrong += compiled_anew(options.family, options.arch, dtype, dim)
    if wrong:
        sys.exit(f"wrong: {wrong}")


if __name__ == "__main__":
    main()
