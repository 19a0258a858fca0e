"""Every backend equals the reference in float64, forward and in every gradient; and bad input is told."""

import re

import pytest
import torch
from graphs import GRAPHS
from torch.nn.functional import scaled_dot_product_attention

from attngraph import (
    Additive,
    Alibi,
    Causal,
    Documents,
    EdgeBias,
    EdgeList,
    Empty,
    Full,
    Identity,
    PerHead,
    Prefix,
    Random,
    RelativeBias,
    Window,
    attend,
    from_dense,
)
from attngraph.graph.positions import distance_offset
from attngraph.graph.text import pack

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")
FORWARD, BACKWARD = 1e-12, 1e-10


def tensors(n, m, *, heads=4, kv_heads=2, dim=4, value_dim=3, batch=2, seed=0):
    chance = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, value_dim))
    return [torch.randn(shape, dtype=torch.float64, generator=chance).requires_grad_() for shape in shapes]


def biases(kind, graph, n, m, heads=4, batch=2):
    """A bias and its learned tensor."""
    chance = torch.Generator().manual_seed(1)

    def learned(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=chance).requires_grad_()

    match kind:
        case "alibi":
            return Alibi(values := learned(heads)), values
        case "clipped":
            return RelativeBias(values := learned(heads, 5)), values
        case "buckets":
            return RelativeBias(values := learned(heads, 8), max_distance=16), values
        case "buckets-past":
            return RelativeBias(values := learned(heads, 8), max_distance=16, bidirectional=False), values
        case "edges":
            return EdgeBias.sorted(values := learned(batch, heads, graph.edge_index(n, m).shape[1])), values
        case "edges-shared":
            return EdgeBias.sorted(values := learned(graph.edge_index(n, m).shape[1])), values
        case "dense":
            return (values := learned(heads, n, m)), values
        case "dense-keys":
            return (values := learned(batch, 1, 1, m)), values
    return None, None


DISTANCES = ("alibi", "clipped", "buckets", "buckets-past")
REPEATED = ("clipped", "buckets-past", "edges-shared")  # of a kind that another one shows
BIASES = ("none", "alibi", "clipped", "buckets", "buckets-past", "edges", "edges-shared", "dense", "dense-keys")


def results(q, k, v, graph, bias, learned, backend, **options):
    """out, lse and the gradients of a loss that looks at both."""
    out, lse = attend(q, k, v, graph, bias=bias, backend=backend, return_lse=True, **options)
    heard = lse != -torch.inf
    chance = torch.Generator().manual_seed(2)
    weight, lse_weight = (torch.randn(side.shape, dtype=torch.float64, generator=chance) for side in (out, lse))
    loss = (out * weight).sum() + (lse.masked_fill(~heard, 0) * lse_weight).sum()
    inputs = [q, k, v] + ([] if learned is None else [learned])
    loss = loss + 0 * sum(side.sum() for side in inputs)
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def assert_equal(found, expected):
    (out, lse, gradients), (out_0, lse_0, gradients_0) = found, expected
    torch.testing.assert_close(out, out_0, rtol=0, atol=FORWARD)
    torch.testing.assert_close(lse, lse_0, rtol=0, atol=FORWARD)
    for gradient, gradient_0 in zip(gradients, gradients_0, strict=True):
        torch.testing.assert_close(gradient, gradient_0, rtol=0, atol=BACKWARD)


@pytest.mark.share(3)
@every
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in REPEATED else kind for kind in BIASES]
)
def test_every_backend_equals_the_reference(case, kind):
    heads = case.graph.heads or 4
    q, k, v = tensors(case.n, case.m, heads=heads)
    bias, learned = biases(kind, case.graph, case.n, case.m, heads)
    if kind in DISTANCES and (refused := refuses_distances(case.graph, case.n, case.m)):
        with pytest.raises(ValueError, match=re.escape(refused)):
            attend(q, k, v, case.graph, bias=bias)
        return
    expected = results(q, k, v, case.graph, bias, learned, "reference")
    for backend in ("edges", "dense", "tiles", "rows", "auto"):
        assert_equal(results(q, k, v, case.graph, bias, learned, backend), expected)


