"""Train a GPT on text, as message passing over a graph, and see what it learned. Read top to bottom.

    python examples/gpt.py                                            the demo: tiny Shakespeare, a few minutes on a CPU
    python examples/gpt.py --text my.txt --name mine                  your own text
    python examples/gpt.py --graph "Causal() & (Window(64, 0) | Prefix(4))"      who may hear whom
    python examples/gpt.py --graph "Causal() & Window(16, 0), Causal() & Window(16, 0), Causal(), Causal()"  by layer
    python examples/gpt.py --name mine --resume                       go on where it stopped, bit for bit

Everything is left in runs/NAME: config.json, metrics.csv, checkpoint.safetensors, loss.png, connectivity.png,
attention.png, sample.txt.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import signal
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import attngraph
from attngraph import Graph, analysis, draw, generate, parse_list
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

# ---------------------------------------------------------------------------------------------------------- settings


def settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. What is not given is the demo's recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--name", default="gpt", help="the run's folder below --runs")
    add("--runs", default="runs", help="where runs are kept")
    add("--resume", action="store_true", help="go on from the run's checkpoint, with the run's own settings")
    add("--text", help="a UTF-8 text file; by default tiny Shakespeare, or else the text that Python ships")
    add("--tokenizer", default="char", help="char, byte, or the path of a tokenizer.json")
    add("--model", default="gpt", choices=["gpt", "bigram"], help="bigram: the baseline that knows one character")
    add("--graph", default="Causal()", help="who hears whom; one for each layer, separated by commas")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128)
    add("--context", type=int, default=128, help="tokens that the model sees at once")
    add("--batch", type=int, default=16, help="sequences in each forward pass")
    add("--accumulate", type=int, default=1, help="forward passes for each step")
    add("--steps", type=int, default=725)
    add("--optimizer", default="muon", choices=["muon", "adamw"], help="for the matrices; vectors always have AdamW")
    add("--lr", type=float, default=None, help="peak rate of the matrices; by default 0.02 for muon, 0.001 for adamw")
    add("--adamw-lr", type=float, default=0.003, help="peak rate of embeddings, head and vectors")
    add("--warmup", type=int, default=20, help="steps in which the rates rise from 0")
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    add("--dropout", type=float, default=0.0)
    add("--seed", type=int, default=1337)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: what trains faster here")
    add("--evaluate-every", type=int, default=145, help="steps between looks at the validation text and checkpoints")
    add("--prompt", default="\n", help="what the samples go on from")
    add("--sample", type=int, default=500, help="tokens to sample at the end")
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int)
    add("--top-p", type=float)
    given = parser.parse_args(arguments)
    if given.resume:
        unset = argparse.Namespace(**dict.fromkeys(vars(given)))
        given = resumed(given, vars(parser.parse_args(arguments, unset)), parser)
    check(given, parser)
    return given


FREE = ("name", "runs", "resume", "prompt", "sample", "temperature", "top_k", "top_p")  # of a run that is resumed


def resumed(given: argparse.Namespace, explicit: dict, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The settings of the run that is to go on; one that is given beside --resume must be the same."""
    path = Path(given.runs) / given.name / "config.json"
    if not path.exists():
        parser.error(f"nothing to resume: {path} does not exist")
    saved = json.loads(path.read_text())["settings"]
    for name, value in explicit.items():
        if value is not None and name not in FREE and value != saved[name]:
            parser.error(
                f"--resume goes on with the run's settings, and --{name.replace('_', '-')} was {saved[name]} "
                f"(got {value}); start another run with another --name"
            )
    wanted = {name: explicit[name] for name in FREE if explicit[name] is not None}
    return argparse.Namespace(**{**vars(given), **saved, **wanted})


