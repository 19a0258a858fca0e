"""Sixteen numbers, float32 or float64, as one LLVM vector, and the product of 8 rows by them: what tiles kernels use.

LLVM's instructions are written out (by llvmlite, through Numba's `intrinsic`), as its loop vectoriser does not keep a
block of sums in registers, nor transpose within them. A vector of float32 is one register of AVX-512, two of AVX2, four
of NEON; one of float64 is twice as many.

Gains, over the same loops in plain Numba: a product 64 × 64 × 64 runs at 187 GFLOP/s instead of 10 (NumPy's BLAS: 179),
2^x takes 0.2 ns a number instead of the 2.1 ns of math.exp, the 64 words of 16 Philox counters 24 ns instead of 88
(best of 30 runs, one core of a Xeon with AVX-512, float32).
Runs wherever Numba does, on every CPU that LLVM knows; without Numba, `kernels/torch/tiles.py` runs instead.
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
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from attngraph.kernels.dropout import LOW, MULTIPLIER_A, MULTIPLIER_B, ROUNDS

LANES = 16  # numbers of a vector
BLOCK_ROWS = 8  # rows of a product whose sums stay in registers
TILE = 64  # nodes of a tile
LOG2_E = math.log2(math.e)

INTS, WORDS, SIZE = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.IntType(64), LANES), ir.IntType(64)


class Format(NamedTuple):
    """How a float is written, and powers of 2 in it."""

    name: str  # LLVM's
    bits: int
    mantissa_bits: int
    bias: int  # of the exponent
    least_power: float  # below, 2^x counts as 0
    exp2: tuple[float, ...]  # 2^r for |r| ≤ 1/2 as a polynomial, the highest power first: a fit


FORMATS = {
    ir.FloatType(): Format(
        "f32", 32, 23, 127, -100.0,
        (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0),
    ),  # relative error 1.1e-7
    ir.DoubleType(): Format(
        "f64", 64, 52, 1023, -900.0,
        (
            4.4549605981865186e-10, 7.072585949269223e-09, 1.0178062445845774e-07, 1.321544258792169e-06,
            1.525273382983612e-05, 0.0001540353044173605, 0.0013333558146416936, 0.009618129107606888,
            0.0555041086648216, 0.24022650695910097, 0.6931471805599453, 1.0,
        ),
    ),  # relative error 6e-17, and roundings
}  # fmt: skip


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


def _format(x) -> Format:
    """Of the numbers of a vector."""
    return FORMATS[x.type.element]


def _same(x, value: float):
    """A constant in all lanes of a vector like x."""
    return ir.Constant(x.type, [float(np.float32(value)) if _format(x).bits == 32 else value] * LANES)


def _ints(x):
    """The type of the bits of x."""
    return ir.VectorType(ir.IntType(_format(x).bits), LANES)


def _same_bits(x, value: int):
    """A constant in all lanes of the bits of x."""
    return ir.Constant(_ints(x), [value] * LANES)


def _load(builder, data, index):
    """data[index : index + 16]."""
    return builder.load(vector_pointer(builder, builder.gep(data, [index]), 0, LANES), align=_align(data))


def _store(builder, data, index, value):
    """data[index : index + 16] = value."""
    builder.store(value, vector_pointer(builder, builder.gep(data, [index]), 0, LANES), align=_align(data))


def _align(data) -> int:
    return FORMATS[data.type.pointee].bits // 8


# ------------------------------------------------------------------------------------------- a vector in Numba


class Vector(types.Type):
    """16 numbers as one LLVM vector: a local variable of a compiled function."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(f"{dtype}x{LANES}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Its representation: the vector itself."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(manager[kind.dtype].get_value_type(), LANES))


VECTORS = Vector(types.float32), Vector(types.float64)


def _define(operation, instruction: str) -> None:
    cases = {"cases": [signature(vector, vector, vector) for vector in VECTORS]}
    infer_global(operation)(type("Operation", (ConcreteTemplate,), cases))

    def generate(context, builder, sig, args):
        return getattr(builder, instruction)(*args, flags=("contract",))

    lower_builtin(operation, Vector, Vector)(generate)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


