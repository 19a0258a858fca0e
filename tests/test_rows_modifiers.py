"""Transforms, normalisers and dropout in the rows kernels on a CPU equal the edge layer in float64, forward and in
every gradient, with every bias, padding, grouped heads, and heavy nodes that are cut in pieces."""

import pytest
import torch
from irregular import learned, small_pieces, some_mask  # noqa: F401 (a fixture)

from attngraph.kernels.contract import Dropout, Modifiers, ScoreBias, Transform
from attngraph.kernels.dropout import kept
from attngraph.kernels.edge import edges
from attngraph.kernels.scoring import LeakyReLU, SoftCap
from attngraph.planning.layouts import csr
from attngraph.planning.layouts.csr import CSR

pytest.importorskip("numba")
from attngraph.kernels.cpu import rows
from attngraph.kernels.cpu.exp import tanh

SOFTCAP, LEAKY_RELU = Transform("softcap", 0.7), Transform("leaky_relu", 0.2)
SEED = torch.tensor(2**40 + 12345)
DROPOUT, HEADS = Dropout(0.5, SEED), torch.tensor([9, 2, 70, 3])
CHANGES = {
    "softcap": {"transform": SOFTCAP},
    "leaky-relu": {"transform": LEAKY_RELU},
    "sigmoid": {"normalize": "sigmoid"},
    "none": {"normalize": "none"},
    "relu": {"normalize": "relu"},
    "squared-relu": {"normalize": "squared_relu"},
    "dropout": {"dropout": DROPOUT},
    "softcap-dropout": {"transform": SOFTCAP, "dropout": DROPOUT},
    "softcap-sigmoid-dropout": {"transform": SOFTCAP, "normalize": "sigmoid", "dropout": DROPOUT},
    "leaky-relu-none-dropout": {"transform": LEAKY_RELU, "normalize": "none", "dropout": DROPOUT},
}
BIASES = ("offset", "offset-shared", "edge", "edge-shared", "edge-heads", "dense", "dense-shared", "keys", "batch")
SHAPES = [(1, 4, 4), (3, 4, 2), (2, 3, 1), (1, 1, 1)]  # B, H, Hkv
N, M = 23, 91  # keys beyond one tile of 64, in which a counter gives several words


MASK = some_mask(N, M)


def tensors(B, H, Hkv, n=N, m=M, dims=(5, 3)):
    return [learned(B, H, n, dims[0]), learned(B, Hkv, m, dims[0], seed=2), learned(B, Hkv, m, dims[1], seed=3)]


def some_bias(name, B, H, mask=MASK):
    (n, m), count = mask.shape, int(mask.sum())
    shape = {
        "offset": (H, n + m - 1), "offset-shared": (1, n + m - 1), "edge": (B, H, count), "edge-shared": (1, 1, count),
        "edge-heads": (1, H, count), "dense": (B, H, n, m), "dense-shared": (1, 1, n, m), "keys": (1, 1, 1, m),
        "batch": (B, H, 1, m),
    }[name]  # fmt: skip
    kind = {"keys": "dense", "batch": "dense"}.get(name, name.split("-")[0])
    return ScoreBias(kind, learned(*shape, seed=4))


def rows_results(q, k, v, modifiers, mask=MASK):
    """out, lse, and the gradients of a loss that looks at both: of q, k, v and the bias."""
    layout = CSR.from_edges(*mask.nonzero().unbind(1), *mask.shape)
    out, lse = rows.forward(q, k, v, layout, modifiers)
    dout = learned(*out.shape, seed=7).detach().to(q.dtype)
    dlse = learned(*lse.shape, seed=8).detach().to(q.dtype) if modifiers.normalize == "softmax" else None
    grads = rows.backward(q, k, v, out, lse, dout, dlse, layout, modifiers, modifiers.bias is not None)[:4]
    return [out, lse, *grads]


