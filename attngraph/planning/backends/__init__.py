"""Every way to run attention on a graph, in one dict. Nothing else decides what can run, or what it would take."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attngraph.graph import dynamic
from attngraph.planning.backends.base import Backend
from attngraph.planning.backends.blocks import NumbaBlocks
from attngraph.planning.backends.dense import Dense
from attngraph.planning.backends.edges import Edges
from attngraph.planning.backends.reference import Reference
from attngraph.planning.backends.rows import NumbaRows, TritonRows
from attngraph.planning.backends.steps import Steps
from attngraph.planning.backends.tiles import NumbaTiles, TorchTiles, TritonTiles
from attngraph.planning.call import Call

BACKENDS: dict[str, Backend] = {
    "reference": Reference(),
    "edges": Edges(),
    "dense": Dense(),
    "blocks (numba)": NumbaBlocks(),
    "tiles (triton)": TritonTiles(),
    "tiles (numba)": NumbaTiles(),
    "tiles (torch)": TorchTiles(),
    "rows (triton)": TritonRows(),
    "rows (numba)": NumbaRows(),
    "steps": Steps(),
}
"""By label; of several with one name, those that are faster where they can run come first."""


def names() -> list[str]:
    """What ``attend(…, backend=…)`` may be, apart from "auto"."""
    return list(dict.fromkeys(backend.name for backend in BACKENDS.values()))


def kernel_for(name: str, call: Call) -> Backend | None:
    """The first backend of this name that can run the call."""
    for backend in BACKENDS.values():
        if backend.name == name and backend.supports(call) is None:
            return backend
    return None


def makes_products(q: Tensor) -> bool:
    """Whether there are kernels that make the scores of all edges by themselves, for tensors like q."""
    call = Call(1, 1, 1, 1, 1, 1, q.dtype, q.device, compiled=torch.compiler.is_compiling())
    return kernel_for("rows", call) is not None


def products_of(q: Tensor) -> Any:
    """Their module."""
    return import_module(
        "attngraph.kernels.cpu.products" if q.device.type == "cpu" else "attngraph.kernels.triton.products"
    )


def chooser_for(q: Tensor) -> dynamic.Chooser:
    """What finds the choices of queries like q."""
    if q.device.type != "cpu" or torch._C._are_functorch_transforms_active() or not makes_products(q):
        return dynamic.IN_TORCH
    kernel, for_each = (import_module(f"attngraph.kernels.cpu.{name}") for name in ("choosing", "openmp"))
    largest = lambda scores, k: kernel.largest(scores, k) if 0 < k <= kernel.MAX_K else dynamic.largest(scores, k)  # noqa: E731
    return dynamic.Chooser(largest, for_each.parallel_for)


def products_of_tiles() -> Any:
    """The module that makes dot products of edges in tiles."""
    return import_module("attngraph.kernels.cpu.tiles_products")


def reasons(name: str, call: Call) -> dict[str, str]:
    """Why no backend of this name can run the call: by label."""
    found = {label: backend.supports(call) for label, backend in BACKENDS.items() if backend.name == name}
    return {label: reason for label, reason in found.items() if reason is not None}
