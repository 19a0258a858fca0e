"""Train gpt.py's own model to fill in characters that are masked: what makes it BERT is one line, its graph.

    python examples/bert.py                                Full(), and beside it the same under Causal()
    python examples/bert.py --name bert --resume --steps 1200      longer
    python examples/bert.py --graph "Window(8, 8)" --against "Window(16, 0)"       as many edges, on one side or both

The text, its tokens, the model and the pictures are those of examples/gpt.py. Everything is left in runs/NAME:
config.json, metrics.csv, accuracy.png, connectivity.png, attention.png, heads.png, see.html, filled.txt,
outcome.json, and the model, for GPT.load and for --resume, model.safetensors and optimizer-STEP.safetensors; and in
runs/NAME-against what the other graph led to.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import checkpoints
import command_line
import gpt
import optimization
import reporting
import torch
import training
from torch import Tensor
from torch.nn.functional import cross_entropy

from attngraph.models import GPT


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: gpt.py's model, another graph, and how much is masked."""
    quick = {"steps": 200, "layers": 2, "width": 64, "context": 32, "batch": 64, "adamw_lr": 0.02}
    parser = command_line.parser_of(
        __doc__,
        free=("text", "against"),
        quick=quick,
        name="bert",
        draws=True,
        batch=32,
        steps=600,
        evaluate_every=150,
        adamw_lr=0.02,
    )
    add = parser.add_argument
    add("--text", type=os.path.abspath, help="UTF-8 text; by default tiny Shakespeare, or the text that Python ships")
    add("--tokenizer", default="char", help="char, byte, or the path of a tokenizer.json")
    add("--graph", default="Full()", help="who hears whom; one for each layer, separated by commas")  # the one line
    add("--against", default="Causal()", help="train the same on this graph too, and compare; '' for none")
    add("--layers", type=int, default=4, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=128, help="of the nodes' vectors")
    add("--context", type=int, default=128, help="tokens that the model sees at once")
    add("--masked", type=float, default=0.15, help="share of the tokens that are masked")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, layers=1, heads=1, width=1, context=2)
    command_line.require_heads(given, parser, even=True)
    if not 0 < given.masked < 1:
        parser.error(f"--masked must be between 0 and 1 (got {given.masked})")
    command_line.require_graphs(given, parser)
    return given


def hidden(tokens: Tensor, share: float, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The tokens with some of them masked, and which."""
    which = torch.rand(tokens.shape, generator=generator) < share
    return tokens.masked_fill(which, mask), which


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    text, source = gpt.read_text(args.text)
    tokens = gpt.tokenizer(args.tokenizer, text)
    corpus, mask = gpt.Corpus(tokens.encode(text), args.context), len(tokens)
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    try:
        model = gpt.build(argparse.Namespace(**vars(args), model="gpt"), len(tokens) + 1).to(device)
        assert isinstance(model, GPT)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"text      {source}: {len(text):,} characters, {len(tokens)} different tokens and a mask")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}")

    def loss(number: int) -> Tensor:
        chance = training.batch_generator(args, number)
        whole = corpus.batch(args.batch, chance)[0]
        seen, which = hidden(whole, args.masked, mask, chance)
        return cross_entropy(model(seen.to(device))[which.to(device)].float(), whole[which].to(device))

    def accuracy() -> float:
        generator, right, total = torch.Generator().manual_seed(0), 0, 0  # the same holes for every model
        for whole, _ in corpus.validation_batches(size=max(1, 4096 // args.context)):
            seen, which = hidden(whole, args.masked, mask, generator)
            right += int((model(seen.to(device)).argmax(-1).cpu()[which] == whole[which]).sum())
            total += int(which.sum())
        return 100 * right / total

    task = training.Task(
        model,
        loss,
        accuracy,
        device,
        identity=gpt.identity_of(tokens, text.encode()),
        record={"example": "bert", "source": source},
        per_batch=args.batch * args.context,
        score="validation_accuracy",
        free=(*command_line.FREE, "text", "against"),
        changed={"text_hash": f"{source} is not the text that the run was trained on, or changed since"},
    )
    with checkpoints.only_run(args):
        score, metrics = training.fit(args, task)
        print(
            f"{score:.2f}% of the masked characters of the whole validation text right, after {metrics.seconds:.0f} s"
        )
        report(Path(args.runs) / args.name, args, model.eval(), corpus, tokens, metrics, device)
    commonest = 100 * float((corpus.validation == corpus.training.mode().values).float().mean())
    edges = reporting.edges_of(model.transformer.graphs, args.context)
    return {
        "validation_accuracy": score, "seconds": metrics.seconds, "commonest": commonest, "edges": edges,
        "source": source,
    }  # fmt: skip


def report(
    folder: Path,
    args: argparse.Namespace,
    model: GPT,
    corpus: gpt.Corpus,
    tokens: gpt.Tokenizer,
    metrics: training.Metrics,
    device: torch.device,
) -> None:
    """A text whose holes are filled, and pictures."""
    whole = corpus.validation[: args.context]
    seen, which = hidden(whole[None], args.masked, len(tokens), torch.Generator().manual_seed(0))
    with torch.no_grad():
        guess = torch.where(which[0], model(seen.to(device))[0, :, :-1].argmax(-1).cpu(), whole)
    characters = [tokens.decode([token]) for token in whole.tolist()]
    masked = "".join("▁" if hole else text for text, hole in zip(characters, which[0].tolist(), strict=True))
    filled = f"{masked}\n{'-' * 40}\n{''.join(tokens.decode([token]) for token in guess.tolist())}\n"
    checkpoints.write_whole(folder / "filled.txt", lambda path: path.write_text(filled, encoding="utf-8"))
    curve = reporting.loss_curve(metrics, f"masked characters, {args.graph}", "loss [nats a mask]", "masks right [%]")
    reporting.save_picture(curve, folder / "accuracy.png")
    graphs = model.transformer.graphs
    reporting.save_connectivity(graphs, min(args.context, 64), folder / "connectivity.png")
    gpt.draw_attention(folder, model, whole[:48].to(device), tokens, command_line.chosen_head(args))
    print(f"{'-' * 80}\n{filled}{'-' * 80}")


def main(args: argparse.Namespace) -> dict:
    """Both graphs, if there are two."""
    figures = train(args)
    others = {"the commonest character": figures["commonest"]}
    if args.against:
        name = f"{args.name}-against"
        begun = args.resume and (Path(args.runs) / name / checkpoints.MODEL).exists()  # or the first was stopped before
        other = argparse.Namespace(**{**vars(args), "graph": args.against, "name": name, "resume": begun})
        print(f"\nthe same model and budget under {args.against}:")
        figures["against"] = train(other)["validation_accuracy"]
        better = figures["validation_accuracy"] - figures["against"]
        print(f"{args.graph} is right {better:.1f} points more often than {args.against}")
        others = {args.against: figures["against"], **others}
    score, seconds, edges = (figures[name] for name in ("validation_accuracy", "seconds", "edges"))
    told = reporting.Outcome("masked characters right [%]", score, others, args.graph, edges, seconds, "accuracy.png")
    reporting.tell(Path(args.runs) / args.name, told)
    return figures


if __name__ == "__main__":
    main(settings())
