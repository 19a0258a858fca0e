"""Lists the public names that have no docstring: python docs/undocumented.py

Public is what `attngraph` and its public modules export, with the methods and properties of its classes; and each
module itself. A method that fulfils a contract, as `contains` of a graph does, is documented where the contract is;
what torch.nn.Module says of `forward` in general is no documentation of ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import attngraph
from attngraph import analysis, distributed, draw, hf, models, nn, pyg

MODULES = (attngraph, nn, models, hf, analysis, draw, pyg, distributed)


def public(module: ModuleType) -> Iterator[tuple[str, str | None]]:
    """What a module exports, or without `__all__` what it defines, and the members of classes: name, docstring."""
    yield module.__name__, module.__doc__
    for name in getattr(module, "__all__", vars(module)):
        thing = getattr(module, name)
        ours = getattr(thing, "__module__", "").startswith("attngraph")
        if name.startswith("_") or inspect.ismodule(thing) or not (ours and callable(thing)):
            continue
        generated = (thing.__doc__ or "").startswith(f"{thing.__name__}(")  # a dataclass's signature
        yield f"{module.__name__}.{name}", None if generated else thing.__doc__
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                yield f"{module.__name__}.{name}.{member}", documented(thing, member)


def documented(owner: type, member: str) -> str | None:
    """Its docstring, or that of the class of ours whose contract it fulfils."""
    ours = (base for base in owner.__mro__ if base.__module__.startswith("attngraph") and member in vars(base))
    return next((text for base in ours if (text := inspect.unwrap(vars(base)[member]).__doc__)), None)


def undocumented() -> list[str]:
    """The names without a docstring."""
    return sorted({name for module in MODULES for name, text in public(module) if not text})


if __name__ == "__main__":
    found = undocumented()
    print("\n".join(found) or "every public name has a docstring")
    raise SystemExit(bool(found))
