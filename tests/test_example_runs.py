"""Runs of the examples that go on: what they keep, and what is told of a text or a run that is another."""

import argparse
import json

import bert
import gpt
import pytest
import reporting
import training
import translate
import vit

TEXT = "the quick brown fox jumps over the lazy dog; 'tis no small thing to leap.\n" * 40
TINY = "--layers 2 --heads 2 --width 16 --context 16 --batch 4 --steps 2 --evaluate-every 2 --sample 5 --dtype float32"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run that names its text relative to where it was begun; and the command line that goes on with it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "mine.txt").write_text(TEXT)
    runs = ["--runs", str(tmp_path / "runs")]
    gpt.train(gpt.settings([*TINY.split(), *runs, "--text", "mine.txt", "--draw-attention", "1.0"]))
    return [*runs, "--resume"]


def test_a_run_keeps_the_head_that_it_draws(begun, monkeypatch):
    titles = {}

    def save(figure, path):
        titles[path.name] = [ax.get_title() for ax in figure.axes if ax.get_title()]

    monkeypatch.setattr(reporting, "save_picture", save)
    gpt.train(gpt.settings(begun))
    assert titles["attention.png"] == ["layer 1, head 0: attention of each token"]
    assert gpt.settings([*begun, "--draw-attention", "0.1"]).draw_attention == "0.1"


def test_a_text_is_found_from_anywhere(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt.train(gpt.settings(begun))
    moved = (tmp_path / "here" / "mine.txt").rename(tmp_path / "moved.txt")
    with pytest.raises(SystemExit, match=rf"^{tmp_path}/here/mine.txt can't be read"):
        gpt.train(gpt.settings(begun))
    gpt.train(gpt.settings([*begun, "--text", "moved.txt"]))
    assert json.loads((tmp_path / "runs/gpt/config.json").read_text())["settings"]["text"] == str(moved)


@pytest.mark.parametrize("change", [TEXT.replace("fox", "ox"), TEXT + "Ω"])
def test_a_text_that_changed_is_named(begun, tmp_path, change):
    (tmp_path / "here" / "mine.txt").write_text(change)
    with pytest.raises(SystemExit, match=r"can't go on: .*/here/mine.txt is not the text .* or changed since; start"):
        gpt.train(gpt.settings(begun))


@pytest.mark.parametrize("example", [bert, vit, translate], ids=lambda each: each.__name__)
def test_a_run_of_another_example_is_told(begun, capsys, example):
    with pytest.raises(SystemExit):
        example.settings([*begun, "--name", "gpt"])
    told = f"is of a run of examples/gpt.py, which resumes it (this is {example.__name__}.py)"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("example", "given", "multiple"),
    [
        (gpt, "--width 36 --heads 4", "2 × --heads"),
        (gpt, "--width 32 --heads 3", "2 × --heads"),
        (bert, "--width 36 --heads 4", "2 × --heads"),
        (vit, "--width 32 --heads 3", "--heads"),
        (translate, "--width 32 --heads 3", "--heads"),
    ],
)
def test_a_width_that_has_no_heads_is_an_error_of_the_command_line(capsys, example, given, multiple):
    with pytest.raises(SystemExit):
        example.settings(given.split())
    assert f"--width must be a multiple of {multiple} (got {given})" in capsys.readouterr().err


def test_a_bigram_has_no_heads():
    assert gpt.settings(["--model", "bigram", "--width", "36"]).width == 36
    assert vit.settings(["--width", "36"]).width == 36


def test_no_other_seed_has_a_batch_of_this_one():
    """A generator keeps 32 bits of its seed; what tests a model is in no batch of any."""
    batches = {
        seed: {training.batch_seed(argparse.Namespace(seed=seed), number) for number in range(20_000)}
        for seed in (-3, 0, 1, 2, 3, 1336, 1337, 1338, 2**31 - 1)
    }
    every = [seed for found in batches.values() for seed in found]
    assert len({*every}) == len(every) == 20_000 * len(batches)
    assert all(0 <= seed < 2**32 for seed in every)
    assert not {training.TEST_SEED, training.TUNING_SEED} & {*every}
