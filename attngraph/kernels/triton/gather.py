"""What the Triton kernels that go edge by edge share: what a program has, vectors gathered, results stored.

A program has one node, or a piece of a node with many edges, and BLOCK_H heads; it takes BLOCK_E edges at a time.
Pieces come first; what they find goes to buffers of its own, which are put together afterwards.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.triton.common import padded_dim, ptr_and_strides

if TYPE_CHECKING:
    from attngraph.kernels.contract import Adjacency

# --------------------------------------------------------------------------------------------------- arguments


class AdjacencyPtrs(NamedTuple):
    """The edges of each query, or of each key, in CSR; node x has the edges start[x] … start[x + 1] - 1."""

    start: Tensor  # int64 (nodes + 1,)
    neighbor: Tensor  # (E,): the node at the other end of each edge
    units: Tensor  # int64 (units, 4): node, node after the last, first edge, edge after the last; pieces come first
    edge: Tensor  # (E,): the number of each edge in edge_index order; read by key, with a bias of edges


class Work(NamedTuple):
    """In a kernel: what a program has."""

    batch: tl.tensor
    heads: tl.tensor  # (BLOCK_H,)
    node: tl.tensor
    first_edge: tl.tensor
    num_edges: tl.tensor


class Target(NamedTuple):
    """In a kernel: where the results of a program go. One of the numbers of heads is 0; both are for a heavy node."""

    piece: tl.tensor
    piece_heads: tl.tensor  # how many heads are stored as those of a piece
    node_heads: tl.tensor  # how many heads are stored as those of a node


# ------------------------------------------------------------------------------------------ what a program reads


@triton.jit
def find_work(adjacency, num_pieces, num_head_blocks, num_heads, BLOCK_H: tl.constexpr, HEAVY: tl.constexpr):
    """The `Work` and the `Target` of this program."""
    unit, batch_and_heads = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if unit < num_pieces:
        node = tl.load(adjacency.units + unit.to(tl.int64) * 4)
        begin = tl.load(adjacency.units + unit.to(tl.int64) * 4 + 2)
        end = tl.load(adjacency.units + unit.to(tl.int64) * 4 + 3)
    else:
        node = (unit - num_pieces).to(tl.int64)
        begin, end = tl.load(adjacency.start + node), tl.load(adjacency.start + node + 1)
    num_edges = (end - begin).to(tl.int32)
    piece_heads = tl.where(unit < num_pieces, num_heads, 0)
    node_heads = tl.where(num_edges <= HEAVY, num_heads - piece_heads, 0)
    num_edges = tl.where(piece_heads + node_heads > 0, num_edges, 0)  # the edges of a heavy node are its pieces'
    heads = (batch_and_heads % num_head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    work = Work(batch_and_heads // num_head_blocks, heads, node, begin, num_edges)
    return work, Target(unit.to(tl.int64), piece_heads, node_heads)


@triton.jit
def load_node(x, batch, heads, num_heads, node, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """The vectors of a node, (BLOCK_H, BLOCK_D)."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x.ptr + batch * x.stride_batch + heads[:, None] * x.stride_head + node * x.stride_row + offs_d[None, :]
    return tl.load(ptrs, mask=(heads < num_heads)[:, None] & (offs_d < DIM)[None, :], other=0.0).to(ACC_DTYPE)


