"""The wheel as a stranger meets it: built, installed into an empty environment, its demo run in an empty folder.

    python tests/wheel.py

It downloads what attngraph depends on, and needs the room for it; so it is no part of `make test`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

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
LEFT = {"config.json", "metrics.csv", "checkpoint.safetensors", "sample.txt"} | {
    f"{picture}.png" for picture in ("loss", "connectivity", "attention")
}


def run(*command: str | Path, cwd: Path) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run(command, cwd=cwd, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        run(python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", wheel, cwd=folder)
        (folder / "empty").mkdir()
        run(python, *DEMO, cwd=folder / "empty")
        left = {path.name for path in (folder / "empty" / "runs" / "gpt").iterdir()}
        if not left >= LEFT:
            raise SystemExit(f"the demo must leave {sorted(LEFT)} (missing: {sorted(LEFT - left)})")
        run(python, "-c", "import attngraph; print('attngraph', attngraph.__version__)", cwd=folder / "empty")


if __name__ == "__main__":
    main()
