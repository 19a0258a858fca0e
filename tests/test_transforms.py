"""attend under the transforms of PyTorch: the same as through edges, or an error that says what can."""

import re

import pytest
import torch
from graphs import GRAPHS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from attngraph import (
    Alibi,
    Causal,
    Chunks,
    EdgeList,
    Full,
    PerHead,
    Prefix,
    Random,
    Window,
    attend,
    cache,
)
from attngraph.nn import Attention

slow = pytest.mark.nightly
BACKENDS = ("reference", "edges", "dense", "tiles", "rows", "auto")
N = 7
SOME = Causal() & (Window(2, 0) | Prefix(1)) | EdgeList([[5], [2]], N)
GRAPHS_HERE = {
    "some": SOME,
    "causal": Causal(),
    "documents": Causal() & Chunks(3),
    "heads": PerHead([SOME, Full(), Random(2), Causal()]),
}


def x(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def side(seed=0):
    return x(2, 4, N, 3, seed=seed)


def checkpointed(f, q, reentrant):
    q = q.clone().requires_grad_()
    checkpoint(f, q, use_reentrant=reentrant).square().sum().backward()
    return q.grad


def twice(f, q):
    return grad(lambda q: grad(lambda q: f(q).pow(3).sum())(q).square().sum())(q)


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(x(3, 2, 4, N, 3)),
    "vmap of heads": lambda f: torch.vmap(f, in_dims=2, out_dims=1)(x(2, 4, 3, N, 3)),
    "grad": lambda f: grad(lambda q: f(q).sin().sum())(side()),
    "per-sample gradients": lambda f: torch.vmap(grad(lambda q: f(q).sin().sum()))(x(3, 2, 4, N, 3)),
    "vjp": lambda f: vjp(f, side())[1](side(1)),
    "jvp": lambda f: jvp(f, (side(),), (side(1),)),
    "linearize": lambda f: linearize(f, side())[1](side(1)),
    "jacrev": lambda f: jacrev(lambda q: f(q).sum(-1))(side()),
    "jacfwd": lambda f: jacfwd(lambda q: f(q).sum(-1))(side()),
    "hessian": lambda f: hessian(lambda q: f(q).pow(3).sum())(x(1, 4, N, 1)),
    "grad of grad": lambda f: twice(f, side()),
    "autocast": lambda f: torch.autocast("cpu", dtype=torch.bfloat16)(f)(side()),
    "no_grad": lambda f: torch.no_grad()(f)(side()),
    "inference_mode": lambda f: torch.inference_mode()(f)(side()),
    "checkpoint": lambda f: checkpointed(f, side(), False),
    "reentrant checkpoint": lambda f: checkpointed(f, side(), True),
    "a parameter": lambda f: f(torch.nn.Parameter(side())),
    "vhp": lambda f: torch.autograd.functional.vhp(lambda q: f(q).pow(3).sum(), side(), side(1)),
}


@pytest.mark.parametrize("graph", ["some", *(pytest.param(name, marks=slow) for name in GRAPHS_HERE if name != "some")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_same_as_through_edges_or_an_error_that_says_what_can(transform, backend, graph):
    graph = GRAPHS_HERE[graph]
    expected = TRANSFORMS[transform](lambda q: attend(q, q, q.cos(), graph, backend="edges"))
    found = refused = None
    try:
        found = TRANSFORMS[transform](lambda q: attend(q, q, q.cos(), graph, backend=backend))
    except ValueError as error:
        refused = str(error)
    if refused:
        assert re.search(r"backend='\w+' can't run this call: .*'auto' chooses", refused)
    else:
        assert_close(found, expected, rtol=1e-2 if transform == "autocast" else 1e-7, atol=1e-7)


def fakes(n=N, m=N, heads=4):
    shapes = (2, heads, n, 4), (2, 2 if heads % 2 == 0 else 1, m, 4), (2, 2 if heads % 2 == 0 else 1, m, 3)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def shapes_of(graph, sides, **options):
    """Of results and gradients, with dtypes."""
    results = attend(*sides, graph, return_lse=True, **options)
    gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), sides, materialize_grads=True)
    return [(part.shape, part.dtype) for part in (*results, *gradients)]


OPTIONS = {
    "plain": dict,
    "bias": lambda: {"bias": Alibi(torch.ones(4))},
    "mask": lambda: {"attention_mask": torch.ones(2, N, dtype=torch.bool)},
    "dropout": lambda: {"dropout_p": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("graph", GRAPHS_HERE.values(), ids=str)
def test_tensors_without_numbers_have_the_right_shapes(graph, backend, options):
    if options == "dropout" and backend in ("tiles", "rows"):
        return
    cache.clear()
    right = shapes_of(graph, fakes(), backend=backend, **OPTIONS[options]())
    cache.clear()
    with FakeTensorMode():
        assert shapes_of(graph, fakes(), backend=backend, **OPTIONS[options]()) == right
    if backend != "rows":
        with torch.device("meta"):
            assert shapes_of(graph, fakes(), backend=backend, **OPTIONS[options]()) == right
    sides = fakes()  # nothing that has no numbers was kept
    out, expected = (attend(*sides, graph, backend=name) for name in (backend, "edges"))
    assert_close(out, expected)


@slow
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
def test_every_graph_on_tensors_without_numbers(case):
    heads = case.graph.heads or 4
    for backend in ("auto", "edges"):
        right = shapes_of(case.graph, fakes(case.n, case.m, heads), backend=backend)
        with FakeTensorMode():
            assert shapes_of(case.graph, fakes(case.n, case.m, heads), backend=backend) == right


def test_a_loop_over_nodes_needs_numbers():
    with FakeTensorMode(), pytest.raises(ValueError, match="tensors without numbers have no loop over nodes"):
        attend(*fakes(), SOME, backend="reference")


def test_functional_call_of_a_module():
    attention = Attention(8, num_heads=4).double()
    given = {name: torch.randn_like(value) for name, value in attention.named_parameters()}
    h = x(3, 2, N, 8)
    per_sample = torch.vmap(
        grad(lambda values, h: functional_call(attention, values, (h, SOME)).square().sum()), in_dims=(None, 0)
    )(given, h)
    for i in range(3):
        attention.load_state_dict(given)
        attention.zero_grad()
        attention(h[i], SOME).square().sum().backward()
        for name, value in attention.named_parameters():
            assert_close(per_sample[name][i], value.grad)


@pytest.mark.parametrize("backend", ["reference", "rows"])
def test_what_a_compiled_function_refuses_is_in_our_words(backend):
    torch._dynamo.reset()
    program = torch.compile(
        lambda q: attend(q, q, q, SOME, backend=backend, score="additive"), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=f"backend='{backend}' can't run this call"):
        program(side())
