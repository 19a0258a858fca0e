"""Gradients have gradients: those of every backend, plan and model equal those of the definition."""

from functools import partial

import pytest
import torch
from graphs import GRAPHS
from test_attend import BIASES, biases
from torch.testing import assert_close

from attngraph import (
    Causal,
    Chunks,
    EdgeList,
    Full,
    PerHead,
    Prefix,
    Random,
    Window,
    attend,
    from_function,
    plan,
)
from attngraph.models import GPT
from attngraph.nn import TransformerConfig

slow = pytest.mark.nightly
BACKENDS = ("dense", "tiles", "rows", "auto")
GRAPH = Causal() & (Window(2, 0) | Prefix(1)) | EdgeList([[3, 7, 1], [2, 2, 8]], 9)
HEADS = PerHead([GRAPH, Full(), Random(2), Causal() & Chunks(4)])


def sides(n, m, heads=4, dtype=torch.float64, value_dim=4):  # as PyTorch's flash kernel needs it on a CPU
    chance = torch.Generator().manual_seed(0)
    shapes = (2, heads, n, 4), (2, 2 - heads % 2, m, 4), (2, 2 - heads % 2, m, value_dim)
    return [torch.randn(shape, generator=chance).to(dtype).requires_grad_() for shape in shapes]


def derivatives(inputs, graph, return_lse, **options):
    """The gradients of gradients, and the gradients of those."""
    found = attend(*inputs[:3], graph, return_lse=return_lse, **options)
    out, lse = found if return_lse else (found, torch.zeros(1, dtype=torch.float64))
    loss = out.pow(2).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    if not any(part.requires_grad for part in first):
        return first
    second = torch.autograd.grad(
        sum(part.pow(2).sum() for part in first), inputs, create_graph=True, materialize_grads=True
    )
    if not any(part.requires_grad for part in second):
        return *first, *second
    third = torch.autograd.grad(sum(part.sin().sum() for part in second), inputs, materialize_grads=True)
    return *first, *second, *third


def check(graph, n, m, backend, kind=None, return_lse=True):
    inputs, options = sides(n, m, graph.heads or 4), {}
    if kind not in (None, "none"):
        options["bias"], values = biases(kind, graph, n, m, graph.heads or 4)
        inputs.append(values)
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) < 0.8
    for options["attention_mask"] in (None, mask):
        found = derivatives(inputs, graph, return_lse, backend=backend, **options)
        assert_close(found, derivatives(inputs, graph, return_lse, backend="edges", **options), rtol=1e-8, atol=1e-8)


SOME_BIASES = [kind if kind in ("clipped", "dense-keys") else pytest.param(kind, marks=slow) for kind in BIASES]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", [GRAPH, HEADS, Causal(), Full(), Causal() & Chunks(4)], ids=str)
def test_of_every_backend(graph, backend, return_lse):
    check(graph, 9, 9, backend, return_lse=return_lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SOME_BIASES)
@pytest.mark.parametrize("graph", [GRAPH, pytest.param(HEADS, marks=slow), pytest.param(Causal(), marks=slow)], ids=str)
def test_of_every_bias(graph, kind, backend):
    check(graph, 9, 9, backend, kind)


@slow
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_of_every_graph(case):
    for backend in BACKENDS:
        check(case.graph, case.n, case.m, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradgradcheck(backend):
    inputs = [side[:1, :, :5].detach().requires_grad_() for side in sides(9, 9)]
    graph = Causal() & Window(2, 0)
    assert torch.autograd.gradgradcheck(lambda *given: attend(*given, graph, backend=backend), inputs)


def test_where_only_some_inputs_have_gradients():
    for backend in BACKENDS:
        for wanted in range(3):
            inputs = [side.detach().requires_grad_(i == wanted) for i, side in enumerate(sides(9, 9))]
            found = []
            for name in (backend, "edges"):
                loss = attend(*inputs, GRAPH, backend=name).pow(2).sum()
                first = torch.autograd.grad(loss, inputs[wanted], create_graph=True)[0]
                found.append(torch.autograd.grad(first.pow(2).sum(), inputs[wanted])[0])
            assert_close(*found)


@pytest.mark.parametrize("graph", [GRAPH, Causal(), HEADS], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_one_input_is_another_or_made_of_it(backend, graph):
    q = sides(9, 9)[0]
    for others in (lambda: (q, q), lambda: (q, q.cos()), lambda: (q * 2, q), lambda: (q.sin(), (q * q).flip(2))):
        found = []
        for name in (backend, "edges"):
            out, lse = attend(q, *others(), graph, backend=name, return_lse=True)
            loss = out.pow(3).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
            first = torch.autograd.grad(loss, q, create_graph=True)[0]
            second = torch.autograd.grad(first.pow(2).sum(), q, create_graph=True)[0]
            found.append((first, second, *torch.autograd.grad((second / 1e6).sin().sum(), q)))
        assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_lower_precision(backend, dtype):
    exact, inputs = sides(300, 300), sides(300, 300, dtype=dtype)
    graph = Causal() & Window(20, 0)
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(attend(*x, graph, backend=name).pow(2).sum(), x, create_graph=True)[0].sum(), x[1]
        )[0]
        for x, name in ((inputs, backend), (exact, "edges"))
    )
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_of_a_plan_by_hand():
    made = plan(GRAPH, 9, 9, heads=4, dtype=torch.float64)
    inputs = sides(9, 9)
    assert_close(derivatives(inputs, made, False), derivatives(inputs, GRAPH, False, backend="edges"))


@pytest.mark.parametrize("tokens", [12, pytest.param(700, marks=slow)])
def test_of_a_model(tokens, monkeypatch):
    """A gradient penalty: of its parameters."""
    config = TransformerConfig(embed_dim=16, num_layers=2, num_heads=2, position="rotary")
    model = GPT(config, 7, graph=[Causal() & Window(8, 0) | EdgeList([[0], [3]], tokens), Causal()]).double()
    given, found = torch.arange(tokens)[None] % 7, []
    for backend in ("auto", "edges"):
        monkeypatch.setattr("attngraph.nn.attention.attend", partial(attend, backend=backend))
        first = torch.autograd.grad(model(given).square().mean(), [*model.parameters()], create_graph=True)
        penalty = sum(part.square().sum() for part in first)
        found.append(torch.autograd.grad(penalty, [*model.parameters()], materialize_grads=True))
    assert_close(*found)


def test_a_function_that_changed_in_between_is_told():
    width = torch.tensor(2)
    graph = from_function(lambda i, j: (i - j).abs() <= width)
    q, k, v = sides(9, 9)
    out = attend(q, k, v, graph, backend="rows")
    width.fill_(5)
    with pytest.raises(ValueError, match="has changed since the plan was made"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    torch.autograd.grad(out.sum(), q)


def test_memory_is_given_back_after_a_backward_pass():
    """The hook of a flash kernel's gradients holds nothing."""
    import gc
    import weakref

    q = torch.randn(1, 2, 30, 8, requires_grad=True)
    side = q * 2
    gone, out = weakref.ref(side), attend(side, side, side, Causal(), backend="dense")
    del side
    loss = out.sum()
    loss.backward()
    gc.disable()
    del out
    assert gone() is None
    gc.enable()
