"""Kernels in machine code by Numba, for a CPU."""
