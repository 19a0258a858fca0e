"""examples/recall.py: edges that the data chooses recall what as many fixed ones can't."""

import json

import pytest
import recall
import reporting
import torch

from attngraph import Causal, TopK, Window


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the quick form returns, and where it was run."""
    runs = tmp_path_factory.mktemp("runs")
    return recall.main(recall.settings(["--quick", "--runs", str(runs)])), runs


def test_chosen_edges_recall_and_a_window_fails(found):
    told, _ = found
    (window,) = told["against"].values()
    assert told["right"] > 90
    assert window["right"] < 20
    assert told["edges"] == window["edges"]


def test_a_run_leaves_its_outcome_and_the_edges_that_were_chosen(found):
    told, runs = found
    kept = json.loads((runs / "recall" / "outcome.json").read_text())
    assert kept == {name: told[name] for name in kept}
    assert kept["picture"] == "edges.png"
    assert list(kept["baselines"].values()) == [each["right"] for each in told["against"].values()]
    files = {"config.json", "metrics.csv", "model.safetensors", "accuracy.png", "edges.png"}
    for name in ("recall", "recall-against-1"):
        assert files <= {path.name for path in (runs / name).iterdir()}


def test_a_text_asks_for_values_that_it_told():
    tokens, values = recall.texts(5, 7, seed=0)
    assert tokens.shape == (5, 21)
    for row, answers in zip(tokens.tolist(), values.tolist(), strict=True):
        told = dict(zip(row[:14:2], row[1:14:2], strict=True))
        assert len(told) == 7
        assert [told[key] - recall.SYMBOLS for key in row[14:]] == answers


def test_edges_are_those_that_are_chosen():
    assert reporting.edges_of([TopK(3) & Causal()], 10) == 1 + 2 + 8 * 3
    assert reporting.edges_of([Causal() & Window(2, 0)], 10) == 1 + 2 + 8 * 3


def test_what_is_asked_is_not_heard_before():
    """No token's answer depends on later ones."""
    torch.manual_seed(0)
    model = recall.Recall(16, TopK(2) & Causal())
    tokens, _ = recall.texts(2, 4, seed=1)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % recall.SYMBOLS
    assert torch.equal(model(tokens)[:, :-1], model(changed)[:, :-1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pairs", "65"], "--pairs must be 64 or less, the number of keys (got 65)"),
        (["--width", "15"], "--width must be even (got 15)"),
        (["--graph", "Causal(), Causal()"], "--graph must be one graph, or one for each of 1 layers (got 2)"),
        (["--against", "Causal()", "Casual()"], "--against: "),
    ],
)
def test_bad_settings_are_told(capsys, given, message):
    with pytest.raises(SystemExit):
        recall.settings(given)
    assert message in capsys.readouterr().err
