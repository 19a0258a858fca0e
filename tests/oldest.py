"""The lowest versions that pyproject.toml allows, as constraints for pip: python tests/oldest.py > oldest.txt

`make test-oldest` installs these and runs the tests, so that no lower bound is a guess. Only the standard library is
used: nothing is installed yet when this runs.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?>=(?P<bound>[\w.]+)(?P<marker>\s*;.*)?")


def requirements() -> list[str]:
    """What the package and its tests need; an extra that names extras of our own stands for these."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = ["tests"]
    for name in names:
        for ours in extras[name]:
            if ours.startswith("attngraph["):
                names += ours.removeprefix("attngraph[").removesuffix("]").split(",")
    everything = project["dependencies"] + [line for name in names for line in extras[name]]
    return [line for line in everything if not line.startswith("attngraph[")]


def constraints() -> list[str]:
    """Each lower bound as the only version allowed."""
    lines = []
    for requirement in requirements():
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"a requirement needs exactly one lower bound, name>=version (got {requirement!r})")
        lines.append(f"{match['name']}=={match['bound']}{match['marker'] or ''}")
    return lines


if __name__ == "__main__":
    print("\n".join(constraints()))
