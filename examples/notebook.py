"""Give a Transformer a notebook: of what was said before its own chunk of the text, each token hears the notes alone.

    python examples/notebook.py                          4 notes a chunk, and beside it none, and the whole past
    python examples/notebook.py --notes 2 --against                          2, nothing beside it
    python examples/notebook.py --sweep 0 1 2 4 --against                    accuracy against the number of notes
    python examples/notebook.py --quick                                      fewer chunks and pairs, seconds

A text is cut into chunks. Each tells pairs of a key and a value, and ends in a few tokens that say nothing: notes. The
last chunk asks for values of all chunks before. A token hears its own chunk so far, and the notes of earlier ones; so
what is known of a chunk is what its notes hold, an external memory as in Memory Networks (Weston et al. 2015) and the
Neural Turing Machine (Graves et al. 2014), written and read by attention. Everything is left in runs/NAME: config.json,
metrics.csv, accuracy.png, connectivity.png, lengths.png, accuracy on longer texts, outcome.json, and for --resume the
model; what other graphs led to is in runs/NAME-against-1, …, and other numbers of notes in runs/NAME-notes-0, ….
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import command_line
import optimization
import reporting
import torch
import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attngraph import draw
from attngraph.nn import Transformer, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEYS, VALUES = 80, 32
BLANK = KEYS + VALUES  # what a note says
LONGER = (1, 2, 4)  # texts to test by, in lengths of those that are trained on


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    quick = {
        "pairs": 2, "notes": 2, "steps": 160, "batch": 64, "evaluate_every": 40, "against": ["Causal() & Chunks(6)"],
    }  # fmt: skip
    parser = command_line.parser_of(
        __doc__, free=("against", "sweep"), quick=quick, name="notebook", batch=32, steps=640, evaluate_every=160,
        dtype="float32",
    )  # fmt: skip
    add = parser.add_argument
    add("--graph", help="who hears whom; by default notebook_of(…): the chunk so far, and notes")  # the one line
    add("--against", nargs="*", help="train the same on these graphs too; by default no notes, and all that was said")
    add("--notes", type=int, default=4, help="tokens at the end of each chunk that later ones hear")
    add("--sweep", nargs="*", type=int, default=[], help="train with so many notes too, and draw what they are worth")
    add("--pairs", type=int, default=4, help="of a key and a value that a chunk tells")
    add("--chunks", type=int, default=5, help="of a text to train on; the last asks")
    add("--layers", type=int, default=3, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, notes=0, pairs=1, chunks=2, layers=2, heads=1, width=1)
    command_line.require_heads(given, parser, even=True)
    if given.pairs * (LONGER[-1] * given.chunks - 1) > KEYS:
        parser.error(
            f"--pairs and --chunks must be so few that texts {LONGER[-1]} times as long need at most {KEYS} keys "
            f"(got {given.pairs} and {given.chunks})"
        )
    if min(given.sweep, default=0) < 0:
        parser.error(f"--sweep must be numbers of 0 or more (got {min(given.sweep)})")
    chunk = 2 * given.pairs + given.notes
    given.graph = given.graph or notebook_of(chunk, given.notes)
    alone = f"Causal() & Chunks({chunk})"
    past = ", ".join([alone, *["Causal()"] * (given.layers - 1)])  # the first layer tells a value its key, as above
    given.against = [alone, past] if given.against is None else given.against
    command_line.require_graphs(given, parser)
    return given


def notebook_of(chunk: int, notes: int) -> str:
    """A token hears its own chunk so far, and the last tokens of each chunk before."""
    return f"Causal() & (Chunks({chunk}) | ChunkEnds({chunk}, {notes}))"


def texts(count: int, chunks: int, pairs: int, args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, chunks · (2 · args.pairs + notes)), and the values (B, 2 · args.pairs) that the last chunk asks for.

    Each chunk before tells so many pairs, and is blank up to its end. A value is KEYS more than its number.
    """
    generator, told = torch.Generator().manual_seed(seed), (chunks - 1) * pairs
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :told]
    values = torch.randint(VALUES, (count, told), generator=generator)
    asked = torch.randint(told, (count, 2 * args.pairs), generator=generator)
    tokens = torch.full((count, chunks, 2 * args.pairs + args.notes), BLANK)
    tokens[:, :-1, : 2 * pairs] = torch.stack([keys, KEYS + values], 2).view(count, chunks - 1, 2 * pairs)
    tokens[:, -1, : 2 * args.pairs] = keys.gather(1, asked)
    return tokens.flatten(1), values.gather(1, asked)


