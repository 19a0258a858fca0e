"""Triton's interpreter: what is needed to test kernels on a CPU."""

import os

import numpy as np
import torch


def without_interpreter() -> dict[str, str]:
    """The environment of a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def round_as_hardware(monkeypatch) -> None:
    """Mend bfloat16 in the interpreter, which holds it as bits: products take it as such, and rounding cuts off."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def as_float32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, as_float32(a), as_float32(b), *rest)

    def convert_float(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            numbers = np.ascontiguousarray(x).view(np.float32).reshape(x.shape).copy()
            return torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).view(np.uint16).reshape(x.shape).astype(np.uint32) << 16
        return convert(x, source, target, rounding)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
