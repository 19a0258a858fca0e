"""examples/gpt.py: it learns, resumes bit for bit, survives kills and full disks, and tells bad input."""

import csv
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import checkpoints
import gpt
import optimization
import pytest
import reporting
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from attngraph import Causal, Prefix, Window
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

SCRIPT = Path(gpt.__file__)
TEXT = "the quick brown fox jumps over the lazy dog; 'tis no small thing to leap.\n" * 40
TINY = "--layers 2 --heads 2 --width 16 --context 16 --batch 4 --steps 8 --evaluate-every 4 --sample 20 --dtype float32"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(tmp_path, text, *more, name="run"):
    given = [*TINY.split(), "--text", str(text), "--runs", str(tmp_path / "runs"), "--name", name, *map(str, more)]
    return gpt.train(gpt.settings(given)), tmp_path / "runs" / name


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_checkpoints(*folders):
    """Weights and the optimisers' state."""
    for file in ("model.safetensors", "optimizer-8.safetensors"):
        one, other = (load_file(folder / file) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_what_it_promises(tmp_path, text, capsys):
    figures, folder = run(tmp_path, text, "--steps", 40, "--graph", "Causal() & (Window(4, 0) | Prefix(2)), Causal()")
    left = {path.name for path in folder.iterdir()}
    pictures = {"loss.png", "connectivity.png", "attention.png", "heads.png", "see.html"}
    files = {
        "config.json",
        "metrics.csv",
        "model.safetensors",
        "optimizer-40.safetensors",
        "sample.txt",
        "outcome.json",
    }
    assert left == pictures | files
    rows = table(folder)
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert float(rows[-1]["validation_loss"]) == figures["validation_loss"]
    assert figures["validation_loss"] < float(rows[0]["training_loss"]) - 0.2
    assert len((folder / "sample.txt").read_text()) == 21
    assert json.loads((folder / "config.json").read_text())["settings"]["width"] == 16
    out = capsys.readouterr().out
    assert str(text) in out
    assert all(name in out.splitlines()[-1] for name in (str(folder), *left))


def test_a_run_is_a_model_to_go_on_with(tmp_path, text):
    _, folder = run(tmp_path, text, "--graph", "Causal() & Window(4, 0), Causal()")
    model = GPT.load(folder)
    assert model.transformer.graphs == (Causal() & Window(4, 0), Causal())
    tokens = gpt.tokenizer("char", TEXT)
    corpus = gpt.Corpus(tokens.encode(TEXT), 16)
    assert gpt.evaluate(model, corpus, torch.device("cpu")) == float(table(folder)[-1]["validation_loss"])
    assert model(torch.tensor([tokens.encode("the quick")])).shape == (1, 9, len(tokens))


@pytest.mark.parametrize("model", [pytest.param("gpt", marks=pytest.mark.slow), "bigram"])
def test_a_run_may_go_on_for_longer_and_elsewhere(tmp_path, text, model, capsys):
    """More steps, another device; everything else must be as it was, and the error says what was."""
    _, folder = run(tmp_path, text, "--model", model)
    again = ["--runs", str(tmp_path / "runs"), "--name", "run", "--resume"]
    gpt.train(gpt.settings([*again, "--steps", "12", "--device", "cpu"]))
    assert [int(row["step"]) for row in table(folder)] == list(range(1, 13))
    assert json.loads((folder / "config.json").read_text())["settings"]["steps"] == 12
    assert len(list(folder.glob("optimizer-*.safetensors"))) == 1
    for given, message in {
        ("--steps", "11"): "--steps was 12, and a run can only go on for more (got 11)",
        ("--seed", "3"): "--seed was 1337 (got 3)",
        ("--width", "32"): "--width was 16 (got 32)",
    }.items():
        with pytest.raises(SystemExit):
            gpt.settings([*again, *given])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        "--optimizer muon --dropout 0.2 --accumulate 2",
        pytest.param("--optimizer adamw", marks=pytest.mark.slow),
        "--model bigram",
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, text, monkeypatch, more):
    _, whole = run(tmp_path, text, *more.split(), name="whole")

    looks = iter(range(9))
    evaluate = gpt.evaluate

    def interrupted(*arguments):
        if next(looks) == 1:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(gpt, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, text, *more.split(), name="parts")
    monkeypatch.undo()
    resumed = gpt.settings(["--runs", str(tmp_path / "runs"), "--name", "parts", "--resume"])
    assert resumed.steps == 8
    gpt.train(resumed)
    same_checkpoints(whole, tmp_path / "runs" / "parts")
    tables = [table(tmp_path / "runs" / name) for name in ("whole", "parts")]
    for a, b in zip(*tables, strict=True):
        assert {**a, "seconds": ""} == {**b, "seconds": ""}
    assert (whole / "sample.txt").read_text() == (tmp_path / "runs" / "parts" / "sample.txt").read_text()


