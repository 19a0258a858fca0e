"""What a sparse graph costs in quality: the validation loss of one GPT on several graphs, against the edges they keep.

    python -m benchmarks.quality                    three minutes on two cores
    python -m benchmarks.quality --steps 3000       nearer to the end of learning

The model and the recipe are those of examples/gpt.py, smaller and with a context of 256 characters; all graphs get the
same steps, tokens, seeds and batches, and nothing is tuned to any of them. But for the first, the graphs keep about as
many edges as each other.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator

from attngraph import parse
from benchmarks import pictures
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import Progress, isolated, now
from benchmarks.page import Keep, picture, prose, table
from benchmarks.train_gpt import demo

NAME = "quality"
CONTEXT, BATCH = 256, 8
GRAPHS = {
    "causal": "Causal()",
    "window": "Window(31, 0)",
    "window + sinks": "Causal() & (Window(27, 0) | Prefix(4))",
    "strided": "Causal() & (Window(23, 0) | Strided(16))",
    "BigBird, causal": "Causal() & (Window(19, 0) | Global([0, 1, 2, 3]) | Random(16))",
}


def trained(progress: Progress, graph: str, seed: int, options: Namespace) -> dict:
    """The validation loss over the whole validation text, in nats a character, and the seconds it took."""
    progress({}, 7200.0)
    size = f"--layers 3 --heads 4 --width 64 --context {CONTEXT} --batch {BATCH} --sample 1 --seed {1_000_000 * seed}"
    more = ["--steps", str(options.steps), "--evaluate-every", str(options.steps), "--device", options.device]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return demo(options, *size.split(), *more, "--graph", graph)


def run(options: Namespace) -> Iterator[Figures]:
    """Seed by seed all graphs, so that whatever there was time for can be compared."""
    found: Figures = {}
    for seed in range(1, options.seeds + 1):
        for name, text in GRAPHS.items():
            if now() > options.until:
                break
            one = isolated(trained, text, seed, options, seconds=7200.0, gib=12.0)
            known = found.setdefault(name, {"graph": text, "context": CONTEXT, "steps": options.steps, "losses": []})
            known |= {key: one[key] for key in ("failure", "parameters", "source") if key in one}
            known["losses"] += [round(one["validation_loss"], 4)] if "validation_loss" in one else []
            edges, tokens = parse(text).num_edges(CONTEXT, CONTEXT), options.steps * BATCH * CONTEXT
            yield {name: {**known, "edges": edges, "tokens": tokens}}


def render(records: Records, keep: Keep) -> Iterator[str]:
    """What the missing edges cost in quality."""
    found = {name: each for name, each in records[NAME].items() if each["losses"]}
    if not found:
        return
    one = next(iter(found.values()))
    context, pairs = one["context"], one["context"] * (one["context"] + 1) // 2
    yield from ["## What it costs in quality", ""]
    yield from prose(f"""
        The same GPT ({one["parameters"]:,} parameters, 3 layers, context {context}) with the same {one["steps"]:,}
        steps, {one["tokens"]:,} characters, seeds and batches, on {one["source"]}: the loss over the whole validation
        text. A bar that lies within the dots of another tells nothing.
    """)
    yield from picture(keep, NAME, pictures.quality(found, context), "validation loss against the edges kept")
    rows = []
    for name, each in found.items():
        edges, losses = f"{each['edges']:,} ({each['edges'] / pairs:.0%})", each["losses"]
        mean, texts = sum(losses) / len(losses), [f"{loss:.4f}" for loss in losses]
        rows.append([name, f"`{each['graph']}`", edges, f"{mean:.4f}", ", ".join(texts)])
    yield from table(["", "graph", "edges kept", "validation loss, mean", "of each seed"], rows)


OPTIONS: dict[str, dict] = {
    "steps": {"type": int, "default": 250, "help": "of training, 2,048 characters each"},
    "seeds": {"type": int, "default": 2, "help": "runs of each graph"},
    "text": {"help": "a text file; by default that of examples/gpt.py"},
    "device": {},
}
EXPERIMENT = Experiment(NAME, __doc__, run, render, OPTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()
