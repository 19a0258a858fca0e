"""Expressions of a live page, evaluated in a process of their own: with so much memory, for so long, one at a time."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import threading
from collections.abc import Mapping
from functools import reduce
from multiprocessing.connection import Connection
from operator import xor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attngraph.draw.pages import data_of
from attngraph.graph.algebra import SymmetricDifference
from attngraph.graph.base import Graph
from attngraph.graph.edge_list import EdgeList
from attngraph.graph.text import parse, written

SECONDS, MEMORY = 10.0, 2 << 30  # of one question, and bytes beside what the libraries take
LONGEST, LAYERS, NODES = 4096, 1024, 1 << 24  # characters of an expression, and what may be asked of


class Superseded(Exception):
    """A newer question came before this one was answered."""


class Worker(NamedTuple):
    """A process, and how it is asked."""

    process: Any
    pipe: Connection


class Evaluator:
    """Answers about expressions, from a process that a newer question, or too long a one, ends."""

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY):
        self.seconds, self.memory = seconds, memory
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
        if can_fork:
            self._context.set_forkserver_preload(["attngraph.draw.preloaded"])
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._is_busy = False

    def start(self) -> None:
        """Have a process ready."""
        with self._lock:
            self._ready()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def ask(self, question: Mapping[str, Any]) -> str:
        """The data of a page, as JSON; ValueError for what can't be answered, Superseded by a newer question."""
        with self._lock:
            if self._is_busy:
                self._end()
            worker = self._ready()
            self._is_busy = True
            worker.pipe.send(dict(question))
        found: tuple[bool, str] | None = None
        is_late = False
        try:
            is_late = not worker.pipe.poll(self.seconds)
            found = None if is_late else worker.pipe.recv()
        except (EOFError, OSError):  # it has ended, or was ended
            pass
        with self._lock:
            is_current = self._worker is worker
            if is_current and found is not None:
                self._is_busy = False
            elif is_current:
                self._end()
        if not is_current:
            raise Superseded("a newer question came first")
        if is_late:
            raise ValueError(f"the graphs are not known after {self.seconds:g} seconds: fewer nodes, or other edges")
        is_answer, text = found or (False, _too_large(self.memory))
        if not is_answer:
            raise ValueError(text)
        return text

    def _ready(self) -> Worker:
        """A process that waits for a question; the lock is held."""
        if self._worker is None:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_answer_all, args=(there, self.memory), daemon=True)
            process.start()
            there.close()
            self._worker = Worker(process, here)
        return self._worker

    def _end(self) -> None:
        """Kill the process; the lock is held."""
        if self._worker is not None:
            process, pipe = self._worker
            self._worker, self._is_busy = None, False
            process.kill()
            process.join()
            pipe.close()


def _too_large(memory: int) -> str:
    return f"the graphs take more than {memory >> 20:,} MiB of memory: fewer nodes"


# ------------------------------------------------------------------------------------------------- in the process


def _answer_all(pipe: Connection, memory: int) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    _limit(memory)
    with contextlib.suppress(EOFError, KeyboardInterrupt, OSError):
        while True:
            question = pipe.recv()
            try:
                pipe.send((True, json.dumps(answered(question), ensure_ascii=False, separators=(",", ":"))))
            except MemoryError:
                pipe.send((False, _too_large(memory)))
            except (ValueError, TypeError) as error:
                pipe.send((False, str(error)))
            except RecursionError:
                pipe.send((False, "the expression is too deeply nested"))
            except RuntimeError as error:  # PyTorch's own, as of memory
                short = "not enough memory" in str(error) or "can't allocate" in str(error)
                pipe.send((False, _too_large(memory) if short else str(error)))


def _limit(memory: int) -> None:
    """Let this process take so much memory more than it has, where the system can say so."""
    try:
        import resource

        status = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    except (ImportError, OSError, StopIteration):
        return
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))


def answered(question: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a page about the expressions of a question: texts, n, heads, head_dim, and an edge to toggle."""
    texts, toggle = question.get("texts"), question.get("toggle")
    if not isinstance(texts, list) or not 0 < len(texts) <= LAYERS or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"texts must be expressions, one for each of 1 to {LAYERS} layers")
    n, heads, head_dim = (
        _number(question, name, most) for name, most in (("n", NODES), ("heads", 1024), ("head_dim", 4096))
    )
    if isinstance(toggle, dict):
        query, key, first, last = (_number(toggle, name, NODES, 0) for name in ("query", "key", "first", "last"))
        text = written(toggled(_parsed(texts[min(first, len(texts) - 1)]), query, key, n))
        texts = [text if first <= layer <= last else each for layer, each in enumerate(texts)]
    graphs = {text: _parsed(text) for text in dict.fromkeys(texts)}
    if question.get("resize"):
        graphs = {text: resized(graph, n) for text, graph in graphs.items()}
    heads = next((graph.heads for graph in graphs.values() if graph.heads), heads)
    return data_of([graphs[text] for text in texts], n, heads=heads, head_dim=head_dim)


def _parsed(text: str) -> Graph:
    if len(text) > LONGEST:
        raise ValueError(f"an expression has at most {LONGEST:,} characters here (got {len(text):,})")
    return parse(text)


def _number(question: Mapping[str, Any], name: str, most: int, least: int = 1) -> int:
    value = question.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most:,} (got {str(value)[:40]})")
    return value


def toggled(graph: Graph, query: int, key: int, n: int) -> Graph:
    """The graph with an edge more, or less: its difference from some edges, which stand at its end.

    >>> toggled(Causal(), query=0, key=3, n=8)
    Causal() ^ EdgeList([[3], [0]], size=(8, 8))
    >>> toggled(toggled(Causal(), query=0, key=3, n=8), query=0, key=3, n=8)
    Causal()
    """
    rest, edges = _apart(graph)
    edges ^= {(key, query)}
    return _with(rest, edges, n)


def resized(graph: Graph, n: int) -> Graph:
    """The same of more or fewer nodes: the edges that `toggled` has put at its end, as far as there are such nodes."""
    rest, edges = _apart(graph)
    return _with(rest, {edge for edge in edges if max(edge) < n}, n) if edges else graph


def _apart(graph: Graph) -> tuple[Graph, set[tuple[int, int]]]:
    """What `toggled` has made: the graph before, and the edges, (key, query), by which it differs."""
    match graph:
        case SymmetricDifference((*others, EdgeList() as last)) if others and last.size[0] == last.size[1]:
            return reduce(xor, others), {(int(key), int(query)) for key, query in last.edge_index().T.tolist()}
    return graph, set()


def _with(rest: Graph, edges: set[tuple[int, int]], n: int) -> Graph:
    return rest ^ EdgeList([*map(list, zip(*sorted(edges), strict=True))], size=n) if edges else rest
