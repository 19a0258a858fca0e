"""Decode several tokens at a pass: guesses are the nodes of a tree, and one pass of the model verifies them all.

    python examples/speculative.py                                  the model of `make demo`, trained if it isn't there
    python examples/speculative.py --name mine --prompt "ROMEO:"    that of another run of examples/gpt.py

A model takes little longer for ten tokens than for one. So something cheap guesses how the text goes on, several ways
at a time: a `Tree`, in which each node hears the text and its own ancestors. One pass of the model gives the likeliest
token after each node, and the longest path that agrees with it is text (SpecInfer, Miao et al. 2024). Whatever is
guessed, the text is the one that the model says alone; a good guess saves passes. Two guesses are tried: what followed
the last characters where they stood before (prompt lookup), and a smaller model's likeliest continuations. Of models as
small as these a pass takes much the same time, so the smaller one saves passes alone; a lookup costs nothing.

It prints how long each takes, and leaves runs/NAME-draft, the smaller model, and tree.png, its first guess, in there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import checkpoints
import command_line
import gpt
import reporting
import torch
from torch import Tensor

from attngraph import Tree, Window, draw, generate, speculate
from attngraph.generation import DraftModel, PromptLookup
from attngraph.models import GPT

# ---------------------------------------------------------------------------------------------------------- settings

REPETITIVE = "".join(f"  | row {number} | value | none |\n" for number in range(4))


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=command_line.Help)
    add = parser.add_argument
    add("--name", default="gpt", help="a run of examples/gpt.py, on characters; trained if it isn't there")
    add("--runs", default="runs", help="where runs are kept")
    add("--prompt", default=REPETITIVE, help="what the text goes on from; by default the rows of a table")
    add("--sample", type=int, default=400, help="tokens to make")
    add("--repeats", type=int, default=5, help="times that each is measured; the median counts")
    add("--options", default="", help="further options for the runs that are trained, as in '--steps 100'")
    given = parser.parse_args(arguments)
    command_line.require_at_least(given, parser, sample=1, repeats=1)
    return given


# ------------------------------------------------------------------------------------------------------------ models


def trained(args: argparse.Namespace, name: str, *more: str) -> argparse.Namespace:
    """The settings of a run, which is trained if it isn't there."""
    where = ["--runs", args.runs, "--name", name]
    if not (Path(args.runs) / name / checkpoints.MODEL).exists():
        gpt.train(gpt.settings([*where, *args.options.split(), *more]))
    return gpt.settings([*where, "--resume"])


def load(run: argparse.Namespace) -> GPT:
    """The model of a run, whose nodes hear as many as it has learned to see at once, so that a cache forgets others."""
    model = GPT.load(Path(run.runs) / run.name)
    model.transformer.graphs = [graph & Window(run.context - 1, 0) for graph in model.transformer.graphs]
    return model


# ---------------------------------------------------------------------------------------------------------- decoding


class Decoded:
    """What came out, in how many passes of the model, and in what time."""

    def __init__(self, model: GPT, decode: Callable[[], Tensor], repeats: int):
        self.passes, seconds = 0, []
        hook = model.register_forward_hook(self._count)
        self.tokens = decode()
        hook.remove()
        for _ in range(repeats):
            begin = time.perf_counter()
            decode()
            seconds.append(time.perf_counter() - begin)
        self.seconds = median(seconds)

    def _count(self, *_: object) -> None:
        self.passes += 1


def main(args: argparse.Namespace) -> dict[str, Decoded]:
    """Decode alone, with a lookup, and with a smaller model; print how they compare."""
    run = trained(args, args.name)
    small = trained(args, f"{args.name}-draft", "--layers", "1", "--width", "64", "--heads", "2")
    model, draft = load(run), load(small)
    tokens = gpt.tokenizer(run.tokenizer, gpt.read_text(run.text)[0])
    prompt = torch.tensor([tokens.encode(args.prompt)])
    longest = prompt.shape[1] + args.sample

    ways: dict[str, Callable[[], Tensor]] = {
        "alone": lambda: generate(model, prompt, args.sample, temperature=0),
        "prompt lookup": lambda: speculate(model, prompt, args.sample, draft=PromptLookup()),
        "smaller model": lambda: speculate(model, prompt, args.sample, draft=DraftModel(draft, longest)),
    }
    found = {name: Decoded(model, decode, args.repeats) for name, decode in ways.items()}
    alone = found["alone"]
    print(f"{'-' * 80}\n{tokens.decode(alone.tokens[0].tolist())}\n{'-' * 80}")
    for name, way in found.items():
        same = "the same text" if torch.equal(way.tokens, alone.tokens) else "ANOTHER TEXT"
        print(
            f"{name:14} {way.passes:4} passes  {args.sample / way.seconds:6,.0f} tokens/s  "
            f"{alone.seconds / way.seconds:4.1f} × alone  {same}"
        )

    guess = DraftModel(draft, longest)(prompt[0], args.sample)
    labels = [repr(tokens.decode([token]))[1:-1] for token in guess.tokens]
    folder = Path(args.runs) / small.name
    reporting.save_picture(draw.connectivity(Tree(guess.parents), labels=labels), folder / "tree.png")
    print(reporting.left_in(folder))
    return found


if __name__ == "__main__":
    main(settings())
