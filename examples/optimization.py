"""The optimisers of matrices and of everything else, their rates, and the device and precision that they run in."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalised, for matrices (Jordan et al. 2024), with torch.optim.Muon's meaning.

    The Newton–Schulz iteration runs over all matrices of one shape at once, in the precision that is faster here;
    torch's runs in bfloat16, one by one, which is right for a GPU and slow on most CPUs.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; of a closure, which computes the loss and its gradients, first that."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                steps = torch.stack([self._momentum(param, group["momentum"]) for param in params])
                updates = orthogonal(steps.to(self.dtype)).to(steps.dtype)
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        return loss

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        """Nesterov's."""
        assert param.grad is not None  # every matrix of a layer has its part in the loss
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        mean = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(mean, momentum)


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows or columns, by five quintic Newton–Schulz steps: (n, A, B)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """The layers' matrices in the first, everything else in the last."""
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not matrices:
        return [adamw]
    if args.optimizer == "adamw":
        lr = args.lr or 0.001
        return [
            torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True),
            adamw,
        ]
    options = {"lr": args.lr or 0.02, "momentum": 0.9, "weight_decay": args.weight_decay}
    if matrices[0].is_cuda:
        return [torch.optim.Muon(matrices, **options), adamw]
    return [Muon(matrices, dtype=getattr(torch, args.dtype), **options), adamw]


def rate(step: int, args: argparse.Namespace) -> float:
    """The factor of the peak learning rates: warm-up, then half a cosine to 0."""
    rising = min(1.0, (step + 1) / max(args.warmup, 1))
    return rising * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def best_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def faster_dtype(loss: Callable[[int], Tensor], model: nn.Module, device: torch.device) -> str:
    """bfloat16 on GPUs; on a CPU whichever trains this very model faster, by a trial."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type == "mps":
        return "bfloat16"
    seconds = {}
    for dtype in ("float32", "bfloat16") * 3:
        start = time.perf_counter()
        with autocast(device, dtype):
            loss(0).backward()
        seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
    model.zero_grad()
    return "bfloat16" if seconds["bfloat16"] < 0.9 * seconds["float32"] else "float32"
