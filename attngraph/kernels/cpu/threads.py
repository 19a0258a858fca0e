"""Work shared by threads: units that are pulled one by one, so that nobody waits for whoever has the longest.

The threads are PyTorch's own where they can be had. They wait for their next work by spinning for some milliseconds,
and other threads beside them would share the cores with that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from threading import Thread

import torch

Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def share(jobs: int, work: Callable[[int], None]) -> None:
    """work(0) … work(jobs - 1), each once, by as many threads as torch may use; after an error no job is begun."""
    tickets, errors = count(), []

    def pull(_=None):
        try:
            while not errors and (job := next(tickets)) < jobs:
                work(job)
        except BaseException as error:
            errors.append(error)

    threads = torch.get_num_threads() if jobs > 1 else 1
    if threads == 1:
        pull()
    elif (parallel := _openmp()) is not None:
        parallel(Body(pull), None, threads, 0)
    else:
        helpers = [Thread(target=pull) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        pull()
        for helper in helpers:
            helper.join()
    if errors:
        raise errors[0]


@lru_cache
def _openmp() -> Callable | None:
    """GOMP_parallel(body, data, threads, flags) of the OpenMP runtime that torch runs on: body(data) in each thread."""
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # is looked for in the libraries it depends on, too
    except (OSError, AttributeError):  # another platform, another runtime
        return None
    parallel.argtypes, parallel.restype = (Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel
