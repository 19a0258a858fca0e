"""Train a GPT on text, as message passing over a graph, and see what it learned. Read top to bottom.

    python examples/gpt.py                                            the demo: tiny Shakespeare, a few minutes on a CPU
    python examples/gpt.py --text my.txt --name mine                  your own text
    python examples/gpt.py --shards shards                            a big one, as tokens in files (tokenizer.py)
    torchrun --nproc-per-node 8 examples/gpt.py --preset gpt2 --shards shards         GPT-2 (124M), as nanoGPT trains it
    python examples/gpt.py --graph "Causal() & (Window(64, 0) | Prefix(4))"      who may hear whom
    python examples/gpt.py --graph "Causal() & Window(16, 0), Causal() & Window(16, 0), Causal(), Causal()"  by layer
    python examples/gpt.py --name mine --resume                       go on where it stopped, bit for bit
    python examples/gpt.py --name mine --resume --steps 2000          and longer, or on another --device
    python examples/gpt.py --name mine --sample "ROMEO:"              the run's model goes on from a prompt; no training

Everything is left in runs/NAME: config.json, metrics.csv, loss.png, connectivity.png, attention.png, heads.png,
see.html, a page that shows who hears whom, and how much; sample.txt, outcome.json; and model.safetensors, which
GPT.load("runs/NAME") reads, with optimizer-STEP.safetensors, which --resume needs too.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import command_line
import numpy as np
import optimization
import processes
import reporting
import torch
import training
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attngraph import Graph, Window, analysis, draw, record, stream
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

# ---------------------------------------------------------------------------------------------------------- settings


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. What is not given is the demo's recipe."""
    quick = {"steps": 120, "context": 64, "layers": 2, "sample": 200}
    parser = command_line.parser_of(
        __doc__, free=FREE, quick=quick, name="gpt", draws=True, batch=16, steps=725, evaluate_every=145
    )
    add = parser.add_argument
    add("--text", type=os.path.abspath, help="UTF-8 text; by default tiny Shakespeare, or the text that Python ships")
    add("--tokenizer", default="char", help="char, byte, or the path of a tokenizer.json")
    add("--shards", type=os.path.abspath, help="in the place of a text, the folder that tokenizer.py --shards has made")
    models = "gpt2: as in Radford et al. 2019 and nanoGPT; bigram: the baseline that knows one character"
    add("--model", default="gpt", choices=["gpt", "gpt2", "bigram"], help=models)
    add("--preset", choices=list(PRESETS), help="other defaults: gpt2, nanoGPT's GPT-2 of 124 million parameters")
    add("--graph", default="Causal()", help="who hears whom; one for each layer, separated by commas")
    add("--layers", type=int, default=4, help="of the Transformer")
    add("--heads", type=int, default=4, help="of attention, in each layer")
    add("--width", type=int, default=128, help="of the nodes' vectors")
    add("--context", type=int, default=128, help="tokens that the model sees at once")
    add("--prompt", default="\n", help="what the samples go on from; by default a new line")
    add("--sample", action=Sample, metavar="NUMBER|TEXT", default=500, help=Sample.__doc__)
    add("--temperature", type=float, default=0.8, help="of the samples; 0: always the likeliest token")
    add("--top-k", type=int, help="sample of the k likeliest tokens; by default of all")
    add(
        "--top-p",
        type=float,
        help="sample of the likeliest that have this probability together; by default of all",
    )
    whole = "tokens of the validation text that are evaluated, at most; by default all, of shards the first million"
    add("--validate", type=int, help=whole)
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    given = command_line.parsed(parser, arguments)
    command_line.require_at_least(
        given, parser, layers=1, heads=1, width=1, context=1, sample=0, temperature=0, top_k=1
    )
    command_line.require_at_least(given, parser, validate=2)
    if given.model != "bigram":
        command_line.require_heads(given, parser, even=True)
    if given.top_p is not None and not 0 < given.top_p <= 1:
        parser.error(f"--top-p must be a probability above 0 (got {given.top_p})")
    if given.shards and (given.text or given.tokenizer != "char"):
        parser.error("--shards are of a text and its tokens: give neither --text nor --tokenizer with them")
    if not given.prompt:
        parser.error("--prompt must have at least one character")
    return given


