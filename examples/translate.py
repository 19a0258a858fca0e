"""Train an encoder–decoder to translate dates as people write them into ISO 8601, and see its alignment.

    python examples/translate.py                                     two languages, many formats, a minute or two
    python examples/translate.py --score additive --name bahdanau     scores as in Bahdanau et al. 2015
    python examples/translate.py --translate "den 3. März 1987" --resume       with the model that is there

The decoder hears Causal() among itself and, in a phase of its own, the whole source. Everything is left in runs/NAME:
config.json, metrics.csv, accuracy.png, connectivity.png, alignment.png, heads.png, samples.txt, outcome.json, and the
model, for EncoderDecoder.load and for --resume: model.safetensors and optimizer-STEP.safetensors.
"""

from __future__ import annotations

import argparse
import random
from datetime import date, timedelta
from pathlib import Path

import checkpoints
import command_line
import optimization
import reporting
import torch
import training
from babel.dates import format_date
from torch import Tensor
from torch.nn.functional import cross_entropy

from attngraph import Full, draw, generate, record
from attngraph.models import EncoderDecoder
from attngraph.nn import Recording, TokenEmbedding, TransformerConfig

# ---------------------------------------------------------------------------------------------------------- settings


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. What is not given is a recipe that takes a minute or two."""
    parser = command_line.parser_of(
        __doc__,
        free=("translate", "beam"),
        draws=True,
        quick={"steps": 200, "evaluate_every": 100},
        name="translate",
        batch=128,
        steps=900,
        evaluate_every=300,
    )
    add = parser.add_argument
    add("--graph", default="Window(4, 4)", help="who hears whom in the source; one for each layer, separated by commas")
    add("--score", default="dot", choices=["dot", "additive"], help="how a key answers a query")
    add("--layers", type=int, default=2, help="of the encoder; the decoder has as many")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    add("--beam", type=int, default=4, help="translations that are followed at a time; 1: greedy")
    add("--translate", action="append", help="a date to translate at the end; may be given several times")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, layers=1, heads=1, width=1, beam=1)
    command_line.require_heads(given, parser)
    for text in given.translate or ():
        if not text or not SOURCE.knows(text):
            parser.error(f"--translate takes dates in characters that dates are written with (got {text!r})")
    return given


# ------------------------------------------------------------------------------------------------------------- dates

FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)
FORMATS = {  # by language, as Babel reads them (Unicode's LDML); none can be read in two ways
    "en": ["MMMM d, y", "MMM d, y", "d MMMM y", "d MMM y", "EEEE, MMMM d, y", "EEE, d MMM y", "M/d/y", "MM/dd/y",
           "'the' d 'of' MMMM, y", "MMMM d y", "EEEE 'the' d 'of' MMMM y"],
    "de": ["d. MMMM y", "d. MMM y", "EEEE, d. MMMM y", "EEEE, 'den' d. MMMM y", "d.M.y", "dd.MM.y", "d. M. y",
           "'der' d. MMMM y", "EEE, dd.MM.y", "'am' d. MMMM 'des' 'Jahres' y"],
}  # fmt: skip
HELD_OUT = 2000  # days that are never trained on


def written(day: date, rng: random.Random) -> str:
    """The day, as somebody might write it."""
    language = rng.choice(list(FORMATS))
    text = format_date(day, rng.choice(FORMATS[language]), locale=language)
    return rng.choice([text, text, text.lower(), text.upper()])


def all_days() -> tuple[list[date], list[date]]:
    """Those to learn from, and those that are held out."""
    days = [FIRST + timedelta(days=number) for number in range((LAST - FIRST).days + 1)]
    random.Random(0).shuffle(days)
    return days[HELD_OUT:], days[:HELD_OUT]


class Alphabet:
    """Characters as numbers, from 1; 0 fills up."""

    def __init__(self, characters: str):
        self.characters = "\0" + "".join(sorted(set(characters)))
        self.number = {character: number for number, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def knows(self, text: str) -> bool:
        return set(text) <= set(self.number)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, longest) numbers, and which of them are characters."""
        for text in texts:
            if not self.knows(text):
                raise ValueError(f"{text!r} has characters that no date is written with")
        longest = max(map(len, texts))
        rows = torch.tensor([[self.number[each] for each in text.ljust(longest, "\0")] for text in texts])
        return rows, rows > 0

    def decode(self, row: list[int]) -> str:
        return "".join(self.characters[number] for number in row)


