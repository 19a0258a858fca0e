"""Whisper's shape on spoken numbers: slices of a spectrogram are nodes, and a decoder writes down what was said.

    python examples/speech.py                                         an encoder on Full(), beside it one on windows
    python examples/speech.py --graph "Window(8, 8)" --against        slices hear those a quarter of a second around
    python examples/speech.py --say 4711 --resume                     sound.wav, and what the model makes of it

Nothing is downloaded: words are made of formants, the resonances of a mouth (Klatt 1980), by voices with accents, some
of which are never trained on. Left in runs/NAME: config.json, metrics.csv, accuracy.png, alignment.png,
connectivity.png, sound.wav, outcome.json, and the model, for EncoderDecoder.load and for --resume; in
runs/NAME-against-1 what another graph led to.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import checkpoints
import command_line
import numpy as np
import optimization
import reporting
import torch
import training
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from attngraph import generate, record
from attngraph.models import EncoderDecoder
from attngraph.nn import AudioEmbedding, LogMelSpectrogram, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: who hears whom among the slices of a sound."""
    quick = {"digits": 2, "steps": 450, "accents": 12, "evaluate_every": 150, "against": []}
    parser = command_line.parser_of(
        __doc__, ("against", "say"), quick, name="speech", batch=16, steps=1200, evaluate_every=400, optimizer="adamw",
        lr=0.002,
    )  # fmt: skip
    add = parser.add_argument
    add("--graph", default="Full()", help="who hears whom among the slices; one for each layer, separated by commas")
    add("--against", nargs="*", default=["Window(8, 8)"], help="train the same on these too; none: alone")
    add("--digits", type=int, default=4, help="of each number")
    add("--accents", type=int, default=80, help="to learn from; others test")
    add("--say", help="a number for the picture and sound.wav, by default the first digits of 4711")
    add("--layers", type=int, default=2, help="of the encoder; the decoder has as many")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=64, help="of the nodes' vectors")
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(given, parser, digits=1, accents=1, layers=1, heads=1, width=1)
    command_line.require_heads(given, parser, even=True)
    command_line.require_graphs(given, parser)
    if given.say is not None and (len(given.say) != given.digits or not set(given.say) <= set("0123456789")):
        parser.error(f"--say must be {given.digits} digits, as --digits says (got {given.say!r})")
    return given


# ------------------------------------------------------------------------------------------------------------- sound

RATE, ROOM = 8000, 6000  # samples: a second, and for each digit
WORDS = (
    "Z IH R OW UH", "W AH N", "T UW", "TH R IY", "F AO R", "F AA IH V", "S IH K S", "S EH V AH N", "EH IY T",
    "N AA IH N",
)  # fmt: skip
HELD_OUT = 6  # accents

# Milliseconds; three formants in Hz, of vowels as Peterson and Barney (1952) measured them; how loud the voice is, how
# loud the noise, and where it lies in Hz.
PHONES = {
    "IY": (110, 270, 2290, 3010, 1.0, 0.0, 2500), "IH": (90, 390, 1990, 2550, 1.0, 0.0, 2500),
    "EH": (100, 530, 1840, 2480, 1.0, 0.0, 2500), "AA": (110, 730, 1090, 2440, 1.0, 0.0, 2500),
    "AH": (90, 640, 1190, 2390, 1.0, 0.0, 2500), "AO": (140, 570, 840, 2410, 1.0, 0.0, 2500),
    "UH": (80, 440, 1020, 2240, 0.9, 0.0, 2500), "UW": (150, 300, 870, 2240, 1.0, 0.0, 2500),
    "OW": (100, 500, 900, 2300, 1.0, 0.0, 2500), "R": (70, 310, 1060, 1380, 0.7, 0.0, 2500),
    "W": (70, 290, 610, 2150, 0.7, 0.0, 2500), "N": (90, 250, 1400, 2500, 0.35, 0.0, 2500),
    "V": (60, 250, 1100, 2080, 0.3, 0.05, 2800), "Z": (90, 250, 1700, 2500, 0.2, 0.2, 3500),
    "S": (120, 250, 1700, 2500, 0.0, 0.3, 3500), "F": (100, 250, 1100, 2100, 0.0, 0.08, 2600),
    "TH": (90, 250, 1400, 2500, 0.0, 0.06, 2200), "T": (70, 250, 1800, 2600, 0.0, 0.12, 3200),
    "K": (80, 250, 1900, 2400, 0.0, 0.12, 1900),
}  # fmt: skip
STOPS = ("T", "K")  # silence, then a burst


