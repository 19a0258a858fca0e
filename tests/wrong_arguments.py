"""Wrong kinds of argument, one after the other, for any function: it works, or says what is wrong in its own words.

    sweep(Window, left=1, right=0)

calls Window with each of its arguments replaced by each of WRONG. What does not work as documented must be a TypeError,
ValueError or MemoryError that attngraph itself raises, in words that name the argument and what came.
"""

import math
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

import attngraph
from attngraph import Causal

WRONG: dict[str, Any] = {
    "None": None,
    "text": "x",
    "no text": "",
    "a fraction": 1.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "negative": -1,
    "beyond int64": 1 << 64,
    "near 2**63": (1 << 63) - 1,
    "a bool": True,
    "an empty list": [],
    "a list of text": ["x"],
    "a list of lists": [[1], [2, 3]],
    "a dict": {"a": 1},
    "an object": object(),
    "a class": Causal,
    "a graph": Causal(),
    "a function": len,
    "a float tensor": torch.tensor([0.5, math.nan]),
    "a bool tensor": torch.tensor([True, False]),
    "an empty tensor": torch.empty(0),
    "a matrix": torch.zeros(2, 3, dtype=torch.int64),
    "a scalar tensor": torch.tensor(1.5),
    "bytes": b"x",
}
HERE = os.path.dirname(attngraph.__file__) + os.sep


def sweep(function: Callable[..., Any], /, **good: Any) -> Iterator[tuple[str, str]]:
    """The calls whose outcome is none that may be: which argument was what, and what came of it."""
    for name in good:
        for kind, value in WRONG.items():
            fault = outcome(lambda value=value, name=name: function(**{**good, name: value}), name, value)
            if fault is not None:
                yield f"{name} is {kind}", fault


def outcome(call: Callable[[], Any], name: str, value: Any) -> str | None:
    """What is wrong with what a call does, or None."""
    try:
        call()
    except (TypeError, ValueError, MemoryError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        told = str(error)
        if not frames[-1].filename.startswith(HERE):
            return f"raised elsewhere, {frames[-1].filename}: {type(error).__name__}: {told[:100]}"
        if name not in told and "got" not in told and repr(value) not in told:
            return f"does not name it: {told[:100]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None