def refuses_distances(graph, n, m):
    """Whether a graph does not tell where its queries stand."""
    try:
        distance_offset(graph, n, m)
    except ValueError as error:
        return str(error)
    return None


@every
def test_padding_is_another_graph_for_each_entry_of_the_batch(case):
    """Each backend against the reference; and the reference, entry by entry, against a mask without these columns."""
    heads = case.graph.heads or 4
    q, k, v = tensors(case.n, case.m, heads=heads, batch=3)
    mask = torch.rand(3, case.m, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1] = False
    expected = results(q, k, v, case.graph, None, None, "reference", attention_mask=mask)
    for entry in range(3):
        graph = from_dense(case.mask & mask[entry])
        sides = (side[entry : entry + 1] for side in (q, k, v))
        out, lse = attend(*sides, graph, backend="reference", return_lse=True)
        torch.testing.assert_close(out, expected[0][entry : entry + 1], rtol=0, atol=FORWARD)
        torch.testing.assert_close(lse, expected[1][entry : entry + 1], rtol=0, atol=FORWARD)
    for backend in ("edges", "dense", "tiles", "rows", "auto"):
        assert_equal(results(q, k, v, case.graph, None, None, backend, attention_mask=mask), expected)


@every
def test_padding_in_single_precision(case):
    """As the kernels of float32 have it, which know no float64."""
    heads = case.graph.heads or 4
    sides = tensors(case.n, case.m, heads=heads)
    mask = torch.arange(case.m) >= torch.tensor([[2], [0]])
    expected = results(*sides, case.graph, None, None, "reference", attention_mask=mask)
    halves = [side.detach().float().requires_grad_() for side in sides]
    for backend in ("tiles", "rows", "auto"):
        found = results(*halves, case.graph, None, None, backend, attention_mask=mask)
        for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@every
def test_the_reference_is_softmax_over_the_oracle(case):
    """Independently of the library: scores of the oracle's edges, one by one, in Python."""
    heads = case.graph.heads or 2
    q, k, v = (side.detach() for side in tensors(case.n, case.m, heads=heads, kv_heads=1, batch=1))
    out = attend(q, k, v, case.graph, backend="reference")
    mask = case.mask.expand(heads, case.n, case.m)
    for h in range(heads):
        for i in range(case.n):
            heard = [j for j in range(case.m) if mask[h, i, j]]
            power = {j: float(torch.exp(q[0, h, i] @ k[0, 0, j] / 2)) for j in heard}
            expected = sum(
                (power[j] / sum(power.values()) * v[0, 0, j] for j in heard), torch.zeros(3, dtype=torch.float64)
            )
            torch.testing.assert_close(out[0, h, i], expected, rtol=0, atol=FORWARD)


@every
def test_whoever_hears_nobody_gets_zero_and_no_gradient(case):
    q, k, v = tensors(case.n, case.m, heads=case.graph.heads or 4)
    deaf = ~case.mask.any(-1)
    for backend in ("reference", "edges", "dense", "tiles", "rows"):
        out, lse = attend(q, k, v, case.graph, backend=backend, return_lse=True)
        deaf_rows = deaf.expand(out.shape[:3])
        assert (out[deaf_rows] == 0).all()
        assert (lse[deaf_rows] == -torch.inf).all()
        assert not out.isnan().any()
        (gradient,) = torch.autograd.grad(out.sum() + 0 * q.sum(), q)
        assert (gradient[deaf_rows] == 0).all()


SCORES = {
    "additive": "additive",
    "gatv2": Additive(torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4), torch.nn.functional.leaky_relu),
    "bahdanau": Additive(torch.tensor([1.0, -1, 2, 0.5], dtype=torch.float64)),
    "distance": lambda q_i, k_j: -(q_i - k_j).square().sum(-1),
    "dot": "dot",
}
NORMALIZERS = {"softmax": "softmax", "sigmoid": "sigmoid", "none": "none", "relu": torch.relu}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize(
    "graph", [Causal() & Window(3, 0), PerHead([Full(), Causal(-1), Prefix(2), Random(3)])], ids=str
)
def test_generic_scores_and_normalizers_equal_the_reference(score, normalize, graph):
    q, k, v = tensors(7, 7)
    bias, learned = biases("edges", graph, 7, 7)
    found = {}
    for backend in ("reference", "edges", "auto"):
        options = {"score": SCORES[score], "normalize": NORMALIZERS[normalize], "scale": 0.7}
        out, weights = attend(q, k, v, graph, bias=bias, backend=backend, return_weights=True, **options)
        gradients = torch.autograd.grad(
            (out * torch.linspace(1, 2, out.numel()).view_as(out)).sum(), [q, k, v, learned]
        )
        found[backend] = (out, weights, *gradients)
    for backend in ("edges", "auto"):
        for one, other in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=BACKWARD)