class Accent(NamedTuple):
    """How somebody speaks."""

    pitch: float  # Hz
    formants: float  # times those of the table: the shorter a throat, the more
    slowness: float
    vowels: dict[str, np.ndarray]  # further factors of the formants of each phone


def accent(number: int) -> Accent:
    rng = np.random.default_rng(number)
    vowels = {name: np.exp(rng.normal(0, 0.06, 3)) for name in PHONES}
    return Accent(rng.uniform(90, 220), rng.uniform(0.9, 1.2), rng.uniform(0.8, 1.25), vowels)


def spoken(word: str, by: Accent, rng: np.random.Generator) -> np.ndarray:
    """A word as sound: harmonics of the voice as loud as the formants make them, and noise."""
    rows = []  # of milliseconds from the start, three formants, voice, noise and where it lies
    begin = 0.0
    for name in word.split():
        length, *formants, voice, noise, place = PHONES[name]
        length *= by.slowness * rng.uniform(0.85, 1.15)
        formants = np.array(formants) * by.formants * by.vowels[name] * np.exp(rng.normal(0, 0.015, 3))
        quiet = 0.0 if name in STOPS else 1.0
        for share, loud in ((0.25, quiet), (0.6, quiet), (0.75, 1.0)):
            rows.append([begin + share * length, *formants, voice * loud, noise * loud, place])
        begin += length
    track, samples = np.array(rows).T, int(begin * RATE / 1000)
    time = np.arange(samples) / RATE
    first, second, third, voice, noise, place = (np.interp(1000 * time, track[0], row) for row in track[1:])
    pitch = by.pitch * rng.uniform(0.9, 1.1) * np.linspace(1.1, 0.9, samples)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    harmonic = np.arange(1, int(3800 / pitch.min()) + 1)[:, None]
    at, loud = harmonic * pitch, 0.0
    for formant, width, gain in ((first, 70, 1.0), (second, 100, 0.6), (third, 160, 0.3)):
        loud = loud + gain / (1 + ((at - formant) / width) ** 2)
    sound = voice * (np.sin(harmonic * phase) * loud * (at < 3800)).sum(0)
    hiss = np.convolve(rng.normal(size=samples), np.ones(4) / 2, "same")  # of low frequencies, moved to their place
    sound += noise * 4 * hiss * np.cos(2 * np.pi * np.cumsum(place) / RATE)
    edge = np.minimum(1, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / 80)
    return (0.1 * edge * sound).astype(np.float32)


Voices = list[list[list[np.ndarray]]]  # by accent and digit, some sounds of it


class Said(NamedTuple):
    """Numbers as sound."""

    sound: Tensor  # (B, samples)
    digits: Tensor  # int64 (B, digits)
    bounds: Tensor  # the first and the last sample of each word, int64 (B, digits, 2)


def speakers(accents: range, variants: int = 2) -> Voices:
    """Who says each digit so many times, as numbered accents do."""
    found = []
    for number in accents:
        by, rng = accent(number), np.random.default_rng(1000 + number)
        found.append([[spoken(word, by, rng) for _ in range(variants)] for word in WORDS])
    return found


def numbers(voices: Voices, digits: np.ndarray, rng: np.random.Generator) -> Said:
    """Numbers (count, digits), each said by one voice: words behind each other, with pauses or without, in noise."""
    count, places = digits.shape
    longest = places * ROOM
    sound, bounds = np.zeros((count, longest), np.float32), np.zeros((count, places, 2), np.int64)
    for row in range(count):
        voice, begin, loud = voices[rng.integers(len(voices))], rng.integers(2000), rng.uniform(0.5, 1.5)
        for place, digit in enumerate(digits[row]):
            word = voice[digit][rng.integers(len(voice[digit]))]
            end = min(begin + len(word), longest)
            sound[row, begin:end] += loud * word[: end - begin]
            bounds[row, place] = begin, end
            begin = min(end + int(rng.integers(800)), longest)
    noise = 10 ** rng.uniform(-3, -2, (count, 1))
    sound += (rng.normal(size=sound.shape) * noise).astype(np.float32)
    return Said(*map(torch.from_numpy, (sound, digits, bounds)))


