"""Ranks for tests: processes on this machine that are made once, and run functions together."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 300  # seconds for which a rank waits for the others


def free_port() -> int:
    """One on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """So many processes, each with a process group of the first 1, 2, … of them."""

    def __init__(self, count: int):
        context, port, self.count = mp.get_context("spawn"), free_port(), count
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, count: int, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(group, *arguments)` returns on each of the first `count` ranks; else the error of one."""
        for pipe in self.pipes[:count]:
            pipe.send((count, function, arguments))
        answers = [pipe.recv() for pipe in self.pipes[:count]]
        for failed, answer in answers:
            if failed:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End them."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def joined(rank: int, count: int, port: int) -> None:
    """This process becomes a rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["ATTNGRAPH_COSTS"] = "avx512"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT))


def _serve(rank: int, count: int, port: int, pipe: Any) -> None:
    joined(rank, count, port)
    groups = [dist.new_group(list(range(size))) for size in range(1, count + 1)]
    while (asked := pipe.recv()) is not None:
        size, function, arguments = asked
        try:
            pipe.send((False, function(groups[size - 1], *arguments)))
        except BaseException:
            pipe.send((True, f"rank {rank} of {size}: {traceback.format_exc()}"))
    dist.destroy_process_group()


def gradients(function: Callable, sides: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function of some tensors, and their gradients."""
    sides = [side.detach().clone().requires_grad_() for side in sides]
    out = function(*sides)
    total = (out * dout).sum() + 0 * sum(side.sum() for side in sides)
    return [out.detach(), *torch.autograd.grad(total, sides, allow_unused=True, materialize_grads=True)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The result to 1e-12, its gradients to 1e-10."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 if number else 1e-12)
