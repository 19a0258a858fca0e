"""The command line of every training run: what all of them have, what is wrong told, and a run's settings resumed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from processes import processes
from reporting import settled

from attngraph import Graph, analysis, parse_list

PLACE = ("name", "runs", "resume", "quick")  # where a run is; the others are kept in its config.json
FREE = (*PLACE, "draw_attention")  # of a run that is resumed
LATER = ("steps", "device")  # may be others when a run goes on: more steps, on another device
MOST = 2**31 - 1  # of any number

GRAPHS = """graphs:
  who hears whom, as an expression that attngraph.parse reads; in a shell, between quotes
    Causal() Full() Window(left, right) Prefix(length) Strided(stride) Chunks(chunk)
    ChunkEnds(chunk, length) Random(degree): of any size
    a & b, a | b, a - b, a ^ b, ~a, a.T, a @ b: combined; PerHead([a, b]): one for each head
    "a, b, c, d": one for each layer
  documented, with pictures, in docs/graphs.md and docs/algebra.md; in Python, by help(attngraph)
"""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Text as it is written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False or "by default" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line; of a run that is resumed, the `free` settings may be others."""

    free: tuple[str, ...] = FREE
    quick: Mapping[str, Any] = MappingProxyType({})  # the defaults under --quick
    reading: Path | None = None  # the file that the arguments are from

    def error(self, message: str) -> NoReturn:
        super().error(message if self.reading is None else f"{self.reading}: {message}")


