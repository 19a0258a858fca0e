"""No backend is believed: edge values of every argument of `attend`, on every backend, against the reference.

Each case sets one or two arguments to values at which kernels break (a scale of 0, equal scores, a bias of -inf, no
nodes, memory laid out in another way) and the others to plain ones. `make nightly` runs 20,000 of them.
"""

import pytest
import torch
from graphs import GRAPHS
from hypothesis import event, given, strategies
from test_attend import DISTANCES, biases, refuses_distances

from attngraph import Causal, Documents, EdgeBias, Full, Identity, Prefix, Random, Window, attend

BACKENDS = ("auto", "edges", "dense", "tiles", "rows")
LARGE = [
    (Causal(), 65, 65), (Full(), 64, 130), (Causal() & Window(9, 0), 130, 130), (Prefix(1), 80, 3), (Full(), 1, 200),
    (Causal() & Documents([70, 60]), 130, 130), (Causal() & (Window(4, 0) | Random(3)), 100, 100), (Identity(), 9, 129),
]  # fmt: skip
SIZED = [*((case.graph, case.n, case.m) for case in GRAPHS), *LARGE]
SIZES = [(2, 4, 2, 8, 5), (1, 2, 2, 16, 16), (0, 2, 1, 4, 4), (1, 4, 1, 0, 3), (2, 2, 1, 3, 0)]  # B, …, Dv
OF_BIAS = ("plain", "-inf", "all -inf", "far apart", "NaN where no edge is", "+inf where no edge is")
SCALES = (0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-9, 1.0, -1.0, 30.0, -30.0)
TOLERANCE = {torch.float64: (1e-11, 1e-9), torch.float32: (2e-5, 4e-4), torch.bfloat16: (2e-2, 6e-2)}


