"""bfloat16 and float16 in tiles: as bits in memory, widened in registers on the way into the cache, and back.

Numba has neither: arrays of uint16 hold bfloat16, arrays of int16 float16. Written out as integers (Giesen 2012, Dukhan
2017), as LLVM calls a library for float16 where the CPU has no instruction for it.
Gains, over copies of q, k and v in float32: on Window(256, 0), N = 8192, H = 8, D = 64, bfloat16 takes 0.99 times the
time of float32 instead of 1.26, with the backward pass 0.95 instead of 1.23 (best of 7 runs, one core of a Xeon with
AVX-512).
"""

# pyright: reportCallIssue=false, reportOptionalCall=false
# (numba.extending has no types that a checker understands)

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from attngraph.kernels.cpu.simd import INTS, LANES, Vector, load, pointer, store, vector_pointer

BITS = {torch.bfloat16: np.uint16, torch.float16: np.int16}  # how their arrays are typed
FLOATS, HALVES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(16), LANES)
LARGE, SMALL = 2.0**112, 2.0**-110


def _ints(value: int) -> ir.Constant:
    return ir.Constant(INTS, [value] * LANES)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [value] * LANES)


@intrinsic
def widen(typing, x, at):
    """x[at : at + 16] in float32."""

    def generate(context, builder, sig, args):
        data = vector_pointer(builder, pointer(context, builder, x, args[0], args[1]), 0, LANES)
        bits = builder.zext(builder.load(data, align=2), INTS)
        if x.dtype == types.uint16:
            return builder.bitcast(builder.shl(bits, _ints(16)), FLOATS)
        shifted = builder.shl(builder.and_(bits, _ints(0x7FFF)), _ints(13))
        size = builder.bitcast(builder.fmul(builder.bitcast(shifted, FLOATS), _floats(LARGE)), INTS)
        is_finite = builder.icmp_unsigned("<", shifted, _ints(0x0F800000))
        size = builder.select(is_finite, size, builder.or_(shifted, _ints(0x7F800000)))
        sign = builder.shl(builder.and_(bits, _ints(0x8000)), _ints(16))
        return builder.bitcast(builder.or_(size, sign), FLOATS)

    return Vector(types.float32)(x, types.intp), generate


@intrinsic
def narrow(typing, x, at, value):
    """x[at : at + 16] = value, float32, rounded to the nearest, ties to even; nan stays nan."""

    def generate(context, builder, sig, args):
        array, at, number = args
        bits = builder.bitcast(number, INTS)
        if x.dtype == types.uint16:
            odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
            rounded = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), odd), _ints(16))
            found = builder.select(builder.fcmp_unordered("uno", number, number), _ints(0x7FC0), rounded)
        else:
            size = builder.bitcast(builder.and_(bits, _ints(0x7FFFFFFF)), FLOATS)
            base = builder.fmul(builder.fmul(size, _floats(LARGE)), _floats(SMALL))
            doubled = builder.shl(bits, _ints(1))
            exponent, least = builder.and_(doubled, _ints(0xFF000000)), _ints(0x71000000)
            exponent = builder.select(builder.icmp_unsigned("<", exponent, least), least, exponent)
            shift = builder.bitcast(builder.add(builder.lshr(exponent, _ints(1)), _ints(0x07800000)), FLOATS)
            rounded = builder.bitcast(builder.fadd(shift, base), INTS)
            high = builder.and_(builder.lshr(rounded, _ints(13)), _ints(0x7C00))
            rounded = builder.add(high, builder.and_(rounded, _ints(0x0FFF)))
            is_nan = builder.icmp_unsigned(">", doubled, _ints(0xFF000000))
            sign = builder.and_(builder.lshr(bits, _ints(16)), _ints(0x8000))
            found = builder.or_(sign, builder.select(is_nan, _ints(0x7E00), rounded))
        data = vector_pointer(builder, pointer(context, builder, x, array, at), 0, LANES)
        builder.store(builder.trunc(found, HALVES), data, align=2)
        return context.get_dummy_value()

    return types.void(x, types.intp, Vector(types.float32)), generate


def _is_half(x) -> bool:
    return x.dtype in (types.uint16, types.int16)


def scratch_size(x, size) -> Any:
    """How many numbers `widened` and `sums` need of scratch memory. For compiled functions, as all below."""


def load_wide(x, at) -> Any:
    """x[at : at + 16], in float32 where it is half."""


def widened(x, at, size, scratch) -> Any:
    """x[at : at + size] as (array, where it begins): where it is, or of half precision in the scratch memory."""


def sums(x, at, scratch) -> Any:
    """Where to sum up what is to be x[at : …], in the same way."""


def keep_sums(x, at, size, scratch) -> Any:
    """What stands in `sums`, to x[at : at + size]."""


@overload(scratch_size)
def _scratch_size(x, size):
    return (lambda x, size: size) if _is_half(x) else (lambda x, size: 0)


@overload(load_wide)
def _load_wide(x, at):
    return (lambda x, at: widen(x, at)) if _is_half(x) else (lambda x, at: load(x, at))


@overload(widened)
def _widened(x, at, size, scratch):
    if not _is_half(x):
        return lambda x, at, size, scratch: (x, at)

    def to_scratch(x, at, size, scratch):
        for place in range(0, size, LANES):
            store(scratch, place, widen(x, at + place))
        return scratch, np.int64(0)

    return to_scratch


@overload(sums)
def _sums(x, at, scratch):
    return (lambda x, at, scratch: (scratch, np.int64(0))) if _is_half(x) else (lambda x, at, scratch: (x, at))


@overload(keep_sums)
def _keep_sums(x, at, size, scratch):
    if not _is_half(x):
        return lambda x, at, size, scratch: None

    def from_scratch(x, at, size, scratch):
        for place in range(0, size, LANES):
            narrow(x, at + place, load(scratch, place))

    return from_scratch
