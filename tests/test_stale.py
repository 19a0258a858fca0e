"""What functions read may change, wherever it lies: the next call is on the new edges, compiled too; plans refuse."""

import collections
import threading
import types
import weakref
from contextvars import ContextVar

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from attngraph import PerHead, Window, attend, from_function, plan

N = 24
WIDTH = 2


class Holder:
    width = 2


class Slots:
    __slots__ = ("width",)

    def __call__(self, i, j):
        return (i - j).abs() <= self.width


class Property:
    def __init__(self):
        self._width = 2

    @property
    def width(self):
        return self._width


def within(width):
    """The pairs at most so far apart, as a function says it."""
    return lambda i, j: (i - j).abs() <= width()


def by_attribute(i, j):
    return (i - j).abs() <= by_attribute.width


def by_default(i, j, width=2):
    return (i - j).abs() <= width


def holder(made, read=lambda held: held.width, change=lambda held: setattr(held, "width", 6)):
    """A function that reads something of an object, and what changes it."""
    return within(lambda: read(made)), lambda: change(made)


def functions():
    """By where it is read: a function, and what changes its edges."""
    first = (lambda held: held[0]), lambda held: held.__setitem__(0, 6)
    named = (lambda held: held["width"]), lambda held: held.update(width=6)
    inner, slots, kept = {"width": 2}, Slots(), Holder()
    context, local = ContextVar("width", default=2), threading.local()
    by_attribute.width, by_default.__defaults__, slots.width, local.width, kept.width = 2, (2,), 2, 2, 2
    Holder.width = 2
    layer = torch.nn.Embedding(N, 1)
    reference, get = weakref.ref(kept), inner.get
    numbers = iter(range(2, 1000))
    yield "global", (lambda i, j: (i - j).abs() <= WIDTH), lambda: globals().update(WIDTH=6)
    yield "attribute of a function", by_attribute, lambda: setattr(by_attribute, "width", 6)
    yield "default", by_default, lambda: setattr(by_default, "__defaults__", (6,))
    by_code, wider = (lambda i, j: (i - j).abs() <= 2), (lambda i, j: (i - j).abs() <= 6)
    yield "code", by_code, lambda: setattr(by_code, "__code__", wider.__code__)
    yield "slots", slots, lambda: setattr(slots, "width", 6)
    yield "tensor", *holder(torch.tensor([2]), *first)
    yield "data of a tensor", *holder(torch.tensor([2]), first[0], lambda held: held.data.fill_(6))
    yield "array", *holder(np.array([2]), lambda held: int(held[0]), first[1])
    yield "array of objects", *holder(np.array([[2], None], dtype=object), lambda held: held[0][0],
                                      lambda held: held[0].__setitem__(0, 6))  # fmt: skip
    yield "list", *holder([2], *first)
    yield "memory", *holder(memoryview(bytearray([2])), *first)
    yield "tuple of a list", *holder(([2],), lambda held: held[0][0], lambda held: held[0].__setitem__(0, 6))
    yield "named tuple", *holder(collections.namedtuple("Held", "width")([2]), lambda held: held.width[0],
                                 lambda held: held.width.__setitem__(0, 6))  # fmt: skip
    yield "dict", *holder({"width": 2}, *named)
    yield "view of a dict", *holder(types.MappingProxyType(inner), named[0], lambda held: inner.update(width=6))
    yield "method of a dict", within(lambda: get("width")), lambda: inner.update(width=6)
    yield "object", *holder(Holder())
    yield "class", *holder(Holder)
    yield "property", *holder(Property(), change=lambda held: setattr(held, "_width", 6))
    yield "namespace", *holder(types.SimpleNamespace(width=2))
    yield "context", within(context.get), lambda: context.set(6)
    yield "thread", *holder(local)
    yield "weak reference", within(lambda: reference().width), lambda: setattr(kept, "width", 6)
    yield "parameter", (lambda i, j: layer.weight[i, 0] > layer.weight[j, 0]), lambda: layer.weight.data.neg_()
    yield "iterator", within(lambda: next(numbers)), lambda: None


NAMES = [name for name, _, _ in functions()]
IN_GRAPHS = {
    "alone": lambda graph: graph,
    "algebra": lambda graph: (graph & Window(9, 9)).T | Window(1, 0),
    "heads": lambda graph: PerHead([graph, ~graph]),
    "slice": lambda graph: graph.rows(0, N).sized(N, N),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "put", [put if put == "algebra" else pytest.param(put, marks=pytest.mark.nightly) for put in IN_GRAPHS]
)
def test_the_next_call_is_on_the_new_edges(name, put):
    globals().update(WIDTH=2)
    _, function, change = next(each for each in functions() if each[0] == name)
    graph = IN_GRAPHS[put](from_function(function))
    q = torch.randn(1, 2, N, 4, generator=torch.Generator().manual_seed(0))
    backends = ("auto", "dense", "edges", "tiles", "rows")
    torch._dynamo.reset()
    program = torch.compile(lambda q: attend(q, q, q, graph), backend="eager", fullgraph=True)
    before = [attend(q, q, q, graph, backend=backend) for backend in backends], program(q)
    made = plan(graph, N, N, heads=2)
    change()
    if name == "iterator":  # nobody knows what it will give: it is asked anew each time
        assert graph._state() != graph._state()
        return
    right = attend(q, q, q, IN_GRAPHS[put](from_function(function)), backend="reference")
    assert not torch.allclose(before[1], right)
    for backend in backends:
        assert_close(attend(q, q, q, graph, backend=backend), right, rtol=1e-4, atol=1e-5)
    assert_close(program(q), right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has changed since the plan was made: make a new one"):
        attend(q, q, q, made)
