"""Functions of sixteen numbers at a time are those of torch, as near as float32 or float64 allows."""

# pyright: reportCallIssue=false
# (intrinsics have no types that a checker understands)

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from numba import njit

from attngraph.kernels.cpu import half, simd


def applied(function):
    @njit
    def run(x, result):
        for y in range(0, len(x), simd.LANES):
            simd.store(result, y, function(simd.load(x, y)))

    def over(x):
        result = np.empty_like(x.numpy())
        run(x.numpy(), result)
        return torch.from_numpy(result)

    return over


# Of e^-80, the rounding of 80 · log2 e is all but the whole error.
@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    ("tanh", torch.float32, 1e-6), ("sigmoid", torch.float32, 5e-6),
    ("tanh", torch.float64, 1e-15), ("sigmoid", torch.float64, 1e-14),
])  # fmt: skip
def test_relative_errors_are_small_near_zero_and_far_from_it(name, dtype, tolerance):
    sizes = torch.logspace(-30, 1.9, 4096, dtype=torch.float64)
    x = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, torch.inf, -torch.inf] * 4)]).to(dtype)
    expected = getattr(torch, name)(x.double())
    found = applied(getattr(simd, name))(x).double()
    shown = expected.abs() > 1e-37  # below, float32 has fewer digits
    torch.testing.assert_close(found[shown], expected[shown], rtol=tolerance, atol=0)
    assert (found[~shown].abs() < 2e-37).all()
    assert applied(getattr(simd, name))(torch.full((16,), torch.nan, dtype=dtype)).isnan().all()


@pytest.mark.parametrize(("dtype", "least", "tolerance"), [(torch.float32, -100, 3e-7), (torch.float64, -900, 5e-16)])
def test_numbers_too_small_to_count_are_zero(dtype, least, tolerance):
    x = torch.linspace(2 * least, 0, 4096, dtype=dtype)
    expected = torch.exp2(x.double()).where(x > least, 0)
    torch.testing.assert_close(applied(simd.exp2)(x).double(), expected, rtol=tolerance, atol=0)


@njit
def widen_all(x, out):
    for at in range(0, len(x), simd.LANES):
        simd.store(out, at, half.widen(x, at))


@njit
def narrow_all(x, out):
    for at in range(0, len(x), simd.LANES):
        half.narrow(out, at, simd.load(x, at))


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
def test_every_number_of_half_precision_is_widened_as_by_torch(dtype):
    bits = torch.arange(2**16).to(torch.int16)
    found = torch.empty(2**16)
    widen_all(bits.numpy().view(half.BITS[dtype]), found.numpy())
    torch.testing.assert_close(found, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@HALVES
def test_numbers_are_narrowed_as_by_torch(dtype):
    chance = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=chance).int()
    every = torch.arange(2**16).to(torch.int16).view(dtype).float()
    ties = (every.view(torch.int32) + (1 << (15 if dtype == torch.bfloat16 else 12))).view(torch.float32)
    some = torch.randn(2**16, generator=chance) * torch.logspace(-12, 6, 2**16)
    numbers = torch.cat([bits.view(torch.float32), every, ties, some])
    found = torch.empty(len(numbers), dtype=torch.int16)
    narrow_all(numbers.numpy(), found.numpy().view(half.BITS[dtype]))
    torch.testing.assert_close(found.view(dtype), numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
