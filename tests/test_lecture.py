"""All examples of the lecture: they are there, run one after the other, and a page tells what came, failures too."""

import csv
import importlib
import json
import sys
from pathlib import Path

import command_line
import lecture
import pytest
import reporting

from attngraph import Causal, TopK
from attngraph.__main__ import main as command

EXAMPLES = Path(lecture.__file__).parent


def test_every_entry_is_a_file_that_says_what_it_does():
    assert len({entry.name for entry in lecture.LECTURE}) == len(lecture.LECTURE)
    for entry in lecture.LECTURE:
        assert (EXAMPLES / f"{entry.name}.py").read_text(encoding="utf-8").startswith('"""')


def test_the_page_has_what_each_run_left(tmp_path, capsys):
    names = ["custom", "mlp_is_attention"]
    assert lecture.main(lecture.settings(["--runs", str(tmp_path), *names])) == {}
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for name in names:
        known = json.loads((tmp_path / name / reporting.OUTCOME).read_text())
        for text in (f"{name}.py", known["graph"], f"{known['edges']:,} edges", f"{known['figure']:.4g}"):
            assert text in page
        assert all(other in page for other in known["baselines"])
        assert known["metric"] in capsys.readouterr().out or name != "custom"
    assert page.count("data:image/png;base64,") == page.count("<img") == 2
    assert "http" not in page


def test_a_failure_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    broken = lecture.Entry("no_such_example", "Text", "nothing", "Full()")
    monkeypatch.setattr(lecture, "LECTURE", (broken, lecture.LECTURE[1]))
    failures = lecture.main(lecture.settings(["--runs", str(tmp_path)]))
    assert list(failures) == ["no_such_example"]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "it ended with 2" in page
    assert "mlp_is_attention.py" in page


def test_the_command_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as ended:
        command(["examples"])
    assert not ended.value.code
    assert capsys.readouterr().out.count(".py ") == len(lecture.LECTURE)


def test_an_unknown_name_is_told(capsys):
    with pytest.raises(SystemExit):
        lecture.settings(["nothing"])
    assert "NAME must be of custom" in capsys.readouterr().err


def test_what_is_told_is_kept(tmp_path, capsys):
    given = reporting.Outcome("values right [%]", 99.5, {"a window": 1.5}, "TopK(8)", 768, 3.0, "edges.png")
    assert reporting.tell(tmp_path, given) == json.loads((tmp_path / reporting.OUTCOME).read_text())
    first, second, left = capsys.readouterr().out.splitlines()
    assert left == f"in {tmp_path}: outcome.json"
    assert first.split() == ["values", "right", "[%]", "99.5", "TopK(8),", "768", "edges"]
    assert second.split() == ["1.5", "a", "window"]


def test_the_quick_form_is_other_defaults_and_what_is_given_stays():
    parser = command_line.parser_of("", quick={"steps": 5, "batch": 2}, name="x", steps=100, batch=8, evaluate_every=10)
    parser.set_defaults(layers=1, heads=1)
    assert command_line.parsed(parser, ["--quick", "--batch", "3"]).steps == 5
    parser = command_line.parser_of("", quick={"steps": 5, "batch": 2}, name="x", steps=100, batch=8, evaluate_every=10)
    parser.set_defaults(layers=1, heads=1)
    assert command_line.parsed(parser, ["--quick", "--batch", "3"]).batch == 3


TINY = {  # what makes each of them a matter of seconds
    "bert": "--layers 1 --width 16 --context 16",
    "decisions": "--quick --width 8",
    "diffusion": "--layers 1 --width 16 --context 16 --drafts 2 --samples 2",
    "incontext": "--layers 1 --width 16 --problems 20",
    "molecules": "--molecules 50 --width 8 --against bonds",
    "notebook": "--chunks 2 --pairs 1 --width 8 --notes 1 --against Causal()",
    "particles": "--width 16 --particles 16 --against Full()",
    "recall": "--width 16 --pairs 4 --against Causal()",
    "sensors": "--layers 1 --width 16 --against camera",
    "speech": "--width 16 --digits 1 --against",
    "vit": "--layers 1 --width 16",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_example_goes_on_where_it_stopped(name, tmp_path):
    module = importlib.import_module(name)
    main = getattr(module, "main", None) or module.train
    given = ["--runs", str(tmp_path), *TINY[name].split(), "--batch", "2", "--evaluate-every", "1", "--steps", "2"]
    main(module.settings(given))
    main(module.settings(["--runs", str(tmp_path), "--resume", "--steps", "3"]))
    for metrics in tmp_path.glob("*/metrics.csv"):
        with open(metrics, newline="", encoding="utf-8") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"], metrics
    assert len([*tmp_path.glob("*/metrics.csv")]) >= 1
    assert not [*tmp_path.glob("*.1")]  # nothing was begun anew


@pytest.mark.parametrize("given", ["", ".", "..", "a/b", "/tmp"])
def test_a_name_is_that_of_a_folder_below_runs(given, capsys):
    for name in ("recall", "gradient_descent", "tokenizer"):
        with pytest.raises(SystemExit):
            importlib.import_module(name).settings(["--name", given])
        assert (
            f"--name must be the name of a folder below --runs, without any other (got {given!r})"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("recall", ["--graph", "PerHead([Causal(), Full()])"], "--graph must have the 1 heads of --heads"),
        ("particles", ["--graph", "PerHead([Causal(), Full()])"], "--graph must have the 4 heads of --heads"),
        ("sensors", ["--graph", "PerHead([Causal(), Full()])"], "--graph must have the 4 heads of --heads"),
        ("particles", ["--graph", "knn_graph(place, 0)"], "--graph must have 1 to 63 of 64 particles"),
        ("particles", ["--graph", "knn_graph(places, 3)"], "--graph must be as knn_graph(place, 12, loop=True)"),
        ("incontext", ["--graph", "Full()"], "--graph must not hear later nodes, which say what is asked: y"),
        ("decisions", ["--against", "Full()"], "--against must not hear later nodes, which say what is asked"),
        ("diffusion", ["--graph", "Causal()"], "--graph must hear both sides (got Causal())"),
        ("notebook", ["--against", "Causal()", "Full().sized(3, 3)"], "--against must fit any number of nodes"),
        ("recall", ["--draw-attention", "0.0"], "unrecognized arguments: --draw-attention"),
    ],
)  # fmt: skip
def test_what_an_example_can_t_do_is_told_before_it_begins(name, given, message, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name).settings(given)
    assert message in capsys.readouterr().err


def test_what_the_data_choose_is_drawn_and_counted_as_any_would():
    graphs = [TopK(2) & Causal(), Causal()]
    assert reporting.edges_of(graphs, 6) == 1 + 5 * 2 + 21
    assert [graph.num_edges(6, 6) for graph in reporting.settled(graphs, 6)] == [11, 21]
