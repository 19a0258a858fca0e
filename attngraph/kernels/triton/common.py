"""What the Triton kernels of tiles and of rows share: tensors and biases as kernel arguments, and the delta of a query.

A tensor goes to a kernel together with its strides, as one named tuple:

| argument | fields | of |
|---|---|---|
| `Strided` | ptr, stride_batch, stride_head, stride_row | (B, H, nodes, D), the vectors contiguous |
| `StridedBias` | ptr, stride_batch, stride_head, stride_query, stride_key | the values of a bias |
| `Padding` | ptr, stride_batch | which keys (B, M) are no padding |
| `Upstream` | dout, lse, delta | what the backward kernels read of the forward pass and of the loss |
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_BIAS, OFFSET, DENSE, EDGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
BIAS_KINDS = {None: NO_BIAS.value, "offset": OFFSET.value, "dense": DENSE.value, "edge": EDGE.value}


# --------------------------------------------------------------------------------------------------- arguments


class Strided(NamedTuple):
    """A tensor (B, H, nodes, D) whose vectors are contiguous, as kernels take it."""

    ptr: Tensor
    stride_batch: int
    stride_head: int
    stride_row: int


class StridedBias(NamedTuple):
    """The values of a bias as kernels take them; see `bias_ptrs`."""

    ptr: Tensor
    stride_batch: int
    stride_head: int
    stride_query: int
    stride_key: int


class Padding(NamedTuple):
    """Which keys are no padding, as kernels take it; see `load_real`."""

    ptr: Tensor  # (B, M) bool; without padding, q: it is not read
    stride_batch: int


class Upstream(NamedTuple):
    """What the backward kernels are given besides q, k and v."""

    dout: Strided
    lse: Tensor  # (B, H, N)
    delta: Tensor  # (B, H, N)


# ------------------------------------------------------------------------------------------------- in kernels


@triton.jit
def load_rows(x, batch, head, rows, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """x[batch, head, rows], (rows, BLOCK_D): padded by 0 beyond DIM, and with CHECK_ROWS beyond the last row."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x.ptr + batch * x.stride_batch + head * x.stride_head + rows[:, None] * x.stride_row + offs_d[None, :]
    if CHECK_ROWS and DIM != BLOCK_D:
        return tl.load(ptrs, mask=(rows < num_rows)[:, None] & (offs_d < DIM)[None, :], other=0.0)
    if CHECK_ROWS:
        return tl.load(ptrs, mask=(rows < num_rows)[:, None], other=0.0)
    if DIM != BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(x, batch, head, rows, num_rows, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[batch, head, rows] = values, (rows, BLOCK_D), without their padding."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x.ptr + batch * x.stride_batch + head * x.stride_head + rows[:, None] * x.stride_row + offs_d[None, :]
    tl.store(ptrs, values.to(x.ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & (offs_d < DIM)[None, :])


@triton.jit
def bias_ptrs(bias, batch, head, offs_m, offs_n, edge, num_queries, BIAS_KIND: tl.constexpr):
    """Where the bias of the pairs (offs_m, offs_n) stands; `edge` are their numbers in edge_index order."""
    ptrs = bias.ptr + batch * bias.stride_batch + head * bias.stride_head
    if BIAS_KIND == OFFSET:
        ptrs += offs_n - offs_m + num_queries - 1
    elif BIAS_KIND == DENSE:
        ptrs += offs_m * bias.stride_query + offs_n * bias.stride_key
    else:
        ptrs += edge
    return ptrs


@triton.jit
def load_real(padding, batch, keys, mask):
    """Which of the keys, where the mask is, are no padding."""
    return tl.load(padding.ptr + batch * padding.stride_batch + keys, mask=mask, other=0) != 0


@triton.jit
def exact(x, ACC_DTYPE: tl.constexpr):
    """A number, (1, 1), from the two float32 whose sum it is: a kernel is given no float64."""
    return tl.zeros([1, 1], ACC_DTYPE) + x[0] + x[1]


@triton.jit(do_not_specialize=["num_blocks", "num_heads", "num_queries"])
def _bwd_preprocess(
    out,
    dout,
    dlse,
    delta,
    num_blocks,
    num_heads,
    num_queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = Σ_d out · dout - dlse. A program: a block of queries of one head."""
    block, bh = tl.program_id(0) % num_blocks, (tl.program_id(0) // num_blocks).to(tl.int64)
    offs_m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = load_rows(out, bh // num_heads, bh % num_heads, offs_m, num_queries, HEAD_DIM, BLOCK_D, True).to(ACC_DTYPE)
    do = load_rows(dout, bh // num_heads, bh % num_heads, offs_m, num_queries, HEAD_DIM, BLOCK_D, True).to(ACC_DTYPE)
    dl = tl.load(dlse + bh * num_queries + offs_m, mask=offs_m < num_queries, other=0.0)
    tl.store(delta + bh * num_queries + offs_m, tl.sum(o * do, 1) - dl, mask=offs_m < num_queries)


# -------------------------------------------------------------------------------------------------- on the host


def ptr_and_strides(x: Tensor) -> Strided:
    """A tensor (B, H, nodes, D) as kernels take it, its vectors made contiguous."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return Strided(x, x.stride(0), x.stride(1), x.stride(2))


def bias_ptr_and_strides(values: Tensor) -> StridedBias:
    """The values of a bias, of four dimensions, as kernels take them: a dimension of size 1 serves all."""
    strides = (0 if size == 1 else stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return StridedBias(values, *strides)


def padding_ptr(attention_mask: Tensor | None, q: Tensor) -> Padding:
    """The mask of keys (B, M) as kernels take it."""
    return Padding(q, 0) if attention_mask is None else Padding(attention_mask.contiguous(), attention_mask.shape[1])


def in_two(x: float) -> tuple[float, float]:
    """As the sum of two numbers of float32; see `exact`."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high


def in_four_dims(kind: str, values: Tensor) -> Tensor:
    """The values of a bias with four dimensions.

    | kind | shape |
    |---|---|
    | "offset" | (1, H or 1, 1, N + M - 1) |
    | "edge" | (B or 1, H or 1, 1, E) |
    | "dense" | (B or 1, H or 1, N or 1, M) |
    """
    if kind == "dense":
        return values
    return (values[None, :, None] if kind == "offset" else values[:, :, None]).contiguous()


Config = TypeVar("Config", bound=tuple)


@lru_cache(typed=True)
def constexprs(config: Config) -> Config:
    """What a kernel is compiled for, as the compiler takes it: before Triton 3.7 a bare number in a tuple is none."""
    interpreted = not isinstance(load_rows, triton.JITFunction)
    return config if interpreted else type(config)(*map(tl.constexpr, config))


def padded_dim(dim: int) -> int:
    """BLOCK_D, the power of two to which vectors are padded in registers."""
    return max(16, triton.next_power_of_2(dim))


def compute_delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """delta = Σ_d out · dout - dlse, (B, H, N)."""
    B, H, N, D = out.shape
    delta = torch.empty_like(lse)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.contiguous()
    block_m = max(8, 16384 // (padded_dim(D) * out.element_size()))  # queries whose vectors stay in registers
    num_blocks = triton.cdiv(N, block_m)
    acc_dtype = tl.float64 if lse.dtype == torch.float64 else tl.float32
    if num_programs := num_blocks * B * H:
        _bwd_preprocess[(num_programs,)](
            ptr_and_strides(out), ptr_and_strides(dout), dlse, delta, num_blocks, H, N,
            D, padded_dim(D), acc_dtype, block_m,
        )  # fmt: skip
    return delta


def sum_to_shape_of(values: Tensor, grad: Tensor) -> Tensor:
    """The gradient of values, from one for each head and each pair or edge, some of which share a value."""
    shared = [axis for axis, size in enumerate(values.shape) if size == 1 != grad.shape[axis]]
    return grad.sum(shared, keepdim=True) if shared else grad
