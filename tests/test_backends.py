"""Every backend of the dict fulfils the contract: it equals the reference, or says why it can't run a call."""

import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from graphs import GRAPHS
from test_attend import tensors
from torch.testing import assert_close

from attngraph import Blocks, Causal, Costs, EdgeList, Empty, Full, PerHead, Prefix, Random, Window, attend, cache, plan
from attngraph.graph.base import at_size
from attngraph.graph.rewrite import simplify
from attngraph.kernels.contract import Modifiers, ScoreBias
from attngraph.planning import backends
from attngraph.planning.backends import BACKENDS
from attngraph.planning.call import Call, Request
from attngraph.planning.edge_set import EdgeSet

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
OF_ALL_GRAPHS = [name for name in backends.names() if name not in ("steps", "blocks")] + ["auto"]
labels = pytest.mark.parametrize("label", BACKENDS)


def call_of(n, m, heads=4, dtype=torch.float64, **options):
    return Call(n, m, heads, 2, 4, 3, dtype, torch.device("cpu"), **options)


@every
@labels
def test_it_equals_the_reference_forward_and_backward(case, label):
    backend, graph = BACKENDS[label], case.graph._head(0) if case.graph.heads else case.graph
    call = call_of(case.n, case.m)
    if backend.supports(call) is not None or not case.n or not case.m:
        return
    edges = EdgeSet(simplify(at_size(graph, case.n, case.m)[0]), case.n, case.m)
    if (reason := backend.lacks(edges)) is not None:
        assert " " in reason
        return
    assert backend.estimate(edges, call, Costs()) >= 0
    if not edges.count:
        return
    layout = backend.build(edges, call)
    assert backend.pairs(edges, layout) >= 0
    assert isinstance(backend.describe(edges, layout, call), str)
    sides = tensors(case.n, case.m)
    dout = torch.linspace(1, 2, 2 * 4 * case.n * 3, dtype=torch.float64).view(2, 4, case.n, 3)
    wanted = [side.detach().double().requires_grad_() for side in sides]
    right = attend(*wanted, graph, scale=0.5, backend="reference")
    expected = right, *torch.autograd.grad(right, wanted, dout)
    if backend.runs_whole(layout, call) or not backend.merges:
        if backend.runs_whole(layout, call):
            out = backend.attend(*sides, layout, None, Request(scale=0.5))[0]
        else:
            out = backend.forward(*sides, layout, Modifiers(0.5))[0]
        found = out, *torch.autograd.grad(out, sides, dout)
    else:
        q, k, v = (side.detach() for side in sides)
        out, lse = backend.forward(q, k, v, layout, Modifiers(0.5))
        found = out, *backend.backward(q, k, v, out, lse, dout, None, layout, Modifiers(0.5), False)[:3]
    assert_close(found, expected, rtol=0, atol=1e-10)


OPTIONS = [
    {}, {"dropout": True}, {"padding": True}, {"score": "additive"}, {"normalize": "sigmoid"}, {"return_weights": True},
    {"bias": "edge"}, {"transform": "torch.func"}, {"transform": "forward-mode"}, {"part": True},
    {"compiled": True}, {"dtype": torch.bfloat16},
]  # fmt: skip


@labels
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_reason_is_a_sentence(label, options):
    reason = BACKENDS[label].supports(call_of(9, 9, **options))
    assert reason is None or (reason == reason.strip() and " " in reason)


@pytest.mark.parametrize("options", [
    {}, {"dropout": True}, {"padding": True}, {"bias": "offset"}, {"bias": "edge"}, {"score": "a function"},
    {"return_weights": True}, {"normalize": "sigmoid"}, {"dtype": torch.float64}, {"backend": "rows"},
], ids=str)  # fmt: skip
def test_explain_has_the_answer_of_every_backend_that_was_asked(options):
    made = plan(Causal() & (Window(60, 0) | Random(3)), 700, 700, heads=2, **options)
    text = made.explain()
    asked = [label for label, each in BACKENDS.items() if options.get("backend") in (None, each.name)]
    for label in asked:
        line = re.search(rf"^  {re.escape(label)} +(\S.*)$", text, re.MULTILINE)
        assert line, label
        answer = made.candidates[label]
        assert (answer in line[1]) if isinstance(answer, str) else re.match(r"[\d.,e+-]+ m?s", line[1])
    assert "<- chosen" in text
    seconds = {name: answer for name, answer in made.candidates.items() if not isinstance(answer, str)}
    assert seconds[made.chosen[0]] == min(seconds.values())