@triton.jit
def gather_nodes(
    x, batch, heads, num_heads, nodes, mask_e, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ACC_DTYPE: tl.constexpr
):
    """The vectors of some neighbours, (BLOCK_E, BLOCK_H, BLOCK_D)."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x.ptr + batch * x.stride_batch + nodes[:, None, None] * x.stride_row
    ptrs = ptrs + heads[None, :, None] * x.stride_head + offs_d[None, None, :]
    mask = mask_e[:, None, None] & (heads < num_heads)[None, :, None]
    if DIM != BLOCK_D:
        mask = mask & (offs_d < DIM)[None, None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC_DTYPE)


@triton.jit
def load_edges(adjacency, work, step, BLOCK_E: tl.constexpr):
    """Some edges of a program: which of them exist, the neighbours, and their places in the adjacency."""
    mask_e = step + tl.arange(0, BLOCK_E) < work.num_edges
    offs_e = work.first_edge + step + tl.arange(0, BLOCK_E)
    return mask_e, tl.load(adjacency.neighbor + offs_e, mask=mask_e, other=0).to(tl.int64), offs_e


@triton.jit
def store_vectors(x, x_pieces, target, work, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vectors (BLOCK_H, BLOCK_D) of a node, or of a piece of one."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = x.ptr + work.batch * x.stride_batch + work.heads[:, None] * x.stride_head
    ptrs = ptrs + work.node * x.stride_row + offs_d[None, :]
    mask = (work.heads < target.node_heads)[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs, values.to(x.ptr.dtype.element_ty), mask=mask)
    ptrs = x_pieces.ptr + work.batch * x_pieces.stride_batch + work.heads[:, None] * x_pieces.stride_head
    ptrs = ptrs + target.piece * x_pieces.stride_row + offs_d[None, :]
    mask = (work.heads < target.piece_heads)[:, None] & (offs_d < DIM)[None, :]
    tl.store(ptrs, values, mask=mask)


@triton.jit
def store_scalars(x, x_pieces, target, batch, heads, num_heads, node, num_nodes, num_pieces, values):
    """The numbers (BLOCK_H,) of a node, in x (B, H, nodes), or of a piece of one, in x_pieces (B, H, pieces)."""
    tl.store(x + (batch * num_heads + heads) * num_nodes + node, values, mask=heads < target.node_heads)
    tl.store(
        x_pieces + (batch * num_heads + heads) * num_pieces + target.piece, values, mask=heads < target.piece_heads
    )


@triton.jit
def load_pieces(heavy_nodes):
    """The heavy node of this program, its first piece, and how many it has."""
    ptr = heavy_nodes + tl.program_id(0).to(tl.int64) * 3
    return tl.load(ptr), tl.load(ptr + 1), (tl.load(ptr + 2) - tl.load(ptr + 1)).to(tl.int32)


@triton.jit
def vector_ptrs(x, bh, num_heads, node, offs_d):
    """Where the vector of a node stands; `bh` is batch · num_heads + head."""
    return x.ptr + bh // num_heads * x.stride_batch + bh % num_heads * x.stride_head + node * x.stride_row + offs_d


@triton.jit(do_not_specialize=["num_heads"])
def _sum_pieces_kernel(heavy_nodes, num_heads, out, out_pieces, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vector of a heavy node, the sum of those of its pieces. Grid: (heavy nodes, B · heads)."""
    node, first_piece, count = load_pieces(heavy_nodes)
    bh, offs_d = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], out_pieces.ptr.dtype.element_ty)
    for step in range(count):
        acc += tl.load(vector_ptrs(out_pieces, bh, num_heads, first_piece + step, offs_d), mask=offs_d < DIM, other=0.0)
    ptrs = vector_ptrs(out, bh, num_heads, node, offs_d)
    tl.store(ptrs, acc.to(out.ptr.dtype.element_ty), mask=offs_d < DIM)


# -------------------------------------------------------------------------------------------------- on the host


MIN_BLOCK_E = 4  # fewer heads rather than fewer edges
MAX_GRID_Y = 1 << 16  # programs on the second axis of a grid


def adjacency_ptrs(adjacency: Adjacency) -> AdjacencyPtrs:
    """The edges of each query, or of each key, as kernels take them."""
    return AdjacencyPtrs(adjacency.start, adjacency.neighbor, adjacency.units, adjacency.edge)


def heads_and_edges(vectors: int, heads: int) -> tuple[int, int]:
    """BLOCK_H and BLOCK_E of a program that holds so many vectors at a time."""
    block_h = min(triton.next_power_of_2(heads), max(1, vectors // MIN_BLOCK_E))
    return block_h, max(1, vectors // block_h)


def grid_of_units(adjacency: Adjacency, batch: int, heads: int, block_h: int) -> tuple[int, int]:
    """A program for each node or piece of one, and each block of heads."""
    if batch * heads >= MAX_GRID_Y:
        raise ValueError(f"rows on a GPU take batch · heads below {MAX_GRID_Y:,} (got {batch * heads:,})")
    return adjacency.num_pieces + len(adjacency.start) - 1, batch * triton.cdiv(heads, block_h)


def sum_pieces(adjacency: Adjacency, x: Tensor, x_pieces: Tensor) -> None:
    """The vectors (B, heads, nodes, D) of heavy nodes, the sums of those of their pieces."""
    batch, heads, _, dim = x.shape
    if num_heavy := len(adjacency.pieces):
        _sum_pieces_kernel[num_heavy, batch * heads](
            adjacency.pieces, heads, ptr_and_strides(x), ptr_and_strides(x_pieces), dim, padded_dim(dim)
        )
