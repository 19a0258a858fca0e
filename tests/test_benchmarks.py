"""The benchmark report: what it claims follows from the records, and every failure is shown."""

import re
import sys
from argparse import Namespace
from importlib import import_module
from math import inf
from pathlib import Path

import particles
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import __main__ as bench
from benchmarks import attention, density, dynamic, examples, experiment, goals, measure, overhead, report, steps
from benchmarks.experiment import Goal, Records
from benchmarks.peers import AUTO, FLEX, PYG, SDPA_MASK, Task, workload_of

BENCHMARKS = Path(bench.__file__).parent


def options(out: Path, **more) -> Namespace:
    known = {
        "graph": None,
        "device": "cpu",
        "gemm": 64,
        "peer": None,
        "limit": 30.0,
        "memory": 8.0,
        "repeats": 3,
        "until": inf,
    }
    return Namespace(**{**known, "out": out, **more})


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A folder with what a short run leaves: two sizes of one graph, each in a process of its own."""
    out = tmp_path_factory.mktemp("bench")
    few = options(out, workload=["window + sinks"], n=[32, 64], peer=[AUTO, "ours, rows", SDPA_MASK, PYG])
    attention.EXPERIMENT.execute(few)
    return out


@pytest.mark.slow
def test_a_run_records_every_contestant_of_each_phase(records):
    phases = attention.by_workload(Records(records))["window + sinks"]
    assert list(phases) == list(attention.PHASES)
    for sizes in phases.values():
        assert [figures["n"] for figures in sizes] == [32, 64]
        for figures in sizes:
            assert figures["edges"] == 32 * 33 // 2 if figures["n"] == 32 else 64 * 65 // 2
            for own in figures["contestants"].values():
                low, middle, high = own["ms"]
                assert 0 < low <= middle <= high
                assert own["turns"] == 3


@pytest.mark.slow
def test_the_report_is_one_page_with_its_pictures_inside(records):
    page = report.write(records).read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 1  # crossover; few cases are a table
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
    assert attention.worth(sizes_of(2.0, 4.0)) == "100 or less"
    assert attention.worth(sizes_of(0.5, 2.0)) == "200"  # in the middle, by logarithms
    assert attention.worth(sizes_of(2.0, 0.5, 2.0)) == "800"  # for good
    assert attention.worth(sizes_of(0.2, 0.5)) == "not up to 400"
    assert attention.worth([{"n": 100, "contestants": {AUTO: {"ms": [1, 1, 1]}, SDPA_MASK: {"failure": "x"}}}]) == (
        "not measured"
    )
    assert attention.largest(sizes_of(0.5, 2.0)) == "2.0 (2.0 … 2.0) at N = 400"


def test_a_failure_stands_in_the_report(tmp_path):
    figures = sizes_of(2.0)[0] | {"phase": "forward", "graph": "Causal()", "edges": 5050, "dim": 64, "heads": 8}
    figures |= {"dtype": "float32"}
    figures["contestants"][FLEX] = {"failure": "NotImplementedError: no backward | on CPU"}
    for own in figures["contestants"].values():
        own |= {"extra_mib": 1.0, "prepare_s": 0.1, "turns": 3}
    measure.record("attention", {"window, N = 100, forward": figures}, tmp_path)
    page = report.text(tmp_path, lambda name, content: name)
    assert "NotImplementedError: no backward \\| on CPU" in page


def test_a_graph_of_ones_own_is_a_workload(tmp_path):
    """By its text alone, as processes pass it on; with commas, a size of its own, and on the page."""
    text = "Causal() & Neighborhood([4, 4], 1)"
    name = attention.own_graph(text)
    workload = workload_of(name)
    assert str(workload.graph(16)) == text
    assert workload.sizes == (16,)
    assert workload.causal
    asked = bench.report_settings(["--graph", text, "--nodes", "16", "--quick", "--out", str(tmp_path)])
    assert (asked.graph, asked.n, asked.section) == ([name], [16], ["crossover"])
    for peer in asked.peer:
        assert peer not in (FLEX, "PyG compiled")
    figures = sizes_of(2.0)[0] | {"phase": "forward", "graph": text, "edges": 50, "dim": 64, "heads": 8}
    for own in figures["contestants"].values():
        own |= {"extra_mib": 1.0, "prepare_s": 0.1, "turns": 3}
    measure.record("attention", {f"{name}, N = 16, forward": figures | {"dtype": "float32"}}, tmp_path)
    page = report.text(tmp_path, lambda name, content: name)
    assert f"### {name}" in page
    assert "not measured;" not in page  # of the other graphs, none was asked for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Causl()", "not part of a graph expression: 'Causl()'"),
        ("PerHead([Causal(), Full()])", "one graph for all heads is required"),
        ("Full().sized(3, 4)", "as many queries as keys are required"),
    ],
)
def test_a_graph_that_cannot_be_measured_is_told(text, message, capsys):
    with pytest.raises(SystemExit):
        bench.report_settings(["--graph", text])
    assert message in capsys.readouterr().err


def test_a_graph_of_a_size_is_measured_at_that_size(tmp_path):
    """Whatever --nodes says of others."""
    (found,) = {
        figures["n"]
        for each in attention.run(
            options(tmp_path, graph=[attention.own_graph("Documents([3, 4])")], n=[64], peer=[AUTO])
        )
        for figures in each.values()
    }
    assert found == 7


def test_what_would_take_too_long_is_not_tried():
    history = attention.History()
    history.seconds["PyG", "forward"] = 1000, 0.5
    assert history.expect("PyG", "forward", 1500, limit=1.0) is None
    assert history.expect("PyG", "forward", 4000, limit=1.0) == "not tried: at N = 1,000 a call took 0.5 s"
    assert history.expect("PyG", "forward + backward", 1000, limit=1.0)  # which takes longer still
    assert history.expect("other", "forward", 4000, limit=1.0) is None


def test_a_wrong_result_is_no_contestant(monkeypatch):
    """A peer that computes something else fails, and tells by how much."""
    causal = workload_of("causal")
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

    causal, history = workload_of("causal"), attention.History()
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
        bench.main(wrong.split())
    assert "error" in capsys.readouterr().err


def test_a_report_of_nothing_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "must hold records" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="must be a folder to write to"):
        bench.main(["--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == ""


def test_every_experiment_is_listed_and_has_a_command():
    modules = {path.stem for path in BENCHMARKS.glob("*.py") if "EXPERIMENT = " in path.read_text(encoding="utf-8")}
    assert set(bench.EXPERIMENTS) == modules
    for name in modules:
        each = import_module(f"benchmarks.{name}").EXPERIMENT
        assert each.name == name
        if each.device == "cpu" or torch.cuda.is_available():
            assert each.settings([]).out == measure.RESULTS


def test_only_one_module_measures():
    """Clocks, memory and processes are in measure.py alone."""
    words = r"perf_counter|monotonic|\btime\.time\b|import time\b|\bresource\b|VmHWM|multiprocessing|\bEvent\("
    measures = re.compile(words)
    for path in BENCHMARKS.glob("*.py"):
        found = measures.search(path.read_text(encoding="utf-8"))
        assert (path.name == "measure.py") == bool(found), (path.name, found)


def test_in_turn_two_go_first_equally_often():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.in_turn(runs, 20)
    assert [len(each) for each in times.values()] == [20, 20]
    assert calls[::2].count("a") == 10


def test_what_has_used_up_its_seconds_drops_out_after_its_third_turn():
    times = measure.in_turn({"a": lambda: None}, 20, seconds=0.0)
    assert len(times["a"]) == 3


def test_a_section_is_recorded_anew_as_a_whole_and_its_failure_is_a_goal(tmp_path):
    """What was recorded of a section before is gone, other sections stay."""

    def first(options):
        yield Goal("of the first", 1.0, 2.0)

    def second(options):
        yield Goal("of the second", 1.0, 2.0, at_most=True, note="of three")
        raise ValueError("no more")

    few, both = options(tmp_path, section=None), {"a": first, "b": second}
    experiment.goals_experiment("some", "Some.", both).execute(few)
    found = Records(tmp_path)["some"]
    assert {key: goal["yes"] for key, goal in found.items()} == {
        "of the first": True, "of the second": False, "b: measured to its end": False}  # fmt: skip
    assert found["b: measured to its end"]["reached"] == "ValueError: no more"
    experiment.goals_experiment("some", "Some.", {"b": first}).execute(few)
    assert set(Records(tmp_path)["some"]) == {"of the first"}
    assert experiment.text_of(found["of the second"]) == "of the second (of three)"


def test_two_records_are_compared_in_one_table(tmp_path, capsys):
    for folder, reached in (("before", 2.0), ("after", 3.0)):
        found = {goal.text: goal.figures("a") for goal in (Goal("speed", 1.0, reached), Goal(folder, 1.0, "failed"))}
        measure.record("goals", found, tmp_path / folder)
    goals.EXPERIMENT.main(["--compare", str(tmp_path / "before" / "goals.json"), "--out", str(tmp_path / "after")])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| goals | before | after | ratio |"
    assert rows[2:] == ["| speed | 2 | 3 | 1.500 |", "| before | failed |  |  |", "| after |  | failed |  |", ""]


def test_overhead_is_recorded_for_each_size(tmp_path):
    overhead.EXPERIMENT.main(["--repeats", "1", "--n", "64", "128", "--out", str(tmp_path)])
    found = Records(tmp_path)["overhead"]
    assert {(each["graph"], each["n"], each["phase"]) for each in found.values()} == {
        (graph, n, phase) for graph in ("Causal()", "Full()") for n in (64, 128) for phase in attention.PHASES
    }
    assert found["Causal(), N = 64, forward"]["pairs"] == 16
    assert "| `Causal()`, N = 64 | " in "\n".join(overhead.render(Records(tmp_path), lambda name, content: name))


def test_each_contestant_of_the_particles_is_trained_as_the_example_is(monkeypatch):
    monkeypatch.setattr(particles, "TESTED", 16)
    for graph in dynamic.PARTICLES.values():
        found = dynamic.trained(lambda *_: None, "particles", graph, 0, "--steps", "2")
        assert 50 < found["score"] < 300  # of hardly a training
        assert found["seconds"] > 0


@pytest.mark.slow
def test_the_exact_example_is_a_goal(tmp_path):
    examples.EXPERIMENT.main(["--section", "exact", "--out", str(tmp_path)])
    goals = Records(tmp_path)["examples"].values()
    assert len(goals) == 3
    assert all(goal["yes"] for goal in goals)
    assert set(Records(tmp_path)["lecture"]) == {"custom", "mlp_is_attention"}  # so that their figures are in the table
