"""Write a draft, then a better draft: masked diffusion is gpt.py's model on a graph that hears both sides.

    python examples/diffusion.py                            Full(), and beside it left to right under Causal()
    python examples/diffusion.py --graph "Window(16, 16)"   who is near, alone
    python examples/diffusion.py --name diffusion --resume --steps 4000      longer

The model learns characters that are masked, from one to all (MDLM, Sahoo et al. 2024; LLaDA, Nie et al. 2025): the
mean of their loss bounds what a text costs, and attngraph.unmask writes with it, in any order and any number of steps.
Beside it, under --against, the same model learns the next character, as that graph is causal. It judges the drafts,
and so does the number of distinct words: what is sure is also dull.

The text and its tokens are those of examples/gpt.py. Everything is left in runs/NAME: config.json, metrics.csv,
outcome.json, loss.png, drafts.png, drafts.txt, connectivity.png, and the model, for GPT.load and for --resume:
model.safetensors and optimizer-STEP.safetensors; and in runs/NAME-against what the other graph led to.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import bert
import checkpoints
import command_line
import gpt
import optimization
import reporting
import torch
import training
from torch import Tensor
from torch.nn.functional import cross_entropy

from attngraph import Graph, analysis, draw, generate
from attngraph.generation import drafts
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 0.15  # of the tokens are masked at first, at most
ORDERS = {  # what of a draft is kept for the next
    "random order": {"order": "random"},
    "surest first": {"order": "confidence"},
    "surest first, remasked": {"order": "confidence", "remask": 0.3},
}


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: gpt.py's model, another graph, and how drafts are made."""
    quick = {"steps": 80, "evaluate_every": 40, "layers": 2, "width": 64, "context": 64, "batch": 32, "drafts": 16}
    parser = command_line.parser_of(
        __doc__, free=("text", "against", "drafts", "samples"), quick=quick,
        name="diffusion", batch=32, steps=1000, evaluate_every=500, adamw_lr=0.02,
    )  # fmt: skip
    add = parser.add_argument
    add("--text", type=os.path.abspath, help="UTF-8 text; by default tiny Shakespeare, or the text that Python ships")
    add("--tokenizer", default="char", help="char, byte, or the path of a tokenizer.json")
    add("--graph", default="Full()", help="who hears whom; one for each layer, separated by commas")  # the one line
    add("--against", default="Causal()", help="train the same on this graph too, which judges drafts; '' for none")
    add("--layers", type=int, default=4, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=128, help="of the nodes' vectors")
    add("--context", type=int, default=128, help="tokens that the model sees at once")
    add("--drafts", type=int, default=64, help="of each text, the last of which is kept")
    add("--samples", type=int, default=32, help="texts that are written")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, layers=1, heads=1, width=1, context=2, drafts=1, samples=1)
    command_line.require_heads(given, parser, even=True)
    command_line.require_graphs(given, parser)
    if left_to_right(command_line.parse_list(given.graph), given.context):
        parser.error(f"--graph must hear both sides (got {given.graph}); gpt.py is for graphs that do not")
    return given


# ------------------------------------------------------------------------------------------------------------- model


def build(args: argparse.Namespace, vocab_size: int) -> GPT:
    """gpt.py's model; its positions turn faster, as a mask knows of its neighbours by their places alone."""
    config = TransformerConfig(
        embed_dim=args.width,
        num_layers=args.layers,
        num_heads=args.heads,
        norm="rms",
        activation="squared_relu",
        bias=(),
        qk_norm=True,
        position="rotary",
        rotary_base=100.0,
        dropout=args.dropout,
        init="zero",
    )
    return GPT(config, vocab_size, command_line.layer_graphs(args.graph, args.layers), tied=False)


# --------------------------------------------------------------------------------------------------------- diffusion