def test_heads_with_graphs_of_their_own_are_explained_together():
    made = plan(PerHead([Causal(), Window(3, 0), Causal(), Random(2)]), 500, 500, heads=4)
    text = made.explain()
    assert text.count("<- chosen") == 1
    assert re.search(r"heads apart +\S+ m?s  <- chosen: ", text)


def test_float64_is_priced_by_the_kernel_that_runs_it():
    single, double = (plan(Window(60, 0), 2048, 2048, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert double.candidates["tiles (numba)"] > single.candidates["tiles (numba)"]
    assert "is faster" in double.candidates["tiles (torch)"]
    assert "is faster" in single.candidates["tiles (torch)"]


@pytest.mark.parametrize("label", [label for label in BACKENDS if label != "reference"])
def test_float64_takes_twice_the_time_of_all_but_calls(label):
    graph = Blocks(EdgeList([[0, 7], [0, 500]], (512, 8)), (1, 64)) if label == "blocks (numba)" else Window(40, 0)
    backend, edges = BACKENDS[label], EdgeSet(at_size(graph, 512, 512)[0], 512, 512)
    no_calls = {field.name: 0.0 for field in fields(Costs) if field.name.endswith("_per_call")}
    calls = [call_of(512, 512, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    if all(backend.supports(call) is None for call in calls):
        single, double = (backend.estimate(edges, call, Costs(**no_calls)) for call in calls)
        assert double == pytest.approx(2 * single)


def test_heads_of_one_graph_and_a_bias_are_one_call():
    """Found: a bias was lost where all heads had the same graph."""
    from attngraph import Alibi

    q, k, v = tensors(9, 9)
    bias = Alibi(torch.rand(4, dtype=torch.float64))
    graph = PerHead([Causal()] * 4)
    for name in OF_ALL_GRAPHS:
        found = attend(q, k, v, graph, bias=bias, backend=name)
        assert_close(found, attend(q, k, v, Causal(), bias=bias, backend="reference"), rtol=0, atol=1e-12)


def code_of_contributing():
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(r"a backend, complete: begin -->\n\n```python\n(.*?)```", text, re.DOTALL)[1]


def test_a_backend_written_as_contributing_says_runs(monkeypatch):
    space = {"__name__": "padded"}
    exec(compile(code_of_contributing(), "CONTRIBUTING.md", "exec"), space)
    monkeypatch.setitem(BACKENDS, "padded", space["Padded"]())
    cache.clear()
    assert "padded" in backends.names()
    for graph in (Random(3), Causal() & (Window(5, 0) | Prefix(1)), Full()):
        q, k, v = tensors(20, 20)
        found, right = (attend(q, k, v, graph, backend=name) for name in ("padded", "reference"))
        assert_close(found, right, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, right)]
        assert_close(*gradients, rtol=0, atol=1e-10)
        assert isinstance(plan(graph, 20, 20).candidates["padded"], float)
    with pytest.raises(ValueError, match="backend='padded' can't run this call: it has nothing but the scale"):
        attend(q, k, v, Full(), dropout_p=0.1, backend="padded")
    cache.clear()


def test_more_edges_never_cost_less():
    call = call_of(512, 512, dtype=torch.float32)
    graphs = [Window(width, 0) for width in (1, 8, 40, 200, 511)]
    for backend in BACKENDS.values():
        if backend.supports(call) is None and backend.name != "blocks":
            seconds = [backend.estimate(EdgeSet(at_size(g, 512, 512)[0], 512, 512), call, Costs()) for g in graphs]
            assert all(few <= many for few, many in pairwise(seconds)), backend.label


def test_a_bias_kind_reaches_the_kernels_that_know_it():
    q, k, v = (side.detach() for side in tensors(12, 12))
    values = torch.rand(4, 23, dtype=torch.float64)
    edges = EdgeSet(at_size(Window(3, 0), 12, 12)[0], 12, 12)
    outs = []
    for label, dtype in (
        ("tiles (torch)", torch.float64), ("rows (numba)", torch.float64), ("tiles (numba)", torch.float32),
    ):  # fmt: skip
        backend, call = BACKENDS[label], call_of(12, 12, bias="offset", dtype=dtype)
        assert backend.supports(call) is None
        modifiers = Modifiers(0.5, ScoreBias("offset", values.to(dtype)))
        sides = (side.to(dtype) for side in (q, k, v))
        outs.append(backend.forward(*sides, backend.build(edges, call), modifiers)[0].double())
    assert_close(*outs[:2], rtol=0, atol=1e-12)
    assert_close(*outs[1:], rtol=0, atol=1e-5)


def test_a_row_that_a_bias_silences_has_no_gradient_and_no_nan():
    """Of the reference too, where the lse is asked for."""
    graph, bias = Causal() & Window(3, 0), torch.zeros(6, 6, dtype=torch.float64)
    bias[3] = -torch.inf
    for name in OF_ALL_GRAPHS:
        q, k, v = tensors(6, 6)
        out, lse = attend(q, k, v, graph, bias=bias, backend=name, return_lse=True)
        loss = out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        for gradient in torch.autograd.grad(loss, (q, k, v)):
            assert gradient.isfinite().all(), name


def test_a_bias_of_pairs_that_is_a_class_is_asked_for_each_pair(monkeypatch):
    """Found: what was no EdgeBias and no tensor was taken for a function of j - i."""
    from dataclasses import dataclass

    from attngraph import bias as biases

    @dataclass(frozen=True, eq=False)
    class Parity:
        table: torch.Tensor

        def at(self, q_idx, kv_idx, edge=None):
            return self.table[:, q_idx % 2, kv_idx % 2]

    monkeypatch.setattr("attngraph.attention.Bias", biases.Bias | Parity)
    q, k, v = tensors(20, 20)
    own = Parity(torch.randn(4, 2, 2, dtype=torch.float64))
    right = attend(q, k, v, Causal() & Window(5, 0), bias=own, backend="reference")
    for name in OF_ALL_GRAPHS:
        found = attend(q, k, v, Causal() & Window(5, 0), bias=own, backend=name)
        assert_close(found, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("graph", [Causal(), PerHead([Causal(), Window(1, 1)] * 2), Random(2)], ids=str)
def test_torch_func_goes_through_auto(graph):
    q, k, v = (side.detach() for side in tensors(20, 20))
    found = torch.func.grad(lambda q: attend(q, k, v, graph).square().sum())(q)
    wanted = q.clone().requires_grad_()
    attend(wanted, k, v, graph, backend="reference").square().sum().backward()
    assert_close(found, wanted.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"score": "additive"}, {"normalize": "sigmoid"},
                                     {"backend": "rows"}], ids=str)  # fmt: skip
def test_a_plan_in_a_compiled_program_never_ignores_an_option(options):
    q, k, v = (side.detach() for side in tensors(20, 20))
    made = plan(Window(5, 0), 20, 20, heads=4, dtype=torch.float64)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, made, **options), backend="aot_eager")
    with pytest.raises(ValueError, match=r"can't run this call|a plan has chosen its backends"):
        compiled(q, k, v)


@pytest.mark.parametrize(("options", "message"), [
    ({"score": "nope"}, "one of dot, additive, softcap, leaky_relu"), ({"normalize": 3}, "normalize must be"),
    ({"dtype": torch.int64}, "dtype"), ({"dtype": "float32"}, "dtype"), ({"dropout": 0.3}, "dropout"),
])  # fmt: skip
def test_options_of_a_plan_are_checked(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan(Causal(), 9, 9, **options)


def test_a_plan_without_edges_never_ignores_an_option():
    q, k, v = tensors(9, 9)
    made = plan(Empty(), 9, 9, heads=4, dtype=torch.float64)
    assert not attend(q, k, v, made).any()
    assert attend(q, k, v, made, return_weights=True)[1].shape == (2, 4, 0)
    with pytest.raises(ValueError, match="can't run this call"):
        attend(q, k, v, made, score="additive")
