"""python -m attngraph: show and explain a graph; train a small GPT, list the examples; measure this machine."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import NoReturn

import torch

from attngraph.analysis.facts import facts
from attngraph.graph.text import parse_list
from attngraph.planning.calibrate import calibrate
from attngraph.planning.planner import plan

USAGE = """usage: python -m attngraph demo [options of examples/gpt.py]
       python -m attngraph examples [options of examples/lecture.py]
       python -m attngraph show GRAPH --size N [--layers L] [--dim D --heads H --kv-heads K --dtype float32]
       python -m attngraph explain GRAPH --size N [--dim D --heads H --dtype float32]
       python -m attngraph calibrate [cuda]

    python -m attngraph demo            a few minutes on a CPU; what it leaves is in runs/gpt
    python -m attngraph demo --graph "Causal() & Window(16, 0)" --name local
    python -m attngraph demo --help
    python -m attngraph examples        what there is, in the order of the lecture; --help has how to run them
    python -m attngraph show "Causal() & (Window(64, 0) | Prefix(4))" --size 1024 --layers 6
                                        edges, causality, receptive fields, cache: what can be known before training
    python -m attngraph explain "Causal() & (Window(64, 0) | Prefix(4))" --size 1024
                                        what runs, and why
    python -m attngraph calibrate       some seconds; plans then go by what this machine was measured to cost"""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def ask(command: str, arguments: list[str]) -> None:
    """show and explain: the facts of a stack, the plan of a graph."""
    parser = Parser(prog=f"python -m attngraph {command}")
    parser.add_argument("graph", help='an expression, as "Causal() & Window(64, 0)"; of several layers, with commas')
    parser.add_argument("--size", type=int, help="how many nodes; where the graph does not know")
    parser.add_argument("--dim", type=int, default=512, help="the width of all heads together (default 512)")
    parser.add_argument("--heads", type=int, help="default: those of the graph, or 8")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    if command == "show":
        parser.add_argument("--layers", type=int, help="how many; default: those given")
        parser.add_argument("--kv-heads", type=int, help="of keys and values; default: as many as heads")
    given = parser.parse_args(arguments)
    try:
        print(_answer(command, given))
    except (ValueError, TypeError, MemoryError) as error:
        parser.error(str(error))


def _answer(command: str, given: argparse.Namespace) -> str:
    graphs, dtype = parse_list(given.graph), getattr(torch, given.dtype)
    heads = next((graph.heads for graph in graphs if graph.heads), 8) if given.heads is None else given.heads
    if given.size is None and all(graph.size[0] is None for graph in graphs):
        raise ValueError("the graph fits any number of nodes: give one, as --size 1024")
    if command == "explain":
        if len(graphs) > 1:
            raise ValueError(f"explain takes the graph of one layer (got {len(graphs)}): ask about each by itself")
        if heads < 1 or given.dim % heads:
            raise ValueError(f"--dim must be a multiple of --heads (got {given.dim} and {heads})")
        return plan(graphs[0], given.size, heads=heads, head_dim=given.dim // heads, dtype=dtype).explain()
    if given.layers is not None and given.layers != len(graphs):
        if len(graphs) > 1 or given.layers < 1:
            raise ValueError(f"--layers must be {len(graphs)}, as many as graphs (got {given.layers}): leave it out")
        graphs = graphs * given.layers
    told = facts(graphs, given.size, dim=given.dim, heads=heads, kv_heads=given.kv_heads, dtype=dtype)
    return "\n".join([f"{'graph':17}{given.graph}", *(f"{name:17}{fact}" for name, fact in told.items())])


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["calibrate"] and len(arguments) <= 2 and arguments[1:] in ([], ["cpu"], ["cuda"]):
        calibrate(*arguments[1:])
        return
    if arguments and arguments[0] in ("show", "explain"):
        ask(arguments[0], arguments[1:])
        return
    if arguments[:1] not in (["demo"], ["examples"]):
        asked = arguments[:1] in (["-h"], ["--help"])
        unknown = "" if asked or not arguments else f"not a command: {' '.join(arguments)}\n\n"
        print(unknown + USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    here = Path(__file__).parent
    examples = next(place for place in (here / "examples", here.parent / "examples") if (place / "gpt.py").exists())
    sys.path.insert(0, str(examples))
    command, *options = arguments
    sys.argv = [f"python -m attngraph {command}", *(options or (["--list"] if command == "examples" else []))]
    runpy.run_path(str(examples / {"demo": "gpt.py", "examples": "lecture.py"}[command]), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
