"""A Llama of transformers on a window with sinks: by `hf.connect`, by its SDPA with a mask and by its FlexAttention.

Sections of `benchmarks.goals`: python -m benchmarks.goals --section connect --section evict --section costs
"""

from __future__ import annotations

import inspect
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attngraph import Causal, Full, Prefix, Window
from attngraph.hf import connect
from benchmarks import peers
from benchmarks.experiment import Goal
from benchmarks.measure import Progress, in_turn, isolated, milliseconds, now, ratios
from benchmarks.peers import near, or_masks, prefix

N, WIDTH, LAYERS, HEADS, KV_HEADS, VOCABULARY = 16_384, 512, 8, 8, 4, 1024
INNER = 1376  # 8/3 of the width, in multiples of 32, as Llama has it
WINDOW, SINKS = 256, 4
GRAPH = Causal() & (Window(WINDOW, 0) | Prefix(SINKS))
NEW, KEPT = 2000, 256  # tokens that are made, and the window of the cache
PEERS = {"SDPA with a mask": (5, 5), "FlexAttention": (1.3, None)}  # what is to be reached, forward and training


def llama(attention: str = "sdpa", **options: Any) -> nn.Module:
    """A model with parameters by chance, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": N}
    config = LlamaConfig(vocab_size=VOCABULARY, attn_implementation=attention, **sizes, **heads, **options)
    return LlamaForCausalLM(config).eval()


def contestants() -> dict[str, Callable[[Tensor], Tensor]]:
    """Three ways to run the same model on the same graph, from tokens to logits."""
    mask = GRAPH.mask(N, N)[None, None]
    pattern = peers.and_masks(peers.causal, or_masks(near(WINDOW, 0), prefix(SINKS)))
    flex = peers.compiled_block_mask(pattern, None, None, N, N, device="cpu")
    options = {
        "ours": (connect(llama(), GRAPH), None),
        "SDPA with a mask": (llama(), mask),
        "FlexAttention": (llama("flex_attention"), flex),
    }
    return {name: partial(_logits, model, given) for name, (model, given) in options.items()}


def _logits(model: nn.Module, mask: Any, tokens: Tensor) -> Tensor:
    return model(tokens, attention_mask=mask, use_cache=False).logits


def alone(progress: Progress, phase: str, name: str, repeats: int) -> dict:
    """One of the others beside ours: forward, or with backward of all parameters."""
    progress({}, 3000.0)
    tokens = torch.randint(VOCABULARY, (1, N), generator=torch.Generator().manual_seed(1))
    runs = {each: run for each, run in contestants().items() if each in ("ours", name)}
    if phase == "forward":
        with torch.no_grad():
            found = {each: run(tokens) for each, run in runs.items()}
            apart = float((found["ours"] - found[name]).abs().max() / found[name].abs().max())
            if apart > 1e-4:
                raise ValueError(f"the logits must be the same (they are {apart:.2g} apart)")
            times = in_turn({each: partial(run, tokens) for each, run in runs.items()}, repeats)
    else:

        def step(run: Callable[[Tensor], Tensor]) -> None:
            cross_entropy(run(tokens)[0, :-1], tokens[0, 1:]).backward()

        times = in_turn({each: partial(step, run) for each, run in runs.items()}, repeats, warmup=0)
    return {"ratio": ratios(times[name], times["ours"]), **{each: milliseconds(own) for each, own in times.items()}}


def connect_goals(options: Namespace) -> Iterator[Goal]:
    """Forward and training, beside each of the others."""
    setting = f"Llama, {LAYERS} layers, {WIDTH} wide, {N:,} tokens, {GRAPH}"
    for name, wanted in PEERS.items():
        for phase, least in zip(("forward", "training"), wanted, strict=True):
            if least is None:
                continue
            repeats = 3 if phase == "forward" else 2
            found = isolated(alone, phase, name, repeats, seconds=3000.0, gib=options.memory)
            text = f"{setting}, {phase}: times as fast as {name}"
            times = {"ours_ms": found.get("ours"), "theirs_ms": found.get(name)}
            yield Goal(text, least, found.get("failure") or found["ratio"][1], **times)


# ------------------------------------------------------------------------------------------------------- generation


def generating(progress: Progress, repeats: int) -> dict:
    """2,000 tokens: by us on a window, whose keys leave the cache, and by transformers' sliding cache."""
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    progress({}, 1800.0)
    names = inspect.signature(MistralForCausalLM.generate).parameters
    kept_as = "cache" if "cache" in names else "past_key_values"  # newer and older versions
    ours = connect(llama(), Causal() & Window(KEPT - 1, 0), evict=True)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": N}
    theirs = MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, sliding_window=KEPT, **sizes, **heads)).eval()
    theirs.load_state_dict(ours.state_dict())
    prompt = torch.randint(VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    made, most = {}, {}
    for _ in range(repeats):
        for name, model in (("ours", ours), ("theirs", theirs)):
            cache = DynamicCache(config=model.config)
            began = now()
            made[name] = model.generate(
                prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **{kept_as: cache}
            )
            seconds[name].append(now() - began)
            most[name] = max(layer.keys.shape[-2] for layer in cache.layers)
    if not torch.equal(made["ours"], made["theirs"]):
        raise ValueError("both must make the same tokens")
    return {"ratio": ratios(seconds["theirs"], seconds["ours"]), "seconds": seconds, "kept": most}


def evict_goals(options: Namespace) -> Iterator[Goal]:
    """Speed, and how many keys are kept."""
    found = isolated(generating, 3, seconds=1800.0, gib=options.memory)
    setting = f"generate of {NEW:,} tokens on a window of {KEPT}, evict=True"
    note = ""
    if "seconds" in found:
        ours, theirs = (sorted(found["seconds"][name])[1] for name in ("ours", "theirs"))
        note = f"{NEW / ours:.0f} and {NEW / theirs:.0f} tokens/s"
    text = f"{setting}: times as fast as transformers' sliding cache"
    yield Goal(text, 1, found.get("failure") or found["ratio"][1], note=note)
    kept = found.get("kept", {"ours": 0})["ours"] / KEPT
    yield Goal(f"{setting}: keys that are held, over the window", 1.5, found.get("failure") or kept, at_most=True)


# -------------------------------------------------------------------------------- what a graph costs a trained model


def trained(text: str, minutes: float) -> tuple[nn.Module, Tensor]:
    """A Llama on the bytes of a text, and those that it has not seen, the last tenth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    numbers = torch.tensor(list(text.encode("utf-8")))
    known, unknown = numbers[: len(numbers) * 9 // 10], numbers[len(numbers) * 9 // 10 :]
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=BYTES, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    began, share = now(), 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, 50 * share + 0.02) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        start = torch.randint(len(known) - BYTES - 1, (16, 1))
        pieces = known[start + torch.arange(BYTES + 1)]
        logits = model(pieces[:, :-1], use_cache=False).logits
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = (now() - began) / (60 * minutes)
    return model.eval(), unknown


BYTES, MINUTES = 256, 10.0


def cost_goals(options: Namespace) -> Iterator[Goal]:
    """Windows with and without sinks, on all layers and on every second one, of a model that was trained without."""
    import gpt as example

    from attngraph.hf.perplexity import costs

    text, source = example.read_text(None)
    model, unknown = trained(text, MINUTES)
    full, window = Full(), Window(31, 0)
    sinks = window | Prefix(4)
    choices = {
        "a window of 32 in all layers": [window],
        "a window of 32 and 4 sinks in all layers": [sinks],
        "a window of 32 in every second layer": [full, window] * 3,
        "a window of 32 and 4 sinks in every second layer": [full, sinks] * 3,
    }
    found = costs(model, unknown[:65_536], list(choices.values()), context=BYTES)
    own = found[0].loss
    for name, each in zip(choices, found[1:], strict=True):
        text = (
            f"a Llama of 6 layers, trained for {MINUTES:.0f} minutes on {source}, with {name}: nats a byte over its own"
        )
        note = f"{each.loss:.3f} over {own:.3f}, {each.kept:.0%} of the edges"
        yield Goal(text, 0.1, each.loss - own, at_most=True, note=note)


SECTIONS = {"connect": connect_goals, "evict": evict_goals, "costs": cost_goals}
