"""Sound as slices of a spectrogram, what a model of speech hears as nodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attngraph.arguments import checked, shown
from attngraph.graph.base import require_ints


class LogMelSpectrogram(nn.Module):
    """How loud a sound is in bands as wide as the ear's, slice by slice; as Whisper hears it (Radford et al. 2022).

    The power of a short-time Fourier transform, in windows of `n_fft` samples every `hop_length`, is weighed by
    `num_mels` triangles whose corners are evenly apart on the mel scale (Slaney 1998: linear up to 1 kHz, then
    logarithmic), each of area 1. Of its logarithm to base 10, what lies more than 8 below the loudest is raised to
    that, and the whole becomes (x + 4) / 4. The defaults are Whisper's.

    >>> LogMelSpectrogram()(torch.randn(2, 16_000)).shape
    torch.Size([2, 80, 100])

    What an `AudioEmbedding` takes. The model has no weights to learn.

    Raises ValueError for bands so narrow that no frequency of the transform lies in one of them.
    """

    @checked
    def __init__(self, sampling_rate: int = 16_000, n_fft: int = 400, hop_length: int = 160, num_mels: int = 80):
        super().__init__()
        require_ints(1, sampling_rate=sampling_rate, n_fft=n_fft, hop_length=hop_length, num_mels=num_mels)
        self.sampling_rate, self.n_fft, self.hop_length, self.num_mels = sampling_rate, n_fft, hop_length, num_mels
        empty = int((_triangles(sampling_rate, n_fft, num_mels).sum(1) == 0).sum())
        if empty:
            raise ValueError(
                f"num_mels must be so few that each band has a frequency of the transform of n_fft={n_fft} samples "
                f"(got {num_mels}, of which {empty} have none): take fewer, or a larger n_fft"
            )

    def forward(self, sound: Tensor) -> Tensor:
        """Samples (B, samples) from -1 to 1 → (B, num_mels, samples // hop_length), computed in float32 or float64."""
        least = max(self.n_fft // 2 + 1, self.hop_length)
        wanted = f"sound must be a tensor of floating-point numbers (B, samples), {least} samples or more"
        if not isinstance(sound, Tensor) or not sound.is_floating_point():
            raise TypeError(f"{wanted} (got {sound.dtype if isinstance(sound, Tensor) else shown(sound)})")
        if sound.ndim != 2 or sound.shape[1] < least:
            raise ValueError(f"{wanted} (got shape {tuple(sound.shape)})")
        exact = sound.to(torch.promote_types(sound.dtype, torch.float32))
        window = torch.hann_window(self.n_fft, dtype=torch.float64).to(exact)
        filters = _triangles(self.sampling_rate, self.n_fft, self.num_mels).to(exact)
        slices = sound.shape[1] // self.hop_length
        if not len(sound):
            return sound.new_zeros(0, self.num_mels, slices)
        waves = torch.stft(exact, self.n_fft, self.hop_length, window=window, return_complex=True)
        loud = (filters @ waves[..., :slices].abs().square()).clamp(min=1e-10).log10()
        return ((loud.maximum(loud.amax((1, 2), keepdim=True) - 8) + 4) / 4).to(sound.dtype)


def _triangles(sampling_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """The weight of each frequency in each band, float64 (num_mels, n_fft // 2 + 1)."""
    exact: dict = {"dtype": torch.float64, "device": "cpu"}  # numbers, also where a model is made without any
    frequency = torch.arange(n_fft // 2 + 1, **exact) * sampling_rate / n_fft
    highest = _mels(torch.tensor(sampling_rate / 2, **exact))
    corners = _hertz(torch.linspace(0, 1, num_mels + 2, **exact) * highest)
    low, center, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequency - low) / (center - low), (high - frequency) / (high - center)
    return torch.minimum(rising, falling).clamp(min=0) * (2 / (high - low))


def _mels(hertz: Tensor) -> Tensor:
    return torch.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * (hertz.clamp(min=1) / 1000).log() / LOG_STEP)


def _hertz(mels: Tensor) -> Tensor:
    return torch.where(mels < 15, 200 * mels / 3, 1000 * ((mels - 15) * LOG_STEP / 27).exp())


LOG_STEP = math.log(6.4)  # 27 mels lead from 1 kHz to 6.4 kHz
