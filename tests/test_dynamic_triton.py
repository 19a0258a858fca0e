"""What queries and keys choose runs by the Triton kernels of ordinary graphs: in Triton's interpreter, on a CPU."""

import pytest
import torch

from attngraph import BlockTopK, Causal, TopK, Window, attend
from attngraph.graph.dynamic import IN_TORCH, Folded
from attngraph.kernels.contract import Modifiers
from attngraph.planning.layouts.csr import CSR
from attngraph.planning.layouts.tiles import Tiles, tabulate

pytest.importorskip("triton", reason="Triton is not installed: it runs on Linux")
from attngraph.kernels.triton import rows, tiles

CASES = [
    (BlockTopK(64, 2, 64), tiles),
    (BlockTopK(128, 2, 128), tiles),
    (BlockTopK(64, 2, 16, causal=False), tiles),
    (TopK(5), rows),
    (TopK(5) & Causal(), rows),
    ((TopK(3) & Causal()) | Window(2, 0), rows),
    (BlockTopK(8, 2), rows),
]


@pytest.mark.parametrize(("graph", "kernel"), CASES, ids=lambda each: str(each) if not hasattr(each, "forward") else "")
def test_triton_runs_what_was_chosen(graph, kernel):
    chance = torch.Generator().manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 2, 150, 16, generator=chance)
    folded = Folded.of(graph, q, k, None, IN_TORCH)
    n, m = (2 * count for count in (folded.num_queries, folded.num_keys))
    made = tabulate(folded.graph, n, m, (128, 64)) if kernel is tiles else None
    layout = CSR.from_graph(folded.graph, n, m) if made is None else Tiles(n, m, made)
    sides, modifiers = (folded.queries(q), folded.keys(k), folded.keys(v)), Modifiers(0.25, None, folded.mask(None, k))
    out, lse = kernel.forward(*sides, layout, modifiers)
    dq, dk, dv, _ = kernel.backward(*sides, out, lse, folded.queries(dout), None, layout, modifiers, False)
    found = folded.of_queries(out, 150), folded.of_queries(dq, 150), *(folded.sum_of_keys(x, k) for x in (dk, dv))

    exact = [side.double().requires_grad_() for side in (q, k, v)]
    expected = attend(*exact, graph.resolve(q, k), backend="reference")
    expected = expected, *torch.autograd.grad(expected, exact, dout.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=1e-4)
