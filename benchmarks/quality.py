"""What a sparse graph costs in quality: the validation loss of one GPT on several graphs, against the edges they keep.

    python -m benchmarks.quality                    three minutes on two cores
    python -m benchmarks.quality --steps 3000       nearer to the end of learning

The model and the recipe are those of examples/gpt.py, smaller and with a context of 256 characters; all graphs get the
same steps, tokens, seeds and batches, and nothing is tuned to any of them. But for the first, the graphs keep about as
many edges as each other.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from attngraph import parse
from benchmarks.measure import RESULTS, isolated, record

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt as example
import training

from benchmarks.train_gpt import named

NAME = "quality"
CONTEXT = 256
GRAPHS = {
    "causal": "Causal()",
    "window": "Window(31, 0)",
    "window + sinks": "Causal() & (Window(27, 0) | Prefix(4))",
    "strided": "Causal() & (Window(23, 0) | Strided(16))",
    "BigBird, causal": "Causal() & (Window(19, 0) | Global([0, 1, 2, 3]) | Random(16))",
}


def trained(progress, graph: str, seed: int, steps: int, text: str | None, device: str) -> dict:
    """The validation loss over the whole validation text, in nats a character, and the seconds it took."""
    progress({}, 7200.0)
    size = f"--layers 3 --heads 4 --width 64 --context {CONTEXT} --batch 8 --steps {steps} --seed {seed}"
    with (
        tempfile.TemporaryDirectory() as runs,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),  # progress bars
    ):
        given = [*size.split(), "--evaluate-every", str(steps), "--graph", graph, "--runs", runs, "--device", device]
        args = example.settings([*given, *(["--text", text] if text else [])])
        content, source = example.read_text(args.text)
        tokens = example.tokenizer("char", content)
        corpus, device = example.Corpus(tokens.encode(content), CONTEXT), torch.device(args.device)
        torch.manual_seed(seed)
        model = example.build(args, len(tokens)).to(device)

        def loss(number: int) -> Tensor:
            inputs, targets = corpus.batch(args.batch, seed=1_000_000 * seed + number)
            return example.loss_of(model, inputs.to(device), targets.to(device))

        def evaluate() -> float:
            return example.evaluate(model, corpus, device)

        score, metrics = training.fit(args, training.Task(model, loss, evaluate, device, identity={}, record={}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = {"parameters": parameters, "tokens": steps * args.batch * CONTEXT, "source": named(content, source)}
    return {"loss": score, "seconds": metrics.seconds, **known}


def run(options: argparse.Namespace) -> Path:
    """Seed by seed all graphs, so that whatever there was time for can be compared."""
    path, found = options.out / f"{NAME}.json", {}
    for seed in range(1, options.seeds + 1):
        for name, text in GRAPHS.items():
            if time.monotonic() > options.until:
                break
            arguments = text, seed, options.steps, options.text, options.device
            one = isolated(trained, *arguments, seconds=7200.0, gib=12.0)
            print(f"{name}, seed {seed}: " + (one.get("failure") or f"{one['loss']:.4f} after {one['seconds']:.0f} s"))
            known = found.setdefault(name, {"graph": text, "context": CONTEXT, "steps": options.steps, "losses": []})
            known["edges"] = parse(text).num_edges(CONTEXT, CONTEXT)
            known |= {key: one[key] for key in ("failure", "parameters", "tokens", "source") if key in one}
            known["losses"] += [round(one["loss"], 4)] if "loss" in one else []
            path = record(NAME, {name: known}, options.out, options.device)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=250, help="of 2,048 characters each")
    parser.add_argument("--seeds", type=int, default=2, help="how many runs of each graph")
    parser.add_argument("--text", help="a text file; by default that of examples/gpt.py")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    options.until = math.inf
    print(f"recorded in {run(options)}")


if __name__ == "__main__":
    main()