def check(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Settings that can't be are told before anything begins."""
    least = {"sample": 0, "warmup": 0, "clip": 0, "temperature": 0, "dropout": 0, "weight_decay": 0, "adamw_lr": 0}
    least |= dict.fromkeys(("layers", "heads", "width", "context", "batch", "accumulate", "steps", "evaluate_every"), 1)
    least |= {"top_k": 1, "top_p": 0, "lr": 0}
    for name, bound in least.items():
        value = getattr(given, name)
        if value is not None and not value >= bound:
            parser.error(f"--{name.replace('_', '-')} must be {bound} or more (got {value})")
    if given.top_p is not None and not 0 < given.top_p <= 1:
        parser.error(f"--top-p must be a probability above 0 (got {given.top_p})")
    if given.dropout >= 1:
        parser.error(f"--dropout must be a probability below 1 (got {given.dropout})")
    if not given.prompt:
        parser.error("--prompt must have at least one character")
    if given.device not in ("auto", "cpu", "mps") and not given.device.startswith("cuda"):
        parser.error(f"--device must be auto, cpu, cuda or mps (got {given.device})")


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
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "attngraph" / "tinyshakespeare.txt"
    if cache.exists() and hashlib.sha256(cache.read_bytes()).hexdigest() == SHA256:
        return cache.read_text(encoding="utf-8")
    with urllib.request.urlopen(SHAKESPEARE, timeout=10) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError("the download is not the known file")
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cache, lambda path: path.write_bytes(content))
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


def tokenizer(kind: str, text: str) -> Characters | Bytes | Subwords:
    return Characters(text) if kind == "char" else Bytes() if kind == "byte" else Subwords(kind)