class Sample(argparse.Action):
    """tokens to sample at the end; or a text that the run's model goes on from, as it is, and nothing is trained"""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        if not values.lstrip("+-").replace(".", "").isdecimal() and parser.reading is None:
            namespace.prompt, namespace.resume = values, ONLY_SAMPLE
            return
        try:
            namespace.sample = int(values)
        except ValueError:
            parser.error(f"argument --sample: invalid int value: {values!r}")


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model": "gpt2", "layers": 12, "heads": 12, "width": 768, "context": 1024, "batch": 12, "accumulate": 40,
        "steps": 600_000, "warmup": 2000, "optimizer": "adamw", "lr": 6e-4, "adamw_lr": 6e-4, "weight_decay": 0.1,
        "evaluate_every": 1000,
    },
}  # fmt: skip

ONLY_SAMPLE = "only a sample"  # how a run is resumed
FREE = ("text", "shards", "validate", "prompt", "sample", "temperature", "top_k", "top_p")  # of a run that is resumed


# -------------------------------------------------------------------------------------------------------------- text

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(path: str | None) -> tuple[str, str]:
    """The text to learn, and what it is."""
    if path is not None:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise SystemExit(
                f"{path} must be UTF-8 text (byte {error.start} is not); convert it, or is it binary?"
            ) from None
        except OSError as error:
            raise SystemExit(f"{path} can't be read: {error.strerror}") from None
        if "\0" in text:
            raise SystemExit(f"{path} must be text (it holds zero bytes, so it is binary)")
        return text, path
    try:
        return shakespeare(), "tiny Shakespeare (Karpathy 2015)"
    except OSError as error:
        from pydoc_data.topics import topics

        reason = getattr(error, "reason", error)
        return "\n".join(topics.values()), f"Python's own manual, as tiny Shakespeare can't be had ({reason})"


def shakespeare() -> str:
    """Tiny Shakespeare: from the cache, or downloaded and checked against its known hash."""
    cache = checkpoints.cached("tinyshakespeare.txt")
    if cache.exists() and hashlib.sha256(cache.read_bytes()).hexdigest() == SHA256:
        return cache.read_text(encoding="utf-8")
    with urllib.request.urlopen(SHAKESPEARE, timeout=10) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError("the download is not the known file")
    with suppress(OSError):  # no place to keep it
        cache.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_whole(cache, lambda path: path.write_bytes(content))
    return content.decode("utf-8")


class Characters:
    """Every character of a text is a token."""

    def __init__(self, text: str):
        self.characters = sorted(set(text))
        self.number = {character: index for index, character in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - set(self.number))
        if unknown:
            raise SystemExit(
                f"the text the model learns from must contain every character of the prompt (not: {unknown})"
            )
        return [self.number[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.characters[token] for token in tokens)


class Bytes:
    """Every byte of the UTF-8 encoding is a token: any text, 256 tokens."""

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Subwords:
    """A tokenizer of the `tokenizers` library, from its file."""

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing more definite
            raise SystemExit(
                f"--tokenizer must be char, byte or the path of a tokenizer.json (got {path}: {error})"
            ) from None

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


Tokenizer = Characters | Bytes | Subwords


def identity_of(tokens: Tokenizer, content: bytes) -> dict[str, Any]:
    """What a run that goes on must agree in: the text, and its tokens."""
    made = tokens.tokenizer.to_str() if isinstance(tokens, Subwords) else type(tokens).__name__
    hashes = {"text_hash": content, "tokens_hash": made.encode()}
    found = {name: hashlib.sha256(each).hexdigest()[:16] for name, each in hashes.items()}
    return {"vocab_size": len(tokens), **found}


def tokenizer(kind: str, text: str) -> Tokenizer:
    return Characters(text) if kind == "char" else Bytes() if kind == "byte" else Subwords(kind)


class Corpus:
    """Tokens, the last tenth of them for validation, or the first `most` of that."""

    def __init__(self, tokens: list[int], context: int, most: int | None = None):
        everything = torch.tensor(tokens, dtype=torch.int64)
        cut = int(0.9 * len(everything))
        self.training, self.validation, self.context = everything[:cut], everything[cut:][:most], context
        if len(self.training) <= context or len(self.validation) < 2:
            raise SystemExit(
                f"the text is too short: a context of {context} needs {context + 1} tokens to train and 2 to validate "
                f"(got {len(self.training)} and {len(self.validation)}); take a longer --text or a shorter --context"
            )

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random pieces of the training text, and what follows each token: two (size, context)."""
        start = torch.randint(len(self.training) - self.context, (size, 1), generator=generator)
        pieces = self.training[start + torch.arange(self.context + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    def validation_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole validation text, each token predicted once, in pieces of the context's length."""
        whole = (len(self.validation) - 1) // self.context * self.context
        inputs = self.validation[:-1][:whole].view(-1, self.context)
        targets = self.validation[1:][:whole].view(-1, self.context)
        yield from zip(inputs.split(size), targets.split(size), strict=True)
        if whole < len(self.validation) - 1:
            yield self.validation[None, whole:-1], self.validation[None, whole + 1 :]


def loss_of_pairs(corpus: Corpus, vocab_size: int) -> float:
    """The validation loss in nats a token of what the training text's pairs of tokens tell.

    p(b | a) = (count(a, b) + p(b)) / (count(a) + 1): smoothed by single tokens, which count as one more pair.
    """
    training, validation = corpus.training, corpus.validation
    single = (training.bincount(minlength=vocab_size) + 1.0) / (len(training) + vocab_size)
    before = training[:-1].bincount(minlength=vocab_size)
    pairs, counts = (training[:-1] * vocab_size + training[1:]).unique(return_counts=True)
    wanted = validation[:-1] * vocab_size + validation[1:]
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place], 0)
    chance = (seen + single[validation[1:]]) / (before[validation[:-1]] + 1)
    return float(-chance.double().log().mean())


