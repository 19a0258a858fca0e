"""Training a GPT on text: nanoGPT's CPU recipe beside the same model on bare SDPA; the demo's recipe; the bigram.

    python -m benchmarks.train_gpt                      everything, about six minutes on two cores
    python -m benchmarks.train_gpt --text my.txt --sections nanogpt,bigram
    python -m benchmarks.train_gpt --sections choices   what each choice of the demo's recipe buys, ten minutes more

nanoGPT's recipe (its README, "I only have a macbook"): 4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps,
no dropout, AdamW with rate 1e-3 falling to 1e-4 by a cosine after 100 steps, decay 0.1 of matrices, gradients clipped
at 1. Its README reports a validation loss of 1.88 on tiny Shakespeare. The goals: ours at most 1.89 on that text, a
step at most 1.05 times as long as with bare SDPA, the demo at most 1.58 in no more time than nanoGPT's recipe takes
here, the bigram within 0.05 of its limit.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from attngraph import Causal
from attngraph.models import GPT
from attngraph.nn import TransformerConfig
from benchmarks.measure import compared, record, spread

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt as example

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


class Bare(nn.Module):
    """The same GPT as nanoGPT writes it, on scaled_dot_product_attention(is_causal=True).

    Built in nanoGPT's order, so that its seed gives its parameters.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(BareBlock() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        self.apply(self._initialize)
        for block in self.blocks:
            for writing in (block.out, block.down):
                nn.init.normal_(writing.weight, std=0.02 / math.sqrt(2 * LAYERS))

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
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = (side.view(B, N, HEADS, -1).transpose(1, 2) for side in self.qkv(self.norm1(x)).split(WIDTH, dim=2))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, WIDTH))
        return x + self.down(gelu(self.up(self.norm2(x))))


@torch.no_grad()
def copied(bare: Bare) -> GPT:
    """Ours, with the same parameters."""
    config = TransformerConfig(
        embed_dim=WIDTH, num_layers=LAYERS, num_heads=HEADS, max_length=CONTEXT, bias=(), position="learned"
    )
    ours = GPT(config, bare.head.out_features, Causal())
    ours.embedding.weight.copy_(bare.tokens.weight)
    ours.transformer.position.weight.copy_(bare.positions.weight)
    for mine, given in zip(ours.transformer.layers, bare.blocks, strict=True):
        attention = mine.attention
        parts = zip((attention.query, attention.key, attention.value), given.qkv.weight.split(WIDTH), strict=True)
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
    drawn = [batch(tokens) for tokens in (corpus.training, corpus.validation) for _ in range(20)]
    found = {}
    for name, model in models.items():
        start = time.perf_counter()
        losses = [example.loss_of(model, *pair).item() for pair in drawn]
        seconds[f"{name}_estimates"].append(time.perf_counter() - start)
        found[name] = sum(losses[20:]) / 20
    return found


