"""Rows shared out to threads that do not wait for one another.

torch shares every single operation out to its threads, and they all wait for the last of them before the next one. With
some thirty operations on a block that fits the cache, that costs little on an idle machine; where another program holds
a core for a while, it takes many times as long as the work. So each thread gets rows of its own, and works on them by
itself.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

# More would wait for Python, which one thread at a time can run.
MOST = 8


def available() -> int:
    """How many threads to share out to: those of torch, where each can be told to work by itself."""
    return min(torch.get_num_threads(), MOST) if _is_openmp() else 1


@lru_cache(1)
def _is_openmp() -> bool:
    return "backend: OpenMP" in torch.__config__.parallel_info()


def share(work: Callable[[slice], None], rows: int, threads: int) -> None:
    """Call `work` with slices of so many rows, each in a thread of its own, without gradients."""

    def alone(part: slice) -> None:
        # What is switched on for this thread is not so for others.
        with torch.inference_mode(is_inference), torch.no_grad():
            work(part)

    is_inference = torch.is_inference_mode_enabled()
    of_all = torch.get_num_threads()
    ends = [rows * k // threads for k in range(threads + 1)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(alone, map(slice, ends, ends[1:])))
    finally:
        # Setting it in a thread tells those that start later, too.
        torch.set_num_threads(of_all)
