"""A graph lives as long as somebody needs it; what is kept is never stale, is bounded, and stands in one module."""

import ast
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from test_attend import tensors
from test_own_graphs import Ring
from torch.testing import assert_close

import attngraph
from attngraph import Causal, Costs, EdgeList, Graph, PerHead, Prefix, Random, Window, attend, cache, from_function
from attngraph.planning import calibrate, costs

ROOT = Path(__file__).parent.parent
NAMES = ("dense", "edges", "tiles", "rows", "auto")


def edge_list(n, edges, seed):
    return EdgeList(torch.randint(0, n, (2, edges), generator=torch.Generator().manual_seed(seed)), n)


@pytest.mark.share(3)
@pytest.mark.parametrize("name", NAMES[::-1])
def test_a_hundred_graphs_made_on_the_fly_and_one_backward(name):
    """As in learning on graphs: another graph for each example, the losses added, then one backward pass."""
    x = torch.randn(1, 1, 60, 8, requires_grad=True, dtype=torch.float64)
    total, expected = 0, torch.zeros_like(x)
    for seed in range(100):
        total = total + attend(x, x, x, edge_list(60, 150, seed), backend=name).sum()
        own = attend(x, x, x, edge_list(60, 150, seed), backend="edges").sum()
        expected += torch.autograd.grad(own, x)[0]
    gc.collect()
    total.backward()
    assert_close(x.grad, expected)


def local_class(shift):
    class Local(Graph):
        def contains(self, q_idx, kv_idx):
            return kv_idx <= q_idx - shift

    return Local()


@pytest.mark.share(3)
@pytest.mark.parametrize("name", NAMES)
def test_a_class_of_the_same_name_at_the_same_address_is_another_graph(name):
    for _ in range(6):
        q, k, v = tensors(30, 30, heads=1, kv_heads=1, batch=1)
        graph = local_class(0)
        key, out = graph._key, attend(q, k, v, graph, backend=name)
        expected = torch.autograd.grad(attend(q, k, v, Causal(), backend="edges").sum(), v)[0]
        del graph
        cache.clear()
        gc.collect()
        others = [local_class(5) for _ in range(20)]
        assert all(other._key != key for other in others)
        for other in others[:2]:
            found = attend(q, k, v, other, backend=name)
            assert_close(found, attend(q, k, v, Causal(-5), backend="edges"))
        assert_close(torch.autograd.grad(out.sum(), v)[0], expected)


DOCUMENT = torch.zeros(20, dtype=torch.int64)


class Packing:
    def __init__(self):
        self.document, self.width = torch.zeros(20, dtype=torch.int64), 3

    def same(self, i, j):
        return (self.document[i] == self.document[j]) & ((i - j).abs() <= self.width)

    def __call__(self, i, j):
        return self.same(i, j)


def closure():
    document = torch.zeros(20, dtype=torch.int64)
    return (lambda i, j: document[i] == document[j]), document


def function_and_state(kind):
    """A predicate of one of the kinds that people write, and the tensor that it reads."""
    owner = Packing()
    return {
        "class": lambda: ((lambda i, j: Settings.document[i] == Settings.document[j]), Settings.document),
        "class method": lambda: (Settings.same, Settings.document),
        "slots": lambda: ((slots := Slots()), slots.document[0]),
        "attribute of the function": lambda: (by_attribute, by_attribute.document),
        "closure": closure,
        "global": lambda: ((lambda i, j: DOCUMENT[i] == DOCUMENT[j]), DOCUMENT),
        "default": lambda: ((lambda i, j, d=owner.document: d[i] == d[j]), owner.document),
        "partial": lambda: (partial(lambda d, i, j: d[i] == d[j], owner.document), owner.document),
        "bound method": lambda: (owner.same, owner.document),
        "callable object": lambda: (owner, owner.document),
        "nested": lambda: ((lambda f: lambda i, j: f(i, j))(owner.same), owner.document),
    }[kind]()


class Settings:
    """Read by a function through the class, not through an object."""

    document = torch.zeros(20, dtype=torch.int64)

    @classmethod
    def same(cls, i, j):
        return cls.document[i] == cls.document[j]


class Slots:
    __slots__ = ("document",)

    def __init__(self):
        self.document = deque([torch.zeros(20, dtype=torch.int64)])

    def __call__(self, i, j):
        return self.compare(i, j)

    def compare(self, i, j):
        return self.document[0][i] == self.document[0][j]


def by_attribute(i, j):
    return by_attribute.document[i] == by_attribute.document[j]


