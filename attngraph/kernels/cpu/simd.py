"""Sixteen float32 numbers as one LLVM vector, and the matrix product of 8 rows by them: what the tiles kernels use.

LLVM's instructions are written out (by llvmlite, through Numba's `intrinsic`), as its loop vectoriser does not keep a
block of sums in registers, nor transpose within them. A vector is one register of AVX-512, two of AVX2, four of NEON.

Gains, over the same loops in plain Numba: a product 64 × 64 × 64 runs at 187 GFLOP/s instead of 10 (NumPy's BLAS: 179),
2^x takes 0.2 ns a number instead of the 2.1 ns of math.exp (best of 30 runs, one core of a Xeon with AVX-512, float32).
Runs wherever Numba does, on every CPU that LLVM knows; without Numba, `kernels/torch/tiles.py` runs instead.

The compiled functions that use these are cached by their own file: after a change here, clear Numba's caches.
"""

# pyright: reportCallIssue=false, reportOptionalCall=false
# (numba.extending has no types that a checker understands)

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16  # numbers of a vector
BLOCK_ROWS = 8  # rows of a product whose sums stay in registers
TILE = 64  # nodes of a tile
LOG2_E = np.float32(math.log2(math.e))
ROUND = 1.5 * 2**23  # x + ROUND has round(x) in its last bits
# 2^r for |r| ≤ 1/2, the highest power first: a fit, relative error 1.1e-7.
EXP2 = 0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0

FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
SIZE = ir.IntType(64)


# ------------------------------------------------------------------------------------------------- LLVM helpers


def pointer(context, builder, kind, array, at):
    """To array.flat[at]."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def vector_pointer(builder, data, first, lanes):
    """To data[first : first + lanes] as one vector; `first` is a constant."""
    at = builder.gep(data, [SIZE(first)])
    return builder.bitcast(at, ir.VectorType(data.type.pointee, lanes).as_pointer())


def shuffle(builder, a, b, lanes):
    """Some lanes of a, and of b, whose numbers go on from a's."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))


def splat(builder, number, lanes):
    """One number in all lanes."""
    vector = ir.VectorType(number.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return shuffle(builder, one, one, [0] * lanes)


def fma(builder, a, b, c):
    """a · b + c, rounded once where the CPU can."""
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _constant(value):
    if isinstance(value, float):
        return ir.Constant(FLOATS, [float(np.float32(value))] * LANES)
    return ir.Constant(INTS, [value] * LANES)


def _lanes_at(builder, data, index):
    """A pointer to the vector that begins at data[index]."""
    return vector_pointer(builder, builder.gep(data, [index]), 0, LANES)


# ------------------------------------------------------------------------------------------- a vector in Numba


class Float32x16(types.Type):
    """16 numbers as one LLVM vector: a local variable of a compiled function."""


float32x16 = Float32x16("float32x16")


@register_model(Float32x16)
class Float32x16Model(models.PrimitiveModel):
    """Its representation: the vector itself."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, FLOATS)


def _define(operation, instruction: str) -> None:
    cases = {"cases": [signature(float32x16, float32x16, float32x16)]}
    infer_global(operation)(type("Operation", (ConcreteTemplate,), cases))

    def generate(context, builder, sig, args):
        return getattr(builder, instruction)(*args, flags=("contract",))

    lower_builtin(operation, float32x16, float32x16)(generate)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")


@intrinsic
def broadcast(typing, number):
    """One number in all lanes."""
    return float32x16(types.float32), lambda context, builder, sig, args: splat(builder, args[0], LANES)


@intrinsic
def load(typing, x, at):
    """x[at : at + 16] of a flat array."""

    def generate(context, builder, sig, args):
        return builder.load(vector_pointer(builder, pointer(context, builder, x, *args), 0, LANES), align=4)

    return float32x16(x, types.intp), generate


@intrinsic
def store(typing, x, at, value):
    """x[at : at + 16] = value."""

    def generate(context, builder, sig, args):
        data = pointer(context, builder, x, *args[:2])
        builder.store(args[2], vector_pointer(builder, data, 0, LANES), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, float32x16), generate


@intrinsic
def maximum(typing, a, b):
    """The larger one in each lane."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return float32x16(float32x16, float32x16), generate


@intrinsic
def where(typing, bits, first, value, masked):
    """In lane l, that of `value` where bit first + l is set, else that of `masked`."""

    def generate(context, builder, sig, args):
        bits = builder.trunc(builder.lshr(args[0], args[1]), ir.IntType(LANES))
        return builder.select(builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)), args[2], args[3])

    return float32x16(types.uint64, types.intp, float32x16, float32x16), generate


@intrinsic
def exp2(typing, x):
    """2^x for x <= 0, above as of 0; 0 below -125; nan stays nan."""

    def generate(context, builder, sig, args):
        (x,) = args
        x = builder.select(builder.fcmp_ordered(">", x, _constant(0.0)), _constant(0.0), x)
        shifted = builder.fadd(x, _constant(ROUND))  # has round(x) in its last bits
        r = builder.fsub(x, builder.fsub(shifted, _constant(ROUND)))
        series = _constant(EXP2[0])
        for coefficient in EXP2[1:]:
            series = fma(builder, series, r, _constant(coefficient))
        exponent = builder.shl(builder.bitcast(shifted, INTS), _constant(23))
        scaled = builder.bitcast(builder.add(builder.bitcast(series, INTS), exponent), FLOATS)
        return builder.select(builder.fcmp_unordered(">", x, _constant(-125.0)), scaled, _constant(0.0))

    return float32x16(float32x16), generate


