"""The kernel (`kernel/*.cpp`) through ctypes, which lets other threads run: the divergences of rows, and their totals.

Tensors are on the CPU, of float64, float32, bfloat16 or float16, with any strides; nothing of them is copied.
"""

import ctypes
import math
import os
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / f"kernel.{ {'win32': 'dll', 'darwin': 'dylib'}.get(sys.platform, 'so') }"
LEVELS = ("baseline", "avx2", "avx512")  # of x86-64; there is one of aarch64
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FORMATS = {"probs": 0, "log_probs": 1, "logits": 1}
DIRECTIONS = {"forward": 0, "reverse": 1, "jeffreys": 2}
# A struct Job of kernel/job.h: p, q, the rows and what is asked for.
SIDE = "Pqqqqq"
JOB = struct.Struct(f"{SIDE}{SIDE}qqqdPPPqPPqqq")
# A thread takes whole groups of rows, and not fewer classes than pay for it.
GROUP, LEAST = 16, 2**16

# Where a sum stands in the totals, its low part LOW places on; then the counts, and the largest divergence.
SUMS = ("kl", "weight", "samples", "squares", "products", "sizes")
COUNTS = ("rows", "invalid", "infinite", "clusters", "agreed", "compared")
LOW, MAX = len(SUMS), 2 * len(SUMS) + len(COUNTS)


class Measured(NamedTuple):
    """What one call makes of its rows; None for what nobody asked for."""

    kl: Tensor | None
    agrees: Tensor | None
    totals: list[float] | None
    bins: Tensor | None


@cache
def level() -> str | None:
    """The level that serves: the best of this processor, or the one in KLMETRIC_KERNEL; None if there is no kernel."""
    asked = os.environ.get("KLMETRIC_KERNEL", "")
    if asked == "plain" or not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    best = library.klmetric_level(ctypes.c_int64(JOB.size))
    if best < 0:
        raise ImportError(f"{LIBRARY} is of another version of klmetric: install klmetric again.")
    if not hasattr(library, "klmetric_rows_avx2"):
        return "neon"
    if asked and (asked not in LEVELS or LEVELS.index(asked) > best):
        can = ", ".join(("plain", *LEVELS[: best + 1]))
        raise ValueError(f"KLMETRIC_KERNEL must be a level that this processor can run: {can}. Got {asked!r}.")
    return asked or LEVELS[best]


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
        kl: whether the divergence of each row is wanted, in nats, float64, NaN where it is no pair of distributions.
        agrees: whether it is wanted if p and q have the same most likely class.
        totals: whether the totals are wanted, in the order of `SUMS` (high parts, low parts), `COUNTS` and `MAX`.
        bins: (bits, lowest, highest): count divergences in 2^bits bins of each power of two between these.
        threads: at most; None for as many as torch takes.
    """
    n, classes = math.prod(p.shape[:-1]), p.shape[-1]
    samples = p.shape[0] if p.ndim > 1 else 1
    positions = max(1, n // max(1, samples))
    out = torch.empty(n, dtype=torch.float64) if kl else None
    same = torch.empty(n, dtype=torch.bool) if agrees else None
    share = n
    if n * classes >= 2 * LEAST:
        threads = threads or torch.get_num_threads()
        grain = math.lcm(positions, GROUP) if positions > 1 else GROUP
        share = -(-n // min(threads, n * classes // LEAST, -(-n // grain)))
        share = -(-share // grain) * grain
    shares = max(1, -(-n // max(1, share)))
    wants = totals or bins is not None
    sums = torch.zeros(shares, MAX + 1, dtype=torch.float64) if wants else None
    counts = torch.zeros(shares, ((bins[2] - bins[1]) << bins[0]) + 4, dtype=torch.int64) if bins else None
    pointers = [x.data_ptr() if x is not None else 0 for x in (out, same, weight)]
    pieces = list(_as_matrices(p, q))
    if len(pieces) > 1 and (wants or weight is not None):
        pieces = list(_as_matrices(p.contiguous(), q.contiguous()))
    run, first, tasks = _function(level() or ""), 0, []
    for a, b, axis, rows in pieces:
        for i in range(shares if len(pieces) == 1 else 1):
            job = JOB.pack(
                *_side(a, axis, formats[0]),
                *_side(b, axis, formats[1]),
                *(max(1, math.prod(a.shape[axis:-1])), classes, DIRECTIONS[direction], temperature),
                *(pointer and pointer + first * size for pointer, size in zip(pointers, (8, 1, 8), strict=True)),
                *(positions, sums[i].data_ptr() if sums is not None else 0),
                *((counts[i].data_ptr(), *bins) if counts is not None and bins else (0, 0, 0, 0)),
            )
            if len(pieces) == 1 and shares > 1:
                tasks.append(_pool(os.getpid()).submit(run, job, i * share, min(n, (i + 1) * share)))
            else:
                run(job, 0, rows)
        first += rows
    for task in tasks:
        task.result()
    of_all = None
    if sums is not None:
        of_all = sums[0].tolist() if shares == 1 else _merged(sums.tolist())
    shape = p.shape[:-1]
    return Measured(
        out.view(shape) if out is not None else None,
        same.view(shape) if same is not None else None,
        of_all,
        None if counts is None else counts[0] if shares == 1 else counts.sum(0),
    )


def _merged(parts: list[list[float]]) -> list[float]:
    columns = list(zip(*parts, strict=True))
    highs, lows = [], []
    for high, low in zip(columns[:LOW], columns[LOW : 2 * LOW], strict=True):
        total = math.fsum(high + low) if all(map(math.isfinite, high)) else math.inf
        highs.append(total)
        lows.append(math.fsum([*high, *low, -total]) if math.isfinite(total) else 0.0)
    return [*highs, *lows, *map(sum, columns[2 * LOW : MAX]), max(columns[MAX])]


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
