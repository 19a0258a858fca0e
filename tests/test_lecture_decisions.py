"""decisions.py: asked for the best return, it takes shortest paths, which it does not where nobody hears the return."""

import json
from itertools import pairwise

import decisions
import pytest
import torch
import training
from safetensors.torch import load_file

from attngraph.models import DecisionTransformer

FILES = {
    "config.json", "metrics.csv", "model.safetensors", "outcome.json", "accuracy.png", "asked.png", "path.png",
    "connectivity.png",
}  # fmt: skip


def run(folder, *given):
    return decisions.main(decisions.settings(["--runs", str(folder), "--dtype", "float32", *map(str, given)]))


def test_it_finds_shortest_paths_and_imitation_does_not(tmp_path):
    found = run(tmp_path, "--quick")
    imitated, walked = found["baselines"][decisions.UNHEARD], found["baselines"]["random walks"]
    assert found["figure"] > 65
    assert max(imitated, walked) < 45
    assert found["failed"] == 0
    assert found["steps"]["Causal()"] < found["steps"][decisions.UNHEARD] / 2
    assert found["steps"]["shortest"] <= found["steps"]["asked for, the best in the data"]
    folder = tmp_path / "decisions"
    left = {path.name for path in folder.iterdir()}
    assert {name for name in left if not name.startswith("optimizer-")} == FILES
    kept = json.loads((folder / "outcome.json").read_text())
    assert (kept["figure"], kept["edges"]) == (found["figure"], found["edges"])
    assert DecisionTransformer.load(folder)._arguments()["num_states"] == 16


def test_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    tiny = ("--quick", "--steps", 6, "--evaluate-every", 3, "--width", 8, "--against", "")
    run(tmp_path / "whole", *tiny)
    save = training.save_checkpoint

    def first(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", first)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *tiny)
    monkeypatch.undo()
    run(tmp_path / "parts", "--resume")
    whole, parts = (load_file(tmp_path / name / "decisions" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_walks_end_at_the_goal_and_returns_are_steps_to_it():
    walks = decisions.walks_of(torch.tensor([[3, 1, 0, 0, 0], [2, 3, 2, 1, 2], [1, 2, 3, 1, 0]]))
    assert walks.steps.tolist() == [2, 8, 4]
    assert walks.returns().tolist() == [[-2, -1, 0, 1], [-8, -7, -6, -5], [-4, -3, -2, -1]]
    assert decisions.best_returns(walks, 5).tolist() == [0, -1, -3, -2, -8]
    world = decisions.map_of(9, seed=1)
    made = decisions.random_walks(world, torch.arange(1, 9), 30, torch.Generator().manual_seed(0))
    for places, steps in zip(made.places.tolist(), made.steps.tolist(), strict=True):
        for here, there in pairwise(places):
            assert world.edges.has_edge(here, there) or here == there == decisions.GOAL
        assert steps == (places.index(decisions.GOAL) if decisions.GOAL in places else 60)


def test_crops_are_parts_of_walks():
    world = decisions.map_of(9, seed=1)
    walks = decisions.random_walks(world, torch.arange(1, 9), 12, torch.Generator().manual_seed(0))
    whole = [
        (place, action, -steps + step)
        for places, steps in zip(walks.places.tolist(), walks.steps.tolist(), strict=True)
        for step, (place, action) in enumerate(pairwise(places)) if place != decisions.GOAL
    ]  # fmt: skip
    found = decisions.crops(walks, 2000, 5, torch.Generator().manual_seed(0))
    assert found.keep[:, 0].all()
    seen = torch.stack([found.places, found.actions, found.returns], -1)[found.keep].tolist()
    assert {tuple(each) for each in seen} == set(whole)
    kept = found.keep[:, 1:]
    assert torch.equal(found.places[:, 1:][kept], found.actions[:, :-1][kept])


def test_only_edges_are_taken():
    args = decisions.settings(["--quick"])
    torch.manual_seed(0)
    world, model = decisions.map_of(16, 0), decisions.build(args).eval()
    starts = torch.arange(1, 16)
    for best in (None, -torch.arange(16)):
        chance = torch.Generator().manual_seed(0)
        taken = decisions.paths(model, world, starts, -torch.ones(15).long(), 30, generator=chance, best=best)
        assert torch.equal(taken.places[:, 0], starts)
        for places in taken.places.tolist():
            for here, there in pairwise(places):
                assert world.edges.has_edge(here, there) or here == there == decisions.GOAL


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--nodes", "3"], "--nodes must be 6 or more (got 3)"),
        (["--graph", "Full() & Nothing()"], "--graph: "),
        (["--against", "Causal(), Causal(), Causal()"], "--against must be one graph, or one for each of 2"),
        (["--longest", "1"], "--longest must be 2 or more (got 1)"),
    ],
)
def test_bad_settings_are_named(capsys, given, message):
    with pytest.raises(SystemExit):
        decisions.settings(given)
    assert message in capsys.readouterr().err
