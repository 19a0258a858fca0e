"""From scores to weights and back, on flat arrays that lie as (blocks of four edges, heads, 4): loops that LLVM's
vectoriser puts into vector registers, one for each step. See `Modifiers`, whose steps after the bias these are.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators have no types that a checker understands)

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numba import njit
from torch import Tensor

from attngraph.kernels.contract import Modifiers, Normalizer
from attngraph.kernels.cpu.compiler import compiled_with
from attngraph.kernels.cpu.exp import exp, tanh
from attngraph.kernels.cpu.philox import kept_factors
from attngraph.kernels.dropout import keep_factor, threshold

FASTMATH_FLAGS = {"reassoc", "contract", "nsz", "arcp"}  # all that keep inf and nan
# Of numpy's error model, as a division that may raise an error is no vector instruction.
OPTIONS: dict[str, Any] = {"fastmath": FASTMATH_FLAGS, "error_model": "numpy"}
compiled = compiled_with(**OPTIONS)
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)  # for what only compiled functions call

IDENTITY, SOFTCAP, LEAKY_RELU = range(3)
TRANSFORMS = {"softcap": SOFTCAP, "leaky_relu": LEAKY_RELU}
SOFTMAX, SIGMOID, NONE, RELU, SQUARED_RELU = range(5)
NORMALIZERS = {name: number for number, name in enumerate(get_args(Normalizer))}
NO_NUMBERS = np.empty(0, np.int64)


class Weighting(NamedTuple):
    """The steps of `Modifiers` after the bias, in numbers."""

    transform: int
    value: Any  # of the transform
    normalize: int
    drops: bool
    kept: Any  # what weights that are not dropped are multiplied by
    threshold: np.uint64
    seed: np.uint64
    heads: np.ndarray  # int64 (heads · 4 + 4,): the number of each head, four times; some more; of dropout alone
    queries: np.ndarray  # int64 (N,): the number of each query, of dropout alone; (0,): 0, 1, …
    keys: np.ndarray  # int64 (M,), the same


def scalar(x: float, like: Tensor) -> Any:
    """A number of the tensor's dtype."""
    return np.float32(x) if like.dtype == torch.float32 else np.float64(x)


def is_plain(modifiers: Modifiers) -> bool:
    """Whether there is nothing but a softmax after the bias."""
    return modifiers.transform is None and modifiers.normalize == "softmax" and modifiers.dropout is None


def weighting(modifiers: Modifiers, q: Tensor) -> Weighting:
    """For q (B, N, H, D)."""
    transform, dropout, heads = modifiers.transform, modifiers.dropout, NO_NUMBERS
    kind, value = (IDENTITY, 1.0) if transform is None else (TRANSFORMS[transform.kind], transform.value)
    kept, below, seed = 1.0, 0, 0
    if dropout is not None:
        kept, below, seed = keep_factor(dropout.p), threshold(dropout.p), int(dropout.seed.item())
        numbers = torch.arange(q.shape[2]) if dropout.heads is None else dropout.heads
        heads = torch.cat([numbers.repeat_interleave(4), numbers.new_zeros(4)]).numpy()
    nodes = None if dropout is None else dropout.nodes
    return Weighting(
        transform=kind,
        value=scalar(value, q),
        normalize=NORMALIZERS[modifiers.normalize],
        drops=dropout is not None,
        kept=scalar(kept, q),
        threshold=np.uint64(below),
        seed=np.uint64(seed),
        heads=heads,
        queries=NO_NUMBERS if nodes is None else nodes.queries.numpy(),
        keys=NO_NUMBERS if nodes is None else nodes.keys.numpy(),
    )


