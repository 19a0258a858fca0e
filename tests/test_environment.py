"""attend works, or says why not and what to do, whatever is missing, broken, read-only or forbidden around it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
slow = pytest.mark.slow
ATTEND = """
import warnings
import torch
from attngraph import Causal, Random, Window, attend

def same(backend):
    chance = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 300, 8, generator=chance, requires_grad=True)
    graph = Causal() & Window(9, 0) | Random(2)
    for some in (graph, Causal()):
        out, right = (attend(q, q, q, some, backend=name) for name in (backend, "edges"))
        torch.testing.assert_close(out, right, atol=1e-4, rtol=1e-4)
        grads = [torch.autograd.grad(x.square().sum(), q)[0] for x in (out, right)]
        torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
    return backend
"""


def run(code, *, before="", path=(), unset=(), root=ROOT, **environment):
    """A process that attends, and what it wrote."""
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    kept |= {"PYTHONPATH": os.pathsep.join([*map(str, path), str(root)]), **environment}
    done = subprocess.run(
        [sys.executable, "-c", before + ATTEND + code], env=kept, capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def hidden(folder, package, text):
    """A folder in which a package is that raises when it is imported."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(text)
    return folder


EVERY = "\nprint(*map(same, ('auto', 'tiles', 'rows', 'dense')))"
WITHOUT_NUMBA = """
print(*map(same, ("auto", "tiles", "dense", "auto")))
try:
    same("rows")
except ValueError as error:
    print(error)
from attngraph.nn import FeedForward
FeedForward(8, 8, dropout=0.5)(torch.ones(3, 8)).sum().backward()
"""


@pytest.mark.parametrize("error", ["ImportError", pytest.param("OSError", marks=slow)])
def test_numba_that_cannot_be_imported(error, tmp_path):
    out, warned = run(WITHOUT_NUMBA, path=[hidden(tmp_path, "numba", f"raise {error}('no llvm')")])
    assert "auto tiles dense auto" in out
    assert "rows (numba): numba is installed, but can't be used" in out
    assert warned.count("RuntimeWarning: numba is installed, but can't be used") == 1
    assert f"({error}: no llvm)" in warned


