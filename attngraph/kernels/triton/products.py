"""The scores of edges by themselves, edge by edge over a CSR adjacency in Triton, and their gradients.

| activation f | of query i and key j |
|---|---|
| "" | scale · q_i · k_j |
| "tanh", "leaky_relu", "relu" | scale · Σ_d weight_d · f(q_id + k_jd) |

| kernel | a program has | and walks over |
|---|---|---|
| `_fwd_kernel` | a query, or a piece of one | its keys |
| `_bwd_dq_kernel` | a query, or a piece of one | its keys |
| `_bwd_dk_kernel` | a key, or a piece of one | its queries, for each query head |

See gather.py for pieces, work and targets. The weight's gradient is stored for each query, (B, H, N, D), and summed:
nothing is added atomically. Everything is computed in float32, or in float64.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.memory import like
from attngraph.kernels.triton.common import Strided, constexprs, exact, in_two, padded_dim, ptr_and_strides
from attngraph.kernels.triton.gather import (
    AdjacencyPtrs,
    adjacency_ptrs,
    find_work,
    gather_nodes,
    grid_of_units,
    heads_and_edges,
    load_edges,
    load_node,
    store_vectors,
    sum_pieces,
)
from attngraph.kernels.triton.modifiers import leaky_relu, tanh

if TYPE_CHECKING:
    from attngraph.kernels.contract import Adjacency, CSRLayout

DOT, TANH, LEAKY_RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ACTIVATIONS = {"": DOT.value, "tanh": TANH.value, "leaky_relu": LEAKY_RELU.value, "relu": LEAKY_RELU.value}


class Inputs(NamedTuple):
    """What all kernels of a call read."""

    q: Strided
    k: Strided
    weight: Tensor  # (H, D), contiguous; of dot products, q: it is not read
    adjacency: AdjacencyPtrs


class Config(NamedTuple):
    """What a kernel is compiled for."""

    HEAD_DIM: int
    BLOCK_D: int  # HEAD_DIM, padded to a power of two
    BLOCK_H: int  # heads of a program
    BLOCK_E: int  # edges at a time
    HEAVY: int  # edges above which a node is cut into pieces
    ACTIVATION: int
    NEGATIVE_SLOPE: float
    IS_DOUBLE: bool


# ------------------------------------------------------------------------------------------------- in kernels


@triton.jit
def _load_weight(weight, heads, num_heads, config: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """The weights of heads, (BLOCK_H, BLOCK_D)."""
    offs_d = tl.arange(0, config.BLOCK_D)
    mask = (heads < num_heads)[:, None] & (offs_d < config.HEAD_DIM)[None, :]
    return tl.load(weight + heads[:, None] * config.HEAD_DIM + offs_d[None, :], mask=mask, other=0.0).to(ACC_DTYPE)


@triton.jit
def _activated(x, config: tl.constexpr):
    """f(x) and its slope."""
    if config.ACTIVATION == TANH:
        value = tanh(x)
        slope = 1.0 - value * value
    else:
        value, slope = leaky_relu(x, config.NEGATIVE_SLOPE)
    return value, slope


@triton.jit
def _edge_ptrs(x, batch, heads, edge):
    """Where the numbers of edges stand in x (B, H, E, 1), (BLOCK_E, BLOCK_H)."""
    return x.ptr + batch * x.stride_batch + heads[None, :] * x.stride_head + edge[:, None] * x.stride_row


@triton.jit(do_not_specialize=["num_pieces", "num_head_blocks", "num_heads"])
def _fwd_kernel(inputs, num_pieces, num_head_blocks, num_heads, group, scale, config: tl.constexpr, out):
    """The scores of the edges of a query, or of a piece of them."""
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    work, _ = find_work(inputs.adjacency, num_pieces, num_head_blocks, num_heads, config.BLOCK_H, config.HEAVY)
    batch, heads = work.batch, work.heads
    q = load_node(inputs.q, batch, heads, num_heads, work.node, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE)
    if config.ACTIVATION != DOT:
        weight = _load_weight(inputs.weight, heads, num_heads, config, ACC_DTYPE)
    for step in range(0, work.num_edges, config.BLOCK_E):
        mask_e, keys, offs_e = load_edges(inputs.adjacency, work, step, config.BLOCK_E)
        k = gather_nodes(
            inputs.k, batch, heads // group, num_heads // group, keys, mask_e,
            config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE,
        )  # fmt: skip
        if config.ACTIVATION == DOT:
            terms = k * q[None, :, :]
        else:
            terms = _activated(q[None, :, :] + k, config)[0] * weight[None, :, :]
        score = tl.sum(terms, 2) * exact(scale, ACC_DTYPE)
        mask = mask_e[:, None] & (heads < num_heads)[None, :]
        tl.store(_edge_ptrs(out, batch, heads, offs_e), score, mask=mask)


@triton.jit(do_not_specialize=["num_pieces", "num_head_blocks", "num_heads"])
def _bwd_dq_kernel(
    inputs, num_pieces, num_head_blocks, num_heads, group, scale, config: tl.constexpr,
    dscore, dq_out, dq_pieces, dweight_out, dweight_pieces,
):  # fmt: skip
    """dq over the edges of a query, or over a piece of them; and what they add to the gradient of the weight."""
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    work, target = find_work(inputs.adjacency, num_pieces, num_head_blocks, num_heads, config.BLOCK_H, config.HEAVY)
    batch, heads = work.batch, work.heads
    q = load_node(inputs.q, batch, heads, num_heads, work.node, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE)
    dq = tl.zeros([config.BLOCK_H, config.BLOCK_D], ACC_DTYPE)
    dweight = tl.zeros([config.BLOCK_H, config.BLOCK_D], ACC_DTYPE)
    for step in range(0, work.num_edges, config.BLOCK_E):
        mask_e, keys, offs_e = load_edges(inputs.adjacency, work, step, config.BLOCK_E)
        k = gather_nodes(
            inputs.k, batch, heads // group, num_heads // group, keys, mask_e,
            config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE,
        )  # fmt: skip
        mask = mask_e[:, None] & (heads < num_heads)[None, :]
        ds = tl.load(_edge_ptrs(dscore, batch, heads, offs_e), mask=mask, other=0.0).to(ACC_DTYPE)
        if config.ACTIVATION == DOT:
            dq += tl.sum(ds[:, :, None] * k, 0)
        else:
            value, slope = _activated(q[None, :, :] + k, config)
            dq += tl.sum(ds[:, :, None] * slope, 0)
            dweight += tl.sum(ds[:, :, None] * value, 0)
    dq = dq * exact(scale, ACC_DTYPE)
    if config.ACTIVATION != DOT:
        dq = dq * _load_weight(inputs.weight, heads, num_heads, config, ACC_DTYPE)
        dweight = dweight * exact(scale, ACC_DTYPE)
        store_vectors(dweight_out, dweight_pieces, target, work, dweight, config.HEAD_DIM, config.BLOCK_D)
    store_vectors(dq_out, dq_pieces, target, work, dq, config.HEAD_DIM, config.BLOCK_D)


@triton.jit(do_not_specialize=["num_pieces", "num_head_blocks", "num_heads"])
def _bwd_dk_kernel(
    inputs, num_pieces, num_head_blocks, num_heads, group, scale, config: tl.constexpr,
    dscore, dk_out, dk_pieces,
):  # fmt: skip
    """dk over the edges of a key, or over a piece of them. The query heads of a group come one after the other."""
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    num_kv_heads = num_heads // group
    work, target = find_work(inputs.adjacency, num_pieces, num_head_blocks, num_kv_heads, config.BLOCK_H, config.HEAVY)
    batch, kv_heads = work.batch, work.heads
    k = load_node(inputs.k, batch, kv_heads, num_kv_heads, work.node, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE)
    dk = tl.zeros([config.BLOCK_H, config.BLOCK_D], ACC_DTYPE)
    for of_group in range(group):
        heads = kv_heads * group + of_group
        of_head = tl.zeros([config.BLOCK_H, config.BLOCK_D], ACC_DTYPE)
        for step in range(0, work.num_edges, config.BLOCK_E):
            mask_e, queries, offs_e = load_edges(inputs.adjacency, work, step, config.BLOCK_E)
            edge = tl.load(inputs.adjacency.edge + offs_e, mask=mask_e, other=0).to(tl.int64)
            q = gather_nodes(
                inputs.q, batch, heads, num_heads, queries, mask_e, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE
            )
            mask = mask_e[:, None] & (kv_heads < num_kv_heads)[None, :]
            ds = tl.load(_edge_ptrs(dscore, batch, heads, edge), mask=mask, other=0.0).to(ACC_DTYPE)
            if config.ACTIVATION == DOT:
                of_head += tl.sum(ds[:, :, None] * q, 0)
            else:
                of_head += tl.sum(ds[:, :, None] * _activated(q + k[None, :, :], config)[1], 0)
        if config.ACTIVATION != DOT:
            of_head = of_head * _load_weight(inputs.weight, heads, num_heads, config, ACC_DTYPE)
        dk += of_head
    store_vectors(dk_out, dk_pieces, target, work, dk * exact(scale, ACC_DTYPE), config.HEAD_DIM, config.BLOCK_D)


# ------------------------------------------------------------------------------------------------------ launch


NUMBERS = {"_fwd_kernel": 1024, "_bwd_dq_kernel": 512, "_bwd_dk_kernel": 512}
"""Of neighbours that a program, of one warp, holds at a time, BLOCK_E · BLOCK_H · BLOCK_D; as rows.py's."""


