"""examples/particles.py: neighbours that are computed anew at each step tell forces that as many at random do not."""

import json

import particles
import pytest
import torch

from attngraph import Full


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the quick form returns, and where it was run."""
    runs = tmp_path_factory.mktemp("runs")
    return particles.main(particles.settings(["--quick", "--runs", str(runs)])), runs


def test_the_nearest_tell_the_forces_and_others_do_not(found):
    told, _ = found
    (random,) = told["against"].values()
    assert told["unexplained"] < 40
    assert random["unexplained"] > 70
    assert told["edges"] == random["edges"] == 2 * 64 * 12


def test_a_run_leaves_its_outcome_and_the_forces(found):
    told, runs = found
    kept = json.loads((runs / "particles" / "outcome.json").read_text())
    assert kept == {name: told[name] for name in kept}
    assert kept["lower_is_better"]
    files = {"config.json", "metrics.csv", "model.safetensors", "accuracy.png", "forces.png"}
    for name in ("particles", "particles-against-1"):
        assert files <= {path.name for path in (runs / name).iterdir()}


def test_forces_are_those_of_all_pairs():
    place, charge, force = (part[0].double() for part in particles.sets(1, 6, seed=0))
    for i in range(6):
        wanted = torch.zeros(2, dtype=torch.float64)
        for j in range(6):
            if j != i:
                apart = place[i] - place[j]
                r = apart.norm()
                wanted += charge[j] * apart / r * torch.exp(-((r / particles.REACH) ** 2))
        assert torch.allclose(force[i], wanted, atol=1e-6)


def test_a_graph_is_computed_from_the_places_or_is_always_the_same():
    place = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0], [0.1, 0.0]]])
    nearest = particles.graph_of("knn_graph(place, 1)", 6, 1)(place)
    assert nearest.edge_index(6, 6).tolist() == [[1, 0, 1, 5, 5, 3], [0, 1, 2, 3, 4, 5]]
    assert particles.graph_of("knn_graph(place,2,loop=True)", 6, 1)(place).num_edges(6, 6) == 12
    assert particles.graph_of("Full()", 6, 1)(place) == Full()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--particles", "1"], "--particles must be 2 or more (got 1)"),
        (["--width", "30"], "--width must be a multiple of --heads (got --width 30 --heads 4)"),
        (["--graph", "knn_graph(places, 3)"], "--graph must be as knn_graph(place, 12, loop=True)"),
        (["--graph", "Identity().sized(3, 3)"], "--graph must fit any number of nodes"),
    ],
)
def test_bad_settings_are_told(capsys, given, message):
    with pytest.raises(SystemExit):
        particles.settings(given)
    assert message in capsys.readouterr().err