class Corpus:
    """Tokens, the last tenth of them for validation."""

    def __init__(self, tokens: list[int], context: int):
        everything = torch.tensor(tokens, dtype=torch.int64)
        cut = int(0.9 * len(everything))
        self.training, self.validation, self.context = everything[:cut], everything[cut:], context
        if len(self.training) <= context or len(self.validation) < 2:
            raise SystemExit(
                f"the text is too short: a context of {context} needs {context + 1} tokens to train and 2 to validate "
                f"(got {len(self.training)} and {len(self.validation)}); take a longer --text or a shorter --context"
            )

    def batch(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Random pieces of the training text, and what follows each token: two (size, context)."""
        chance = torch.Generator().manual_seed(seed)
        start = torch.randint(len(self.training) - self.context, (size, 1), generator=chance)
        pieces = self.training[start + torch.arange(self.context + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    def validation_batches(self, size: int):
        """The whole validation text, each token predicted once, in pieces of the context's length."""
        whole = (len(self.validation) - 1) // self.context * self.context
        pieces = (side[:whole].view(-1, self.context) for side in (self.validation[:-1], self.validation[1:]))
        yield from zip(*(side.split(size) for side in pieces), strict=True)
        if whole < len(self.validation) - 1:
            yield self.validation[None, whole:-1], self.validation[None, whole + 1 :]


# ------------------------------------------------------------------------------------------------------------- model


def layer_graphs(text: str, layers: int) -> Graph | list[Graph]:
    """--graph: one graph, or one for each layer."""
    graphs = parse_list(text)
    for graph in graphs:
        if graph.size != (None, None):
            raise ValueError(f"--graph must fit texts of any length, and {graph} has size {graph.size}")
    return graphs[0] if len(graphs) == 1 else graphs


def build(args: argparse.Namespace, vocab_size: int) -> nn.Module:
    if args.model == "bigram":
        table = nn.Embedding(vocab_size, vocab_size)  # row: this token; column: the log-odds of the next
        nn.init.zeros_(table.weight)
        return table
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
    return GPT(config, vocab_size, layer_graphs(args.graph, args.layers), tied=False)


# ------------------------------------------------------------------------------------------------------ optimisation


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalised, for matrices (Jordan et al. 2024), with torch.optim.Muon's meaning.

    The Newton–Schulz iteration runs over all matrices of one shape at once, in the precision that is faster here;
    torch's runs in bfloat16, one by one, which is right for a GPU and slow on most CPUs.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                steps = torch.stack([self._momentum(param, group["momentum"]) for param in params])
                updates = orthogonal(steps.to(self.dtype)).to(steps.dtype)
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        """Nesterov's."""
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        mean = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(mean, momentum)


def orthogonal(x: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows or columns, by five quintic Newton–Schulz steps: (n, A, B)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """The layers' matrices in the first, everything else in the last."""
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not matrices:
        return [adamw]
    if args.optimizer == "adamw":
        lr = args.lr or 0.001
        return [
            torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True),
            adamw,
        ]
    options = {"lr": args.lr or 0.02, "momentum": 0.9, "weight_decay": args.weight_decay}
    if matrices[0].is_cuda:
        return [torch.optim.Muon(matrices, **options), adamw]
    return [Muon(matrices, dtype=getattr(torch, args.dtype), **options), adamw]


def rate(step: int, args: argparse.Namespace) -> float:
    """The factor of the peak learning rates: warm-up, then half a cosine to 0."""
    rising = min(1.0, (step + 1) / max(args.warmup, 1))
    return rising * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def best_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, dtype: str):
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def faster_dtype(model: nn.Module, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> str:
    """bfloat16 on GPUs; on a CPU whichever trains this very model faster, by a trial."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type == "mps":
        return "bfloat16"
    inputs, targets = corpus.batch(args.batch, seed=0)
    seconds = {}
    for dtype in ("float32", "bfloat16") * 3:
        start = time.perf_counter()
        with autocast(device, dtype):
            loss_of(model, inputs, targets).backward()
        seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
    model.zero_grad()
    return "bfloat16" if seconds["bfloat16"] < 0.9 * seconds["float32"] else "float32"


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


# ------------------------------------------------------------------------------------------------------- checkpoints


def write_whole(path: Path, write) -> None:
    """Write a file aside, sync it, then rename it: whoever reads the path finds the old file or the new one, whole."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise SystemExit(f"{path} can't be written ({error}); what was there before is still whole") from None


def set_aside(folder: Path) -> Path:
    """Rename an earlier run, so that a new one of its name loses nothing."""
    number = next(number for number in range(1, 10**6) if not folder.with_name(f"{folder.name}.{number}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def save_checkpoint(path: Path, model: nn.Module, optimizers: list, step: int, config: dict) -> None:
    """Weights, the optimisers' state and the step in one safetensors file."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                tensors[f"optimizer.{number}.{index}.{name}"] = tensor
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "config": json.dumps(config)}
    write_whole(path, lambda aside: save_file(tensors, aside, metadata))


def load_checkpoint(path: Path, model: nn.Module, optimizers: list, config: dict) -> int:
    """Put a checkpoint into the model and the optimisers; the number of steps it had made."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        head = path.read_bytes()[:9]
        if head[:1] in (b"P", b"\x80") and head[8:] != b"{":  # a safetensors header begins there
            raise SystemExit(f"{path} holds a pickle, which could run anything, not safetensors") from None
        raise SystemExit(f"{path} is no whole safetensors file ({error}); delete the run and start anew") from None
    saved = json.loads(metadata.get("config", "{}"))
    if saved != config:
        names = sorted(name for name in {*saved, *config} if saved.get(name) != config.get(name))
        raise SystemExit(f"{path} is of another model: {', '.join(names) or 'no config'} differ; use its own settings")
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, entry = name.split(".", 3)
                state.setdefault(int(index), {})[entry] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


class Metrics:
    """A table, a row a step, written to its file with each checkpoint."""

    COLUMNS = ("step", "seconds", "tokens", "training_loss", "validation_loss", "rate", "gradient_norm")

    def __init__(self, path: Path, from_step: int):
        self.path, self.rows = path, []
        if from_step and path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= from_step]

    @property
    def seconds(self) -> float:
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0

    def add(self, **row) -> None:
        self.rows.append({column: row.get(column, "") for column in self.COLUMNS})

    def save(self) -> None:
        write_whole(self.path, self._write)

    def _write(self, path: Path) -> None:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, self.COLUMNS)
            table.writeheader()
            table.writerows(self.rows)

    def column(self, name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[name])) for row in self.rows if row[name] != ""]


