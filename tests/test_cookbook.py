"""The cookbook: twenty-four recipes, each short, and each whole in itself."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "cookbook.md"
RECIPES = re.findall(r"^## (\d+\. .*?)$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_are_twenty_four_and_the_table_names_each():
    assert [int(title.split(".")[0]) for title, _ in RECIPES] == list(range(1, 25))
    anchors = re.findall(r"\[(\d+)\]\(#([\w-]+)\)", PAGE.read_text(encoding="utf-8"))
    slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title, _ in RECIPES]
    assert dict(anchors) == {slug.split("-")[0]: slug for slug in slugs}


@pytest.mark.parametrize(("title", "text"), RECIPES, ids=[title for title, _ in RECIPES])
def test_a_recipe_is_short_and_runs_by_itself(title, text):
    lines = [line for line in text.splitlines() if line.startswith((">>>", "..."))]
    assert 0 < len(lines) <= 12
    test = doctest.DocTestParser().get_doctest(text, {}, title, str(PAGE), 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=told.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(told)