def parser_of(
    doc: str | None,
    free: tuple[str, ...] = (),
    quick: Mapping[str, Any] = MappingProxyType({}),
    draws: bool = False,
    **defaults: Any,
) -> Parser:
    """A command line, described by `doc`, with what all runs have, and these defaults; or `quick` ones, by --quick.

    `draws`: a head's attention, which can be chosen.
    """
    parser = Parser(description=doc, epilog=GRAPHS, formatter_class=Help, allow_abbrev=False)
    anew = ", ".join(f"--{name.replace('_', '-')}" for name in ("device", *free))
    add = parser.add_argument
    add("--name", help="the run's folder below --runs")
    add("--runs", default="runs", help="where runs are kept; else only downloads are, in the user's cache")
    resume = f"go on from the run's checkpoint, by its own settings; others may be {anew}, and --steps, if more"
    add("--resume", action="store_true", help=resume)
    if quick:
        told = {name: " ".join(value) if isinstance(value, list) else value for name, value in quick.items()}
        short = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in told.items())
        add("--quick", action="store_true", help=f"seconds, enough to see what happens: as {short}")
    add("--batch", type=int, help="examples in each forward pass")
    add("--accumulate", type=int, default=1, help="forward passes for each step, of all processes that torchrun starts")
    add("--steps", type=int, help="of the optimiser; the rates fall to 0 at the last")
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="for the matrices; vectors always have AdamW")
    add("--lr", type=float, default=None, help="peak rate of the matrices; by default 0.02 for muon, 0.001 for adamw")
    add("--adamw-lr", type=float, default=0.003, help="peak rate of embeddings, head and vectors")
    add("--warmup", type=int, default=20, help="steps in which the rates rise from 0")
    add("--weight-decay", type=float, default=0.0, help="of the matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    add("--dropout", type=float, default=0.0, help="probability with which weights and features are dropped")
    add("--seed", type=int, default=1337, help="of weights, batches and samples")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: what trains faster here")
    add("--evaluate-every", type=int, help="steps between evaluations and checkpoints")
    if draws:
        add("--draw-attention", metavar="LAYER.HEAD", help="whose attention is drawn, from 0, as in 2.3")
    parser.set_defaults(**defaults)
    parser.free, parser.quick = (*FREE, *LATER, *free), quick
    return parser


def parsed(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    """The settings; those of the run that is to go on, if it is to. What can't be is told before anything begins."""
    given = parser.parse_args(arguments)
    if parser.quick and given.quick:
        parser.set_defaults(**parser.quick)
        given = parser.parse_args(arguments)
    if given.resume:
        unset = argparse.Namespace(**dict.fromkeys(vars(given)))
        given = resumed(given, vars(parser.parse_args(arguments, unset)), parser)
    least = dict.fromkeys(("warmup", "clip", "dropout", "weight_decay", "adamw_lr", "lr"), 0)
    require_at_least(given, parser, **least, batch=1, accumulate=1, steps=1, evaluate_every=1, seed=-MOST)
    if given.dropout >= 1:
        parser.error(f"--dropout must be a probability below 1 (got {given.dropout})")
    if given.accumulate % (count := processes().count):
        parser.error(f"--accumulate must be a multiple of the {count} processes (got {given.accumulate})")
    if given.device not in ("auto", "cpu", "mps") and not given.device.startswith("cuda"):
        parser.error(f"--device must be auto, cpu, cuda or mps (got {given.device})")
    require_name(given, parser)
    chosen_head(given, parser)
    return given


def require_at_least(given: argparse.Namespace, parser: argparse.ArgumentParser, **least: float) -> None:
    """An error for settings that are below what they must be, or above all reason."""
    for name, bound in least.items():
        value = getattr(given, name)
        if value is not None and not value >= bound:
            parser.error(f"--{name.replace('_', '-')} must be {bound} or more (got {value})")
        if value is not None and value > MOST:
            parser.error(f"--{name.replace('_', '-')} must be {MOST} or less (got {value})")


def require_graphs(
    given: argparse.Namespace,
    parser: argparse.ArgumentParser,
    read: Callable[[str], object] | None = None,
    names: Iterable[str] = ("graph", "against"),
) -> None:
    """An error unless --graph, and what --against names, can be read: as `layer_graphs` does, if not said otherwise."""
    for name in names:
        texts = getattr(given, name)
        for text in texts if isinstance(texts, list) else [texts] if texts or name == "graph" else []:
            try:
                read(text) if read is not None else layer_graphs(text, given.layers, heads=given.heads)
            except ValueError as error:
                told = str(error)
                own = told.startswith("--graph ")
                parser.error(f"--{name} {told.removeprefix('--graph ')}" if own else f"--{name}: {told}")


def require_causal(given: argparse.Namespace, parser: argparse.ArgumentParser, nodes: int, why: str) -> None:
    """An error if somebody hears a later node under --graph or --against: `why` says what would be known then."""
    for name in ("graph", "against"):
        texts = getattr(given, name)
        for text in texts if isinstance(texts, list) else filter(None, [texts]):
            if not all(analysis.is_causal(graph, nodes) for graph in settled(parse_list(text), nodes)):
                parser.error(f"--{name} must not hear later nodes, which say {why} (got {text})")


def require_name(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """An error unless --name is that of a folder below --runs."""
    if given.name != Path(given.name).name or given.name in ("", ".", ".."):
        parser.error(f"--name must be the name of a folder below --runs, without any other (got {given.name!r})")


def require_heads(given: argparse.Namespace, parser: argparse.ArgumentParser, even: bool = False) -> None:
    """An error unless each head has as many features, an even number where they are turned in pairs."""
    if given.width % (given.heads * (1 + even)):
        times = "2 × --heads" if even else "--heads"
        parser.error(f"--width must be a multiple of {times} (got --width {given.width} --heads {given.heads})")


def resumed(given: argparse.Namespace, explicit: dict[str, Any], parser: Parser) -> argparse.Namespace:
    """The settings of the run that is to go on; one that is given beside --resume must be the same."""
    path = Path(given.runs) / given.name / "config.json"
    if not path.exists():
        parser.error(f"nothing to resume: {path} does not exist")
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        saved, default = whole["settings"], parser.get_default
        maker = whole.get("example", default("name"))
        missing = sorted(
            name
            for name in {*vars(given)} - {*FREE}
            if name not in saved or (saved[name] is None and default(name) is not None)
        )
        arguments = as_arguments(saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f"{path} is damaged, it holds no settings ({type(error).__name__}: {error})")
    if maker != default("name"):
        parser.error(f"{path} is of a run of examples/{maker}.py, which resumes it (this is {default('name')}.py)")
    if missing:
        parser.error(f"{path} is damaged, it lacks the settings {', '.join(missing)}")
    parser.reading = path
    saved = {name: value for name, value in vars(parser.parse_args(arguments)).items() if name in saved}
    parser.reading = None
    for name, value in explicit.items():
        if value is not None and name not in parser.free and value != saved[name]:
            parser.error(
                f"--resume goes on with the run's settings, and --{name.replace('_', '-')} was {saved[name]} "
                f"(got {value}); start another run with another --name"
            )
    if explicit["steps"] is not None and explicit["steps"] < saved["steps"]:
        parser.error(f"--steps was {saved['steps']}, and a run can only go on for more (got {explicit['steps']})")
    wanted = {name: explicit[name] for name in parser.free if explicit.get(name) is not None}
    return argparse.Namespace(**{**vars(given), **saved, **wanted})


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """The command line that says the same."""
    arguments = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


def layer_graphs(
    text: str, layers: int, size: tuple[int, int] | None = None, heads: int | None = None
) -> Graph | list[Graph]:
    """--graph: one graph, or one for each layer; it must fit any length, or be of this size, and have as many heads."""
    graphs = parse_list(text)
    for graph in graphs:
        if size is None and graph.size != (None, None):
            raise ValueError(f"--graph must fit any number of nodes, and {graph} has size {graph.size}")
        if size is not None and any(own not in (None, wanted) for own, wanted in zip(graph.size, size, strict=True)):
            raise ValueError(f"--graph must fit {size[0]} nodes, and {graph} has size {graph.size}")
        if heads is not None and graph.heads not in (None, heads):
            raise ValueError(f"--graph must have the {heads} heads of --heads, and {graph} has {graph.heads}")
    if len(graphs) not in (1, layers):
        raise ValueError(f"--graph must be one graph, or one for each of {layers} layers (got {len(graphs)})")
    return graphs[0] if len(graphs) == 1 else graphs


def chosen_head(given: argparse.Namespace, parser: argparse.ArgumentParser | None = None) -> tuple[int, int] | None:
    """--draw-attention: a layer and one of its heads, both from 0; None for the example's own choice."""
    if getattr(given, "draw_attention", None) is None:
        return None
    layer, _, head = given.draw_attention.partition(".")
    if parser is not None and not (layer.isdecimal() and head.isdecimal()):
        parser.error(f"--draw-attention must be a layer and a head, as in 2.3 (got {given.draw_attention})")
    if parser is not None and not (int(layer) < given.layers and int(head) < given.heads):
        last = f"{given.layers - 1}.{given.heads - 1}"
        parser.error(f"--draw-attention must be from 0.0 to {last} (got {given.draw_attention})")
    return int(layer), int(head)
