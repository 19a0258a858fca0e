"""python -m attngraph: show and explain a graph; train a small GPT, list the examples; measure this machine."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from attngraph.analysis.facts import facts
from attngraph.draw.pages import Page, data_of, page
from attngraph.draw.server import serve
from attngraph.draw.tour import tour
from attngraph.graph.base import Graph
from attngraph.graph.text import parse_list
from attngraph.planning.calibrate import calibrate
from attngraph.planning.planner import plan

USAGE = """usage: python -m attngraph demo [options of examples/gpt.py]
       python -m attngraph examples [options of examples/lecture.py]
       python -m attngraph show GRAPH --size N [--layers L] [--save FILE | --facts] [--dim D --heads H …]
       python -m attngraph show [--save FILE]
       python -m attngraph explain GRAPH --size N [--dim D --heads H --dtype float32]
       python -m attngraph calibrate [cuda]

    python -m attngraph demo            a few minutes on a CPU; what it leaves is in runs/gpt
    python -m attngraph demo --graph "Causal() & Window(16, 0)" --name local
    python -m attngraph demo --help
    python -m attngraph examples        what there is, in the order of the lecture; --help has how to run them
    python -m attngraph show "Causal() & (Window(64, 0) | Prefix(4))" --size 1024 --layers 6
                                        edges, causality, receptive fields, cache: what can be known before training;
                                        and a page on which all of it is seen, and changed; --help has the options
    python -m attngraph show            the page as a tour: what attention on graphs is, in eight steps
    python -m attngraph explain "Causal() & (Window(64, 0) | Prefix(4))" --size 1024
                                        what runs, and why
    python -m attngraph calibrate       some seconds; plans then go by what this machine was measured to cost"""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def explain(arguments: list[str]) -> None:
    """The plan of a graph."""
    parser = _parser("explain")
    parser.add_argument("graph", help='an expression, as "Causal() & Window(64, 0)"')
    given = parser.parse_args(arguments)
    with _told(parser):
        graphs, heads = _stack(given)
        if len(graphs) > 1:
            raise ValueError(f"explain takes the graph of one layer (got {len(graphs)}): ask about each by itself")
        size = {"heads": heads, "head_dim": _head_dim(given, heads), "dtype": getattr(torch, given.dtype)}
        print(plan(graphs[0], given.size, **size).explain())


def show(arguments: list[str]) -> None:
    """The facts of a stack, and its page; without a graph, the tour."""
    parser = _parser("show")
    parser.add_argument("graph", nargs="?", help="an expression, or with commas one for each layer; default: a tour")
    parser.add_argument("--layers", type=int, help="how many; default: those given")
    parser.add_argument("--kv-heads", type=int, help="of keys and values; default: as many as heads")
    parser.add_argument("--model", type=Path, help="a directory with a decoder of hf.load; --text is what it reads")
    parser.add_argument("--text", type=Path, help="a file, of which the first --size tokens are shown (default 256)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the page to a file, and serve nothing")
    parser.add_argument("--facts", action="store_true", help="print the facts alone")
    parser.add_argument("--port", type=int, default=0, help="of the page on this machine (default: a free one)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    given = parser.parse_args(arguments)
    if given.facts and given.save is not None:
        parser.error("--facts prints alone: leave out --save")
    if not 0 <= given.port < 1 << 16:
        parser.error(f"--port must be from 0 to 65535 (got {given.port})")
    with _told(parser):
        data = _shown(given)
        if given.save is not None:
            print(f"page: {Page(data).save(given.save)}")
        if given.save is None and not given.facts:
            serve(data, given.port, given.open)


def _shown(given: argparse.Namespace) -> dict[str, Any]:
    """The data of the page that `show` is asked for; the facts are printed."""
    if (given.model is None) != (given.text is None):
        raise ValueError("--model and --text belong together: a model, and what it reads")
    if given.model is not None:
        return _read(given)
    if given.graph is None:
        if given.facts:
            raise ValueError('--facts are of a graph, such as "Causal() & Window(64, 0)"')
        return {"title": "attngraph: a tour", "tour": tour()}
    graphs, heads = _stack(given)
    if given.layers is not None and given.layers != len(graphs):
        if len(graphs) > 1 or given.layers < 1:
            raise ValueError(f"--layers must be {len(graphs)}, as many as graphs (got {given.layers}): leave it out")
        graphs = graphs * given.layers
    options = {"kv_heads": given.kv_heads, "dtype": getattr(torch, given.dtype)}
    told = facts(graphs, given.size, dim=given.dim, heads=heads, **options)
    print("\n".join([f"{'graph':17}{given.graph}", *(f"{name:17}{fact}" for name, fact in told.items())]), flush=True)
    return {} if given.facts else data_of(graphs, given.size, heads=heads, head_dim=given.dim // heads, facts=told)


def _read(given: argparse.Namespace) -> dict[str, Any]:
    """The page of a model that reads a text."""
    from attngraph import hf
    from attngraph.models import GPT, Model
    from attngraph.models.saved import is_ours
    from attngraph.nn.recording import record

    if given.layers is not None or given.heads is not None or given.kv_heads is not None:
        raise ValueError("--layers, --heads and --kv-heads are the model's own: leave them out beside --model")
    count = 256 if given.size is None else given.size
    if count < 1:
        raise ValueError(f"--size must be 1 or more (got {count})")
    text = given.text.read_text(encoding="utf-8")
    model = Model.load(given.model).eval() if is_ours(given.model) else hf.load(given.model)
    if not isinstance(model, GPT):
        raise ValueError(f"--model must be a decoder, which reads tokens (got {type(model).__name__})")
    if given.graph is not None:
        graphs = parse_list(given.graph)
        model.transformer.graphs = graphs if len(graphs) > 1 else graphs[0]
    tokenizer = given.model / "tokenizer.json"
    if tokenizer.exists():
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(tokenizer))
        tokens = made.encode(text).ids[:count]
        labels = [made.decode([token]) for token in tokens]
    else:  # it reads bytes
        tokens = list(text.encode())[:count]
        labels = [bytes([token]).decode(errors="replace") for token in tokens]
    if not tokens:
        raise ValueError(f"--text must have a token to read (got none in {given.text})")
    if max(tokens) >= model.vocab_size:
        raise ValueError(
            f"the model must know each token of the text, below {model.vocab_size} (got {max(tokens)}); without a "
            f"tokenizer.json in {given.model} they are bytes"
        )
    with torch.no_grad(), record(model, top=16) as recorded:
        model(torch.tensor([tokens]))
    data = page(recorded=recorded, labels=labels).data
    print("\n".join(f"{name:17}{fact}" for name, fact in data["facts"]), flush=True)
    return data


def _parser(command: str) -> Parser:
    parser = Parser(prog=f"python -m attngraph {command}")
    parser.add_argument("--size", type=int, help="how many nodes; where the graph does not know")
    parser.add_argument("--dim", type=int, default=512, help="the width of all heads together (default 512)")
    parser.add_argument("--heads", type=int, help="default: those of the graph, or 8")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    return parser


@contextmanager
def _told(parser: Parser) -> Iterator[None]:
    """What is wrong with what was asked is told in a line."""
    try:
        yield
    except (ValueError, TypeError, MemoryError, OSError) as error:
        parser.error(str(error))


def _stack(given: argparse.Namespace) -> tuple[list[Graph], int]:
    """The graphs that were asked about, and how many heads they have."""
    graphs = parse_list(given.graph)
    heads = next((graph.heads for graph in graphs if graph.heads), 8) if given.heads is None else given.heads
    if given.size is None and all(graph.size[0] is None for graph in graphs):
        raise ValueError("the graph fits any number of nodes: give one, as --size 1024")
    return graphs, heads


def _head_dim(given: argparse.Namespace, heads: int) -> int:
    if heads < 1 or given.dim % heads:
        raise ValueError(f"--dim must be a multiple of --heads (got {given.dim} and {heads})")
    return given.dim // heads


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["calibrate"] and len(arguments) <= 2 and arguments[1:] in ([], ["cpu"], ["cuda"]):
        calibrate(*arguments[1:])
        return
    if arguments and arguments[0] in ("show", "explain"):
        {"show": show, "explain": explain}[arguments[0]](arguments[1:])
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
