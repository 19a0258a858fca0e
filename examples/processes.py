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
        begin(on_gpu=best_device(device).type == "cuda")
        if own.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end
    return own


def begin(*, on_gpu: bool) -> None:
    """Make the process group, by nccl or gloo.

    Where torchrun starts again after a death, the processes find each other apart from what the dead ones have written.
    """
    own = processes()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    first = own.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = torch.distributed.TCPStore(address, port, own.count, is_master=first)
    store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=own.rank, world_size=own.count)


def summed(tensors: list[Tensor]) -> None:
    """Each becomes its sum over the processes: of parts of a gradient, the whole."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