# ---------------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace) -> dict:
    """Train, and leave the run's folder behind. Returns the last figures."""
    folder = Path(args.runs) / args.name
    text, source = read_text(args.text)
    if not text.strip():
        raise SystemExit(f"{source} is empty; there is nothing to learn")
    tokens = tokenizer(args.tokenizer, text)
    corpus = Corpus(tokens.encode(text), args.context)
    torch.manual_seed(args.seed)
    device = best_device(args.device)
    try:
        model = build(args, len(tokens)).to(device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    prompt = torch.tensor([tokens.encode(args.prompt)])
    for leak in analysis.leaks(model.transformer.graphs, args.context) if args.model == "gpt" else ():
        edge = f"node {leak.query} hears node {leak.key}"
        print(f"WARNING   layer {leak.layer + 1} hears the future ({edge}): the loss means nothing")
    if args.dtype == "auto":
        args.dtype = faster_dtype(model, corpus, args, device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"text      {source}: {len(text):,} characters, {len(tokens)} different tokens")
    print(f"model     {args.model}, {parameters:,} parameters, graph {args.graph}")
    print(
        f"training  {args.steps} steps of {args.batch * args.accumulate} × {args.context} tokens "
        f"on {device}, {args.dtype}"
    )

    tools = optimizers(model, args)
    peaks = [[group["lr"] for group in tool.param_groups] for tool in tools]
    shape = {"vocab_size": len(tokens), "text_hash": hashlib.sha256(text.encode()).hexdigest()[:16]}
    shape |= {name: value for name, value in vars(args).items() if name not in (*FREE, "text")}
    checkpoint, first = folder / "checkpoint.safetensors", 0
    if args.resume:
        if not checkpoint.exists():
            raise SystemExit(
                f"nothing to resume: {checkpoint} does not exist; the run stopped before its first checkpoint"
            )
        first = load_checkpoint(checkpoint, model, tools, shape)
    elif folder.exists():
        print(f"kept      the run that was there before as {set_aside(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in vars(args).items() if name not in ("resume", "runs", "name")}
    config = json.dumps(
        {"settings": kept, "parameters": parameters, "source": source, "attngraph": attngraph.__version__}, indent=2
    )
    write_whole(folder / "config.json", lambda path: path.write_text(config))
    metrics = Metrics(folder / "metrics.csv", first)
    before = metrics.seconds
    begin = time.perf_counter() - before

    stopped: list[int] = []  # by Ctrl-C, after the step that it falls into

    def stop(number, frame):
        stopped.append(number)
        signal.signal(signal.SIGINT, before_us)  # a second one stops at once

    before_us = signal.signal(signal.SIGINT, stop)
    validation = math.nan
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step", dynamic_ncols=True)
    for step in bar:
        factor = rate(step, args)
        for tool, peak in zip(tools, peaks, strict=True):
            for group, lr in zip(tool.param_groups, peak, strict=True):
                group["lr"] = lr * factor
        torch.manual_seed(args.seed + step)  # of dropout: a resumed run takes the same chances
        loss = 0.0
        for part in range(args.accumulate):
            inputs, targets = corpus.batch(args.batch, seed=args.seed + step * args.accumulate + part)
            with autocast(device, args.dtype):
                share = loss_of(model, inputs.to(device), targets.to(device)) / args.accumulate
            share.backward()
            loss += share.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        for tool in tools:
            tool.step()
        model.zero_grad()

        done, loss, fresh = step + 1, float(loss), ""
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss} at step {done}; the last good checkpoint stays; try lower rates")
        look = done % args.evaluate_every == 0 or done == args.steps
        if look:
            fresh = validation = evaluate(model, corpus, device)
        seconds, trained = time.perf_counter() - begin, done * args.batch * args.accumulate * args.context
        metrics.add(
            step=done, seconds=f"{seconds:.3f}", tokens=trained, training_loss=loss, validation_loss=fresh,
            rate=factor, gradient_norm=float(norm),
        )  # fmt: skip
        if look or stopped:
            metrics.save()
            save_checkpoint(checkpoint, model, tools, done, shape)
        if stopped:
            raise SystemExit(f"stopped after step {done}; go on with --name {args.name} --resume")
        speed = (done - first) * args.batch * args.accumulate * args.context / (seconds - before)
        bar.set_postfix_str(f"loss {loss:.3f}, validation {validation:.3f}, {speed:,.0f} tokens/s", refresh=False)

    signal.signal(signal.SIGINT, before_us)
    if math.isnan(validation):  # resumed at the end
        validation = evaluate(model, corpus, device)
    print(
        f"validation loss {validation:.4f} nats a token over the whole validation text, after {metrics.seconds:.0f} s"
    )
    report(folder, args, model, corpus, tokens, prompt.to(device), metrics)
    return {"validation_loss": validation, "seconds": metrics.seconds, "parameters": parameters, "source": source}


# --------------------------------------------------------------------------------------------------- what it learned


def report(folder: Path, args, model: nn.Module, corpus: Corpus, tokens, prompt: Tensor, metrics: Metrics) -> None:
    """Samples and pictures."""
    model.eval()
    chance = torch.Generator(device=prompt.device).manual_seed(args.seed)
    choice = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "generator": chance}
    sample = tokens.decode(generate(model, prompt, args.sample, context=args.context, **choice)[0].tolist())
    write_whole(folder / "sample.txt", lambda path: path.write_text(sample, encoding="utf-8"))
    draw.save(loss_curve(metrics, args), folder / "loss.png")
    if args.model == "gpt":
        graphs = model.transformer.graphs
        draw.save(connectivity(graphs, min(args.context, 64)), folder / "connectivity.png")
        sentence = corpus.validation[: min(args.context, 48)].to(prompt.device)
        draw.save(attention_map(model, sentence, tokens), folder / "attention.png")
    print(f"{'-' * 80}\n{sample.strip()}\n{'-' * 80}")
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if not path.name.startswith('.')))}")


