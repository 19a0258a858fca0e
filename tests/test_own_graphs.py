"""A graph of one's own: a class with fields and one method; what can go wrong is told when the class is made."""

import copy
import dataclasses
import math
import pickle
import sys
from dataclasses import FrozenInstanceError, dataclass
from functools import reduce

import numpy as np
import pytest
import torch
from graphs import GRAPHS

from attngraph import (
    Causal,
    Documents,
    EdgeList,
    Graph,
    Identity,
    Neighborhood,
    Random,
    Window,
    attend,
    cache,
    from_edge_index,
)
from attngraph.graph.base import at_size


class Ring(Graph):
    nodes: int

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % self.nodes == 1


@dataclass(frozen=True)
class Decorated(Graph):
    nodes: int
    step: int = 1

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % self.nodes == self.step


def ring(n, nodes):
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (j - i) % nodes == 1


def test_one_method_is_enough():
    graph = Ring(5) | Identity()
    assert graph.num_edges(5, 5) == 10
    assert repr(graph) == str(graph) == "Ring(5) | Identity()"
    q, k, v = torch.randn(3, 1, 5, 4, dtype=torch.float64)
    expected = attend(q, k, v, graph, backend="reference")
    for backend in ("edges", "dense", "tiles", "rows", "auto"):
        assert torch.allclose(attend(q, k, v, graph, backend=backend), expected, atol=1e-12)


@pytest.mark.parametrize("graph", [Ring(nodes=4), Decorated(4)], ids=str)
def test_it_is_a_frozen_dataclass_and_a_value(graph):
    assert [field.name for field in dataclasses.fields(graph)][:1] == ["nodes"]
    assert graph == type(graph)(4) != type(graph)(5)
    assert hash(graph) == hash(type(graph)(4))
    assert repr(graph) == f"{type(graph).__name__}(4)"
    assert pickle.loads(pickle.dumps(graph)) == graph == copy.deepcopy(graph)
    assert dataclasses.replace(graph, nodes=5) == type(graph)(5)
    with pytest.raises(FrozenInstanceError, match="field 'nodes'"):
        graph.nodes = 3
    with pytest.raises(FrozenInstanceError):
        del graph.nodes
    assert torch.equal(graph.mask(9, 9), ring(9, 4))
    assert torch.equal(graph.T.mask(9, 9), ring(9, 4).T)


def test_an_unfrozen_dataclass_is_an_error_when_it_is_made():
    with pytest.raises(TypeError, match="frozen"):

        @dataclass
        class Unfrozen(Graph):
            nodes: int


FREE = ["heads_", "count", "edges", "lines", "blocks", "text", "pattern", "children", "head", "at", "map", "bind",
        "write", "scattered", "check", "twin", "own_size", "precedence", "graph", "graphs", "symbol",
        "operator"]  # fmt: skip
RESERVED = ["size", "heads", "rows", "mask", "T", "spans", "sized", "contains", "in_degrees", "num_edges", "edge_index",
            "with_global_nodes", "_edges", "_count", "_key", "_hash"]  # fmt: skip


def with_field(name):
    """A class whose only field has this name."""
    space = {"__annotations__": {name: int}, "__module__": __name__}
    if name != "contains":
        space["contains"] = lambda self, q_idx, kv_idx: (kv_idx - q_idx) % getattr(self, name) == 1
    return type("Mine", (Graph,), space)


@pytest.mark.parametrize("name", FREE)
def test_a_field_may_have_any_name_that_is_free(name):
    graph, wanted = with_field(name)(3), ring(12, 3)
    assert torch.equal(graph.mask(12, 12), wanted)
    assert graph.num_edges(12, 12) == int(wanted.sum())
    assert torch.equal(graph.T.mask(12, 12), wanted.T)
    assert repr((graph | Causal()).rows(2, 5)) == "(Mine(3) | Causal()).rows(2, 5)"
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    expected = attend(q, k, v, graph, backend="reference")
    for backend in ("dense", "edges", "tiles", "rows", "auto"):
        torch.testing.assert_close(attend(q, k, v, graph, backend=backend), expected)


@pytest.mark.parametrize("name", RESERVED)
def test_a_field_that_would_hide_a_graphs_own_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"Mine can't have a field called '{name}'"):
        with_field(name)


