"""A graph of one's own: a class with fields and one method; what can go wrong is told when the class is made."""

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from graphs import GRAPHS

from attngraph import Causal, EdgeList, Graph, Identity, Random, Window, attend, cache
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
