"""Attention edge by edge in Triton, for a GPU: forward and dq by the edges of queries, dk and dv by those of keys.

A program has one node, or a piece of a node with many edges, and a block of heads; it gathers the vectors of some
neighbours at a time, and computes in float32 (float64, where tensors have it). The pieces of a node come first and are
put together in their order. Nothing is added atomically: the same bits every run. The scores are exponents of 2.

How tensors and biases come to a kernel stands in `gpu.py`. `half` is start, neighbor, units and edge of an
`Adjacency`; a program's `place` is its batch, heads, node, the first of its edges and how many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.memory import like
from attngraph.kernels.triton.common import (
    DENSE,
    EDGE,
    KINDS,
    LN_2,
    LOG2_E,
    NO_BIAS,
    bias_of,
    constants,
    delta,
    place_of_bias,
    side_of,
    spread,
    summed_as,
    width,
)

# ------------------------------------------------------------------------------------------ what a program reads


@triton.jit
def _place(half, pieces, head_blocks, H, block: tl.constexpr, heavy: tl.constexpr):
    """(batch, heads, node, its first edge, how many) of this program; and where its result belongs: the number of its
    piece, how many heads are stored as those of a piece, and how many as those of a node: H or 0.
    """
    at, turn = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if at < pieces:
        node = tl.load(half[2] + at.to(tl.int64) * 4)
        lo, hi = tl.load(half[2] + at.to(tl.int64) * 4 + 2), tl.load(half[2] + at.to(tl.int64) * 4 + 3)
    else:
        node = (at - pieces).to(tl.int64)
        lo, hi = tl.load(half[0] + node), tl.load(half[0] + node + 1)
    count = (hi - lo).to(tl.int32)
    of_piece = tl.where(at < pieces, H, 0)
    of_node = tl.where(count <= heavy, H - of_piece, 0)
    count = tl.where(of_piece + of_node > 0, count, 0)  # the edges of a heavy node are those of its pieces
    h = (turn % head_blocks) * block + tl.arange(0, block)
    return (turn // head_blocks, h, node, lo, count), (at.to(tl.int64), of_piece, of_node)


@triton.jit
def _exact(x, number: tl.constexpr):
    """A number, (1, 1), that comes as two, as kernels are given float32 alone."""
    return tl.zeros([1, 1], number) + x[0] + x[1]


@triton.jit
def _own(x, b, h, H, node, dim: tl.constexpr, wide: tl.constexpr, number: tl.constexpr):
    """The vectors of a node, (heads, wide)."""
    d = tl.arange(0, wide)
    at = x[0] + b * x[1] + h[:, None] * x[2] + node * x[3] + d[None, :]
    return tl.load(at, mask=(h < H)[:, None] & (d < dim)[None, :], other=0.0).to(number)


@triton.jit
def _others(x, b, h, H, node, live, dim: tl.constexpr, wide: tl.constexpr, number: tl.constexpr):
    """The vectors of some neighbours, (neighbours, heads, wide)."""
    d = tl.arange(0, wide)
    at = x[0] + b * x[1] + node[:, None, None] * x[3] + h[None, :, None] * x[2] + d[None, None, :]
    mask = live[:, None, None] & (h < H)[None, :, None]
    if dim != wide:
        mask = mask & (d < dim)[None, None, :]
    return tl.load(at, mask=mask, other=0.0).to(number)


@triton.jit
def _edges(half, lo, step, count, edges: tl.constexpr):
    """Some of a node's edges: which are there, their neighbours, and their places."""
    live = step + tl.arange(0, edges) < count
    e = lo + step + tl.arange(0, edges)
    return live, tl.load(half[1] + e, mask=live, other=0).to(tl.int64), e


@triton.jit
def _store(x, some, to, b, h, node, value, dim: tl.constexpr, wide: tl.constexpr):
    """The vectors (heads, wide) of a node, or of a piece of one."""
    at, of_piece, of_node = to
    d = tl.arange(0, wide)
    where = x[0] + b * x[1] + h[:, None] * x[2] + node * x[3] + d[None, :]
    tl.store(where, value.to(x[0].dtype.element_ty), mask=(h < of_node)[:, None] & (d < dim)[None, :])
    where = some[0] + b * some[1] + h[:, None] * some[2] + at * some[3] + d[None, :]
    tl.store(where, value, mask=(h < of_piece)[:, None] & (d < dim)[None, :])


