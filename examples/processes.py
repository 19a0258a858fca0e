"""One model that several processes train together, as torchrun starts them: each its own part of every step."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import torch
import torch.distributed
from optimization import best_device
from torch import Tensor


class Processes(NamedTuple):
    """Those that train one model together, each on its own part of every step's batches."""

    rank: int
    """Which of them this is; the first alone writes and tells."""
    count: int


def processes() -> Processes:
    """As torchrun has started them; else this one alone."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def join(device: str) -> Processes:
    """Let the processes that torchrun has started know each other, each on a GPU of its own where there are any."""
    own = processes()
    if own.count > 1 and not torch.distributed.is_initialized():
        on_gpu = best_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        if own.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end
    return own


def summed(tensors: list[Tensor]) -> None:
    """Each becomes its sum over the processes: of parts of a gradient, the whole."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
