"""gpt.py --preset gpt2: nanoGPT's model and settings, and a step that several processes share."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import gpt
import pytest
import torch
from safetensors.torch import load_file

TEXT = "the quick brown fox jumps over the lazy dog; 'tis no small thing to leap.\n" * 40
TINY = "--layers 2 --heads 2 --width 16 --context 16 --batch 2 --dtype float32 --optimizer adamw --warmup 1 --sample 5"


def test_the_preset_is_gpt2_of_124_million_parameters():
    args = gpt.settings(["--preset", "gpt2"])
    with torch.device("meta"):
        model = gpt.build(args, 50_257)
    assert model.vocab_size == 50_304
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters - model.transformer.position.weight.numel() == 123_587_328  # as nanoGPT counts its own
    assert args.batch * args.accumulate * args.context == 491_520
    assert gpt.settings(["--preset", "gpt2", "--layers", "2"]).layers == 2


def losses(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["training_loss"]) for row in csv.DictReader(file)]


def test_the_first_loss_is_that_of_equal_chances_but_for_the_spread_of_logits(tmp_path):
    """Tied vectors of N(0, 0.02²) make logits of N(0, 0.02² · width): half of that above ln V."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    given = ["--preset", "gpt2", *TINY.split(), "--width", "64", "--steps", "6", "--accumulate", "1"]
    gpt.train(gpt.settings([*given, "--text", str(path), "--tokenizer", "byte", "--runs", str(tmp_path / "runs")]))
    first, *_, last = losses(tmp_path / "runs" / "gpt")
    assert first == pytest.approx(math.log(256) + 0.02**2 * 64 / 2, abs=0.1)
    assert last < first


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batches(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    given = [*TINY.split(), "--accumulate", "4", "--text", str(path), "--runs", str(tmp_path), "--evaluate-every", "2"]
    script = Path(gpt.__file__)
    environment = {**os.environ, "PYTHONPATH": f"{script.parents[1]}:{script.parent}", "OMP_NUM_THREADS": "1"}

    def together(*more):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        done = subprocess.run([*start, *given, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("validation loss [") == 1

    gpt.train(gpt.settings([*given, "--name", "one", "--steps", "4"]))
    together("--name", "two", "--steps", "4")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-4)
    together("--name", "two", "--steps", "6", "--resume")
    assert len(losses(tmp_path / "two")) == 6


def test_passes_are_shared_evenly(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        gpt.settings(["--accumulate", "4"])
    assert "--accumulate must be a multiple of the 3 processes (got 4)" in capsys.readouterr().err
