"""The wheel as a stranger meets it: built, installed into an empty environment, its demo run in an empty folder.

    python tests/wheel.py

Its modules are those of the source. It downloads what attngraph depends on, and needs the disk for it; so it is no part
of `make test`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
DEMO = [
    "-m",
    "attngraph",
    "demo",
    "--steps",
    "3",
    "--evaluate-every",
    "3",
    "--batch",
    "2",
    "--context",
    "32",
    "--width",
    "32",
    "--layers",
    "2",
    "--sample",
    "5",
]
LEFT = {"config.json", "metrics.csv", "model.safetensors", "sample.txt"} | {
    f"{picture}.png" for picture in ("loss", "connectivity", "attention", "heads")
}


def run(*command: str | Path, cwd: Path) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run(command, cwd=cwd, check=True)


def missing(wheel: Path) -> list[str]:
    """The modules of the package and the examples that a wheel lacks, and `py.typed`."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attngraph").rglob("*.py")}
    sources |= {f"attngraph/examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    return sorted((sources | {"attngraph/py.typed"}) - set(ZipFile(wheel).namelist()))


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        if lacking := missing(wheel):
            raise SystemExit(f"the wheel must have every module; is a package missing in pyproject.toml? ({lacking})")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        run(
            python,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--quiet",
            "-c",
            ROOT / "constraints.txt",
            wheel,
            cwd=folder,
        )
        (folder / "empty").mkdir()
        run(python, *DEMO, cwd=folder / "empty")
        left = {path.name for path in (folder / "empty" / "runs" / "gpt").iterdir()}
        if not left >= LEFT:
            raise SystemExit(f"the demo must leave {sorted(LEFT)} (missing: {sorted(LEFT - left)})")
        run(python, "-c", "import attngraph; print('attngraph', attngraph.__version__)", cwd=folder / "empty")


if __name__ == "__main__":
    main()