def edges_results(q, k, v, modifiers, mask=MASK):
    query, key = mask.nonzero().unbind(1)
    bias, transform = modifiers.bias, modifiers.transform
    of_edges = None if bias is None else bias.over_edges(query, key, mask.shape[0])
    score = "dot"
    if transform is not None:
        score = {"softcap": SoftCap, "leaky_relu": LeakyReLU}[transform.kind](transform.value)
    out, lse, _ = edges(
        q, k, v, query, key, torch.empty(0, len(query)), bias=of_edges, attention_mask=modifiers.attention_mask,
        scale=modifiers.scale, dropout=modifiers.dropout, score=score, normalize=modifiers.normalize,
    )  # fmt: skip
    loss = (out * learned(*out.shape, seed=7).detach()).sum()
    if lse is None:
        lse = torch.zeros(out.shape[:3], dtype=out.dtype)
    else:
        loss = loss + (lse * learned(*lse.shape, seed=8).detach())[lse != -torch.inf].sum()
    inputs = [q, k, v] if bias is None else [q, k, v, bias.values]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs), *([None] if bias is None else [])]


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            assert one.shape == other.shape
            largest = other[other.isfinite()].abs().max() if other.isfinite().any() else 1.0
            torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=float(largest) * tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_modifiers_equal_the_edges_in_every_gradient(change, shape):
    q, k, v = tensors(*shape)
    modifiers = Modifiers(0.5, **CHANGES[change])
    assert_close(rows_results(q, k, v, modifiers), edges_results(q, k, v, modifiers), 1e-12)


@pytest.mark.parametrize("change", ["softcap-dropout", "softcap-sigmoid-dropout", "leaky-relu-none-dropout"])
@pytest.mark.parametrize("bias", BIASES)
def test_modifiers_go_with_every_bias_and_padding(bias, change):
    q, k, v = tensors(3, 4, 2)
    padding = (torch.arange(M) + torch.arange(3)[:, None]) % 3 > 0
    modifiers = Modifiers(0.5, some_bias(bias, 3, 4), padding, **CHANGES[change])
    assert_close(rows_results(q, k, v, modifiers), edges_results(q, k, v, modifiers), 1e-12)


@pytest.mark.parametrize("change", CHANGES)
def test_modifiers_in_float32(change):
    sides, modifiers = tensors(2, 4, 2, dims=(16, 16)), Modifiers(0.25, **CHANGES[change])
    found = rows_results(*(side.float() for side in sides), modifiers)
    assert_close(found, edges_results(*sides, modifiers), 5e-6)


@pytest.mark.parametrize("change", ["dropout", "leaky-relu", "sigmoid", "squared-relu"])
def test_a_bias_of_minus_infinity_silences_an_edge(change):
    q, k, v = tensors(2, 4, 2)
    values = learned(1, 1, N, M).detach()
    values[0, 0, 3] = values[0, 0, :, 4] = -torch.inf
    modifiers = Modifiers(0.5, ScoreBias("dense", values), **CHANGES[change])
    found = rows_results(q, k, v, modifiers)
    masked = rows_results(q, k, v, modifiers, MASK & (values[0, 0] > -torch.inf))
    assert (found[0][:, :, 3] == 0).all()
    assert not any(part.isnan().any() for part in found)
    assert_close(found, masked, 1e-12)


@pytest.mark.parametrize("change", ["softcap-dropout", "softcap-sigmoid-dropout"])
def test_modifiers_go_on_from_chunk_to_chunk(change, monkeypatch):
    """Of one query with more edges than a chunk has, which is not cut in pieces."""
    monkeypatch.setitem(csr.HEAVY_DEGREE, "cpu", 1000)
    q, k, v = tensors(2, 3, 3)
    modifiers = Modifiers(0.5, some_bias("edge", 2, 3), **CHANGES[change])
    assert rows.CHUNK_EDGES < M
    assert_close(rows_results(q, k, v, modifiers), edges_results(q, k, v, modifiers), 1e-12)