def nanogpt(text: str, steps: int) -> dict:
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
    for step in example.tqdm(range(steps), desc="nanoGPT's recipe, twice", unit="step"):
        if step % 250 == 0:
            estimates(models, corpus, seconds)
        for name in ("ours", "theirs") if step % 2 else ("theirs", "ours"):
            start = time.perf_counter()
            for group in tools[name].param_groups:
                group["lr"] = rate(step)
            loss = cross_entropy(models[name](inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
            tools[name].step()
            tools[name].zero_grad(set_to_none=True)
            seconds[name].append(time.perf_counter() - start)
        inputs, targets = batch(corpus.training)
    found = compared(seconds["ours"][10:], seconds["theirs"][10:])
    found["parameters"] = sum(p.numel() for p in models["ours"].parameters())
    estimated = estimates(models, corpus, seconds)
    for name, model in models.items():
        found[f"{name}_validation_loss"] = round(estimated[name], 4)
        found[f"{name}_whole_validation_loss"] = round(example.evaluate(model, corpus, torch.device("cpu")), 4)
        found[f"{name}_seconds"] = round(sum(seconds[name]) + sum(seconds[f"{name}_estimates"]), 1)
    return found


def demo(text: str | None, more: list[str] | None = None) -> dict:
    """The demo as `make demo` runs it, all its evaluations included."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--runs", folder, *(more or [])] + ([] if text is None else ["--text", text])
        figures = example.train(example.settings(given))
    return {name: figures[name] for name in ("validation_loss", "seconds", "parameters")}


CHOICES = {
    "the recipe": {},
    "AdamW (rate 0.003) instead of Muon": {"--optimizer": "adamw", "--lr": "0.003"},
    "learned instead of rotary positions": {"position": "learned", "max_length": 128},
    "no QK-norm": {"qk_norm": False},
    "GELU instead of squared ReLU": {"activation": "gelu"},
    "LayerNorm instead of RMSNorm": {"norm": "layer"},
    "GPT-2's initialisation": {"init": "gpt2"},
    "context 64, batch 24": {"--context": "64", "--batch": "24"},
}


def choices(text: str | None) -> dict[str, float]:
    """The loss of the demo's recipe with one choice undone, at the same number of steps and tokens."""
    found = {}
    for name, change in CHOICES.items():
        flags = [part for flag, value in change.items() if flag.startswith("--") for part in (flag, value)]
        switches = {switch: value for switch, value in change.items() if not switch.startswith("--")}
        example.TransformerConfig = lambda switches=switches, **given: TransformerConfig(**{**given, **switches})
        found[name] = demo(text, flags)["validation_loss"]
    example.TransformerConfig = TransformerConfig
    return {"losses": found}


def bigram(text: str) -> dict:
    """The loss of the trained baseline, and that of the best table of counts: smoothed on the training text."""
    tokens = example.tokenizer("char", text)
    corpus = example.Corpus(tokens.encode(text), CONTEXT)
    size = len(tokens)
    pairs = corpus.training[:-1] * size + corpus.training[1:]
    counts = torch.bincount(pairs, minlength=size * size).view(size, size).double()
    likely = ((counts + 0.1) / (counts + 0.1).sum(1, keepdim=True)).log()
    limit = -likely[corpus.validation[:-1], corpus.validation[1:]].mean()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(text, encoding="utf-8")
        given = f"--model bigram --steps 1000 --adamw-lr 0.1 --batch 64 --sample 1 --text {path} --runs {folder}"
        loss = example.train(example.settings(given.split()))["validation_loss"]
    own = counts_entropy(corpus.validation, size)
    return {"validation_loss": loss, "limit_from_training_counts": float(limit), "entropy_of_validation_pairs": own}


def counts_entropy(tokens: Tensor, size: int) -> float:
    """H(next | this) of the pairs in this very text: no bigram can do better on it."""
    counts = torch.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).view(size, size).double()
    likely = counts / counts.sum(1, keepdim=True)
    return float(-(counts * likely.log().nan_to_num(neginf=0)).sum() / counts.sum())


def named(text: str, source: str) -> str:
    """What a text is called in a record, wherever it lay."""
    return "tiny Shakespeare" if example.hashlib.sha256(text.encode()).hexdigest() == example.SHA256 else source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file; by default the example's choice")
    parser.add_argument("--steps", type=int, default=STEPS, help="of nanoGPT's recipe")
    parser.add_argument("--sections", default="nanogpt,demo,bigram")
    args = parser.parse_args()
    text, source = example.read_text(args.text)
    source = named(text, source)
    figures: dict = {}
    lines = [f"text: {source}"]
    if "nanogpt" in args.sections:
        found = figures["nanogpt"] = nanogpt(text, args.steps)
        for name, title in (("ours", "attngraph, Causal()"), ("theirs", "bare SDPA")):
            lines.append(
                f"nanoGPT's recipe, {title:20} validation loss {found[f'{name}_validation_loss']:.4f} as nanoGPT "
                f"estimates it, {found[f'{name}_whole_validation_loss']:.4f} over the whole text, "
                f"{found[f'{name}_seconds']:.0f} s, {spread(found[f'{name}_ms'], 1)} ms a step"
            )
        lines.append(f"step time, ours / bare SDPA: {spread(found['ratio'])}")
    if "demo" in args.sections:
        found = figures["demo"] = demo(args.text)
        lines.append(
            f"the demo's recipe: validation loss {found['validation_loss']:.4f}, {found['seconds']:.0f} s with its "
            f"evaluations, {found['parameters']:,} parameters"
        )
    if "bigram" in args.sections:
        found = figures["bigram"] = bigram(text)
        lines.append(
            f"bigram: validation loss {found['validation_loss']:.4f}; its limit, from the training text's counts, "
            f"{found['limit_from_training_counts']:.4f}; entropy of the validation text's own pairs "
            f"{found['entropy_of_validation_pairs']:.4f}"
        )
    if "choices" in args.sections:
        found = figures["choices"] = choices(args.text)
        lines += [f"{name:40} validation loss {loss:.4f}" for name, loss in found["losses"].items()]
    figures = {section: {"text": source, **found} for section, found in figures.items()}
    print("\n".join(lines))
    print(f"recorded in {record('train_gpt', figures)}")


if __name__ == "__main__":
    main()
