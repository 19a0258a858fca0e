"""What enters a model becomes vectors: tokens, patches of images, frames of sound."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from attngraph.arguments import checked, shown
from attngraph.graph.base import require_ints
from attngraph.nn.checks import require_range


class TokenEmbedding(nn.Embedding):
    """A vector for each token, or whatever else is numbered; `what` names it in errors.

    Raises TypeError for tokens that are not integers, and on a CPU ValueError for numbers outside of the vocabulary (a
    GPU would have to stop and wait for the answer; it fails by itself).
    """

    @checked
    def __init__(self, num_embeddings: int, embed_dim: int, what: str = "tokens"):
        require_ints(1, **{f"number of {what}": num_embeddings})
        super().__init__(num_embeddings, embed_dim)
        self.what = what

    def forward(self, input: Tensor) -> Tensor:
        """Integers (..., N) → (..., N, embed_dim)."""
        dtype = input.dtype if isinstance(input, Tensor) else type(input).__name__
        if not isinstance(input, Tensor) or input.is_floating_point() or input.dtype == torch.bool:
            raise TypeError(f"{self.what} must be a tensor of integers (got {dtype})")
        last = self.num_embeddings - 1
        require_range(f"{self.what} must be from 0 to {last}: the model has no others", last, input)
        return super().forward(input if input.dtype in (torch.int32, torch.int64) else input.long())


class PatchEmbedding(nn.Module):
    """An image cut into patches, each mapped linearly to a vector (Dosovitskiy et al. 2021).

    >>> PatchEmbedding((8, 8), (2, 2), channels=1, embed_dim=64)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 16, 64])
    """

    @checked
    def __init__(self, image_size: tuple[int, int], patch_size: tuple[int, int], channels: int, embed_dim: int):
        super().__init__()
        require_ints(1, height=image_size[0], width=image_size[1], channels=channels)
        require_ints(1, patch_height=patch_size[0], patch_width=patch_size[1])
        if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
            raise ValueError(f"image_size must be a multiple of patch_size (got {image_size} and {patch_size})")
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
        self.project = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) → (B, patches, embed_dim), row by row."""
        wanted = (self.channels, *self.image_size)
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (got {shown(images)})")
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(f"images must have shape (B, {', '.join(map(str, wanted))}) (got {tuple(images.shape)})")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point numbers (got {images.dtype})")
        return self.project(images).flatten(2).transpose(1, 2)


class AudioEmbedding(nn.Module):
    """Frames of a spectrogram, two convolutions, every second one kept (Whisper, Radford et al. 2022)."""

    @checked
    def __init__(self, channels: int, embed_dim: int):
        super().__init__()
        self.first = nn.Conv1d(channels, embed_dim, kernel_size=3, padding=1)
        self.second = nn.Conv1d(embed_dim, embed_dim, kernel_size=3, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, frames) → (B, frames / 2, embed_dim)."""
        channels = self.first.in_channels
        if not isinstance(features, Tensor):
            raise TypeError(f"features must be a tensor (got {shown(features)})")
        if features.ndim != 3 or features.shape[1] != channels:
            raise ValueError(f"features must have shape (B, {channels}, frames) (got {tuple(features.shape)})")
        if not features.is_floating_point():
            raise TypeError(f"features must be floating-point numbers (got {features.dtype})")
        return gelu(self.second(gelu(self.first(features)))).transpose(1, 2)