@slow
def test_numba_that_may_not_compile():
    out, warned = run(WITHOUT_NUMBA, NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT is set, and kernels have to be compiled: unset it" in out
    assert warned.count("NUMBA_DISABLE_JIT is set") == 1


@slow
@pytest.mark.parametrize("package", ["numba", "scipy", "networkx"])
def test_a_package_that_is_not_there_is_no_matter(package):
    _, warned = run("print(same('auto'))", before=f"import sys; sys.modules[{package!r}] = None")
    assert warned == ""


@slow
def test_scipy_that_is_broken_is_a_note_of_the_plan(tmp_path):
    code = """
import attngraph
edges = torch.randint(3000, (2, 9000), generator=torch.Generator().manual_seed(0))
for _ in range(2):
    made = attngraph.plan(attngraph.EdgeList(edges, 3000), reorder=True, heads=2)
print(made.explain())
"""
    out, warned = run(code, path=[hidden(tmp_path, "scipy", "raise ImportError('no blas')")])
    assert "the nodes were not reordered: scipy is installed, but can't be used (ImportError: no blas)" in out
    assert warned.count("RuntimeWarning") == 1


@slow
def test_a_read_only_installation_without_a_home(tmp_path):
    """Numba finds no place for what it compiles."""
    shutil.copytree(ROOT / "attngraph", tmp_path / "attngraph", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
from numba.core.caching import _CacheLocator

def refuse(self):
    raise OSError("read-only file system")

_CacheLocator.ensure_cache_path = refuse  # root may write anywhere
"""
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/proc/nonexistent"}
    out, warned = run(code + EVERY, root=tmp_path, unset=["XDG_CACHE_HOME", "NUMBA_CACHE_DIR"], **environment)
    assert out == "auto tiles rows dense\n"
    assert warned.count("no place to keep compiled kernels") == 1
    assert "let NUMBA_CACHE_DIR name a folder that can be written" in warned


KEPT_CODE = """
import numpy as np
from attngraph.kernels.cpu.tiles_backward import start_backward

ones, zero, delta = np.ones((1, 16), np.float32), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
start_backward(1, zero, zero[:0], ones, ones, zero, delta, np.float32(1))
print(delta[0, 0], len(start_backward.launch.stats.cache_hits))
"""


@slow
def test_compiled_code_is_kept_until_a_source_that_it_is_made_of_changes(tmp_path):
    shutil.copytree(ROOT / "attngraph", tmp_path / "attngraph", ignore=shutil.ignore_patterns("__pycache__"))
    own = {"code": KEPT_CODE, "root": tmp_path, "unset": ["NUMBA_CACHE_DIR"]}
    assert run(**own)[0] == "16.0 0\n"
    kernel, imported = (tmp_path / f"attngraph/kernels/cpu/{name}.py" for name in ("tiles_backward", "simd"))
    os.utime(kernel, (0, 0))
    assert run(**own)[0] == "16.0 1\n"
    source = imported.read_text()
    assert source.count("for distance in (8, 4, 2, 1):") == 1  # of reduce_sum
    imported.write_text(source.replace("for distance in (8, 4, 2, 1):", "for distance in (8, 4, 2):"))
    assert run(**own)[0] == "8.0 0\n"
    imported.write_text(source)
    assert run(**own, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="")[0] == "16.0 0\n"
    assert run(**own)[0] == "16.0 0\n"


NO_HOME = """
import pathlib, pwd

def nobody(uid):
    raise KeyError(uid)

pwd.getpwuid = nobody
"""


@pytest.mark.slow
def test_a_user_without_a_home():
    code = NO_HOME + "from attngraph import Costs; print(Costs.here().source)" + EVERY
    out, warned = run(code, unset=["HOME", "XDG_CACHE_HOME", "ATTNGRAPH_COSTS"])
    assert out.startswith("the defaults for")
    assert out.endswith("auto tiles rows dense\n")
    assert warned == ""


@slow
def test_costs_in_a_home_that_is_not_there():
    code = NO_HOME + "\ntry:\n    same('auto')\nexcept ValueError as error:\n    print(error)"
    out, _ = run(code, unset=["HOME", "XDG_CACHE_HOME"], ATTNGRAPH_COSTS="~/costs.json")
    assert "ATTNGRAPH_COSTS must be 'default'" in out


@slow
@pytest.mark.parametrize("text", ["{", "[1]", "null", '"x"', "\0"])
def test_damaged_costs_are_told_once_and_written_anew(text, tmp_path):
    (tmp_path / "attngraph").mkdir()
    code = f"""
from attngraph.planning import costs
costs.calibration_file().write_text({text!r})
print(*map(same, ("auto", "auto")))
assert costs.keep(costs.AVX2, torch.device("cpu")) == costs.calibration_file()
assert costs.Costs.here() == costs.AVX2
"""
    _, warned = run(code, unset=["ATTNGRAPH_COSTS"], XDG_CACHE_HOME=str(tmp_path))
    assert warned.count("can't be read") == 1
    assert "attngraph.calibrate() writes new ones" in warned


@slow
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "3"},
        {"PYTHONOPTIMIZE": "2"},
        {"NUMBA_CACHE_DIR": "/proc/nowhere"},
        {"NUMBA_CACHE_DIR": __file__},
        {"XDG_CACHE_HOME": "/proc/nowhere"},
        {"TMPDIR": "/proc/nowhere"},
        {"NUMBA_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "7"},
    ],
    ids=str,
)
def test_settings_of_the_process(environment):
    out, _ = run(EVERY, **environment)
    assert out == "auto tiles rows dense\n"


@slow
def test_threads_that_come_and_go():
    code = """
from concurrent.futures import ThreadPoolExecutor
for threads in (1, 3, 2, 1):
    torch.set_num_threads(threads)
    for name in ("auto", "tiles", "rows", "dense"):
        same(name)
with ThreadPoolExecutor(4) as pool:
    print(*pool.map(same, ["auto", "rows", "tiles", "dense"] * 3))
"""
    assert run(code)[0].split() == ["auto", "rows", "tiles", "dense"] * 3


FORKED = """
import os, sys, time
torch.set_num_threads(2)
q, graph = torch.randn(1, 2, 300, 8), Causal() & Window(9, 0)
for name in ("rows", "tiles"):
    attend(q, q, q, graph, backend=name)
torch.randn(4000, 1000).softmax(-1)  # OpenMP has threads, which a fork does not copy
child = os.fork()
if not child:
    CHILD
    os._exit(0)
for _ in range(400):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(status)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize(
    "child",
    [
        "attend(q, q, q, graph, backend='rows')",
        pytest.param("attend(q, q, q, graph, backend='tiles')", marks=slow),
        pytest.param("torch.set_num_threads(1); [same(name) for name in ('auto', 'tiles', 'rows')]", marks=slow),
    ],
)
def test_a_forked_child_of_a_process_with_threads(child):
    """By a plan that is there, or with one thread: many an operation of torch itself waits for missing threads."""
    run(FORKED.replace("CHILD", child))


@slow
def test_a_spawned_child(tmp_path):
    path = tmp_path / "spawned.py"
    path.write_text(
        ATTEND
        + """
import multiprocessing

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(*pool.map(same, ["rows", "tiles", "auto"]))
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "rows tiles auto\n", done.stderr


def test_import_loads_no_kernels():
    code = "import sys; print([name for name in ('numba', 'triton', 'scipy') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import attngraph; {code}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n"