def checkpoint(tmp_path, text):
    """A finished run's checkpoint and the settings that resume it."""
    _, folder = run(tmp_path, text)
    return folder / "model.safetensors", ["--runs", str(tmp_path / "runs"), "--name", "run", "--resume"]


@pytest.mark.slow
def test_a_truncated_checkpoint_is_an_error(tmp_path, text):
    path, again = checkpoint(tmp_path, text)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="is no whole safetensors file"):
        gpt.train(gpt.settings(again))
    path.write_bytes(b"")
    with pytest.raises(SystemExit, match="is no whole safetensors file"):
        gpt.train(gpt.settings(again))


@pytest.mark.parametrize("save", [pytest.param("torch", marks=pytest.mark.slow), "pickle"])
def test_a_pickle_is_never_loaded(tmp_path, text, save):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path, again = checkpoint(tmp_path, text)
    if save == "torch":
        torch.save({"model": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SystemExit, match="holds a pickle, which could run anything"):
        gpt.train(gpt.settings(again))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_an_error(tmp_path, text):
    path, again = checkpoint(tmp_path, text)
    _, other = run(tmp_path, text, "--width", 32, name="other")
    path.write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(SystemExit, match="is of another model: width was 32, and is 16"):
        gpt.train(gpt.settings(again))


def test_resuming_with_other_settings_is_an_error(tmp_path, text, capsys):
    _, again = checkpoint(tmp_path, text)
    for flag, value, was in (("--width", "64", "16"), ("--seed", "3", "1337"), ("--graph", "Full()", "Causal()")):
        with pytest.raises(SystemExit):
            gpt.settings([*again, flag, value])
        assert f"{flag} was {was} (got {value})" in capsys.readouterr().err
    assert gpt.settings([*again, "--sample", "500", "--width", "16"]).sample == 500
    with pytest.raises(SystemExit):
        gpt.settings([*again[:-1], "--name", "nobody", "--resume"])
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["", "--model bigram", "--tokenizer byte", "--graph Causal()&Prefix(2)"])
def test_a_finished_run_goes_on_from_a_prompt(tmp_path, text, capsys, more):
    """Without training, and with nothing of the run changed; what it says is what the end of a run samples."""
    _, folder = run(tmp_path, text, *more.split())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = ["--runs", str(tmp_path / "runs"), "--name", "run"]
    capsys.readouterr()
    said = gpt.sample(gpt.settings([*again, "--sample", "the lazy "]))
    assert said.startswith("the lazy ")
    assert said in capsys.readouterr().out
    assert len(said.encode()) >= 29  # 20 tokens, as the run sampled
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    gpt.train(gpt.settings([*again, "--resume", "--prompt", "the lazy "]))
    assert (folder / "sample.txt").read_text() == said