@pytest.mark.parametrize(("value", "message"), [
    ([1, 2], "must be hashable"), ({1: 2}, "must be hashable"), (torch.zeros(2), "got a Tensor"),
])  # fmt: skip
def test_a_field_that_is_no_value_is_told(value, message):
    with pytest.raises(TypeError, match=rf"field 'nodes' of Ring .*{message}"):
        Ring(value)


def test_a_class_derived_from_another_with_other_edges_forgets_its_speed_ups():
    for base in (Window, Causal):

        class Shifted(base):
            def contains(self, q_idx, kv_idx):
                return super().contains(q_idx, kv_idx + 3)

        graph = Shifted(*([5, 1] if base is Window else []))
        mask = graph.mask(40, 40)
        assert graph.num_edges(40, 40) == int(mask.sum())
        assert graph.edge_index(40, 40).shape[1] == int(mask.sum())
        assert graph.in_degrees(40, 40).tolist() == mask.sum(1).tolist()
        q, k, v = torch.randn(3, 1, 2, 40, 8)
        for backend in ("dense", "edges", "tiles", "rows", "auto"):
            found = attend(q, k, v, graph, backend=backend)
            torch.testing.assert_close(found, attend(q, k, v, graph, backend="reference"))


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_every_graph_is_a_hashable_value_of_its_own_class(case):
    graph = case.graph
    assert graph == graph
    assert hash(graph) == hash(copy.copy(graph))
    assert at_size(graph, case.n, case.m)[1:] == (case.n, case.m)
    with pytest.raises(FrozenInstanceError):
        graph.anything = 1


def test_edge_lists_with_one_digest_are_still_two(monkeypatch):
    """Digests may agree, by chance or on purpose: edges decide."""
    monkeypatch.setattr(EdgeList, "digest", "the same")
    a, b = (EdgeList(torch.tensor([[i] * 20, list(range(20))]), 30) for i in (1, 2))
    assert a != b
    assert a._key != b._key
    q, k, v = torch.randn(3, 1, 2, 30, 8)
    for graph in (a, b):
        torch.testing.assert_close(attend(q, k, v, graph), attend(q, k, v, graph, backend="reference"))
    cache.clear()  # their hashes change with the digest


class Earlier:
    """No graph, but defines contains."""

    def contains(self, q_idx, kv_idx):
        return q_idx >= kv_idx + 1


class Mixed(Earlier, Causal):
    """Causal's fields and Earlier's edges."""


class WithOptions(Graph):
    nodes: int
    label: str = dataclasses.field(default="", kw_only=True)

    def contains(self, q_idx, kv_idx):
        return (kv_idx - q_idx) % self.nodes == 1


class Together(Graph):
    parts: tuple

    def contains(self, q_idx, kv_idx):
        return self.parts[1].contains(q_idx, kv_idx)


def test_a_definition_from_a_mixin_counts_as_its_own():
    graph = Mixed()
    assert graph.num_edges(6, 6) == 15 == int(graph.mask(6, 6).sum())
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    torch.testing.assert_close(attend(q, k, v, graph), attend(q, k, v, graph, backend="reference"))


def test_keyword_fields_and_mixed_tuples_survive():
    graph = WithOptions(4, label="ring")
    assert pickle.loads(pickle.dumps(graph)) == graph
    mixed = Together((3, Random(2, 3)))
    assert mixed.num_edges(6, 9) == 12
    with pytest.raises(TypeError, match="got a Tensor"):
        Together((1, torch.zeros(2)))


def test_an_unfinished_graph_says_what_to_call():
    class Own(Graph):
        nodes: int

        def __post_init__(self):
            pass

        def contains(self, q_idx, kv_idx):
            return q_idx == kv_idx

    with pytest.raises(AttributeError, match=r"must end with that of Graph, super\(\).__post_init__"):
        Own(3).mask(3, 3)


def test_a_definition_of_the_wrong_shape_is_told():
    class Flat(Graph):
        def contains(self, q_idx, kv_idx):
            return torch.ones(7, 2, dtype=torch.bool)

    with pytest.raises(ValueError, match=r"one bool for each pair, of shape \(3, 3\) \(got \(7, 2\)\)"):
        Flat().mask(3, 3)


class Shift(Graph):
    """A field of any kind, which `contains` reads as it is."""

    by: object

    def contains(self, q_idx, kv_idx):
        return kv_idx - q_idx == (2 if self.by is True else 3 if math.copysign(1, self.by) < 0 else int(self.by == 1))


