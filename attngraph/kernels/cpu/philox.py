"""Which weights are dropped, for four edges of two heads at a time: `kernels.dropout` in LLVM vectors.

Sixty-four bits hold each number of 32, so that a product of two fits; above its low half a number may hold anything, as
only low halves are multiplied or compared. What depends on the edges alone leaves the loop over heads.

Gains, over the same arithmetic in a plain Numba loop: 2.4 ns a weight instead of 8.6 (best of 300 runs, one core of a
Xeon with AVX-512, 8 heads).
Runs wherever Numba does.
"""

# pyright: reportCallIssue=false, reportOptionalCall=false
# (numba.extending has no types that a checker understands)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from attngraph.kernels.cpu.simd import pointer, splat, vector_pointer
from attngraph.kernels.dropout import LOW, MULTIPLIER_A, MULTIPLIER_B, ROUNDS, WEYL_A, WEYL_B

LANES = 8
WORD = ir.IntType(64)
WORDS = ir.VectorType(WORD, LANES)


def _all(number):
    return ir.Constant(WORDS, [number] * LANES)


def _twice(builder, four):
    """Four numbers, then the same again."""
    numbers = ir.Constant(WORDS, ir.Undefined)
    for lane in range(LANES):
        number = builder.extract_value(four, lane % 4)
        numbers = builder.insert_element(numbers, number, ir.IntType(32)(lane))
    return numbers


def _product(builder, a, b):
    """Of their low halves."""
    return builder.mul(builder.and_(a, _all(LOW)), b)


def _high(builder, a):
    return builder.lshr(a, _all(32))


def _xor(builder, *numbers):
    result, *others = numbers
    for number in others:
        result = builder.xor(result, number)
    return result


def _word(builder, counter, keys, lane):
    """The word `lane` that Philox4x32-10 gives for each counter, in the low half."""
    (c0, c1, c2, c3), (key_0, key_1) = counter, keys
    for _ in range(ROUNDS - 1):
        product_0, product_2 = _product(builder, c0, _all(MULTIPLIER_A)), _product(builder, c2, _all(MULTIPLIER_B))
        c0, c1 = _xor(builder, _high(builder, product_2), c1, key_0), product_2
        c2, c3 = _xor(builder, _high(builder, product_0), c3, key_1), product_0
        key_0, key_1 = builder.add(key_0, _all(WEYL_A)), builder.add(key_1, _all(WEYL_B))
    # Of the last round, the one product that the word is made of.
    first = builder.icmp_unsigned("<", lane, _all(2))
    factor = builder.select(first, _all(MULTIPLIER_B), _all(MULTIPLIER_A))
    product = _product(builder, builder.select(first, c2, c0), factor)
    mixed = builder.select(first, _xor(builder, c1, key_0), _xor(builder, c3, key_1))
    is_low = builder.icmp_unsigned("==", builder.and_(lane, _all(1)), _all(1))
    return builder.select(is_low, product, _xor(builder, _high(builder, product), mixed))


@intrinsic
def kept_factors(typing, factors, at, kept, queries, keys, batch, heads, first_head, seed, threshold):
    """factors[at + l] = kept where the weight of lane l < 8 is kept, else 0.

    Lane l is the edge l % 4, of `queries` and `keys` (tuples of four), and the head heads[first_head + l].
    """

    def generate(context, builder, sig, args):
        queries, keys = _twice(builder, args[3]), _twice(builder, args[4])
        batch, seed, threshold = splat(builder, args[5], LANES), args[8], splat(builder, args[9], LANES)
        heads_at = vector_pointer(builder, pointer(context, builder, sig.args[6], *args[6:8]), 0, LANES)
        head = builder.load(heads_at, align=8)
        sixteenth = builder.lshr(keys, _all(4))
        row = builder.shl(builder.lshr(keys, _all(6)), _all(4))
        counter = builder.or_(row, builder.and_(keys, _all(15))), queries, batch, head
        key_0, key_1 = splat(builder, seed, LANES), splat(builder, builder.lshr(seed, WORD(32)), LANES)
        word = _word(builder, counter, (key_0, key_1), builder.and_(sixteenth, _all(3)))
        is_kept = builder.icmp_unsigned(">=", builder.and_(word, _all(LOW)), threshold)
        kept = splat(builder, args[2], LANES)
        target = vector_pointer(builder, pointer(context, builder, sig.args[0], *args[:2]), 0, LANES)
        chosen = builder.select(is_kept, kept, ir.Constant(kept.type, None))
        builder.store(chosen, target, align=factors.dtype.bitwidth // 8)
        return context.get_dummy_value()

    four, index = types.UniTuple(types.int64, 4), types.intp
    args = (factors, index, factors.dtype, four, four, index, heads, index, types.uint64, types.uint64)
    return types.void(*args), generate