by_attribute.document = torch.zeros(20, dtype=torch.int64)

KINDS = ["class", "class method", "slots", "attribute of the function", "closure", "global", "default", "partial"]
KINDS += ["bound method", "callable object", "nested"]


@pytest.mark.share(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True], ids=["the same graph", "a graph of the same function"])
@pytest.mark.parametrize(
    "inside", [lambda g: g, lambda g: Causal() & g | Window(1, 0)], ids=["alone", "in an expression"]
)
def test_a_function_whose_variables_change_has_other_edges(kind, again, inside):
    function, document = function_and_state(kind)
    document.zero_()
    q, k, v = (side.detach() for side in tensors(20, 20))
    graph = inside(from_function(function))
    for step in range(3):
        document.copy_(torch.arange(20) // (5 + 3 * step))
        graph = inside(from_function(function)) if again else graph
        expected = attend(q, k, v, graph, backend="reference")
        for name in NAMES:
            assert_close(attend(q, k, v, graph, backend=name), expected, rtol=0, atol=1e-10)


def test_an_object_whose_numbers_change_has_other_edges():
    owner = Packing()
    graph, (q, k, v) = from_function(owner.same), (side.detach() for side in tensors(20, 20))
    for width in (3, 1, 8):
        owner.width = width
        for name in NAMES:
            found = attend(q, k, v, graph, backend=name)
            assert_close(found, attend(q, k, v, Window(width, width), backend="reference"), rtol=0, atol=1e-10)


def test_the_backward_pass_has_the_edges_of_its_forward_pass():
    """Whatever the function says by then."""
    for name in NAMES:
        function, document = closure()
        q, k, v = tensors(20, 20)
        graph = from_function(function)
        document.copy_(torch.arange(20) // 5)
        expected = torch.autograd.grad(attend(q, k, v, graph, backend="reference").square().sum(), (q, k, v))
        out = attend(q, k, v, graph, backend=name)
        document.zero_()
        attend(q, k, v, graph, backend=name)
        assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), expected, rtol=0, atol=1e-10)


GRAPHS = [edge_list(30, 90, 0), edge_list(30, 90, 1) & Causal(), Window(3, 0) | Random(2), Ring(5) | Prefix(1)]


