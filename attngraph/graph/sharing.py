"""Questions to expressions whose parts occur many times: each part is asked once.

``g = g | g.T``, forty times, is an expression of a hundred operations that would be a trillion if it were written out.
A hook that asks its parts in turn would ask each as often as that; `once` remembers, until the outermost question is
answered, what the parts that occur more than once have answered. Nothing is kept in expressions without such parts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from attngraph.graph.base import Graph

MANY = 1000  # operations of an expression, written out, from which it is worth to look for parts that occur again


class _Question(threading.local):
    """What the outermost question of a thread has found out."""

    answers: dict[tuple, Any] | None = None
    parts: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()


_QUESTION = _Question()


def once(hook: Callable[..., Any], check: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A hook of graphs whose arguments are tensors or hashable, asked once of each part and argument; and checked."""
    name = hook.__name__

    @wraps(hook)
    def asked(self: Graph, *arguments: Any) -> Any:
        key = None
        if self.__dict__.get("_terms", 1) > MANY and id(self) not in _QUESTION.parts:
            return _as_outermost(asked, self, arguments)
        if _QUESTION.answers is not None and id(self) in _QUESTION.shared:
            key = name, id(self), *map(_name, arguments)
            if key in _QUESTION.answers:
                return _QUESTION.answers[key][1]
        answer = hook(self, *arguments)
        if check is not None:
            answer = check(self, *arguments, answer)
        if key is not None and _QUESTION.answers is not None:
            _QUESTION.answers[key] = arguments, answer  # the arguments stay alive with the answer, and so their ids
        return answer

    return asked


def _as_outermost(asked: Callable[..., Any], graph: Graph, arguments: tuple) -> Any:
    """The answer of a question within which others are asked."""
    around = vars(_QUESTION).copy()
    parts, shared = _parts(graph)
    _QUESTION.answers, _QUESTION.parts, _QUESTION.shared = {}, parts, shared
    try:
        return asked(graph, *arguments)
    finally:
        vars(_QUESTION).clear()
        vars(_QUESTION).update(around)


def moved(index: Tensor, by: int | Tensor) -> Tensor:
    """Node numbers plus a number: the same tensor for the same sum, so that parts are asked once about it."""
    if isinstance(by, Tensor) or _QUESTION.answers is None:
        return index + by
    origin, already = _QUESTION.answers.get(("origin", id(index)), (index, 0))
    if already + by == 0:
        return origin
    key = "moved", id(origin), already + by
    if key not in _QUESTION.answers:
        new = index + by
        _QUESTION.answers[key] = origin, new
        _QUESTION.answers["origin", id(new)] = origin, already + by
    return _QUESTION.answers[key][1]


def _name(argument: Any) -> Any:
    """What tells an argument from others as long as it lives."""
    if isinstance(argument, Tensor):
        return id(argument)
    return tuple(map(_name, argument)) if isinstance(argument, tuple) else argument


def _parts(graph: Graph) -> tuple[frozenset[int], frozenset[int]]:
    """All parts of an expression, and those that are operands of more than one operation, or more than once of one."""
    uses, seen, stack = Counter(), {id(graph)}, [graph]
    while stack:
        for part in stack.pop()._children:
            uses[id(part)] += 1
            if id(part) not in seen:
                seen.add(id(part))
                stack.append(part)
    return frozenset(seen), frozenset(part for part, count in uses.items() if count > 1)
