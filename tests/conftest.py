"""Settings of every test: one thread, as workers share the cores; no GPU; how many examples are tried."""

import os
from collections import Counter

import pytest
import torch

torch.set_num_threads(1)
os.environ["ATTNGRAPH_COSTS"] = "avx512"  # plans that do not depend on the machine
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on a CPU

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # tests/gpu run without it
    pass
else:
    common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
    settings.register_profile("default", max_examples=60, derandomize=True, **common)
    settings.register_profile("thorough", max_examples=500, derandomize=True, **common)  # make test-all
    settings.register_profile("nightly", max_examples=20_000, **common)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def one_thread():
    """Each test begins with one thread, however many the one before it left."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a sweep with `share(k)`, each k-th cell runs always, and the others are slow.

    k has no factor in common with the lengths of the axes: so those that run have, if they are enough, each value.
    """
    cells = Counter()
    for item in items:
        share = item.get_closest_marker("share")
        if share is None or item.get_closest_marker("slow") or item.get_closest_marker("nightly"):
            continue
        if cells[item.path, item.originalname] % share.args[0]:
            item.add_marker(pytest.mark.slow)
        cells[item.path, item.originalname] += 1
