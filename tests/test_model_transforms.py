"""Models under what PyTorch does to functions: the same numbers, or an error that says what does it."""

import copy

import pytest
import torch
from modules import MODELS, POSITIONS, SCALINGS, given, made
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from attngraph import Causal, PerHead, Prefix, Window
from attngraph.models import GPT

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

WINDOW = Causal() & Window(3, 0)
GRAPHS = [WINDOW, PerHead([Causal(), WINDOW, Causal() & (Window(2, 0) | Prefix(1))])]
PADDED = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])}


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)


def compiled(model, takes, **options):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)(**takes)


def for_any_size(model, takes):
    return compiled(model, takes, dynamic=True)


def exported(model, takes, strict=False):
    return torch.export.export(model, (), takes, strict=strict).module()(**takes)


def exported_strictly(model, takes):
    return exported(model, takes, strict=True)


def per_sample(model, takes):
    """A gradient for each entry of the batch: vmap of grad."""
    own = parameters(model)

    def loss(own, entry):
        return functional_call(model, own, (), {name: value[None] for name, value in entry.items()}).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(own, takes)
    for entry in range(2):
        right = grad(loss)(own, {name: value[entry] for name, value in takes.items()})
        close({name: each[entry] for name, each in found.items()}, right)
    return model(**takes)


def forward_mode(model, takes):
    """The derivative along a direction is that of differences."""
    own = parameters(model)
    along = {name: torch.randn_like(value) for name, value in own.items()}
    step = 1e-6

    def moved(by):
        return functional_call(model, {name: own[name] + by * along[name] for name in own}, (), takes)

    out, found = jvp(lambda own: functional_call(model, own, (), takes), (own,), (along,))
    assert ((moved(step) - moved(-step)) / (2 * step) - found).norm() < 1e-6 * found.norm()
    return out


def jacobian(model, takes):
    own = parameters(model)
    name = next(name for name in own if name.endswith("attention.value.bias"))

    def some(bias):
        return functional_call(model, {**own, name: bias}, (), takes).flatten()[:4]

    found, bias = jacrev(some)(own[name]), own[name].clone().requires_grad_()
    close(found, torch.stack([torch.autograd.grad(each, bias, retain_graph=True)[0] for each in some(bias)]))
    return model(**takes)


def fake(model, takes):
    """Shapes without numbers, also of a model that is made there."""
    right = model(**takes)
    with FakeTensorMode() as mode:
        own = {name: mode.from_tensor(value) for name, value in model.named_parameters()}
        found = functional_call(model, own, (), {name: mode.from_tensor(value) for name, value in takes.items()})
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    return right


def meta(model, takes):
    right = model(**takes)
    found = copy.deepcopy(model).to("meta")(**{name: value.to("meta") for name, value in takes.items()})
    assert found.is_meta
    assert (found.shape, found.dtype) == (right.shape, right.dtype)
    return right


def autocast(model, takes):
    single = copy.deepcopy(model).float()
    as_given = {name: value.float() if value.is_floating_point() else value for name, value in takes.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = single(**as_given)
    right = model(**takes)
    assert (found.double() - right).norm() < 0.05 * right.norm()
    return right


def checkpointed(model, takes):
    """Computed again in the backward pass: the same gradients."""
    own = list(model.parameters())
    out = checkpoint(lambda: model(**takes), use_reentrant=False)
    right = torch.autograd.grad(model(**takes).square().sum(), own, allow_unused=True)
    close(torch.autograd.grad(out.square().sum(), own, allow_unused=True), right)
    return out


def differentiated_twice(model, takes):
    """A penalty on the gradients has a gradient: as along a direction, by differences."""
    own = {name: value for name, value in model.named_parameters() if name.endswith("attention.value.weight")}
    along = {name: torch.randn_like(value) for name, value in own.items()}
    step = 1e-6

    def gradients(by, **options):
        moved = {name: value + by * along[name] for name, value in own.items()}
        loss = functional_call(model, moved, (), takes).square().sum()
        return torch.autograd.grad(loss, list(moved.values()), **options)

    penalty = sum((each * along[name]).sum() for name, each in zip(own, gradients(0.0, create_graph=True), strict=True))
    found = torch.autograd.grad(penalty, list(own.values()))
    for ahead, behind, each in zip(gradients(step), gradients(-step), found, strict=True):
        assert ((ahead - behind) / (2 * step) - each).norm() < 1e-5 * each.norm()
    return model(**takes)


def functional(model, takes):
    return functional_call(copy.deepcopy(model).to("meta"), parameters(model), (), takes)


TRANSFORMS = (
    per_sample, forward_mode, jacobian, fake, meta, autocast, checkpointed, functional, differentiated_twice, exported,
)  # fmt: skip
COMPILERS = (compiled, for_any_size, exported_strictly)
SCHEMES = (*POSITIONS, *SCALINGS)
SLOW = pytest.mark.nightly


def cells():
    """Every model, kind of positions and transform; always run is a share in which each of them occurs."""
    for row, cls in enumerate(MODELS):
        for column, position in enumerate(SCHEMES):
            for number, transform in enumerate(TRANSFORMS):
                often = (row + column + number) % 10 == 0 and transform is not exported
                yield pytest.param(cls, position, transform, marks=() if often else SLOW)
            for by in COMPILERS:
                often = by is compiled and (cls.__name__, position) == ("GPT", "dynamic")
                yield pytest.param(cls, position, by, marks=() if often else SLOW)


def same(cls, position, transform, graph=None, **more):
    model = made(cls, position).double()
    if graph is not None:
        model.transformer.graphs = graph
    takes = given(model, torch.float64) | more
    close(transform(model, takes), model(**takes))


@pytest.mark.parametrize(("cls", "position", "transform"), list(cells()))
def test_a_transformed_model_is_the_same(cls, position, transform):
    same(cls, position, transform)


@pytest.mark.parametrize("transform", [*TRANSFORMS[:-1], pytest.param(exported, marks=SLOW)])
@pytest.mark.parametrize("graph", GRAPHS, ids=["window", "heads"])
@pytest.mark.parametrize("more", [pytest.param({}, marks=SLOW), PADDED], ids=["whole", "padded"])
def test_so_is_one_on_a_graph_with_padding(transform, graph, more):
    same(GPT, "learned", transform, graph, **more)


@pytest.mark.nightly
@pytest.mark.parametrize("by", COMPILERS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("position", SCHEMES)
def test_so_is_a_compiled_one_with_padding(by, position):
    same(GPT, position, by, WINDOW, **PADDED)


def test_a_model_may_be_made_of_fake_tensors():
    """As one that is too large for this machine."""
    with FakeTensorMode():
        for cls in MODELS:
            model = made(cls)
            assert model(**given(model)).shape[0] == 2