@pytest.mark.parametrize("bias", [None, "offset"])
def test_dropout_counts_heads_by_their_numbers_in_the_call(bias):
    """Heads 9, 2, 70 and 3 of a call drop what they would drop with the others."""
    q, k, v = tensors(2, 71, 71, dims=(2, 2))
    every = Modifiers(0.5, None if bias is None else some_bias(bias, 2, 71), dropout=DROPOUT)
    some = every._replace(dropout=DROPOUT._replace(heads=HEADS))
    if every.bias is not None:
        some = some._replace(bias=ScoreBias("offset", every.bias.values[HEADS].contiguous()))
    layout = CSR.from_edges(*MASK.nonzero().unbind(1), N, M)
    expected, found = [], []
    for modifiers, heads, results in ((every, HEADS, expected), (some, slice(None), found)):
        sides = (q, k, v) if modifiers is every else (q[:, HEADS], k[:, HEADS], v[:, HEADS])
        out, lse = rows.forward(*sides, layout, modifiers)
        *gradients, dbias, _ = rows.backward(*sides, out, lse, out, None, layout, modifiers, bias is not None)
        results += [side[:, heads] for side in (out, *gradients)] + ([] if dbias is None else [dbias[heads]])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_dropped_weights_are_those_of_the_definition():
    """Weights of one, and values that tell the keys apart: out is 1 / (1 - p) for each key that is kept, else 0."""
    mask, dropout = torch.ones(7, M, dtype=torch.bool), Dropout(0.3, SEED)
    q, k = torch.zeros(2, 3, 7, 0, dtype=torch.float64), torch.zeros(2, 3, M, 0, dtype=torch.float64)
    v = torch.eye(M, dtype=torch.float64).expand(2, 3, M, M)
    modifiers = Modifiers(1.0, ScoreBias("edge", torch.ones(1, 1, 7 * M).double()), normalize="none", dropout=dropout)
    out, _ = rows.forward(q, k, v, CSR.from_edges(*mask.nonzero().unbind(1), 7, M), modifiers)
    numbers = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None], torch.arange(7)[:, None]
    expected = kept(dropout, *numbers, torch.arange(M))
    torch.testing.assert_close(out, expected.double() / 0.7, rtol=1e-15, atol=0)
    assert 0.6 < expected.double().mean() < 0.8


@pytest.mark.parametrize("change", ["dropout", "softcap-sigmoid-dropout"])
@pytest.mark.parametrize("bias", [None, "edge", "offset"])
def test_any_number_of_threads_gives_the_same_bits(bias, change):
    mask = some_mask(150, 140)
    sides = [side.float() for side in tensors(2, 4, 2, 150, 140)]
    modifiers = Modifiers(0.5, None if bias is None else some_bias(bias, 2, 4, mask), **CHANGES[change])
    runs = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        runs.append([part for part in rows_results(*sides, modifiers, mask) if part is not None])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("change", [{}, *({"normalize": each} for each in ("sigmoid", "none"))], ids=str)
@pytest.mark.parametrize("bias", ["edge", "keys"])
def test_scores_can_be_given_alone(bias, change):
    """With q and k of width 0, scores are what the bias says."""
    q, k, v = tensors(2, 4, 2, dims=(0, 3))
    modifiers = Modifiers(0.5, some_bias(bias, 2, 4), **change)
    found, expected = rows_results(q, k, v, modifiers), edges_results(q, k, v, modifiers)
    assert found[2].shape == q.shape
    assert found[3].shape == k.shape
    assert_close(found[:2] + found[4:], expected[:2] + expected[4:], 1e-12)


@pytest.mark.parametrize("change", ["softcap", "sigmoid", "squared-relu"])
def test_a_graph_without_edges_gives_zero(change):
    for n, m in [(0, 0), (0, 4), (4, 0), (4, 5)]:
        mask, modifiers = torch.zeros(n, m, dtype=torch.bool), Modifiers(0.5, **CHANGES[change])
        out, lse, *gradients = rows_results(*tensors(2, 4, 2, n, m), modifiers, mask)
        assert (out == 0).all()
        assert (lse == (-torch.inf if change == "softcap" else 0)).all()
        assert all((gradient == 0).all() for gradient in gradients[:3])


def test_parts_of_a_graph_add_up():
    """Without a softmax, results and gradients of two disjoint parts add up to those of the whole."""
    q, k, v = tensors(2, 4, 2)
    part, modifiers = MASK & (torch.arange(M) < 40), Modifiers(0.5, **CHANGES["softcap-sigmoid-dropout"])
    whole, one, other = (rows_results(q, k, v, modifiers, mask) for mask in (MASK, part, MASK & ~part))
    assert_close([a + b for a, b in zip(one[:5], other[:5], strict=True)], whole[:5], 1e-12)


def test_tanh_is_right_near_zero_and_far_and_keeps_nan():
    import numpy as np
    from numba import njit

    @njit(fastmath={"contract"})
    def tanhs(x, y):
        for at in range(len(x)):
            y[at] = tanh(x[at])

    sizes = np.geomspace(1e-30, 30, 50_001)
    x = np.concatenate([sizes, -sizes, [0, np.inf, -np.inf, np.nan]]).astype(np.float32)
    y, expected = np.empty_like(x), np.tanh(x.astype(np.float64))
    tanhs(x, y)
    assert (np.abs(y[:-4] - expected[:-4]) <= 3 * np.spacing(np.abs(expected[:-4]).astype(np.float32))).all()
    assert y[-4:-1].tolist() == [0, 1, -1]
    assert np.isnan(y[-1])
