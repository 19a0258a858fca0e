"""Rows that travel between ranks: one asynchronous all-to-all each, and what is said where it fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, int, int]
"""(batch, heads, dimension) of the numbers that a node has."""


class CommunicationError(RuntimeError):
    """A collective failed: a rank died, stalled until the timeout of the process group, or asked for other sizes."""


class Ranks:
    """The ranks of a process group, as one of them sees them."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.received_bytes = 0
        """Bytes that came from other ranks, since it was last set to 0."""

    def to_all(self, x: Tensor, what: str) -> Tensor:
        """x (K,) of every rank, on every rank: (ranks, K)."""
        if not x.numel():
            return x.new_empty(self.count, *x.shape)
        own = x.contiguous().flatten().view(torch.uint8)  # not every backend takes every dtype
        parts = [torch.empty_like(own) for _ in range(self.count)]
        self._guarded(what, lambda: dist.all_gather(parts, own, group=self.group))
        return torch.stack([part.view(x.dtype).view(x.shape) for part in parts])

    @property
    def checks_calls(self) -> bool:
        """Whether each call is compared: where no GPU waits for that, or TORCH_DISTRIBUTED_DEBUG=DETAIL asks for it."""
        return dist.get_backend(self.group) == "gloo" or os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL"

    def from_first(self, x: Tensor, what: str) -> Tensor:
        """x as rank 0 of the group has it."""
        x = x.clone()
        self._guarded(what, lambda: dist.broadcast(x, group_src=0, group=self.group))
        return x

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int], what: str) -> Callable[[], Tensor]:
        """Rows of x (rows, width), so many to each rank and from each: what waits for those that come."""
        out = x.new_empty(sum(received), x.shape[1])
        if not x.shape[1]:
            return lambda: out
        begin = lambda: dist.all_to_all_single(  # noqa: E731
            out, x.contiguous(), list(received), list(sent), group=self.group, async_op=True
        )
        work = self._guarded(what, begin)
        self.received_bytes += out.nbytes

        def wait() -> Tensor:
            self._guarded(what, work.wait)
            return out

        return wait

    def _guarded(self, what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except RuntimeError as error:
            raise CommunicationError(
                f"{what} failed on rank {self.rank} of {self.count}: another rank died, stalled beyond the timeout of "
                f"the process group, or raised an error; look at what the others say, and resume from the last "
                f"checkpoint ({error})"
            ) from error


def packed_rows(sides: Sequence[Tensor], row: Tensor) -> Tensor:
    """Some rows of x (B, H, N, D), and of others of so many nodes, as one message: (rows, numbers of a row)."""
    return torch.cat([side.index_select(2, row).permute(2, 0, 1, 3).flatten(1) for side in sides], 1)


def unpacked_rows(message: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The reverse: (B, H, rows, D) of each shape."""
    widths = [batch * heads * dim for batch, heads, dim in shapes]
    parts = zip(message.split(widths, 1), shapes, strict=True)
    return [part.view(len(message), *shape).permute(1, 2, 0, 3) for part, shape in parts]
