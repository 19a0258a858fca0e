"""An irregular graph and numbers for the kernels that go edge by edge, with heavy nodes that are cut in pieces."""

import pytest
import torch

from attngraph.planning.layouts import csr


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """In a module that imports it: nodes of more than ten edges are heavy, and threads are one again after a test."""
    monkeypatch.setitem(csr.HEAVY_DEGREE, "cpu", 10)
    monkeypatch.setattr(csr, "UNIT_EDGES", 24)
    yield
    torch.set_num_threads(1)


def some_mask(n, m, seed=0):
    """Random edges, one query that hears all, one key that all hear, queries that hear nobody, keys nobody hears."""
    chance = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, m, generator=chance) < torch.rand(n, 1, generator=chance) * 0.4
    mask[n // 3], mask[:, m // 2] = True, True
    mask[n // 2 : n // 2 + 3], mask[:, m // 5 : m // 5 + 2] = False, False
    return mask


def learned(*shape, seed=1, dtype=torch.float64):
    """Random numbers that have gradients."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=chance).to(dtype).requires_grad_()
