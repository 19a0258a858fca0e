"""Decoding, token by token: the cache beside one written by hand, beside transformers, and beside no cache.

Sections of `benchmarks.goals`: python -m benchmarks.goals --section cache --section tokens --section stream …
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from attngraph import Causal, KVCache, Prefix, Window, analysis, generate, hf
from attngraph.models import GPT
from attngraph.nn import TransformerConfig
from attngraph.nn.positions import rotate
from benchmarks.experiment import Goal
from benchmarks.measure import Progress, isolated, now, ratios
from benchmarks.page import number

DEMO = {"embed_dim": 128, "num_layers": 4, "num_heads": 4}  # the GPT of `make demo`
GPT2 = {"embed_dim": 768, "num_layers": 12, "num_heads": 12, "activation": "gelu_tanh"}  # of 124M parameters
LENGTHS = 64, 512, 2048, 8192
NEW = 1024
STREAM = 100_000


# ------------------------------------------------------------------------------------------- beside a cache by hand


class ByHand:
    """The keys and values of a causal model, in tensors that are there from the start, and bare SDPA."""

    def __init__(self, model: GPT, length: int):
        self.transformer, config = model.transformer, model.config
        heads, dim = config.num_heads, config.embed_dim // config.num_heads
        self.layers = [LayerByHand(*torch.zeros(2, 1, heads, length, dim)) for _ in range(config.num_layers)]
        self.rotary = model.transformer.position(torch.arange(length))
        self.length = 0

    def pieces(self, x: Tensor, tree: None) -> list[int]:
        return [x.shape[-2]]

    def begin(self, x: Tensor, tree: None) -> None:
        for layer in self.layers:
            layer.length = self.length

    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary
        return cos[self.length : self.length + 1], sin[self.length : self.length + 1]

    def end(self, tree: None) -> None:
        self.length += 1


class LayerByHand:
    """Those of a layer."""

    holds_all = turns = False

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, graph: object, **options: object) -> Tensor:
        stop = self.length + 1
        self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop] = k, v
        return scaled_dot_product_attention(q, self.keys[:, :, :stop], self.values[:, :, :stop])


class WrittenOut:
    """A step of a causal GPT as one function, with its keys and values in tensors of their own, and bare SDPA."""

    def __init__(self, model: GPT, length: int):
        self.model, config = model, model.config
        heads, dim = config.num_heads, config.embed_dim // config.num_heads
        self.shape = 1, 1, heads, dim
        self.keys, self.values = torch.zeros(2, config.num_layers, 1, heads, length, dim)
        self.rotary = model.transformer.position(torch.arange(length))
        self.length = 0

    def __call__(self, token: Tensor) -> Tensor:
        model, here = self.model, slice(self.length, self.length + 1)
        self.length += 1
        x, turn = model.embedding.weight[token], [side[here] for side in self.rotary]
        for layer, keys, values in zip(model.transformer.layers, self.keys, self.values, strict=True):
            attention, feedforward = layer.attention, layer.feedforward
            h = layer.attention_norm(x)
            q = attention.query(h).view(self.shape).transpose(1, 2)
            k = attention.key(h).view(self.shape).transpose(1, 2)
            keys[:, :, here] = rotate(k, *turn)
            values[:, :, here] = attention.value(h).view(self.shape).transpose(1, 2)
            heard = keys[:, :, : self.length], values[:, :, : self.length]
            out = scaled_dot_product_attention(rotate(q, *turn), *heard)
            x = x + attention.out(out.transpose(1, 2).flatten(2))
            x = x + feedforward.down(gelu(feedforward.up(layer.feedforward_norm(x))))
        return model.head(model.transformer.final_norm(x))


@torch.no_grad()
def by_hand_alone(progress: Progress, length: int, steps: int) -> dict:
    """Steps after a text of this length: each of ours beside those by hand, and the same logits."""
    progress({}, 600.0)
    torch.manual_seed(0)
    model = GPT(TransformerConfig(**DEMO), vocab_size=65).eval()
    text = torch.randint(65, (1, length + steps))
    cache, hand, written = (kind(model, length + steps) for kind in (KVCache, ByHand, WrittenOut))
    model(text[:, :length], cache=cache)
    for layer, own in enumerate(cache.layers):
        for kept in (hand.layers[layer].keys, written.keys[layer]):
            kept[:, :, :length] = own.groups[0].keys[:, :, :length]
        for kept in (hand.layers[layer].values, written.values[layer]):
            kept[:, :, :length] = own.groups[0].values[:, :, :length]
    hand.length = written.length = length
    calls = {
        "ours": lambda token: model(token, cache=cache),
        "hand": lambda token: model(token, cache=hand),
        "written": written,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    found = {}
    for place in range(length, length + steps):
        for name, call in calls.items():
            start = now()
            found[name] = call(text[:, place : place + 1])
            times[name].append(now() - start)
    for logits in found.values():
        torch.testing.assert_close(logits, found["ours"], atol=1e-5, rtol=1e-4)
    return {name: ratios(times["ours"][20:], times[name][20:])[1] for name in ("hand", "written")}


def by_hand(options: Namespace) -> Iterator[Goal]:
    for length in LENGTHS:
        found = isolated(by_hand_alone, length, 60 * options.repeats, seconds=600.0, gib=options.memory)
        text = f"a step of {named(DEMO)} after {length:,} tokens: time over that of "
        failure = found.get("failure")
        yield Goal(text + "a cache by hand, bare SDPA", 1.05, failure or found["hand"], at_most=True)
        yield Goal(text + "all written out by hand, without modules", 1.05, failure or found["written"], at_most=True)


def named(sizes: dict) -> str:
    """A GPT in a sentence."""
    return f"a GPT of {sizes['num_layers']} layers of width {sizes['embed_dim']}"


# ------------------------------------------------------------------------------------------------- a text without end


@torch.no_grad()
def stream_alone(progress: Progress, count: int) -> dict:
    """Tokens one after the other, on a window with sinks: bytes held, and how long each of the last thousand takes,
    beside the second thousand of another text, in turn."""
    torch.manual_seed(0)
    model = GPT(TransformerConfig(**DEMO), 65, Causal() & (Window(256, 0) | Prefix(4))).eval()
    sizes: set[int] = set()

    def steps(cache: KVCache) -> Iterator[None]:
        token = torch.zeros(1, 1, dtype=torch.int64)
        while True:
            token = model(token, cache=cache)[:, -1:].argmax(-1)
            sizes.add(cache.nbytes)
            yield

    long, short = (steps(KVCache(model, count)) for _ in range(2))
    for thousand in range(count // 1000 - 1):
        progress({}, 300.0)
        for _ in range(1000):
            next(long)
            if not thousand:
                next(short)
    times = in_turns({"last": partial(next, long), "second": partial(next, short)}, 1000, progress, 300.0)
    return {"ratio": ratios(times["last"], times["second"])[1], "sizes": sorted(sizes)}


def stream(options: Namespace) -> Iterator[Goal]:
    found = isolated(stream_alone, STREAM, seconds=600.0, gib=options.memory)
    text = f"{named(DEMO)} on Causal() & (Window(256, 0) | Prefix(4)), {STREAM:,} tokens: "
    reached = found.get("failure") or len(found["sizes"])
    yield Goal(text + "different sizes of the cache, in bytes", 1, reached, at_most=True)
    reached = found.get("failure") or found["ratio"]
    yield Goal(text + "time of a step of the last 1,000 over one of the second 1,000", 1.1, reached, at_most=True)


# ---------------------------------------------------------------------------------------------- beside transformers


def in_turns(calls: dict[str, Callable[[], object]], turns: int, progress: Progress, limit: float) -> dict:
    """Seconds of each call in each turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _turn in range(turns):
        for name, call in calls.items():
            progress({}, limit)
            start = now()
            call()
            times[name].append(now() - start)
    return times