class Shards(Corpus):
    """Tokens in files, as tokenizer.py --shards writes them, which are mapped: what is not looked at is not read."""

    def __init__(self, folder: Path, context: int, most: int = 1_000_000):
        """`training` and `validation` are the first `most` tokens of each."""
        try:
            told = json.loads((folder / "shards.json").read_text(encoding="utf-8"))
            files = {
                part: [np.load(folder / name, mmap_mode="r") for name in told[part]["files"]]
                for part in ("training", "validation")
            }
            self.bytes_a_token = told["validation"]["bytes"] / max(told["validation"]["tokens"], 1)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"--shards must be a folder that tokenizer.py --shards has made (got {folder}: {error})"
            ) from None
        self.files, self.context = [file for file in files["training"] if len(file) > context], context
        self.begins = np.cumsum([0, *(len(file) - context for file in self.files)])
        self.training, self.validation = (
            torch.from_numpy(np.concatenate([file[:most] for file in part])[:most].astype(np.int64))
            for part in files.values()
        )
        if not self.files or len(self.validation) < 2:
            raise SystemExit(
                f"a context of {context} needs more tokens than {folder} has in a file; take a shorter one"
            )

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same of random files, the longer the more often; no piece is of two."""
        places = torch.randint(int(self.begins[-1]), (size,), generator=generator).numpy()
        chosen = np.searchsorted(self.begins, places, side="right") - 1
        rows = []
        for number, start in zip(chosen, places - self.begins[chosen], strict=True):
            rows.append(self.files[number][start : start + self.context + 1].astype(np.int64))
        pieces = torch.from_numpy(np.stack(rows))
        return pieces[:, :-1], pieces[:, 1:]


# ------------------------------------------------------------------------------------------------------------- model


def build(args: argparse.Namespace, vocab_size: int) -> nn.Module:
    if args.model == "bigram":
        table = nn.Embedding(vocab_size, vocab_size)  # row: this token; column: the log-odds of the next
        nn.init.zeros_(table.weight)
        return table
    graph = command_line.layer_graphs(args.graph, args.layers)
    if args.model == "gpt2":
        config = TransformerConfig(
            embed_dim=args.width, num_layers=args.layers, num_heads=args.heads, bias=(), position="learned",
            max_length=args.context, dropout=args.dropout,
        )  # fmt: skip
        whole = -(-vocab_size // 64) * 64  # nanoGPT's 50,304 of 50,257, which a GPU multiplies faster
        return GPT(config, whole, graph)
    config = TransformerConfig(
        embed_dim=args.width,
        num_layers=args.layers,
        num_heads=args.heads,
        norm="rms",
        activation="squared_relu",
        bias=(),
        qk_norm=True,
        position="rotary",
        dropout=args.dropout,
        init="zero",
    )
    return GPT(config, vocab_size, graph, tied=False)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats."""
    return cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, device: torch.device) -> float:
    """The loss over the whole validation text, in float32."""
    model.eval()
    total = count = 0
    for inputs, targets in corpus.validation_batches(size=max(1, 2048 // corpus.context)):
        total += loss_of(model, inputs.to(device), targets.to(device)).item() * targets.numel()
        count += targets.numel()
    model.train()
    return total / count


# ---------------------------------------------------------------------------------------------------------- training


class Begun(NamedTuple):
    """What a run is made of."""

    source: str
    corpus: Corpus
    tokens: Tokenizer
    prompt: Tensor
    model: nn.Module
    identity: dict
    """What a checkpoint must agree in, beside the settings."""
    changed: dict
    """Sentences for what of the identity is another."""


def begun(args: argparse.Namespace) -> Begun:
    """The text, and a model before its first step."""
    if args.shards:
        source, corpus = args.shards, Shards(Path(args.shards), args.context, args.validate or 1_000_000)
        tokens = Subwords(f"{args.shards}/tokenizer.json")
        content = Path(args.shards, "shards.json").read_bytes()
        print(f"tokens    {source}: {int(corpus.begins[-1]):,} places to begin at, {len(tokens)} different tokens")
    else:
        text, source = read_text(args.text)
        if not text.strip():
            raise SystemExit(f"{source} is empty; there is nothing to learn")
        tokens, content = tokenizer(args.tokenizer, text), text.encode()
        corpus = Corpus(tokens.encode(text), args.context, args.validate)
        print(f"text      {source}: {len(text):,} characters, {len(tokens)} different tokens")
    torch.manual_seed(args.seed)
    processes.join(args.device)
    device = optimization.best_device(args.device)
    try:
        model = build(args, len(tokens)).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    prompt = torch.tensor([tokens.encode(args.prompt)], device=device)
    identity = identity_of(tokens, content)
    changed = {
        "text_hash": f"{source} is not the text that the run was trained on, or changed since",
        "tokens_hash": "its tokenizer is not that which the run was trained with, or changed since",
    }
    return Begun(source, corpus, tokens, prompt, model, identity, changed)


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    source, corpus, tokens, prompt, model, identity, changed = begun(args)
    device = prompt.device
    if isinstance(model, GPT):
        for leak in analysis.leaks(reporting.settled(model.transformer.graphs, args.context), args.context):
            edge = f"node {leak.query} hears node {leak.key}"
            print(f"WARNING   layer {leak.layer} hears the future ({edge}): the loss means nothing")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model     {args.model}, {parameters:,} parameters, graph {args.graph}")

    def loss(number: int) -> Tensor:
        inputs, targets = corpus.batch(args.batch, training.batch_generator(args, number))
        return loss_of(model, inputs.to(device), targets.to(device))

    task = training.Task(
        model,
        loss,
        evaluate=lambda: evaluate(model, corpus, device),
        device=device,
        identity=identity,
        record={"example": "gpt", "source": source},
        per_batch=args.batch * args.context,
        free=(*command_line.FREE, *FREE),
        changed=changed,
    )
    with checkpoints.only_run(args):
        validation, metrics = training.fit(args, task)
        text = f"{len(corpus.validation):,} tokens of the" if args.validate or args.shards else "the whole"
        found = f"validation loss {validation:.4f} nats a token over {text} validation text"
        print(f"{found}, after {metrics.seconds:.0f} s")
        if processes.processes().rank:
            return {"validation_loss": validation}
        folder = Path(args.runs) / args.name
        report(folder, args, model, corpus, tokens, prompt, metrics)
        others = {"counts of pairs of tokens": loss_of_pairs(corpus, len(tokens))}
        edges = reporting.edges_of(model.transformer.graphs, args.context) if isinstance(model, GPT) else 0
        told = reporting.Outcome(
            "validation loss [nats a token]", validation, others, args.graph, edges, metrics.seconds, "loss.png", True
        )
        reporting.tell(folder, told)
    return {"validation_loss": validation, "seconds": metrics.seconds, "parameters": parameters, "source": source}


# --------------------------------------------------------------------------------------------------- what it learned


def report(
    folder: Path,
    args: argparse.Namespace,
    model: nn.Module,
    corpus: Corpus,
    tokens: Tokenizer,
    prompt: Tensor,
    metrics: training.Metrics,
) -> None:
    """Pictures, and a sample."""
    model.eval()
    curve = reporting.loss_curve(
        metrics, f"{args.model} on {args.graph}", "loss [nats a token]", "validation, whole text"
    )
    reporting.save_picture(curve, folder / "loss.png")
    if isinstance(model, GPT):
        graphs = model.transformer.graphs
        reporting.save_connectivity(graphs, min(args.context, 64), folder / "connectivity.png")
        sentence = corpus.validation[: min(args.context, 48)].to(prompt.device)
        draw_attention(folder, model, sentence, tokens, command_line.chosen_head(args))
    print("-" * 80)
    sample = tell(tokens, prompt, continued(args, with_tokens(model, len(tokens)), prompt))
    print(f"\n{'-' * 80}")
    checkpoints.write_whole(folder / "sample.txt", lambda path: path.write_text(sample, encoding="utf-8"))


@torch.no_grad()
def draw_attention(
    folder: Path, model: GPT, sentence: Tensor, tokens: Tokenizer, chosen: tuple[int, int] | None
) -> None:
    """The weights of one head over a sentence, by default the last layer's most decided one; and all heads, small."""
    with record(model) as recorded:
        model(sentence[None])
    most_decided = int(recorded[-1].weights[0].square().sum(-1).argmax())
    layer, head = chosen or (len(recorded) - 1, most_decided)
    labels = [tokens.decode([token]) for token in sentence.tolist()]
    title = f"layer {layer}, head {head}: attention of each token"
    reporting.save_picture(recorded[layer].draw(head, labels=labels, title=title), folder / "attention.png")
    reporting.save_picture(recorded.draw(), folder / "heads.png")
    page = draw.page(recorded=recorded, labels=labels)
    checkpoints.write_whole(folder / "see.html", lambda path: path.write_text(page.html, encoding="utf-8"))
    print(f"page      {folder / 'see.html'}: who hears whom in it, for any browser")


# ----------------------------------------------------------------------------------------------------------- samples


def sample(args: argparse.Namespace) -> str:
    """Go on from a prompt with the model of a run, as it is."""
    run, folder = begun(args), Path(args.runs) / args.name
    agreed = training.agreed(args, run.identity, (*command_line.FREE, *FREE))
    checkpoints.load_checkpoint(folder, run.model, [], agreed, run.changed)
    print("-" * 80)
    text = tell(run.tokens, run.prompt, continued(args, with_tokens(run.model.eval(), len(run.tokens)), run.prompt))
    print(f"\n{'-' * 80}")
    return text


def continued(args: argparse.Namespace, model: nn.Module, prompt: Tensor) -> Iterator[Tensor]:
    """The new tokens, as they are made, of a model that has learned to see `context` tokens at once.

    Where nodes hear by their distance alone, each may hear the last `context` nodes, and a cache of these is all that
    is needed: the loss is the same (1.492 nats, and 1.489 of the last tokens alone). Else the last tokens are shown.
    """

    def begin(model: nn.Module, **options: Any) -> Iterator[Tensor]:
        generator = torch.Generator(device=prompt.device).manual_seed(args.seed)
        chance = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
        return stream(model, prompt, args.sample, generator=generator, **chance, **options)

    if isinstance(model, GPT):
        with suppress(ValueError):  # no cache: the data choose the graph, or it hears the future
            if not all(goes_by_distance(graph, args.context + 1) for graph in model.transformer.graphs):
                return begin(model, context=args.context)
            model = copy.deepcopy(model)
            model.transformer.graphs = [graph & Window(args.context - 1, 0) for graph in model.transformer.graphs]
            return begin(model)
    return begin(model, context=args.context, use_cache=False)


def with_tokens(model: nn.Module, count: int) -> nn.Module:
    """The model with logits of its tokens alone, not of those that only make their number a round one."""
    if not isinstance(model, GPT) or model.head.out_features == count:
        return model
    model, weight = copy.copy(model), model.head.weight[:count]
    model._modules = {**model._modules, "head": nn.Linear(weight.shape[1], count, bias=False, device=weight.device)}
    model.head.weight = nn.Parameter(weight.detach())
    return model


def goes_by_distance(graph: Graph, count: int) -> bool:
    """Whether so many nodes hear each other wherever in a text they stand."""
    mask = graph.mask(count, count)
    return torch.equal(mask[..., 1:, 1:], mask[..., :-1, :-1])


def tell(tokens: Tokenizer, prompt: Tensor, new: Iterator[Tensor]) -> str:
    """A prompt and what follows, shown as it is made; a character whose bytes are not all there waits."""
    numbers = prompt[0].tolist()
    shown = tokens.decode(numbers)
    print(shown, end="", flush=True)
    for token in new:
        numbers.append(int(token))
        text = tokens.decode(numbers)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    return tokens.decode(numbers)


if __name__ == "__main__":
    given = settings()
    sample(given) if given.resume == ONLY_SAMPLE else train(given)
