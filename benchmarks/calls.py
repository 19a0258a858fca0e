"""What an argument of `attend` costs (dropout, scores, normalisers, weights, padding), beside the plain call and peers.

Times in turn, in one run. These are sections of `benchmarks.goals`: python -m benchmarks.goals --section calls
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attngraph import Additive, Alibi, Causal, LeakyReLU, Prefix, SoftCap, Window, attend, to_block_mask
from attngraph.models import GPT
from attngraph.nn import TransformerConfig
from benchmarks import peers, steps
from benchmarks.experiment import Goal
from benchmarks.measure import Progress, cost, failure, in_turn, isolated, milliseconds, ratios

GRAPH, N, HEADS, DIM = Causal() & (Window(128, 0) | Prefix(4)), 4096, 8, 64
NODES, PYG_DIM = 20_000, 16
LARGE = 131_072
Run = Callable[[], object]


class Case(NamedTuple):
    """A call: its options, and at most how many times the plain step it may take."""

    name: str
    wanted: float
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    against: str = "plain"


def cases() -> list[Case]:
    """The calls that people make."""
    padding = torch.ones(1, N, dtype=torch.bool)
    padding[:, -N // 10 :] = False
    return [
        Case("plain", 1, {}),
        Case("compiled plain", 1, {}, compiled=True),
        Case("dropout_p=0.1", 1.35, {"dropout_p": 0.1}),
        Case("return_weights=True", 1.5, {"return_weights": True}),
        Case("return_weights=True, their gradient too", 3, {"return_weights": True}),
        *(
            Case(f"normalize={name!r}", 1.2, {"normalize": name})
            for name in ("sigmoid", "none", "relu", "squared_relu")
        ),
        Case("normalize=a function", 2.5, {"normalize": torch.nn.functional.silu}),
        Case("score=SoftCap(50.0)", 1.35, {"score": SoftCap(50.0)}),
        Case("score=LeakyReLU()", 1.35, {"score": LeakyReLU()}),
        Case("attention_mask", 1.05, {"attention_mask": padding}),
        Case("attention_mask, compiled", 1.1, {"attention_mask": padding}, compiled=True, against="compiled plain"),
        Case("dropout_p=0.1, compiled", 1.35, {"dropout_p": 0.1}, compiled=True, against="compiled plain"),
        Case("Alibi", 1.2, {"bias": Alibi.geometric(HEADS)}),
        Case("sinks", 1.35, {"sinks": torch.zeros(HEADS)}),
        Case("float64", 2.2, {}, dtype=torch.float64),
    ]


def step_of(case: Case) -> Run:
    """Forward and backward of a case."""
    q, k, v, grad = (torch.randn(1, HEADS, N, DIM, dtype=case.dtype) for _ in range(4))
    sides = [side.requires_grad_() for side in (q, k, v)]
    attention = partial(attend, graph=GRAPH, **case.options)
    attention = torch.compile(attention, fullgraph=True) if case.compiled else attention

    def step() -> tuple[Tensor, ...]:
        found = attention(*sides)
        if isinstance(found, Tensor):
            return torch.autograd.grad(found, sides, grad)
        gradients = (grad, torch.ones_like(found[1])) if "gradient" in case.name else (grad,)
        return torch.autograd.grad(found[: len(gradients)], sides, gradients)

    return step


def calls_alone(progress: Progress, repeats: int) -> dict:
    """Each case over the one that it is measured against."""
    torch.manual_seed(0)
    progress({}, 600.0)
    runs = {case.name: step_of(case) for case in cases()}
    for run in runs.values():
        run()
    progress({}, 3600.0)
    times = in_turn(runs, repeats, warmup=2)
    return {
        case.name: {"ratio": ratios(times[case.name], times[case.against]), "ms": milliseconds(times[case.name])}
        for case in cases()
    }


def rivals_alone(progress: Progress, repeats: int) -> dict:
    """PyTorch's own with a mask and dropout, and FlexAttention with a soft cap, forward, beside ours."""
    torch.manual_seed(0)
    progress({}, 600.0)
    q, k, v = torch.randn(3, 1, HEADS, N, DIM)
    mask, blocks, flex = GRAPH.mask(N, N), to_block_mask(GRAPH, N, N), torch.compile(flex_attention)

    def score_mod(score, b, h, i, j):
        return 50.0 * torch.tanh(score / 50.0)

    pairs: dict[str, tuple[Run, Run]] = {
        "scaled_dot_product_attention with a mask and dropout": (
            lambda: attend(q, k, v, GRAPH, dropout_p=0.1),
            lambda: scaled_dot_product_attention(q, k, v, mask, 0.1),
        ),
        "compiled FlexAttention with a soft cap as its score_mod": (
            lambda: attend(q, k, v, GRAPH, score=SoftCap(50.0)),
            lambda: flex(q, k, v, score_mod=score_mod, block_mask=blocks),
        ),
    }
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, (ours, theirs) in pairs.items():
            try:
                times = in_turn({"ours": ours, "theirs": theirs}, repeats, warmup=3)
            except Exception as error:  # what a peer can't do is printed
                found[name] = {"failure": failure(error)}
                continue
            found[name] = {"times": ratios(times["theirs"], times["ours"]), **_ms(times)}
    return found


