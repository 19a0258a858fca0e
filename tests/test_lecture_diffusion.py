"""diffusion.py: its bound is one, drafts get likelier and duller, and what it hears decides what it learns."""

import itertools
import json
import math
import random

import diffusion
import gpt
import pytest
import torch
from torch import nn

from attngraph import Causal, Full
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

FILES = {
    "config.json", "metrics.csv", "model.safetensors", "outcome.json", "loss.png", "drafts.png", "drafts.txt",
    "connectivity.png",
}  # fmt: skip
NAMES = ["anna", "bert", "carl", "dora", "emil", "frida", "gustav", "hanna", "ivo", "jana"]
VERBS = ["sees", "hears", "calls", "asks", "knows", "greets", "helps", "follows"]


def sentences(count):
    """A small language."""
    rng = random.Random(0)
    return "".join(f"{rng.choice(NAMES)} {rng.choice(VERBS)} {rng.choice(NAMES)}.\n" for _ in range(count))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(sentences(4000))
    return path


def run(folder, *given):
    return diffusion.main(diffusion.settings(["--runs", str(folder), "--dtype", "float32", *map(str, given)]))


def test_drafts_get_likelier_and_duller(tmp_path, text):
    found = run(tmp_path, "--quick", "--text", text)
    (beside,) = found["baselines"].items()
    assert beside[0] == "Causal(), left to right"
    assert beside[1] < found["figure"] < math.log2(25)
    last = {order: list(each.values())[-1] for order, each in found["drafts"].items()}
    first = {order: next(iter(each.values())) for order, each in found["drafts"].items()}
    for order in diffusion.ORDERS:
        assert last[order].bits < first[order].bits - 1
    assert last["surest first"].bits < last["random order"].bits
    assert last["surest first"].distinct < last["random order"].distinct
    folder = tmp_path / "diffusion"
    left = {path.name for path in folder.iterdir()}
    assert {name for name in left if not name.startswith("optimizer-")} == FILES
    kept = json.loads((folder / "outcome.json").read_text())
    assert kept["lower_is_better"]
    assert kept["baselines"] == found["baselines"]
    assert GPT.load(folder).transformer.graphs[0] == Full()
    assert GPT.load(tmp_path / "diffusion-against").transformer.graphs[0] == Causal()
    assert f"surest first, draft {16}\n" in (folder / "drafts.txt").read_text(encoding="utf-8")


def test_holes_are_of_every_number_alike():
    chance, counts = torch.Generator().manual_seed(0), []
    for _ in range(50):
        which = diffusion.holes((16, 8), chance)
        counts += which.sum(1).tolist()
        assert sorted(which.sum(1).tolist()) == sorted(list(range(1, 9)) * 2) or len(set(counts)) > 1
    assert set(counts) == set(range(1, 9))
    assert all(abs(counts.count(k) - 100) <= 50 for k in range(1, 9))


def test_holes_are_few_where_few_are_asked_for():
    chance, counts = torch.Generator().manual_seed(0), []
    for _ in range(50):
        counts += diffusion.holes((16, 40), chance, 0.15).sum(1).tolist()
    assert set(counts) == set(range(1, 7))


class Exact(nn.Module):
    """The exact conditionals of three tokens of two values, whose joint probability is a table; 2 is the mask."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)
        table = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
        self.table = table / table.sum()

    def forward(self, tokens):
        rows = []
        for row in tokens.tolist():
            joint = self.table
            for place, token in enumerate(row):
                if token != 2:
                    joint = joint.index_select(place, torch.tensor([token]))
            logits = []
            for place, token in enumerate(row):
                others = [dim for dim in range(3) if dim != place]
                found = joint.sum(others).log()
                logits.append(found if token == 2 else torch.zeros(2).double())
            rows.append(torch.stack(logits))
        return torch.stack(rows)


def test_the_bound_of_exact_conditionals_is_what_a_text_costs():
    """Whatever the order, the conditionals multiply to the joint probability: so the bound is no bound but the cost."""
    model, total, draws = Exact(), 0.0, 600
    texts = torch.tensor(list(itertools.product(range(2), repeat=3)))
    text = texts[3].expand(draws, 3)
    total = float(diffusion.bound(model, text, 2, torch.Generator().manual_seed(0)))
    assert total == pytest.approx(-float(model.table[tuple(texts[3].tolist())].log()) / 3, abs=0.05)


def test_a_causal_graph_is_left_to_right_and_judges():
    config = TransformerConfig(embed_dim=16, num_layers=2, num_heads=2)
    assert diffusion.left_to_right(GPT(config, 5).transformer.graphs, 8)
    assert not diffusion.left_to_right([Causal(), Full()], 8)
    tokens = gpt.Characters("ab \n")
    told = diffusion.judged(None, torch.tensor([tokens.encode("a ab b ab a"), tokens.encode("b a  a  a b")]), tokens)
    assert math.isnan(told.bits)
    assert told.distinct == pytest.approx(100 * 3 / 6)  # ab, b, ab; a, a, a: without the first and the last


def test_without_a_judge_only_words_are_told(tmp_path, text, capsys):
    found = run(
        tmp_path, "--quick", "--text", text, "--steps", 2, "--width", 8, "--drafts", 2, "--samples", 2, "--against",
        "", "--graph", "Window(3, 3)",
    )  # fmt: skip
    assert found["baselines"] == {}
    assert all(math.isnan(told.bits) for each in found["drafts"].values() for told in each.values())
    assert list(found["beside"]) == ["real text"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--drafts", "0"], "--drafts must be 1 or more (got 0)"),
        (["--graph", "Nothing()"], "--graph: "),
        (["--against", "Full(), Full()"], "--against must be one graph, or one for each of 4 layers (got 2)"),
        (["--width", "12"], "--width must be a multiple of 2 × --heads"),
    ],
)
def test_bad_settings_are_named(capsys, given, message):
    with pytest.raises(SystemExit):
        diffusion.settings(given)
    assert message in capsys.readouterr().err
