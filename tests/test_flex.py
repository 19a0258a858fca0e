"""A graph as a BlockMask gives FlexAttention the same edges."""

import pytest
import torch
from graphs import GRAPHS
from torch.nn.attention.flex_attention import flex_attention

from attngraph import Causal, EdgeList, Empty, PerHead, Prefix, Random, Window, attend, to_block_mask

every = pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{str(case.graph)[:60]}-{case.n}x{case.m}")


@every
def test_the_block_mask_has_the_edges_of_the_graph(case):
    if not case.n or not case.m:
        return
    block = to_block_mask(case.graph, case.n, case.m, block_size=32)
    heads = range(case.graph.heads or 1)
    q, k = torch.arange(case.n)[:, None], torch.arange(case.m)[None]
    found = torch.stack([block.mask_mod(torch.tensor(0), torch.tensor(h), q, k) for h in heads])
    assert torch.equal(found, case.mask.view(len(heads), case.n, case.m))


LARGER = [
    (Causal() & (Window(100, 0) | Prefix(4)), 300),
    (PerHead([Causal(), Window(40, 40)]), 256),
    (Random(5), 200),
    (Empty(), 128),
    (EdgeList(torch.randint(0, 400, (2, 2000), generator=torch.Generator().manual_seed(0)), 400), 400),
]


@pytest.mark.parametrize(("graph", "n"), LARGER, ids=lambda value: str(value)[:40])
def test_flex_attention_computes_the_same(graph, n):
    q, k, v = torch.randn(3, 2, 2, n, 16, generator=torch.Generator().manual_seed(0))
    out = flex_attention(q, k, v, block_mask=to_block_mask(graph, n, n))
    torch.testing.assert_close(out, attend(q, k, v, graph), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_flex_attention_compiles_with_it():
    graph = Causal() & (Window(100, 0) | Prefix(4)) | Random(3)
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    with torch.no_grad():
        out = torch.compile(flex_attention)(q, k, v, block_mask=to_block_mask(graph, 512, 512))
    torch.testing.assert_close(out, attend(q, k, v, graph), rtol=0, atol=2e-6)


def test_the_lists_are_those_of_create_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    ours = to_block_mask(Window(200, 0), 1024, 1024)
    theirs = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k <= 200), None, None, 1024, 1024, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_block_mask_of_many_nodes_needs_no_pairs():
    block = to_block_mask(Window(256, 0), 200_000, 200_000)
    assert block.kv_indices.numel() < 10 * 200_000 // 128


def test_a_block_size_that_words_do_not_fill_is_an_error():
    with pytest.raises(ValueError, match="multiple of 32"):
        to_block_mask(Causal(), 64, 64, block_size=48)
