"""The GPT tokenizer: byte-level BPE from scratch. Text becomes nodes: bytes, and the pairs of them that are frequent.

    python examples/tokenizer.py                                   512 tokens, from the text that gpt.py reads
    python examples/tokenizer.py --text my.txt --tokens 4096 --name mine
    python examples/gpt.py --tokenizer runs/tokenizer/tokenizer.json      train on its tokens
    python examples/tokenizer.py --text big.txt --tokens 50257 --shards shards    tokens of a big text, to be mapped

Tokens begin as the 256 bytes. The pair of neighbours that is most frequent becomes a new token, again and again
(Sennrich et al. 2016; Radford et al. 2019); no pair reaches across the pieces into which `PIECES` cuts a text. Any
bytes can be encoded, and come back exactly. It is trained on the first nine tenths of the text, and measured on the
rest. Everything is left in runs/NAME: tokenizer.json, which the library `tokenizers` and gpt.py read, merges.txt,
tokens.png, a text with its tokens coloured, length.png, its length against the merges, and outcome.json.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import checkpoints
import command_line
import gpt
import numpy as np
import reporting

from attngraph import Causal, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[int, int]


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=command_line.Help)
    add = parser.add_argument
    add("--text", type=Path, help="any file; by default tiny Shakespeare, or the text that Python ships")
    add("--tokens", type=int, default=512, help="how many there are, the 256 bytes among them")
    add("--learn", type=int, default=100_000_000, help="bytes that the merges are learned from, at most")
    add("--shards", type=Path, metavar="DIR", help="also write the text's tokens there, for gpt.py --shards DIR")
    add("--shard-size", type=int, default=100_000_000, help="tokens in a file, at most")
    add("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    add("--name", default="tokenizer", help="the run's folder below --runs")
    add("--quick", action="store_true", help="as --learn 200000")
    given = parser.parse_args(arguments)
    command_line.require_at_least(given, parser, tokens=256, shard_size=1, learn=1)
    command_line.require_name(given, parser)
    given.learn = min(given.learn, 200_000) if given.quick else given.learn
    if given.tokens > 2**16:
        parser.error(f"--tokens must be 65536 or less, so that a token is two bytes (got {given.tokens})")
    return given


# -------------------------------------------------------------------------------------------------------- the pieces

LETTER = r"[^\x00-@\[-`{-\x7F]"  # of ASCII, and all that is not ASCII: of bytes and of text it says the same
OTHER = r"[\x00-\x08\x0E-\x1F!-/:-@\[-`{-\x7F]"
PIECES = rf"'(?:[sdmt]|ll|ve|re)| ?{LETTER}+| ?[0-9]+| ?{OTHER}+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"  # after GPT-2
IN_BYTES = re.compile(PIECES.encode("ascii"))


def pieces_of(text: bytes) -> list[bytes]:
    """Words with the space before them, numbers, punctuation, white space: nothing is lost between them."""
    return IN_BYTES.findall(text)


# ------------------------------------------------------------------------------------------------------ the tokenizer


def merged(tokens: list[int], pair: Pair, new: int) -> list[int]:
    """The tokens with a new one wherever the pair stands, from the left."""
    out, place = [], 0
    while place < len(tokens):
        if tokens[place] == pair[0] and tokens[place + 1 : place + 2] == [pair[1]]:
            out.append(new)
            place += 2
        else:
            out.append(tokens[place])
            place += 1
    return out


def learned(text: bytes, count: int) -> tuple[list[Pair], list[int]]:
    """The merges that make `count` tokens of 256 bytes, or as many as there are pairs; and after each, from none on,
    how many tokens the text has.

    The most frequent pair is merged; of equals, that of the smallest tokens; none that gives bytes which are a token
    already. Counts are kept up to date where a merge changes them, in the pieces that have the pair, and found in a
    heap, whose entries may be out of date.
    """
    words = Counter(match.group() for match in IN_BYTES.finditer(text))
    frequency = list(words.values())
    tokens = [list(word) for word in words]
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # pieces that have the pair, or had it
    for index, own in enumerate(tokens):
        for pair in pairwise(own):
            counts[pair] += frequency[index]
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges, lengths = list[Pair](), [len(text)]
    bytes_of = [bytes([byte]) for byte in range(256)]
    known = set(bytes_of)
    while 256 + len(merges) < count and heap:
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        joined = bytes_of[pair[0]] + bytes_of[pair[1]]
        if joined in known:
            continue
        bytes_of.append(joined)
        known.add(joined)
        new, shorter = 256 + len(merges), 0
        changed: Counter[Pair] = Counter()
        for index in places.pop(pair):
            before, after = tokens[index], merged(tokens[index], pair, new)
            tokens[index], times = after, frequency[index]
            shorter += times * (len(before) - len(after))
            for each in pairwise(before):
                changed[each] -= times
            for each in pairwise(after):
                changed[each] += times
                places[each].add(index)
        for each, more in changed.items():
            counts[each] += more
            if more > 0:
                heapq.heappush(heap, (-counts[each], each))
        counts.pop(pair, None)
        merges.append(pair)
        lengths.append(lengths[-1] - shorter)
    return merges, lengths


class BytePairs:
    """A tokenizer of such merges: bytes or text → numbers, and back.

    >>> BytePairs([(97, 98), (256, 256)]).encode("ababab")
    [257, 256]
    """

    def __init__(self, merges: Iterable[Pair]):
        self.merges = list(merges)
        self.number = {pair: 256 + index for index, pair in enumerate(self.merges)}
        self.bytes_of = [bytes([byte]) for byte in range(256)]
        for one, other in self.merges:
            self.bytes_of.append(self.bytes_of[one] + self.bytes_of[other])
        self.known: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self.bytes_of)

    def encode(self, text: str | bytes) -> list[int]:
        whole = text.encode() if isinstance(text, str) else text
        return [token for piece in pieces_of(whole) for token in self._of_piece(piece)]

    def decode(self, tokens: list[int]) -> str:
        """Text; bytes that are none, as half a letter is, become �."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        tokens = list(tokens)
        if unknown := sorted({token for token in tokens if not 0 <= token < len(self)}):
            raise ValueError(f"tokens must be from 0 to {len(self) - 1} (got {unknown[:5]})")
        return b"".join(self.bytes_of[token] for token in tokens)

    def _of_piece(self, piece: bytes) -> list[int]:
        """The merges in the order in which they were learned."""
        found = self.known.get(piece)
        if found is None:
            found, never = list(piece), len(self)
            while len(found) > 1:
                pair = min(pairwise(found), key=lambda pair: self.number.get(pair, never))
                if pair not in self.number:
                    break
                found = merged(found, pair, self.number[pair])
            self.known[piece] = found
        return found

    def as_json(self) -> dict[str, Any]:
        """The same as a tokenizer.json of the library `tokenizers`, which writes bytes as printable characters."""
        names = ["".join(PRINTABLE[byte] for byte in each) for each in self.bytes_of]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": [[names[one], names[other]] for one, other in self.merges],
        }  # fmt: skip
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level, "model": model,
        }  # fmt: skip


