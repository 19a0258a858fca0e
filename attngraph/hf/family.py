"""What a family of pretrained models is: its switches, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import pad

from attngraph.hf.settings import Settings


class Form(NamedTuple):
    """How a tensor in a file becomes one here, and the other way."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT if x.ndim == 2 else x


SAME, TRANSPOSED = Form(_same, _same), Form(_transposed, _transposed)
# Positions of RoBERTa and BART, whose first two rows belong to no place.
AFTER_TWO = Form(lambda x: x[2:], lambda x: pad(x, (0, 0, 2, 0)))
IN_A_BATCH = Form(methodcaller("squeeze", 0), methodcaller("unsqueeze", 0))
ALONE_IN_A_BATCH = Form(methodcaller("squeeze", (0, 1)), methodcaller("expand", 1, 1, -1))


class Name(NamedTuple):
    """What a module is called in a file, and here; {} is the number of the layer. Of several, the file has all in one,
    one after the other.
    """

    file: str
    here: str | tuple[str, ...]
    form: Form = SAME


class Family(NamedTuple):
    """One kind of pretrained model."""

    architectures: tuple[str, ...]
    build: Callable[[Settings, bool], nn.Module]  # settings, and whether the head is tied
    names: tuple[Name, ...]
    prefix: str = ""  # of the names of most tensors
    head: tuple[str, str] = ("", "")  # the names, in the file, of head and embedding, which may be the same
    unread: tuple[str, ...] = ()  # tensors that have no part in the logits: regular expressions
    ties: Callable[[Settings], bool] = lambda given: given("tie_word_embeddings", True)
    outside: tuple[str, ...] = ()  # names without the prefix begin so
    zeros: tuple[str, ...] = ()  # tensors that have no part in the logits where they are 0, which they must be

    def full(self, name: str) -> str:
        """A name with the prefix that it has in files."""
        return name if name.startswith(self.outside) else self.prefix + name


def of_layers(layers: str, *names: Name) -> tuple[Name, ...]:
    """Names within a layer, such as `h.{}` in the file for GPT-2 and `transformer.layers.{}` here."""
    file, here = layers.split(" = ")

    def inside(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{here}.{name}" if isinstance(name, str) else tuple(f"{here}.{each}" for each in name)

    return tuple(Name(f"{file}.{name.file}", inside(name.here), name.form) for name in names)


ATTENTION = ("attention.query", "attention.key", "attention.value")


def projections(file: str, here: str, names: Sequence[str]) -> tuple[Name, ...]:
    """The four projections of attention: what those of the queries, keys, values and output are called in the file."""
    pairs = zip(names, ("query", "key", "value", "out"), strict=True)
    return tuple(Name(f"{file}.{name}", f"{here}.{own}") for name, own in pairs)
