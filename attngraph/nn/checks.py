"""What is asked of numbers in a tensor, where asking costs nothing: not of a GPU, and not while something traces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from attngraph.arguments import shown


def values_known(tensor: Tensor) -> bool:
    """Whether the tensor's numbers can be had at once: it is on a CPU, and is no stand-in for others.

    Stand-ins are what compilers and exporters see, the batches of `torch.vmap` and of `is_grads_batched`, fake tensors
    and tensors on "meta".
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return False
    is_batch = is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)
    return not is_batch and not is_in_torch_dispatch_mode()


def require_vectors(name: str, nodes: Tensor, dim: int) -> None:
    """Raise unless these are vectors of nodes, or of steps, (…, N, dim)."""
    wanted = f"{name} must be a tensor of floating-point numbers of shape (B, N, {dim})"
    if not isinstance(nodes, Tensor):
        raise TypeError(f"{wanted} (got {shown(nodes)})")
    if not nodes.is_floating_point():
        raise TypeError(f"{wanted} (got {nodes.dtype})")
    if nodes.ndim < 2 or nodes.shape[-1] != dim:
        raise ValueError(f"{wanted} (got shape {tuple(nodes.shape)})")


def require_range(wanted: str, last: int, tensor: Tensor) -> None:
    """Raise ValueError unless all integers of a tensor are from 0 to `last`, where its numbers are known."""
    if values_known(tensor) and tensor.numel():
        low, high = (int(end) for end in tensor.aminmax())
        if low < 0 or high > last:
            raise ValueError(f"{wanted} (got {low} … {high})")
