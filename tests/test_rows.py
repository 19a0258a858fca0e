"""The rows layout rebuilds its mask; the kernels, Numba's and Triton's in its interpreter, equal the reference, forward
and in every gradient; Numba's bit for bit by any number of threads."""

import threading

import pytest
import torch
from interpreter import round_as_hardware
from irregular import learned, small_pieces, some_mask  # noqa: F401 (a fixture)

from attngraph import Causal, EdgeBias, Random, Window, attend, from_dense
from attngraph.graph.base import at_size
from attngraph.graph.listing import list_edges
from attngraph.kernels.contract import Modifiers, ScoreBias
from attngraph.planning.layouts import csr
from attngraph.planning.layouts.csr import CSR

pytest.importorskip("numba")
from attngraph.kernels.cpu import openmp
from attngraph.kernels.cpu import rows as rows_numba
from attngraph.kernels.cpu.exp import exp

try:
    from attngraph.kernels.triton import rows as rows_triton
except ImportError:  # Triton runs on Linux
    rows_triton = None

KINDS = (
    "none",
    "offset",
    "offset-shared",
    "edge",
    "edge-shared",
    "edge-heads",
    "dense",
    "dense-shared",
    "keys",
    "batch",
)
SHAPES = [(1, 4, 4), (3, 4, 2), (2, 4, 1), (1, 1, 1)]  # B, H, Hkv
MODULES = [rows_numba] if rows_triton is None else [rows_numba, rows_triton]
KERNELS = [(rows_numba, shape, (23, 31)) for shape in SHAPES]
if rows_triton is not None:  # each takes seconds in the interpreter
    KERNELS += [(rows_triton, (1, 4, 2), (14, 13))]  # with a heavy query and a heavy key
    KERNELS += [pytest.param(rows_triton, shape, (23, 31), marks=pytest.mark.slow) for shape in SHAPES[1:3]]


def layout_of(mask):
    return CSR.from_edges(*mask.nonzero().unbind(1), *mask.shape)


def tensors(B, H, Hkv, n, m, dims=(5, 3), dtype=torch.float64):
    shapes = (B, H, n, dims[0]), (B, Hkv, m, dims[0]), (B, Hkv, m, dims[1])
    return [learned(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def values_of(kind, B, H, mask):
    """The values of a bias, as the kernel reads them."""
    (n, m), edges = mask.shape, int(mask.sum())
    shape = {
        "offset": (H, n + m - 1), "offset-shared": (1, n + m - 1), "edge": (B, H, edges), "edge-shared": (1, 1, edges),
        "edge-heads": (1, H, edges), "dense": (B, H, n, m), "dense-shared": (1, 1, n, m), "keys": (1, 1, 1, m),
        "batch": (B, H, 1, m),
    }[kind]  # fmt: skip
    return learned(*shape)


def public(kind, values, mask):
    """The same as attend takes it."""
    if kind == "none":
        return None
    if kind.startswith("edge"):
        return EdgeBias.sorted(values)
    if kind.startswith("offset"):
        n, m = mask.shape
        return values[:, torch.arange(m) - torch.arange(n)[:, None] + n - 1]
    return values


def rows_results(q, k, v, mask, bias, grad=True, kernels=rows_numba, attention_mask=None):
    """out, lse, and the gradients of a loss that looks at both."""
    layout, modifiers = layout_of(mask), Modifiers(q.shape[3] ** -0.5, bias, attention_mask)
    out, lse = kernels.forward(q, k, v, layout, modifiers)
    dout, dlse = (learned(*side.shape, seed=7, dtype=side.dtype).detach() for side in (out, lse))
    grads = kernels.backward(q, k, v, out, lse, dout, dlse, layout, modifiers, bias is not None and grad)[:4]
    return [out, lse, *grads]


def edges_results(q, k, v, mask, bias, values, **options):
    out, lse = attend(q, k, v, from_dense(mask), bias=bias, backend="edges", return_lse=True, **options)
    dout, dlse = (learned(*side.shape, seed=7, dtype=side.dtype).detach() for side in (out, lse))
    loss = (out * dout).sum() + (lse * dlse)[lse != -torch.inf].sum()
    inputs = [q, k, v] if values is None else [q, k, v, values]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs), *([None] if values is None else [])]


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            assert one.shape == other.shape
            largest = other[other.isfinite()].abs().max() if other.isfinite().any() else 1.0
            torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=float(largest) * tolerance)


