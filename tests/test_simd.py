"""Functions of sixteen numbers at a time are those of torch, as near as float32 or float64 allows."""

# pyright: reportCallIssue=false
# (intrinsics have no types that a checker understands)

import re

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from llvmlite import binding
from numba import njit, types

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


def neon_assembly(function, *arrays):
    """A function of flat arrays as LLVM compiles it for a CPU of 64-bit ARM, whatever this one is."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    try:
        machine = binding.Target.from_triple(triple).create_target_machine(cpu="neoverse-n1", opt=3)
    except RuntimeError:
        pytest.skip("an LLVM without this target")
    compiled = njit(fastmath={"contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    compiled.compile(tuple(types.Array(each, 1, "C") for each in arrays))
    (text,) = compiled.inspect_llvm().values()
    text = re.sub(r'target triple = ".*"', f'target triple = "{triple}"', text)
    text = re.sub(r'target datalayout = ".*"|"target-(cpu|features)"="[^"]*"', "", text)
    text = re.sub(r"(?ms)^define linkonce_odr void @NRT_(in|de)cref.*?^}", "", text)  # in instructions of this CPU
    return machine.emit_assembly(binding.parse_assembly(text))


@pytest.mark.slow
@pytest.mark.parametrize("number", [types.float32, types.float64], ids=str)
def test_a_product_stays_in_the_registers_of_neon(number, monkeypatch):
    def product(c, a, b):
        c, a, b = simd.Matrix(c, 0, 64, 1), simd.Matrix(a, 0, 64, 1), simd.Matrix(b, 0, 64, 1)
        simd.gemm_8_rows(c, a, b, 64, True, simd.vectors_at_once(c.data))

    def counted(bits):
        """Multiplications with addition; vectors that are moved to the stack or back, but for those of the caller."""
        monkeypatch.setattr(simd, "register_bits", lambda context: bits)
        text = neon_assembly(product, number, number, number)
        return len(re.findall(r"\bfmla\b", text)), len(re.findall(r"\b(?:str|stp|ldr|ldp)\s+q.*\[sp", text))

    multiplications, spills = counted(32 * 128)
    assert multiplications >= 64
    assert spills == 0
    assert counted(32 * 512)[1] > 0  # as many rows as AVX-512 holds
