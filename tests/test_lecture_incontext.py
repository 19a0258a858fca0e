"""examples/incontext.py: pairs are learned from in context, on a graph that lets them be heard."""

import json

import gradient_descent
import incontext
import numpy as np
import pytest
import torch
from gradient_descent import Problems
from incontext import by_descent, by_regression, errors_of, problems

QUICK = incontext.settings(["--quick"])


@pytest.mark.slow
def test_it_learns_from_the_pairs_that_it_hears(tmp_path):
    arguments = ["--quick", "--runs", str(tmp_path)]
    told = incontext.main(incontext.settings(arguments))
    assert told["figure"] < 1.2 < told["baselines"]["the last pair alone: Identity() at best"]
    assert told["figure"] < told["baselines"]["4 steps of gradient descent"]
    assert told["baselines"]["ridge regression, the best there is"] == 1
    folder = tmp_path / "incontext"
    files = {"config.json", "metrics.csv", "error.png", "training.png", "connectivity.png", "outcome.json"}
    left = {path.name for path in folder.iterdir() if not path.name.startswith("optimizer")}
    assert left == files | {"model.safetensors"}
    assert json.loads((folder / "outcome.json").read_text())["figure"] == told["figure"]
    assert told["edges"] == 4 * 7 * 8 // 2


def test_no_y_is_known_before_it_is_asked_for():
    model, (x, y) = incontext.InContext(QUICK), problems(3, QUICK, 0)
    torch.nn.init.normal_(model.head.weight)
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    found = model(x, y)
    for node in range(QUICK.pairs):
        other = y.clone()
        other[:, node:] += 1
        torch.testing.assert_close(model(x, other)[:, : node + 1], found[:, : node + 1])
        if node + 1 < QUICK.pairs:
            assert not torch.allclose(model(x, other)[:, node + 1], found[:, node + 1])


def test_regression_is_that_of_numpy():
    x, y = problems(4, QUICK, 1)
    least, ridge = by_regression(x, y, 0.0), by_regression(x, y, 0.25)
    assert not least[:, 0].any()
    for row in range(4):
        for seen in range(1, QUICK.pairs):
            known, asked = x[row, :seen].double().numpy(), x[row, seen].double().numpy()
            weights = np.linalg.lstsq(known, y[row, :seen].double().numpy(), rcond=None)[0]
            assert float(least[row, seen]) == pytest.approx(asked @ weights, rel=1e-6, abs=1e-6)
            padded = np.concatenate([known, 0.5 * np.eye(3)])  # a ridge is three more pairs
            weights = np.linalg.lstsq(padded, np.append(y[row, :seen].double().numpy(), [0, 0, 0]), rcond=None)[0]
            assert float(ridge[row, seen]) == pytest.approx(asked @ weights, rel=1e-9, abs=1e-9)


def test_ridge_is_better_than_least_squares_and_a_step_of_descent_than_none():
    x, y = problems(2000, QUICK, 2)
    ridge, least = (errors_of(by_regression(x, y, penalty), y) for penalty in (QUICK.noise**2, 0.0))
    assert (ridge[1:] < least[1:]).all()
    alone = errors_of(by_regression(x, y, QUICK.noise**2, 1), y)
    assert torch.equal(alone[:2], ridge[:2])
    assert (ridge[2:] < alone[2:] - 0.1).all()
    stepped = errors_of(by_descent(x, y, 1, torch.full((QUICK.pairs,), 0.2)), y)
    assert float(stepped[0]) == float(ridge[0])  # nothing is known yet
    assert (stepped[1:] < ridge[0]).all()


def test_descent_is_by_the_pairs_before_and_by_the_rate_of_their_number():
    (x, y), rates = problems(20, QUICK, 3), torch.linspace(0.02, 0.2, QUICK.pairs)
    found = by_descent(x, y, 5, rates)
    for seen in range(1, QUICK.pairs):
        asked = x[:, seen : seen + 1].double()
        given = Problems(x[:, :seen].double(), y[:, :seen, None].double(), asked, asked[..., :1])
        expected = gradient_descent.by_descent(given, 5, float(rates[seen]))[1][-1, :, 0, 0]
        torch.testing.assert_close(found[:, seen], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--pairs", "1"], "--pairs must be 2 or more (got 1)"),
        (["--graph", "Prefix(2).sized(9, 9)"], "--graph must fit 7 nodes"),
        (["--width", "30"], "--width must be a multiple of --heads (got --width 30 --heads 4)"),
    ],
)
def test_what_can_not_be_is_told(given, message, capsys):
    with pytest.raises(SystemExit):
        incontext.settings(given)
    assert message in capsys.readouterr().err