@intrinsic
def broadcast(typing, x, number):
    """One number in all lanes, in the dtype of the array x."""

    def generate(context, builder, sig, args):
        return splat(builder, context.cast(builder, args[1], number, x.dtype), LANES)

    return Vector(x.dtype)(x, number), generate


@intrinsic
def load(typing, x, at):
    """x[at : at + 16] of a flat array."""

    def generate(context, builder, sig, args):
        return _load(builder, pointer(context, builder, x, *args), SIZE(0))

    return Vector(x.dtype)(x, types.intp), generate


@intrinsic
def store(typing, x, at, value):
    """x[at : at + 16] = value."""

    def generate(context, builder, sig, args):
        _store(builder, pointer(context, builder, x, *args[:2]), SIZE(0), args[2])
        return context.get_dummy_value()

    return types.void(x, types.intp, value), generate


@intrinsic
def maximum(typing, a, b):
    """The larger one in each lane."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), generate


@intrinsic
def other_than_maximum(typing, a, b):
    """The one that `maximum`(a, b) is not, in each lane."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args[::-1])

    return a(a, b), generate


@intrinsic
def at_least(typing, a, b):
    """A bit for each lane in which a >= b, from the lowest on."""

    def generate(context, builder, sig, args):
        mask = builder.fcmp_ordered(">=", *args)
        return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), SIZE)

    return types.uint64(a, b), generate


@intrinsic
def where(typing, bits, first, value, masked):
    """In lane l, that of `value` where bit first + l is set, else that of `masked`."""

    def generate(context, builder, sig, args):
        bits = builder.trunc(builder.lshr(args[0], args[1]), ir.IntType(LANES))
        return builder.select(builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)), args[2], args[3])

    return value(types.uint64, types.intp, value, masked), generate


