"""What the Triton kernels do to scores after scale and bias: transforms, normalisers, dropout.

Scores are exponents of 2, s · log2 e, so that softmax needs no more than exp2; slopes are derivatives by s itself.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# Triton compiles the functions under @triton.jit: what Python takes for a constexpr is a `Config`, a number or a block.

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attngraph.kernels.dropout import keep_factor, threshold
from attngraph.kernels.triton.common import LN_2, LOG2_E, in_two

if TYPE_CHECKING:
    from attngraph.kernels.contract import Dropout, Modifiers

NO_TRANSFORM, SOFTCAP, LEAKY_RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TRANSFORMS = {"softcap": SOFTCAP.value, "leaky_relu": LEAKY_RELU.value}
SOFTMAX, SIGMOID, NO_NORMALIZER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RELU, SQUARED_RELU = tl.constexpr(3), tl.constexpr(4)
NORMALIZERS = {
    "softmax": SOFTMAX.value,
    "sigmoid": SIGMOID.value,
    "none": NO_NORMALIZER.value,
    "relu": RELU.value,
    "squared_relu": SQUARED_RELU.value,
}


class DropoutPtrs(NamedTuple):
    """Which weights are dropped, as kernels take it; see `kernels.dropout`."""

    seed: Tensor  # int64 ()
    heads: Tensor | None  # int64 (H,)
    threshold: int
    keep_factor: tuple[float, float]  # two float32 whose sum it is


# ------------------------------------------------------------------------------------------------- in kernels


@triton.jit
def tanh(x):
    """The hyperbolic tangent, of which the interpreter knows none: 1 - 2 / (1 + e²ˣ), near 0 its series."""
    value = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
    if x.dtype == tl.float32:  # where the difference keeps too few digits for a softcap far above its scores
        y = x * x
        near = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        value = tl.where(y < 0.0625, near, value)
    return value


@triton.jit
def leaky_relu(x, negative_slope: tl.constexpr):
    """Leaky ReLU, and its slope."""
    slope = tl.where(x > 0, tl.full(x.shape, 1.0, x.dtype), tl.full(x.shape, negative_slope, x.dtype))
    return x * slope, slope


@triton.jit
def transformed(score, config: tl.constexpr):
    """f(s) of scores s, and the slope f'(s)."""
    if config.TRANSFORM == SOFTCAP:
        t = tanh(score * (LN_2 / config.TRANSFORM_VALUE))
        score, slope = t * (LOG2_E * config.TRANSFORM_VALUE), 1.0 - t * t
    elif config.TRANSFORM == LEAKY_RELU:
        score, slope = leaky_relu(score, config.TRANSFORM_VALUE)
    else:
        slope = 1.0
    return score, slope


@triton.jit
def weights_and_slopes(score, mask, config: tl.constexpr, IS_MASKED: tl.constexpr):
    """w(s) of a normaliser other than softmax, and the slope w'(s); both 0 where the mask is not."""
    if config.NORMALIZE == SIGMOID:
        weight = 1.0 / (1.0 + tl.exp2(-score))
        slope = weight * (1.0 - weight)
    elif config.NORMALIZE == NO_NORMALIZER:
        weight = score * LN_2
        slope = tl.full(score.shape, 1.0, score.dtype)
    else:
        weight = tl.where(score <= 0, 0.0, score * LN_2)
        slope = tl.where(score > 0, 1.0, 0.0).to(score.dtype)
        if config.NORMALIZE == SQUARED_RELU:
            slope = 2.0 * weight
            weight = weight * weight
    if IS_MASKED:
        return tl.where(mask, weight, 0.0), tl.where(mask, slope, 0.0)
    return weight, slope


@triton.jit
def head_numbers(dropout, head, mask):
    """The numbers that heads, where the mask is, have among those of the call."""
    if dropout.heads is not None:
        head = tl.load(dropout.heads + head, mask=mask)
    return head


@triton.jit
def _are_kept(dropout, batch, head, query, counter):
    """Of each counter's four words, which are at least the threshold; blocks of numbers that broadcast."""
    counter, query = counter.to(tl.uint32), query.to(tl.uint32)
    seed = tl.load(dropout.seed)
    word_0, word_1, word_2, word_3 = tl.philox(seed, counter, query, batch.to(tl.uint32), head.to(tl.uint32))
    limit = dropout.threshold
    return word_0 >= limit, word_1 >= limit, word_2 >= limit, word_3 >= limit


@triton.jit
def kept_pairs(dropout, batch, head, query, key):
    """Which weights are kept; blocks of numbers that broadcast; the heads are numbered as in the call."""
    kept_0, kept_1, kept_2, kept_3 = _are_kept(dropout, batch, head, query, key // 64 * 16 + key % 16)
    word = key // 16 % 4
    return tl.where(word < 2, tl.where(word == 0, kept_0, kept_1), tl.where(word == 2, kept_2, kept_3))


@triton.jit
def kept_block(dropout, batch, head, queries, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same of one of the heads at hand, BLOCK_M queries and BLOCK_N adjacent keys, from a multiple of 32 on.

    (BLOCK_M, BLOCK_N). Sixteen counters serve 64 keys; of a block of 32 they serve one half.
    """
    COUNTERS: tl.constexpr = max(64, BLOCK_N) // 4  # pyright: ignore[reportAssignmentType]
    counter = first_key // 64 * 16 + tl.arange(0, COUNTERS)
    head = head_numbers(dropout, head, None)
    kept_0, kept_1, kept_2, kept_3 = _are_kept(dropout, batch, head, queries[:, None], counter[None, :])
    if BLOCK_N == 32:
        is_second = first_key % 64 != 0
        kept = tl.join(tl.where(is_second, kept_2, kept_0), tl.where(is_second, kept_3, kept_1))
        kept = tl.permute(kept, (0, 2, 1))
    else:
        kept = tl.join(tl.join(kept_0, kept_2), tl.join(kept_1, kept_3))  # the last dimensions count the words
        kept = tl.permute(tl.reshape(kept, [BLOCK_M, COUNTERS // 16, 16, 4]), (0, 1, 3, 2))
    return tl.reshape(kept, [BLOCK_M, BLOCK_N])


# -------------------------------------------------------------------------------------------------- on the host


def dropout_ptrs(dropout: Dropout | None) -> DropoutPtrs | None:
    """Which weights are dropped, as kernels take it."""
    if dropout is None:
        return None
    return DropoutPtrs(dropout.seed, dropout.heads, threshold(dropout.p), in_two(keep_factor(dropout.p)))


def compiled_kinds(modifiers: Modifiers) -> tuple[int, float, int, bool]:
    """TRANSFORM, TRANSFORM_VALUE, NORMALIZE and DROPOUT, for which kernels are compiled."""
    kind, value = modifiers.transform or (None, 0.0)
    transform = NO_TRANSFORM.value if kind is None else TRANSFORMS[kind]
    return transform, value, NORMALIZERS[modifiers.normalize], modifiers.dropout is not None
