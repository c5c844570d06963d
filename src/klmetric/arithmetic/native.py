"""The kernel (`kernel/*.cpp`) through ctypes, which lets other threads run: the divergences of rows, and their totals.

Tensors are on the CPU, of float64, float32, bfloat16 or float16, with any strides; nothing of them is copied.
"""

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from klmetric.arithmetic.level import JOB, LIBRARY, level
from klmetric.arithmetic.threads import in_shares, threads_for
from klmetric.options import DIRECTIONS

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Of the most likely classes, and a place among the numbers, as kernel/statistics.h has them.
TOP, JENSEN_SHANNON = (1, 5, 10), 2
# Totals to be made of rows, as klmetric.totals lays them out: their number, how many of the worst rows are among them,
# and of the bins the fineness and the powers of two where they begin and end, or zeros.
Totals: TypeAlias = tuple[int, int, int, int, int]
NO_TOTALS: Totals = (0, 0, 0, 0, 0)


class Measured(NamedTuple):
    """What is known of rows.

    Attributes:
        kl: the divergence of each in nats, shape (...); NaN where a row is no pair of distributions. By a kernel, and
            on the CPU, in float64, elsewhere in the dtype that p and q promote to, at least float32.
        agrees: whether p and q have the same most likely class, the first one of equals; None where nobody asked.
        totals: of all of them; None where they did not come at once.
    """

    kl: Tensor
    agrees: Tensor | None = None
    totals: Tensor | None = None


# What the functions of kernel/kernel.cpp take besides the plan: pointers, and then a number.
_SIGNATURES = {"rows": (7, 0), "add": (3, 0), "statistics": (4, 1), "shares": (3, 0), "second": (4, 0)}


@cache
def _functions(name: str) -> SimpleNamespace:
    library, functions = ctypes.CDLL(str(LIBRARY)), SimpleNamespace()
    for what, (pointers, numbers) in _SIGNATURES.items():
        function = library[f"klmetric_{what}_{name}"]
        plan = [] if what == "add" else [ctypes.c_char_p]
        function.argtypes = [*plan, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * (numbers + 2)]
        function.restype = None
        setattr(functions, what, function)
    return functions


