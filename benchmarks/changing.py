"""Graphs that change with every call: neighbours of a batch, new lists of edges, blocks that queries choose.

Sections of `benchmarks.goals`: python -m benchmarks.goals --section neighbors --section lists --section blocks
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attngraph import BlockTopK, EdgeList, attend, from_neighbors, plan
from benchmarks.experiment import Goal
from benchmarks.measure import Progress, in_turn, isolated, ratios
from benchmarks.peers import SDPA_CAUSAL, SDPA_MASK

HEADS, DIM = 4, 16
# Entries, nodes and keys of each, and at most how many times the time of SDPA with a mask
NEIGHBORS = [(1, 128, 8, 1.2), (32, 128, 8, 12.6 / 17.7), (16, 512, 16, 31 / 113), (4, 2048, 16, 35 / 546)]
NODES, EDGES = 20_000, 320_000
LONG = 16_384


def _step(attention, *sides: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    out = attention(*sides)
    return torch.autograd.grad(out, sides, torch.ones_like(out))


def neighbors_alone(progress: Progress, entries: int, n: int, k: int, repeats: int) -> dict:
    """A step on other neighbours each time, which are given, beside a mask that is made of them; one thread."""
    progress({}, 600.0)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides = [torch.randn(entries, HEADS, n, DIM, requires_grad=True) for _ in range(3)]
    tables = cycle([torch.rand(entries, n, n).topk(k).indices for _ in range(5)])

    def ours() -> None:
        _step(lambda q, k, v: attend(q, k, v, from_neighbors(next(tables))), *sides)

    def theirs() -> None:
        index = next(tables)
        mask = torch.zeros(entries, 1, n, n, dtype=torch.bool).scatter_(3, index[:, None], True)
        _step(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask), *sides)

    times = in_turn({"ours": ours, "theirs": theirs}, repeats, warmup=3)
    return {"ratio": ratios(times["ours"], times["theirs"])}


def neighbors(options: Namespace) -> Iterator[Goal]:
    for entries, n, k, most in NEIGHBORS:
        asked = entries, n, k, options.repeats
        found = isolated(neighbors_alone, *asked, seconds=600.0, gib=options.memory)
        text = f"from_neighbors, {k} new keys of each of {entries} × {n:,} queries, H = {HEADS}, D = {DIM}, "
        text += f"forward + backward, one thread: time over {SDPA_MASK}'s, whose mask is new too"
        yield Goal(text, round(most, 3), found.get("failure") or found["ratio"][1], at_most=True)


def lists_alone(progress: Progress, repeats: int) -> dict:
    """Making and planning a new list of edges, beside attention along it."""
    progress({}, 600.0)
    torch.manual_seed(0)
    sides = [torch.randn(1, 8, NODES, DIM, requires_grad=True) for _ in range(3)]
    edges = cycle([torch.randint(NODES, (2, EDGES)) for _ in range(repeats + 5)])
    kept = EdgeList(next(edges), NODES)

    def made() -> None:
        plan(EdgeList(next(edges), NODES), heads=8, head_dim=DIM)

    calls = {"made": made, "run": lambda: _step(lambda q, k, v: attend(q, k, v, kept), *sides)}
    times = in_turn(calls, repeats, warmup=2)
    return {"ratio": ratios(times["made"], times["run"])}


def lists(options: Namespace) -> Iterator[Goal]:
    found = isolated(lists_alone, options.repeats, seconds=600.0, gib=options.memory)
    text = f"EdgeList and plan of {EDGES:,} new edges, {NODES:,} nodes: time over that of forward + backward"
    yield Goal(text, 0.25, found.get("failure") or found["ratio"][1], at_most=True)


def blocks_alone(progress: Progress, repeats: int) -> dict:
    """A step on the blocks that queries choose, the choice included, beside causal attention on all keys."""
    progress({}, 600.0)
    torch.manual_seed(0)
    sides = [torch.randn(1, 8, LONG, 64, requires_grad=True) for _ in range(3)]

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    calls = {"causal": lambda: _step(causal, *sides)}
    for queries in (1, 64):
        graph = BlockTopK(64, 8, queries)
        calls[str(queries)] = lambda graph=graph: _step(lambda q, k, v: attend(q, k, v, graph), *sides)
    times = in_turn(calls, repeats, warmup=1)
    return {str(queries): ratios(times["causal"], times[str(queries)]) for queries in (1, 64)}


def blocks(options: Namespace) -> Iterator[Goal]:
    found = isolated(blocks_alone, min(options.repeats, 5), seconds=600.0, gib=options.memory)
    for queries in (1, 64):
        graph = BlockTopK(64, 8, queries)
        text = f"{graph}, N = {LONG:,}, H = 8, D = 64, forward + backward: times as fast as {SDPA_CAUSAL}"
        yield Goal(text, 6, found.get("failure") or found[str(queries)][1])


SECTIONS = {"neighbors": neighbors, "lists": lists, "blocks": blocks}
