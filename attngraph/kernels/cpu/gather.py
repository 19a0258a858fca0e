"""Products with the vectors of four neighbours at a time: what the rows kernels use.

A node's vector is loaded whole, as LLVM vectors of a constant length (by llvmlite, through Numba's `intrinsic`): the
loop vectoriser, given such short loops, unrolls them or vectorises another one. Four edges share the loads of the node,
and the work of summing across lanes.

Gains, over the same loops in plain Numba: an edge, its score and its share in the sum, takes 2.7 ns instead of 18 with
16 dimensions, 6.4 ns instead of 26 with 64 (best of 200 runs, one core of a Xeon with AVX-512, float32, one head).
Runs wherever Numba does, on every CPU that LLVM knows; without Numba there is no rows backend on a CPU, and plans put
such edges into tiles.
"""

# pyright: reportCallIssue=false, reportOptionalCall=false
# (numba.extending has no types that a checker understands)

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from attngraph.kernels.cpu.simd import SIZE, fma, pointer, register_bits, shuffle, splat, vector_pointer

CACHE_LINE = 64  # bytes
BYTES, INT = ir.IntType(8).as_pointer(), ir.IntType(32)


class Vector(NamedTuple):
    """A vector within a flat array: data[offset], data[offset + 1], …"""

    data: Any
    offset: int


class Neighbors(NamedTuple):
    """The vectors of four nodes within a flat array: that of neighbour t begins at nodes[t] · stride + offset."""

    data: Any
    nodes: Any  # a tuple of four
    stride: int
    offset: int


class Rows(NamedTuple):
    """The rows of a matrix within a flat array: row c begins at c · stride + offset."""

    data: Any
    stride: int
    offset: int


def _vector(context, builder, kind, vector):
    """A pointer to the first number of a `Vector`."""
    array, offset = builder.extract_value(vector, 0), builder.extract_value(vector, 1)
    return pointer(context, builder, kind.types[0], array, offset)


def _neighbors(context, builder, kind, neighbors):
    """Pointers to the first numbers of four `Neighbors`."""
    array, nodes, stride, offset = (builder.extract_value(neighbors, place) for place in range(4))
    firsts = [builder.mul(builder.extract_value(nodes, t), stride) for t in range(4)]
    return [pointer(context, builder, kind.types[0], array, builder.add(first, offset)) for first in firsts]


def _rows(context, builder, kind, rows):
    """A pointer to the first number of `Rows`, and their stride."""
    array, stride, offset = (builder.extract_value(rows, place) for place in range(3))
    return pointer(context, builder, kind.types[0], array, offset), stride


def _parts(dtype, width):
    """(first, lanes) of the vectors that `width` numbers consist of; each is at most a cache line."""
    line = 512 // dtype.bitwidth
    return [(first, min(line, width.literal_value - first)) for first in range(0, width.literal_value, line)]


def _add_pairs(builder, a, b):
    """The sums of each two neighbouring lanes, of a and then of b."""
    lanes = range(0, 2 * a.type.count, 2)
    return builder.fadd(shuffle(builder, a, b, lanes), shuffle(builder, a, b, [lane + 1 for lane in lanes]))


@intrinsic(prefer_literal=True)
def prefetch(typing, neighbors, width):
    """Ask for neighbors[t, :width], t < 4, ahead of their use; width is a constant."""
    dtype = neighbors.types[0].dtype

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [BYTES, INT, INT, INT])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        for row in _neighbors(context, builder, neighbors, args[0]):
            for first, _ in _parts(dtype, width):
                line = builder.bitcast(builder.gep(row, [SIZE(first)]), BYTES)
                builder.call(ask, [line, INT(0), INT(3), INT(1)])  # to read, into the nearest cache, of data
        return context.get_dummy_value()

    return types.void(neighbors, width), generate