@pytest.mark.parametrize(("kernels", "shape", "size"), KERNELS, ids=lambda it: getattr(it, "__name__", str(it)))
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_the_edges_in_every_gradient(kind, kernels, shape, size):
    mask = some_mask(*size)
    q, k, v = tensors(*shape, *size)
    values = None if kind == "none" else values_of(kind, *shape[:2], mask)
    expected = edges_results(q, k, v, mask, public(kind, values, mask), values)
    name = {"keys": "dense", "batch": "dense"}.get(kind, kind.split("-")[0])
    found = rows_results(q, k, v, mask, None if values is None else ScoreBias(name, values), kernels=kernels)
    assert_close(found[:2], expected[:2], 1e-12)
    assert_close(found[2:], expected[2:], 1e-11)


@pytest.mark.parametrize(("kernels", "shape", "size"), KERNELS, ids=lambda it: getattr(it, "__name__", str(it)))
@pytest.mark.parametrize("kind", ["none", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("edge", "offset"))])
def test_padding_is_heard_by_nobody(kind, kernels, shape, size):
    mask = some_mask(*size)
    q, k, v = tensors(*shape, *size)
    values = None if kind == "none" else values_of(kind, *shape[:2], mask)
    padding = (torch.arange(size[1]) + torch.arange(shape[0])[:, None]) % 3 > 0
    expected = edges_results(q, k, v, mask, public(kind, values, mask), values, attention_mask=padding)
    bias = None if values is None else ScoreBias(kind, values)
    found = rows_results(q, k, v, mask, bias, kernels=kernels, attention_mask=padding)
    assert_close(found[:2], expected[:2], 1e-12)
    assert_close(found[2:], expected[2:], 1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_equal_the_reference(shape):
    mask = some_mask(23, 31)
    q, k, v = (side.detach() for side in tensors(*shape, 23, 31))
    expected = attend(q, k, v, from_dense(mask), backend="reference", return_lse=True)
    assert_close(rows_numba.forward(q, k, v, layout_of(mask), Modifiers(5**-0.5)), expected, 1e-12)
    small = (side.float() for side in (q, k, v))
    assert_close(rows_numba.forward(*small, layout_of(mask), Modifiers(5**-0.5)), expected, 2e-6)


@pytest.mark.skipif(rows_triton is None, reason="Triton is not installed: it runs on Linux")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.float16, torch.float32))],
    ids=str,
)  # fmt: skip
def test_rows_in_triton_take_every_precision_and_more_heads_than_one_program(dtype, monkeypatch):
    round_as_hardware(monkeypatch)
    mask = some_mask(13, 17)
    q, k, v = (side.detach().to(dtype).requires_grad_() for side in tensors(1, 6, 3, 13, 17, (130, 70)))
    expected = edges_results(*(side.detach().double().requires_grad_() for side in (q, k, v)), mask, None, None)
    found = rows_results(q, k, v, mask, None, kernels=rows_triton)
    assert [part.dtype for part in found[:5]] == [dtype, torch.float32, dtype, dtype, dtype]
    assert_close(found, expected, 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dims", [(1, 1), (2, 7), (4, 4), (16, 16), (17, 33), (64, 20)], ids=str)
def test_any_width_is_right_in_float32(dims):
    mask = some_mask(40, 37)
    q, k, v = tensors(2, 4, 2, 40, 37, dims)
    expected = edges_results(q, k, v, mask, None, None)
    found = rows_results(*(side.float() for side in (q, k, v)), mask, None)
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("kernels", MODULES, ids=lambda kernels: kernels.__name__)
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 4), (4, 0), (4, 5), (1, 1)])
def test_a_graph_without_edges_gives_zero(n, m, kernels):
    mask = torch.zeros(n, m, dtype=torch.bool)
    out, lse, *gradients = rows_results(*tensors(2, 4, 2, n, m), mask, None, kernels=kernels)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((gradient == 0).all() for gradient in gradients[:3])
    assert torch.equal(layout_of(mask).mask(), mask)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(23, 31), (1, 50), (50, 1), (200, 90)])
