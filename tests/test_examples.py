"""The examples beside gpt.py: each learns, leaves what it promises, resumes, and tells bad input."""

import csv
import json
import random
import re
import runpy
import shutil
import sys
import tarfile
from datetime import date
from pathlib import Path

import bert
import mlp_is_attention
import nodes
import pytest
import speculative
import torch
import training
import translate
import vit
from safetensors.torch import load_file
from torch import nn

from attngraph import Causal, Full, from_dense
from attngraph.models import GPT, EncoderDecoder, ViT

EXAMPLES = Path(vit.__file__).parent


def run(module, folder, *given):
    arguments = ["--runs", str(folder), "--dtype", "float32", "--warmup", "2", *map(str, given)]
    return module.train(module.settings(arguments))


def left(folder):
    """The files of a run, but for the optimisers' state, of which there is one."""
    (state,) = folder.glob("optimizer-*.safetensors")
    return {path.name for path in folder.iterdir()} - {state.name}


def scores(folder, name):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


COMMON = {"config.json", "metrics.csv", "model.safetensors", "accuracy.png", "connectivity.png", "heads.png"} | {
    "outcome.json"
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "pool"),
    [
        ("Neighborhood((4, 4), 1)", "cls"),
        ("ShiftedWindows((4, 4), (2, 2), (0, 0)), Full()", "mean"),
        ("Axial((4, 4))", "cls"),
    ],
)
def test_vit_learns_digits_on_any_graph(tmp_path, graph, pool):
    found = run(
        vit, tmp_path, "--graph", graph, "--pool", pool, "--layers", 2, "--steps", 60, "--evaluate-every", 30,
        "--distort", 0.3,
    )  # fmt: skip
    assert found["test_accuracy"] > 50
    assert found["test_accuracy"] == scores(tmp_path / "vit", "test_accuracy")[-1]
    assert left(tmp_path / "vit") == COMMON | ({"attention.png"} if pool == "cls" else set())
    assert json.loads((tmp_path / "vit" / "config.json").read_text())["edges"] == found["edges"]
    again = ViT.load(tmp_path / "vit")
    assert (
        sum(each.num_edges(*[again.num_patches + (pool == "cls")] * 2) for each in again.transformer.graphs)
        == found["edges"]
    )


def test_vit_resumes_bit_for_bit(tmp_path, monkeypatch):
    tiny = ("--layers", 1, "--width", 16, "--batch", 8, "--steps", 8, "--evaluate-every", 4)
    run(vit, tmp_path / "whole", *tiny)
    save, saved = training.save_checkpoint, []

    def first(*arguments):
        save(*arguments)
        saved.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", first)
    with pytest.raises(KeyboardInterrupt):
        run(vit, tmp_path / "parts", *tiny)
    monkeypatch.undo()
    vit.train(vit.settings(["--runs", str(tmp_path / "parts"), "--resume"]))
    for file in ("model.safetensors", "optimizer-8.safetensors"):
        whole, parts = (load_file(tmp_path / name / "vit" / file) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--patch", "3"], "image_size must be a multiple of patch_size"),
        (["--graph", "Neighborhood((5, 5), 1)"], "--graph must fit 16 nodes"),
        (["--graph", "Full(), Full(), Full()"], "one for each of 4 layers (got 3)"),
        (["--data", "mnist", "--folder", "nowhere"], "put it into nowhere"),
    ],
)
def test_vit_tells_bad_settings(tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(vit, "MNIST", "file:///no/such/place/")
    with pytest.raises(SystemExit) as raised:
        run(vit, tmp_path, *given)
    assert message in str(raised.value)


def test_vit_reads_cifars_own_file(tmp_path):
    rows = torch.randint(0, 256, (4, 3073), dtype=torch.uint8)
    rows[:, 0] = torch.tensor([3, 1, 4, 1])
    inside = tmp_path / "cifar-10-batches-bin"
    inside.mkdir()
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        (inside / name).write_bytes(rows.numpy().tobytes())
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(inside, inside.name)
    images, classes, test_images, _ = vit.cifar10(tmp_path)
    assert images.shape == (20, 3, 32, 32)
    assert classes[:4].tolist() == [3, 1, 4, 1]
    torch.testing.assert_close(test_images[2, 1, 0, 5], rows[2, 1 + 1024 + 5] / 255)


@pytest.mark.slow
def test_bert_differs_from_gpt_in_its_graph(tmp_path, capsys):
    """And hearing both sides it fills in better: of pairs like Qq the first can be told from the second alone."""
    path, chance = tmp_path / "text.txt", random.Random(0)
    path.write_text("".join(letter.upper() + letter for letter in chance.choices("abcdefgh", k=4000)))
    small = ["--width", "32", "--layers", "2", "--context", "32", "--steps", "300", "--evaluate-every", "150"]
    given = ["--runs", str(tmp_path), "--dtype", "float32", "--text", str(path), "--batch", "16", *small]
    found = bert.main(bert.settings(given))
    assert found["validation_accuracy"] > found["against"] + 8
    assert left(tmp_path / "bert") == COMMON | {"attention.png", "filled.txt", "see.html"}
    assert left(tmp_path / "bert") - {"outcome.json"} == left(tmp_path / "bert-against")
    settings = [
        json.loads((tmp_path / name / "config.json").read_text())["settings"] for name in ("bert", "bert-against")
    ]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"graph"}
    assert "points more often than Causal()" in capsys.readouterr().out