def holes(shape: tuple[int, int], generator: torch.Generator, most: float = 1.0) -> Tensor:
    """Of each of B texts, from 1 to all N tokens, or this share of them, evenly spread over the batch: bool (B, N)."""
    batch, length = shape
    share = most * (torch.randperm(batch, generator=generator) + torch.rand(1, generator=generator)) / batch
    count = (share * length).long().clamp(max=length - 1) + 1
    return torch.rand(shape, generator=generator).argsort(1).argsort(1) < count[:, None]


def bound(model: GPT, whole: Tensor, mask: int, generator: torch.Generator, most: float = 1.0) -> Tensor:
    """Nats a token that a text costs at most, (B, N) → (); or that alone of its terms with few holes, up to `most`.

    In a random order, -log p(x) ≤ E Σᵢ -log p(xᵢ | those before it), whose terms are those of k = N … 1 masked tokens:
    N times the mean over k of the mean loss of a masked token (Uria et al. 2014, Hoogeboom et al. 2022).
    """
    which = holes((whole.shape[0], whole.shape[1]), generator, most)
    device = model.head.weight.device
    logits = model(whole.masked_fill(which, mask).to(device))[which.to(device)].float()
    weight = (1 / which.sum(1, keepdim=True)).expand(which.shape)[which].to(device)
    return (cross_entropy(logits, whole[which].to(device), reduction="none") * weight).sum() / len(whole)


def left_to_right(graphs: Iterable[Graph], context: int) -> bool:
    """Whether nobody hears what comes later: then the next token can be learned, and there is no mask."""
    return all(analysis.is_causal(graph, context) for graph in reporting.settled(graphs, context))