SOURCE = Alphabet("".join(
    case(format_date(date(2000, month, day), pattern, locale=language))
    for language, patterns in FORMATS.items() for pattern in patterns for month in range(1, 13) for day in range(1, 8)
    for case in (str, str.lower, str.upper)
) + "0123456789")  # fmt: skip
TARGET = Alphabet("0123456789-<")
START, LENGTH = TARGET.number["<"], len("2000-01-01")


# ------------------------------------------------------------------------------------------------------------- model


def build(args: argparse.Namespace) -> EncoderDecoder:
    common = {
        "embed_dim": args.width,
        "num_layers": args.layers,
        "num_heads": args.heads,
        "norm": "rms",
        "activation": "squared_relu",
        "bias": (),
        "score": args.score,
        "position": "sinusoidal",
        "dropout": args.dropout,
        "init": "zero",
    }
    source = TokenEmbedding(len(SOURCE), args.width)
    return EncoderDecoder(
        TransformerConfig(**common),
        TransformerConfig(cross=True, **common),
        len(TARGET),
        source=source,
        encoder_graph=command_line.layer_graphs(args.graph, args.layers),
        tied=False,
    )


def greedy(model: EncoderDecoder, texts: list[str], device: torch.device) -> list[str]:
    """The likeliest next character, ten times."""
    source, mask = (part.to(device) for part in SOURCE.encode(texts))
    begin = torch.full((len(texts), 1), START, device=device)
    target = generate(model, begin, LENGTH, temperature=0, source=source, source_attention_mask=mask)
    return [TARGET.decode(row) for row in target[:, 1:].tolist()]


def beam_search(model: EncoderDecoder, text: str, width: int, device: torch.device) -> list[tuple[str, float]]:
    """The `width` likeliest translations that are found by keeping as many at each step, with their log-probability."""
    source, mask = (part.to(device) for part in SOURCE.encode([text]))
    target, scores = generate(
        model,
        torch.full((1, 1), START, device=device),
        LENGTH,
        temperature=0,
        num_beams=width,
        length_penalty=0.0,
        num_return_sequences=width,
        source=source,
        source_attention_mask=mask,
        return_scores=True,
    )
    scores = scores.view(len(target), -1).sum(1)  # of a single beam, they are those of its characters
    return [(TARGET.decode(row), float(score)) for row, score in zip(target[:, 1:].tolist(), scores, strict=True)]


@torch.no_grad()
def attention(model: EncoderDecoder, text: str, device: torch.device) -> tuple[Recording, str]:
    """Who hears whom, and how much, while a date is translated; and the translation."""
    result = greedy(model, [text], device)[0]
    source, target = SOURCE.encode([text])[0], TARGET.encode([f"<{result}"[:-1]])[0]
    with record(model) as recorded:
        model(source.to(device), target.to(device))
    return recorded, result


def alignment(recorded: Recording, chosen: tuple[int, int] | None = None) -> Tensor:
    """How much each character of a translation hears each of the source, (10, len(text)): one layer and head of the
    decoder, by default the mean of the heads of the last.
    """
    layer = recorded[list(recorded)[-1] if chosen is None else f"decoder.layers.{chosen[0]}.cross"]
    weights = layer.weights[0].mean(0) if chosen is None else layer.weights[0, chosen[1]]
    return weights.view(layer.num_queries, layer.num_keys).cpu()


