"""Graphs as text: `parse` is the inverse of `repr`. It reads Python's own syntax tree and never evaluates anything."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor

from attngraph import cache
from attngraph.arguments import checked, shown
from attngraph.graph import algebra, compose, dynamic, edge_list, expander, grids, patterns
from attngraph.graph.base import MAX_TERMS_WRITTEN, Graph
from attngraph.graph.edge_list import EdgeList

LONGEST = 1 << 24  # characters
DEEPEST = 190  # nested operations; Python's own parser takes 200 brackets

NAMES = {
    name: kind
    for module in (patterns, expander, grids, edge_list, compose, dynamic)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and kind.__module__ == module.__name__ and issubclass(kind, Graph) and name[0] != "_"
} | {"Full": algebra.Full, "Empty": algebra.Empty}
"""The graphs that an expression may name: those of the library that are no operation."""
OPERATORS = {
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
    ast.BitAnd: lambda a, b: a & b,
    ast.Sub: lambda a, b: a - b,
    ast.MatMult: lambda a, b: a @ b,
}
METHODS = ("rows", "sized", "with_global_nodes")


@checked
def parse(text: str, names: Mapping[str, Graph] | None = None) -> Graph:
    """The graph that an expression describes, as `repr` writes it.

    Graphs by name with numbers and lists as arguments, the operators ``| & - ^ ~ @``, ``.T``, ``.rows``, ``.sized``
    and ``.with_global_nodes``; nothing else. No code runs. `names` are further graphs, such as those of the data, that
    the expression may name.

    >>> parse("Causal() & (Window(256, 0) | Prefix(4))")
    Causal() & (Window(256, 0) | Prefix(4))
    >>> parse("bonds | Identity()", {"bonds": EdgeList([[0, 1], [1, 0]], size=2)})
    EdgeList([[1, 0], [0, 1]], size=(2, 2)) | Identity()

    Raises ValueError that says what was not understood.
    """
    graph = _parsed(text, names=names)
    if not isinstance(graph, Graph):
        raise ValueError(f"not a graph but {_short(repr(graph))}: {_short(text)!r}; {_HINT}")
    return graph


def written(graph: Graph) -> str:
    """The whole expression, as `parse` reads it, also where `repr` cuts it."""
    return graph._write(written) if graph._terms <= MAX_TERMS_WRITTEN else repr(graph)


@checked
def parse_list(text: str, names: Mapping[str, Graph] | None = None) -> list[Graph]:
    """The graphs that expressions describe, separated by commas, as for the layers of a model; `names` as in `parse`.

    >>> parse_list("Causal() & Window(8, 0), Causal()")
    [Causal() & Window(8, 0), Causal()]
    """
    graphs = _parsed(text, names=names)
    graphs = [*graphs] if isinstance(graphs, list) else [graphs]
    if not graphs or not all(isinstance(graph, Graph) for graph in graphs):
        raise ValueError(f"not graphs, separated by commas: {_short(text)!r}; {_HINT}")
    return graphs


def _parsed(text: str, tensors: Sequence[Tensor] = (), names: Mapping[str, Graph] | None = None) -> Any:
    """The value of an expression: a graph, a number, or a list of them; `_0`, `_1`, … stand for tensors."""
    for name, graph in (names or {}).items():
        if not isinstance(graph, Graph) or name in NAMES:
            raise ValueError(f"names must be graphs by names of your own (got {shown(graph)} as {name!r})")
        if not (isinstance(name, str) and name.isascii() and name.isidentifier()) or iskeyword(name):
            raise ValueError(f"names must be identifiers, as Python's are, of ASCII letters (got {name!r})")
    if not isinstance(text, str):
        raise TypeError(f"a graph expression is a str (got {type(text).__name__})")
    if len(text) > LONGEST:
        raise ValueError(f"a graph expression has at most {LONGEST} characters (got {len(text)})")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "too deeply nested"
        raise ValueError(f"not a graph expression: {_short(text)!r} ({reason}); {_HINT}") from None
    return _value(tree, text, tensors, names or {}, 0)


_HINT = f"write for example Causal() & (Window(256, 0) | Prefix(4)), of {', '.join(NAMES)}"


def _value(node: ast.expr, text: str, tensors: Sequence[Tensor], names: Mapping[str, Graph], depth: int) -> Any:
    """A graph, a number or a list."""
    if depth > DEEPEST:
        raise ValueError(f"a graph expression nests at most {DEEPEST} operations: {_short(text)!r}")

    def inner(part):
        return _value(part, text, tensors, names, depth + 1)

    match node:
        case ast.Constant(value=int() | None as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            return -number
        case ast.List() | ast.Tuple():
            return [inner(part) for part in node.elts]
        case ast.UnaryOp(op=ast.Invert()):
            return ~_graph(inner(node.operand), text)
        case ast.BinOp() if type(node.op) in OPERATORS:
            rest = []  # a | b | c | … leans to the left: walk down, then combine upwards
            while isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
                rest.append((OPERATORS[type(node.op)], node.right))
                node = node.left
            graph = _graph(inner(node), text)
            for operator, right in reversed(rest):
                graph = operator(graph, _graph(inner(right), text))
            return graph
        case ast.Attribute(attr="T"):
            return _graph(inner(node.value), text).T
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name) if tensors and name[0] == "_" and tensors[int(name[1:])].ndim == 0:
            return cache.COMPILED.find(tensors[int(name[1:])])
        case ast.Call(func=ast.Name(id="EdgeList"), args=[ast.Name(id=name)]) if tensors:
            edges, named = tensors[int(name[1:])], {str(each.arg): inner(each.value) for each in node.keywords}
            size, entries = tuple(named["size"]), named.get("entries")
            if edges.ndim == 1:
                return edge_list.of_sorted(edges, size, entries)
            return EdgeList(edges, size, entries=entries)
        case ast.Call(func=ast.Attribute(value=inside, attr=name)) if name in METHODS:
            return _call(getattr(_graph(inner(inside), text), name), node, text, inner)
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            return _call(NAMES[name], node, text, inner)
    raise ValueError(
        f"not part of a graph expression: {_short(ast.get_source_segment(text.strip(), node) or '')!r}; "
        f"{', '.join([_HINT, *names])}"
    )


def _call(function, node: ast.Call, text: str, inner):
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"not part of a graph expression: ** in {_short(text)!r}")
    arguments = [inner(part) for part in node.args]
    named = {str(keyword.arg): inner(keyword.value) for keyword in node.keywords}
    try:
        return function(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{_short(ast.unparse(node))}: {error}") from None


def _graph(value, text: str) -> Graph:
    if not isinstance(value, Graph):
        raise ValueError(f"expected a graph, got {value!r} in {_short(text)!r}; {_HINT}")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def pack(graph: Any) -> tuple[str, list[Tensor]]:
    """How a graph or a plan travels into an operator of a compiled program: as text, and tensors that stand in it."""
    if not torch.compiler.is_compiling() and tensors_are_fake():
        return "", []  # nothing will run
    tensors: list[Tensor] = []
    return graph._write_traced(tensors), tensors


def tensors_are_fake() -> bool:
    """Whether a FakeTensorMode is at work: tensors have shapes, and no numbers."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def unpack(text: str, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `pack`, when the program runs: a tensor is a handle, or the edges of an EdgeList."""
    if text == "_0":
        return cache.COMPILED.find(tensors[0])
    if all(tensor.ndim == 0 for tensor in tensors):
        key = text, *(int(tensor) for tensor in tensors)
        return cache.COMPILED.get_or_make(key, lambda: _parsed(text, tensors))
    return _parsed(text, tensors)


def write(graph: Graph, listed: list[EdgeList]) -> str:
    """The graph as an expression for a file, in which _0, _1, … stand for the edges of those that are `listed`."""
    if not isinstance(graph, EdgeList):
        return graph._write(lambda part: write(part, listed))
    number = next((number for number, each in enumerate(listed) if each is graph), len(listed))
    listed += [graph] * (number == len(listed))
    return f"EdgeList(_{number}, {graph.told_size})"


def read(text: str, edges: Sequence[Tensor]) -> Graph:
    """The inverse of `write`: `edges` are the `given` edge_index of the lists, (2, E) each."""
    if any(each.ndim != 2 for each in edges):
        raise ValueError("lists of edges must be tensors (2, E)")
    with torch.device("cpu"):  # where a file's tensors are, whatever the default
        try:
            graph = _parsed(text, edges)
        except (IndexError, TypeError, RuntimeError) as error:
            raise ValueError(f"{_short(text)!r} does not fit its {len(edges)} lists of edges ({error})") from None
    if not isinstance(graph, Graph):
        raise ValueError(f"not a graph: {_short(text)!r}")
    return graph
