"""python -m attngraph demo: train a small GPT, as examples/gpt.py does; calibrate: measure how fast this machine is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from attngraph.planning.calibrate import calibrate

USAGE = """usage: python -m attngraph demo [options of examples/gpt.py]
       python -m attngraph calibrate [cuda]

    python -m attngraph demo            a few minutes on a CPU; what it leaves is in runs/gpt
    python -m attngraph demo --graph "Causal() & Window(16, 0)" --name local
    python -m attngraph demo --help
    python -m attngraph calibrate       some seconds; plans then go by what this machine was measured to cost"""


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["calibrate"] and len(arguments) <= 2 and arguments[1:] in ([], ["cpu"], ["cuda"]):
        calibrate(*arguments[1:])
        return
    if arguments[:1] != ["demo"]:
        asked = arguments[:1] in (["-h"], ["--help"])
        unknown = "" if asked or not arguments else f"not a command: {' '.join(arguments)}\n\n"
        print(unknown + USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    here = Path(__file__).parent
    examples = next(place for place in (here / "examples", here.parent / "examples") if (place / "gpt.py").exists())
    sys.path.insert(0, str(examples))
    sys.argv = ["python -m attngraph demo", *arguments[1:]]
    runpy.run_path(str(examples / "gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
