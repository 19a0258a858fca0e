"""Dropout of vectors: which numbers are dropped is a function of the seed and the place alone, in every direction."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("numba")
from attngraph.kernels.cpu import vector_dropout
from attngraph.kernels.dropout import philox
from attngraph.nn import FeedForward
from attngraph.nn.dropout import DTYPES, dropout
from attngraph.planning.backends.base import INSTALLED


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def seeded(x, p=0.3, seed=0):
    torch.manual_seed(seed)
    return dropout(x, p, True)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-9, 1.0 - 1e-9])
def test_it_drops_its_share_and_keeps_the_mean(p):
    x = torch.ones(1000, 999)
    found = seeded(x, p)
    assert abs((found == 0).float().mean() - p) < 0.002
    assert p > 0.99 or abs(found.mean() - 1) < 0.01
    assert torch.equal(seeded(x, p), found)
    assert p < 0.01 or p > 0.99 or not torch.equal(seeded(x, p, seed=1), found)


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 128, 512, 999, 4096])
def test_numbers_are_dropped_independently_of_each_other(distance):
    dropped = (seeded(torch.ones(1_000_000), 0.5) == 0).double() - 0.5
    assert abs((dropped[distance:] * dropped[:-distance]).mean()) < 4 * 0.25 / 1000


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 2])
def test_the_numbers_are_those_of_philox(seed):
    """In blocks of 512: word 0 of 64 counters, two numbers in each, then words 1, 2 and 3."""
    blocks, p = 3, 0.25
    counter = torch.arange(blocks * 64).view(blocks, 1, 64)
    zero = torch.zeros_like(counter)
    words = torch.cat(philox(torch.tensor(seed), (counter, zero, zero, zero)), 1)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).flatten()
    found = vector_dropout.dropout(torch.ones(blocks * 512 - 5), p, seed)
    assert_close(found, torch.where(bits >= p * 2**16, 1 / (1 - p), 0.0)[:-5].float())


def test_counters_have_64_bits():
    far, seed = 2**29, 7  # the block whose first counter is 2^35
    counter = torch.arange(64) + far * 64
    words = torch.stack(philox(torch.tensor(seed), (counter & 0xFFFFFFFF, counter >> 32, 0 * counter, 0 * counter)))
    x = torch.ones(512).numpy()
    vector_dropout.drop(x, x, np.uint64(seed), far, np.uint16(2**15), x.dtype.type(1))
    assert torch.equal(torch.from_numpy(x) == 1, (torch.stack([words & 0xFFFF, words >> 16], -1) >= 2**15).flatten())


@pytest.mark.parametrize("size", [1, 511, 513, 400_001])
def test_the_same_by_any_number_of_threads(size):
    x, runs = torch.randn(size, requires_grad=True), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found = seeded(x)
        runs.append((found.detach(), *torch.autograd.grad(found.sum(), x)))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 1000), (3, 5, 700)], ids=str)
def test_every_dtype_and_shape(shape, dtype):
    """The mask is that of the place, whatever the dtype."""
    x = (torch.rand(shape) + 1).to(dtype).requires_grad_()
    found, kept = seeded(x, 0.25), seeded(torch.ones(shape), 0.25) > 0
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert torch.equal(found, torch.where(kept, x * (4 / 3), 0))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, kept.to(dtype) * (4 / 3))


def test_any_strides_of_x_and_its_gradient():
    x = torch.randn(40, 30, 20, dtype=torch.float64)
    for permuted in (x.mT, x[::2], x[:, :1].expand(40, 9, 20), torch.complex(x, x).conj().imag):
        leaf = permuted.detach().requires_grad_()
        found, ones = seeded(leaf), seeded(torch.ones_like(permuted))
        assert_close(found, permuted * ones)
        for dout in (torch.ones(()).double().expand(found.shape), torch.randn_like(found.mT).mT):
            assert_close(torch.autograd.grad(found, leaf, dout, retain_graph=True)[0], dout * ones)


def test_gradients_and_their_gradients():
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, x)
    assert torch.autograd.gradgradcheck(seeded, x)
    first, ones = seeded(x), seeded(torch.ones_like(x)).detach()
    (gradient,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), x)
    assert_close(again, 6 * ones**3 * x.detach())


def test_a_batch_of_gradients_has_one_mask():
    x = torch.randn(3, 50, dtype=torch.float64)
    plain, batched = (torch.autograd.functional.jacobian(seeded, x, vectorize=way) for way in (False, True))
    assert torch.equal(plain, batched)


def test_nothing_is_stored():
    kept, x = [], torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        seeded(x)
    assert kept == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_again(reentrant):
    layer, x = FeedForward(8, 32, dropout=0.5), torch.randn(50, 8, requires_grad=True)
    torch.manual_seed(0)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    torch.manual_seed(0)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    found = [x.grad, *(part.grad for part in layer.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_elsewhere_it_is_that_of_torch(monkeypatch):
    x = torch.randn(300, 5)

    def assert_torchs(x, p=0.3, training=True):
        torch.manual_seed(0)
        expected = functional.dropout(x, p, training)
        torch.manual_seed(0)
        assert torch.equal(dropout(x, p, training), expected)

    assert_torchs(x, training=False)
    assert_torchs(x, 0.0)
    assert_torchs(x, 1.0)
    with FakeTensorMode():
        assert dropout(torch.randn(300, 5), 0.3, True).shape == (300, 5)
    assert dropout(x.to("meta"), 0.3, True).shape == (300, 5)
    monkeypatch.setitem(INSTALLED, "numba", False)
    assert_torchs(x)


def test_transforms_and_forward_mode():
    x, dx = torch.randn(2, 4, 100, dtype=torch.float64)
    out, tangent = torch.func.jvp(seeded, (x,), (dx,))
    assert torch.equal(out == 0, tangent == 0)
    assert_close(torch.func.grad(lambda x: seeded(x).sum())(x), seeded(torch.ones_like(x)) * 0 + out / x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.unpack_dual(seeded(torch.autograd.forward_ad.make_dual(x, dx)))
    assert_close(dual.tangent / dx, dual.primal / x)
    each = torch.vmap(lambda x: dropout(x, 0.3, True), randomness="different")(torch.ones(2, 100))
    assert not torch.equal(*each)


def test_compiled():
    x = torch.ones(100, 100, requires_grad=True)
    found = torch.compile(lambda x: dropout(x, 0.3, True), fullgraph=True, backend="aot_eager")(x)
    assert abs((found == 0).float().mean() - 0.3) < 0.03
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], found)
