"""A vector for each graph: packed, padded and alone they are the same, and those of PyG."""

import pytest
import torch
from torch_geometric.nn import global_add_pool, global_max_pool, global_mean_pool

from attngraph import Batched, Disjoint, Full
from attngraph.nn import pool

SIZES = (3, 1, 0, 4)
OF_PYG = {"mean": global_mean_pool, "sum": global_add_pool, "max": global_max_pool}


def packed():
    torch.manual_seed(0)
    return torch.randn(sum(SIZES), 5), torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))


@pytest.mark.parametrize("reduce", OF_PYG)
def test_packed_padded_and_alone_are_one_and_pygs(reduce):
    x, batch = packed()
    found = pool(x, reduce, batch=batch)
    torch.testing.assert_close(found, OF_PYG[reduce](x, batch))
    torch.testing.assert_close(pool(x[None], reduce, batch=batch), found)
    torch.testing.assert_close(pool(x, reduce, batch=Disjoint([Full().sized(n, n) for n in SIZES])), found)
    padded = torch.nn.utils.rnn.pad_sequence(x.split(SIZES), batch_first=True, padding_value=torch.nan)
    mask = torch.arange(4) < torch.tensor(SIZES)[:, None]
    torch.testing.assert_close(pool(padded, reduce, attention_mask=mask), found)
    torch.testing.assert_close(pool(padded, reduce, attention_mask=mask.long()), found)
    torch.testing.assert_close(pool(padded[3:], reduce), found[3:])
    assert (found[2] == 0).all()
    more = pool(x, reduce, batch=batch, num_graphs=6)
    torch.testing.assert_close(more, torch.cat([found, torch.zeros(2, 5)]))


@pytest.mark.parametrize("reduce", OF_PYG)
def test_its_gradient_is_that_of_finite_differences(reduce):
    x, batch = packed()
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pool(x, reduce, batch=batch), x)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    assert torch.autograd.gradcheck(lambda x: pool(x.view(2, 4, 5), reduce, attention_mask=mask), x)


def test_graphs_without_nodes_are_zero():
    for reduce in OF_PYG:
        assert pool(torch.zeros(0, 5), reduce, batch=torch.zeros(0).long()).shape == (0, 5)
        assert (pool(torch.zeros(2, 0, 5), reduce) == torch.zeros(2, 5)).all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"batch": torch.tensor([0, 1])}, ValueError, r"batch must be integers \(N,\).*got \(2,\) for x \(8, 5\)"),
        ({"batch": torch.zeros(8)}, TypeError, r"batch must be integers.*torch.float32"),
        ({"batch": torch.arange(8), "num_graphs": 3}, ValueError, "batch must be numbers from 0 to 2 .got 0 … 7."),
        ({"batch": torch.arange(8) - 1}, ValueError, "batch must be numbers from 0 to 6 .got -1 … 6."),
        ({"batch": Disjoint([Full().sized(3, 3), Full()])}, ValueError, "whose parts know their size"),
        ({"batch": Batched([Full().sized(8, 8)])}, ValueError, "of entries of a batch, Batched, give attention_mask"),
        ({"batch": torch.arange(8), "attention_mask": torch.ones(8)}, ValueError, "give one"),
        ({"num_graphs": 3}, ValueError, "give batch too"),
        ({}, ValueError, r"x must be \(B, N, D\), or packed nodes with batch .got shape \(8, 5\)"),
        ({"reduce": "min"}, ValueError, "reduce must be one of mean, sum, max .got 'min'."),
    ],
)
def test_wrong_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        pool(packed()[0], **given)


def test_half_precision_counts_and_sums_as_far_as_single():
    x = torch.full((1, 70_000, 1), 1000.0, dtype=torch.float16)
    batch = torch.zeros(70_000, dtype=torch.int64)
    for found in (pool(x), pool(x, batch=batch)):
        assert found.dtype == torch.float16
        assert found.tolist() == [[1000.0]]
