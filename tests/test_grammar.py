"""Text that is no graph is told, at once, and nothing of it ever runs."""

import time

import pytest

from attngraph import Causal, EdgeList, Full, PerHead, Prefix, Window, parse, parse_list


def test_the_operators_bind_as_in_python():
    assert parse("Causal() & Window(2, 0) | Prefix(1)") == (Causal() & Window(2, 0)) | Prefix(1)
    assert parse("Causal() & (Window(2, 0) | Prefix(1))") == Causal() & (Window(2, 0) | Prefix(1))
    assert parse("~Causal().T - Prefix(1)") == ~(Causal().T) - Prefix(1)
    assert parse("(~Causal()).T") == (~Causal()).T
    assert parse(" Window(left=2, right=0)\n") == Window(2, 0)
    assert parse("PerHead([Causal(-1), Prefix(2)])") == PerHead([Causal(-1), Prefix(2)])
    assert parse("EdgeList([[0], [1]], size=(2, 3))") == EdgeList([[0], [1]], (2, 3))


def test_long_chains_are_read():
    graph = parse(" | ".join(f"Window({i}, 0)" for i in range(500)))
    assert len(graph.graphs) == 500
    assert parse(repr(graph)) == graph


BAD = [
    ("", "not a graph expression"),
    ("Causal(", "never closed"),
    ("Causal() &", "invalid syntax"),
    ("__import__('os').system('echo run')", "not part of a graph expression"),
    ("Causal().contains(1, 2)", "not part of a graph expression"),
    ("Causal().__class__", "not part of a graph expression"),
    ("Causal.__init__", "not part of a graph expression"),
    ("open('x')", "not part of a graph expression"),
    ("Window(10**10**10, 0)", "not part of a graph expression: '10**10**10'"),
    ("Window(2.5, 0)", "not part of a graph expression: '2.5'"),
    ("Window('2', 0)", "not part of a graph expression"),
    ("Window(True, 0)", "left must be an int (got True)"),
    ("Window(*[1, 2])", "not part of a graph expression"),
    ("Window(**{})", "not part of a graph expression: ** in"),
    ("[Causal() for i in range(3)]", "not part of a graph expression"),
    ("Causal() if 1 else 2", "not part of a graph expression"),
    ("(x := Causal())", "not part of a graph expression"),
    ("lambda: 0", "not part of a graph expression"),
    ("Windw(1, 0)", "Windw(1, 0)"),
    ("Window(1)", "missing 1 required positional argument: 'right'"),
    ("Window(1, 2, 3, 4)", "Window(1, 2, 3, 4)"),
    ("Window(1, 0, size=3)", "unexpected keyword argument"),
    ("Window(-1, 0)", "left must be 0 or more (got -1)"),
    ("Causal() & 3", "expected a graph, got 3"),
    ("Causal() + Full()", "not part of a graph expression"),
    ("Causal() and Full()", "not part of a graph expression"),
    ("-Causal()", "not part of a graph expression"),
    ("~3", "expected a graph, got 3"),
    ("3", "not a graph but 3"),
    ("[Causal()]", "not a graph but"),
    ("Causal(); Full()", "invalid syntax"),
    ("EdgeList(<40 edges, ab12>, size=(3, 3))", "invalid syntax"),
    ("Window(" + "9" * 5000 + ", 0)", "not a graph expression"),
    ("(" * 10**6 + "Causal()" + ")" * 10**6, "not a graph expression"),
    ("~" * 10**6 + "Causal()", "not a graph expression"),
    ("~" * 5000 + "Causal()", "nest"),
    ("~" * 300 + "Causal()", "nests at most"),
    ("Causal()" + ".T" * 500, "nests at most"),
    ("Causal() | " * 10**6 + "Full()", "not a graph expression"),
    ("x" * (1 << 25), "at most"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:24] for text, _ in BAD])
def test_what_is_no_graph_is_told(text, message, capfd):
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 640
    assert time.perf_counter() - start < 10
    assert "run" not in capfd.readouterr().out


def test_only_text_is_parsed():
    with pytest.raises(TypeError, match="text must be a string"):
        parse(Causal())


def test_an_expression_may_name_graphs_of_the_data():
    bonds = EdgeList([[0, 1], [1, 0]], size=2)
    assert parse("(bonds | Window(1, 0)).with_global_nodes(1)", {"bonds": bonds}) == (
        bonds | Window(1, 0)
    ).with_global_nodes(1)
    assert parse_list("bonds, bonds.T", {"bonds": bonds}) == [bonds, bonds.T]
    with pytest.raises(ValueError, match="not part of a graph expression: 'bonds'"):
        parse("bonds")
    with pytest.raises(ValueError, match="names must be graphs by names of your own"):
        parse("Causal()", {"Causal": bonds})


@pytest.mark.parametrize("name", [3, "x y", "if", "ﬁ", ""])
def test_names_are_such_as_an_expression_can_have(name):
    with pytest.raises(ValueError, match="names must be identifiers"):
        parse("Full()", {name: Full()})


def test_an_unknown_name_is_told_beside_the_names_that_were_given():
    with pytest.raises(ValueError, match=r"'bond'.*, bonds$"):
        parse("bond & Full()", {"bonds": Full()})
