"""Graphs as numbers that a page in a browser reads: cells as `graph.counting` has them, and runs of keys besides."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attngraph.draw.cells import PAIRS, Cells, shares
from attngraph.graph import counting
from attngraph.graph.base import Edges, Graph, at_size
from attngraph.graph.listing import by_lines, list_edges, no_edges

MOST_RUNS = 2_000_000  # of keys, and edges besides: of more, a page shows how many there are where
MOST_PAIRS = 1 << 27


def encoded(graph: Graph, n: int, m: int, most: int = MOST_RUNS, pairs: int = MOST_PAIRS) -> dict[str, Any]:
    """One head's graph: its edges, or, where they are too many runs of keys, the share of edges in some cells.

    Pairs are looked at where a graph has no closed form: all of them if they are no more than these.
    """
    graph = at_size(graph, n, m)[0]
    found = _lines(graph, n, m, most, pairs)
    if found is None:
        picture = Cells.of(n, m)
        values = shares(graph, picture, min(pairs, PAIRS)).values
        return {"shares": as_bytes(values * 255), "shape": list(picture.shape)}
    cells, more, less = found
    return {
        "cells": [packed(column) for column in cells],
        "runs": [packed(column) for column in _runs(*more, n)],
        "less": [packed(less[0], delta=True), packed(less[1])],
    }


def _lines(graph: Graph, n: int, m: int, most: int, pairs: int) -> tuple[counting.Cells, Edges, Edges] | None:
    """Cells, and the edges that there are and are not besides; None where they are too many."""
    nothing = counting.Cells(*[torch.empty(0, dtype=torch.int64)] * 8)
    if not n * m:
        return nothing, no_edges(), no_edges()
    parts = by_lines(graph, n, m)
    cells = None if parts is None else counting.cells(parts[0], n, m, most)
    if parts is None or cells is None:
        if n * m > pairs:
            return None
        more = list_edges(graph, n, m)
        return (nothing, more, no_edges()) if len(_starts(*more).nonzero()) <= most else None
    _, more, less = parts
    rows = int((cells.bottom - cells.top).sum())
    return (cells, more, less) if rows + len(more[0]) + len(less[0]) <= most else None


def _starts(query: Tensor, key: Tensor) -> Tensor:
    """Which of sorted edges begin a run of keys that follow each other."""
    starts = torch.ones(len(query), dtype=torch.bool)
    starts[1:] = (query[1:] != query[:-1]) | (key[1:] != key[:-1] + 1)
    return starts


def _runs(query: Tensor, key: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted edges as runs: how many each query has, the gap before each, and how many keys follow its first."""
    if not len(query):
        return query, query, query
    first = _starts(query, key).nonzero()[:, 0]
    length = torch.diff(first, append=torch.tensor([len(query)]))
    query, key = query[first], key[first]
    gap = key.clone()
    again = query[1:] == query[:-1]
    gap[1:][again] = (key[1:] - key[:-1] - length[:-1])[again]
    return torch.bincount(query, minlength=n), gap, length - 1


# -------------------------------------------------------------------------------------------------------- as text


def packed(values: Tensor, delta: bool = False) -> str:
    """int64 numbers as text: zigzag variable-length integers of 7 bits a byte, in base64; `delta`: each less the one
    before."""
    number = values.numpy(force=True).astype(np.int64)
    number = np.diff(number, prepend=0) if delta else number
    number = ((number << 1) ^ (number >> 63)).astype(np.uint64)
    size = np.ones(len(number), np.int64)
    for bits in range(7, 64, 7):
        size += number >> np.uint64(bits) > 0
    at = size.cumsum() - size
    found = np.zeros(int(size.sum()), np.uint8)
    for place in range(int(size.max(initial=0))):
        here = size > place
        byte = (number[here] >> np.uint64(7 * place)) & np.uint64(127)
        found[at[here] + place] = byte | np.where(size[here] > place + 1, 128, 0).astype(np.uint64)
    return base64.b64encode(found.tobytes()).decode()


def as_bytes(values: Tensor) -> str:
    """Numbers from 0 to 255 as a byte each, in base64; only 0 is 0."""
    whole = torch.where(values > 0, values.round().clamp(1, 255), 0).to(torch.uint8)
    return base64.b64encode(whole.numpy(force=True).tobytes()).decode()