def test_the_layout_rebuilds_the_mask_and_every_edge_has_one_unit(n, m, seed):
    mask = some_mask(n, m, seed)
    layout = layout_of(mask)
    assert torch.equal(layout.mask(), mask)
    assert torch.equal(layout_of(mask.T.contiguous()).by_query.neighbor, layout.by_key.neighbor)
    query, key = mask.nonzero().unbind(1)
    edge = layout.numbered.edge.long()
    assert torch.equal(query[edge], layout.by_key.neighbor.long())
    assert torch.equal(key[edge], key.sort(stable=True)[0])
    for side in (layout.by_query, layout.by_key):
        taken, nodes = torch.zeros(len(side.neighbor)), torch.zeros(len(side.start) - 1)
        for number, (first, after, begin, end) in enumerate(side.units.tolist()):
            taken[begin:end] += 1
            nodes[first:after] += 1
            assert side.start[first] <= begin
            assert end <= side.start[after]
            assert end - begin <= (side.heavy if number < side.num_pieces else side.heavy + csr.UNIT_EDGES)
        assert (taken == 1).all()
        for node, first, last in side.pieces.tolist():
            assert nodes[node] == last - first
            nodes[node] = 1
        assert (nodes == 1).all()
    assert layout.nbytes > 0


def test_a_symmetric_graph_is_stored_once():
    mask = some_mask(40, 40)
    one, both = layout_of(mask), layout_of(mask | mask.T)
    assert both.by_key.neighbor is both.by_query.neighbor
    assert one.by_key.neighbor is not one.by_query.neighbor
    edge = both.numbered.edge
    assert torch.equal(edge[edge.long()], torch.arange(len(edge)).int())  # the edge the other way round
    assert both.nbytes == sum(part.nbytes for part in (*both.by_query[:-1], edge))


LISTS = [Random(5), Random(9).sized(90, 70), Window(4, 3), from_dense(some_mask(80, 80)), Random(2) | Causal()]


@pytest.mark.parametrize("graph", LISTS, ids=str)
def test_edges_listed_in_steps_are_the_same(graph, monkeypatch):
    """As they are where so many edges at once would need too much memory."""
    bound, n, m = at_size(graph, *(size or 80 for size in graph.size))
    whole = CSR.from_edges(*list_edges(bound, n, m), n, m)
    sides = [(side, getattr(whole, side)) for side in ("by_query", "by_key", "numbered")]
    monkeypatch.setattr(csr, "STEP_EDGES", 50)
    steps = CSR.from_graph(bound, n, m)
    for name, side in sides:
        found = getattr(steps, name)
        assert all(torch.equal(one, other) for one, other in zip(found[:-1], side[:-1], strict=True))