def any_numbers(voices: Voices, count: int, places: int, seed: int) -> Said:
    """The same of numbers of so many digits, any of them as likely."""
    rng = np.random.default_rng(seed)
    return numbers(voices, rng.integers(10, size=(count, places)), rng)


# ------------------------------------------------------------------------------------------------------------- model

START = len(WORDS)
MEL = LogMelSpectrogram(RATE, n_fft=256, hop_length=128, num_mels=32)


def heard(sound: Tensor) -> Tensor:
    """Sound (B, samples) → how loud each band is in each slice, (B, bands, slices); a spectrogram's mean is 0."""
    loud = MEL(sound)
    return loud - loud.mean((1, 2), keepdim=True)


def build(args: argparse.Namespace) -> EncoderDecoder:
    """Whisper's: slices that hear each other, digits that hear those before them and, in a phase of its own, slices."""
    common = {"embed_dim": args.width, "num_layers": args.layers, "num_heads": args.heads, "dropout": args.dropout}
    return EncoderDecoder(
        TransformerConfig(position="sinusoidal", **common),
        TransformerConfig(position="learned", max_length=args.digits + 1, cross=True, **common),
        len(WORDS) + 1,
        source=AudioEmbedding(MEL.num_mels, args.width),
        encoder_graph=command_line.layer_graphs(args.graph, args.layers),
    )


def written(model: EncoderDecoder, sound: Tensor, device: torch.device) -> Tensor:
    """The likeliest digits, int64 (B, digits)."""
    start, digits = torch.full((len(sound), 1), START, device=device), sound.shape[1] // ROOM
    return generate(model, start, digits, temperature=0, source=heard(sound).to(device))[:, 1:].cpu()


def by_template(voices: Voices, given: Said) -> float:
    """% of digits wrong, of words that are cut out where they are: the digit whose mean spectrogram is nearest."""

    def picture(sound: Tensor) -> Tensor:
        return interpolate(heard(sound[None]), 24, mode="linear")[0]  # as if all were spoken as fast

    pieces = [[picture(torch.from_numpy(word)) for voice in voices for word in voice[digit]] for digit in range(10)]
    templates = torch.stack([torch.stack(each).mean(0) for each in pieces])
    wrong = 0
    for sound, digits, bounds in zip(given.sound, given.digits, given.bounds, strict=True):
        for digit, (begin, end) in zip(digits, bounds, strict=True):
            wrong += int((templates - picture(sound[begin:end])).square().sum((1, 2)).argmin() != digit)
    return 100 * wrong / given.digits.numel()


