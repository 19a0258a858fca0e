"""What a backend is: the one contract by which the planner asks what can run a call, and what it would take."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from attngraph.bias import Bias
from attngraph.graph.base import Graph
from attngraph.kernels.available import why_not
from attngraph.kernels.contract import Gradients, Modifiers
from attngraph.kernels.scoring import FUSED_SCORES, NORMALIZER_NAMES
from attngraph.planning.call import Call, Request
from attngraph.planning.costs import Costs
from attngraph.planning.edge_set import EdgeSet, Tiling

Results = tuple[Tensor, Tensor | None, Tensor | None]


class Backend(ABC):
    """One way to compute attention on a graph. A new one is a file with a class, and a line in `BACKENDS`.

    A backend with a `backward` can run some of a graph's edges beside other backends, as results merge by their lse.
    One without is differentiated by torch itself, and runs all edges of all heads.
    """

    name: ClassVar[str]
    """What `attend(…, backend=…)` calls it. Several kernels of one strategy share a name: the first that can, runs."""
    kernel: ClassVar[str] = ""
    """What it is made of, where several share a name."""
    tiling: Tiling = Tiling((64, 64), block=(64, 64))
    """The tiles in which it computes, or in which its edges are counted, if `tile_seconds` is there."""
    takes_no_dims: ClassVar[bool] = False
    """Whether keys may be of dimension 0, so that scores are their bias alone."""
    takes_half: ClassVar[bool] = False
    """Whether it takes bfloat16 and float16 as they are on a CPU, where others are given float32."""
    takes_edge_features: ClassVar[bool] = False
    """Whether it adds features of edges to their keys and values."""
    takes_numbers: ClassVar[bool] = False
    """Whether its dropout goes by the numbers of nodes in a larger graph, where they are given."""
    makes_products: ClassVar[bool] = False
    """Whether its layouts are tiles that `kernels.cpu.tiles_products` reads."""
    reads_by_head: ClassVar[bool] = True
    """Whether it reads the values of edges head after head, rather than those of all heads of an edge at once."""

    # ================================================================== what a backend MUST define

    @abstractmethod
    def supports(self, call: Call) -> str | None:
        """None if it can run the call, else the reason why not, as "it has no dropout"."""

    @abstractmethod
    def estimate(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        """Seconds of a forward pass over these edges, for all heads of one batch entry; without the `rest`."""

    @abstractmethod
    def build(self, edges: EdgeSet, call: Call) -> Any:
        """The layout of these edges that its kernels read."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Any, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, Dv), lse (B, H, N).

        A query without edges has out 0 and lse -inf.
        """

    # =================================================================== what a backend MAY define

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        layout: Any,
        modifiers: Modifiers,
        bias_grad: bool,
    ) -> Gradients:
        """What these edges add to the gradients, from the final out and lse of each query.

        With p = exp(s - lse) and Δ = Σ dout · out - dlse: dv = pᵀ dout, ds = p ∘ (dout vᵀ - Δ), dq = scale · ds k,
        dk = scale · dsᵀ q, dbias = ds. Without it, torch differentiates `forward`.
        """
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Any, bias: Bias | None, request: Request) -> Results:
        """All edges with all options of a call → out, and lse and weights where asked for; by torch's autograd.

        A backend that defines it takes biases as they are given, and options beyond scale and lse.
        """
        raise NotImplementedError

    def runs_whole(self, layout: Any, call: Call) -> bool:
        """Whether `attend` runs the call, rather than `forward` and `backward`."""
        return type(self).attend is not Backend.attend

    def traced_layout(self, graph: Graph, n: int, m: int, device: torch.device) -> Any:
        """The layout in a program that is being compiled, where sizes are symbols."""
        raise NotImplementedError

    def only_by_name(self, call: Call) -> str | None:
        """Why `backend="auto"` does not choose it, though it can run the call; None where it may."""
        return None

    def lacks(self, edges: EdgeSet) -> str | None:
        """Why it can't run these edges, though it can run the call; None if it can."""
        return None

    def overhead(self, edges: EdgeSet, call: Call, costs: Costs) -> float:
        """Seconds that it takes at least, without a look at where the edges lie."""
        return 0.0

    def rest(self, call: Call) -> Call | None:
        """What other backends run, once this one has done its own part."""
        return None

    def tile_seconds(self, edges: Tensor, blocks: Tensor, call: Call, costs: Costs) -> Tensor:
        """For tiles with so many edges in so many blocks, what one head of each would add to the estimate."""
        raise NotImplementedError

    def pairs(self, edges: EdgeSet, layout: Any) -> int:
        """How many scores are computed for each head."""
        return edges.count

    def describe(self, edges: EdgeSet, layout: Any, call: Call) -> str:
        """Why this is a way to run these edges: a line of `Plan.explain`."""
        return ""

    # ===============================================================================================

    @property
    def label(self) -> str:
        """Its name in explanations."""
        return f"{self.name} ({self.kernel})" if self.kernel else self.name

    @property
    def merges(self) -> bool:
        """Whether it can run some of the edges, beside other backends."""
        return type(self).backward is not Backend.backward


