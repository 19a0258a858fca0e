"""examples/molecules.py: attention on the graphs that the data has, and nodes that know where they stand."""

import json

import molecules
import networkx
import pytest
import torch

from attngraph import Full, Identity, from_dense


def run(folder, *given):
    arguments = ["--runs", str(folder), "--dtype", "float32", *map(str, given)]
    return molecules.main(molecules.settings(arguments))


def test_molecules_are_connected_carbon_skeletons_and_their_gaps_are_hueckels():
    data = molecules.molecules(50)
    assert data.adjacency.shape == (550, 16, 16)
    for adjacency, gap in zip(data.adjacency[:20], data.target, strict=False):
        molecule = networkx.from_numpy_array(adjacency.numpy())
        assert networkx.is_connected(molecule)
        assert max(degree for _, degree in molecule.degree) <= 3
        assert min(map(len, networkx.minimum_cycle_basis(molecule)), default=5) >= 5
        levels = torch.linalg.eigvalsh(adjacency.double()).flip(0)  # the 16 electrons fill the 8 of the lowest energy
        torch.testing.assert_close(gap.double(), levels[7] - levels[8], atol=1e-5, rtol=0)


def test_the_gap_of_butadiene_is_that_of_the_textbook():
    """Four carbons in a chain: levels ±1.618 and ±0.618."""
    levels = torch.linalg.eigvalsh(torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1))
    torch.testing.assert_close(levels[2] - levels[1], torch.tensor(5**0.5 - 1))


def test_an_expression_may_name_the_bonds():
    bonds = from_dense(torch.eye(4, dtype=torch.bool).roll(1, 0))
    assert molecules.heard("bonds", bonds).edge_index().equal((bonds | Identity()).edge_index())
    assert molecules.heard("Full()", bonds).num_edges() == Full().num_edges(4, 4)
    assert molecules.heard("bonds.with_global_nodes(2)", bonds).num_edges() == 8 + 2 * 6 * 2 - 4
    with pytest.raises(ValueError, match="a graph of the 4 atoms"):
        molecules.heard("Full().sized(3, 3)", bonds)


@pytest.mark.slow
def test_along_the_bonds_it_is_nearer_than_linear_regression_and_all_is_left(tmp_path):
    found = run(tmp_path, "--quick")
    baselines = found["baselines"]
    assert found["figure"] < 0.8 * baselines["linear regression"]
    assert baselines["linear regression"] < baselines["the mean"]
    folder = tmp_path / "molecules"
    assert json.loads((folder / "outcome.json").read_text())["figure"] == found["figure"]
    left = {"config.json", "metrics.csv", "error.png", "connectivity.png", "molecules.png", "model.safetensors"}
    assert left <= {path.name for path in folder.iterdir()}


def test_circulant_graphs_are_told_apart_by_positions_alone(tmp_path):
    found = run(tmp_path, "--task", "csl", "--quick", "--steps", 100, "--layers", 1, "--walks", 24)
    assert found["figure"] == 100
    assert found["baselines"] == {"without random-walk positions": 10.0}
    assert (tmp_path / "molecules" / "walks.png").exists()
    assert (tmp_path / "molecules-against-1" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--graph", "bond"), "--graph: not part of a graph expression: 'bond'"),
        (("--against", "Full()", "Full().sized(3, 3)"), "--against: must be a graph of the 16 atoms"),
        (("--walks", "-1"), "--walks must be 0 or more"),
        (("--molecules", "3"), "--molecules must be 50 or more"),
        (("--width", "30"), "--width must be a multiple of --heads"),
    ],
)
def test_bad_settings_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        molecules.settings(list(given))
    assert message in capsys.readouterr().err
