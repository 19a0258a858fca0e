"""The repository: names are documented, pages link to what exists, figures are the measured ones, versions agree."""

import json
import re
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import networkx
import oldest
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.nn.functional import scaled_dot_product_attention

import attngraph
from attngraph import nn

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_OF = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]


def test_public_names_are_documented():
    from undocumented import undocumented

    assert undocumented() == []


def test_the_undocumented_is_found():
    from undocumented import documented

    class Bare(nn.Attention):
        def forward(self, x):
            return x

        def reset(self):
            return self

    Bare.__module__ = "attngraph.nn"
    assert documented(Bare, "forward")  # fulfils a contract
    assert documented(Bare, "reset") is None
    assert documented(nn.Attention, "extra_repr") != torch.nn.Module.extra_repr.__doc__


def test_the_version_is_the_newest_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert attngraph.__version__ == newest[1] == cited[1] == PYPROJECT["project"]["version"]


def test_the_reference_has_every_public_name():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: attngraph\.(\w+)$", pages, re.MULTILINE))
    assert shown == set(attngraph.__all__) | {"analysis", "cache", "distributed", "draw", "hf", "models", "nn", "pyg"}


def test_a_star_brings_no_modules():
    """`from attngraph import *` after `from torch import nn` leaves nn what it was."""
    assert not [name for name in attngraph.__all__ if isinstance(getattr(attngraph, name), ModuleType)]


def test_every_package_is_installed():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "attngraph").rglob("*.py")}
    assert sorted(listed) == sorted({".".join(folder.parts) for folder in folders} | {"attngraph.examples"})


def test_constraints_name_a_version_of_all_that_is_needed_and_none_below_its_bound():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(tested) == sorted(tested)
    project = PYPROJECT["project"]
    needed = [Requirement(line) for line in sum(project["optional-dependencies"].values(), project["dependencies"])]
    for requirement in needed:
        if requirement.name != "attngraph":
            assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement


def test_every_lower_bound_is_a_constraint_of_the_oldest():
    names = [line.split("==")[0] for line in oldest.constraints()]
    assert {"torch", "numba", "transformers", "tokenizers"} < set(names)
    assert len(names) == len(set(names))


def test_the_layers_of_contributing_are_those_of_the_import_rules():
    rules = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    table = PAGE_OF["CONTRIBUTING.md"].split("## Layers")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert rows == [re.findall(r"attngraph\.(\w+)", rule) for rule in rules]


def test_all_code_of_the_docs_is_run():
    """Blocks of Python in docs/ are doctests; those of the README run here, with what they take for granted."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            assert block.startswith(">>> "), f"{page.name}: {block}"


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gpt2_as_the_readme_has_it(tmp_path / "path" / "of" / "gpt2")
    N = 64
    q, k, v = torch.randn(3, 1, 8, N, 64)
    known = {"torch": torch, "q": q, "k": k, "v": v, "N": N, "your_graph": networkx.path_graph(N)}
    known |= {"scaled_dot_product_attention": scaled_dot_product_attention, "tokens": torch.randint(20, (1, N))}
    blocks = re.findall(r"```python\n(.*?)```", PAGE_OF["README.md"], re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), known)


def gpt2_as_the_readme_has_it(folder: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def test_the_readme_quotes_the_recorded_figures():
    from benchmarks import readme

    text = readme.README.read_text(encoding="utf-8")
    assert readme.written(text) == text, "python -m benchmarks.readme"
    assert readme.on_a_gpu() == readme.GPU.read_text(encoding="utf-8"), "python -m benchmarks.readme"
    assert readme.lecture() == readme.LECTURE.read_text(encoding="utf-8"), "python -m benchmarks.readme"
    assert readme.measured() == readme.MEASURED.read_text(encoding="utf-8"), "python -m benchmarks.readme"


def test_the_recorded_floors_are_those_of_the_kernels():
    from benchmarks import floors, measure

    recorded = json.loads((measure.RESULTS / "floors.json").read_text())
    for line in floors.lines():
        assert recorded.pop(line.text).items() >= asdict(line).items(), "python -m benchmarks.floors"
    assert recorded == {}


@pytest.mark.parametrize("page", PAGES, ids=list(PAGE_OF))
def test_pages_link_to_what_exists(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), link
        if anchor:
            text = (page.parent / target if target else page).read_text(encoding="utf-8")
            heads = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


def test_files_are_short_enough_to_read():
    """About 400 lines; a longer file is a reason to look again, kernels for a GPU excepted."""
    for path in (ROOT / "attngraph").rglob("*.py"):
        if path.parent.name != "triton":
            assert len(path.read_text(encoding="utf-8").splitlines()) < 620, path
