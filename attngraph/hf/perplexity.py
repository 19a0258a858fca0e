"""What a graph costs a trained model: its loss on a text, on its own pattern and on other graphs.

    python -m attngraph.hf.perplexity path/of/model --text book.txt --graph "Window(256, 0) | Prefix(4)"
    python -m attngraph.hf.perplexity path/of/model --text book.txt --graph "Window(64, 0)" --sweep     layer by layer

`path` is a directory with a causal language model of transformers and its tokenizer, or a name that transformers
downloads. Of each graph: the share of the model's own edges that are kept, and the loss in nats a token, lower is
better. A graph given with commas has one part for each layer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attngraph.arguments import checked
from attngraph.graph.algebra import Full
from attngraph.graph.base import Graph, require_ints
from attngraph.graph.patterns import Causal
from attngraph.graph.text import parse_list, written
from attngraph.hf.connecting import connect, disconnect
from attngraph.hf.modules import attention_modules, connection_of, is_cross

CONTEXT, TOKENS = 1024, 65_536


class Cost(NamedTuple):
    """Of one choice of graphs."""

    name: str
    kept: float
    """Edges, over those that the model itself has."""
    loss: float
    """Nats a token."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@checked
def loss(model: nn.Module, tokens: Tensor, *, context: int = CONTEXT) -> float:
    """The mean of -log p(token | the tokens before it in its piece) over a text, in nats.

    tokens is int64 (N,), cut into pieces of `context`, each by itself; the first token of a piece is told, not guessed.
    """
    require_ints(2, context=context)
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"tokens must be of shape (N,) with N of 2 or more (got {tuple(tokens.shape)})")
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for piece in tokens.split(context):
            if len(piece) > 1:
                logits = model(piece[None].to(device), use_cache=False).logits[0, :-1]
                total += float(cross_entropy(logits.float(), piece[1:].to(device), reduction="sum"))
                count += len(piece) - 1
    return total / count


