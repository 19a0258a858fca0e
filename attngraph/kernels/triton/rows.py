"""Attention edge by edge over a CSR adjacency in Triton, for a GPU: forward and dq by query, dk and dv by key.

A program has one node, or a piece of a node with many edges, and BLOCK_H heads; it gathers the vectors of BLOCK_E
neighbours at a time, and computes in float32 (float64, where tensors have it).

| kernel | a program has | and walks over | grid |
|---|---|---|---|
| `_fwd_kernel` | a query, or a piece of one | its keys | (pieces + N, B · blocks of heads) |
| `_bwd_dq_kernel` | a query, or a piece of one | its keys | (pieces + N, B · blocks of heads) |
| `_bwd_dkdv_kernel` | a key, or a piece of one | its queries, for each query head | (pieces + M, B · blocks of heads) |
| `_merge_pieces_kernel` | a heavy query of one head | its pieces, in order | (heavy queries, B · H) |
| `_sum_pieces_kernel` in gather.py | a heavy node of one head | its pieces, in order | (heavy nodes, B · heads) |

Pieces come first; what they find goes to buffers of its own, which the last two put together. Nothing is added
atomically: the same bits every run. Scores are exponents of 2; what is done to them after scale and bias stands in
modifiers.py.

| argument | fields | see |
|---|---|---|
| `inputs` | q, k, v, bias, padding, dropout, adjacency | `Inputs` |
| `inputs.adjacency` | start, neighbor, units, edge | `AdjacencyPtrs` in gather.py |
| `upstream` | dout, lse, delta | `Upstream` in common.py |
| `scale`, `dq_scale`, `dk_scale` | high, low | two float32 whose sum is the number, exact to float64 |
| `work` | batch, heads, node, first_edge, num_edges | `Work`: what the program has |
| `target` | piece, piece_heads, node_heads | `Target`: where its results go |
| `config` | HEAD_DIM, …, IS_DOUBLE | `Config`: what the kernel is compiled for |
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.memory import like
from attngraph.kernels.triton.common import (
    BIAS_KINDS,
    DENSE,
    EDGE,
    LN_2,
    LOG2_E,
    NO_BIAS,
    Padding,
    Strided,
    StridedBias,
    Upstream,
    bias_ptr_and_strides,
    bias_ptrs,
    compute_delta,
    constexprs,
    exact,
    in_four_dims,
    in_two,
    load_real,
    padded_dim,
    padding_ptr,
    ptr_and_strides,
    sum_to_shape_of,
)
from attngraph.kernels.triton.gather import (
    AdjacencyPtrs,
    Target,
    adjacency_ptrs,
    find_work,
    gather_nodes,
    grid_of_units,
    heads_and_edges,
    load_edges,
    load_node,
    load_pieces,
    store_scalars,
    store_vectors,
    sum_pieces,
    vector_ptrs,
)
from attngraph.kernels.triton.modifiers import (
    NO_TRANSFORM,
    SOFTMAX,
    DropoutPtrs,
    compiled_kinds,
    dropout_ptrs,
    head_numbers,
    kept_pairs,
    transformed,
    weights_and_slopes,
)

if TYPE_CHECKING:
    from attngraph.kernels.contract import Adjacency, CSRLayout, Modifiers

# --------------------------------------------------------------------------------------------------- arguments


class Inputs(NamedTuple):
    """What all kernels of a call read."""

    q: Strided
    k: Strided
    v: Strided
    bias: StridedBias | Strided  # without a bias, q: it is not read
    padding: Padding
    dropout: DropoutPtrs | None
    adjacency: AdjacencyPtrs


class Config(NamedTuple):
    """What a kernel is compiled for."""

    HEAD_DIM: int
    VALUE_DIM: int
    BLOCK_D: int  # HEAD_DIM, padded to a power of two
    BLOCK_DV: int  # VALUE_DIM, padded
    BLOCK_H: int  # heads of a program
    BLOCK_E: int  # edges at a time
    HEAVY: int  # edges above which a node is cut into pieces
    BIAS_KIND: int
    PADDED: bool
    TRANSFORM: int
    TRANSFORM_VALUE: float
    NORMALIZE: int
    DROPOUT: bool
    IS_DOUBLE: bool


# ----------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["num_pieces", "num_head_blocks", "num_heads", "num_queries"])
def _fwd_kernel(
    inputs, num_pieces, num_head_blocks, num_heads, group, num_queries, scale, config: tl.constexpr,
    out, out_pieces, lse, lse_pieces,
):  # fmt: skip
    """out = weights(transform(scale · q kᵀ + bias)) v and, of softmax, lse over the edges of a query, or over a piece
    of them."""
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    work, target = find_work(inputs.adjacency, num_pieces, num_head_blocks, num_heads, config.BLOCK_H, config.HEAVY)
    batch, heads, query, num_edges = work.batch, work.heads, work.node, work.num_edges
    kv_heads, num_kv_heads = heads // group, num_heads // group
    q = load_node(inputs.q, batch, heads, num_heads, query, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE)
    q = q * exact(scale, ACC_DTYPE)
    row_max = tl.full([config.BLOCK_H], float("-inf"), ACC_DTYPE)
    row_sum = tl.zeros([config.BLOCK_H], ACC_DTYPE)
    acc = tl.zeros([config.BLOCK_H, config.BLOCK_DV], ACC_DTYPE)
    for step in range(0, num_edges, config.BLOCK_E):
        mask_e, keys, offs_e = load_edges(inputs.adjacency, work, step, config.BLOCK_E)
        if config.PADDED:
            mask_e = mask_e & load_real(inputs.padding, batch, keys, mask_e)
        k = gather_nodes(
            inputs.k, batch, kv_heads, num_kv_heads, keys, mask_e, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE
        )
        v = gather_nodes(
            inputs.v, batch, kv_heads, num_kv_heads, keys, mask_e, config.VALUE_DIM, config.BLOCK_DV, ACC_DTYPE
        )

        qk = tl.sum(k * q[None, :, :], 2)  # (BLOCK_E, BLOCK_H)
        mask = mask_e[:, None] & (heads < num_heads)[None, :]
        if config.BIAS_KIND != NO_BIAS:
            ptrs = bias_ptrs(
                inputs.bias, batch, heads[None, :], query, keys[:, None], offs_e[:, None], num_queries, config.BIAS_KIND
            )
            qk += tl.load(ptrs, mask=mask, other=0.0).to(ACC_DTYPE) * LOG2_E
        qk, _ = transformed(qk, config)
        if config.NORMALIZE == SOFTMAX:
            qk = tl.where(mask, qk, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(qk, 0))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf would be NaN
            p = tl.exp2(qk - safe_max[None, :])
            alpha = tl.exp2(row_max - safe_max)
            row_sum = row_sum * alpha + tl.sum(p, 0)
            row_max = new_max
        else:
            p, _ = weights_and_slopes(qk, mask, config, True)
            alpha = tl.full([config.BLOCK_H], 1.0, ACC_DTYPE)
        if config.DROPOUT:
            numbers = head_numbers(inputs.dropout, heads, heads < num_heads)
            p = tl.where(kept_pairs(inputs.dropout, batch, numbers[None, :], query, keys[:, None]), p, 0.0)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * v, 0)

    if config.DROPOUT:
        acc = acc * exact(inputs.dropout.keep_factor, ACC_DTYPE)
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # 0 of a query without edges: out = 0, lse = -inf
    store_vectors(out, out_pieces, target, work, acc / safe_sum[:, None], config.VALUE_DIM, config.BLOCK_DV)
    if config.NORMALIZE == SOFTMAX:
        row_lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(safe_sum)) * LN_2)
        store_scalars(lse, lse_pieces, target, batch, heads, num_heads, query, num_queries, num_pieces, row_lse)


@triton.jit(do_not_specialize=["num_pieces", "num_heads", "num_queries"])
def _merge_pieces_kernel(
    heavy_nodes, num_pieces, num_heads, num_queries, config: tl.constexpr, out, out_pieces, lse, lse_pieces
):
    """out and lse of a heavy query, from those of its pieces."""
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    query, first_piece, count = load_pieces(heavy_nodes)
    bh = tl.program_id(1).to(tl.int64)
    offs_1, offs_d = tl.arange(0, 1), tl.arange(0, config.BLOCK_DV)
    row_max, row_sum = tl.full([1], float("-inf"), ACC_DTYPE), tl.zeros([1], ACC_DTYPE)
    acc = tl.zeros([config.BLOCK_DV], ACC_DTYPE)
    for step in range(count):
        piece = first_piece + step
        piece_lse = tl.load(lse_pieces + bh * num_pieces + piece + offs_1)
        piece_out = tl.load(
            vector_ptrs(out_pieces, bh, num_heads, piece, offs_d), mask=offs_d < config.VALUE_DIM, other=0.0
        )
        new_max = tl.maximum(row_max, piece_lse)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha, weight = tl.exp(row_max - safe_max), tl.exp(piece_lse - safe_max)
        acc = acc * alpha + piece_out * weight
        row_sum = row_sum * alpha + weight
        row_max = new_max
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    ptrs = vector_ptrs(out, bh, num_heads, query, offs_d)
    tl.store(ptrs, (acc / safe_sum).to(out.ptr.dtype.element_ty), mask=offs_d < config.VALUE_DIM)
    row_lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(safe_sum))
    tl.store(lse + bh * num_queries + query + offs_1, row_lse)


# ---------------------------------------------------------------------------------------------------- backward


@triton.jit
def _load_lse_delta(upstream, offsets, mask, config: tl.constexpr):
    """lse as a power of 2 (inf of a query without edges, so that exp2(qk - lse) is 0), and delta; 0 but for softmax."""
    if config.NORMALIZE != SOFTMAX:
        zeros = tl.zeros(offsets.shape, upstream.lse.dtype.element_ty)
        return zeros, zeros
    lse = tl.load(upstream.lse + offsets, mask=mask, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    return lse, tl.load(upstream.delta + offsets, mask=mask, other=0.0)


@triton.jit
def _weights(qk, lse, mask, config: tl.constexpr):
    """The weights, and their slopes: of softmax, the weights again, which multiply dw - delta."""
    if config.NORMALIZE == SOFTMAX:
        p = tl.where(mask, tl.exp2(qk - lse), 0.0)
        return p, p
    return weights_and_slopes(qk, mask, config, True)


@triton.jit(do_not_specialize=["num_pieces", "num_head_blocks", "num_heads", "num_queries"])
def _bwd_dq_kernel(
    inputs, num_pieces, num_head_blocks, num_heads, group, num_queries, scale, config: tl.constexpr,
    upstream, dq_out, dq_pieces, dbias, dq_scale, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """dq over the edges of a query, or over a piece of them; and the gradient of the bias of each edge."""
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    work, target = find_work(inputs.adjacency, num_pieces, num_head_blocks, num_heads, config.BLOCK_H, config.HEAVY)
    batch, heads, query, num_edges = work.batch, work.heads, work.node, work.num_edges
    kv_heads, num_kv_heads = heads // group, num_heads // group
    q = load_node(inputs.q, batch, heads, num_heads, query, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE)
    q = q * exact(scale, ACC_DTYPE)
    do = load_node(upstream.dout, batch, heads, num_heads, query, config.VALUE_DIM, config.BLOCK_DV, ACC_DTYPE)
    offs_lse = (batch * num_heads + heads) * num_queries + query
    lse, delta = _load_lse_delta(upstream, offs_lse, heads < num_heads, config)
    dq = tl.zeros([config.BLOCK_H, config.BLOCK_D], ACC_DTYPE)
    for step in range(0, num_edges, config.BLOCK_E):
        mask_e, keys, offs_e = load_edges(inputs.adjacency, work, step, config.BLOCK_E)
        exists = mask_e
        if config.PADDED:
            mask_e = mask_e & load_real(inputs.padding, batch, keys, mask_e)
        k = gather_nodes(
            inputs.k, batch, kv_heads, num_kv_heads, keys, mask_e, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE
        )
        v = gather_nodes(
            inputs.v, batch, kv_heads, num_kv_heads, keys, mask_e, config.VALUE_DIM, config.BLOCK_DV, ACC_DTYPE
        )

        qk = tl.sum(k * q[None, :, :], 2)  # (BLOCK_E, BLOCK_H)
        mask = mask_e[:, None] & (heads < num_heads)[None, :]
        if config.BIAS_KIND != NO_BIAS:
            ptrs = bias_ptrs(
                inputs.bias, batch, heads[None, :], query, keys[:, None], offs_e[:, None], num_queries, config.BIAS_KIND
            )
            qk += tl.load(ptrs, mask=mask, other=0.0).to(ACC_DTYPE) * LOG2_E

        qk, slope = transformed(qk, config)
        _, ds = _weights(qk, lse[None, :], mask, config)
        dw = tl.sum(v * do[None, :, :], 2)
        if config.DROPOUT:
            numbers = head_numbers(inputs.dropout, heads, heads < num_heads)
            kept = kept_pairs(inputs.dropout, batch, numbers[None, :], query, keys[:, None])
            dw = tl.where(kept, dw * exact(inputs.dropout.keep_factor, ACC_DTYPE), 0.0)
        ds *= dw - delta[None, :]
        if config.TRANSFORM != NO_TRANSFORM:
            ds *= slope
        dq += tl.sum(ds[:, :, None] * k, 0)
        if BIAS_GRAD:  # of a pair, or of an edge: that of an offset is summed from those of its edges
            GRAD_KIND: tl.constexpr = DENSE if config.BIAS_KIND == DENSE else EDGE
            ptrs = bias_ptrs(
                dbias, batch, heads[None, :], query, keys[:, None], offs_e[:, None], num_queries, GRAD_KIND
            )
            tl.store(ptrs, ds, mask=exists[:, None] & (heads < num_heads)[None, :])
    dq = dq * exact(dq_scale, ACC_DTYPE)
    store_vectors(dq_out, dq_pieces, target, work, dq, config.HEAD_DIM, config.BLOCK_D)


@triton.jit(do_not_specialize=["num_pieces", "num_head_blocks", "num_heads", "num_queries", "num_keys"])
def _bwd_dkdv_kernel(
    inputs, num_pieces, num_head_blocks, num_heads, group, num_queries, scale, config: tl.constexpr,
    upstream, dk_out, dk_pieces, dv_out, dv_pieces, dbias_out, dbias_pieces, num_keys, dk_scale,
    BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """dk and dv over the edges of a key, or over a piece of them; and the gradient of a bias of the key alone.

    The query heads of a group come one after the other.
    """
    ACC_DTYPE: tl.constexpr = tl.float64 if config.IS_DOUBLE else tl.float32
    num_kv_heads = num_heads // group
    work, target = find_work(inputs.adjacency, num_pieces, num_head_blocks, num_kv_heads, config.BLOCK_H, config.HEAVY)
    batch, kv_heads, key, num_edges = work.batch, work.heads, work.node, work.num_edges
    k = load_node(inputs.k, batch, kv_heads, num_kv_heads, key, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE)
    k = k * exact(scale, ACC_DTYPE)
    v = load_node(inputs.v, batch, kv_heads, num_kv_heads, key, config.VALUE_DIM, config.BLOCK_DV, ACC_DTYPE)
    dk = tl.zeros([config.BLOCK_H, config.BLOCK_D], ACC_DTYPE)
    dv = tl.zeros([config.BLOCK_H, config.BLOCK_DV], ACC_DTYPE)
    for of_group in range(group):
        heads = kv_heads * group + of_group
        dbias = tl.zeros([config.BLOCK_H], ACC_DTYPE)
        for step in range(0, num_edges, config.BLOCK_E):
            mask_e, queries, offs_e = load_edges(inputs.adjacency, work, step, config.BLOCK_E)
            mask = mask_e[:, None] & (kv_heads < num_kv_heads)[None, :]
            q = gather_nodes(
                inputs.q, batch, heads, num_heads, queries, mask_e, config.HEAD_DIM, config.BLOCK_D, ACC_DTYPE
            )
            do = gather_nodes(
                upstream.dout, batch, heads, num_heads, queries, mask_e, config.VALUE_DIM, config.BLOCK_DV, ACC_DTYPE
            )
            offs_lse = (batch * num_heads + heads)[None, :] * num_queries + queries[:, None]

            qk = tl.sum(q * k[None, :, :], 2)  # (BLOCK_E, BLOCK_H)
            if config.BIAS_KIND != NO_BIAS:
                if config.BIAS_KIND == EDGE:
                    offs_e = tl.load(inputs.adjacency.edge + offs_e, mask=mask_e, other=0).to(tl.int64)
                ptrs = bias_ptrs(
                    inputs.bias, batch, heads[None, :], queries[:, None], key, offs_e[:, None], num_queries,
                    config.BIAS_KIND,
                )  # fmt: skip
                qk += tl.load(ptrs, mask=mask, other=0.0).to(ACC_DTYPE) * LOG2_E

            if config.PADDED:
                mask = mask & load_real(inputs.padding, batch, key, True)
            qk, slope = transformed(qk, config)
            lse, delta = _load_lse_delta(upstream, offs_lse, mask, config)
            p, ds = _weights(qk, lse, mask, config)
            dw = tl.sum(do * v[None, :, :], 2)
            if config.DROPOUT:
                numbers = head_numbers(inputs.dropout, heads, kv_heads < num_kv_heads)
                kept = kept_pairs(inputs.dropout, batch, numbers[None, :], queries[:, None], key)
                p = tl.where(kept, p, 0.0)
                dw = tl.where(kept, dw * exact(inputs.dropout.keep_factor, ACC_DTYPE), 0.0)
            ds *= dw - delta
            if config.TRANSFORM != NO_TRANSFORM:
                ds *= slope
            dk += tl.sum(ds[:, :, None] * q, 0)
            dv += tl.sum(p[:, :, None] * do, 0)
            if BIAS_GRAD:
                dbias += tl.sum(ds, 0)
        if BIAS_GRAD:
            of_heads = Target(target.piece, target.piece_heads * group, target.node_heads * group)
            store_scalars(dbias_out, dbias_pieces, of_heads, batch, heads, num_heads, key, num_keys, num_pieces, dbias)
    dk = dk * exact(dk_scale, ACC_DTYPE)
    if config.DROPOUT:
        dv = dv * exact(inputs.dropout.keep_factor, ACC_DTYPE)
    store_vectors(dk_out, dk_pieces, target, work, dk, config.HEAD_DIM, config.BLOCK_D)
    store_vectors(dv_out, dv_pieces, target, work, dv, config.VALUE_DIM, config.BLOCK_DV)


# ------------------------------------------------------------------------------------------------------ launch


class Blocks(NamedTuple):
    """How a kernel runs."""

    numbers: int  # of neighbours that a program holds at a time, BLOCK_E · BLOCK_H · BLOCK_D
    num_warps: int


# The fastest of those that `python -m benchmarks.gpu_blocks rows` tries, on an H200. One warp: sums over several pass
# through shared memory, and took 3 to 6 times as long.
BLOCKS = {"_fwd_kernel": Blocks(1024, 1), "_bwd_dq_kernel": Blocks(512, 1), "_bwd_dkdv_kernel": Blocks(512, 1)}


def forward(q: Tensor, k: Tensor, v: Tensor, layout: CSRLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) and lse (B, H, N) over the edges of a layout; in float16, bfloat16, float32 or float64.

    lse is 0 of a normaliser that has none.
    """
    return _Launcher(q, k, v, layout, modifiers).forward(like(q, v.shape[3]))


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    layout: CSRLayout, modifiers: Modifiers, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv and, with `bias_grad`, the gradient of the bias's values; out and lse may be those of more edges."""
    launcher = _Launcher(q, k, v, layout, modifiers)
    kind, values = modifiers.bias if modifiers.bias is not None and bias_grad else (None, None)
    of_keys = kind == "dense" and values is not None and values.shape[2] == 1
    lse = lse.contiguous()
    delta = compute_delta(out, dout, lse, dlse) if modifiers.normalize == "softmax" else lse  # which is not read then
    upstream = Upstream(ptr_and_strides(dout), lse, delta)
    edge_grads = None if values is None else launcher.empty_edge_grads(of_keys)
    dq = launcher.backward_dq(upstream, like(q, q.shape[3]), None if of_keys else edge_grads)
    dk, dv = launcher.backward_dkdv(upstream, like(k, k.shape[3]), like(v, v.shape[3]), edge_grads if of_keys else None)
    return dq, dk, dv, None if edge_grads is None or values is None else launcher.reduce_edge_grads(values, edge_grads)


