"""Compiled jobs run once each, in all threads that there are, and an error in any of them is one of the call."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
from attngraph.kernels.cpu import openmp
from attngraph.kernels.cpu.launch import in_threads


@in_threads()
def note(job, done, factor):
    done[job] += factor * job


@in_threads()
def fail_at(job, bad):
    if job == bad:
        raise MemoryError


@pytest.fixture(params=["torch's threads", "Python's", "one"], autouse=True)
def threads(request, monkeypatch):
    torch.set_num_threads(1 if request.param == "one" else 3)
    if request.param == "Python's":
        monkeypatch.setattr(openmp, "_gomp_parallel", lambda: None)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("jobs", [0, 1, 2, 1000])
def test_each_job_runs_once(jobs):
    done = np.zeros(jobs)
    note(jobs, done, 2.0)
    assert np.array_equal(done, 2 * np.arange(jobs))


def test_an_error_in_a_job_reaches_the_caller():
    fail_at(100, 100)
    for bad in (0, 57, 99):
        with pytest.raises(MemoryError):
            fail_at(100, bad)
    fail_at(100, 100)


def test_callers_do_not_disturb_each_other():
    all_done = np.zeros((6, 300))
    callers = [threading.Thread(target=note, args=(300, done, 1.0)) for done in all_done]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert np.array_equal(all_done, np.tile(np.arange(300.0), (6, 1)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_runs_them_too():
    done = np.zeros(50)
    note(50, done, 1.0)
    if (child := os.fork()) == 0:
        note(50, done, 1.0)
        os._exit(0 if np.array_equal(done, 2 * np.arange(50)) else 1)
    assert os.waitpid(child, 0)[1] == 0


PROGRAM = """
import sys, torch
from attngraph import Random, attend
for dim in map(int, sys.argv[1:]):
    torch.manual_seed(0)
    sides = [torch.randn(1, 2, 130, dim, requires_grad=True) for _ in range(3)]
    found = attend(*sides, Random(8), backend="rows")
    expected = attend(*(side.double() for side in sides), Random(8), backend="reference")
    assert (found - expected).abs().max() < 1e-5, dim
    for one, other in zip(*(torch.autograd.grad(out.sum(), sides) for out in (found, expected))):
        assert (one - other).abs().max() < 1e-5, dim
"""


@pytest.mark.slow
def test_kept_kernels_of_other_dimensions_are_not_taken_for_one_another(tmp_path):
    for dims in (["20"], ["8"], ["8", "20"], ["20", "8"]):  # each process numbers its functions anew
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *dims], env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_arguments_of_one_kind_are_looked_at_once():
    whole, half = np.zeros(10), np.zeros(10, np.float32)
    for _ in range(2):
        note(10, whole, 1.0, kind="float64")
        note(10, half, 1.0, kind="float32")
    assert np.array_equal(whole, 2 * np.arange(10.0))
    assert np.array_equal(half, 2 * np.arange(10, dtype=np.float32))
