"""Work shared by threads: units that are pulled one by one, so that nobody waits for whoever has the longest."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count

import torch


def share(jobs: int, work: Callable[[int], None]) -> None:
    """work(0) … work(jobs - 1), each once, by as many threads as torch may use: the calling one, and helpers."""
    tickets = count()

    def pull():
        while (job := next(tickets)) < jobs:
            work(job)

    helpers = min(torch.get_num_threads(), jobs // 2) - 1
    futures = [_pool(os.getpid()).submit(pull) for _ in range(helpers)]
    try:
        pull()
    finally:
        running = [future for future in futures if not future.cancel()]  # who has not begun comes too late
        errors = [error for future in running if (error := future.exception())]
    if errors:
        raise errors[0]


@lru_cache(1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Helpers of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="attngraph")