def test_bert_resumes_both_models_or_begins_the_second(tmp_path):
    """Found: it wrote a setting that its own command line did not know."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    small = ["--width", "8", "--layers", "1", "--heads", "1", "--context", "8", "--batch", "2", "--evaluate-every", "2"]
    runs = ["--runs", str(tmp_path)]
    bert.main(bert.settings([*runs, "--dtype", "float32", "--text", str(path), *small, "--steps", "2"]))
    shutil.rmtree(tmp_path / "bert-against")
    for steps in (4, 6):
        bert.main(bert.settings([*runs, "--resume", "--steps", str(steps)]))
    for name in ("bert", "bert-against"):
        assert len(scores(tmp_path / name, "training_loss")) == 6
        assert GPT.load(tmp_path / name).transformer.graphs == ((Full() if name == "bert" else Causal()),)


def test_dates_are_written_in_ways_that_can_be_read_in_one(tmp_path):
    """No two days of some years are ever written alike, and what is tested is never trained on."""
    known, unseen = translate.all_days()
    assert len(set(known) | set(unseen)) == (translate.LAST - translate.FIRST).days + 1
    assert not set(known) & set(unseen)
    meaning = {}
    for year in (1900, 1999, 2012):
        for month in range(1, 13):
            for day in (1, 2, 10, 12, 28):
                for language, patterns in translate.FORMATS.items():
                    for pattern in patterns:
                        when = date(year, month, day)
                        text = translate.format_date(when, pattern, locale=language)
                        assert meaning.setdefault(text, when) == when, text
                        translate.SOURCE.encode([text, text.lower(), text.upper()])


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A model that has learned for half a minute."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [
        "--runs",
        str(folder),
        "--dtype",
        "float32",
        "--steps",
        "250",
        "--batch",
        "64",
        "--evaluate-every",
        "250",
    ]
    figures = translate.train(translate.settings(arguments))
    return EncoderDecoder.load(folder / "translate"), figures, folder / "translate"


def test_translate_leaves_pictures_and_translations(tmp_path, monkeypatch):
    monkeypatch.setattr(translate, "HELD_OUT", 50)
    tiny = ("--layers", 1, "--width", 16, "--batch", 8, "--steps", 8, "--evaluate-every", 4)
    found = run(translate, tmp_path, *tiny, "--translate", "3. März 1987", "--graph", "Window(2, 2)")
    assert found["exact_match"] == scores(tmp_path / "translate", "exact_match")[-1]
    assert left(tmp_path / "translate") == COMMON | {"alignment.png", "samples.txt"}
    lines = (tmp_path / "translate" / "samples.txt").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("3. März 1987")
    losses = scores(tmp_path / "translate", "training_loss")
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_translate_learns_and_leaves_pictures(translator):
    model, figures, folder = translator
    assert figures["exact_match"] > 80
    assert left(folder) == COMMON | {"alignment.png", "samples.txt"}
    best = translate.beam_search(model, "3. März 1987", 4, torch.device("cpu"))
    assert best[0][0] == translate.greedy(model, ["3. März 1987"], torch.device("cpu"))[0] == "1987-03-03"
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert len({result for result, _ in best}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "day", "month", "year"),
    [
        ("Dienstag, den 3. März 1987", "3", "März", "1987"),
        ("October 27, 2054", "27", "October", "2054"),
        ("the 14 of JULY, 1925", "14", "JULY", "1925"),
        ("12/25/2031", "25", "12", "2031"),
    ],
)
def test_the_alignment_points_at_day_month_and_year(translator, text, day, month, year):
    """Of the weight on the three while a part of the answer is written, most is on that part."""
    recorded, result = translate.attention(translator[0], text, torch.device("cpu"))
    weights = translate.alignment(recorded)
    assert torch.allclose(weights.sum(1), torch.ones(10), atol=1e-5)
    spans = {part: range(text.index(part), text.index(part) + len(part)) for part in (year, month, day)}
    by_part = {part: weights[:, list(span)].sum(1) for part, span in spans.items()}
    for part, rows in ((year, slice(2, 4)), (month, slice(5, 7)), (day, slice(8, 10))):
        total = {other: float(along[rows].sum()) for other, along in by_part.items()}
        assert max(total, key=total.get) == part, (text, result, total)


def test_any_mlp_is_attention():
    torch.manual_seed(0)
    for mlp in (
        nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4)),
        nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
    ):
        assert max(mlp_is_attention.largest_difference(mlp.double(), torch.randn(11, 5).double())) < 1e-12
    with pytest.raises(ValueError, match="Linear, activation, Linear"):
        mlp_is_attention.as_attention(nn.Sequential(nn.Linear(5, 5)), torch.ones(1, 5))
    mlp = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    x, pruned = torch.randn(11, 5).double(), torch.rand(11, 9) < 0.5
    expected = (mlp[:2](x) * ~pruned) @ mlp[2].weight.T + mlp[2].bias
    torch.testing.assert_close(mlp_is_attention.as_attention(mlp, x, from_dense(~pruned)), expected)


@pytest.mark.parametrize("source", [[], pytest.param(["--pyg"], marks=pytest.mark.slow)], ids=["networkx", "pyg"])
def test_custom_learns_on_a_graph_of_ones_own(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["custom.py", *source])
    runpy.run_path(str(EXAMPLES / "custom.py"))
    *_, last, _, _, left_in = capsys.readouterr().out.strip().splitlines()
    assert left_in == "in runs/custom: karate.png, outcome.json"
    assert int(last.split("%")[0].split()[-1]) >= 65
    assert (tmp_path / "runs" / "custom" / "karate.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("layer", nodes.LAYERS)
def test_a_model_of_pyg_tells_the_same_nodes_when_it_is_accelerated(tmp_path, capsys, layer):
    small = "--nodes 300 --degree 20 --classes 3 --width 32 --heads 2 --seeds 1 --noise 1 --epochs 30"
    found = nodes.main(nodes.settings([*small.split(), "--layer", layer, "--out", str(tmp_path)]))
    (pyg,), (ours,) = found.values()
    assert ours.accuracy == pytest.approx(pyg.accuracy, abs=3)
    assert ours.accuracy > 60
    assert (tmp_path / "nodes.png").exists()
    told = capsys.readouterr().out
    assert f"first: {layer}\nlast: {layer}" in told
    assert "times as fast" in told


def test_speculation_gives_the_same_text_in_fewer_passes(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(speculative.REPETITIVE * 40)
    tiny = f"--steps 60 --evaluate-every 60 --context 32 --layers 2 --width 32 --text {text} --dtype float32"
    arguments = ["--runs", str(tmp_path), "--options", tiny, "--sample", "60", "--repeats", "1"]
    found = speculative.main(speculative.settings(arguments))
    alone, lookup, small = found.values()
    assert torch.equal(alone.tokens, lookup.tokens)
    assert torch.equal(alone.tokens, small.tokens)
    assert alone.passes == 60
    assert lookup.passes < 30
    assert small.passes < 60
    assert (tmp_path / "gpt-draft" / "tree.png").exists()
    assert capsys.readouterr().out.count("the same text") == 3


PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_it_is_for(name, tmp_path, monkeypatch, capsys):
    """Its purpose and examples, every default, graphs and where they are documented; and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.count(f"python examples/{name}.py") >= 1
    assert not list(tmp_path.iterdir())
    if name in ("gpt", "bert", "vit", "translate"):
        assert "docs/graphs.md" in shown
        assert "(default: None)" not in shown
        options = shown.split("\noptions:")[1].split("\ngraphs:")[0]
        for option in re.split(r"\n  (?=-)", options)[1:]:
            assert len(re.sub(r"--?[\w-]+|[A-Z_]{2,}|\{.*?\}|\(default.*", "", option, flags=re.S).split()) >= 2, option