def test_a_prompt_needs_a_run_that_is_there(tmp_path, text, capsys):
    run(tmp_path, text)
    again = ["--runs", str(tmp_path / "runs"), "--name"]
    for given, message in {
        ("nobody", "--sample", "the"): "nothing to resume",
        ("run", "--sample", ""): "--prompt must have at least one character",
        ("run", "--sample", "1.5"): "argument --sample: invalid int value: '1.5'",
        ("run", "--sample", "-3"): "--sample must be 0 or more",
        ("run", "--sample", "the", "--width", "32"): "--width was 16 (got 32)",
    }.items():
        with pytest.raises(SystemExit):
            gpt.settings([*again, *given])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"every character of the prompt \(not: \['ß'\]\)"):
        gpt.sample(gpt.settings([*again, "run", "--sample", "ß"]))
    text.write_text(TEXT.replace("fox", "ox"))
    with pytest.raises(SystemExit, match=r"is not the text that the run was trained on"):
        gpt.sample(gpt.settings([*again, "run", "--sample", "the"]))


def test_a_sample_appears_as_it_is_made(capsys):
    """A character of several bytes, when it is whole."""
    shown, tokens = [], gpt.Bytes()

    def made():
        for number in "né→".encode():
            yield torch.tensor([number])
            shown.append(capsys.readouterr().out)

    assert gpt.tell(tokens, torch.tensor([[ord("a")]]), made()) == "ané→"
    assert shown == ["an", "", "é", "", "", "→"]


def test_a_graph_of_distances_needs_a_window_alone():
    assert gpt.goes_by_distance(Causal() & Window(4, 0), 9)
    assert not gpt.goes_by_distance(Causal() & (Window(4, 0) | Prefix(2)), 9)


SAVE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1]); import checkpoints
model = torch.nn.Linear(1000, 1000, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
step = 0
while True:
    step += 1
    torch.nn.init.constant_(model.weight, step)
    optimizer.state[model.weight]["momentum_buffer"] = torch.full((1000, 1000), float(step))
    checkpoints.save_checkpoint(Path(sys.argv[2]), model, [optimizer], step, {"a": 1})
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 4])
def test_a_kill_in_the_middle_of_a_save_leaves_the_last_good_checkpoint(tmp_path, kills):
    chance = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE, str(SCRIPT.parent), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2):
            assert process.stdout.readline()
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        saved = [int(line) for line in process.stdout.read().split()]
        process.wait()
        model = torch.nn.Linear(1000, 1000, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = checkpoints.load_checkpoint(tmp_path, model, [optimizer], {"a": 1})
        assert step >= max([2, *saved])
        assert (model.weight == step).all()
        assert (optimizer.state[model.weight]["momentum_buffer"] == step).all()  # of the very same step


def test_a_save_that_stops_between_its_files_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """The state of the new step is there already, that of the old one still is."""
    settings = TransformerConfig(embed_dim=8, num_layers=1, num_heads=1, position="none")
    model = GPT(settings, 7)
    optimizer = optimizer_of(model)
    for step in (1, 2):
        model(torch.arange(7)[None]).sum().backward()
        optimizer.step()
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        if step == 1:
            checkpoints.save_checkpoint(tmp_path, model, [optimizer], step, {})
            kept = weights

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(tmp_path, model, [optimizer], 2, {})
    monkeypatch.undo()
    assert len(list(tmp_path.glob("optimizer-*"))) == 2
    again = GPT(settings, 7)
    assert checkpoints.load_checkpoint(tmp_path, again, [optimizer_of(again)], {}) == 1
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), kept, strict=True))
    checkpoints.save_checkpoint(tmp_path, model, [optimizer], 2, {})
    assert [path.name for path in tmp_path.glob("optimizer-*")] == ["optimizer-2.safetensors"]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """The kernel refuses to let files grow past a limit, as a full disk does."""
    path = tmp_path / "model.safetensors"
    small = torch.nn.Linear(10, 10)
    checkpoints.save_checkpoint(tmp_path, small, [], 7, {})
    before = path.read_bytes()
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r}); import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save_checkpoint(Path({str(tmp_path)!r}), torch.nn.Linear(1000, 1000), [], 8, {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "what was there before is still whole" in done.stderr
    assert path.read_bytes() == before
    assert checkpoints.load_checkpoint(tmp_path, small, [], {}) == 7
    assert not [entry for entry in tmp_path.iterdir() if "partial" in entry.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"abc\x00def" * 100, "must be text (it holds zero bytes"),
        (b"\xff\xfe\x80abc" * 100, "must be UTF-8 text (byte 0 is not)"),
        (b"short", "the text is too short: a context of 16 needs 17 tokens"),
        (b"a bit longer, no", "the text is too short"),
    ],
)
def test_a_bad_text_is_an_error(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        run(tmp_path, path, "--prompt", "a")
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--graph", "Causal("], "not a graph expression"),
        (["--graph", "Causal(), Full(), Full()"], "one for each of 2 layers (got 3)"),
        (["--graph", "Causal() & Documents([8, 8])"], "must fit any number of nodes"),
        (["--graph", "PerHead([Causal()])"], "graph has 1 heads but the model 2"),
        (["--prompt", "ß"], "every character of the prompt (not: ['ß'])"),
        (["--tokenizer", "nowhere.json"], "--tokenizer must be char, byte or the path"),
        (["--text", "nowhere.txt"], "nowhere.txt can't be read"),
    ],
)
def test_a_bad_choice_is_an_error(tmp_path, text, more, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        run(tmp_path, text, *more)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--steps", "0", "--steps must be 1 or more (got 0)"),
        ("--temperature", "-1", "--temperature must be 0 or more"),
        ("--top-k", "0", "--top-k must be 1 or more"),
        ("--top-p", "0", "a probability above 0"),
        ("--dropout", "1", "a probability below 1"),
        ("--prompt", "", "at least one character"),
        ("--draw-attention", "2", "a layer and a head, as in 2.3"),
        ("--draw-attention", "4.0", "from 0.0 to 3.3"),
        ("--device", "abacus", "auto, cpu, cuda or mps (got abacus)"),
    ],
)
def test_a_bad_number_is_an_error_before_anything_begins(capsys, flag, value, message):
    with pytest.raises(SystemExit):
        gpt.settings([flag, value])
    assert message in capsys.readouterr().err


