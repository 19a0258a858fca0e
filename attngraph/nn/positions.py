"""How a node knows where it is: added to its vector, turned into its queries and keys, or a bias along each edge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attngraph.arguments import checked
from attngraph.bias import Alibi, RelativeBias
from attngraph.nn.embedding import TokenEmbedding
from attngraph.nn.rope import Rope


class LearnedPositions(TokenEmbedding):
    """A learned vector for each position (Gehring et al. 2017; GPT, BERT, ViT).

    Positions (..., N) → (..., N, embed_dim). Raises, on a CPU, ValueError for positions outside of 0 … max_length - 1.
    """

    @checked
    def __init__(self, max_length: int, embed_dim: int):
        super().__init__(max_length, embed_dim, "positions")

    def reset_parameters(self) -> None:
        """N(0, 0.02²)."""
        nn.init.normal_(self.weight, std=0.02)


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines of geometric wavelengths (Vaswani et al. 2017, section 3.5).

    P[p, 2i] = sin(p / base^(2i/d)) and P[p, 2i+1] = cos of the same.
    """

    @checked
    def __init__(self, embed_dim: int, base: float = 10000.0):
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"sinusoidal positions need an even embed_dim (got {embed_dim})")
        self.embed_dim, self.base = embed_dim, base

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """positions (..., N) → (..., N, embed_dim), computed in `dtype`."""
        exponent = torch.arange(0, self.embed_dim, 2, device=positions.device).float() / self.embed_dim
        angles = positions[..., None] * (self.base**-exponent).to(dtype)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class Rotary(nn.Module):
    """Queries and keys turned by angles that grow with the position (RoPE, Su et al. 2021): q_i·k_j depends on i - j.

    The two halves of a head form the pairs that are turned ("rotate half", as Llama does). `scaling` is None, or a
    mapping as checkpoints have it, by which longer texts are read than were trained on: {"rope_type": kind, …} of kind
    "linear" (factor), "dynamic" (factor, original_max_position_embeddings), "yarn", "longrope" or "llama3". Where they
    depend on how long a text is ("dynamic", "longrope"), each row of a batch has its own length, and of a pack the
    longest of its documents counts.
    """

    @checked
    def __init__(self, head_dim: int, base: float = 10000.0, scaling: Mapping[str, Any] | None = None):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim (got {head_dim})")
        self.rope = Rope(head_dim, base, scaling)

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """positions (N,) or (B, N) → cos, sin: (N, head_dim) or (B, 1, N, head_dim), as `rotate` takes them.

        They are computed in `dtype`, from frequencies in float32.
        """
        length = positions.new_zeros(1)
        if self.rope.kind in Rope.BY_LENGTH and positions.shape[-1]:  # a memory's positions are below 0
            first, last = positions.amin(-1, keepdim=True), positions.amax(-1, keepdim=True)
            length = last + 1 - first.clamp(max=0)
        angles = positions[..., None] * self.rope.frequencies(length).to(dtype)
        if positions.ndim == 2:
            angles = angles[:, None]  # the same for every head
        cos, sin = angles.cos() * self.rope.amplitude, angles.sin() * self.rope.amplitude
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[d], x[d + D/2]) of (..., N, D) by its angle: cos (N, D) twice, sin (N, D) as -sin and sin."""
    dim = x.shape[-1]
    if not dim == cos.shape[-1] == sin.shape[-1]:
        raise ValueError(
            f"rotate needs cos and sin of the dimension of x, {dim}, as Rotary gives them "
            f"(got {cos.shape[-1]} and {sin.shape[-1]})"
        )
    if cos.dtype != x.dtype:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


class AlibiPositions(nn.Module):
    """A penalty that grows with the distance, with the fixed slopes of Press et al. 2022."""

    @checked
    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Alibi:
        """The bias, for `attend`."""
        return Alibi(Alibi.geometric(self.num_heads, device).slopes.to(dtype))


class RelativePositions(nn.Module):
    """A learned bias for each head and bucket of relative positions (see `RelativeBias`)."""

    @checked
    def __init__(self, num_heads: int, num_buckets: int, max_distance: int | None = None, bidirectional: bool = True):
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, num_buckets))
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.reset_parameters()
        self.forward()  # an impossible choice is an error here

    def reset_parameters(self) -> None:
        """No preference."""
        nn.init.zeros_(self.table)

    def forward(self) -> RelativeBias:
        """The bias, for `attend`."""
        return RelativeBias(self.table, self.max_distance, self.bidirectional)