class Notebook(nn.Module):
    """Tokens → a logit of each value for each key that the last chunk asks for, (B, 2 · pairs, VALUES).

    The first layer knows how far keys are, which tells a value its key. The others know places in chunks alone, so that
    a text of any length is read as those of the training were.
    """

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        self.asked, self.chunk = 2 * args.pairs, 2 * args.pairs + args.notes
        config = TransformerConfig(
            embed_dim=args.width, num_layers=1, num_heads=args.heads, position="rotary", norm="rms", bias=(),
            final_norm=False, dropout=args.dropout,
        )  # fmt: skip
        rest = replace(config, num_layers=args.layers - 1, position="none", final_norm=True)
        graphs = command_line.layer_graphs(args.graph, args.layers)
        graphs = graphs if isinstance(graphs, list) else [graphs] * args.layers
        self.embed, self.place = nn.Embedding(BLANK + 1, args.width), nn.Embedding(self.chunk, args.width)
        self.first, self.rest = Transformer(config, graphs[0]), Transformer(rest, graphs[1:])
        self.head = nn.Linear(args.width, VALUES)
        nn.init.normal_(self.embed.weight, std=0.1)
        with torch.no_grad():  # notes that begin alike would all keep the same
            nn.init.orthogonal_(self.place.weight, gain=0.3 * args.width**0.5)
            for name, parameter in self.rest.layers.named_parameters():
                if "attention." in name:
                    parameter.mul_(5)

    def forward(self, tokens: Tensor) -> Tensor:
        place = self.place.weight.repeat(tokens.shape[1] // self.chunk, 1)
        x = self.rest(self.first(self.embed(tokens) + place))
        return self.head(x[:, -self.chunk :][:, : self.asked])


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    model = Notebook(args).to(device)
    nodes = args.chunks * model.chunk
    graphs = [*model.first.graphs, *model.rest.graphs]
    edges = reporting.edges_of(graphs, nodes)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph {args.graph}, {edges:,} edges")

    def loss(number: int) -> Tensor:
        """Of texts whose chunks tell one pair, at first, and then of some with more, in turn."""
        step = number // args.accumulate
        pairs = 1 if step < 0.3 * args.steps else 1 + step % args.pairs
        tokens, values = texts(args.batch, args.chunks, pairs, args, training.batch_seed(args, number))
        return cross_entropy(model(tokens.to(device)).float().flatten(0, 1), values.to(device).flatten())

    def right(longer: int = 1) -> float:
        tokens, values = texts(512, longer * args.chunks, args.pairs, args, training.TEST_SEED)
        found = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in tokens.split(64)])
        return 100 * (found == values).float().mean().item()

    task = training.Task(
        model,
        loss,
        right,
        device,
        identity={},
        record={"example": "notebook", "edges": edges},
        unit="texts",
        per_batch=args.batch,
        score="right",
        free=(*command_line.FREE, "against", "sweep"),
    )
    with checkpoints.only_run(args):
        score, metrics = training.fit(args, task)
        model.eval()
        with torch.no_grad():
            lengths = {longer * nodes: right(longer) for longer in LONGER}
        each = ", ".join(f"{found:.1f}% of {tokens} tokens" for tokens, found in lengths.items())
        print(f"values of unseen texts right: {each}; after {metrics.seconds:.0f} s")
        folder = Path(args.runs) / args.name
        curve = reporting.loss_curve(metrics, f"recall across chunks, {args.graph}", "loss [nats a value]", "right [%]")
        reporting.save_picture(curve, folder / "accuracy.png")
        reporting.save_connectivity(graphs, nodes, folder / "connectivity.png")
    return {"right": score, "lengths": lengths, "edges": edges, "seconds": metrics.seconds}


def lines_drawn(lines: dict[str, dict[int, float]], along: str, title: str) -> Figure:
    """Values that are right, in percent, along something; by chance as a dotted line."""
    from matplotlib.figure import Figure

    ax = Figure(figsize=(6, 3.8), layout="constrained").subplots()
    for name, line in lines.items():
        ax.plot(list(line), list(line.values()), "o-", label=name)
    ax.axhline(100 / VALUES, color="#b0b4bb", ls=":", label="chance")
    ax.set(xlabel=along, ylabel="values right [%]", ylim=(0, 102), xticks=list(next(iter(lines.values()))))
    draw.set_title(ax, title)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax.figure


def swept(args: argparse.Namespace, first: dict) -> dict[int, dict]:
    """The same with other numbers of notes, in runs of their own; `first` is what --graph led to."""
    found = {}
    for notes in args.sweep:
        graph, name = notebook_of(2 * args.pairs + notes, notes), f"{args.name}-notes-{notes}"
        if graph == args.graph:
            found[notes] = first
            continue
        begun = args.resume and (Path(args.runs) / name / checkpoints.MODEL).exists()
        print(f"\n{notes} notes a chunk:")
        found[notes] = train(
            argparse.Namespace(**{**vars(args), "notes": notes, "graph": graph, "name": name, "resume": begun})
        )
    return found


def main(args: argparse.Namespace) -> dict:
    """The graph and those beside it, and how they compare."""
    found, others = train(args), reporting.beside(args, train)
    by_notes = swept(args, found)
    folder = Path(args.runs) / args.name
    lengths = {args.graph: found["lengths"], **{graph: each["lengths"] for graph, each in others.items()}}
    trained = f"trained on {next(iter(found['lengths']))}"
    picture = lines_drawn(lengths, f"tokens of the text; {trained}", "recall across chunks")
    reporting.save_picture(picture, folder / "lengths.png")
    if by_notes:
        right = {f"{args.pairs} pairs a chunk": {notes: each["right"] for notes, each in by_notes.items()}}
        picture = lines_drawn(right, "notes of a chunk", "recall across chunks, of models trained with so many notes")
        reporting.save_picture(picture, folder / "notes.png")
    told = reporting.tell(
        folder,
        reporting.Outcome(
            metric="values of earlier chunks right [%]",
            figure=found["right"],
            baselines={f"{graph}, {each['edges']:,} edges": each["right"] for graph, each in others.items()}
            | {"chance": 100 / VALUES},
            graph=args.graph,
            edges=found["edges"],
            seconds=found["seconds"],
            picture="notes.png" if by_notes else "lengths.png",
        ),
    )
    return {**told, **found, "against": others, "notes": by_notes}


if __name__ == "__main__":
    main(settings())