def _add_dots(builder, dtype, target, scale, data):
    """target[t] += scale · Σ_d x[d] · y_t[d], t < 4, d < width, summed over data: ([x, y_0, …, y_3], width)."""
    data = [(sides, first, part) for sides, width in data for first, part in _parts(dtype, width)]
    align, lanes = dtype.bitwidth // 8, max([4, *(1 << (part - 1).bit_length() for *_, part in data)])
    sums = [ir.Constant(ir.VectorType(target.type.pointee, lanes), None)] * 4
    for rows, first, part in data:
        sides = [builder.load(vector_pointer(builder, side, first, part), align=align) for side in rows]
        if part < lanes:
            zero, widen = ir.Constant(sides[0].type, None), [min(lane, part) for lane in range(lanes)]
            sides = [shuffle(builder, side, zero, widen) for side in sides]
        sums = [fma(builder, sides[0], side, part_sum) for side, part_sum in zip(sides[1:], sums, strict=True)]
    total = _add_pairs(builder, _add_pairs(builder, *sums[:2]), _add_pairs(builder, *sums[2:]))
    while total.type.count > 4:
        evens = range(0, total.type.count, 2)
        halves = [shuffle(builder, total, total, [lane + odd for lane in evens]) for odd in (0, 1)]
        total = builder.fadd(*halves)
    four, factor = vector_pointer(builder, target, 0, 4), splat(builder, scale, 4)
    builder.store(fma(builder, factor, total, builder.load(four, align=align)), four, align=align)


@intrinsic(prefer_literal=True)
def gather_dot(typing, scores, at, scale, x, neighbors, width):
    """scores[at + t] += scale · Σ_d x[d] · neighbors[t, d], t < 4, d < width.

    x is a `Vector`, neighbors are `Neighbors`; scores are flat, width is a constant.
    """
    dtype = x.types[0].dtype

    def generate(context, builder, signature, args):
        rows = [_vector(context, builder, x, args[3]), *_neighbors(context, builder, neighbors, args[4])]
        _add_dots(builder, dtype, pointer(context, builder, scores, *args[:2]), args[2], [(rows, width)])
        return context.get_dummy_value()

    return types.void(scores, types.intp, dtype, x, neighbors, width), generate


@intrinsic(prefer_literal=True)
def gather_dots(typing, scores, at, scale, x, neighbors, width, x_e, edges, width_e):
    """The same, of [x ‖ x_e] and [neighbors ‖ edges], whose parts lie apart."""
    dtype = x.types[0].dtype

    def generate(context, builder, signature, args):
        rows = [_vector(context, builder, x, args[3]), *_neighbors(context, builder, neighbors, args[4])]
        more = [_vector(context, builder, x_e, args[6]), *_neighbors(context, builder, edges, args[7])]
        target = pointer(context, builder, scores, *args[:2])
        _add_dots(builder, dtype, target, args[2], [(rows, width), (more, width_e)])
        return context.get_dummy_value()

    return types.void(scores, types.intp, dtype, x, neighbors, width, x_e, edges, width_e), generate


@intrinsic(prefer_literal=True)
def gather_add(typing, acc, weights, neighbors, width):
    """acc[d] += Σ_t weights[t] · neighbors[t, d], t < 4, d < width.

    acc is a `Vector`, neighbors are `Neighbors`; weights are a `Vector`, or `Neighbors`, of which weights[t, 0] counts.
    width is a constant.
    """
    dtype = neighbors.types[0].dtype

    def generate(context, builder, signature, args):
        target = _vector(context, builder, acc, args[0])
        if weights.instance_class is Neighbors:
            places = _neighbors(context, builder, weights, args[1])
        else:
            first_weight = _vector(context, builder, weights, args[1])
            places = [builder.gep(first_weight, [SIZE(t)]) for t in range(4)]
        factors = [builder.load(place) for place in places]
        rows = _neighbors(context, builder, neighbors, args[2])
        align = dtype.bitwidth // 8
        for first, part in _parts(dtype, width):
            sums = builder.load(vector_pointer(builder, target, first, part), align=align)
            for factor, row in zip(factors, rows, strict=True):
                vector = builder.load(vector_pointer(builder, row, first, part), align=align)
                sums = fma(builder, splat(builder, factor, part), vector, sums)
            builder.store(sums, vector_pointer(builder, target, first, part), align=align)
        return context.get_dummy_value()

    return types.void(acc, weights, neighbors, width), generate


def _add_to_rows(builder, dtype, rows, width, terms):
    """rows[t][d] += Σ factors[t] · x[d], t < 4, one after the other, d < width, over terms: (factors, x)."""
    align = dtype.bitwidth // 8
    for first, part in _parts(dtype, width):
        sides = [builder.load(vector_pointer(builder, x, first, part), align=align) for _, x in terms]
        for t, row in enumerate(rows):
            target = vector_pointer(builder, row, first, part)
            total = builder.load(target, align=align)
            for (factors, _), side in zip(terms, sides, strict=True):
                total = fma(builder, splat(builder, factors[t], part), side, total)
            builder.store(total, target, align=align)


