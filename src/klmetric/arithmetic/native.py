"""The kernel (`kernel/*.cpp`) through ctypes, which lets other threads run: the divergences of rows, and their totals.

Tensors are on the CPU, of float64, float32, bfloat16 or float16, with any strides; nothing of them is copied.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from klmetric.arithmetic.level import JOB, LIBRARY, level

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FORMATS = {"probs": 0, "log_probs": 1, "logits": 1}
DIRECTIONS = {"forward": 0, "reverse": 1, "jeffreys": 2}
# A thread takes whole groups of rows, and not fewer classes than pay for it; and whole samples, where that leaves no
# thread without any, or there are too few classes to care.
GROUP, LEAST, MANY = 16, 2**16, 2**22
# The totals before the bins.
SIZE, NO_BINS = 24, (0, 0, 0)


class Measured(NamedTuple):
    """What is known of the rows.

    Attributes:
        kl: the divergence of each in nats, shape (...); NaN where a row is no pair of distributions. On the CPU in
            float64, elsewhere in the dtype that p and q promote to, at least float32.
        agrees: whether p and q have the same most likely class, the first one of equals; None where nobody asked.
        totals: of stretches of the rows, in order, as `klmetric.totals.sketch` lays them out, shape (stretches, SIZE +
            bins); None where they did not come at once.
    """

    kl: Tensor
    agrees: Tensor | None = None
    totals: Tensor | None = None


@cache
def _function(name: str) -> Callable[[bytes, int, int], None]:
    function = ctypes.CDLL(str(LIBRARY))[f"klmetric_rows_{name}"]
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64], None
    return function


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="klmetric")  # threads do not live on in a forked process


def measure(
    p: Tensor,
    q: Tensor,
    formats: tuple[str, str] = ("probs", "probs"),
    direction: str = "forward",
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    agrees: bool = False,
    totals: bool = False,
    bins: tuple[int, int, int] | None = None,
    threads: int | None = None,
) -> Measured:
    """Measure rows of shape (N, ..., classes), a sample being what stands in one place of N.

    Args:
        p: reference.
        q: approximation, of the shape of p; its dtype and strides may differ.
        formats: "probs", "log_probs" or "logits", of p and of q.
        direction: see `klmetric.kl_divergence`.
        temperature: likewise.
        weight: of each row, for the totals; None for 1.
        agrees: whether it is wanted if p and q have the same most likely class.
        totals: whether they are wanted, if they can be had in the same pass.
        bins: of a histogram to go with the totals (fineness, lowest and highest power of two); None for none.
        threads: at most; None for as many as torch takes.
    """
    p, q = p.resolve_neg(), q.resolve_neg()
    n, classes = math.prod(p.shape[:-1]), p.shape[-1]
    positions = max(1, n // p.shape[0]) if p.ndim > 1 and n else 1
    pieces = list(_as_matrices(p, q))
    totals = totals and n > 0 and len(pieces) == 1
    share = n
    if n * classes >= 2 * LEAST:
        threads = threads or torch.get_num_threads()
        grain = GROUP
        if totals and positions > 1:
            grain = math.lcm(positions, GROUP)
            if grain * threads > n and n * classes >= MANY:
                totals, grain = False, GROUP
        share = -(-n // min(threads, n * classes // LEAST, -(-n // grain)))
        share = -(-share // grain) * grain
    shares = -(-n // share) if n and len(pieces) == 1 else 1
    out = torch.empty(n, dtype=torch.float64, device="cpu")
    same = torch.empty(n, dtype=torch.bool, device="cpu") if agrees else None
    size = 0 if bins is None else (bins[2] - bins[1]) * 3 * bins[0] + 4
    sums = torch.zeros(shares, SIZE + size, dtype=torch.float64, device="cpu") if totals else None
    weight = None if weight is None or not totals else weight.to(torch.float64).contiguous()
    pointers = [0 if x is None else x.data_ptr() for x in (out, same, weight, sums)]
    run, first, tasks = _function(level() or ""), 0, []
    for a, b, axis, rows in pieces:
        for i in range(shares):
            job = JOB.pack(
                *_side(a, axis, formats[0]),
                *_side(b, axis, formats[1]),
                *(max(1, math.prod(a.shape[axis:-1])), classes, DIRECTIONS[direction], temperature),
                *(pointers[0] + 8 * first, pointers[1] and pointers[1] + first, pointers[2], positions),
                *(pointers[3] and pointers[3] + 8 * (SIZE + size) * i, *(bins or NO_BINS)),
            )
            if shares > 1:
                tasks.append(_pool(os.getpid()).submit(run, job, i * share, min(n, (i + 1) * share)))
            else:
                run(job, 0, rows)
        first += rows
    for task in tasks:
        task.result()
    shape = p.shape[:-1]
    return Measured(out.view(shape), None if same is None else same.view(shape), sums)


def _as_matrices(p: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """The fewest pairs whose rows lie at two steps in each: those of the axes from one on, and of those before it.

    Each with that axis and the number of its rows.
    """
    one = _as_one(p, q)
    if one is not None:
        yield one
    else:
        for a, b in zip(p, q, strict=True):
            yield from _as_matrices(a, b)


def _as_one(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, int, int] | None:
    shape, n = p.shape[:-1], math.prod(p.shape[:-1])
    # The axes that can be taken as one, from the last one on, in both.
    start = max(_run(x, len(shape)) for x in (p, q))
    if all(_run(x, start) == 0 for x in (p, q)):
        return p, q, start, n
    return None


def _run(x: Tensor, end: int) -> int:
    """Where the axes begin that, up to `end`, lie in memory as one."""
    start = max(0, end - 1)
    while start > 0 and x.stride(start - 1) == x.stride(start) * x.shape[start]:
        start -= 1
    return start


def _side(x: Tensor, axis: int, input_format: str) -> tuple[int, ...]:
    """A struct Side of kernel/job.h."""
    outer = x.stride(axis - 1) if axis else 0
    inner = x.stride(-2) if x.ndim > 1 else 0
    return x.data_ptr(), outer, inner, x.stride(-1), DTYPES[x.dtype], FORMATS[input_format]