def theirs(sizes: dict, vocab_size: int, length: int) -> Any:
    """A GPT-2 of transformers of these sizes, in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size, n_positions=length, n_embd=sizes["embed_dim"], n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def continued(model: Any, prompt: Tensor, new: int, kind: str | None, **options: Any) -> Tensor:
    """By the generate of transformers, to the end, with a cache of this kind."""
    with torch.inference_mode():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
            eos_token_id=None, cache_implementation=kind, **options,
        )  # fmt: skip


CACHES = {"DynamicCache": None, "StaticCache": "static"}


def tokens_alone(progress: Progress, batch: int, with_none: bool) -> dict:
    """New tokens from one, sampled: with our cache, without, and by transformers."""
    torch.manual_seed(0)
    ours, other = GPT(TransformerConfig(**DEMO), vocab_size=65).eval(), theirs(DEMO, 65, NEW + 1)
    prompt = torch.zeros(batch, 1, dtype=torch.int64)
    calls: dict[str, Callable[[], object]] = {"ours": lambda: generate(ours, prompt, NEW, temperature=0.8)}
    for name, kind in CACHES.items():
        options = {"do_sample": True, "temperature": 0.8, "top_k": 0}
        calls[name] = partial(continued, other, prompt, NEW, kind, **options)
    for call in calls.values():  # warm up
        progress({}, 600.0)
        call()
    times = in_turns(calls, 3, progress, 600.0)
    found = {name: ratios(times[name], times["ours"])[1] for name in CACHES}
    found["tokens/s"] = batch * NEW / sorted(times["ours"])[1]
    if with_none:
        without = in_turns(
            {"": lambda: generate(ours, prompt, NEW, temperature=0.8, use_cache=False)}, 1, progress, 1200.0
        )
        found["without"] = without[""][0] / sorted(times["ours"])[1]
    return found


def tokens(options: Namespace) -> Iterator[Goal]:
    for batch in (1, 16):
        found = isolated(tokens_alone, batch, batch == 1, seconds=1200.0, gib=options.memory)
        text = f"{named(DEMO)}, {NEW:,} sampled tokens after one, batch {batch}: times as fast as "
        note = "" if "failure" in found else f"{number(found['tokens/s'], '.3g')} tokens/s"
        if batch == 1:
            yield Goal(text + "without a cache", 40, found.get("failure") or found["without"], note=note)
        for name in CACHES:
            yield Goal(f"{text}transformers, {name}", 1.5, found.get("failure") or found[name], note=note)


def gpt2_alone(progress: Progress, dtype: torch.dtype) -> dict:
    """A long prompt and some tokens, greedy, by the same weights: ours over that of transformers."""
    torch.manual_seed(0)
    prompt = torch.randint(50257, (1, 1024))
    other = theirs(GPT2, 50257, 1152).to(dtype)
    with TemporaryDirectory() as folder:
        progress({}, 600.0)
        other.save_pretrained(folder)
        ours = hf.load(folder, dtype=dtype)
        calls: dict[str, Callable[[], object]] = {"ours": lambda: generate(ours, prompt, 128, temperature=0)}
        calls |= {name: partial(continued, other, prompt, 128, kind, do_sample=False) for name, kind in CACHES.items()}
        found = {name: call() for name, call in calls.items()}
        same = all(torch.equal(found["ours"], each) for each in found.values())
        times = in_turns(calls, 3, progress, 600.0)
    return {
        **{name: ratios(times[name], times["ours"])[1] for name in CACHES},
        "tokens/s": 128 / sorted(times["ours"])[1],
        "same": same,
    }


def gpt2(options: Namespace) -> Iterator[Goal]:
    for dtype in (torch.float32, torch.bfloat16):
        found = isolated(gpt2_alone, dtype, seconds=1200.0, gib=options.memory)
        text = f"GPT-2, 124M, {str(dtype)[6:]}, a prompt of 1,024 tokens and 128 new: times as fast as transformers, "
        note = "" if "failure" in found else f"{number(found['tokens/s'], '.3g')} tokens/s with the prompt's time; "
        note += "" if "failure" in found else ("the same tokens" if found["same"] else "tokens differ by rounding")
        for name in CACHES:
            yield Goal(text + name, 1.2, found.get("failure") or found[name], note=note)


def receptive_field_alone(progress: Progress) -> dict:
    graph = Window(256, 0) | Prefix(4)
    analysis.receptive_field([graph] * 24, 999_999, 1_000_000)
    times = in_turns({"": lambda: analysis.receptive_field([graph] * 24, 999_999, 1_000_000)}, 5, progress, 60.0)
    return {"ms": 1000 * sorted(times[""])[2]}


def questions(options: Namespace) -> Iterator[Goal]:
    found = isolated(receptive_field_alone, seconds=600.0, gib=options.memory)
    text = "receptive_field of Window(256, 0) | Prefix(4), N = 1,000,000, 24 layers: ms"
    yield Goal(text, 50, found.get("failure") or found["ms"], at_most=True)


SECTIONS = {"cache": by_hand, "stream": stream, "tokens": tokens, "gpt2": gpt2, "questions": questions}