def test_a_new_run_loses_no_earlier_one(tmp_path, text):
    """Found: the same name overwrote the settings, and --resume went on from another run's weights."""
    _, folder = run(tmp_path, text)
    before = (folder / "model.safetensors").read_bytes()
    run(tmp_path, text, "--steps", 4, "--seed", 7)
    assert (tmp_path / "runs" / "run.1" / "model.safetensors").read_bytes() == before
    (folder / "model.safetensors").write_bytes(before)
    with pytest.raises(SystemExit, match="of another model: seed was 1337, and is 7;"):
        gpt.train(gpt.settings(["--runs", str(tmp_path / "runs"), "--name", "run", "--resume"]))


def test_ctrl_c_saves_where_it_stopped(tmp_path, text, monkeypatch):
    _, whole = run(tmp_path, text, name="whole")
    batch, calls = gpt.Corpus.batch, iter(range(99))

    def interrupting(self, size, seed):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, size, seed)

    monkeypatch.setattr(gpt.Corpus, "batch", interrupting)
    with pytest.raises(SystemExit, match="stopped after step 3; go on with --name parts --resume"):
        run(tmp_path, text, name="parts")
    monkeypatch.undo()
    gpt.train(gpt.settings(["--runs", str(tmp_path / "runs"), "--name", "parts", "--resume"]))
    same_checkpoints(whole, tmp_path / "runs" / "parts")


def test_a_model_that_hears_the_future_is_warned_of(tmp_path, text, capsys):
    run(tmp_path, text, "--graph", "Causal(), Full()", "--steps", 1)
    assert "layer 1 hears the future (node 0 hears node 1)" in capsys.readouterr().out