@every
def test_weights_come_in_edge_index_order(case):
    heads = case.graph.heads or 4
    q, k, v = tensors(case.n, case.m, heads=heads)
    out, weights = attend(q, k, v, case.graph, return_weights=True)
    key, query = case.graph.edge_index(case.n, case.m)
    v_j = v.repeat_interleave(heads // 2, dim=1)[:, :, key]
    again = torch.zeros_like(out).index_add(2, query, weights[..., None] * v_j)
    torch.testing.assert_close(again, out, rtol=0, atol=FORWARD)
    expected = attend(q, k, v, case.graph, return_weights=True, backend="reference")[1]
    torch.testing.assert_close(weights, expected, rtol=0, atol=FORWARD)


def test_the_batch_dimension_may_be_absent():
    q, k, v = tensors(5, 6, batch=1)
    whole = attend(q, k, v, Causal(), return_lse=True, return_weights=True)
    for backend in ("reference", "edges"):
        parts = attend(q[0], k[0], v[0], Causal(), return_lse=True, return_weights=True, backend=backend)
        for part, with_batch in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, with_batch[0], rtol=0, atol=FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["edges", "dense", "reference"])
def test_lower_precision_stays_close_and_keeps_its_dtype(dtype, backend):
    q, k, v = (side.detach() for side in tensors(24, 24, dim=16, value_dim=16))
    graph = Causal() & (Window(5, 0) | Prefix(2))
    expected = attend(q, k, v, graph, backend="reference")
    found = attend(*(side.to(dtype) for side in (q, k, v)), graph, backend=backend)
    assert found.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("graph", [Causal(), Full()], ids=str)
@pytest.mark.parametrize(("n", "m"), [(16, 16), (9, 16), (16, 9)])
def test_causal_and_full_never_build_a_mask(graph, n, m, monkeypatch):
    """Neither forward nor with the lse: the flash kernels know both."""
    from attngraph.planning.layouts import materialized

    def forbidden(*args):
        raise AssertionError("a layout was asked for")

    q, k, v = tensors(n, m, dim=8, value_dim=8)
    expected = results(q, k, v, graph, None, None, "reference")
    monkeypatch.setattr(materialized, "mask", forbidden)
    monkeypatch.setattr(materialized, "edges_of_heads", forbidden)
    assert_equal(results(q, k, v, graph, None, None, "dense"), expected)
    out = attend(q, q, q, graph, backend="auto")
    expected = scaled_dot_product_attention(q, q, q, is_causal=graph == Causal())
    torch.testing.assert_close(out, expected, rtol=0, atol=FORWARD)


def test_dropout_drops_that_share_and_keeps_the_mean():
    q, k, v = (torch.zeros(1, 1, 300, 4), torch.zeros(1, 1, 300, 4), torch.ones(1, 1, 300, 4))
    for backend in ("edges", "dense", "reference"):
        torch.manual_seed(0)
        out = attend(q, k, v, Full() if backend != "reference" else Window(9, 9), dropout_p=0.25, backend=backend)
        assert 0.97 < out.mean() < 1.03
        assert out.std() > 0.01
    torch.manual_seed(0)
    _, weights = attend(q, k, v, Full(), dropout_p=0.25, return_weights=True)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 300))  # before dropout