# ---------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    known, unseen = all_days()
    rng = random.Random(1)
    questions, answers = [written(day, rng) for day in unseen], [day.isoformat() for day in unseen]
    device = optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    try:
        model = build(args).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"dates     {len(known):,} to learn from, {len(unseen):,} others to test; such as {questions[0]!r}")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, source graph {args.graph}")

    def loss(number: int) -> Tensor:
        rng = random.Random(training.batch_seed(args, number))
        days = rng.choices(known, k=args.batch)
        source, mask = SOURCE.encode([written(day, rng) for day in days])
        target = TARGET.encode([f"<{day.isoformat()}" for day in days])[0].to(device)
        logits = model(source.to(device), target[:, :-1], attention_mask=mask.to(device))
        return cross_entropy(logits.float().flatten(0, 1), target[:, 1:].flatten())

    def exact() -> float:
        translations: list[str] = []
        for start in range(0, len(unseen), 500):
            translations += greedy(model, questions[start : start + 500], device)
        return 100 * sum(a == b for a, b in zip(translations, answers, strict=True)) / len(answers)

    task = training.Task(
        model,
        loss,
        exact,
        device,
        identity={"source": len(SOURCE), "target": len(TARGET)},
        record={"example": "translate"},
        unit="dates",
        per_batch=args.batch,
        score="exact_match",
        free=(*command_line.FREE, "translate", "beam"),
    )
    with checkpoints.only_run(args):
        score, metrics = training.fit(args, task)
        print(f"{score:.2f}% of {len(unseen):,} unseen dates exactly right, after {metrics.seconds:.0f} s")
        report(args, model.eval(), metrics, questions[:6], device)
        others = {"the nearest of 5,000 known dates": nearest_known(known, questions, answers)}
        edges = reporting.edges_of(model.encoder.graphs, len(questions[0]))
        figures = score, others, f"{args.graph}; Causal(), cross", edges, metrics.seconds, "alignment.png"
        folder = Path(args.runs) / args.name
        reporting.tell(folder, reporting.Outcome("unseen dates right [%]", *figures))
    return {"exact_match": score, "seconds": metrics.seconds}


def nearest_known(known: list[date], questions: list[str], answers: list[str]) -> float:
    """How many are right, in percent, if each is taken for the known date whose pairs of characters are most alike."""
    days, size = known[:5000], len(SOURCE)
    texts = [written(day, random.Random(number)) for number, day in enumerate(days)]

    def pairs(texts: list[str]) -> Tensor:
        rows = SOURCE.encode(texts)[0]
        counts = torch.zeros(len(texts), size * size).scatter_(1, rows[:, :-1] * size + rows[:, 1:], 1.0)
        return torch.nn.functional.normalize(counts)

    of_known, right = pairs(texts), 0
    for start in range(0, len(questions), 500):
        best = (pairs(questions[start : start + 500]) @ of_known.T).argmax(1).tolist()
        right += sum(days[at].isoformat() == answers[start + row] for row, at in enumerate(best))
    return 100 * right / len(answers)


def report(
    args: argparse.Namespace,
    model: EncoderDecoder,
    metrics: training.Metrics,
    texts: list[str],
    device: torch.device,
) -> None:
    """Translations and pictures."""
    folder, lines = Path(args.runs) / args.name, []
    for text in [*texts, *(args.translate or ())]:
        beams = "   ".join(
            f"{result} ({score:.2g})" for result, score in beam_search(model, text, args.beam, device)[:2]
        )
        lines.append(f"{text:40} greedy {greedy(model, [text], device)[0]}   beam {beams}")
    samples = "\n".join(lines) + "\n"
    checkpoints.write_whole(folder / "samples.txt", lambda path: path.write_text(samples, encoding="utf-8"))
    curve = reporting.loss_curve(metrics, "dates to ISO 8601", "loss [nats a character]", "unseen dates right [%]")
    reporting.save_picture(curve, folder / "accuracy.png")
    reporting.save_connectivity(model.encoder.graphs, 32, folder / "connectivity.png")
    text, chosen = "Dienstag, den 3. März 1987", command_line.chosen_head(args)
    recorded, result = attention(model, text, device)
    picture = draw.attention(
        alignment(recorded, chosen).flatten(),
        Full(),
        len(result),
        len(text),
        labels=list(result),
        key_labels=list(text),
        title=f"attention of each character of {result} to the source, "
        + ("mean of the last layer's heads" if chosen is None else f"layer {chosen[0]}, head {chosen[1]}"),
    )
    reporting.save_picture(picture, folder / "alignment.png")
    reporting.save_picture(recorded.draw(), folder / "heads.png")
    print(samples, end="")


if __name__ == "__main__":
    train(settings())
