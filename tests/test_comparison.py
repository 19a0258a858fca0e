"""`compare`: all agree, failures are told, and what would take too long is not begun."""

import pytest
import torch

from attngraph import Causal, Full, PerHead, Random, Window, compare, comparison

SMALL = {"heads": 2, "head_dim": 16, "repeats": 3}


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch):
    """FlexAttention takes half a minute to compile."""
    monkeypatch.setattr(comparison._Match, "flex", lambda self: 1 / 0)


def by_name(found):
    return {(timing.name, timing.phase): timing for timing in found.timings}


@pytest.mark.share(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("graph", [Causal() & Window(16, 0), Window(3, 3) | Random(2), Full()], ids=str)
def test_all_agree_and_have_figures(graph, dtype):
    found = by_name(compare(graph, 64, batch=2, dtype=dtype, **SMALL))
    for phase in ("forward", "forward + backward"):
        for name in ("attngraph", "SDPA with a mask", "PyG"):
            low, middle, high = found[name, phase].ms
            assert 0 < low <= middle <= high
            assert found[name, phase].over_ours > 0
        assert found["attngraph", phase].over_ours == 1.0
        assert "ZeroDivisionError" in found["FlexAttention", phase].failure
        causal = found["SDPA is_causal, all pairs", phase]
        assert (
            (causal.ms is None) == ("not all edges are causal" in causal.failure) == (graph != Causal() & Window(16, 0))
        )


def test_other_queries_than_keys_and_heads_of_their_own():
    found = by_name(compare(Window(9, 0), 20, 50, **SMALL))
    assert found["SDPA with a mask", "forward"].ms
    found = by_name(compare(PerHead([Causal(), Window(3, 0)]), 40, **SMALL))
    assert found["SDPA with a mask", "forward + backward"].ms
    assert "one edge_index" in found["PyG", "forward"].failure


def test_the_table_has_a_line_for_each():
    text = str(compare(Causal(), 32, **SMALL))
    lines = text.splitlines()
    assert lines[0] == "Causal(), 32 × 32: 528 edges (51.56%); batch 1, 2 heads of 16, float32 on cpu"
    assert len(lines) == 2 + 2 * 5
    assert lines[2].startswith("forward             attngraph ")
    assert repr(compare(Causal(), 32, **SMALL)).splitlines()[0] == lines[0]


def test_what_would_take_too_long_is_not_begun():
    found = by_name(compare(Window(4, 0), 20_000, **SMALL, limit=0.5))
    assert "expected to take" in found["SDPA with a mask", "forward"].failure
    assert found["attngraph", "forward"].ms


def test_a_wrong_result_is_no_contestant(monkeypatch):
    monkeypatch.setattr(comparison._Match, "pyg", lambda self: lambda q, k, v: 0 * (q + k + v))
    assert "wrong by" in by_name(compare(Causal(), 32, **SMALL))["PyG", "forward"].failure


@pytest.mark.slow
def test_flexattention_too(monkeypatch):
    monkeypatch.undo()
    assert by_name(compare(Causal() & Window(16, 0), 256, **SMALL))["FlexAttention", "forward"].ms


def test_each_contestant_has_what_suits_it(monkeypatch):
    """PyG has vectors that lie nodes first; and FlexAttention is compiled for more graphs than PyTorch's limit."""
    seen = {}

    def looks(name):
        def attention(q, k, v):
            seen[name] = q[0].transpose(0, 1).is_contiguous(), torch._dynamo.config.recompile_limit
            return 0 * q

        return lambda self: attention

    before = torch._dynamo.config.recompile_limit
    for name in ("pyg", "flex"):
        monkeypatch.setattr(comparison._Match, name, looks(name))
    compare(Causal(), 32, **SMALL)
    assert seen == {"pyg": (True, comparison.RECOMPILES), "flex": (False, comparison.RECOMPILES)}
    assert torch._dynamo.config.recompile_limit == before
