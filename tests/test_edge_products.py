"""Scores edge by edge on a CPU, dot products and additive ones, equal those of the edge layer, and so do gradients."""

import pytest
import torch
from irregular import learned, small_pieces, some_mask  # noqa: F401 (a fixture)

from attngraph.kernels.contract import EdgeTerms
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


# ------------------------------------------------------------------------------------------------ features of edges


def features(mask=MASK, Hkv=2, entries=1, F=7, width=5, dtype=torch.float64):
    """Of the edges of a mask, for keys of so many heads."""
    values, to_key = learned(entries, int(mask.sum()), F, seed=4), learned(Hkv, width, F, seed=5)
    return EdgeTerms(*(side.detach().to(dtype).requires_grad_() for side in (values, to_key)), None, needs_grad=True)


def featured_results(q, k, weight, activation, given, mask=MASK):
    """The products, dq, dk, dweight, dvalues and dto_key."""
    layout = CSR.from_edges(*mask.nonzero().unbind(1), *mask.shape)
    found = products(q, k, weight, layout, 0.4, activation, 0.2, features=given)
    dproducts = learned(*found.shape, seed=7).detach().to(q.dtype)
    return [found, *products_backward(dproducts, q, k, weight, layout, 0.4, activation, 0.2, given)]


def expected_featured_results(q, k, weight, activation, given, mask=MASK):
    query, key = mask.nonzero().unbind(1)
    k_ij = k[:, :, key] + torch.einsum("hdf,bef->bhed", given.to_key, given.values)
    found = 0.4 * Additive(weight, activation)(q[:, :, query], k_ij.repeat_interleave(q.shape[1] // k.shape[1], 1))
    inputs = [q, k, weight, given.values, given.to_key]
    return [found.detach(), *torch.autograd.grad((found * learned(*found.shape, seed=7).detach()).sum(), inputs)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_features_of_edges_equal_those_added_to_keys_in_every_gradient(activation, shape):
    sides = tensors(activation, *shape)
    for entries in {1, shape[0]}:
        given = features(Hkv=shape[2], entries=entries)
        found = featured_results(*sides, activation, given)
        assert_close(found, expected_featured_results(*sides, activation, given), 1e-13)


@pytest.mark.parametrize(("F", "width"), [(1, 33), (4, 1), (16, 16), (19, 50), (130, 7)])
def test_any_number_of_features_is_right_in_float32(F, width):
    sides = tensors("tanh", 2, 4, 2, width=width)
    given = features(F=F, width=width)
    found = featured_results(*(side.float() for side in sides), "tanh", given.to(torch.float32))
    assert_close(found, expected_featured_results(*sides, "tanh", given), 5e-6)


def test_the_gradient_of_features_is_made_where_it_is_asked_for():
    sides, given = tensors("relu", 2, 4, 2), features()
    *_, dvalues, dto_key = featured_results(*sides, "relu", given._replace(needs_grad=False))
    assert dvalues is None
    torch.testing.assert_close(dto_key, featured_results(*sides, "relu", given)[-1], rtol=0, atol=0)


def test_features_of_a_graph_without_edges_have_gradients_of_zero():
    for n, m in [(0, 0), (0, 4), (4, 5)]:
        none = torch.zeros(n, m, dtype=torch.bool)
        *_, dvalues, dto_key = featured_results(*tensors("tanh", 2, 4, 2, n, m), "tanh", features(none), none)
        assert dvalues.shape == (1, 0, 7)
        assert (dto_key == 0).all()
        assert dto_key.shape == (2, 5, 7)


def test_any_number_of_threads_gives_the_same_bits_with_features():
    mask = some_mask(300, 280)
    sides = [side.float() for side in tensors("leaky_relu", 2, 4, 2, 300, 280)]
    given, runs = features(mask, dtype=torch.float32), []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append(featured_results(*sides, "leaky_relu", given, mask))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
