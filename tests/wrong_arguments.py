"""Every public function with every kind of wrong argument: what it should say, and a judge of what it says.

A `Door` is a function with arguments that fit. Each argument is replaced in turn by values of other kinds; either the
call works, or its error is one of ours: a TypeError, ValueError or MemoryError, raised in the library, that names the
argument. A new function is one line in `doors`.
"""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import attngraph

PACKAGE = str(Path(attngraph.__file__).parent)
WRONG: dict[str, Any] = {
    "None": None, "text": "x", "half": 1.5, "minus one": -1, "zero": 0, "true": True, "list": [],
    "lists": [[1], [2, 3]], "object": object(), "set": {1}, "dict": {}, "class": int, "function": lambda: 1,
    "vector": torch.zeros(2), "integers": torch.arange(6).view(2, 3), "five dimensions": torch.zeros(1, 1, 1, 1, 1),
    "nan": math.nan, "inf": math.inf, "huge": 10**30, "complex": 1j, "numpy": np.zeros((2, 2)),
    "graph": attngraph.Causal(), "graph class": attngraph.Causal,
}  # fmt: skip


class Door(NamedTuple):
    """A public function, and arguments that fit."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    also: dict[str, str] = {}
    """What errors may call an argument besides its name."""
    functions: tuple[str, ...] = ()
    """Arguments that may be a function: what one raises is its own."""


class Fault(NamedTuple):
    """A wrong argument, and an error that does not say so."""

    door: str
    argument: str
    wrong: str
    error: str


def faults(door: Door) -> Iterator[Fault]:
    """What of a function's answers to wrong arguments is no answer."""
    for argument in door.arguments:
        for kind, value in WRONG.items():
            yield from faults_of(door, argument, kind, value)


def faults_of(door: Door, argument: str, kind: str, value: Any) -> Iterator[Fault]:
    """The same for one argument and one value."""
    if callable(value) and argument in door.functions:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door.function(**{**door.arguments, argument: value})
    except Exception as error:
        if (said := complaint(error, door.also.get(argument, argument))) is not None:
            yield Fault(door.name, argument, kind, said)


def complaint(error: Exception, argument: str) -> str | None:
    """What is wrong with an error; None if it is one of ours and names the argument."""
    text = f"{type(error).__name__}: {error}"[:160]
    if not isinstance(error, TypeError | ValueError | MemoryError):
        return f"of another kind: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not last.filename.startswith(PACKAGE):
        return f"from inside ({Path(last.filename).name}:{last.lineno}): {text}"
    if not any(word in str(error) for word in argument.split("|")):
        return f"names no {argument!r}: {text}"
    return None