def connectivity(graphs: tuple[Graph, ...], nodes: int):
    """Who hears whom, for each layer that differs from the one before."""
    from matplotlib.figure import Figure

    first = [layer for layer, graph in enumerate(graphs) if layer == 0 or graph != graphs[layer - 1]]
    axes = Figure(figsize=(4 * len(first), 4.2), layout="constrained").subplots(1, len(first), squeeze=False)[0]
    for ax, layer in zip(axes, first, strict=True):
        until = next((other for other in first if other > layer), len(graphs))
        layers = f"layer {layer + 1}" if until == layer + 1 else f"layers {layer + 1}–{until}"
        draw.connectivity(graphs[layer], nodes, ax=ax, title=f"{layers}: {graphs[layer]}")
    return axes[0]


def loss_curve(metrics: Metrics, args):
    from matplotlib.figure import Figure

    ax = Figure(figsize=(6, 3.5), layout="constrained").subplots()
    ax.plot(
        *zip(*metrics.column("training_loss"), strict=True),
        color=draw.BLUE,
        alpha=0.4,
        lw=0.8,
        label="training, each batch",
    )
    ax.plot(
        *zip(*metrics.column("validation_loss"), strict=True), "o-", color="#c2410c", label="validation, whole text"
    )
    ax.set(xlabel="step", ylabel="loss [nats a token]", title=f"{args.model} on {args.graph}")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


@torch.no_grad()
def attention_map(model: GPT, sentence: Tensor, tokens):
    """The weights of the last layer's most decided head, over a sentence."""
    heard = {}

    def listen(layer, inputs, options):
        heard["inputs"] = (inputs[0], inputs[1], options)

    layer = model.transformer.layers[-1].attention
    hook = layer.register_forward_pre_hook(listen, with_kwargs=True)
    model(sentence[None])
    hook.remove()
    x, graph, options = heard["inputs"]
    q, k, v = layer.project(x, x, options["rotary"])
    weights = attngraph.attend(q, k, v, graph, bias=options["bias"], scale=layer.scale, return_weights=True)[1][0]
    head = int(weights.square().sum(-1).argmax())
    labels = [tokens.decode([token]) for token in sentence.tolist()]
    title = f"layer {len(model.transformer.layers)}, head {head + 1}: whom each character hears"
    return draw.attention(weights[head], graph, len(labels), labels=labels, title=title)


if __name__ == "__main__":
    train(settings())