def test_without_a_text_there_is_shakespeare_or_pythons_manual(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    text, source = gpt.read_text(None)
    assert len(text) > 100_000
    assert "no network" in source
    assert "Python" in source

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"something else"))
    assert "not the known file" in gpt.read_text(None)[1]

    content = b"First Citizen"
    monkeypatch.setattr(gpt, "SHA256", __import__("hashlib").sha256(content).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    assert gpt.read_text(None) == ("First Citizen", "tiny Shakespeare (Karpathy 2015)")
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    assert gpt.read_text(None)[0] == "First Citizen"  # from the cache


def test_tokenizers_decode_what_they_encode(tmp_path, text):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for kind in ("char", "byte", str(tmp_path / "tokenizer.json")):
        tokens = gpt.tokenizer(kind, TEXT)
        numbers = tokens.encode(TEXT)
        assert tokens.decode(numbers) == TEXT
        assert 0 <= min(numbers) <= max(numbers) < len(tokens)
    figures, _ = run(tmp_path, text, "--tokenizer", tmp_path / "tokenizer.json", "--steps", 4)
    assert figures["validation_loss"] > 0


def test_validation_predicts_every_token_once():
    corpus = gpt.Corpus(list(range(1000)), context=16)
    targets = torch.cat([targets.flatten() for _, targets in corpus.validation_batches(size=3)])
    assert targets.tolist() == list(range(901, 1000))
    for inputs, following in corpus.validation_batches(size=3):
        assert torch.equal(inputs + 1, following)
    inputs, following = corpus.batch(5, torch.Generator().manual_seed(3))
    assert torch.equal(inputs + 1, following)
    assert torch.equal(corpus.batch(5, torch.Generator().manual_seed(3))[0], inputs)
    assert inputs.max() < 900


def test_orthogonal_makes_all_singular_values_about_one():
    torch.manual_seed(0)
    for shape in ((3, 8, 8), (2, 20, 6), (2, 6, 20)):
        values = torch.linalg.svdvals(optimization.orthogonal(torch.randn(shape)))
        assert (values > 0.3).all()
        assert (values < 1.3).all()


def test_muon_is_torchs_muon_but_for_its_precision():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 16)) for _ in range(2))
    theirs.data.copy_(ours.data)
    tools = optimization.Muon([ours], lr=0.02, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(24, 16)
        for parameter, tool in zip((ours, theirs), tools, strict=True):
            parameter.grad = gradient.clone()
            tool.step()
    assert (ours - theirs).abs().max() < 0.02 * 3 * 0.05


def test_it_runs_as_a_script(tmp_path, text):
    command = [sys.executable, str(SCRIPT), *TINY.split(), "--text", str(text), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert "validation loss" in done.stdout


# ----------------------------------------------------------------------------------------------------------- damages


def text_damages(content):
    """Of a file of text: cut, emptied, no text, of another kind."""
    yield from (content[: len(content) // 2], b"", b"\xff\xfe\x00", b"[]", b"null", b"7", b'"x"', b"{}", b"a,b\n1,2\n")


def config_damages(path):
    """Each setting removed, or something else in its place."""
    whole = json.loads(path.read_bytes())
    yield from text_damages(path.read_bytes())
    for wrong in (None, 7, "x", [], [1], {}):
        yield json.dumps({**whole, "settings": wrong}).encode()
    for name in whole["settings"]:
        rest = {other: value for other, value in whole["settings"].items() if other != name}
        yield json.dumps({**whole, "settings": rest}).encode()
        for wrong in (None, True, 0, -1, 2.5, float("nan"), 10**30, "x", "", [], ["x"], {"a": 1}):
            yield json.dumps({**whole, "settings": {**rest, name: wrong}}).encode()


def metrics_damages(path):
    whole = path.read_text()
    yield from text_damages(path.read_bytes())
    for old, new in ((",", ";"), ("\r\n", "\n\n,"), ("step", "stop"), ("1,", "x,"), ("1,", ","), (",", "\0")):
        yield whole.replace(old, new).encode()


def checkpoint_damages(path):
    """Its metadata and tensors removed, or others in their place."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    tensors = load_file(path)
    for wrong in (
        {},
        {"step": "x"},
        {"step": ""},
        {"config": "{"},
        {"config": "[]"},
        {"config": "7"},
        {"config": "{}"},
    ):
        kept = {name: value for name, value in metadata.items() if name not in wrong}
        yield save(tensors, {**kept, **wrong} if wrong else {"a": "b"})
    for name, tensor in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != name}
        yield save(rest, metadata)
        yield save({**rest, name: torch.zeros(3, 5)}, metadata)
        yield save({**rest, f"{name}.x": tensor}, metadata)
        yield save({**tensors, f"optimizer.0.{name}": tensor.clone()}, metadata)


@pytest.mark.parametrize(
    ("file", "damages"),
    [
        ("config.json", config_damages),
        ("metrics.csv", metrics_damages),
        ("model.safetensors", checkpoint_damages),
        ("optimizer-2.safetensors", checkpoint_damages),
    ],
)
@pytest.mark.parametrize("share", [25, pytest.param(1, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_a_damaged_run_goes_on_or_is_told(tmp_path, text, capsys, file, damages, share):
    """By a sentence, never by a traceback."""
    _, folder = run(tmp_path, text, "--steps", 2, "--evaluate-every", 1, "--sample", 1)
    whole = shutil.copytree(folder, tmp_path / "whole")
    for number, content in enumerate(list(damages(folder / file))):
        if number % share:
            continue
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        (folder / file).write_bytes(content)
        capsys.readouterr()
        told = None
        try:
            gpt.train(gpt.settings(["--runs", str(tmp_path / "runs"), "--name", "run", "--resume"]))
        except SystemExit as error:
            told = f"{error} {capsys.readouterr().err}"
        assert told is None or len(told) > 20


def test_a_run_is_not_begun_twice(tmp_path, text):
    """Found: the second renamed the folder, into which the first then wrote its weights."""
    _, folder = run(tmp_path, text)
    args = gpt.settings(["--runs", str(tmp_path / "runs"), "--name", "run", "--resume"])
    with checkpoints.only_run(args):
        with pytest.raises(SystemExit, match="a run is going on in"):
            run(tmp_path, text)
        with pytest.raises(SystemExit, match="a run is going on in"):
            gpt.train(args)
    assert not folder.with_name("run.1").exists()
    gpt.train(args)  # afterwards it may go on


def test_where_nothing_can_be_written_nothing_begins(tmp_path, text, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(SystemExit, match=r"can't be written .*choose another --runs"):
        run(tmp_path, text)
    (tmp_path / "runs").unlink()
    mkdir = Path.mkdir

    def refused(path, *args, **options):
        if path.name == "run":
            raise PermissionError(13, "Permission denied")
        return mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(SystemExit, match=r"run can't be written .*choose another --runs or --name"):
        run(tmp_path, text)


def test_any_head_can_be_drawn_also_by_a_run_that_goes_on(tmp_path, text, monkeypatch):
    titles = {}

    def save(figure, path):
        titles[path.name] = [ax.get_title() for ax in figure.axes if ax.get_title()]

    monkeypatch.setattr(reporting, "save_picture", save)
    run(tmp_path, text, "--draw-attention", "1.0")
    assert titles["attention.png"] == ["layer 1, head 0: attention of each token"]
    assert titles["heads.png"] == ["0.0", "0.1", "1.0", "1.1"]
    again = ["--runs", str(tmp_path / "runs"), "--name", "run", "--resume", "--draw-attention", "0.1"]
    gpt.train(gpt.settings(again))
    assert titles["attention.png"] == ["layer 0, head 1: attention of each token"]


def test_a_disk_that_fills_at_the_pictures_leaves_the_weights(tmp_path, text, monkeypatch):
    def full(ax, path):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting.draw, "save", full)
    with pytest.raises(SystemExit, match=r"loss.png can't be written .*No space left"):
        run(tmp_path, text)
    left = sorted(path.name for path in (tmp_path / "runs" / "run").iterdir())
    assert left == ["config.json", "metrics.csv", "model.safetensors", "optimizer-8.safetensors"]