def test_lse_merges_disjoint_graphs_exactly():
    """The algebra that makes it fast: attention over two disjoint sets of edges merges by lse."""
    q, k, v = tensors(12, 12)
    whole, part = Causal(), Window(2, 0)
    outs, lses = zip(*(attend(q, k, v, g, return_lse=True) for g in (whole & part, whole - part)), strict=True)
    lse = torch.logaddexp(*lses)
    merged = sum((part_lse - lse).exp()[..., None] * out for out, part_lse in zip(outs, lses, strict=True))
    torch.testing.assert_close(merged, attend(q, k, v, whole), rtol=0, atol=FORWARD)
    torch.testing.assert_close(lse, attend(q, k, v, whole, return_lse=True)[1], rtol=0, atol=FORWARD)


def test_packed_documents_cannot_leak():
    q, k, v = tensors(9, 9, batch=1)
    packed = attend(q, k, v, Documents([4, 5]) & Causal())
    for start, stop in ((0, 4), (4, 9)):
        alone = attend(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], Causal())
        torch.testing.assert_close(packed[:, :, start:stop], alone, rtol=0, atol=FORWARD)


def test_nan_propagates_to_whoever_hears_it():
    graph = Causal() & Window(1, 0)
    for backend in ("reference", "edges", "dense", "tiles", "rows"):
        q, k, v = (side.detach().clone() for side in tensors(6, 6))
        q[0, 0, 3] = torch.nan
        out, lse = attend(q, k, v, graph, backend=backend, return_lse=True)
        assert out[0, 0, 3].isnan().all()
        assert lse[0, 0, 3].isnan()
        assert not out[0, 1].isnan().any()
        q, k, v = (side.detach().clone() for side in tensors(6, 6))
        v[1, 0, 2] = torch.nan
        out = attend(q, k, v, graph, backend=backend)
        assert out[1, 0, 2:4].isnan().all()
        if backend not in ("dense", "tiles"):  # which multiply what is not heard by 0, and 0 · nan is nan
            assert not out[1, 0, 4:].isnan().any()


def test_two_runs_give_the_same_bits():
    q, k, v = (side.float().detach().requires_grad_() for side in tensors(50, 50))
    graph = Random(5) | Causal() & Window(3, 0)
    for backend in ("edges", "dense"):
        runs = []
        for _ in range(2):
            out = attend(q, k, v, graph, backend=backend)
            runs.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v])))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
def test_torch_compile_gives_the_same_and_recompiles_once_for_all_lengths():
    import torch._dynamo as dynamo

    slopes = torch.rand(4, dtype=torch.float64)
    graphs = [Causal(), Causal() & (Window(3, 0) | Prefix(2)), PerHead([Causal(), Full(), Identity(), Random(2)])]
    for graph in graphs:
        for backend in ("dense", "edges"):
            dynamo.reset()
            dynamo.utils.counters.clear()

            def layer(q, k, v, graph=graph, backend=backend):
                return attend(q, k, v, graph, bias=Alibi(slopes), backend=backend, return_lse=True)

            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            for n in (8, 12, 16, 24):
                q, k, v = tensors(n, n)
                found, expected = compiled(q, k, v), layer(q, k, v)
                torch.testing.assert_close(found, expected, rtol=0, atol=FORWARD)
                gradients = [torch.autograd.grad(out[0].sum(), [q, k, v]) for out in (found, expected)]
                torch.testing.assert_close(*gradients, rtol=0, atol=BACKWARD)
            assert dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_the_layout_operators_keep_their_promises():
    """torch.library.opcheck: schema, fake results, and tracing with symbolic sizes."""
    graph = Causal() & Window(3, 0)
    for operator in (torch.ops.attngraph.mask, torch.ops.attngraph.edges):
        for each in (graph, PerHead([graph, Full()])):
            torch.library.opcheck(operator, (*pack(each), each.heads or 0, 8, 8, torch.device("cpu")))


def bad(q=(1, 4, 6, 8), k=(1, 2, 6, 8), v=(1, 2, 6, 8), graph=None, dtypes=("float32",) * 3, **options):
    sides = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in zip((q, k, v), dtypes, strict=True)]
    return attend(*sides, Causal() if graph is None else graph, **options)


