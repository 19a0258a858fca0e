"""Kernels of PyTorch's own operators: right on every device."""