def _factors(context, builder, weights, value, scale=None):
    """Four numbers of a `Vector`, times the scale."""
    first = _vector(context, builder, weights, value)
    numbers = [builder.load(builder.gep(first, [SIZE(t)])) for t in range(4)]
    return numbers if scale is None else [builder.fmul(scale, number) for number in numbers]


@intrinsic(prefer_literal=True)
def scatter_add(typing, neighbors, scale, weights, x, width):
    """neighbors[t, d] += scale · weights[t] · x[d], t < 4, one after the other, d < width.

    neighbors are `Neighbors`, weights and x are a `Vector`; width is a constant.
    """
    dtype = x.types[0].dtype

    def generate(context, builder, signature, args):
        rows = _neighbors(context, builder, neighbors, args[0])
        factors, vector = _factors(context, builder, weights, args[2], args[1]), _vector(context, builder, x, args[3])
        _add_to_rows(builder, dtype, rows, width, [(factors, vector)])
        return context.get_dummy_value()

    return types.void(neighbors, dtype, weights, x, width), generate


@intrinsic(prefer_literal=True)
def scatter_adds(typing, neighbors, scale, weights, x, others, y, width):
    """neighbors[t, d] += scale · weights[t] · x[d] + others[t] · y[d], as above."""
    dtype = x.types[0].dtype

    def generate(context, builder, signature, args):
        rows = _neighbors(context, builder, neighbors, args[0])
        first = _factors(context, builder, weights, args[2], args[1]), _vector(context, builder, x, args[3])
        second = _factors(context, builder, others, args[4]), _vector(context, builder, y, args[5])
        _add_to_rows(builder, dtype, rows, width, [first, second])
        return context.get_dummy_value()

    return types.void(neighbors, dtype, weights, x, others, y, width), generate


@intrinsic(prefer_literal=True)
def add_map(typing, y, x, matrix, rows, columns):
    """y[f] += Σ_d x[d] · matrix[d, f], d < rows, f < columns, both constants; all three are a `Vector`."""
    dtype = y.types[0].dtype

    def generate(context, builder, signature, args):
        kinds = zip((y, x, matrix), args[:3], strict=True)
        target, vector, first_row = (_vector(context, builder, kind, side) for kind, side in kinds)
        align, width = dtype.bitwidth // 8, columns.literal_value
        for first, part in _parts(dtype, columns):
            zero = ir.Constant(ir.VectorType(target.type.pointee, part), None)
            # Four sums, none of which waits for another.
            sums = [builder.load(vector_pointer(builder, target, first, part), align=align), zero, zero, zero]
            for d in range(rows.literal_value):
                factor = splat(builder, builder.load(builder.gep(vector, [SIZE(d)])), part)
                row = builder.load(vector_pointer(builder, first_row, d * width + first, part), align=align)
                sums[d % 4] = fma(builder, factor, row, sums[d % 4])
            total = builder.fadd(builder.fadd(*sums[:2]), builder.fadd(*sums[2:]))
            builder.store(total, vector_pointer(builder, target, first, part), align=align)
        return context.get_dummy_value()

    return types.void(y, x, matrix, rows, columns), generate


@intrinsic(prefer_literal=True)
def gather_sum(typing, sums, at, x, neighbors, width):
    """sums[at + t · width + d] = x[d] + neighbors[t, d], t < 4, d < width.

    x is a `Vector`, neighbors are `Neighbors`; sums are flat, width is a constant.
    """
    dtype = neighbors.types[0].dtype

    def generate(context, builder, signature, args):
        target, vector = pointer(context, builder, sums, *args[:2]), _vector(context, builder, x, args[2])
        align = dtype.bitwidth // 8
        for t, row in enumerate(_neighbors(context, builder, neighbors, args[3])):
            for first, part in _parts(dtype, width):
                sides = [
                    builder.load(vector_pointer(builder, side, first, part), align=align) for side in (vector, row)
                ]
                at = vector_pointer(builder, target, t * width.literal_value + first, part)
                builder.store(builder.fadd(*sides), at, align=align)
        return context.get_dummy_value()

    return types.void(sums, types.intp, x, neighbors, width), generate


