"""Rows in shares on several threads: those of Python, which let others run while the kernel works."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import get_native_id

import torch

# Numbers that pay for a thread, and for taking a share; and the shares for each thread.
LEAST, SHARE, SHARES = 2**16, 2**15, 4
# With more cores than these, threads that wake find one that is free, and it would take too long to tell each of them.
FEW_CORES = 8
_get_cpu = ctypes.CDLL(None).sched_getcpu if hasattr(os, "sched_setaffinity") else None


def threads_for(rows: int, classes: int, most: int | None = None) -> int:
    """How many threads so many numbers pay for; `most` of them, or as many as torch takes."""
    if rows * classes < 2 * LEAST:
        return 1
    return min(most or torch.get_num_threads(), rows * classes // LEAST)


def in_shares(run: Callable[[int, int], None], rows: int, classes: int, threads: int) -> None:
    """Call `run(start, stop)` for all the rows, on so many threads, this one among them."""
    share = max(-(-rows // (SHARES * threads)), -(-SHARE // classes))
    starts = list(range(0, rows, share))

    def take() -> None:
        with suppress(IndexError):  # each takes what is left: one that begins late finds less, or nothing
            while True:
                start = starts.pop()
                run(start, min(rows, start + share))

    pool, cores_of = _helpers(os.getpid())
    if _get_cpu is not None:
        _keep_off_this_core(cores_of, _get_cpu())
    helping = [pool.submit(take) for _ in range(min(threads, len(starts)) - 1)]
    take()
    for future in helping:
        if not future.cancel():  # it has begun
            future.result()


def _keep_off_this_core(cores_of: dict[int, set[int]], core: int) -> None:
    """Linux likes to wake a thread on the core of the one that wakes it, where it waits while another one is idle."""
    allowed = os.sched_getaffinity(0)
    elsewhere = (len(allowed) <= FEW_CORES and allowed - {core}) or allowed
    for thread, cores in list(cores_of.items()):
        if cores != elsewhere:
            with suppress(OSError):  # where a sandbox forbids it, they wait
                os.sched_setaffinity(thread, elsewhere)
            cores_of[thread] = elsewhere


@cache
def _helpers(process: int) -> tuple[ThreadPoolExecutor, dict[int, set[int]]]:
    """The threads of this process (they do not live on in a forked one), and the cores that each was sent to."""
    cores_of: dict[int, set[int]] = {}
    pool = ThreadPoolExecutor(
        thread_name_prefix="klmetric", initializer=lambda: cores_of.update({get_native_id(): set()})
    )
    return pool, cores_of