@checked
def costs(
    model: nn.Module, tokens: Tensor, graphs: Sequence[Sequence[Graph]], *, context: int = CONTEXT, sweep: bool = False
) -> list[Cost]:
    """The model as it is, then on each of the graphs, given as one for all layers or one for each; the model is left
    as it was. With `sweep`, each layer alone on each graph that is one, too.

    tokens is int64 (N,), of which `context` are read at once. Raises ValueError for a model that is connected already,
    and for graphs that are neither one nor one for each layer.
    """
    if any(connection_of(module) for module in model.modules()):
        raise ValueError("model must be as it is, to be compared: hf.disconnect(model) first")
    layers = [name for name, module in attention_modules(model).items() if not is_cross(name, module)]
    size = min(context, len(tokens))
    own = _own_patterns(model, tokens[:size], layers)
    found = [Cost("as it is", 1.0, loss(model, tokens, context=context))]
    for given in graphs:
        if len(given) not in (1, len(layers)):
            raise ValueError(f"graphs must be one, or one for each of {len(layers)} layers (got {len(given)})")
        by_layer = dict(zip(layers, [*given] * (len(layers) // len(given)), strict=True))
        text = written(given[0]) if len(given) == 1 else ", ".join(map(written, given))
        choices = {text: by_layer}
        if sweep and len(given) == 1:
            choices |= {f"{text} in layer {number}": {name: given[0]} for number, name in enumerate(layers)}
        for name, choice in choices.items():
            connect(model, choice)
            try:
                found.append(Cost(name, kept(choice, own, size), loss(model, tokens, context=context)))
            finally:
                disconnect(model)
    return found


def _own_patterns(model: nn.Module, tokens: Tensor, layers: Sequence[str]) -> dict[str, Graph]:
    """Who may hear whom by the model itself, in each layer."""
    connect(model, dict.fromkeys(layers, Full()))
    try:
        loss(model, tokens, context=len(tokens))
        connections = {name: connection_of(module) for name, module in attention_modules(model).items()}
        return {name: next(iter(each.own), Causal()) for name in layers if (each := connections[name]) is not None}
    finally:
        disconnect(model)


def kept(graphs: Mapping[str, Graph], own: Mapping[str, Graph], n: int) -> float:
    """The share of a model's own edges that are left, where some layers have graphs."""
    every = {name: pattern.num_edges(n, n) for name, pattern in own.items()}
    left = every | {
        name: (own[name] & graph).sized(n, n).num_edges() / (graph.heads or 1) for name, graph in graphs.items()
    }
    return sum(left.values()) / max(sum(every.values()), 1)


# --------------------------------------------------------------------------------------------------- as a program


def table(found: Iterable[Cost]) -> str:
    """To read."""
    found = list(found)
    width = max(len(each.name) for each in found)
    lines = [f"{'':{width}}{'edges kept':>12}{'loss, nats':>12}{'over its own':>14}{'perplexity':>12}"]
    for each in found:
        more = each.loss - found[0].loss
        lines.append(f"{each.name:{width}}{each.kept:12.1%}{each.loss:12.4f}{more:+14.4f}{each.perplexity:12.3f}")
    return "\n".join(lines)


def plot(found: Sequence[Cost], path: Path) -> None:
    """Loss against edges kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="edges kept, of those of the model itself", ylabel="loss, nats a token")
    axes.axhline(found[0].loss, color="0.6", linewidth=1, label="the model as it is")
    for number, each in enumerate(found[1:], 1):
        axes.plot(each.kept, each.loss, "o", color="C0")
        axes.annotate(f"{number}", (each.kept, each.loss), textcoords="offset points", xytext=(5, 4))
    told = "\n".join(f"{number}: {each.name}" for number, each in enumerate(found[1:], 1))
    axes.set_title(told, fontsize=8, loc="left")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def read_tokens(path: str, text: str, as_bytes: bool) -> Tensor:
    """The tokens of a text, by the model's tokenizer or byte by byte."""
    if as_bytes:
        return torch.tensor(list(text.encode("utf-8")))
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m attngraph.hf.perplexity", description=__doc__, **shape)
    parser.add_argument("path", help="a directory that save_pretrained has made, or a name that transformers downloads")
    parser.add_argument("--text", type=Path, required=True, help="a file of UTF-8 text that the model has not seen")
    parser.add_argument("--graph", action="append", default=[], help="again for each graph; with commas, by layer")
    parser.add_argument("--sweep", action="store_true", help="also each layer alone on each graph")
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help=f"tokens that are read at once (default {CONTEXT})"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of the text, at most (default {TOKENS:,})")
    parser.add_argument("--bytes", action="store_true", help="the model reads bytes, and has no tokenizer")
    parser.add_argument("--out", type=Path, help="a folder for costs.json and costs.png")
    given = parser.parse_args(arguments)
    try:
        graphs = [parse_list(text) for text in given.graph]
        text = given.text.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(given.path).eval()
        tokens = read_tokens(given.path, text, given.bytes)[: given.tokens]
        if len(tokens) and int(tokens.max()) >= (size := len(model.get_input_embeddings().weight)):  # pyright: ignore[reportArgumentType]
            raise ValueError(f"the model must know each token of the text, below {size} (got {int(tokens.max())})")
        context = min(given.context, getattr(model.config, "max_position_embeddings", given.context))
        found = costs(model, tokens, graphs, context=context, sweep=given.sweep)
    except (ValueError, TypeError, OSError) as error:
        hint = "" if given.bytes else "\n(a model that reads bytes has no tokenizer: --bytes)"
        parser.error(f"{error}{hint}")
    print(f"{given.path} on {len(tokens):,} tokens of {given.text}, {context} at once\n\n{table(found)}")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "costs.json").write_text(json.dumps([each._asdict() for each in found], indent=2) + "\n")
        plot(found, given.out / "costs.png")


if __name__ == "__main__":
    main()