@pytest.mark.parametrize(("one", "other"), [(True, 1), (0.0, -0.0), (1.0, 1), ((0, 1), (False, 1)), (1 + 0j, 1)])
def test_values_that_python_takes_for_equal_are_told_apart(one, other):
    assert Shift(one) != Shift(other)
    assert Shift(one)._key != Shift(other)._key
    assert Shift(one) == Shift(one)
    assert len({Shift(one), Shift(other), Shift(one)}) == 2


def test_nan_is_a_value_as_any_other():
    assert Shift(math.nan) == Shift(float("nan"))
    assert Shift(math.nan)._key == Shift(float("nan"))._key
    assert hash(Shift(math.nan)) == hash(Shift(float("nan")))
    assert Shift(math.nan) != Shift(-math.nan)


def test_plans_of_fields_that_python_takes_for_equal_are_their_own():
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    for by in (True, 1, 0.0, -0.0):
        graph = Shift(by)
        torch.testing.assert_close(attend(q, k, v, graph), attend(q, k, v, graph, backend="reference"))


@pytest.mark.parametrize(
    "number", [np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor(4, dtype=torch.int32)], ids=repr
)
def test_integers_of_any_kind_are_ints(number):
    assert Ring(number) == Ring(4)
    assert type(Ring(number).nodes) is int
    assert repr(Window(number, 0)) == "Window(4, 0)"
    assert repr(Documents([number, 1])) == "Documents([4, 1])"
    assert repr(Neighborhood((number, 2), number)) == "Neighborhood([4, 2], 4)"
    assert Causal().rows(0, number) == Causal().rows(0, 4)
    assert Causal().sized(number, number).size == (4, 4)
    assert Causal().num_edges(number, number) == 10
    edges = torch.tensor([[0, 1], [1, 3]])
    assert EdgeList(edges, number) == from_edge_index(edges, number) == EdgeList(edges, (4, number))


@pytest.mark.parametrize(("name", "arguments", "today"), [
    ("blocks", "self, boxes", "_classify_boxes"), ("lines", "self, n, m", "_breakpoints"),
    ("own_size", "self", "_own_size"), ("edges", "self, n, m", "_edges"), ("count", "self, n, m", "_count"),
])  # fmt: skip
def test_a_hook_of_an_earlier_version_is_told_its_name(name, arguments, today):
    space: dict = {"contains": lambda self, q_idx, kv_idx: q_idx == kv_idx}
    space[name] = {"self": lambda self: None, "self, boxes": lambda self, boxes: None}.get(
        arguments, lambda self, n, m: None
    )
    with pytest.raises(TypeError, match=rf"Mine defines {name}, which was a hook .* and is {today} now"):
        type("Mine", (Graph,), space)


def test_an_init_of_ones_own_is_told_of_fields():
    class Own(Graph):
        def __init__(self, nodes):
            self.nodes = nodes

        def contains(self, q_idx, kv_idx):
            return q_idx == kv_idx

    with pytest.raises(FrozenInstanceError, match=r"declares its fields, as in `nodes: int`, and needs no __init__"):
        Own(3)


def test_numbers_near_the_end_of_int64_are_refused():
    for make in (lambda: Causal(sys.maxsize), lambda: Window(1 << 62, 0), lambda: Window(1 << 40, 0, 1 << 40)):
        with pytest.raises(ValueError, match=r"at most 2\*\*61"):
            make()
    assert Causal(1 << 61).num_edges(3, 3) == 9
    assert Random(2, seed=1 << 70).num_edges(3, 5) == 6


def test_too_many_operations_within_each_other_are_told():
    graph = reduce(lambda graph, _: graph.T, range(210), Causal())
    with pytest.raises(ValueError, match="a graph nests at most 210 operations"):
        graph.T  # noqa: B018
    assert graph.mask(3, 3).sum() == 6
    assert pickle.loads(pickle.dumps(graph)) == graph
    assert repr(graph) == "Causal()" + 210 * ".T"


def test_equal_expressions_of_many_shared_parts_are_found_equal_at_once():
    def made():
        graph = Causal() | EdgeList([[0], [1]], 9)
        for _ in range(40):
            graph = graph | graph.T
        return graph

    assert made() == made()
    assert len({made(), made()}) == 1
    assert str(made()) == repr(made()) == "<Union of 4,398,046,511,102 graphs>"
    assert torch.equal(pickle.loads(pickle.dumps(made())).mask(), torch.ones(9, 9, dtype=torch.bool))