def printable() -> list[str]:
    """A character for each byte, as GPT-2 has them: its own where it has one that can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 256 + hidden.index(byte)) for byte in range(256)]


PRINTABLE = printable()


# ------------------------------------------------------------------------------------------------------------- shards

BLOCK = 1 << 24  # bytes that are encoded at a time


def blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to `stop`, cut where pieces end: before white space that follows none."""
    file.seek(start)
    rest = b""
    while block := file.read(min(BLOCK, stop - file.tell())):
        rest += block
        cuts = [match.start() + 1 for match in re.finditer(rb"[^\t-\r ][\t-\r ]", rest[-4096:])]
        cut = len(rest) - len(rest[-4096:]) + cuts[-1] if cuts else 0
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def write_shards(file: BinaryIO, length: int, folder: Path, tokenizer: BytePairs, size: int) -> dict[str, Any]:
    """The tokens of a file as arrays of 16 bits, folder/training-0000.npy …, and of its last tenth, validation-….npy.

    shards.json says what there is; it is written last, so that where it is, all is whole.
    """
    checkpoints.made(folder)
    told: dict[str, Any] = {"vocab_size": len(tokenizer), "dtype": "uint16"}
    for part, start, stop in (("training", 0, cut_of(length)), ("validation", cut_of(length), length)):
        names, tokens, count = list[str](), np.zeros(0, np.uint16), 0
        for block in blocks(file, start, stop):
            tokens = np.concatenate([tokens, np.array(tokenizer.encode(block), dtype=np.uint16)])
            while len(tokens) >= size:
                names.append(save_shard(folder, part, len(names), tokens[:size]))
                tokens, count = tokens[size:], count + size
        if len(tokens) or not names:
            names.append(save_shard(folder, part, len(names), tokens))
        told[part] = {"files": names, "tokens": count + len(tokens), "bytes": stop - start}
    checkpoints.write_whole(folder / "tokenizer.json", lambda aside: aside.write_text(json.dumps(tokenizer.as_json())))
    checkpoints.write_whole(folder / "shards.json", lambda aside: aside.write_text(json.dumps(told, indent=2)))
    return told