class KernelBackend(Backend):
    """A backend whose kernels are a module with `forward` and `backward`, imported when it is first used.

    It computes attention by dot products, their transforms and the normalisers that have names.
    """

    module: ClassVar[str]
    device: ClassVar[str | None] = None
    """The only type of device on which it runs."""
    package: ClassVar[str | None] = None
    """A package that it needs."""

    def supports(self, call: Call) -> str | None:
        if (reason := only_fused_attention(call)) is not None:
            return reason
        if call.edge_features and not self.takes_edge_features:
            return NO_EDGE_FEATURES
        if call.renumbered and not self.takes_numbers:
            return NOT_RENUMBERED
        if self.device not in (None, call.device.type):
            return f"it runs on a {'GPU' if self.device == 'cuda' else 'CPU'}, not on {call.device}"
        if self.package is None:
            return self.limits(call)
        if not INSTALLED[self.package]:
            return f"it needs {self.package}: pip install {INSTALL[self.package]}"
        if (reason := self.limits(call)) is not None or call.compiled:  # a compiled program asks again when it runs
            return reason
        return why_not(self.module, self.package)

    def limits(self, call: Call) -> str | None:
        """Why it can't run a call of plain attention on its device; None if it can."""
        return None

    @property
    def kernels(self) -> Any:
        """The module."""
        return sys.modules.get(self.module) or import_module(self.module)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Any, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
        with current(q.device):
            return self.kernels.forward(q, k, v, layout, modifiers)

    def backward(self, q, k, v, out, lse, dout, dlse, layout, modifiers, bias_grad) -> Gradients:
        sides = q, k, v, out, lse, dout, dlse
        with current(q.device):
            return Gradients(*self.kernels.backward(*sides, layout, modifiers, bias_grad))


def current(device: torch.device) -> AbstractContextManager[object]:
    """Where Triton launches: not where the tensors are, but on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def only_fused_attention(call: Call) -> str | None:
    """Why a kernel of scores and weights at once, with a backward pass of its own, can't run a call."""
    if call.score not in FUSED_SCORES:
        return f"it has no score={call.score!r}"
    if call.normalize not in NORMALIZER_NAMES:
        return f"it has no normalize={call.normalize!r}"
    if call.transform == "forward-mode":
        return "it has no forward-mode derivatives"
    if call.transform is not None:
        return f"{call.transform} can't transform its backward pass"
    return None


def only_plain_attention(call: Call) -> str | None:
    """Why a kernel of softmax attention on dot products that knows the scale alone can't run a call."""
    if (call.score, call.normalize, call.dropout, call.bias, call.padding) != ("dot", "softmax", False, None, False):
        return "it has nothing but the scale"
    return only_fused_attention(call)


def width_factor(call: Call) -> float:
    """How many times as long a call takes as one in float32 with nothing but a scale, of which costs are measured.

    float64 takes twice the time; what kernels do to each score besides, a share of it (`benchmarks.goals`, calls).
    """
    factor = 2.0 if call.number_bytes > 4 else 1.0
    factor *= DROPOUT_FACTOR if call.dropout else 1.0
    return factor * (ELEMENTWISE_FACTOR if call.score != "dot" or call.normalize != "softmax" else 1.0)


DROPOUT_FACTOR, ELEMENTWISE_FACTOR = 1.25, 1.15


NO_EDGE_FEATURES = "it has no edge features"
NOT_RENUMBERED = "its dropout counts nodes from 0 on"
INSTALLED = {name: find_spec(name) is not None for name in ("numba", "scipy", "triton")}
"""Which packages that a backend may need are there."""
INSTALL = {"numba": "'attngraph[cpu]'", "triton": "triton"}  # what to install for each
