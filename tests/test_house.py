"""The house: names are documented, the README's figures are the measured ones, and the floors hold."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import attngraph
from attngraph import analysis, draw, hf, models, nn

ROOT = Path(__file__).parent.parent
PUBLIC = [
    (f"{module.__name__}.{name}", getattr(module, name))
    for module in (attngraph, nn, models, hf, analysis, draw)
    for name in getattr(module, "__all__", vars(module))
    if not name.startswith("_")
    and (callable(getattr(module, name)) or inspect.ismodule(getattr(module, name)))
    and getattr(getattr(module, name), "__module__", module.__name__).startswith("attngraph")
]


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_public_names_are_documented(name, thing):
    assert inspect.getdoc(thing)
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        if not member.startswith("_") and inspect.isfunction(value):
            assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def test_the_readme_quotes_the_recorded_figures():
    sys.path.insert(0, str(ROOT))
    from benchmarks import readme

    text = readme.README.read_text(encoding="utf-8")
    assert readme.written(text) == text, "python -m benchmarks.readme"
    assert readme.on_a_gpu() == readme.GPU.read_text(encoding="utf-8"), "python -m benchmarks.readme"


def test_the_recorded_floors_are_those_of_the_kernels():
    from benchmarks import floors

    recorded = json.loads((floors.RESULTS / "floors.json").read_text())["lines"]
    assert [asdict(line) for line in floors.lines()] == recorded, "python -m benchmarks.floors"


def test_the_readme_links_to_what_exists():
    for page in (ROOT / "README.md", ROOT / "docs" / "graphs.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_floors_hold():
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_file_outgrows_a_room():
    """About 400 lines; a longer file is a reason to look again."""
    for path in (ROOT / "attngraph").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 620, path
