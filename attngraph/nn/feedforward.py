"""Compute: every node for itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from attngraph.arguments import checked
from attngraph.graph.base import require_ints
from attngraph.nn.dropout import dropout


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021)."""
    positive = relu(x)
    return positive * positive  # not .square(): its gradient calls pow, which costs more than the product


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "squared_relu": squared_relu,
}


class FeedForward(nn.Module):
    """out = W_down · activation(W_up x), or gated: W_down · (activation(W_gate x) ∘ W_up x) (Shazeer 2020).

    >>> FeedForward(64, 256)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    @checked
    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_ints(1, embed_dim=embed_dim, hidden_dim=hidden_dim)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} (got {activation!r})")
        self.activation, self.dropout = ACTIVATIONS[activation], dropout
        self.gate = nn.Linear(embed_dim, hidden_dim, bias=bias) if gated else None
        self.up = nn.Linear(embed_dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) → (..., embed_dim)."""
        hidden = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(dropout(hidden, self.dropout, self.training))

    def extra_repr(self) -> str:
        """What `print(layer)` says of it."""
        return f"dropout={self.dropout}"