@triton.jit
def _put(x, some, to, b, h, H, node, n, pieces, value):
    """The numbers (heads,) of a node, in x (B, H, n), or of a piece, in some (B, H, pieces)."""
    at, of_piece, of_node = to
    tl.store(x + (b * H + h) * n + node, value, mask=h < of_node)
    tl.store(some + (b * H + h) * pieces + at, value, mask=h < of_piece)


# ----------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["pieces", "head_blocks", "H", "n"])
def _forward(
    sides, bias, half, pieces, head_blocks, H, group, n, scale, shape: tl.constexpr, out, some_out, lse, some_lse
):
    number: tl.constexpr = tl.float64 if shape.double else tl.float32
    place, to = _place(half, pieces, head_blocks, H, shape.heads, shape.heavy)
    b, h, i, lo, count = place
    q = _own(sides[0], b, h, H, i, shape.dim, shape.wide, number) * _exact(scale, number)
    top, total = tl.full([shape.heads], float("-inf"), number), tl.zeros([shape.heads], number)
    heard = tl.zeros([shape.heads, shape.value_wide], number)
    for step in range(0, count, shape.edges):
        live, j, e = _edges(half, lo, step, count, shape.edges)
        k = _others(sides[1], b, h // group, H // group, j, live, shape.dim, shape.wide, number)
        v = _others(sides[2], b, h // group, H // group, j, live, shape.value_dim, shape.value_wide, number)
        s = tl.sum(k * q[None, :, :], 2)
        keep = live[:, None] & (h < H)[None, :]
        if shape.kind != NO_BIAS:
            at = place_of_bias(bias, b, h[None, :], i, j[:, None], n, e[:, None], shape.kind)
            s += tl.load(at, mask=keep, other=0.0).to(number) * LOG2_E
        s = tl.where(keep, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        level = tl.where(new == float("-inf"), 0.0, new)
        p, less = tl.exp2(s - level[None, :]), tl.exp2(top - level)
        total = total * less + tl.sum(p, 0)
        heard = heard * less[:, None] + tl.sum(p[:, :, None] * v, 0)
        top = new
    some = tl.where(total == 0.0, 1.0, total)
    _store(out, some_out, to, b, h, i, heard / some[:, None], shape.value_dim, shape.value_wide)
    _put(lse, some_lse, to, b, h, H, i, n, pieces, tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) * LN_2))


@triton.jit(do_not_specialize=["pieces", "H", "n"])
def _merge(of_node, pieces, H, n, shape: tl.constexpr, out, some_out, lse, some_lse):
    """The result of a heavy node, from those of its pieces."""
    number: tl.constexpr = tl.float64 if shape.double else tl.float32
    node, first, count = _pieces_of(of_node)
    head = tl.program_id(1).to(tl.int64)
    one, d = tl.arange(0, 1), tl.arange(0, shape.value_wide)
    top, total = tl.full([1], float("-inf"), number), tl.zeros([1], number)
    heard = tl.zeros([shape.value_wide], number)
    for step in range(count):
        level = tl.load(some_lse + head * pieces + first + step + one)
        own = tl.load(_vector(some_out, head, H, first + step, d), mask=d < shape.value_dim, other=0.0)
        new = tl.maximum(top, level)
        by = tl.where(new == float("-inf"), 0.0, new)
        less, more = tl.exp(top - by), tl.exp(level - by)
        heard, total, top = heard * less + own * more, total * less + more, new
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(_vector(out, head, H, node, d), (heard / some).to(out[0].dtype.element_ty), mask=d < shape.value_dim)
    tl.store(lse + head * n + node + one, tl.where(total == 0.0, float("-inf"), top + tl.log(some)))


@triton.jit
def _pieces_of(of_node):
    """A heavy node, its first piece, and how many."""
    at = of_node + tl.program_id(0).to(tl.int64) * 3
    return tl.load(at), tl.load(at + 1), (tl.load(at + 2) - tl.load(at + 1)).to(tl.int32)


@triton.jit
def _vector(x, head, H, node, d):
    return x[0] + head // H * x[1] + head % H * x[2] + node * x[3] + d


# ---------------------------------------------------------------------------------------------------- backward


@triton.jit
def _level(lse, at, mask):
    """lse as a power of 2; inf where nobody is heard, so that exp2(s - lse) is 0."""
    level = tl.load(lse + at, mask=mask, other=float("-inf"))
    return tl.where(level == float("-inf"), float("inf"), level * LOG2_E)


@triton.jit(do_not_specialize=["pieces", "head_blocks", "H", "n"])
def _backward_queries(
    sides, bias, half, pieces, head_blocks, H, group, n, scale, shape: tl.constexpr,
    dout, lse, delta, dq, some_dq, dbias, factor, bias_grad: tl.constexpr,
):  # fmt: skip
    number: tl.constexpr = tl.float64 if shape.double else tl.float32
    place, to = _place(half, pieces, head_blocks, H, shape.heads, shape.heavy)
    b, h, i, lo, count = place
    q = _own(sides[0], b, h, H, i, shape.dim, shape.wide, number) * _exact(scale, number)
    up = _own(dout, b, h, H, i, shape.value_dim, shape.value_wide, number)
    at = (b * H + h) * n + i
    level, mean = _level(lse, at, h < H), tl.load(delta + at, mask=h < H, other=0.0)
    sums = tl.zeros([shape.heads, shape.wide], number)
    for step in range(0, count, shape.edges):
        live, j, e = _edges(half, lo, step, count, shape.edges)
        k = _others(sides[1], b, h // group, H // group, j, live, shape.dim, shape.wide, number)
        v = _others(sides[2], b, h // group, H // group, j, live, shape.value_dim, shape.value_wide, number)
        s = tl.sum(k * q[None, :, :], 2)
        keep = live[:, None] & (h < H)[None, :]
        if shape.kind != NO_BIAS:
            where = place_of_bias(bias, b, h[None, :], i, j[:, None], n, e[:, None], shape.kind)
            s += tl.load(where, mask=keep, other=0.0).to(number) * LOG2_E
        p = tl.where(keep, tl.exp2(s - level[None, :]), 0.0)
        ds = p * (tl.sum(v * up[None, :, :], 2) - mean[None, :])
        sums += tl.sum(ds[:, :, None] * k, 0)
        if bias_grad:
            if shape.kind == DENSE:
                tl.store(place_of_bias(dbias, b, h[None, :], i, j[:, None], n, e[:, None], DENSE), ds, mask=keep)
            else:
                tl.store(place_of_bias(dbias, b, h[None, :], i, j[:, None], n, e[:, None], EDGE), ds, mask=keep)
    _store(dq, some_dq, to, b, h, i, sums * _exact(factor, number), shape.dim, shape.wide)


@triton.jit(do_not_specialize=["pieces", "head_blocks", "H", "n", "m"])
def _backward_keys(
    sides, bias, half, pieces, head_blocks, H, group, n, scale, shape: tl.constexpr,
    dout, lse, delta, dk, some_dk, dv, some_dv, dbias, some_dbias, m, factor, bias_grad: tl.constexpr,
):  # fmt: skip
    number: tl.constexpr = tl.float64 if shape.double else tl.float32
    place, to = _place(half, pieces, head_blocks, H // group, shape.heads, shape.heavy)
    b, hk, j, lo, count = place
    k = _own(sides[1], b, hk, H // group, j, shape.dim, shape.wide, number) * _exact(scale, number)
    v = _own(sides[2], b, hk, H // group, j, shape.value_dim, shape.value_wide, number)
    sums = tl.zeros([shape.heads, shape.wide], number)
    value_sums = tl.zeros([shape.heads, shape.value_wide], number)
    there = hk < H // group
    for of_group in range(group):
        h = hk * group + of_group
        bias_sums = tl.zeros([shape.heads], number)
        for step in range(0, count, shape.edges):
            live, i, e = _edges(half, lo, step, count, shape.edges)
            keep = live[:, None] & there[None, :]
            q = _others(sides[0], b, h, H, i, live, shape.dim, shape.wide, number)
            up = _others(dout, b, h, H, i, live, shape.value_dim, shape.value_wide, number)
            at = (b * H + h)[None, :] * n + i[:, None]
            s = tl.sum(q * k[None, :, :], 2)
            if shape.kind != NO_BIAS:
                if shape.kind == EDGE:
                    e = tl.load(half[3] + e, mask=live, other=0).to(tl.int64)
                where = place_of_bias(bias, b, h[None, :], i[:, None], j, n, e[:, None], shape.kind)
                s += tl.load(where, mask=keep, other=0.0).to(number) * LOG2_E
            p = tl.where(keep, tl.exp2(s - _level(lse, at, keep)), 0.0)
            ds = p * (tl.sum(up * v[None, :, :], 2) - tl.load(delta + at, mask=keep, other=0.0))
            sums += tl.sum(ds[:, :, None] * q, 0)
            value_sums += tl.sum(p[:, :, None] * up, 0)
            if bias_grad:
                bias_sums += tl.sum(ds, 0)
        if bias_grad:
            at, of_piece, of_node = to
            _put(dbias, some_dbias, (at, of_piece * group, of_node * group), b, h, H, j, m, pieces, bias_sums)
    _store(dk, some_dk, to, b, hk, j, sums * _exact(factor, number), shape.dim, shape.wide)
    _store(dv, some_dv, to, b, hk, j, value_sums, shape.value_dim, shape.value_wide)


@triton.jit(do_not_specialize=["H"])
def _gather(of_node, H, shape: tl.constexpr, total, some, dim: tl.constexpr, wide: tl.constexpr):
    """The gradient of a heavy node, the sum of those of its pieces."""
    number: tl.constexpr = tl.float64 if shape.double else tl.float32
    node, first, count = _pieces_of(of_node)
    head, d = tl.program_id(1).to(tl.int64), tl.arange(0, wide)
    sums = tl.zeros([wide], number)
    for step in range(count):
        sums += tl.load(_vector(some, head, H, first + step, d), mask=d < dim, other=0.0)
    tl.store(_vector(total, head, H, node, d), sums.to(total[0].dtype.element_ty), mask=d < dim)


# ------------------------------------------------------------------------------------------------------ launch


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    dim: int
    value_dim: int
    wide: int
    value_wide: int
    heads: int  # of a program
    edges: int  # at a time
    heavy: int  # edges above which a node is cut into pieces
    kind: int
    double: bool


WARPS = 4
# By kernel: numbers of neighbours that a program holds at a time, so that all stay in registers, counted in what the
# compiler makes for sm_90 (tests/compile_triton.py). Not yet measured on a GPU.
NUMBERS = {"_forward": 4096, "_backward_queries": 2048, "_backward_keys": 2048}
FEWEST_EDGES = 4  # at a time: fewer heads rather than fewer edges


def forward(q: Tensor, k: Tensor, v: Tensor, layout, bias, scale: float) -> tuple[Tensor, Tensor]:
    """See `rows_numba.forward`; in float16, bfloat16, float32 or float64."""
    call = _Call(q, k, v, layout, bias, scale)
    return call.forward(like(q, v.shape[3]))


def backward(
    q, k, v, out, lse, dout, dlse, layout, bias, scale: float, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `rows_numba.backward`."""
    call, of_keys = _Call(q, k, v, layout, bias, scale), bias_grad and bias[0] == "dense" and bias[1].shape[2] == 1
    lse = lse.contiguous()
    past = side_of(dout), lse, delta(out, dout, lse, dlse)
    room = call.room(of_keys) if bias_grad else None
    dq = call.of_queries(past, like(q, q.shape[3]), None if of_keys else room)
    dk, dv = call.of_keys(past, like(k, k.shape[3]), like(v, v.shape[3]), room if of_keys else None)
    return dq, dk, dv, call.gathered(room) if bias_grad else None


class _Call:
    """What all kernels of a call are given: tensors, layout, sizes."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout, bias, scale: float):
        (self.B, self.H, self.n, D), (_, self.key_heads, self.m, Dv) = q.shape, v.shape
        self.layout, self.given, self.factor, self.scale = layout, bias, _in_two(scale), _in_two(scale * LOG2_E.value)
        self.kind, self.dims = KINDS[bias[0]] if bias else NO_BIAS.value, (D, Dv, width(D), width(Dv))
        self.sides = tuple(side_of(side) for side in (q, k, v))
        self.bias = bias_of(spread(bias)) if bias else self.sides[0]
        self.double, self.wide = q.dtype == torch.float64, torch.promote_types(q.dtype, torch.float32)

    def forward(self, out: Tensor) -> tuple[Tensor, Tensor]:
        half, lse = self.layout.by_query, self._room(self.n)
        some_out, some_lse = self._room(half.num_pieces, self.dims[1]), self._room(half.num_pieces)
        self._run(_forward, half, self.H, side_of(out), side_of(some_out), lse, some_lse)
        if heavy := len(half.pieces):
            _merge[heavy, self.B * self.H](
                half.pieces, half.num_pieces, self.H, self.n, constants(self._shape(_merge, half, 1)),
                side_of(out), side_of(some_out), lse, some_lse,
            )  # fmt: skip
        return out, lse

    def of_queries(self, past: tuple, dq: Tensor, room: Tensor | None) -> Tensor:
        half = self.layout.by_query
        some, to = self._room(half.num_pieces, self.dims[0]), self.bias if room is None else bias_of(room)
        self._run(_backward_queries, half, self.H, *past, side_of(dq), side_of(some), to, self.factor, room is not None)
        self._gather(half, dq, some)
        return dq

    def of_keys(self, past: tuple, dk: Tensor, dv: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
        half = self.layout.numbered if self.kind == EDGE.value else self.layout.by_key
        heads = self.key_heads
        some = [self._room(half.num_pieces, side.shape[3], heads) for side in (dk, dv)]
        some_bias = self._room(half.num_pieces, 1)
        self._run(
            _backward_keys, half, heads, *past, side_of(dk), side_of(some[0]), side_of(dv), side_of(some[1]),
            some_bias if room is None else room, some_bias, self.m, self.factor, room is not None,
        )  # fmt: skip
        for total, part in zip((dk, dv), some, strict=True):
            self._gather(half, total, part)
        if room is not None:
            self._gather(half, room[:, :, 0, :, None], some_bias)
        return dk, dv

    def _room(self, nodes: int, dim: int = 0, heads: int | None = None) -> Tensor:
        """For numbers of nodes, (B, H, nodes) or (B, H, nodes, dim), in the precision of the sums."""
        shape = (self.B, heads or self.H, nodes, dim) if dim else (self.B, self.H, nodes)
        return torch.empty(shape, dtype=self.wide, device=self.sides[0][0].device)

    def _shape(self, kernel, half, heads: int) -> Shape:
        most = NUMBERS.get(kernel.fn.__name__, 1) // max(self.dims[2:]) // (1 + self.double)
        together = min(triton.next_power_of_2(heads), max(1, most // FEWEST_EDGES))
        edges = max(1, most // together)
        return Shape(*self.dims, together, edges, half.heavy, self.kind, self.double)

    def _run(self, kernel, half, heads: int, *own) -> None:
        """A kernel, for each node or piece of one, and each block of heads."""
        shape, works = self._shape(kernel, half, heads), half.num_pieces + len(half.start) - 1
        blocks = -(-heads // shape.heads)
        if self.B * heads >= MOST_ON_AN_AXIS:
            raise ValueError(f"rows on a GPU take batch · heads below {MOST_ON_AN_AXIS:,} (got {self.B * heads:,})")
        if works * self.B:
            kernel[works, self.B * blocks](
                self.sides, self.bias, (half.start, half.neighbor, half.units, half.edge), half.num_pieces, blocks,
                self.H, self.H // self.key_heads, self.n, self.scale, constants(shape), *own, num_warps=WARPS,
            )  # fmt: skip

    def _gather(self, half, total: Tensor, some: Tensor) -> None:
        """The gradients of heavy nodes."""
        if heavy := len(half.pieces):
            heads, dim = total.shape[1], total.shape[3]
            _gather[heavy, self.B * heads](
                half.pieces,
                heads,
                constants(self._shape(_gather, half, 1)),
                side_of(total),
                side_of(some),
                dim,
                width(dim),
            )

    # The gradient of a bias: kernels store one number for each head and edge, pair, or key; then those that share a
    # value are summed.

    def room(self, of_keys: bool) -> Tensor:
        """Where the kernels store it."""
        if self.given[0] == "dense":
            return (
                self._room(self.m)[:, :, None]
                if of_keys
                else self._room(self.n * self.m).unflatten(2, (self.n, self.m)).zero_()
            )
        return self._room(len(self.layout.by_query.neighbor))[:, :, None]

    def gathered(self, room: Tensor) -> Tensor:
        """The gradient of the bias's values."""
        kind, values = self.given
        if kind == "dense":
            return summed_as(values, room)
        if kind == "edge":
            return summed_as(values, room[:, :, 0])
        half = self.layout.by_query
        query = torch.arange(self.n, device=room.device).repeat_interleave(half.start.diff())
        place, order = (half.neighbor - query + self.n - 1).sort(stable=True)  # the sums of each j - i, in order
        lengths = torch.searchsorted(place, torch.arange(self.n + self.m, device=room.device)).diff()
        sums = room[:, :, 0].sum(0, dtype=torch.float64)[:, order].T.contiguous()
        found = torch.segment_reduce(sums, "sum", lengths=lengths).T.to(room.dtype)
        return found.sum(0, keepdim=True) if values.shape[0] == 1 else found


MOST_ON_AN_AXIS = 1 << 16


def _in_two(x: float) -> tuple[float, float]:
    """As the sum of two numbers of float32."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high