class _Launcher:
    """What all kernels of a call are given: tensors, layout, sizes."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: CSRLayout, modifiers: Modifiers) -> None:
        scale, bias, attention_mask = modifiers[:3]
        self.kinds, self.dropout = compiled_kinds(modifiers), dropout_ptrs(modifiers.dropout)
        self.has_lse = modifiers.normalize == "softmax"
        self.padding, self.padded = padding_ptr(attention_mask, q), attention_mask is not None
        self.B, self.H, self.N, D = q.shape
        _, self.kv_heads, self.M, Dv = v.shape
        self.layout = layout
        self.out_scale, self.scale = in_two(scale), in_two(scale * LOG2_E.value)
        self.bias_kind = BIAS_KINDS[None if bias is None else bias[0]]
        self.dims = D, Dv, padded_dim(D), padded_dim(Dv)
        self.qkv = ptr_and_strides(q), ptr_and_strides(k), ptr_and_strides(v)
        self.bias = self.qkv[0] if bias is None else bias_ptr_and_strides(in_four_dims(*bias))
        self.is_double = q.dtype == torch.float64
        self.acc_dtype = torch.promote_types(q.dtype, torch.float32)

    def forward(self, out: Tensor) -> tuple[Tensor, Tensor]:
        adjacency, lse = self.layout.by_query, self._empty(self.N)
        out_pieces, lse_pieces = self._empty(adjacency.num_pieces, self.dims[1]), self._empty(adjacency.num_pieces)
        results = ptr_and_strides(out), ptr_and_strides(out_pieces), lse, lse_pieces
        self._launch(_fwd_kernel, adjacency, self.H, *results)
        if not self.has_lse:
            sum_pieces(adjacency, out, out_pieces)
            lse.zero_()
        elif num_heavy := len(adjacency.pieces):
            config = constexprs(self._config(_merge_pieces_kernel, adjacency, 1))
            _merge_pieces_kernel[num_heavy, self.B * self.H](
                adjacency.pieces, adjacency.num_pieces, self.H, self.N, config, *results
            )
        return out, lse

    def backward_dq(self, upstream: Upstream, dq: Tensor, edge_grads: Tensor | None) -> Tensor:
        adjacency = self.layout.by_query
        dq_pieces = self._empty(adjacency.num_pieces, self.dims[0])
        dbias = self.bias if edge_grads is None else bias_ptr_and_strides(edge_grads)
        self._launch(
            _bwd_dq_kernel, adjacency, self.H,
            upstream, ptr_and_strides(dq), ptr_and_strides(dq_pieces), dbias, self.out_scale, edge_grads is not None,
        )  # fmt: skip
        sum_pieces(adjacency, dq, dq_pieces)
        return dq

    def backward_dkdv(
        self, upstream: Upstream, dk: Tensor, dv: Tensor, key_grads: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        adjacency = self.layout.numbered if self.bias_kind == EDGE.value else self.layout.by_key
        dk_pieces = self._empty(adjacency.num_pieces, self.dims[0], self.kv_heads)
        dv_pieces = self._empty(adjacency.num_pieces, self.dims[1], self.kv_heads)
        dbias_pieces = self._empty(adjacency.num_pieces, 1)
        self._launch(
            _bwd_dkdv_kernel, adjacency, self.kv_heads,
            upstream, ptr_and_strides(dk), ptr_and_strides(dk_pieces), ptr_and_strides(dv), ptr_and_strides(dv_pieces),
            dbias_pieces if key_grads is None else key_grads, dbias_pieces, self.M, self.out_scale,
            key_grads is not None,
        )  # fmt: skip
        sum_pieces(adjacency, dk, dk_pieces)
        sum_pieces(adjacency, dv, dv_pieces)
        if key_grads is not None:
            sum_pieces(adjacency, key_grads[:, :, 0, :, None], dbias_pieces)
        return dk, dv

    def _empty(self, nodes: int, dim: int = 0, heads: int | None = None) -> Tensor:
        """For numbers of nodes, (B, H, nodes) or (B, H, nodes, dim), in the precision of the sums."""
        shape = (self.B, heads or self.H, nodes, dim) if dim else (self.B, self.H, nodes)
        return torch.empty(shape, dtype=self.acc_dtype, device=self.qkv[0].ptr.device)

    def _config(self, kernel: triton.JITFunction, adjacency: Adjacency, heads: int) -> Config:
        blocks = BLOCKS.get(kernel.fn.__name__)
        vectors = 1 if blocks is None else blocks.numbers // max(self.dims[2:]) // (1 + self.is_double)
        block_h, block_e = heads_and_edges(vectors, heads)
        kinds = self.bias_kind, self.padded, *self.kinds
        return Config(*self.dims, block_h, block_e, adjacency.heavy, *kinds, self.is_double)

    def _launch(self, kernel: triton.JITFunction, adjacency: Adjacency, heads: int, *own) -> None:
        """A kernel, for each node or piece of one, and each block of heads."""
        config = self._config(kernel, adjacency, heads)
        grid = grid_of_units(adjacency, self.B, heads, config.BLOCK_H)
        if grid[0] * grid[1]:
            inputs = Inputs(*self.qkv, self.bias, self.padding, self.dropout, adjacency_ptrs(adjacency))
            head_blocks = triton.cdiv(heads, config.BLOCK_H)
            kernel[grid](
                inputs, adjacency.num_pieces, head_blocks, self.H, self.H // self.kv_heads, self.N, self.scale,
                constexprs(config), *own, num_warps=BLOCKS[kernel.fn.__name__].num_warps,
            )  # fmt: skip

    # The gradient of a bias: kernels store one number for each head and edge, pair, or key; then those that share a
    # value are summed.

    def empty_edge_grads(self, of_keys: bool) -> Tensor:
        """Where the kernels store it, zeros where they may store nothing."""
        if self.bias_kind != DENSE.value:
            return self._empty(len(self.layout.by_query.neighbor))[:, :, None]
        if of_keys:
            return self._empty(self.M)[:, :, None]
        return self._empty(self.N * self.M).unflatten(2, (self.N, self.M)).zero_()

    def reduce_edge_grads(self, values: Tensor, edge_grads: Tensor) -> Tensor:
        """The gradient of the bias's values."""
        if self.bias_kind == DENSE.value:
            return sum_to_shape_of(values, edge_grads)
        if self.bias_kind == EDGE.value:
            return sum_to_shape_of(values, edge_grads[:, :, 0])
        adjacency = self.layout.by_query
        query = torch.arange(self.N, device=edge_grads.device).repeat_interleave(adjacency.start.diff())
        offset, order = (adjacency.neighbor - query + self.N - 1).sort(stable=True)  # sums in the order of edges
        lengths = torch.searchsorted(offset, torch.arange(self.N + self.M, device=edge_grads.device)).diff()
        sums = edge_grads[:, :, 0].sum(0, dtype=torch.float64)[:, order].T.contiguous()
        dbias = torch.segment_reduce(sums, "sum", lengths=lengths).T.to(edge_grads.dtype)
        return dbias.sum(0, keepdim=True) if values.shape[0] == 1 else dbias