def test_a_bias_of_minus_infinity_silences_an_edge():
    mask = some_mask(23, 31)
    q, k, v = tensors(2, 4, 2, 23, 31)
    values = learned(1, 1, 23, 31).detach()
    values[0, 0, 3] = -torch.inf
    values[0, 0, 7] = -torch.inf
    values[0, 0, :, 4] = -torch.inf
    values[0, 0, 23 // 3, 2:] = -torch.inf
    values.requires_grad_()
    expected = edges_results(q, k, v, mask, values, values)
    found = rows_results(q, k, v, mask, ScoreBias("dense", values))
    assert (found[0][:, :, 3] == 0).all()
    assert (found[1][:, :, 3] == -torch.inf).all()
    assert (found[2][:, :, 3] == 0).all()
    assert not any(part.isnan().any() for part in found)
    assert_close(found[:2], expected[:2], 1e-12)
    silent = values.detach() == -torch.inf
    assert (found[5][silent] == 0).all()
    assert_close([found[5]], [expected[5].masked_fill(silent, 0)], 1e-11)


@pytest.mark.parametrize("kind", ["none", "offset", "edge-shared", "dense-shared", "keys"])
def test_any_number_of_threads_gives_the_same_bits(kind):
    mask = some_mask(300, 280)
    sides = [side.float() for side in tensors(3, 4, 2, 300, 280)]
    values = None if kind == "none" else values_of(kind, 3, 4, mask).float()
    bias = None if values is None else ScoreBias("dense" if kind == "keys" else kind.split("-")[0], values)
    runs = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        runs.append([part for part in rows_results(*sides, mask, bias) if part is not None])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


def test_callers_in_many_threads_do_not_disturb_each_other():
    torch.set_num_threads(3)
    mask = some_mask(300, 280)
    sides = tensors(2, 4, 2, 300, 280)
    expected, found = rows_results(*sides, mask, None), {}
    callers = [
        threading.Thread(target=lambda x=x: found.update({x: rows_results(*sides, mask, None)})) for x in range(6)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 6
    assert all(torch.equal(a, b) for run in found.values() for a, b in zip(run[:5], expected[:5], strict=True))


@pytest.mark.parametrize("torch_threads", [True, False])
def test_threads_do_each_job_once(monkeypatch, torch_threads):
    if not torch_threads:
        monkeypatch.setattr(openmp, "_gomp_parallel", lambda: None)
    torch.set_num_threads(3)
    done = []
    openmp.parallel_for(1000, done.append)
    assert sorted(done) == list(range(1000))


@pytest.mark.parametrize("torch_threads", [True, False])
def test_an_error_in_a_helper_reaches_the_caller(monkeypatch, torch_threads):
    if not torch_threads:
        monkeypatch.setattr(openmp, "_gomp_parallel", lambda: None)
    torch.set_num_threads(3)
    caller, both = threading.current_thread(), threading.Barrier(2, timeout=10)

    def work(job):
        if job < 2:
            both.wait()  # so that a helper has one of the two
        if threading.current_thread() is not caller:
            raise KeyError("lost")

    with pytest.raises((KeyError, threading.BrokenBarrierError)):
        openmp.parallel_for(10, work)


def test_strides_do_not_matter():
    mask = some_mask(23, 31)
    q, k, v = (side.detach() for side in tensors(2, 4, 2, 23, 31, (6, 6)))
    expected = rows_results(q, k, v, mask, None)
    views = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in (q, k, v)]
    assert all(torch.equal(a, b) for a, b in zip(rows_results(*views, mask, None)[:5], expected[:5], strict=True))
    views = [side.mT.contiguous().mT for side in (q, k, v)]
    assert all(torch.equal(a, b) for a, b in zip(rows_results(*views, mask, None)[:5], expected[:5], strict=True))


def test_nan_propagates_to_whoever_hears_it_and_no_further():
    mask = torch.eye(6, dtype=torch.bool) | torch.eye(6, dtype=torch.bool).roll(1, 0)
    q, k, v = (side.detach() for side in tensors(1, 2, 2, 6, 6))
    k[0, 0, 2] = torch.nan
    out, lse = rows_numba.forward(q, k, v, layout_of(mask), Modifiers(1.0))
    assert out[0, 0, 2:4].isnan().all()
    assert lse[0, 0, 2:4].isnan().all()
    assert out.isnan().sum() == 2 * 3


def test_parts_of_a_graph_share_one_backward():
    """Backward with the final lse of two disjoint parts adds up to that of the whole."""
    whole = some_mask(23, 31)
    part = whole & (torch.arange(31) < 14)
    q, k, v = (side.detach() for side in tensors(2, 4, 2, 23, 31))
    out, lse = rows_numba.forward(q, k, v, layout_of(whole), Modifiers(0.4))
    dout = learned(*out.shape, seed=7).detach()
    runs = [
        rows_numba.backward(q, k, v, out, lse, dout, None, layout_of(mask), Modifiers(0.4), False)[:3]
        for mask in (whole, part, whole & ~part)
    ]
    assert_close([a + b for a, b in zip(*runs[1:], strict=True)], runs[0], 1e-12)


def test_exp_is_right_to_an_ulp_and_keeps_nan():
    import numpy as np
    from numba import njit

    @njit(fastmath={"contract"})
    def exps(x, y):
        for at in range(len(x)):
            y[at] = exp(x[at])

    x = np.concatenate([np.linspace(-87.3, 10, 100_001), [0, -88, -1e9, -np.inf, np.nan]]).astype(np.float32)
    y, expected = np.empty_like(x), np.exp(x.astype(np.float64))
    exps(x, y)
    assert (np.abs(y[:-4] - expected[:-4]) <= 1.01 * np.spacing(expected[:-4].astype(np.float32))).all()
    assert (y[-4:-1] == 0).all()
    assert np.isnan(y[-1])