def serves(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel takes two tensors: they have data, which lie in memory as they say."""
    return level() is not None and type(a) in _DENSE and type(b) in _DENSE and a.is_cpu and b.is_cpu


_DENSE = (Tensor, Parameter)


def measure(
    p: Tensor,
    q: Tensor,
    formats: tuple[str, str] = ("probs", "probs"),
    direction: str = "forward",
    temperature: float = 1.0,
    weight: Tensor | None = None,
    agrees: bool = False,
    totals: Totals | None = None,
    before: Tensor | None = None,
    threads: int | None = None,
) -> Measured:
    """Measure rows of shape (N, ..., classes), a sample being what stands in one place of N.

    Args:
        p: reference.
        q: approximation, of the shape of p; its dtype and strides may differ.
        formats: of p and of q; see `klmetric.kl_divergence`, and so are direction and temperature.
        direction: likewise.
        temperature: likewise.
        weight: of each row, for the totals; None for 1.
        agrees: whether to tell, and count, if p and q have the same most likely class.
        totals: to be made of the rows, if there are any.
        before: what to add them to, in a new tensor.
        threads: at most; None for as many as torch takes.
    """
    p, q = p.resolve_neg(), q.resolve_neg()
    sides = (p.stride(), p.dtype, formats[0]), (q.stride(), q.dtype, formats[1])
    job, shape, n = _job(p.shape, sides, direction, temperature, totals or NO_TOTALS)
    kl = p.new_empty(*shape, dtype=torch.float64)
    same = p.new_empty(*shape, dtype=torch.bool) if agrees else None
    sums = p.new_empty(totals[0], dtype=torch.float64) if totals and n else None
    weight = None if weight is None or sums is None else _in_a_row(weight)
    before = None if before is None else before.contiguous()
    kl_at, weight_at, same_at, before_at, sums_at = kl.data_ptr(), _at(weight), _at(same), _at(before), _at(sums)
    run, data = _functions(level() or "").rows, (p.data_ptr(), q.data_ptr())
    several = threads_for(n, p.shape[-1], threads)
    if several > 1:  # they measure, and then one adds up: in the same order, whatever their number
        # After an interrupt they may still write: what they write to stays with them.
        def measure_share(start: int, stop: int, _: object = (p, q, kl, same), data: Any = data) -> None:
            run(job, *data, None, kl_at, same_at, None, None, start, stop)

        in_shares(measure_share, n, p.shape[-1], several)
        data = 0, 0
    run(job, *data, weight_at, kl_at, same_at, before_at, sums_at, 0, n)
    return Measured(kl, same, sums)


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@lru_cache(256)
def _job(shape: Any, sides: Any, direction: str, temperature: float, totals: Totals) -> tuple[bytes, Any, int]:
    """A struct Job with the axes of its rows after it, the sizes of what rows come to, and their number."""
    (p_steps, *_), (q_steps, *_) = sides
    axes = [[1, 0, 0]]
    for size, *steps in zip(shape[:-1], p_steps[:-1], q_steps[:-1], strict=True):
        outer, *outer_steps = axes[-1]
        if outer == 1 or outer_steps == [size * step for step in steps]:  # in both they lie in memory as one
            axes[-1] = [outer * size, *steps]
        elif size != 1:
            axes.append([size, *steps])
    of_sides = [x for steps, dtype, form in sides for x in (steps[-1], DTYPES[dtype], form != "probs")]
    rows = (len(axes), shape[-1], DIRECTIONS.index(direction), temperature, math.prod(shape[1:-1]))
    columns = [x for column in zip(*axes, strict=True) for x in column]
    job = JOB.pack(*of_sides, *rows, *totals) + struct.pack(f"{len(columns)}q", *columns)
    # The sizes one by one are read sooner than as a tuple; where there are none, that is what stands for them.
    return job, tuple(shape[:-1]) or ((),), math.prod(shape[:-1])


def _in_a_row(x: Tensor) -> Tensor:
    return x.to(torch.float64).resolve_neg().contiguous()


def totals_of(kl: Tensor, agrees: Tensor | None, weight: Tensor | None, totals: Totals) -> Tensor:
    """The totals that `measure` makes, of rows of shape (N, ...), at least one, whose divergences are known already."""
    kl, agrees = _in_a_row(kl), None if agrees is None else agrees.contiguous()
    weight = None if weight is None else _in_a_row(weight)
    side = (*kl.stride(), 1), torch.float64, "probs"
    job, _, n = _job((*kl.shape, 1), (side, side), "forward", 1.0, totals)
    sums = kl.new_empty(totals[0])
    run = _functions(level() or "").rows
    run(job, None, None, _at(weight), kl.data_ptr(), _at(agrees), None, sums.data_ptr(), 0, n)
    return sums


def add(a: Tensor, b: Tensor, top: int = 0) -> Tensor:
    """Totals of two stretches of data as those of both, in a new tensor; with so many of the worst rows."""
    a, b = a.contiguous(), b.contiguous()
    sums = torch.empty_like(a)
    _functions(level() or "").add(a.data_ptr(), b.data_ptr(), sums.data_ptr(), a.numel(), top)
    return sums


def statistics(
    p: Tensor, q: Tensor, formats: tuple[str, str], temperature: float, measures: bool
) -> tuple[Tensor, Tensor]:
    """The numbers of `klmetric.arithmetic.statistics`, shape (7, ...), and the agreements, shape (..., 3)."""
    numbers, agree = (p.new_empty(*p.shape[:-1], k, dtype=kind) for k, kind in ((7, torch.float64), (3, torch.bool)))
    _fill("statistics", p, q, formats, temperature, numbers, agree, numbers=(measures,))
    return numbers.movedim(-1, 0).contiguous(), agree


def shares(p: Tensor, q: Tensor, formats: tuple[str, str], temperature: float) -> Tensor:
    """What some classes of rows come to, as `klmetric.arithmetic.sharded` merges it; shape (10, rows)."""
    found = p.new_empty(p.shape[:-1].numel(), 10, dtype=torch.float64)
    _fill("shares", p, q, formats, temperature, found)
    return found.T


def second_shares(
    p: Tensor, q: Tensor, formats: tuple[str, str], temperature: float, masses: Sequence[Tensor]
) -> Tensor:
    """The second look of `klmetric.arithmetic.sharded`, with the masses of whole rows."""
    found = p.new_empty(p.shape[:-1].numel(), 4 + 4 * TOP[-1], dtype=torch.float64)
    _fill("second", p, q, formats, temperature, torch.stack([*masses], -1), found)
    return found.T


def _fill(
    what: str,
    p: Tensor,
    q: Tensor,
    formats: tuple[str, str],
    temperature: float,
    *of_rows: Tensor,
    numbers: tuple[int, ...] = (),
) -> None:
    """Have a function of the kernel look at all rows, which writes to some of these tensors."""
    p, q = p.resolve_neg(), q.resolve_neg()
    sides = (p.stride(), p.dtype, formats[0]), (q.stride(), q.dtype, formats[1])
    job, _, n = _job(p.shape, sides, "forward", temperature, NO_TOTALS)
    run = getattr(_functions(level() or ""), what)

    # After an interrupt threads may still write: what they write to stays with them.
    def fill(start: int, stop: int, tensors: tuple[Tensor, ...] = (p, q, *of_rows)) -> None:
        run(job, *(x.data_ptr() for x in tensors), *numbers, start, stop)

    several = threads_for(n, p.shape[-1])
    if several > 1:
        in_shares(fill, n, p.shape[-1], several)
    else:
        fill(0, n)