def test_graphs_unpickled_in_another_process_are_the_same(tmp_path):
    q, k, v = (side.detach() for side in tensors(30, 30))
    outs = [attend(q, k, v, graph, backend="rows") for graph in GRAPHS]
    torch.save((q, k, v, outs), tmp_path / "tensors.pt")
    (tmp_path / "graphs.pkl").write_bytes(pickle.dumps(GRAPHS))
    code = (
        "import pickle, sys, torch\n"
        "from attngraph import EdgeList, Graph, attend\n"
        "q, k, v, outs = torch.load('tensors.pt')\n"
        "kept = [EdgeList(torch.randint(0, 30, (2, 90)), 30) for _ in range(9)]\n"
        "for graph, out in zip(pickle.load(open('graphs.pkl', 'rb')), outs):\n"
        "    for name in ('rows', 'tiles', 'edges', 'dense'):\n"
        "        torch.testing.assert_close(attend(q, k, v, graph, backend=name), out)\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


class OnTheFly(torch.utils.data.Dataset):
    """Each item is a graph, and what attention on it gives in the process of the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        graph, x = edge_list(40, 100, index), torch.ones(1, 1, 40, 4) * torch.arange(40.0)[:, None] / 40
        return graph, attend(x, x, x, graph, backend=("rows", "tiles", "edges")[index % 3])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_attend_and_send_graphs(context):
    data = OnTheFly()
    data[0], data[1]  # caches of the parent are in use
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120
    )
    for index, (graph, out) in enumerate(loader):
        assert graph == edge_list(40, 100, index)
        assert_close(out, data[index][1])


def test_threads_that_race_for_the_first_plan_get_the_same():
    for turn in range(5):
        cache.clear()
        graph, (q, k, v), outs = edge_list(200, 900, turn), (side.detach() for side in tensors(200, 200)), {}
        barrier = threading.Barrier(6)

        def work(number, graph=graph, outs=outs, barrier=barrier, sides=(q, k, v)):
            barrier.wait()
            outs[number] = attend(*sides, graph, backend="rows")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outs) == 6
        assert all(torch.equal(out, outs[0]) for out in outs.values())
        assert cache.cache_info()["plans"].entries == 1


@pytest.mark.parametrize("name", ["dense", "rows", "auto"])
def test_the_graph_of_a_compiled_program_stays_until_its_backward_pass(name):
    q, k, v = tensors(30, 30, heads=1, kv_heads=1)

    def run():
        graph = edge_list(30, 120, 3)
        compiled = torch.compile(
            lambda q, k, v: attend(q, k, v, graph, backend=name), backend="aot_eager", fullgraph=True
        )
        return compiled(q, k, v)

    torch._dynamo.reset()
    out = run()
    torch._dynamo.reset()
    gc.collect()
    others = [edge_list(30, 120, seed) for seed in range(4, 40)]
    for other in others:
        attend(q, k, v, other)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    right = torch.autograd.grad(attend(q, k, v, edge_list(30, 120, 3), backend="edges").square().sum(), (q, k, v))
    assert_close(found, right)


# ------------------------------------------------------------------------------------------------------ the caches


def test_a_thousand_graphs_leave_the_caches_bounded():
    cache.clear()
    x = torch.randn(1, 1, 20, 4)
    for seed in range(1000):
        attend(x, x, x, edge_list(20, 40, seed), backend="edges" if seed % 2 else "auto")
    for name, info in cache.cache_info().items():
        assert info.entries <= info.max_entries, name


def test_clear_lets_graphs_go():
    graph = edge_list(40, 200, 0)
    x = torch.randn(1, 1, 40, 4)
    for name in NAMES:
        attend(x, x, x, graph, backend=name)
    gone = weakref.ref(graph)
    del graph
    cache.clear()
    gc.collect()
    assert gone() is None
    assert all(info.entries == 0 for info in cache.cache_info().values())


def test_no_other_module_keeps_anything():
    """Module-level caches stand in cache.py; what a kernel is compiled to is no cache of results."""
    for path in (ROOT / "attngraph").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ("WeakValueDictionary", "WeakKeyDictionary", "WeakIdKeyDictionary", "OrderedDict"):
            assert word not in text or path.name == "cache.py", (path, word)
        if "kernels" not in path.parts:
            assert "lru_cache" not in text, path
            assert not re.search(r"functools import (.*\W)?cache\b", text), path
        for node in ast.parse(text).body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            empty = (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)
            assert not empty or path.name == "cache.py", f"{path}: a module-level {ast.unparse(node)}"


# ------------------------------------------------------------------------------------------------------ the costs


def test_import_and_the_first_call_measure_nothing_and_write_nothing(tmp_path):
    code = (
        "import torch, time\n"
        "from attngraph import *\n"
        "from attngraph.planning import calibrate\n"
        "calibrate.measured = calibrate._seconds = None\n"
        "q = torch.randn(1, 2, 300, 8)\n"
        "attend(q, q, q, Window(9, 0) | Random(3)); attend(q, q, q, Causal()); print(Costs.here().source)\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("ATTNGRAPH_COSTS", "XDG_CACHE_HOME")
    }
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the defaults for")
    assert list(tmp_path.rglob("*")) == []


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ATTNGRAPH_COSTS", "")
    cache.COSTS.clear()
    yield tmp_path
    cache.COSTS.clear()


@pytest.mark.slow
def test_calibrate_measures_keeps_and_says_where(own_cache, monkeypatch, capsys):
    assert Costs.here().source.startswith("the defaults for")
    found = attngraph.calibrate()
    assert capsys.readouterr().out == f"kept in {own_cache / 'attngraph' / costs.FILE}\n"
    assert found.source.startswith("this machine, calibrated on")
    zero_in_the_tables = ("gather_s_per_edge",)
    assert all(value > 0 for name, value in vars(found).items() if name not in ("source", *zero_in_the_tables))
    cache.clear()
    monkeypatch.setattr(calibrate, "measured", lambda device: pytest.fail("measured again"))
    assert Costs.here() == found
    monkeypatch.setenv("ATTNGRAPH_COSTS", "default")
    assert Costs.here().source.startswith("the defaults for")


def test_costs_that_noise_hides_are_those_of_the_table(own_cache, monkeypatch):
    monkeypatch.setattr(calibrate, "_seconds", lambda *runs: [1e-3] * len(runs))  # a busy machine: large is as small
    table, found = Costs.here(), calibrate.measured(torch.device("cpu"))
    assert found.tile_s_per_result_dim == table.tile_s_per_result_dim > 0
    assert found.row_s_per_edge_dim == table.row_s_per_edge_dim > 0
    assert found.row_s_per_call == 1e-3


def test_costs_come_from_a_table_or_a_file_or_an_error_says_why(own_cache, monkeypatch):
    for name, table in costs.DEFAULTS.items():
        monkeypatch.setenv("ATTNGRAPH_COSTS", name)
        assert Costs.here() == table
    path = own_cache / "own.json"
    path.write_text('{"tile_s_per_pair_dim": 1.0}')
    monkeypatch.setenv("ATTNGRAPH_COSTS", str(path))
    assert Costs.here().tile_s_per_pair_dim == 1.0
    for text in ("[1]", '{"fast": 1}', "{", '{"flash_s_per_pair_dim": -1}'):
        path.write_text(text)
        cache.COSTS.clear()
        with pytest.raises(ValueError, match=r"must be 'default', one of 'avx512', .* flash_s_per_pair_dim"):
            Costs.here()


def test_without_a_place_to_keep_it_calibration_says_so(own_cache, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "measured", lambda device: Costs(source="measured"))
    (own_cache / "attngraph").write_text("a file where the folder would be")
    assert attngraph.calibrate().source == "measured"
    assert "no place to keep it" in capsys.readouterr().out
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert attngraph.calibrate().source == "measured"
    assert Costs.here().source.startswith("the defaults for")


def test_calibration_notices_that_the_machine_is_busy(own_cache, monkeypatch):
    monkeypatch.setattr(calibrate, "measured", lambda device: Costs(source="measured"))
    monkeypatch.setattr(calibrate.psutil, "cpu_percent", lambda interval: 90.0)
    with pytest.warns(UserWarning, match=r"cores of this machine busy.*again when it is idle"):
        attngraph.calibrate()


def test_more_threads_share_the_work_but_not_the_calls():
    two, four = (costs.default_costs("avx2", threads) for threads in (2, 4))
    assert four.tile_s_per_pair_dim == two.tile_s_per_pair_dim / 2
    assert four.tile_s_per_call == two.tile_s_per_call


# ---------------------------------------------------------------------------- made once, in whatever call came first

GRAPHS_THAT_ARE_KEPT = [
    Causal() & Window(3, 0),
    PerHead([Causal(), Window(2, 0)]),
    EdgeList(torch.tensor([[0, 1], [3, 4]]), 40),
]
FIRST_CALLS = {
    "inference mode": lambda f, x: torch.inference_mode()(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(x[None].expand(3, *x.shape)),
    "jacrev": lambda f, x: torch.func.jacrev(lambda s: f(x * s).sum())(torch.tensor(1.0)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("graph", GRAPHS_THAT_ARE_KEPT, ids=["window", "heads", "list"])
@pytest.mark.parametrize("backend", ["auto", "dense", "tiles", "rows", "edges"])
def test_what_is_kept_knows_nothing_of_the_mode_it_was_made_in(graph, backend):
    """Found: after a first call in inference mode, or under a transform, nothing could be trained or compiled."""

    def run(x):
        return attend(x, x, x, graph, backend=backend)

    def trained():
        x = torch.ones(1, 2, 40, 8).cumsum(-2).sin().requires_grad_()
        return torch.autograd.grad(run(x).square().sum(), x)

    cache.clear()
    right = trained()
    for first in FIRST_CALLS.values():
        cache.clear()
        with suppress(ValueError, NotImplementedError):  # a transform that a backend refuses
            first(run, torch.randn(1, 2, 40, 8))
        assert_close(trained(), right)
    if backend == "auto":
        torch.compiler.reset()
        torch.compile(run, backend="aot_eager", fullgraph=True)(torch.randn(1, 2, 40, 8))


def test_keeping_a_value_asks_no_other_key_for_its_hash():
    """A key may hold the state of a large function: 64 plans of such graphs made each new plan take minutes."""
    asked = []

    class Key:
        def __init__(self, number):
            self.number = number

        def __eq__(self, other):
            return self.number == other.number

        def __hash__(self):
            asked.append(self.number)
            return hash(self.number)

    kept = cache.Cache(max_entries=8, max_bytes=1 << 20)
    for number in range(8):
        kept.keep(Key(number), torch.zeros(4))
    asked.clear()
    kept.keep(Key(8), torch.zeros(4))
    assert set(asked) <= {0, 8}  # the one that has to go, and the new one
    assert kept.get(Key(0)) is None
    kept.get(Key(1))
    kept.keep(Key(9), torch.zeros(4))
    assert (kept.get(Key(1)) is None, kept.get(Key(2)) is None) == (False, True)  # the one used last stays
