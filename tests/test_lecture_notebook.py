"""examples/notebook.py: what earlier chunks said is known where notes are heard, and not where they are not."""

import json

import notebook
import pytest
import torch

from attngraph import Causal, parse


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the quick form returns, and where it was run."""
    runs = tmp_path_factory.mktemp("runs")
    return notebook.main(notebook.settings(["--quick", "--runs", str(runs)])), runs


def test_notes_carry_what_was_said_and_without_them_nothing_is_known(found):
    told, _ = found
    (none,) = told["against"].values()
    assert told["right"] > 80
    assert none["right"] < 8
    assert none["edges"] < told["edges"] < 3 * Causal().num_edges(30, 30)


def test_a_run_leaves_its_outcome_and_pictures(found):
    told, runs = found
    kept = json.loads((runs / "notebook" / "outcome.json").read_text())
    assert kept == {name: told[name] for name in kept}
    assert kept["baselines"]["chance"] == 100 / notebook.VALUES
    files = {"config.json", "metrics.csv", "model.safetensors", "accuracy.png", "connectivity.png"}
    for name in ("notebook", "notebook-against-1"):
        assert files <= {path.name for path in (runs / name).iterdir()}
    assert (runs / "notebook" / "lengths.png").exists()


def test_a_sweep_trains_with_each_number_of_notes(tmp_path):
    tiny = ["--steps", "2", "--chunks", "2", "--pairs", "1", "--width", "8", "--notes", "1", "--against"]
    sweep = ["--sweep", "0", "1", "2"]
    told = notebook.main(notebook.settings([*tiny, *sweep, "--runs", str(tmp_path)]))
    assert list(told["notes"]) == [0, 1, 2]
    assert told["notes"][1]["right"] == told["right"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "notebook", "notebook-notes-0", "notebook-notes-2",
    }  # fmt: skip
    assert told["picture"] == "notes.png"


def test_a_text_asks_for_values_that_earlier_chunks_told():
    args = notebook.settings(["--pairs", "3", "--notes", "2"])
    tokens, values = notebook.texts(4, 3, 3, args, seed=0)
    assert tokens.shape == (4, 3 * 8)
    for row, answers in zip(tokens.tolist(), values.tolist(), strict=True):
        chunks = [row[start : start + 8] for start in range(0, 24, 8)]
        assert all(chunk[6:] == [notebook.BLANK] * 2 for chunk in chunks)
        told = {chunk[at]: chunk[at + 1] for chunk in chunks[:2] for at in (0, 2, 4)}
        assert [told[key] - notebook.KEYS for key in chunks[2][:6]] == answers


def test_the_graph_is_the_chunk_so_far_and_earlier_notes():
    mask = parse(notebook.notebook_of(5, 2)).mask(15, 15)
    for i in range(15):
        for j in range(15):
            assert mask[i, j] == (j <= i and (i // 5 == j // 5 or j % 5 >= 3))


def test_without_notes_a_chunk_knows_nothing_of_others():
    torch.manual_seed(0)
    args = notebook.settings(["--notes", "0", "--width", "8"])
    model, (tokens, _) = notebook.Notebook(args), notebook.texts(2, 3, 4, args, seed=1)
    others = torch.cat([tokens.roll(1, 0)[:, :16], tokens[:, 16:]], 1)
    assert torch.allclose(model(tokens), model(others), atol=1e-6)
    assert Causal().num_edges(24, 24) > parse(args.graph).num_edges(24, 24)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--notes", "-1"], "--notes must be 0 or more (got -1)"),
        (["--sweep", "2", "-3"], "--sweep must be numbers of 0 or more (got -3)"),
        (["--chunks", "6"], "texts 4 times as long need at most 80 keys (got 4 and 6)"),
        (["--width", "30"], "--width must be a multiple of 2 × --heads (got --width 30 --heads 4)"),
        (["--graph", "Causal(), Full()"], "--graph must be one graph, or one for each of 3 layers (got 2)"),
    ],
)
def test_bad_settings_are_told(capsys, given, message):
    with pytest.raises(SystemExit):
        notebook.settings(given)
    assert message in capsys.readouterr().err