def _in_registers(context, dtype, width):
    """`_parts`, as many at a time as four sums of each of them take half of the registers."""
    parts, at_once = _parts(dtype, width), max(1, register_bits(context) // 2 // (4 * 8 * CACHE_LINE))
    return [parts[first : first + at_once] for first in range(0, len(parts), at_once)]


@intrinsic(prefer_literal=True)
def gather_product(typing, sums, at, x, rows, count, width):
    """sums[at + t · width + d] += Σ_c x[t, c] · rows[c, d], t < 4, c < count, d < width.

    x are `Neighbors`, rows are `Rows`; sums are flat, width is a constant.
    """
    dtype = x.types[0].dtype

    def generate(context, builder, signature, args):
        count = args[4]
        target = pointer(context, builder, sums, *args[:2])
        targets = [builder.gep(target, [SIZE(t * width.literal_value)]) for t in range(4)]
        firsts, (row, row_stride) = _neighbors(context, builder, x, args[2]), _rows(context, builder, rows, args[3])
        align = dtype.bitwidth // 8
        for parts in _in_registers(context, dtype, width):
            places = [[vector_pointer(builder, first, *part) for part in parts] for first in targets]
            totals = [
                [cgutils.alloca_once_value(builder, builder.load(place, align=align)) for place in of_edge]
                for of_edge in places
            ]
            with cgutils.for_range(builder, count) as loop:
                own = builder.gep(row, [builder.mul(loop.index, row_stride)])
                vectors = [builder.load(vector_pointer(builder, own, *part), align=align) for part in parts]
                for first, of_edge in zip(firsts, totals, strict=True):
                    factor = builder.load(builder.gep(first, [loop.index]))
                    for vector, total, (_, lanes) in zip(vectors, of_edge, parts, strict=True):
                        found = fma(builder, splat(builder, factor, lanes), vector, builder.load(total))
                        builder.store(found, total)
            for of_edge, found in zip(places, totals, strict=True):
                for place, total in zip(of_edge, found, strict=True):
                    builder.store(builder.load(total), place, align=align)
        return context.get_dummy_value()

    return types.void(sums, types.intp, x, rows, types.intp, width), generate


@intrinsic(prefer_literal=True)
def gather_outer(typing, rows, x, weights, neighbors, count, width):
    """rows[c, d] += Σ_t x[t, c] · weights[t] · neighbors[t, d], t < 4, c < count, d < width.

    rows are `Rows`, x and neighbors `Neighbors`, weights a `Vector`; width is a constant.
    """
    dtype = neighbors.types[0].dtype

    def generate(context, builder, signature, args):
        row, row_stride = _rows(context, builder, rows, args[0])
        firsts, sides = _neighbors(context, builder, x, args[1]), _neighbors(context, builder, neighbors, args[3])
        factors, count, align = _factors(context, builder, weights, args[2]), args[4], dtype.bitwidth // 8
        for parts in _in_registers(context, dtype, width):
            scaled = []
            for factor, side in zip(factors, sides, strict=True):
                vectors = [builder.load(vector_pointer(builder, side, *part), align=align) for part in parts]
                scaled.append([builder.fmul(splat(builder, factor, v.type.count), v) for v in vectors])
            with cgutils.for_range(builder, count) as loop:
                own = builder.gep(row, [builder.mul(loop.index, row_stride)])
                places = [vector_pointer(builder, own, *part) for part in parts]
                totals = [builder.load(place, align=align) for place in places]
                for first, of_edge in zip(firsts, scaled, strict=True):
                    factor = builder.load(builder.gep(first, [loop.index]))
                    totals = [
                        fma(builder, splat(builder, factor, vector.type.count), vector, total)
                        for vector, total in zip(of_edge, totals, strict=True)
                    ]
                for place, total in zip(places, totals, strict=True):
                    builder.store(total, place, align=align)
        return context.get_dummy_value()

    return types.void(rows, x, weights, neighbors, types.intp, width), generate


@intrinsic
def transpose_4x4(typing, x, at, x_t, to, stride):
    """x_t[to + stride · c + r] = x[at + 4 r + c] for r, c < 4; both flat."""

    def generate(context, builder, signature, args):
        source, target = pointer(context, builder, x, *args[:2]), pointer(context, builder, x_t, *args[2:4])
        align = x.dtype.bitwidth // 8
        rows = builder.load(vector_pointer(builder, source, 0, 16), align=align)
        for c in range(4):
            place = builder.gep(target, [builder.mul(args[4], SIZE(c))])
            column = shuffle(builder, rows, rows, range(c, 16, 4))
            builder.store(column, vector_pointer(builder, place, 0, 4), align=align)
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, x_t, index, index), generate