def products(
    q: Tensor, k: Tensor, weight: Tensor | None, layout: CSRLayout,
    scale: float, activation: str = "", negative_slope: float = 0.2, lse: Tensor | None = None, by_head: bool = True,
) -> Tensor:  # fmt: skip
    """The scores of the edges, (B, H, E) in edge_index order, in float32, or float64; weight (H, D) or None.

    With lse (B, H, N), finite: exp(score - lse) of its query. They always lie in memory by head.
    """
    launcher = _Launcher(q, k, weight, scale, activation, negative_slope)
    adjacency = layout.by_query
    out = launcher.empty(len(adjacency.neighbor), 1, q.shape[1])
    launcher.launch(_fwd_kernel, adjacency, q.shape[1], ptr_and_strides(out))
    if lse is not None:
        query = torch.arange(q.shape[2], device=q.device).repeat_interleave(adjacency.start.diff())
        out.sub_(lse.index_select(2, query)[..., None]).exp_()
    return out[..., 0]


def products_backward(
    dproducts: Tensor, q: Tensor, k: Tensor, weight: Tensor | None, layout: CSRLayout,
    scale: float, activation: str = "", negative_slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk and the gradient of the weight, from that of the scores (B, H, E)."""
    launcher = _Launcher(q, k, weight, scale, activation, negative_slope)
    dscore, D = ptr_and_strides(dproducts[..., None]), q.shape[3]

    adjacency, dq = layout.by_query, like(q, D)
    dq_pieces = launcher.empty(adjacency.num_pieces, D, q.shape[1])
    dweight = dweight_pieces = dq_pieces
    if weight is not None:
        dweight, dweight_pieces = launcher.empty(q.shape[2], D, q.shape[1]), torch.empty_like(dq_pieces)
    results = dq, dq_pieces, dweight, dweight_pieces
    launcher.launch(_bwd_dq_kernel, adjacency, q.shape[1], dscore, *map(ptr_and_strides, results))
    sum_pieces(adjacency, dq, dq_pieces)
    if weight is not None:
        sum_pieces(adjacency, dweight, dweight_pieces)

    adjacency, dk = layout.numbered, like(k, D)
    dk_pieces = launcher.empty(adjacency.num_pieces, D, k.shape[1])
    launcher.launch(_bwd_dk_kernel, adjacency, k.shape[1], dscore, ptr_and_strides(dk), ptr_and_strides(dk_pieces))
    sum_pieces(adjacency, dk, dk_pieces)
    return dq, dk, None if weight is None else dweight.sum((0, 2), dtype=torch.float64).to(weight.dtype)


class _Launcher:
    """What all kernels of a call are given."""

    def __init__(
        self, q: Tensor, k: Tensor, weight: Tensor | None, scale: float, activation: str, negative_slope: float
    ) -> None:
        self.batch, self.heads, _, self.dim = q.shape
        self.group = self.heads // k.shape[1]
        self.inputs = ptr_and_strides(q), ptr_and_strides(k), q if weight is None else weight.contiguous()
        self.scale = in_two(scale)
        slope = negative_slope if activation == "leaky_relu" else 0.0  # ReLU is leaky ReLU with a slope of 0
        self.kinds = ACTIVATIONS[activation], float(slope), q.dtype == torch.float64
        self.dtype, self.device = torch.promote_types(q.dtype, torch.float32), q.device

    def empty(self, nodes: int, dim: int, heads: int) -> Tensor:
        """For vectors (B, heads, nodes, dim), in the precision of the sums."""
        return torch.empty(self.batch, heads, nodes, dim, dtype=self.dtype, device=self.device)

    def launch(self, kernel: triton.JITFunction, adjacency: Adjacency, heads: int, *own) -> None:
        """A kernel, for each node or piece of one, and each block of heads."""
        block_d, is_double = padded_dim(self.dim), self.kinds[-1]
        block_h, block_e = heads_and_edges(NUMBERS[kernel.fn.__name__] // block_d // (1 + is_double), heads)
        grid = grid_of_units(adjacency, self.batch, heads, block_h)
        if grid[0] * grid[1]:
            config = Config(self.dim, block_d, block_h, block_e, adjacency.heavy, *self.kinds)
            kernel[grid](
                Inputs(*self.inputs, adjacency_ptrs(adjacency)), adjacency.num_pieces, triton.cdiv(heads, block_h),
                self.heads, self.group, self.scale, constexprs(config), *own, num_warps=1,
            )  # fmt: skip