BAD = [
    ({"graph": Documents([5])}, ValueError, "graph has 5 query nodes but q has 6"),
    ({"graph": Full().sized(6, 5)}, ValueError, "graph has 5 key nodes but k has 6"),
    ({"graph": EdgeList([[0], [0]], 7)}, ValueError, "build the graph for 6"),
    ({"graph": torch.ones(6, 6)}, TypeError, "graph must be a Graph (got Tensor); a mask becomes one by from_dense"),
    ({"graph": PerHead([Full()] * 3)}, ValueError, "graph has 3 heads but q has 4"),
    ({"k": (1, 3, 6, 8), "v": (1, 3, 6, 8)}, ValueError, "must be a multiple of the key heads (got 4 and 3)"),
    ({"k": (1, 0, 6, 8), "v": (1, 0, 6, 8)}, ValueError, "must be a multiple of the key heads (got 4 and 0)"),
    ({"k": (1, 2, 6, 4)}, ValueError, "same head dimension (got 8 and 4)"),
    ({"v": (1, 2, 5, 8)}, ValueError, "same heads and nodes"),
    ({"v": (1, 1, 6, 8)}, ValueError, "same heads and nodes"),
    ({"k": (2, 2, 6, 8)}, ValueError, "same batch size (got q 1, k 2"),
    ({"q": (6, 8)}, ValueError, "shape (B, heads, nodes, D)"),
    ({"k": (2, 6, 8)}, ValueError, "got 3 dimensions for k"),
    ({"dtypes": ("float32", "float64", "float32")}, ValueError, "one dtype and one device"),
    ({"dtypes": ("int64",) * 3}, TypeError, "floating-point"),
    (
        {"backend": "flash"},
        ValueError,
        "backend must be one of auto, reference, edges, dense, blocks, tiles, rows, steps (got 'flash')",
    ),
    ({"backend": "dense", "score": "additive"}, ValueError, "it has no score='additive'"),
    ({"backend": "dense", "normalize": "sigmoid"}, ValueError, "it has no normalize='sigmoid'"),
    ({"score": "cosine"}, ValueError, "score must be a function or one of dot, additive (got 'cosine')"),
    (
        {"normalize": 3},
        TypeError,
        "normalize must be a function or one of softmax, sigmoid, none, relu, squared_relu (got 3)",
    ),
    ({"normalize": "none", "return_lse": True}, ValueError, "return_lse needs normalize='softmax'"),
    ({"dropout_p": 1.0}, ValueError, "probability below 1 (got 1.0)"),
    ({"dropout_p": -0.1}, ValueError, "probability below 1"),
    ({"bias": torch.zeros(5, 6)}, ValueError, "must broadcast to (B, H, 6, 6) (got (5, 6))"),
    ({"bias": torch.zeros(3, 6, 6)}, ValueError, "fit 4 heads"),
    ({"bias": Alibi(torch.ones(3))}, ValueError, "fit 4 heads"),
    (
        {"bias": EdgeBias.sorted(torch.zeros(20))},
        ValueError,
        "each of the graph's 21 edges, in edge_index order (got 20)",
    ),
    ({"bias": EdgeBias.sorted(torch.zeros(20)), "backend": "reference"}, ValueError, "each of the graph's 21 edges"),
    ({"bias": EdgeBias.sorted(torch.zeros(20)), "backend": "edges"}, ValueError, "each of the graph's 21 edges"),
    ({"bias": EdgeBias.sorted(torch.zeros(5, 21)), "backend": "edges"}, ValueError, "fit 4 heads"),
    ({"bias": "alibi"}, TypeError, "bias must be a tensor or"),
    ({"bias": torch.ones(6, 6, dtype=torch.bool)}, TypeError, "a mask is a graph, from_dense(mask)"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_told(arguments, kind, message):
    with pytest.raises(kind) as error:
        bad(**arguments)
    assert message in str(error.value)


def test_a_list_is_no_tensor():
    with pytest.raises(TypeError, match="q must be a tensor"):
        attend([[0.0]], torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), Full())


def test_tensors_on_two_devices_are_told():
    q = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="one dtype and one device"):
        attend(q, q.to("meta"), q, Full())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alibi(torch.zeros(2, 2)), "slopes of shape (H,)"),
        (lambda: RelativeBias(torch.zeros(4)), "table of shape (H, buckets)"),
        (lambda: RelativeBias(torch.zeros(4, 6)), "odd number of buckets"),
        (lambda: RelativeBias(torch.zeros(4, 8), max_distance=1), "max_distance must be above"),
        (lambda: EdgeBias.sorted(torch.tensor(1.0)), "EdgeBias takes values"),
    ],
)
def test_impossible_biases_are_told(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_an_empty_graph_is_differentiable():
    q, k, v = tensors(3, 4)
    for backend in ("reference", "edges", "dense", "tiles", "rows"):
        out = attend(q, k, v, Empty(), backend=backend)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))