@intrinsic
def reduce_sum(typing, x):
    """The sum over the lanes."""

    def generate(context, builder, sig, args):
        (x,) = args
        for distance in (8, 4, 2, 1):
            rotated = [(lane + distance) % LANES for lane in range(LANES)]
            x = builder.fadd(x, shuffle(builder, x, x, rotated))
        return builder.extract_element(x, ir.IntType(32)(0))

    return types.float32(float32x16), generate


@intrinsic
def bit_range(typing, bits):
    """The first bit that is set, and the first after the last one, of a number that is not 0."""

    def generate(context, builder, sig, args):
        first = builder.cttz(args[0], ir.IntType(1)(1))
        stop = builder.sub(SIZE(64), builder.ctlz(args[0], ir.IntType(1)(1)))
        return context.make_tuple(builder, sig.return_type, [first, stop])

    return types.UniTuple(types.intp, 2)(types.uint64), generate


# ---------------------------------------------------------------------------------------------------- matrices


@intrinsic
def transpose_16x16(typing, x, at, stride, x_t, to):
    """x_t[to + 64 c + r] = x[at + stride r + c] for r, c < 16."""

    def generate(context, builder, sig, args):
        source = pointer(context, builder, x, args[0], args[1])
        target = pointer(context, builder, x_t, args[3], args[4])
        rows = [builder.load(_lanes_at(builder, source, builder.mul(args[2], SIZE(r))), align=4) for r in range(LANES)]
        for bit in (1, 2, 4, 8):  # swap the off-diagonal blocks of this size
            upper = [lane if not lane & bit else LANES + lane - bit for lane in range(LANES)]
            lower = [lane + bit if not lane & bit else LANES + lane for lane in range(LANES)]
            for r in range(LANES):
                if not r & bit:
                    a, b = rows[r], rows[r + bit]
                    rows[r], rows[r + bit] = shuffle(builder, a, b, upper), shuffle(builder, a, b, lower)
        for r, row in enumerate(rows):
            builder.store(row, _lanes_at(builder, target, SIZE(r * TILE)), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, index, x_t, index), generate


class Matrix(NamedTuple):
    """A matrix within a flat array: its number (r, c) is data[offset + r · row_stride + c · column_stride]."""

    data: Any
    offset: int
    row_stride: int
    column_stride: int


@intrinsic(prefer_literal=True)
def gemm_8_rows(typing, c, a, b, depth, overwrite, vectors):
    """c (8, 16 · vectors) (+)= a (8, depth) · b (depth, 16 · vectors): three `Matrix`, the columns of c and b adjacent.

    depth > 0; vectors is a constant; with overwrite, what c held does not count. All sums are in registers.
    """

    def generate(context, builder, sig, args):
        cells = [(r, p) for r in range(BLOCK_ROWS) for p in range(vectors.literal_value)]
        (c_data, c_stride, _), (a_data, a_stride, a_step), (b_data, b_stride, _) = (
            _unpacked(context, builder, kind, matrix) for kind, matrix in zip((c, a, b), args[:3], strict=True)
        )
        depth, overwrite = args[3:5]
        a_rows = [builder.gep(a_data, [builder.mul(a_stride, SIZE(r))]) for r in range(BLOCK_ROWS)]
        targets = {}
        for r, p in cells:
            targets[r, p] = _lanes_at(builder, c_data, builder.add(builder.mul(c_stride, SIZE(r)), SIZE(p * LANES)))
        before, loop, after = builder.block, builder.append_basic_block("gemm"), builder.append_basic_block("after")
        builder.branch(loop)

        builder.position_at_end(loop)
        t, a_at, b_at = builder.phi(SIZE), builder.phi(SIZE), builder.phi(SIZE)
        acc = [builder.phi(FLOATS) for _ in cells]
        b_row = []
        for p in range(vectors.literal_value):
            at = _lanes_at(builder, b_data, builder.add(b_at, SIZE(p * LANES)))
            b_row.append(builder.load(at, align=4))
        a_column = [splat(builder, builder.load(builder.gep(row, [a_at])), LANES) for row in a_rows]
        sums = [fma(builder, a_column[r], b_row[p], part) for (r, p), part in zip(cells, acc, strict=True)]
        for phi, step in ((t, SIZE(1)), (a_at, a_step), (b_at, b_stride)):
            phi.add_incoming(SIZE(0), before)
            phi.add_incoming(builder.add(phi, step), loop)
        for phi, part in zip(acc, sums, strict=True):
            phi.add_incoming(_constant(0.0), before)
            phi.add_incoming(part, loop)
        builder.cbranch(builder.icmp_signed("<", t.incomings[1][0], depth), loop, after)

        builder.position_at_end(after)
        for cell, part in zip(cells, sums, strict=True):
            held = builder.select(overwrite, _constant(0.0), builder.load(targets[cell], align=4))
            builder.store(builder.fadd(held, part), targets[cell], align=4)
        return context.get_dummy_value()

    return types.void(c, a, b, types.intp, types.boolean, vectors), generate


def _unpacked(context, builder, kind, matrix):
    """(pointer to its first number, row stride, column stride) of a `Matrix`."""
    array, offset, row_stride, column_stride = (builder.extract_value(matrix, place) for place in range(4))
    return pointer(context, builder, kind.types[0], array, offset), row_stride, column_stride
