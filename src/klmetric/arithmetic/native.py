"""The kernel (`kernel/*.cpp`) through ctypes, which lets other threads run: the divergences of rows, and their totals.

Tensors are on the CPU, of float64, float32, bfloat16 or float16, with any strides, and are read where they lie.
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
# A thread takes whole groups of rows, and not fewer numbers of classes than pay for it.
GROUP, LEAST = 16, 2**16
# Places in the totals (kernel/totals.h): the number of samples, and where the bins begin.
SEEN, BINS = 21, 24


class Measured(NamedTuple):
    """What one call makes of its rows; None for what nobody asked for.

    Attributes:
        kl: of each row in nats, float64; NaN where it is no pair of distributions.
        agrees: whether p and q have the same most likely class.
        totals: a vector for each stretch of rows, to be merged: the beginning of a sketch, and its bins.
    """

    kl: Tensor | None
    agrees: Tensor | None
    totals: Tensor | None


def measure(
    p: Tensor,
    q: Tensor,
    formats: tuple[str, str] = ("probs", "probs"),
    direction: str = "forward",
    temperature: float = 1.0,
    *,
    weight: Tensor | None = None,
    kl: bool = True,
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
        weight: of each row, float64 and contiguous; None for 1.
        kl: whether `kl` is wanted.
        agrees: whether `agrees` is wanted.
        totals: whether `totals` are wanted.
        bins: (fineness, lowest, highest) of a histogram, if it is to be counted in the totals.
        threads: at most; None for as many as torch takes.
    """
    p, q = p.resolve_neg(), q.resolve_neg()
    shape, classes = p.shape[:-1], p.shape[-1]
    n = shape.numel()
    positions = n // shape[0] if n and len(shape) > 1 else 1
    pieces = [(p, q, 0, n)]
    if not (p.is_contiguous() and q.is_contiguous()):
        pieces = list(_pieces(p, q))
        if len(pieces) > 1 and (totals or weight is not None):
            p, q = p.contiguous(), q.contiguous()
            pieces = [(p, q, 0, n)]
    share = n
    if n * classes >= 2 * LEAST and len(pieces) == 1:
        share = _share(n, classes, positions, threads or torch.get_num_threads())
    starts = range(0, n, share) if n else range(1)
    fineness, lowest, highest = bins or (0, 0, 0)
    size = BINS + (bool(bins) and (highest - lowest) * 3 * fineness + 4)
    out = torch.empty(n, dtype=torch.float64, device="cpu") if kl else None
    same = torch.empty(n, dtype=torch.bool, device="cpu") if agrees else None
    sums = torch.empty(len(starts), size, dtype=torch.float64, device="cpu") if totals else None
    kl_at, agrees_at, weight_at, totals_at = (0 if x is None else x.data_ptr() for x in (out, same, weight, sums))
    run = _function(level() or "")
    tasks = []
    for a, b, axis, rows in pieces:
        for start in starts:
            job = JOB.pack(
                *(a.data_ptr(), *_steps(a, axis), DTYPES[a.dtype], FORMATS[formats[0]]),
                *(b.data_ptr(), *_steps(b, axis), DTYPES[b.dtype], FORMATS[formats[1]]),
                *(max(1, math.prod(a.shape[axis:-1])), classes, DIRECTIONS[direction], temperature),
                *(kl_at, agrees_at, weight_at, positions, totals_at, fineness, lowest, highest),
            )
            if len(starts) > 1:
                tasks.append(_pool(os.getpid()).submit(run, job, start, min(n, start + share)))
            else:
                run(job, 0, rows)
            totals_at += 8 * size if totals else 0
        kl_at, agrees_at = kl_at + 8 * rows if kl else 0, agrees_at + rows if agrees else 0
    for task in tasks:
        task.result()
    if sums is not None and not n:
        sums[0, SEEN] = shape[0] if shape else 1
    if len(shape) != 1:
        out, same = (None if x is None else x.view(shape) for x in (out, same))
    return Measured(out, same, sums)


@cache
def _function(name: str) -> Callable[[bytes, int, int], None]:
    function = ctypes.CDLL(str(LIBRARY))[f"klmetric_rows_{name}"]
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64], None
    return function


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="klmetric")  # threads do not live on in a forked process


def _share(n: int, classes: int, positions: int, threads: int) -> int:
    """How many rows a thread takes: whole samples, and whole groups of rows."""
    grain = math.lcm(positions, GROUP) if positions > 1 else GROUP
    share = -(-n // min(threads, n * classes // LEAST, -(-n // grain)))
    return -(-share // grain) * grain


def _pieces(p: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """The fewest pairs whose rows lie at two steps in each: those of the axes from one on, and of those before it.

    Each with that axis and the number of its rows.
    """
    # The axes that can be taken as one, from the last one on, in both.
    axis = max(_run(x, x.ndim - 1) for x in (p, q))
    if all(_run(x, axis) == 0 for x in (p, q)):
        yield p, q, axis, p.shape[:-1].numel()
    else:
        for a, b in zip(p, q, strict=True):
            yield from _pieces(a, b)


def _run(x: Tensor, end: int) -> int:
    """Where the axes begin that, up to `end`, lie in memory as one."""
    start = max(0, end - 1)
    while start > 0 and x.stride(start - 1) == x.stride(start) * x.shape[start]:
        start -= 1
    return start


def _steps(x: Tensor, axis: int) -> tuple[int, int, int]:
    """From the rows of the axes before `axis` to the next ones, from row to row from there on, and between classes."""
    if axis == 0 and x.is_contiguous():  # the steps of axes of size 1 say nothing
        return 0, x.shape[-1], 1
    return x.stride(axis - 1) if axis else 0, x.stride(-2) if x.ndim > 1 else 0, x.stride(-1)