# ---------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    known, others = speakers(range(args.accents)), speakers(range(10_000, 10_000 + HELD_OUT))
    unseen, device = any_numbers(others, 250, args.digits, training.TEST_SEED), optimization.best_device(args.device)
    torch.manual_seed(args.seed)
    model = build(args).to(device)
    print(f"sounds    of {args.accents} accents, {HELD_OUT} others to test; {args.digits * ROOM / RATE:g} s each")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, graph of slices {args.graph}")

    def loss(number: int) -> Tensor:
        """Of numbers that grow, for the first half of the training, from one digit to all."""
        places = min(args.digits, 1 + 2 * args.digits * number // (args.accumulate * args.steps))
        said = any_numbers(known, args.batch, places, training.batch_seed(args, number))
        before = torch.cat([torch.full((args.batch, 1), START), said.digits[:, :-1]], 1)
        logits = model(heard(said.sound).to(device), before.to(device))
        return cross_entropy(logits.float().flatten(0, 1), said.digits.flatten().to(device))

    def wrong() -> float:
        found = torch.cat([written(model, part, device) for part in unseen.sound.split(50)])
        return 100 * float((found != unseen.digits).float().mean())

    task = training.Task(
        model,
        loss,
        wrong,
        device,
        identity={},
        record={"example": "speech"},
        unit="sounds",
        per_batch=args.batch,
        score="digit_errors",
        free=(*command_line.FREE, "against", "say"),
    )
    with checkpoints.only_run(args):
        figure, metrics = training.fit(args, task)
        print(f"{figure:.2f}% of the digits in accents never heard wrong, after {metrics.seconds:.0f} s")
        folder = Path(args.runs) / args.name
        curve = reporting.loss_curve(
            metrics, f"spoken numbers, {args.graph}", "loss [nats a digit]", "digits wrong [%]"
        )
        reporting.save_picture(curve, folder / "accuracy.png")
        say = args.say or ("4711" * args.digits)[: args.digits]
        said = numbers(others, np.array([[int(digit) for digit in say]]), np.random.default_rng(7))
        reporting.save_picture(alignment(model.eval(), said, device), folder / "alignment.png")
        checkpoints.write_whole(folder / "sound.wav", lambda path: write_sound(path, said.sound[0]))
    slices = -(-args.digits * ROOM // 2 // MEL.hop_length)
    edges = reporting.edges_of(model.encoder.graphs, slices)
    reporting.save_connectivity(model.encoder.graphs, min(slices, 64), Path(args.runs) / args.name / "connectivity.png")
    edges += args.layers * args.digits * (slices + (args.digits + 1) / 2)
    return {
        "figure": figure,
        "seconds": metrics.seconds,
        "edges": int(edges),
        "template": by_template(known, unseen),
    }


def write_sound(path: Path, sound: Tensor) -> None:
    """As a WAV of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes())


@torch.no_grad()
def alignment(model: EncoderDecoder, said: Said, device: torch.device) -> Figure:
    """The spectrogram, where its words are, and which of its slices each digit hears as it is written."""
    from matplotlib.figure import Figure

    digits = written(model, said.sound, device)
    before = torch.cat([torch.full((1, 1), START), digits[:, :-1]], 1)
    with record(model) as recorded:
        model(heard(said.sound).to(device), before.to(device))
    cross = recorded[f"decoder.layers.{len(model.decoder.layers) - 1}.cross"]
    weights = cross.weights[0].mean(0).view(cross.num_queries, cross.num_keys).cpu()
    sheet, seconds = Figure(figsize=(8, 4.5), layout="constrained"), said.sound.shape[1] / RATE
    above, below = sheet.subplots(2, 1, sharex=True, height_ratios=[1.3, 1])
    loud = heard(said.sound)[0]
    above.imshow(loud, aspect="auto", origin="lower", extent=(0, seconds, 0, len(loud)), cmap="magma")
    for digit, bounds in zip(said.digits[0].tolist(), (said.bounds[0] / RATE).tolist(), strict=True):
        above.text(sum(bounds) / 2, len(loud) - 1, str(digit), color="white", ha="center", va="top")
        for ax in (above, below):
            ax.axvspan(*bounds, fill=False, ec="#9ca3af", ls=":")
    above.set(ylabel="band of the mel scale", title="spoken, and where its words are")
    below.imshow(
        weights, aspect="auto", extent=(0, seconds, len(weights) - 0.5, -0.5), cmap="Blues", interpolation="nearest"
    )
    below.set_yticks(range(len(weights)), [str(digit) for digit in digits[0].tolist()])
    below.set(xlabel="time [s]", ylabel="digit written", title="attention of each digit, last layer, mean of heads")
    return sheet


def main(args: argparse.Namespace) -> dict:
    """On this graph of the slices, and on those that it is to be compared with."""
    found, others = train(args), reporting.beside(args, train)
    folder, name = Path(args.runs) / args.name, "the nearest mean spectrogram, told where words are"
    outcome = reporting.Outcome(
        "digits wrong, accents never heard [%]",
        found["figure"],
        {name: found["template"], **{graph: each["figure"] for graph, each in others.items()}},
        args.graph,
        found["edges"],
        found["seconds"],
        "alignment.png",
        lower_is_better=True,
    )
    return reporting.tell(folder, outcome)


if __name__ == "__main__":
    main(settings())