@intrinsic
def where_positive(typing, x, value, other):
    """In each lane, that of `value` where x > 0, else that of `other`."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], _same(args[0], 0.0)), *args[1:])

    return value(x, value, other), generate


def _split_exponent(builder, x):
    """x as n + r, n an integer, |r| <= 1/2 → r, and n as the exponent of a number: n · 2²³, or n · 2⁵²."""
    mantissa_bits = _format(x).mantissa_bits
    to_integer = _same(x, 1.5 * 2**mantissa_bits)  # x plus it has round(x) in its last bits
    shifted = builder.fadd(x, to_integer)
    r = builder.fsub(x, builder.fsub(shifted, to_integer))
    return r, builder.shl(builder.bitcast(shifted, _ints(x)), _same_bits(x, mantissa_bits))


def _polynomial(builder, coefficients, r):
    series = _same(r, coefficients[0])
    for coefficient in coefficients[1:]:
        series = fma(builder, series, r, _same(r, coefficient))
    return series


def _exp2(builder, x, factor=None):
    """2^x, or 2^(x · factor); 0 below the least power."""
    form, mantissa_bits, is_plain = _format(x), _format(x).mantissa_bits, factor is None
    factor = _same(x, 1.0) if factor is None else factor
    to_integer = _same(x, 1.5 * 2**mantissa_bits)  # a number plus it has the rounded number in its last bits
    shifted = fma(builder, x, factor, to_integer)
    integer = builder.fsub(shifted, to_integer)
    r = fma(builder, x, factor, builder.fneg(integer))
    exponent = builder.shl(builder.bitcast(shifted, _ints(x)), _same_bits(x, mantissa_bits))
    series = builder.bitcast(_polynomial(builder, form.exp2, r), _ints(x))
    scaled = builder.bitcast(builder.add(series, exponent), x.type)
    power = x if is_plain else integer
    return builder.select(builder.fcmp_unordered(">", power, _same(x, form.least_power)), scaled, _same(x, 0.0))


@intrinsic
def exp2(typing, x):
    """2^x for x <= 0, above as of 0; 0 below -100, or -900 in float64; nan stays nan.

    Less would make denormal products with other numbers, which take a hundred times as long.
    """

    def generate(context, builder, sig, args):
        zero = _same(args[0], 0.0)
        return _exp2(builder, builder.select(builder.fcmp_ordered(">", args[0], zero), zero, args[0]))

    return x(x), generate


@intrinsic
def exp2_scaled(typing, x, factor):
    """2^(x · factor) as of `exp2`, also where that is above 1; where it is infinite, anything."""
    return x(x, factor), lambda context, builder, sig, args: _exp2(builder, *args)


def _size(builder, x):
    """The bits of |x|."""
    return builder.and_(builder.bitcast(x, _ints(x)), _same_bits(x, 2 ** (_format(x).bits - 1) - 1))


def _exp2_of_size(builder, x, factor):
    """-|x| · factor, but no denormal's power, as n + r → 2^n and 2^n (2^r - 1), whose relative error is the fit's."""
    form = _format(x)
    power = builder.fmul(builder.bitcast(_size(builder, x), x.type), _same(x, -factor))
    least = _same(x, 1.0 - form.bias)
    power = builder.select(builder.fcmp_unordered(">", power, least), power, least)
    r, exponent = _split_exponent(builder, power)
    scale = builder.bitcast(builder.add(exponent, _same_bits(x, form.bias << form.mantissa_bits)), x.type)
    return scale, builder.fmul(scale, builder.fmul(r, _polynomial(builder, form.exp2[:-1], r)))


@intrinsic
def tanh(typing, x):
    """The hyperbolic tangent, also where it is small; nan stays nan.

    With y = e^(-2|x|) - 1, its size is -y / (2 + y).
    """

    def generate(context, builder, sig, args):
        (x,) = args
        scale, less_scale = _exp2_of_size(builder, x, 2 * LOG2_E)
        y = builder.fadd(less_scale, builder.fsub(scale, _same(x, 1.0)))
        size = builder.fdiv(y, builder.fadd(y, _same(x, 2.0)))  # is at most 0
        sign = builder.and_(builder.bitcast(x, _ints(x)), _same_bits(x, -(2 ** (_format(x).bits - 1))))
        return builder.bitcast(builder.or_(_size(builder, size), sign), x.type)

    return x(x), generate


@intrinsic
def sigmoid(typing, x):
    """1 / (1 + e^-x); nan stays nan. With y = e^-|x|, it is 1 / (1 + y) or y / (1 + y)."""

    def generate(context, builder, sig, args):
        (x,) = args
        scale, less_scale = _exp2_of_size(builder, x, LOG2_E)
        y, one = builder.fadd(less_scale, scale), _same(x, 1.0)
        above = builder.select(builder.fcmp_ordered("<", x, _same(x, 0.0)), y, one)
        return builder.fdiv(above, builder.fadd(y, one))

    return x(x), generate


@intrinsic
def expand(typing, x, at, bits):
    """The numbers x[at], x[at + 1], … in the lanes whose bits are set, 0 in the others; reads no more than these."""

    def generate(context, builder, sig, args):
        source, mask = pointer(context, builder, x, *args[:2]), _lane_mask(builder, args[2])
        zeros = splat(builder, ir.Constant(source.type.pointee, 0.0), LANES)
        kind = ir.FunctionType(zeros.type, [source.type, mask.type, zeros.type])
        name = f"llvm.masked.expandload.v{LANES}{_format(zeros).name}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [source, mask, zeros])

    return Vector(x.dtype)(x, types.intp, types.uint64), generate


@intrinsic
def compress(typing, x, at, bits, value):
    """The lanes of `value` whose bits are set, to x[at], x[at + 1], …"""

    def generate(context, builder, sig, args):
        target, mask = pointer(context, builder, x, *args[:2]), _lane_mask(builder, args[2])
        kind = ir.FunctionType(ir.VoidType(), [args[3].type, target.type, mask.type])
        name = f"llvm.masked.compressstore.v{LANES}{_format(args[3]).name}"
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [args[3], target, mask])
        return context.get_dummy_value()

    return types.void(x, types.intp, types.uint64, value), generate


def _lane_mask(builder, bits):
    """The lowest 16 bits as a mask."""
    return builder.bitcast(builder.trunc(bits, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))


@intrinsic
def count_bits(typing, bits):
    """How many bits are set."""
    return types.intp(types.uint64), lambda context, builder, sig, args: builder.ctpop(args[0])


@intrinsic
def philox_kept(typing, c0, c0_step, c1, c1_step, c2, c3, round_keys, threshold):
    """Of the 16 counters (c0 + l · c0_step, c1 + l · c1_step, c2, c3), which words are at least the threshold.

    Bit 16 w + l of the result is for word w of counter l: Philox4x32-10 (see `kernels.dropout`), with the two keys of
    each round, one after the other, in round_keys: uint64 (20,).
    """

    def generate(context, builder, sig, args):
        def same(number):
            return ir.Constant(WORDS, [number] * LANES)

        def stepped(start, step):
            lane = ir.Constant(WORDS, list(range(LANES)))
            return builder.add(splat(builder, start, LANES), builder.mul(lane, splat(builder, step, LANES)))

        c0, c1, c2, c3 = stepped(*args[:2]), stepped(*args[2:4]), *(splat(builder, x, LANES) for x in args[4:6])
        keys = pointer(context, builder, round_keys, args[6], SIZE(0))
        for r in range(ROUNDS):
            # Only the lower halves count: what is above them is left in, as products and the comparison ignore it.
            product_0 = builder.mul(builder.and_(c0, same(LOW)), same(MULTIPLIER_A))
            product_2 = builder.mul(builder.and_(c2, same(LOW)), same(MULTIPLIER_B))
            high_0, high_2 = (builder.lshr(product, same(32)) for product in (product_0, product_2))
            key_0, key_1 = (
                splat(builder, builder.load(builder.gep(keys, [SIZE(2 * r + place)])), LANES) for place in (0, 1)
            )
            c0, c1 = builder.xor(builder.xor(high_2, c1), key_0), product_2
            c2, c3 = builder.xor(builder.xor(high_0, c3), key_1), product_0
        least, kept = splat(builder, builder.trunc(args[7], ir.IntType(32)), LANES), SIZE(0)
        for place, word in enumerate((c0, c1, c2, c3)):
            mask = builder.icmp_unsigned(">=", builder.trunc(word, INTS), least)
            bits = builder.zext(builder.bitcast(mask, ir.IntType(LANES)), SIZE)
            kept = builder.or_(kept, builder.shl(bits, SIZE(LANES * place)))
        return kept

    index = types.intp
    return types.uint64(index, index, index, index, index, index, round_keys, types.uint64), generate


@intrinsic
def reduce_sum(typing, x):
    """The sum over the lanes."""

    def generate(context, builder, sig, args):
        (x,) = args
        for distance in (8, 4, 2, 1):
            rotated = [(lane + distance) % LANES for lane in range(LANES)]
            x = builder.fadd(x, shuffle(builder, x, x, rotated))
        return builder.extract_element(x, ir.IntType(32)(0))

    return x.dtype(x), generate


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
        rows = [_load(builder, source, builder.mul(args[2], SIZE(r))) for r in range(LANES)]
        for bit in (1, 2, 4, 8):  # swap the off-diagonal blocks of this size
            upper = [lane if not lane & bit else LANES + lane - bit for lane in range(LANES)]
            lower = [lane + bit if not lane & bit else LANES + lane for lane in range(LANES)]
            for r in range(LANES):
                if not r & bit:
                    a, b = rows[r], rows[r + bit]
                    rows[r], rows[r + bit] = shuffle(builder, a, b, upper), shuffle(builder, a, b, lower)
        for r, row in enumerate(rows):
            _store(builder, target, SIZE(r * TILE), row)
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, index, x_t, index), generate


class Matrix(NamedTuple):
    """A matrix within a flat array: its number (r, c) is data[offset + r · row_stride + c · column_stride]."""

    data: Any
    offset: int
    row_stride: int
    column_stride: int


@intrinsic
def vectors_at_once(typing, x):
    """How many vectors of columns `gemm_8_rows` has in registers, in the dtype of the array x; a constant."""
    vectors = 2 if x.dtype == types.float32 else 1
    return types.literal(vectors)(x), lambda context, builder, sig, args: SIZE(vectors)


@intrinsic(prefer_literal=True)
def gemm_8_rows(typing, c, a, b, depth, overwrite, vectors):
    """c (8, 16 · vectors) (+)= a (8, depth) · b (depth, 16 · vectors): three `Matrix`, the columns of c and b adjacent.

    depth > 0; vectors is a constant; with overwrite, what c held does not count. Of so many rows at a time as have
    their sums in half of the registers.
    """

    def generate(context, builder, sig, args):
        (c_data, c_stride, _), (a_data, a_stride, a_step), (b_data, b_stride, _) = (
            _unpacked(context, builder, kind, matrix) for kind, matrix in zip((c, a, b), args[:3], strict=True)
        )
        depth, overwrite, columns = *args[3:5], vectors.literal_value
        zeros = splat(builder, ir.Constant(c_data.type.pointee, 0.0), LANES)
        sum_bits = columns * LANES * c.types[0].dtype.bitwidth  # of a row
        rows = max(1, min(BLOCK_ROWS, register_bits(context) // 2 // sum_bits))
        cells = [(r, p) for r in range(rows) for p in range(columns)]
        before, over_rows = builder.block, builder.append_basic_block("rows")
        loop, done, after = (builder.append_basic_block(name) for name in ("gemm", "done", "after"))
        builder.branch(over_rows)

        builder.position_at_end(over_rows)
        row = builder.phi(SIZE)
        row.add_incoming(SIZE(0), before)
        a_rows = [builder.gep(a_data, [builder.mul(a_stride, builder.add(row, SIZE(r)))]) for r in range(rows)]
        builder.branch(loop)

        builder.position_at_end(loop)
        t, a_at, b_at = builder.phi(SIZE), builder.phi(SIZE), builder.phi(SIZE)
        acc = [builder.phi(zeros.type) for _ in cells]
        b_row = [_load(builder, b_data, builder.add(b_at, SIZE(p * LANES))) for p in range(columns)]
        a_column = [splat(builder, builder.load(builder.gep(a_row, [a_at])), LANES) for a_row in a_rows]
        sums = [fma(builder, a_column[r], b_row[p], part) for (r, p), part in zip(cells, acc, strict=True)]
        for phi, step in ((t, SIZE(1)), (a_at, a_step), (b_at, b_stride)):
            phi.add_incoming(SIZE(0), over_rows)
            phi.add_incoming(builder.add(phi, step), loop)
        for phi, part in zip(acc, sums, strict=True):
            phi.add_incoming(zeros, over_rows)
            phi.add_incoming(part, loop)
        builder.cbranch(builder.icmp_signed("<", t.incomings[1][0], depth), loop, done)

        builder.position_at_end(done)
        for (r, p), part in zip(cells, sums, strict=True):
            at = builder.add(builder.mul(c_stride, builder.add(row, SIZE(r))), SIZE(p * LANES))
            held = builder.select(overwrite, zeros, _load(builder, c_data, at))
            _store(builder, c_data, at, builder.fadd(held, part))
        row.add_incoming(builder.add(row, SIZE(rows)), done)
        builder.cbranch(builder.icmp_signed("<", row.incomings[1][0], SIZE(BLOCK_ROWS)), over_rows, after)

        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(c, a, b, types.intp, types.boolean, vectors), generate


def register_bits(context) -> int:
    """Of all vector registers of the CPU that is compiled for: 32 of AVX-512 or NEON, 16 of AVX2."""
    triple, _, features = context.codegen().magic_tuple()
    if triple.startswith(("aarch64", "arm64")):
        return 32 * 128
    return 32 * 512 if "+avx512f" in features.split(",") else 16 * 256


def _unpacked(context, builder, kind, matrix):
    """(pointer to its first number, row stride, column stride) of a `Matrix`."""
    array, offset, row_stride, column_stride = (builder.extract_value(matrix, place) for place in range(4))
    return pointer(context, builder, kind.types[0], array, offset), row_stride, column_stride
