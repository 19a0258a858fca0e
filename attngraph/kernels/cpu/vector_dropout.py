"""Dropout of vectors. Forward and backward passes make the same random numbers of a seed: no mask is stored.

They come from Philox4x32-10 (`kernels.dropout`), 16 bits for each number of x, which is dropped where these are below a
threshold. A block of 512 numbers has 64 counters; its bits are those of word 0 of all of them, then of 1, 2 and 3.

Gains, over torch's `random_` and five operations on what it draws: 0.4 ns a number instead of 1.8 or more, where a
product takes 0.3; the random numbers alone take 0.2 (one core of a Xeon with AVX-512, 10⁶ numbers in float32).
With AVX2 it takes 0.5. The loops are plain, as LLVM's vectoriser has products of 32 bits by itself.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (Numba's decorators have no types that a checker understands)

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attngraph.kernels import dropout as constants
from attngraph.kernels.cpu.openmp import parallel_for
from attngraph.kernels.cpu.weights import compiled, scalar
from attngraph.kernels.memory import DTYPES, empty

BITS = 16
COUNTERS = 64
BLOCK = COUNTERS * 128 // BITS
JOBS_PER_THREAD, LEAST_BLOCKS = 4, 64  # of a job: they take some ten microseconds, the call of a compiled function one

LOW, HIGH = np.uint64(constants.LOW), np.uint64(32)
MULTIPLIER_A, MULTIPLIER_B = np.uint64(constants.MULTIPLIER_A), np.uint64(constants.MULTIPLIER_B)
WEYL_A, WEYL_B = np.uint64(constants.WEYL_A), np.uint64(constants.WEYL_B)
ROUNDS = constants.ROUNDS


@compiled
def philox(words, first, seed):
    """The four words of the counters (c mod 2³², c / 2³², 0, 0) from c = first on: (4, COUNTERS)."""
    for lane in range(COUNTERS):
        counter = np.uint64(first + lane)
        c0, c1, c2, c3 = counter & LOW, counter >> HIGH, np.uint64(0), np.uint64(0)
        key_0, key_1 = seed & LOW, seed >> HIGH
        for _ in range(ROUNDS):
            product_0, product_2 = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
            c0, c1 = product_2 >> HIGH ^ c1 ^ key_0, product_2 & LOW
            c2, c3 = product_0 >> HIGH ^ c3 ^ key_1, product_0 & LOW
            key_0, key_1 = (key_0 + WEYL_A) & LOW, (key_1 + WEYL_B) & LOW
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = c0, c1, c2, c3


@compiled
def drop(x, out, seed, first_block, threshold, factor):
    """out = x · factor where x is kept, else x · 0; the first of both is that of block number `first_block`."""
    words, zero = np.empty((4, COUNTERS), np.uint32), x.dtype.type(0)
    bits = words.reshape(-1).view(np.uint16)
    for at in range(0, len(x), BLOCK):
        philox(words, (first_block + at // BLOCK) * COUNTERS, seed)
        source, target = x[at : at + BLOCK], out[at : at + BLOCK]  # in slices LLVM sees that no index is negative
        for place in range(len(source)):
            target[place] = source[place] * (factor if bits[place] >= threshold else zero)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where x is kept, else 0, 0 < p < 1: of any shape, in float64, float32, bfloat16 or float16.

    p is taken to a multiple of 2^-16 below 1, here and in what x is divided by.
    """
    x = x.detach().resolve_neg().contiguous()
    threshold = min(round(p * 2**BITS), 2**BITS - 1)
    factor = 2**BITS / (2**BITS - threshold)
    if x.dtype in DTYPES:
        out = empty(*x.shape, like=x)
        _drop(x.view(-1).numpy(), out.view(-1).numpy(), threshold, scalar(factor, x), seed)
        return out
    out = torch.empty_like(x)
    source, target = (half.view(-1).view(torch.int16).numpy() for half in (x, out))  # Numba has no bfloat16
    _drop(source, target, threshold, np.int16(1), seed)
    return out.mul_(factor)


def _drop(x: np.ndarray, out: np.ndarray, threshold: int, factor: np.number, seed: int) -> None:
    """By all threads; which numbers are kept is the same by any number of them."""
    num_jobs = JOBS_PER_THREAD * torch.get_num_threads()
    blocks = max(LEAST_BLOCKS, -(-len(x) // (num_jobs * BLOCK)))
    size = blocks * BLOCK

    def run(job: int) -> None:
        part = slice(job * size, (job + 1) * size)
        drop(x[part], out[part], np.uint64(seed), job * blocks, np.uint16(threshold), factor)

    parallel_for(-(-len(x) // size), run)
