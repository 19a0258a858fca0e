"""hf.connect: any model of transformers on any graph, as its own eager attention with a mask computes it."""

import sys

import pytest
import torch

pytest.importorskip("transformers")
from families import FAMILIES, IMAGES, N, SEQUENCES, inputs, made
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from attngraph import Full, PerHead, Prefix, Window, from_edge_index
from attngraph.hf import attention_modules, connect, disconnect
from attngraph.hf.modules import is_cross


def nodes_of(name):
    """How many queries and keys each kind of module has."""
    return 17 if name in IMAGES else N


def graphs_by_module(model, name, per_head=False):
    """A graph by chance for each module of attention, in its own sizes; every query hears somebody."""
    chance, found = torch.Generator().manual_seed(3), {}
    for number, (path, module) in enumerate(attention_modules(model).items()):
        decodes = name in SEQUENCES and (".decoder" in f".{path}")
        n = N // 2 if decodes else nodes_of(name)
        m = N if is_cross(path, module) else n
        some = from_edge_index(torch.randint(min(n, m), (2, 5 * n), generator=chance), size=(m, n))
        graph = some | Window(3, 3) if n == m else some | Prefix(2).sized(n, m)
        if per_head:
            graph = PerHead([graph, Window(2 + number, 1), Window(5, 5) | Prefix(1), graph | Prefix(2)])
        found[path] = graph
    return found


def by_hand(model, graphs, mode="intersect"):
    """An independent route: the model's own eager attention, with the graphs in its masks."""
    AttentionInterface.register("by_hand", eager_with_a_mask)
    AttentionMaskInterface.register("by_hand", eager_mask)
    model.set_attn_implementation("by_hand")
    modules = attention_modules(model)
    for path, graph in graphs.items():
        modules[path].by_hand = graph, mode
    return model


def eager_with_a_mask(module, q, k, v, attention_mask, **options):
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if hasattr(module, "by_hand"):
        graph, mode = module.by_hand
        n, m = q.shape[2], k.shape[2]
        edges = (graph if None not in graph.size else graph.sized(m, m)).mask()
        edges = edges[..., edges.shape[-2] - n :, :]
        least = torch.finfo(q.dtype).min
        ours = torch.zeros(edges.shape, dtype=q.dtype).masked_fill(~edges, least).view(1, -1, n, m)
        attention_mask = ours if attention_mask is None or mode == "replace" else attention_mask + ours
        attention_mask = attention_mask.clamp(min=least)
    return eager(module, q, k, v, attention_mask, **options)


@pytest.fixture(autouse=True)
def softmax_in_double_precision(monkeypatch):
    """Their eager attention takes float32 for it, whatever comes."""
    real = nn.functional.softmax
    monkeypatch.setattr(
        nn.functional, "softmax", lambda x, dim, dtype=None: real(x, dim, dtype=max((x.dtype, dtype or x.dtype), key=lambda d: d.itemsize))
    )


def of_dtype(given, dtype):
    return {key: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in given.items()}


def logits(model, given):
    out = model(**given)
    return out.logits if hasattr(out, "logits") else out[0]


def close(found, expected, dtype=torch.float64):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1, float(expected.abs().max())))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_a_graph_a_model_is_what_it_was(name, dtype):
    given = of_dtype(inputs(name), dtype)
    model = made(name, dtype)
    expected = logits(model, given)
    assert connect(model, dict.fromkeys(attention_modules(model), Full())) is model
    close(logits(model, given), expected, dtype)
    assert disconnect(model) is model
    torch.testing.assert_close(logits(model, given), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["intersect", "replace"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_are_masks_of_eager_attention(name, per_head, mode):
    """Logits and gradients, of a graph for each module."""
    model, other, given = made(name), made(name), inputs(name)
    graphs = graphs_by_module(model, name, per_head)
    by_hand(other, graphs, mode)
    connect(model, graphs, mode=mode)
    found, expected = logits(model, given), logits(other, given)
    close(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    for one in (found, expected):
        (one * weights).sum().backward()
    for (path, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        if two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-6, msg=lambda text: f"{path}: {text}")
