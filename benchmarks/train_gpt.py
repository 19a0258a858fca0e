"""Training a GPT on text: nanoGPT's CPU recipe beside the same model on bare SDPA; the demo's recipe; the bigram.

    python -m benchmarks.train_gpt                      everything, about six minutes on two cores
    python -m benchmarks.train_gpt --text my.txt --section nanogpt --section bigram
    python -m benchmarks.train_gpt --section choices    what each choice of the demo's recipe buys, ten minutes more

nanoGPT's recipe (its README, "I only have a macbook"): 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps,
no dropout, AdamW with rate 1e-3 falling to 1e-4 by a cosine after 100 steps, decay 0.1 of matrices, gradients clipped
at 1. Its README reports a validation loss of 1.88 on tiny Shakespeare. The goals: ours at most 1.89 on that text, a
step at most 1.05 times as long as with bare SDPA, the demo at most 1.58 in no more time than nanoGPT's recipe takes
here, the bigram within 0.05 of its limit.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import gpt as example
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from tqdm import tqdm

from attngraph import Causal
from attngraph.models import GPT
from attngraph.nn import TransformerConfig
from benchmarks.experiment import Experiment, Figures, Records
from benchmarks.measure import compared, seconds_of
from benchmarks.page import Keep, prose, spread, table

NAME = "train_gpt"
CONTEXT, BATCH, STEPS = 64, 12, 2000


class Size(NamedTuple):
    """Of a GPT."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = CONTEXT


CPU_RECIPE = Size()


class Bare(nn.Module):
    """The same GPT as nanoGPT writes it, on scaled_dot_product_attention(is_causal=True).

    Built in nanoGPT's order, so that its seed gives its parameters.
    """

    def __init__(self, vocab_size: int, size: Size = CPU_RECIPE):
        super().__init__()
        self.size = size
        self.tokens, self.positions = nn.Embedding(vocab_size, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(BareBlock(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        self.apply(self._initialize)
        for block in self.blocks:
            for writing in (block.out, block.down):
                nn.init.normal_(writing.weight, std=0.02 / math.sqrt(2 * size.layers))

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BareBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = (side.view(B, N, self.heads, -1).transpose(1, 2) for side in self.qkv(self.norm1(x)).split(D, dim=2))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, D))
        return x + self.down(gelu(self.up(self.norm2(x))))


@torch.no_grad()
def copied(bare: Bare) -> GPT:
    """Ours, with the same parameters."""
    size = bare.size
    config = TransformerConfig(
        embed_dim=size.width, num_layers=size.layers, num_heads=size.heads, max_length=size.context, bias=(),
        position="learned",
    )  # fmt: skip
    ours = GPT(config, bare.head.out_features, Causal())
    ours.embedding.weight.copy_(bare.tokens.weight)
    ours.transformer.position.weight.copy_(bare.positions.weight)
    for mine, given in zip(ours.transformer.layers, bare.blocks, strict=True):
        attention = mine.attention
        parts = zip((attention.query, attention.key, attention.value), given.qkv.weight.split(size.width), strict=True)
        linears = (attention.out, given.out), (mine.feedforward.up, given.up), (mine.feedforward.down, given.down)
        for linear, weight in (*parts, *((linear, other.weight) for linear, other in linears)):
            linear.weight.copy_(weight)
    return ours


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))


def rate(step: int) -> float:
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100)))


def batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """nanoGPT's batch, from the global source of chance."""
    start = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
    pieces = tokens[start + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


@torch.no_grad()
def estimates(models: dict[str, nn.Module], corpus, seconds: dict[str, list[float]]) -> dict[str, float]:
    """nanoGPT's estimate of the validation loss, from 20 random batches, after as many of the training text."""
    batches = [batch(tokens) for tokens in (corpus.training, corpus.validation) for _ in range(20)]
    losses: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():

        def estimate(model=model, own=losses[name]) -> None:
            own += [example.loss_of(model, *pair).item() for pair in batches]

        seconds[f"{name}_estimates"].append(seconds_of(estimate))
    return {name: sum(own[20:]) / 20 for name, own in losses.items()}


def train_step(model: nn.Module, tool: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, step: int) -> None:
    for group in tool.param_groups:
        group["lr"] = rate(step)
    loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tool.step()
    tool.zero_grad(set_to_none=True)


def nanogpt(text: str, options: Namespace) -> dict:
    """Both models trained on the same batches, step by step in turn; seconds of each step, and the losses.

    nanoGPT's seed, order of parameters, batches and estimates are kept, so that the losses are those that it prints.
    """
    tokens = example.tokenizer("char", text)
    corpus = example.Corpus(tokens.encode(text), CONTEXT)
    torch.manual_seed(1337)
    bare = Bare(len(tokens))
    chance = torch.get_rng_state()
    models = {"ours": copied(bare), "theirs": bare}
    torch.set_rng_state(chance)  # which building ours has used
    tools = {name: optimizer(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_estimates": [], "theirs_estimates": []}
    inputs, targets = batch(corpus.training)
    for step in tqdm(range(options.steps), desc="nanoGPT's recipe, twice", unit="step"):
        if step % 250 == 0:
            estimates(models, corpus, seconds)
        for name in ("ours", "theirs") if step % 2 else ("theirs", "ours"):
            given = models[name], tools[name], inputs, targets, step
            seconds[name].append(seconds_of(lambda given=given: train_step(*given)))
        inputs, targets = batch(corpus.training)
    found = compared(seconds["ours"][10:], seconds["theirs"][10:])
    found["parameters"] = sum(p.numel() for p in models["ours"].parameters())
    estimated = estimates(models, corpus, seconds)
    for name, model in models.items():
        found[f"{name}_validation_loss"] = round(estimated[name], 4)
        found[f"{name}_whole_validation_loss"] = round(example.evaluate(model, corpus, torch.device("cpu")), 4)
        found[f"{name}_seconds"] = round(sum(seconds[name]) + sum(seconds[f"{name}_estimates"]), 1)
    return found


def demo(options: Namespace, *more: str) -> dict:
    """The demo as `make demo` runs it, all its evaluations included."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--runs", folder, *more, *(["--text", options.text] if options.text else [])]
        args = example.settings(given)
        figures = example.train(args)
    figures["source"] = named(*example.read_text(args.text))
    return {name: figures[name] for name in ("validation_loss", "seconds", "parameters", "source")}


# What is undone: options of examples/gpt.py, and fields of its TransformerConfig.
CHOICES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "the recipe": ((), {}),
    "AdamW (rate 0.003) instead of Muon": (("--optimizer", "adamw", "--lr", "0.003"), {}),
    "learned instead of rotary positions": ((), {"position": "learned", "max_length": 128}),
    "no QK-norm": ((), {"qk_norm": False}),
    "GELU instead of squared ReLU": ((), {"activation": "gelu"}),
    "LayerNorm instead of RMSNorm": ((), {"norm": "layer"}),
    "GPT-2's initialisation": ((), {"init": "gpt2"}),
    "context 64, batch 24": (("--context", "64", "--batch", "24"), {}),
}


def choices(text: str, options: Namespace) -> dict:
    """The loss of the demo's recipe with one choice undone, at the same number of steps and tokens."""
    losses = {}
    for name, (flags, changed) in CHOICES.items():

        def config(changed=changed, **given) -> TransformerConfig:
            return TransformerConfig(**{**given, **changed})

        with patch.object(example, "TransformerConfig", config):
            losses[name] = demo(options, *flags)["validation_loss"]
    return {"losses": losses}


def bigram(text: str, options: Namespace) -> dict:
    """The loss of the trained baseline, and that of the best table of counts: smoothed on the training text."""
    tokens = example.tokenizer("char", text)
    corpus, size = example.Corpus(tokens.encode(text), CONTEXT), len(tokens)
    pairs = corpus.training[:-1] * size + corpus.training[1:]
    counts = torch.bincount(pairs, minlength=size * size).view(size, size).double() + 0.1
    limit = -(counts / counts.sum(1, keepdim=True)).log()[corpus.validation[:-1], corpus.validation[1:]].mean()
    given = "--model bigram --steps 1000 --adamw-lr 0.1 --batch 64 --sample 1"
    loss = demo(options, *given.split())["validation_loss"]
    return {"validation_loss": loss, "limit_from_training_counts": float(limit)}


def named(text: str, source: str) -> str:
    """What a text is called in a record, wherever it lay."""
    return "tiny Shakespeare" if hashlib.sha256(text.encode()).hexdigest() == example.SHA256 else source


SECTIONS = {"nanogpt": nanogpt, "demo": lambda text, options: demo(options), "bigram": bigram, "choices": choices}


def run(options: Namespace) -> Iterator[Figures]:
    text, source = example.read_text(options.text)
    for name in options.section or ("nanogpt", "demo", "bigram"):
        yield {name: {"text": named(text, source), **SECTIONS[name](text, options)}}


def render(records: Records, keep: Keep) -> Iterator[str]:
    """GPTs on text."""
    if not {"nanogpt", "demo", "bigram"} <= set(records[NAME]):
        return
    found, demo, bigram = (records[NAME][name] for name in ("nanogpt", "demo", "bigram"))
    machine = f"{found['machine']['threads']} threads, torch {found['machine']['torch']}"
    yield from ["## Training", ""]
    yield from [f"`python -m benchmarks.train_gpt`, on {found['text']} ({machine}); losses in nats per character:", ""]
    rows = []
    labels = {"ours": "nanoGPT's CPU recipe on `Causal()`", "theirs": "the same in nanoGPT's own form, on bare SDPA"}
    for name, label in labels.items():
        whole, estimate = found[f"{name}_whole_validation_loss"], found[f"{name}_validation_loss"]
        rows.append([label, f"{whole:.3f} ({estimate:.3f} as nanoGPT estimates it)", f"{found[f'{name}_seconds']:.0f}"])
    seconds = f"{demo['seconds']:.0f}, its evaluations included"
    rows.append([f"`make demo`, {demo['parameters']:,} parameters", f"{demo['validation_loss']:.3f}", seconds])
    limit = f"its limit, from counts, is {bigram['limit_from_training_counts']:.3f}"
    rows.append(["`--model bigram`", f"{bigram['validation_loss']:.3f}; {limit}", ""])
    yield from table(["", "validation loss, whole text", "seconds"], rows)
    pairs = f"median and quartiles of {found['pairs']} alternating pairs"
    yield from [f"A step of the first takes {spread(found['ratio'])} times as long as one of the second: {pairs}.", ""]


def render_choices(records: Records) -> Iterator[str]:
    """What the demo's recipe is made of."""
    losses = records[NAME].get("choices", {}).get("losses", {})
    if not losses:
        return
    yield from ["## The demo's recipe", ""]
    yield from prose("""
        What each choice bought, by undoing it at the same number of tokens (`python -m benchmarks.train_gpt --section
        choices`; one run each, nothing tuned again: small differences mean little):
    """)
    rows = [[name, f"{loss:.3f}", f"{loss - losses['the recipe']:+.3f}"] for name, loss in losses.items()]
    yield from table(["undone", "validation loss", ""], rows)


OPTIONS: dict[str, dict] = {
    "text": {"help": "a text file; by default the example's choice"},
    "steps": {"type": int, "default": STEPS, "help": "of nanoGPT's recipe"},
    "section": {"choices": list(SECTIONS), "help": "a part; may be repeated; by default all but choices"},
}
EXPERIMENT = Experiment(NAME, __doc__, run, render, OPTIONS)

if __name__ == "__main__":
    EXPERIMENT.main()
