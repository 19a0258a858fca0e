"""examples/speech.py: spoken numbers, of accents that were never heard."""

import json
import wave

import numpy as np
import pytest
import speech
import torch

from attngraph.models import EncoderDecoder
from attngraph.nn import LogMelSpectrogram


def test_a_vowel_is_loudest_at_its_formants():
    plain = speech.Accent(100.0, 1.0, 3.0, {name: np.ones(3) for name in speech.PHONES})
    found = speech.spoken("IY", plain, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(found * np.hanning(len(found)))) ** 2
    frequency = np.fft.rfftfreq(len(found), 1 / speech.RATE)

    def loud(low, high):
        return power[(frequency >= low) & (frequency < high)].sum()

    first, between, second = loud(150, 450), loud(900, 1700), loud(2000, 2600)
    assert first > 50 * between
    assert second > 10 * between


def test_words_are_where_they_are_said_to_be():
    digits, voices = np.array([[0, 1, 2, 3]] * 4), speech.speakers(range(2), variants=1)
    said = speech.numbers(voices, digits, np.random.default_rng(3))
    assert said.digits.tolist() == [[0, 1, 2, 3]] * 4
    for sound, bounds in zip(said.sound, said.bounds, strict=True):
        inside = torch.zeros(len(sound), dtype=torch.bool)
        for begin, end in bounds.tolist():
            inside[begin:end] = True
        assert sound[inside].square().mean() > 5 * sound[~inside].square().mean()
    again = speech.numbers(voices, digits, np.random.default_rng(3))
    assert all(torch.equal(one, other) for one, other in zip(said, again, strict=True))


def test_what_is_heard_has_no_loudness_of_its_own():
    said = speech.any_numbers(speech.speakers(range(1), variants=1), 2, 4, 0)
    found = speech.heard(said.sound)
    assert found.shape == (2, 32, 4 * speech.ROOM // 128)
    torch.testing.assert_close(found.mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    loud = LogMelSpectrogram(8000, 256, 128, 32)(said.sound)
    torch.testing.assert_close(found - found.amax((1, 2), keepdim=True), loud - loud.amax((1, 2), keepdim=True))


def test_templates_know_the_voice_that_they_are_made_of():
    voices = speech.speakers(range(1), variants=1)
    said = speech.any_numbers(voices, 10, 4, 0)
    assert speech.by_template(voices, said) < 20


@pytest.mark.slow
def test_it_learns_and_leaves_what_it_promises(tmp_path):
    given = ["--runs", str(tmp_path), "--dtype", "float32", "--quick", "--say", "26"]
    found = speech.main(speech.settings(given))
    assert found["figure"] < 60  # by chance 90
    folder = tmp_path / "speech"
    assert json.loads((folder / "outcome.json").read_text())["figure"] == found["figure"]
    left = {"config.json", "metrics.csv", "accuracy.png", "alignment.png", "sound.wav", "model.safetensors"}
    assert left <= {path.name for path in folder.iterdir()}
    with wave.open(str(folder / "sound.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (speech.RATE, 2 * speech.ROOM)
    assert isinstance(EncoderDecoder.load(folder), EncoderDecoder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--say", "12a4"), "--say must be 4 digits, as --digits says (got '12a4')"),
        (("--say", "12345"), "--say must be 4 digits"),
        (("--graph", "Full().sized(3, 3)"), "--graph must fit any number of nodes"),
        (("--accents", "0"), "--accents must be 1 or more"),
    ],
)
def test_bad_settings_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        speech.settings(list(given))
    assert message in capsys.readouterr().err