def plain(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CONTENTS = {
    "plain": lambda x: x,
    "zeros": torch.zeros_like,
    "all alike": lambda x: torch.ones_like(x),
    "small integers": lambda x: x.round(),  # scores that are equal
    "one large": lambda x: x.index_fill(2, torch.tensor([0] if x.shape[2] else []).long(), 30.0),
    "tiny": lambda x: x * 1e-40,  # below the normal numbers of float32
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "nodes first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dimension strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "heads strided": lambda x: x.repeat_interleave(3, dim=1)[:, ::3],
    "batch expanded": lambda x: x[:1].expand_as(x),
    "nodes expanded": lambda x: x[:, :, :1].expand_as(x),
    "offset": lambda x: torch.cat([x, x], dim=2)[:, :, x.shape[2] :],
    "transposed": lambda x: x.mT.contiguous().mT,
}
MASKS = {
    "none": lambda batch, m: None,
    "all real": lambda batch, m: torch.ones(batch, m, dtype=torch.bool),
    "all padding": lambda batch, m: torch.zeros(batch, m, dtype=torch.bool),
    "one real": lambda batch, m: torch.arange(m).expand(batch, m) == m - 1,
    "left": lambda batch, m: torch.arange(m) >= torch.arange(batch)[:, None],
    "strided": lambda batch, m: (torch.arange(m * 2).expand(batch, m * 2) % 3 > 0)[:, ::2],
}


def with_edge_values(bias, which, graph, n, m):
    """A bias whose values are extreme where `which` says; the numbers that no edge reads may be anything."""
    if which == "plain" or bias is None:
        return bias
    values = (bias if isinstance(bias, torch.Tensor) else getattr(bias, next(iter(vars(bias))))).detach().clone()
    match which:
        case "-inf":
            values[..., ::2] = -torch.inf
        case "all -inf":
            values.fill_(-torch.inf)
        case "far apart":
            values *= 50
        case "NaN where no edge is" | "+inf where no edge is":
            if not isinstance(bias, torch.Tensor) or values.shape[-2:] != (n, m):
                return bias
            mask = graph.mask(n, m)
            values = values.masked_fill(~mask, torch.nan if which.startswith("NaN") else torch.inf)
    return values if isinstance(bias, torch.Tensor) else EdgeBias.sorted(values) if isinstance(bias, EdgeBias) else bias


@given(
    case=strategies.sampled_from(SIZED),
    backend=strategies.sampled_from(BACKENDS),
    dtype=strategies.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    sizes=strategies.sampled_from(SIZES),
    kind=strategies.sampled_from(["none", "none", "alibi", "clipped", "buckets", "edges", "dense", "dense-keys"]),
    of_bias=strategies.sampled_from(OF_BIAS),
    scale=strategies.sampled_from([None, *SCALES]),
    contents=strategies.tuples(*[strategies.sampled_from(sorted(CONTENTS))] * 3),
    layouts=strategies.tuples(*[strategies.sampled_from(sorted(LAYOUTS))] * 3),
    padding=strategies.sampled_from(sorted(MASKS)),
    seed=strategies.integers(0, 3),
)
def test_edge_values_of_every_argument(
    case, backend, dtype, sizes, kind, of_bias, scale, contents, layouts, padding, seed
):
    graph, n, m = case
    batch, heads, kv_heads, dim, value_dim = sizes
    if graph.heads:
        heads, kv_heads = graph.heads, 1
    if kind in DISTANCES and refuses_distances(graph, n, m):
        kind = "none"
    if dtype == torch.bfloat16:  # its results are rounded before their gradients are taken of them
        contents = tuple("plain" if content == "one large" else content for content in contents)
    shapes = (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, value_dim)
    given = zip(shapes, contents, layouts, (0, 7, 14), strict=True)
    q, k, v = (
        LAYOUTS[lay](CONTENTS[fill](plain(*shape, seed=seed + more)).to(dtype)) for shape, fill, lay, more in given
    )
    bias = with_edge_values(biases(kind, graph, n, m, heads, batch)[0], of_bias, graph, n, m)
    mask = MASKS[padding](batch, m)
    event(backend)
    right = results(q.double(), k.double(), v.double(), graph, bias, mask, scale, "reference")
    found = results(q, k, v, graph, bias, mask, scale, backend)
    forward, backward = (each + 8 * rounding(q, k, scale) for each in TOLERANCE[dtype])
    for at, (one, other) in enumerate(zip(found, right, strict=True)):
        size = max(1.0, float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 1.0)
        torch.testing.assert_close(one.double() / size, other / size, rtol=0, atol=forward if at < 2 else backward)


def rounding(q, k, scale):
    """By how much a score, or a lse, of the largest size is rounded, and so by what factor a weight."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    products = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    largest = float(products.abs().max()) if products.numel() else 0.0
    return torch.finfo(dtype).eps * largest * (abs(scale) if scale is not None else max(q.shape[3], 1) ** -0.5)


def results(q, k, v, graph, bias, mask, scale, backend):
    """out, lse and the gradients of q, k and v."""
    sides = [side.detach().requires_grad_() for side in (q, k, v)]
    out, lse = attend(*sides, graph, bias=bias, attention_mask=mask, scale=scale, backend=backend, return_lse=True)
    loss = (out * plain(*out.shape, seed=11)).sum() + (lse.masked_fill(lse == -torch.inf, 0) * 0.3).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss + 0 * sum(side.sum() for side in sides), sides)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [2.0**20, 2.0**60, -(2.0**60)])
@pytest.mark.parametrize("graph", [Causal(), Causal() & Window(70, 0)], ids=str)
def test_a_huge_scale_takes_the_largest_score(graph, scale, backend):
    """Of scores that float32 has exactly: forward, the mean of the values that have it, whatever is rounded."""
    chance = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (1, 2, 130, 16), generator=chance).float() for _ in range(2))
    v = torch.randn(1, 2, 130, 16, generator=chance)
    right = attend(q.double(), k.double(), v.double(), graph, scale=scale, backend="reference")
    sides = [side.requires_grad_() for side in (q, k, v)]
    out = attend(*sides, graph, scale=scale, backend=backend)
    torch.testing.assert_close(out.double(), right, rtol=0, atol=2e-6)
    assert all(side.isfinite().all() for side in torch.autograd.grad(out.sum(), sides))


@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan, 1e39])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be finite"):
        attend(*torch.randn(3, 1, 2, 5, 4), Causal(), scale=scale)
    with pytest.raises(TypeError, match="scale must be a number"):
        attend(*torch.randn(3, 1, 2, 5, 4), Causal(), scale="1")


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("kind", ["edges", "dense", "dense-keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bias_that_is_no_number_reaches_who_hears_it_and_no_further(dtype, kind, value):
    n, graph = 70, Causal() & Window(5, 0)
    q, k, v = (plain(1, 4, n, 8, seed=seed).to(dtype) for seed in range(3))
    query, key = graph.edge_index(n, n).flip(0)
    shape, place = {
        "edges": ((1, 1, len(query)), ((query == 10) & (key == 8)).nonzero()[0]),
        "dense": ((1, 1, n, n), (10, 8)),
        "dense-keys": ((1, 1, 1, n), (0, 8)),
    }[kind]
    values = torch.zeros(shape, dtype=dtype)
    values[0, 0, *place] = value
    bias = EdgeBias.sorted(values) if kind == "edges" else values
    heard = torch.arange(n) == 10 if kind != "dense-keys" else (torch.arange(n) >= 8) & (torch.arange(n) < 14)
    for backend in ("reference", *BACKENDS):
        out, lse = attend(q, k, v, graph, bias=bias, backend=backend, return_lse=True)
        assert torch.equal(out.isnan().any(-1), heard.expand(1, 4, n)), backend
        assert torch.equal(~lse.isfinite(), heard.expand(1, 4, n)), backend