def test_strides_do_not_matter():
    """Found: the raw flash kernel ignores the stride of the last dimension."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 8, 12, dtype=torch.float64, generator=chance)
    for q in (x.mT[:, :, :8], x[..., ::2], x.flip(1)[:, :, :, 1:9], x[:, :1].expand(1, 2, 8, 12)):
        for graph in (Causal(), Full(), Causal() & Window(3, 0)):
            q = q.detach().requires_grad_()
            expected = results(q, q.clone(), q.clone(), graph, None, None, "reference")
            for backend in ("edges", "dense"):
                assert_equal(results(q, q.clone(), q.clone(), graph, None, None, backend), expected)


def test_a_second_derivative_is_right():
    """Found: the lse of the flash path gave a wrong one, silently."""
    q, k, v = tensors(5, 5, dim=8, value_dim=8)
    for name in ("dense", "edges"):
        assert torch.autograd.gradgradcheck(
            lambda q, name=name: attend(q, k, v, Causal(), backend=name, return_lse=True), q
        )


def test_a_row_emptied_by_its_bias_is_an_empty_row():
    q, k, v = tensors(4, 4)
    bias = torch.zeros(4, 4, dtype=torch.float64)
    bias[1] = -torch.inf
    found = [results(q, k, v, Full(), bias, None, backend) for backend in ("edges", "dense")]
    assert_equal(*found)
    assert (found[0][0][:, :, 1] == 0).all()
    assert (found[0][2][0][:, :, 1] == 0).all()
    assert (attend(q, k, v, Full(), bias=bias, backend="reference")[:, :, 1] == 0).all()


def test_a_bias_keeps_its_precision_beside_half_tensors():
    q, k, v = (side.detach() for side in tensors(200, 200, dim=16, value_dim=16))
    bias = Alibi(torch.tensor([-0.3, -0.25, 0.3, 0.1]))
    expected = attend(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), Causal(), bias=bias)
    for backend in ("edges", "dense"):
        found = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), Causal(), bias=bias, backend=backend)
        assert (found.double() - expected).abs().max() < 0.02


def test_a_graph_is_meant_and_not_its_class():
    with pytest.raises(TypeError, match=r"did you mean Causal\(\)"):
        bad(graph=Causal)


@pytest.mark.parametrize("backend", ["auto", "reference", "edges", "dense", "tiles", "rows"])
def test_autocast_means_the_same_to_every_backend(backend):
    q, k, v = torch.randn(3, 2, 4, 40, 8)
    graph = Causal() & Window(3, 0)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(q, k, v, graph, backend=backend, return_lse=True)
    half = (side.bfloat16() for side in (q, k, v))
    wanted = attend(*half, graph, backend=backend, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close((out, lse), wanted, rtol=0, atol=0)


def test_a_call_is_refused_whatever_was_accepted_before():
    """Arguments of a plain call are checked once for each kind of it: what equals them in Python is another kind."""
    q, k, v = tensors(6, 6)
    attend(q, k, v, Window(2, 0), scale=1.0, dropout_p=0.0, backend="tiles")
    for refused in ({"dropout_p": False}, {"scale": float("nan")}, {"backend": "tile"}, {"return_lse": 0}):
        options = {"scale": 1.0, "dropout_p": 0.0, "backend": "tiles"} | refused
        with pytest.raises((TypeError, ValueError), match=next(iter(refused))):
            attend(q, k, v, Window(2, 0), **options)
    with pytest.raises(ValueError, match="7 query nodes"):
        attend(q, k, v, EdgeList([[0], [0]], 7), scale=1.0, dropout_p=0.0, backend="tiles")
    with pytest.raises(ValueError, match="one dtype"):
        attend(q, k, v.half(), Window(2, 0), scale=1.0, dropout_p=0.0, backend="tiles")
