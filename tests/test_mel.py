"""The spectrogram that Whisper hears, as transformers computes it."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from attngraph.nn import AudioEmbedding, LogMelSpectrogram
from attngraph.nn.mel import _triangles


def test_it_is_whispers():
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(480_000) / 16_000
    tone = 0.3 * torch.sin(2 * torch.pi * (200 + 300 * time) * time)
    sound = tone + 0.01 * torch.randn(480_000, generator=generator)
    theirs = WhisperFeatureExtractor()(sound.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(LogMelSpectrogram()(sound[None]), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rate", "n_fft", "mels"), [(16_000, 400, 80), (8_000, 256, 32), (22_050, 1024, 128)])
def test_its_triangles_are_slaneys(rate, n_fft, mels):
    theirs = mel_filter_bank(n_fft // 2 + 1, mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(_triangles(rate, n_fft, mels).numpy(), theirs.T, atol=1e-12)


def test_a_tone_is_loud_in_its_band_alone():
    sound = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 8000)[None]
    found = LogMelSpectrogram(8000, 256, 128, 32)(sound)
    assert found.shape == (1, 32, 62)
    assert AudioEmbedding(32, 16)(found).shape == (1, 31, 16)
    band = found[0].mean(1).argmax()
    assert _triangles(8000, 256, 32)[band, 32] > 0  # bin 32 is 1 kHz


def test_what_is_no_sound_is_told():
    mel = LogMelSpectrogram()
    with pytest.raises(ValueError, match=r"sound must be .*\(B, samples\).*got shape \(16000,\)"):
        mel(torch.zeros(16_000))
    with pytest.raises(ValueError, match=r"201 samples or more .got shape \(1, 200\)"):
        mel(torch.zeros(1, 200))
    with pytest.raises(TypeError, match=r"floating-point.*got torch.int64"):
        mel(torch.zeros(1, 16_000).long())
    with pytest.raises(ValueError, match=r"50000 samples or more .got shape \(1, 16000\)"):
        LogMelSpectrogram(hop_length=50_000)(torch.zeros(1, 16_000))
    with pytest.raises(ValueError, match=r"num_mels must be so few .* n_fft=64 samples .got 80, of which 32 have none"):
        LogMelSpectrogram(n_fft=64)


@pytest.mark.parametrize("n_fft", [400, 401, 511])
def test_there_is_a_slice_for_each_hop(n_fft):
    mel = LogMelSpectrogram(n_fft=n_fft)
    assert mel(torch.zeros(2, 16_000)).shape == (2, 80, 100)
    assert mel(torch.zeros(2, 16_159)).shape == (2, 80, 100)
    assert mel(torch.zeros(0, 16_000)).shape == (0, 80, 100)


def test_an_odd_transform_has_its_own_frequencies():
    sound = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    loudest = [LogMelSpectrogram(n_fft=n_fft, num_mels=40)(sound)[0].mean(1).argmax() for n_fft in (512, 511)]
    assert loudest[0] == loudest[1]
