"""All examples of the lecture: they are there, run one after the other, and a page tells what came, failures too."""

import json
import sys
from pathlib import Path

import lecture
import pytest
import training

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
        known = json.loads((tmp_path / name / training.OUTCOME).read_text())
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
    given = training.Outcome("values right [%]", 99.5, {"a window": 1.5}, "TopK(8)", 768, 3.0, "edges.png")
    assert training.tell(tmp_path, given) == json.loads((tmp_path / training.OUTCOME).read_text())
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["values", "right", "[%]", "99.5", "TopK(8),", "768", "edges"]
    assert second.split() == ["1.5", "a", "window"]


def test_the_quick_form_is_other_defaults_and_what_is_given_stays():
    parser = training.parser_of("", quick={"steps": 5, "batch": 2}, name="x", steps=100, batch=8, evaluate_every=10)
    parser.set_defaults(layers=1, heads=1)
    assert training.parsed(parser, ["--quick", "--batch", "3"]).steps == 5
    parser = training.parser_of("", quick={"steps": 5, "batch": 2}, name="x", steps=100, batch=8, evaluate_every=10)
    parser.set_defaults(layers=1, heads=1)
    assert training.parsed(parser, ["--quick", "--batch", "3"]).batch == 3