@compiled
def mask_padding(values, count, heads, masked):
    """`masked` past the last of `count` edges, in its block."""
    for x in range(count, (count + 3) // 4 * 4):
        for h in range(heads):
            values[(x // 4 * heads + h) * 4 + x % 4] = masked


@compiled
def softmax(scores, blocks, row_max, row_sum, lse):
    """Scores to their softmax in place, and its lse (heads,).

    row_max and row_sum are scratch, (heads · 4,): of each fourth edge, then of all.
    """
    lanes, zero, one = len(row_max), row_max.dtype.type(0), row_max.dtype.type(1)
    for y in range(lanes):
        row_max[y], row_sum[y] = -np.inf, zero
    for x in range(blocks):
        for y in range(lanes):
            row_max[y] = scores[x * lanes + y] if scores[x * lanes + y] > row_max[y] else row_max[y]
    for h in range(0, lanes, 4):
        largest = max(max(row_max[h], row_max[h + 1]), max(row_max[h + 2], row_max[h + 3]))
        row_max[h : h + 4] = largest if largest > -np.inf else zero  # a query without edges
    for x in range(blocks):
        for y in range(lanes):
            p = exp(scores[x * lanes + y] - row_max[y])
            scores[x * lanes + y] = p
            row_sum[y] += p
    for h in range(len(lse)):
        denominator = row_sum[4 * h] + row_sum[4 * h + 1] + row_sum[4 * h + 2] + row_sum[4 * h + 3]
        lse[h] = row_max[4 * h] + math.log(denominator) if denominator != zero else -np.inf
        row_sum[4 * h : 4 * h + 4] = one / denominator if denominator != zero else zero
    for x in range(blocks):
        for y in range(lanes):
            scores[x * lanes + y] *= row_sum[y]


@compiled
def softmax_backward(scores, ds, size):
    """Scores less their lse to p, and dp - delta in ds to ds = p (dp - delta), in place."""
    for x in range(size):
        p = exp(scores[x])
        scores[x] = p
        ds[x] *= p


# ------------------------------------------------------------------------- transforms, other normalisers, dropout


@compiled
def transform(scores, slopes, size, kind, value):
    """Scores to their transform, in place, and slopes to its derivative at them."""
    one = scores.dtype.type(1)
    if kind == SOFTCAP:
        for x in range(size):
            t = tanh(scores[x] / value)
            scores[x], slopes[x] = value * t, one - t * t
    elif kind == LEAKY_RELU:
        for x in range(size):
            slope = one if scores[x] > 0 else value
            scores[x], slopes[x] = scores[x] * slope, slope
    else:
        for x in range(size):
            slopes[x] = one


@compiled
def normalize(scores, slopes, size, kind):
    """Scores to their weights by an elementwise normaliser, in place; slopes are multiplied by its derivative."""
    zero, one, two = scores.dtype.type(0), scores.dtype.type(1), scores.dtype.type(2)
    if kind == SIGMOID:
        for x in range(size):
            w = one / (one + exp(-scores[x]))
            scores[x], slopes[x] = w, slopes[x] * w * (one - w)
    elif kind == RELU:
        for x in range(size):
            is_zero = scores[x] <= 0
            scores[x], slopes[x] = zero if is_zero else scores[x], zero if is_zero else slopes[x]
    elif kind == SQUARED_RELU:
        for x in range(size):
            w = zero if scores[x] <= 0 else scores[x]
            scores[x], slopes[x] = w * w, two * w * slopes[x]


@compiled
def softmax_of(scores, minus_lse, size):
    """Scores to their softmax, whose lse is known, in place."""
    for x in range(size):
        scores[x] = exp(scores[x] + minus_lse[x])


@compiled
def drop_block(factors, at, queries, keys, batch, rule):
    """What the weights of four edges are multiplied by, for all heads, from factors[at] on."""
    for y in range(0, len(rule.heads) - 4, 8):
        kept_factors(factors, at + y, rule.kept, queries, keys, batch, rule.heads, y, rule.seed, rule.threshold)


@compiled
def multiply(weights, factors, size):
    """weights *= factors."""
    for x in range(size):
        weights[x] *= factors[x]


@compiled
def weights_backward(weights, ds, minus_delta, slopes, factors, size, is_softmax):
    """Weights w to those that are kept, w · factors, and dp in ds to the gradient ds of the raw scores, in place.

    dw = dp · factors; ds = slopes · dw, of a softmax slopes · w (dw - delta).
    """
    for x in range(size):
        dw = ds[x] * factors[x]
        if is_softmax:
            dw = weights[x] * (dw + minus_delta[x])
        ds[x] = dw * slopes[x]
        weights[x] *= factors[x]