@torch.no_grad()
def nats(model: GPT, corpus: gpt.Corpus, mask: int, passes: int = 1) -> float:
    """Nats a token of the validation text; of masked tokens a bound, with the same holes for every model."""
    device = model.head.weight.device
    if left_to_right(model.transformer.graphs, corpus.context):
        return gpt.evaluate(model, corpus, device)
    generator, total, count = torch.Generator().manual_seed(0), 0.0, 0
    for _ in range(passes):
        for whole, _ in corpus.validation_batches(size=max(1, 4096 // corpus.context)):
            total += float(bound(model, whole, mask, generator)) * whole.numel()
            count += whole.numel()
    return total / count


@torch.no_grad()
def filled(model: GPT, corpus: gpt.Corpus, mask: int, share: float) -> float:
    """How many of the validation text's tokens are right where so many are masked, in percent."""
    generator, right, total = torch.Generator().manual_seed(0), 0, 0
    device = model.head.weight.device
    for whole, _ in corpus.validation_batches(size=max(1, 4096 // corpus.context)):
        seen, which = bert.hidden(whole, share, mask, generator)
        right += int((model(seen.to(device)).argmax(-1).cpu()[which] == whole[which]).sum())
        total += int(which.sum())
    return 100 * right / total


class Trained(NamedTuple):
    model: GPT
    bits: float
    """A character of the validation text; at most, unless it is left to right."""
    metrics: training.Metrics
    edges: int


def train(args: argparse.Namespace, text: str, source: str, tokens: gpt.Tokenizer, corpus: gpt.Corpus) -> Trained:
    """Train under --graph, left to right if it is causal, and leave a checkpoint in the run's folder."""
    device, mask = optimization.best_device(args.device), len(tokens)
    torch.manual_seed(args.seed)
    try:
        graphs = command_line.layer_graphs(args.graph, args.layers)
        causal = left_to_right(graphs if isinstance(graphs, list) else [graphs], args.context)
        model = build(args, len(tokens) + (not causal)).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    edges = reporting.edges_of(model.transformer.graphs, args.context)
    learns = "the next token" if causal else "masked tokens"
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}, learns {learns}")

    def loss(number: int) -> Tensor:
        """Of few masked tokens at first, which are soon learned; of as many as there are from half of the steps on."""
        chance, done = training.batch_generator(args, number), number / (args.accumulate * args.steps)
        whole, following = corpus.batch(args.batch, chance)
        if causal:
            return gpt.loss_of(model, whole.to(device), following.to(device))
        return bound(model, whole, mask, chance, most=min(1.0, FEW + 2 * (1 - FEW) * done))

    task = training.Task(
        model,
        loss,
        lambda: nats(model, corpus, mask),
        device,
        identity=gpt.identity_of(tokens, text.encode()),
        record={"example": "diffusion", "source": source, "edges": edges},
        per_batch=args.batch * args.context,
        free=(*command_line.FREE, "text", "against", "drafts", "samples"),
        changed={"text_hash": f"{source} is not the text that the run was trained on, or changed since"},
    )
    _, metrics = training.fit(args, task)
    per_token = len(tokens.decode(corpus.validation.tolist())) / len(corpus.validation)
    return Trained(model.eval(), nats(model, corpus, mask, passes=4) / math.log(2) / per_token, metrics, edges)


def main(args: argparse.Namespace) -> dict:
    """Both graphs, if there are two; then drafts."""
    text, source = gpt.read_text(args.text)
    if not text.strip():
        raise SystemExit(f"{source} is empty; there is nothing to learn")
    tokens = gpt.tokenizer(args.tokenizer, text)
    corpus = gpt.Corpus(tokens.encode(text), args.context)
    print(f"text      {source}: {len(text):,} characters, {len(tokens)} different tokens and a mask")
    with checkpoints.only_run(args):
        ours, other = train(args, text, source, tokens, corpus), None
        if args.against:
            name = f"{args.name}-against"
            begun = args.resume and (Path(args.runs) / name / checkpoints.MODEL).exists()  # or the first was stopped
            against = argparse.Namespace(**{**vars(args), "graph": args.against, "name": name, "resume": begun})
            print(f"\nthe same model and budget under {args.against}:")
            with checkpoints.only_run(against):
                other = train(against, text, source, tokens, corpus)
        return report(args, tokens, corpus, ours, other)


# ------------------------------------------------------------------------------------------------------------ drafts


class Judged(NamedTuple):
    """What is told of texts: by a model that writes left to right, and of their words."""

    bits: float
    """A token, as the judge would code it; nan without one."""
    distinct: float
    """Words of which no two are alike, in percent of all that are whole."""


@torch.no_grad()
def judged(judge: GPT | None, texts: Tensor, tokens: gpt.Tokenizer) -> Judged:
    bits = math.nan
    if judge is not None:
        texts = texts.to(judge.head.weight.device)
        bits = float(gpt.loss_of(judge, texts[:, :-1], texts[:, 1:])) / math.log(2)
    words = [word for row in texts.tolist() for word in tokens.decode(row).split()[1:-1]]
    return Judged(bits, 100 * len(set(words)) / max(len(words), 1))


def written(args: argparse.Namespace, model: GPT, mask: int) -> dict[str, list[Tensor]]:
    """All drafts of the same number of texts, by the order in which they are kept."""
    device = model.head.weight.device
    empty, found = torch.full((args.samples, args.context), mask, device=device), {}
    for name, order in ORDERS.items():
        chance = torch.Generator(device).manual_seed(args.seed)
        made = drafts(model, empty, mask, steps=args.drafts, generator=chance, **order)
        found[name] = [draft.tokens for draft in made]
    return found


def compared(
    args: argparse.Namespace, judge: GPT | None, corpus: gpt.Corpus, tokens: gpt.Tokenizer
) -> dict[str, Judged]:
    """Real text, and what the judge itself writes, in as many characters."""
    count = max(1, min(args.samples, len(corpus.validation) // args.context))
    real = corpus.validation[: count * args.context].view(count, -1)
    found = {"real text": judged(judge, real, tokens)}
    if judge is not None:
        begin, device = real[:, :1], judge.head.weight.device
        chance = torch.Generator(device).manual_seed(args.seed)
        own = generate(judge, begin.to(device), real.shape[1] - 1, generator=chance)
        found[f"{args.against}, left to right"] = judged(judge, own, tokens)
    return found


# --------------------------------------------------------------------------------------------------- what it learned


def report(
    args: argparse.Namespace, tokens: gpt.Tokenizer, corpus: gpt.Corpus, ours: Trained, other: Trained | None
) -> dict:
    """Drafts and what they are worth, how well holes are filled, and the gap to left to right."""
    folder, mask = Path(args.runs) / args.name, len(tokens)
    fills = {share: filled(ours.model, corpus, mask, share) for share in (0.15, 0.5, 0.85)}
    judge = other.model if other is not None and left_to_right(other.model.transformer.graphs, args.context) else None
    texts = written(args, ours.model, mask)
    shown = sorted({*(2**power for power in range(12) if 2**power < args.drafts), args.drafts})
    found = {name: {step: judged(judge, each[step - 1], tokens) for step in shown} for name, each in texts.items()}
    beside = compared(args, judge, corpus, tokens)
    lines = [
        f"{'bits a token under ' + args.against + ', and distinct words':44}"
        + "".join(f"{f'draft {step}':>12}" for step in shown)
    ]
    for name, each in found.items():
        lines.append(f"{name:44}" + "".join(f"{told.bits:6.2f} {told.distinct:4.0f}%" for told in each.values()))
    lines += [f"{name:44}{told.bits:6.2f} {told.distinct:4.0f}%" for name, told in beside.items()]
    lines += ["", *(f"{right:5.1f}% right where {share:.0%} are masked" for share, right in fills.items())]
    samples = [
        f"{name}, draft {step}\n{'-' * 40}\n{tokens.decode(texts[name][step - 1][0].tolist())}\n"
        for name in texts
        for step in shown
    ]
    checkpoints.write_whole(folder / "drafts.txt", lambda path: path.write_text("\n".join(samples), encoding="utf-8"))
    curve = reporting.loss_curve(ours.metrics, args.graph, "loss [nats a token]", "validation")
    reporting.save_picture(curve, folder / "loss.png")
    graphs = ours.model.transformer.graphs
    reporting.save_connectivity(graphs, min(args.context, 64), folder / "connectivity.png")
    reporting.save_picture(drafts_picture(found, beside), folder / "drafts.png")
    print("\n".join(["-" * 80, samples[len(shown) - 1], "-" * 80, *lines, ""]))
    told = reporting.Outcome(
        "bits a character, at most",
        ours.bits,
        {} if other is None else {args.against + (", left to right" if judge else ""): other.bits},
        args.graph,
        ours.edges,
        ours.metrics.seconds,
        "drafts.png",
        lower_is_better=True,
    )
    if other is not None:
        print(f"{ours.bits - other.bits:.2f} bits a character more than under {args.against}")
    return reporting.tell(folder, told) | {"filled": fills, "drafts": found, "beside": beside}


def drafts_picture(found: dict[str, dict[int, Judged]], beside: dict[str, Judged]) -> Figure:
    """How drafts get likelier, and what becomes of their words."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    judged_by = [
        name for name in Judged._fields if not any(math.isnan(getattr(each, name)) for each in beside.values())
    ]
    labels = {"bits": "bits a token, as the left-to-right model has it", "distinct": "distinct words [%]"}
    for ax, name in zip(figure.subplots(1, len(judged_by), squeeze=False)[0], judged_by, strict=True):
        for (order, each), color in zip(found.items(), (draw.BLUE, "#c2410c", "#15803d"), strict=True):
            ax.plot(list(each), [getattr(told, name) for told in each.values()], "o-", color=color, label=order)
        for (label, told), style in zip(beside.items(), (":", "--"), strict=False):
            ax.axhline(getattr(told, name), color="0.3", lw=1, ls=style, label=label)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="draft", ylabel=labels[name], ylim=(0, None))
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=7)
    figure.suptitle("what drafts are worth, by what of each is kept for the next", fontsize=10)
    return figure


if __name__ == "__main__":
    main(settings())