def _ms(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {f"{name}_ms": milliseconds(each) for name, each in times.items()}


# ------------------------------------------------------------------------------------------------ beside PyG's layers


class Layer(NamedTuple):
    """A layer of PyG, and what ours computes of its parameters."""

    name: str
    wanted: float
    conv: nn.Module
    ours: Callable[[Any, Tensor, Any], Tensor]


def layers() -> list[Layer]:
    """GATv2, GAT, and a TransformerConv that drops weights; without self-loops, as the graph has its own."""
    from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

    width = HEADS * PYG_DIM

    def heads(x: Tensor) -> Tensor:
        return x.view(len(x), HEADS, -1).transpose(0, 1)

    def nodes(out: Tensor) -> Tensor:
        return out.transpose(0, 1).flatten(1)

    def gatv2(conv, x, graph):
        k = heads(conv.lin_l(x))
        return nodes(attend(heads(conv.lin_r(x)), k, k, graph, score=Additive(conv.att[0], "leaky_relu"))) + conv.bias

    def gat(conv, x, graph):
        v = heads(conv.lin(x))
        of_query, of_key = ((v * att[0][:, None]).sum(-1) for att in (conv.att_dst, conv.att_src))
        q = torch.stack([of_query, torch.ones_like(of_query)], -1)
        k = torch.stack([torch.ones_like(of_key), of_key], -1)
        return nodes(attend(q, k, v, graph, score=LeakyReLU(conv.negative_slope), scale=1.0)) + conv.bias

    def transformer(conv, x, graph):
        q, k, v = (heads(linear(x)) for linear in (conv.lin_query, conv.lin_key, conv.lin_value))
        return nodes(attend(q, k, v, graph, dropout_p=conv.dropout if conv.training else 0.0))

    return [
        Layer("GATv2Conv", 6, GATv2Conv(width, PYG_DIM, HEADS, add_self_loops=False), gatv2),
        Layer("GATConv", 6, GATConv(width, PYG_DIM, HEADS, add_self_loops=False), gat),
        Layer(
            "TransformerConv with dropout=0.1", 7,
            TransformerConv(width, PYG_DIM, HEADS, dropout=0.1, root_weight=False), transformer,
        ),
    ]  # fmt: skip


def layers_alone(progress: Progress, repeats: int, limit: float) -> dict:
    """Forward and backward of each layer, of PyG's as it is and compiled, over ours."""
    torch.manual_seed(0)
    graph = peers.uniform(NODES)
    edge_index = graph.edge_index()
    x, grad = torch.randn(NODES, HEADS * PYG_DIM), torch.randn(NODES, HEADS * PYG_DIM)
    found: dict[str, Any] = {}
    for layer in layers():
        progress(found, 900.0)
        conv = layer.conv.eval()
        torch.testing.assert_close(layer.ours(conv, x, graph), conv(x, edge_index), atol=1e-4, rtol=1e-4)
        conv.train()

        def step(forward: Callable[[], Tensor], conv: nn.Module = conv) -> None:
            torch.autograd.backward(forward(), grad)
            conv.zero_grad()

        compiled = torch.compile(conv)
        runs: dict[str, Run] = {
            "ours": partial(step, partial(layer.ours, conv, x, graph)),
            "PyG": partial(step, partial(conv, x, edge_index)),
            "PyG compiled": partial(step, partial(compiled, x, edge_index)),
        }
        times = in_turn(runs, repeats, warmup=1, seconds=limit)
        found[layer.name] = {
            "times": {name: ratios(times[name], times["ours"]) for name in runs if name != "ours"},
            **_ms(times),
        }
    return found


# ------------------------------------------------------------------------------------------------------------- memory


def memory_alone(progress: Progress) -> dict:
    """MiB that a step takes beyond its tensors and gradients, at N = 131,072, and the MiB of one of these."""
    progress({}, 900.0)
    padding = torch.ones(1, LARGE, dtype=torch.bool)
    padding[:, -1000:] = False
    options: dict[str, dict] = {
        "plain": {},
        "dropout_p=0.1": {"dropout_p": 0.1},
        "return_weights=True, reduce='entropy'": {"return_weights": True, "reduce": "entropy"},
        "attention_mask": {"attention_mask": padding},
    }
    q, k, v, grad = (torch.randn(1, HEADS, LARGE, PYG_DIM) for _ in range(4))
    sides = [side.requires_grad_() for side in (q, k, v)]
    found: dict[str, Any] = {}
    for name, given in options.items():

        def step(given: dict[str, Any] = given) -> None:
            out: Any = attend(sides[0], sides[1], sides[2], GRAPH, **given)
            outs, grads = ((out,), (grad,)) if isinstance(out, Tensor) else (out, (grad, torch.ones_like(out[1])))
            torch.autograd.grad(outs, sides, grads)

        step()
        found[name] = {"mib": cost(step)[1], "tensor_mib": q.nbytes / 2**20}
    edges = GRAPH.num_edges(LARGE, LARGE)
    return {**found, "edges": edges}


# ----------------------------------------------------------------------------------------------------------- training


def dropout_alone(progress: Progress, repeats: int) -> dict:
    """Training steps of a GPT on a window, with and without dropout (of weights, and of what each phase adds)."""
    progress({}, 600.0)
    tokens, runs = torch.randint(65, (2, 1025)), {}
    for dropout in (0.0, 0.1):
        torch.manual_seed(0)
        config = TransformerConfig(embed_dim=128, num_layers=4, num_heads=4, max_length=1024, dropout=dropout)
        model = GPT(config, vocab_size=65, graph=Causal() & (Window(64, 0) | Prefix(4)))
        runs[f"dropout={dropout}"] = steps.training_step(model, tokens[:, :-1], tokens[:, 1:], "cpu")
    times = in_turn(runs, repeats, warmup=2)
    without, dropped = times.values()
    return {"ratio": ratios(dropped, without), **_ms(times)}


# --------------------------------------------------------------------------------------------------------------- goals


def calls_goals(options: Namespace) -> Iterator[Goal]:
    """The table of what an argument costs."""
    name = f"{GRAPH}, N = {N}, forward + backward"
    found = isolated(calls_alone, options.repeats, seconds=600.0, gib=options.memory)
    for case in cases():
        own = found.get(case.name, {"ratio": [found.get("failure", "not reached")] * 3, "ms": None})
        if case.name != case.against and "plain" not in case.name.split():
            text = f"{name}, {case.name}: times the {case.against} step"
            yield Goal(text, case.wanted, own["ratio"][1], at_most=True, ours_ms=own["ms"])
    found = isolated(rivals_alone, options.repeats, seconds=600.0, gib=options.memory)
    for rival, own in found.items():
        reached = own.get("failure") or own["times"][1]
        yield Goal(f"{GRAPH}, N = {N}, forward: times as fast as {rival}", 1, reached)


def layers_goals(options: Namespace) -> Iterator[Goal]:
    """Beside the layers of PyG."""
    found = isolated(layers_alone, options.repeats, options.limit, seconds=900.0, gib=options.memory)
    name = f"{NODES:,} nodes, {16 * NODES:,} random edges, H = {HEADS}, D = {PYG_DIM}, forward + backward"
    for layer in layers():
        for peer, wanted in (("PyG", layer.wanted), ("PyG compiled", 1)):
            own = found.get(layer.name)
            reached = own["times"][peer][1] if own else found.get("failure", "not reached")
            yield Goal(f"{name}: times as fast as {peer}'s {layer.name}", wanted, reached)


def training_goals(options: Namespace) -> Iterator[Goal]:
    """Of the GPT example's model."""
    found = isolated(dropout_alone, options.repeats, seconds=600.0, gib=options.memory)
    text = "GPT training step, Causal() & (Window(64, 0) | Prefix(4)), 1024 tokens, dropout 0.1: times that without"
    yield Goal(text, 1.2, found.get("failure") or found["ratio"][1], at_most=True)


def memory_goals(options: Namespace) -> Iterator[Goal]:
    """Peak extra memory: neither N² nor E · D nor E · H · D."""
    found = isolated(memory_alone, seconds=900.0, gib=options.memory)
    for case in ("dropout_p=0.1", "return_weights=True, reduce='entropy'", "attention_mask"):
        text = f"{GRAPH}, N = {LARGE:,}, H = {HEADS}, D = {PYG_DIM}, {case}: MiB of a step over those of an E × D array"
        own = found.get(case)
        whole = found.get("edges", 1) * PYG_DIM * 4 / 2**20
        yield Goal(text, 1, own["mib"] / whole if own else found.get("failure", "not reached"), at_most=True)


SECTIONS = {"calls": calls_goals, "layers": layers_goals, "memory": memory_goals, "dropout": training_goals}
