"""Scores edge by edge on a CPU, dot products and additive ones, equal those of the edge layer, and so do gradients."""

import pytest
import torch
from irregular import learned, small_pieces, some_mask  # noqa: F401 (a fixture)

from attngraph.kernels.scoring import Additive, dot
from attngraph.planning.layouts.csr import CSR

pytest.importorskip("numba")
from attngraph.kernels.cpu.products import products, products_backward

ACTIVATIONS = ("", "tanh", "leaky_relu", "relu")
SHAPES = [(1, 4, 4), (3, 4, 2), (2, 3, 1), (1, 1, 1)]  # B, H, Hkv
N, M = 23, 31


MASK = some_mask(N, M)


def tensors(activation, B, H, Hkv, n=N, m=M, width=5):
    """q, k and weight."""
    weight = learned(H, width, seed=3) if activation else None
    return [learned(B, H, n, width), learned(B, Hkv, m, width, seed=2), weight]


def results(q, k, weight, activation, mask=MASK):
    """The products, dq, dk and dweight."""
    layout = CSR.from_edges(*mask.nonzero().unbind(1), *mask.shape)
    found = products(q, k, weight, layout, 0.4, activation, 0.2)
    dproducts = learned(*found.shape, seed=7).detach().to(q.dtype)
    return [found, *products_backward(dproducts, q, k, weight, layout, 0.4, activation, 0.2)]


def expected_results(q, k, weight, activation, mask=MASK):
    query, key = mask.nonzero().unbind(1)
    function = Additive(weight, activation) if activation else dot
    found = 0.4 * function(q[:, :, query], k.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, key])
    inputs = [side for side in (q, k, weight) if side is not None]
    return [found.detach(), *torch.autograd.grad((found * learned(*found.shape, seed=7).detach()).sum(), inputs)]


def assert_close(found, expected, tolerance):
    assert (found[-1] is None) == (len(expected) == 3)
    for one, other in zip(found, expected, strict=False):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=0, atol=float(other.abs().max()) * tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_equal_the_edges_in_every_gradient(activation, shape):
    sides = tensors(activation, *shape)
    assert_close(results(*sides, activation), expected_results(*sides, activation), 1e-13)


@pytest.mark.parametrize("width", [1, 7, 33])
@pytest.mark.parametrize("activation", ["", "tanh"])
def test_any_width_is_right_in_float32(activation, width):
    sides = tensors(activation, 2, 4, 2, width=width)
    found = results(*(side if side is None else side.float() for side in sides), activation)
    assert_close(found, expected_results(*sides, activation), 2e-6)


@pytest.mark.parametrize("activation", ["", "tanh"])
def test_a_graph_without_edges_gives_zero(activation):
    for n, m in [(0, 0), (0, 4), (4, 0), (4, 5)]:
        found, dq, dk, dweight = results(
            *tensors(activation, 2, 4, 2, n, m), activation, torch.zeros(n, m, dtype=torch.bool)
        )
        assert found.shape == (2, 4, 0)
        assert (dq == 0).all()
        assert (dk == 0).all()
        assert dweight is None or (dweight == 0).all()


@pytest.mark.parametrize("activation", ["", "leaky_relu"])
def test_any_number_of_threads_gives_the_same_bits(activation):
    mask = some_mask(300, 280)
    sides = [side if side is None else side.float() for side in tensors(activation, 2, 4, 2, 300, 280)]
    runs = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append([part for part in results(*sides, activation, mask) if part is not None])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_by_a_known_lse_are_the_exponents(dtype):
    q, k, _ = (side if side is None else side.to(dtype) for side in tensors("", 2, 4, 2))
    mask = some_mask(q.shape[2], k.shape[2])
    layout = CSR.from_edges(*mask.nonzero().unbind(1), *mask.shape)
    lse = torch.randn(q.shape[:3], dtype=dtype)
    found = products(q, k, None, layout, 0.5, "", 0.0, lse)
    expected = (products(q, k, None, layout, 0.5, "", 0.0) - lse[:, :, mask.nonzero()[:, 0]]).exp()
    torch.testing.assert_close(found, expected)


def test_vectors_without_width_give_zero():
    found, dq, dk, _ = results(*tensors("", 2, 4, 2, width=0), "")
    assert (found == 0).all()
    assert dq.shape == (2, 4, N, 0)
    assert dk.shape == (2, 2, M, 0)