def save_shard(folder: Path, part: str, number: int, tokens: np.ndarray) -> str:
    name = f"{part}-{number:04}.npy"

    def save(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.save(file, tokens)

    checkpoints.write_whole(folder / name, save)
    return name


def cut_of(length: int) -> int:
    """Where the validation text begins."""
    return 9 * length // 10


# ------------------------------------------------------------------------------------------------------------- report


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[BinaryIO, str]]:
    """The text's bytes, of which only those that are needed are read, and what it is."""
    if args.text is None:
        text, source = gpt.read_text(None)
        yield io.BytesIO(text.encode()), source
        return
    try:
        file = open(args.text, "rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise SystemExit(f"{args.text} can't be read: {error.strerror}") from None
    if not file.seekable():
        raise SystemExit(f"{args.text} must be a file, which is read twice (it is a pipe): save it to one first")
    with file:
        yield file, str(args.text)


def main(args: argparse.Namespace) -> dict:
    """Learn the merges, write what they make, and measure them on a text that they were not learned from."""
    for folder in filter(None, (args.runs / args.name, args.shards)):
        checkpoints.made(folder)  # before the work
    with opened(args) as (file, source):
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        known = file.read(min(args.learn, cut_of(length)))
        file.seek(cut_of(length))
        unseen = file.read(MEASURED)
        if not known:
            raise SystemExit(f"{source} must have at least two bytes to learn from (got {length})")
        begin = time.perf_counter()
        merges, lengths = learned(known, args.tokens)
        seconds = time.perf_counter() - begin
        tokenizer = BytePairs(merges)
        print(f"text      {source}: {length:,} bytes, learned from {len(known):,}")
        print(f"tokens    {len(tokenizer):,}, of {len(merges):,} merges, learned in {seconds:.1f} s")
        if len(tokenizer) < args.tokens:
            print(f"          --tokens was {args.tokens}, and no two tokens beside each other make another any more")
        if args.shards:
            told = write_shards(file, length, args.shards, tokenizer, args.shard_size)
            counts = (f"{told[part]['tokens']:,}" for part in ("training", "validation"))
            print(f"shards    {' and '.join(counts)} tokens to train and to validate, in {args.shards}")
    return report(args, tokenizer, lengths, known, unseen, seconds)


MEASURED = 10_000_000  # bytes, at most


def report(
    args: argparse.Namespace, tokenizer: BytePairs, lengths: list[int], known: bytes, unseen: bytes, seconds: float
) -> dict:
    """The merges, in words and files; the pictures; and the figure."""
    folder, names = args.runs / args.name, [f"{each.decode(errors='replace')!r}" for each in tokenizer.bytes_of]
    checkpoints.made(folder)
    table = "".join(
        f"{256 + index:6} {names[256 + index]} = {names[one]} {names[other]}\n"
        for index, (one, other) in enumerate(tokenizer.merges)
    )
    for name, content in {"tokenizer.json": json.dumps(tokenizer.as_json()), "merges.txt": table}.items():
        checkpoints.write_whole(folder / name, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    print("first    ", " ".join(names[256:272]))
    longest = sorted(names[256:], key=len, reverse=True)[:8]
    print("longest  ", " ".join(name if len(name) <= 40 else f"{name[:40]}…" for name in longest))
    tokens = tokenizer.encode(unseen)
    if tokenizer.decode_bytes(tokens) != unseen:
        raise AssertionError("the tokens must give the text back")
    reporting.save_picture(coloured(tokenizer, tokens[:1000]), folder / "tokens.png")
    reporting.save_picture(length_curve(lengths), folder / "length.png")
    example = len(tokenizer.encode(unseen[:EXAMPLE]))
    told = reporting.tell(folder, reporting.Outcome(
        "bytes a token", len(unseen) / len(tokens), baselines(known, unseen, len(tokenizer)), "Causal()",
        Causal().num_edges(example, example), seconds, "tokens.png",
    ))  # fmt: skip
    count = len(unseen[:EXAMPLE])
    of_bytes = Causal().num_edges(count, count)
    print(f"{count:,} bytes of text have {told['edges']:,} edges between tokens, {of_bytes:,} between bytes")
    return told


EXAMPLE = 1024  # bytes of text, whose edges are counted


def baselines(known: bytes, unseen: bytes, count: int) -> dict[str, float]:
    """Bytes, and of a text in UTF-8 what the library `tokenizers` learns from the same pieces, where it is there."""
    found = {"bytes": 1.0}
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        return found
    learned_from, measured = text_of(known), text_of(unseen)
    if learned_from is None or measured is None:
        return found
    theirs = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=PRINTABLE, show_progress=False)
    theirs.train_from_iterator([learned_from], trainer)
    found["the library tokenizers"] = len(measured.encode()) / max(len(theirs.encode(measured).ids), 1)
    return found


def text_of(part: bytes) -> str | None:
    """A piece of UTF-8 as text, but for a character cut at either end; None of other bytes."""
    text = part.decode(errors="ignore")
    return text if len(text.encode()) >= len(part) - 6 else None


PALETTE = ("#fde68a", "#bfdbfe", "#bbf7d0", "#fbcfe8", "#ddd6fe")


def coloured(tokenizer: BytePairs, tokens: list[int], columns: int = 72, rows: int = 14) -> Figure:
    """A text in which each token has the colour that follows that of the token before it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(0.125 * columns, 0.26 * rows + 0.4), layout="constrained")
    ax = figure.subplots()
    row = column = used = 0
    for token in tokens:
        for character in tokenizer.decode([token]):
            if column == columns or row == rows:
                row, column = row + 1, 0
            if row >= rows:
                break
            ax.add_patch(Rectangle((column, row), 1, 1, color=PALETTE[used % len(PALETTE)], lw=0))
            shown = "↵" if character == "\n" else character if character.isprintable() else "·"
            ax.text(column + 0.5, row + 0.55, shown, ha="center", va="center", family="monospace", fontsize=9)
            row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
        if row >= rows:
            break
        used += 1
    ax.set(xlim=(0, columns), ylim=(rows, 0))
    ax.axis("off")
    draw.set_title(
        ax, f"text that was not learned from, with {len(tokenizer):,} different tokens: {used} of its tokens"
    )
    return figure


def length_curve(lengths: list[int]) -> Figure:
    """The length of the text that the merges are learned from, after each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    ax = figure.subplots()
    ax.plot(range(len(lengths)), [each / 1000 for each in lengths], color=draw.BLUE)
    ax.set(xlabel="merges", ylabel="length of the text [thousand tokens]", ylim=(0, None))
    title = f"{lengths[0]:,} bytes, from which the merges are learned: {lengths[-1]:,} tokens"
    draw.set_title(ax, title)
    ax.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main(settings())
