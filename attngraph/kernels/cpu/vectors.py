"""Vector instructions for the Numba kernels: what LLVM's own vectoriser does not find, written out in its language.

The compiled functions that use them are cached by their own file: after a change here, clear numba's caches.
"""

from __future__ import annotations

import math
import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_model

# ------------------------------------------------------------------------------------------------ four edges


# Vectors of a node are loaded whole, as LLVM vectors of a constant length: the loop vectoriser, given such short loops,
# unrolls them or vectorises another one. Four edges at a time share the loads of the node, and the work of summing
# across lanes.


def _data(context, builder, kind, array, at):
    """A pointer to array.flat[at]."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _rows(context, builder, kind, array, nodes, stride, at):
    """Pointers to the vectors of four nodes."""
    firsts = [builder.mul(builder.extract_value(nodes, t), stride) for t in range(4)]
    return [_data(context, builder, kind, array, builder.add(first, at)) for first in firsts]


def _vector(builder, data, first, lanes):
    """A pointer to data[first:first + lanes] as one vector."""
    at = builder.gep(data, [ir.IntType(64)(first)])
    return builder.bitcast(at, ir.VectorType(data.type.pointee, lanes).as_pointer())


def _parts(kind, width):
    """(first, lanes) of the vectors that `width` numbers consist of; each is at most a cache line."""
    line = 512 // kind.dtype.bitwidth
    return [(first, min(line, width.literal_value - first)) for first in range(0, width.literal_value, line)]


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))


def _add_pairs(builder, a, b):
    """The sums of each two neighbouring lanes, of a and then of b."""
    lanes = range(0, 2 * a.type.count, 2)
    return builder.fadd(_shuffle(builder, a, b, lanes), _shuffle(builder, a, b, [x + 1 for x in lanes]))


def _fma(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


@intrinsic(prefer_literal=True)
def dots(typing, scores, at, scale, x, x_at, y, nodes, stride, y_at, width):
    """scores[at + t] += scale · Σ_d x[x_at + d] · y[nodes[t] · stride + y_at + d], t < 4, d < width; all flat.

    width is a constant.
    """

    def generate(context, builder, signature, arguments):
        data = [_data(context, builder, x, *arguments[3:5])]
        data += _rows(context, builder, y, *arguments[5:9])
        align, lanes = x.dtype.bitwidth // 8, max([4, *(1 << (part - 1).bit_length() for _, part in _parts(x, width))])
        sums = [ir.Constant(ir.VectorType(data[0].type.pointee, lanes), None)] * 4
        for first, part in _parts(x, width):
            sides = [builder.load(_vector(builder, side, first, part), align=align) for side in data]
            if part < lanes:
                zero, widen = ir.Constant(sides[0].type, None), [min(lane, part) for lane in range(lanes)]
                sides = [_shuffle(builder, side, zero, widen) for side in sides]
            sums = [_fma(builder, sides[0], side, part_sum) for side, part_sum in zip(sides[1:], sums, strict=True)]
        total = _add_pairs(builder, _add_pairs(builder, *sums[:2]), _add_pairs(builder, *sums[2:]))
        while total.type.count > 4:
            evens = range(0, total.type.count, 2)
            halves = [_shuffle(builder, total, total, [lane + odd for lane in evens]) for odd in (0, 1)]
            total = builder.fadd(*halves)
        target = _vector(builder, _data(context, builder, scores, *arguments[:2]), 0, 4)
        factor = _splat(builder, arguments[2], 4)
        builder.store(_fma(builder, factor, total, builder.load(target, align=align)), target, align=align)
        return context.get_dummy_value()

    index = types.intp
    return types.void(scores, index, x.dtype, x, index, y, nodes, index, index, width), generate


def _splat(builder, number, lanes):
    vector = ir.VectorType(number.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    return _shuffle(builder, one, one, [0] * lanes)


@intrinsic(prefer_literal=True)
def adds(typing, total, at, weights, w_at, y, nodes, stride, y_at, width):
    """total[at + d] += Σ_t weights[w_at + t] · y[nodes[t] · stride + y_at + d], t < 4, d < width; all flat.

    width is a constant.
    """

    def generate(context, builder, signature, arguments):
        target = _data(context, builder, total, *arguments[:2])
        weight = _data(context, builder, weights, *arguments[2:4])
        factors = [builder.load(builder.gep(weight, [ir.IntType(64)(t)])) for t in range(4)]
        rows = _rows(context, builder, y, *arguments[4:8])
        align = y.dtype.bitwidth // 8
        for first, part in _parts(y, width):
            sums = builder.load(_vector(builder, target, first, part), align=align)
            for factor, row in zip(factors, rows, strict=True):
                vector = builder.load(_vector(builder, row, first, part), align=align)
                sums = _fma(builder, _splat(builder, factor, part), vector, sums)
            builder.store(sums, _vector(builder, target, first, part), align=align)
        return context.get_dummy_value()

    index = types.intp
    return types.void(total, index, weights, index, y, nodes, index, index, width), generate


# ------------------------------------------------------------------------------------------------ e to the x


def exp(x):
    """e^x, 0 below the normal numbers; nan stays nan."""


F = np.float32
LOWEST, HIGHEST, LOG2_E, LN2_HIGH, LN2_LOW = F(-87.33), F(88.8), F(math.log2(math.e)), F(0.693359375), F(-2.12194440e-4)
ROUND, ZERO, ONE = F(1.5 * 2**23), F(0), F(1)  # x + ROUND has round(x) in its last bits
C2, C3, C4, C5 = F(0.5), F(1.6666665459e-1), F(4.1665795894e-2), F(8.3334519073e-3)
C6, C7 = F(1.3981999507e-3), F(1.9875691500e-4)


# No reassociation here: it would undo the two-part ln 2.
@overload(exp, jit_options={"fastmath": {"contract"}})
def _(x):
    if x == types.float64:
        return lambda x: math.exp(x)

    def exp32(x):
        near = x if x > LOWEST else LOWEST
        near = near if near < HIGHEST else HIGHEST
        shifted = np.float32(near * LOG2_E + ROUND)
        power = shifted - ROUND
        r = (near - power * LN2_HIGH) - power * LN2_LOW
        series = ((((C7 * r + C6) * r + C5) * r + C4) * r + C3) * r + C2
        series = series * (r * r) + r + ONE
        bits = np.int32((shifted.view(np.int32) << 23) + 0x3F800000)  # of 2^round(x / ln 2)
        scaled = series * bits.view(np.float32)
        return scaled if x > LOWEST else (x if x != x else ZERO)

    return exp32


# -------------------------------------------------------------------------------------------- sixteen numbers

LANES, ROWS, TILE = 16, 8, 64  # numbers of a vector; rows of a product that stay in registers; nodes of a tile
EXP2 = 0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0


class Lanes(types.Type):
    """16 numbers as one LLVM vector: a local variable of a compiled function."""


FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
lanes = Lanes("lanes")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, FLOATS)


def _define(operation, instruction):
    infer_global(operation)(type("Operation", (ConcreteTemplate,), {"cases": [signature(lanes, lanes, lanes)]}))
    lower_builtin(operation, lanes, lanes)(
        lambda context, builder, sig, sides: getattr(builder, instruction)(*sides, flags=("contract",))
    )


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")


def _constant(value):
    if isinstance(value, float):
        return ir.Constant(FLOATS, [float(np.float32(value))] * LANES)
    return ir.Constant(INTS, [value] * LANES)


def _all(builder, number):
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))


def _at(builder, data, index):
    """A pointer to the vector that begins at data[index]."""
    return _vector(builder, builder.gep(data, [index]), 0, LANES)


@intrinsic
def splat(typing, number):
    """One number in all lanes."""
    return lanes(types.float32), lambda context, builder, sig, args: _all(builder, args[0])


@intrinsic
def load(typing, x, at):
    """x[at : at + 16] of a flat array."""

    def generate(context, builder, sig, args):
        return builder.load(_vector(builder, _data(context, builder, x, *args), 0, LANES), align=4)

    return lanes(x, types.intp), generate


@intrinsic
def store(typing, x, at, value):
    """x[at : at + 16] = value."""

    def generate(context, builder, sig, args):
        builder.store(args[2], _vector(builder, _data(context, builder, x, *args[:2]), 0, LANES), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, lanes), generate


@intrinsic
def higher(typing, a, b):
    """The higher one in each lane."""

    def generate(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return lanes(lanes, lanes), generate


@intrinsic
def keep(typing, value, bits, first, other):
    """Of value the lanes l with bit first + l, else those of other."""

    def generate(context, builder, sig, args):
        bits = builder.trunc(builder.lshr(args[1], args[2]), ir.IntType(LANES))
        return builder.select(builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES)), args[0], args[3])

    return lanes(lanes, types.uint64, types.intp, lanes), generate


@intrinsic
def exp2(typing, x):
    """2^x for x < 128; 0 below -125; nan stays nan."""

    def generate(context, builder, sig, args):
        (x,) = args
        shifted = builder.fadd(x, _constant(float(ROUND)))  # has round(x) in its last bits
        r = builder.fsub(x, builder.fsub(shifted, _constant(float(ROUND))))
        series = _constant(EXP2[0])
        for factor in EXP2[1:]:
            series = _fma(builder, series, r, _constant(factor))
        power = builder.shl(builder.bitcast(shifted, INTS), _constant(23))
        scaled = builder.bitcast(builder.add(builder.bitcast(series, INTS), power), FLOATS)
        return builder.select(builder.fcmp_unordered(">", x, _constant(-125.0)), scaled, _constant(0.0))

    return lanes(lanes), generate


@intrinsic
def total_of(typing, x):
    """The sum over the lanes."""

    def generate(context, builder, sig, args):
        (x,) = args
        for half in (8, 4, 2, 1):
            turned = ir.Constant(INTS, [(lane + half) % LANES for lane in range(LANES)])
            x = builder.fadd(x, builder.shuffle_vector(x, x, turned))
        return builder.extract_element(x, ir.IntType(32)(0))

    return types.float32(lanes), generate


@intrinsic
def turn_block(typing, x, at, step, turned, to):
    """turned[to + 64 c + r] = x[at + step r + c] for r, c < 16."""

    def generate(context, builder, sig, args):
        x_at, to = (_data(context, builder, *pair) for pair in ((x, args[0], args[1]), (turned, args[3], args[4])))
        size = ir.IntType(64)
        rows = [builder.load(_at(builder, x_at, builder.mul(args[2], size(r))), align=4) for r in range(LANES)]
        for bit in (1, 2, 4, 8):  # swap the off-diagonal blocks of size bit
            upper = [lane if not lane & bit else LANES + lane - bit for lane in range(LANES)]
            lower = [lane + bit if not lane & bit else LANES + lane for lane in range(LANES)]
            for r in range(LANES):
                if not r & bit:
                    pair = rows[r], rows[r + bit]
                    rows[r] = builder.shuffle_vector(*pair, ir.Constant(INTS, upper))
                    rows[r + bit] = builder.shuffle_vector(*pair, ir.Constant(INTS, lower))
        for r, row in enumerate(rows):
            builder.store(row, _at(builder, to, size(r * TILE)), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, index, turned, index), generate


@intrinsic(prefer_literal=True)
def multiply(typing, c, c_at, c_step, a, a_at, a_row, a_step, b, b_at, b_step, count, fresh, parts):
    """c[c_at + r c_step + d] (+)= Σ_t a[a_at + r a_row + t a_step] · b[b_at + t b_step + d], r < 8, t < count (> 0).

    d < 16 · parts, a constant; fresh: what c held does not count. All sums are in registers.
    """

    def generate(context, builder, sig, args):
        size, cells = ir.IntType(64), [(r, p) for r in range(ROWS) for p in range(parts.literal_value)]
        to, left, right = (
            _data(context, builder, *pair)
            for pair in ((c, args[0], args[1]), (a, args[3], args[4]), (b, args[7], args[8]))
        )
        lefts = [builder.gep(left, [builder.mul(args[5], size(r))]) for r in range(ROWS)]
        targets = {
            (r, p): _at(builder, to, builder.add(builder.mul(args[2], size(r)), size(p * LANES))) for r, p in cells
        }
        before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("product", "after"))
        builder.branch(loop)
        builder.position_at_end(loop)
        t, a_at, b_at = (builder.phi(size) for _ in range(3))
        sums = [builder.phi(FLOATS) for _ in cells]
        rows = [
            builder.load(_at(builder, right, builder.add(b_at, size(p * LANES))), align=4)
            for p in range(parts.literal_value)
        ]
        numbers = [_all(builder, builder.load(builder.gep(one, [a_at]))) for one in lefts]
        ends = [_fma(builder, numbers[r], rows[p], part) for (r, p), part in zip(cells, sums, strict=True)]
        steps = [(t, size(1)), (a_at, args[6]), (b_at, args[9])]
        for phi, step in steps:
            phi.add_incoming(size(0), before)
            phi.add_incoming(builder.add(phi, step), loop)
        for phi, end in zip(sums, ends, strict=True):
            phi.add_incoming(_constant(0.0), before)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_signed("<", t.incomings[1][0], args[10]), loop, after)
        builder.position_at_end(after)
        for cell, end in zip(cells, ends, strict=True):
            held = builder.select(args[11], _constant(0.0), builder.load(targets[cell], align=4))
            builder.store(builder.fadd(held, end), targets[cell], align=4)
        return context.get_dummy_value()

    index = types.intp
    kinds = (c, index, index, a, index, index, index, b, index, index, index, types.boolean, parts)
    return types.void(*kinds), generate


@intrinsic
def ends(typing, bits):
    """The first bit that is set, and the first after the last one, of a number that is not 0."""

    def generate(context, builder, sig, args):
        first = builder.cttz(args[0], ir.IntType(1)(1))
        after = builder.sub(ir.IntType(64)(64), builder.ctlz(args[0], ir.IntType(1)(1)))
        return context.make_tuple(builder, sig.return_type, [first, after])

    return types.UniTuple(types.intp, 2)(types.uint64), generate
