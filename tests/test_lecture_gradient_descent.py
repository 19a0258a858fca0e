"""examples/gradient_descent.py: layers are steps, to rounding, on this graph and no other."""

import json

import gradient_descent
import pytest
import torch
from gradient_descent import by_attention, by_descent, problems, ridge, written_down

from attngraph import Prefix

QUICK = gradient_descent.settings(["--quick"])


def test_layers_are_steps_of_gradient_descent(tmp_path, capsys):
    told = gradient_descent.main(gradient_descent.settings(["--quick", "--runs", str(tmp_path)]))
    assert told["figure"] <= 1e-12
    assert told["lower_is_better"]
    assert set(told["baselines"]) == {"Full()", "Prefix(20), with a softmax"}
    assert all(other > 0.1 for other in told["baselines"].values())
    folder = tmp_path / "gradient_descent"
    assert {path.name for path in folder.iterdir()} == {"connectivity.png", "loss.png", "outcome.json"}
    assert json.loads((folder / "outcome.json").read_text()) == told
    assert told["edges"] == 50 * 30 * 20
    assert "Prefix(20), 30,000 edges" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 7])
def test_steps_are_those_of_the_closed_form(steps):
    """W after k steps is (I - (I - rate/n XᵀX)ᵏ) of the least squares."""
    given = problems(QUICK)
    square = given.x.mT @ given.x / given.x.shape[1]
    eye = torch.eye(square.shape[-1], dtype=square.dtype)
    shrunk = eye - torch.linalg.matrix_power(eye - 0.1 * square, steps)
    of_examples, of_questions = by_descent(given, steps, 0.1)
    weights = shrunk @ ridge(given.x, given.y, 0.0)
    torch.testing.assert_close(of_questions[-1], given.asked @ weights, rtol=0, atol=1e-10)
    torch.testing.assert_close(of_examples[-1], given.x @ weights, rtol=0, atol=1e-10)
    assert not of_questions[0].any()


def test_a_batch_of_problems_is_each_alone():
    given = problems(QUICK)
    model = written_down(8, 2, 5, 0.01, Prefix(20))
    together = by_attention(model, given)
    alone = by_attention(model, type(given)(*(part[3:4] for part in given)))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[:, 3:4], other, rtol=0, atol=1e-14)
    residuals = torch.cat([given.y, torch.zeros_like(given.answers)], 1)
    nodes = torch.cat([torch.cat([given.x, given.asked], 1), residuals], -1)
    assert torch.equal(residuals - model(nodes)[..., 8:], torch.cat([side[-1] for side in together], 1))


def test_ridge_is_where_its_gradient_vanishes():
    given = problems(QUICK)
    for penalty in (0.0, 2.5):
        weights = ridge(given.x, given.y, penalty)
        gradient = given.x.mT @ (given.x @ weights - given.y) + penalty * weights
        assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--layers", "0"], "--layers must be 1 or more (got 0)"),
        (["--rate", "-1"], "--rate must be 0 or more (got -1.0)"),
        (["--graph", "Causal().sized(4, 4)"], "graphs of 30 nodes (got Causal().sized(4, 4)"),
        (["--against", "Nothing()"], "graphs of 30 nodes (got Nothing()"),
    ],
)
def test_what_can_not_be_is_told(given, message, capsys):
    with pytest.raises(SystemExit):
        gradient_descent.settings(given)
    assert message in capsys.readouterr().err
