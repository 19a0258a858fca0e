"""What the Triton kernels of tiles and of rows share: how tensors and biases come to them, and Δ of each query.

A tensor (B, H, nodes, D), its vectors contiguous, comes as a tuple: its first number, the strides of batch, head and
node. A bias comes with its four strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_BIAS, OFFSET, DENSE, EDGE = (tl.constexpr(kind) for kind in range(4))
KINDS = {None: 0, "offset": 1, "dense": 2, "edge": 3}

# ------------------------------------------------------------------------------------------------- in kernels


@triton.jit
def vectors(side, b, h, node, count, dim: tl.constexpr, wide: tl.constexpr, guard: tl.constexpr):
    """The vectors of some nodes, (nodes, wide): 0 beyond dim, and with `guard` beyond the last node."""
    d = tl.arange(0, wide)
    at = side[0] + b * side[1] + h * side[2] + node[:, None] * side[3] + d[None, :]
    if guard and dim != wide:
        return tl.load(at, mask=(node < count)[:, None] & (d < dim)[None, :], other=0.0)
    if guard:
        return tl.load(at, mask=(node < count)[:, None], other=0.0)
    if dim != wide:
        return tl.load(at, mask=(d < dim)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def place_of_bias(bias, b, h, i, j, n, edge, kind: tl.constexpr):
    """Where the bias of pairs (i, j) stands; `edge` are their numbers."""
    at = bias[0] + b * bias[1] + h * bias[2]
    if kind == OFFSET:
        at += j - i + n - 1
    elif kind == DENSE:
        at += i * bias[3] + j * bias[4]
    else:
        at += edge
    return at


@triton.jit(do_not_specialize=["blocks", "H", "n"])
def _settle(
    out,
    dout,
    dlse,
    delta,
    blocks,
    H,
    n,
    dim: tl.constexpr,
    wide: tl.constexpr,
    number: tl.constexpr,
    size: tl.constexpr,
):
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i = block.to(tl.int64) * size + tl.arange(0, size)
    a = vectors(out, head // H, head % H, i, n, dim, wide, True).to(number)
    b = vectors(dout, head // H, head % H, i, n, dim, wide, True).to(number)
    less = tl.load(dlse + head * n + i, mask=i < n, other=0.0)
    tl.store(delta + head * n + i, tl.sum(a * b, 1) - less, mask=i < n)


# -------------------------------------------------------------------------------------------------- on the host


def side_of(x: Tensor) -> tuple:
    """A tensor as kernels take it, its vectors contiguous."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, *x.stride()[:3]


def bias_of(values: Tensor) -> tuple:
    """The values of a bias as kernels take them: a dimension of size 1 serves all."""
    strides = (0 if size == 1 else stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return values, *strides


def spread(bias: tuple[str, Tensor]) -> Tensor:
    """The values with four dimensions: (1, H | 1, 1, N + M - 1), (B | 1, H | 1, 1, E), (B | 1, H | 1, N | 1, M)."""
    kind, values = bias
    if kind == "dense":
        return values
    return (values[None, :, None] if kind == "offset" else values[:, :, None]).contiguous()


def constants(shape: NamedTuple) -> NamedTuple:
    """What a kernel is compiled for, as the compiler takes it: before Triton 3.7 a bare number in a list is none."""
    interpreted = not isinstance(vectors, triton.JITFunction)
    return shape if interpreted else type(shape)(*map(tl.constexpr, shape))


def width(dim: int) -> int:
    """The power of two in which vectors are held."""
    return max(16, triton.next_power_of_2(dim))


def delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """Σ_d out · dout - dlse, (B, H, N)."""
    (_, H, N, D), found = out.shape, torch.empty_like(lse)
    size = max(8, 16384 // (width(D) * out.element_size()))  # nodes of a program, whose vectors stay in registers
    blocks = -(-N // size)
    dlse, number = torch.zeros_like(lse) if dlse is None else dlse.contiguous(), number_of(lse)
    if programs := blocks * lse.shape[:2].numel():
        _settle[(programs,)](side_of(out), side_of(dout), dlse, found, blocks, H, N, D, width(D), number, size)
    return found


def number_of(x: Tensor) -> tl.dtype:
    """What kernels compute in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def summed_as(values: Tensor, room: Tensor) -> Tensor:
    """A gradient for each head and each pair or edge, as that of values which some of them share."""
    shared = [axis for axis, size in enumerate(values.shape) if size == 1 != room.shape[axis]]
    return room.sum(shared, keepdim=True) if shared else room
