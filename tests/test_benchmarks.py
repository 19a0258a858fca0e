"""The benchmark report: what it claims follows from the records, and every failure is shown."""

import re
import sys
from argparse import Namespace
from math import inf
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import __main__ as bench
from benchmarks import attention, density, measure, report, steps
from benchmarks.peers import AUTO, FLEX, PYG, SDPA_MASK, Task


def options(out: Path, **more) -> Namespace:
    known = {"device": "cpu", "phase": "both", "peer": None, "limit": 30.0, "memory": 8.0, "repeats": 3, "until": inf}
    return Namespace(**{**known, "out": out, **more})


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A folder with what a short run leaves: two sizes of one graph, each in a process of its own."""
    out = tmp_path_factory.mktemp("bench")
    few = options(out, workload=["window + sinks"], n=[32, 64], peer=[AUTO, "ours, rows", SDPA_MASK, PYG], quick=False)
    attention.run(few)
    return out


def test_a_run_records_every_contestant_of_each_phase(records):
    phases = report.Records(records).workloads["window + sinks"]
    assert list(phases) == list(attention.PHASES)
    for sizes in phases.values():
        assert [figures["n"] for figures in sizes] == [32, 64]
        for figures in sizes:
            assert figures["edges"] == 32 * 33 // 2 if figures["n"] == 32 else 64 * 65 // 2
            for own in figures["contestants"].values():
                low, middle, high = own["ms"]
                assert 0 < low <= middle <= high
                assert own["turns"] == 3


def test_the_report_is_one_page_with_its_pictures_inside(records):
    page = report.write(records).read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2  # crossover, regret
    assert not re.search(r'(src|href)="(?!data:)', page)
    markdown = (records / "report.md").read_text()
    assert "FlexAttention" not in markdown.split("## How")[0]
    assert "flash-attn (flash-attn is not installed)" in markdown or "runs on a GPU only" in markdown
    assert f"torch {torch.__version__}" in markdown


def sizes_of(*ratios: float) -> list[dict]:
    """Records in which sparse is so many times as fast as dense, at 100, 400, 1600 … nodes."""
    return [
        {
            "n": 100 * 4**at,
            "contestants": {
                AUTO: {"ms": [1, 1, 1], "over_ours": [1, 1, 1]},
                SDPA_MASK: {"ms": [ratio] * 3, "over_ours": [ratio] * 3},
            },
        }
        for at, ratio in enumerate(ratios)
    ]


def test_sparse_is_worth_it_from_where_it_is_faster_on():
    assert report.worth(sizes_of(2.0, 4.0)) == "100 or less"
    assert report.worth(sizes_of(0.5, 2.0)) == "200"  # in the middle, by logarithms
    assert report.worth(sizes_of(2.0, 0.5, 2.0)) == "800"  # for good
    assert report.worth(sizes_of(0.2, 0.5)) == "not up to 400"
    assert report.worth([{"n": 100, "contestants": {AUTO: {"ms": [1, 1, 1]}, SDPA_MASK: {"failure": "x"}}}]) == (
        "not measured"
    )
    assert report.largest(sizes_of(0.5, 2.0)) == "2.0 (2.0 … 2.0) at N = 400"


def test_a_failure_stands_in_the_report(tmp_path):
    figures = sizes_of(2.0)[0] | {"phase": "forward", "graph": "Causal()", "edges": 5050, "dim": 64, "heads": 8}
    figures |= {"dtype": "float32"}
    figures["contestants"][FLEX] = {"failure": "NotImplementedError: no backward | on CPU"}
    for own in figures["contestants"].values():
        own |= {"extra_mib": 1.0, "prepare_s": 0.1, "turns": 3}
    measure.record("attention", {"window, N = 100, forward": figures}, tmp_path)
    page = report.text(tmp_path, lambda name, content: name)
    assert "NotImplementedError: no backward \\| on CPU" in page


def test_what_would_take_too_long_is_not_tried():
    history = attention.History()
    history.seconds["PyG", "forward"] = 1000, 0.5
    assert history.expect("PyG", "forward", 1500, limit=1.0) is None
    assert history.expect("PyG", "forward", 4000, limit=1.0) == "not tried: at N = 1,000 a call took 0.5 s"
    assert history.expect("PyG", "forward + backward", 1000, limit=1.0)  # which takes longer still
    assert history.expect("other", "forward", 4000, limit=1.0) is None


def test_a_wrong_result_is_no_contestant(monkeypatch):
    """A peer that computes something else fails, and tells by how much."""
    causal = attention.workload_of("causal")
    peers = [peer for peer in attention.PEERS if peer.name in (SDPA_MASK, PYG)]
    peers[1] = peers[1]._replace(build=lambda task: lambda q, k, v: v + 1)
    match = attention.Match(Task(causal, 32), peers, options(Path()), attention.History())
    found = match.figures(lambda peer, phase: None)["forward"]["contestants"]
    assert "ms" in found[SDPA_MASK]
    assert found[PYG]["failure"].startswith("wrong by ")


def test_an_error_fails_a_contestant_here_and_at_larger_sizes():
    def broken(q, k, v):
        if q.requires_grad:
            raise NotImplementedError("no backward")
        return torch.zeros_like(q)

    causal, history = attention.workload_of("causal"), attention.History()
    peer = next(peer for peer in attention.PEERS if peer.name == SDPA_MASK)._replace(build=lambda task: broken)
    for n in (16, 32):
        found = attention.Match(Task(causal, n), [peer], options(Path()), history).figures(lambda peer, phase: None)
        assert "ms" in found["forward"]["contestants"][SDPA_MASK]
        failure = found["forward + backward"]["contestants"][SDPA_MASK]["failure"]
        assert failure == ("" if n == 16 else "not tried: at N = 16 ") + "NotImplementedError: no backward"


def test_a_killed_contestant_is_left_out_and_the_others_go_on(monkeypatch, tmp_path):
    """Over the limit of memory: the process dies; the next one leaves the contestant out."""
    monkeypatch.setattr(attention, "isolated", dies_once(attention.isolated))
    few = options(tmp_path, peer=[AUTO, SDPA_MASK])
    (size,) = dict(attention.measured("causal", [32], few)).values()
    assert size["forward"]["contestants"][SDPA_MASK]["failure"] == "not tried: at N = 32 over 8 GiB"
    assert "ms" in size["forward"]["contestants"][AUTO]


def dies_once(isolated):
    calls = []

    def run(function, workload, sizes, names, history, options, **limits):
        calls.append(1)
        if len(calls) == 1:
            return {"sizes": {}, "history": history, "now": (32, SDPA_MASK, "prepare"), "failure": "over 8 GiB"}
        return isolated(function, workload, sizes, names, history, options, **limits)

    return run


def test_densities_are_what_they_say():
    for density_of in (density.band, density.scattered):
        for share in (0.01, 0.1, 1.0):
            edges = density_of(512, share).num_edges(512, 512)
            assert abs(edges / 512**2 / share - 1) < 0.15


@pytest.mark.parametrize("kind", ["GPT", "ViT"])
def test_the_sparse_models_of_a_step_compute_the_same(kind):
    runs = steps.contestants(kind, 64, "cpu")
    losses = {name: run() for name, run in runs.items()}
    assert losses[steps.CONTESTANTS[1]] == pytest.approx(losses[steps.CONTESTANTS[2]], abs=1e-5)


@pytest.mark.parametrize("wrong", ["--minutes 0", "--n 3", "--section nothing", "--workload nothing", "--device tpu"])
def test_settings_that_make_no_sense_are_errors(wrong, capsys):
    with pytest.raises(SystemExit):
        bench.settings(wrong.split())
    assert "error" in capsys.readouterr().err


def test_a_report_of_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main()
    assert "must hold records" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="must be a folder to write to"):
        bench.main(["--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == ""
