"""The kernel of accelerators (`tiles.py`, in Triton): what it serves, how it is called, and why it may be trusted."""

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from klmetric.arithmetic import plain
from klmetric.arithmetic.level import on_accelerators

if TYPE_CHECKING:
    from klmetric.options import Options

DEVICES = ("cuda", "xpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Bytes of the parts that are merged at once, and of a copy where rows do not lie at regular steps.
SCRATCH = 2**25
# What a grid of programs has room for.
WIDEST, MOST_ROWS = 2**25, 2**30
# The divergences of rows, and whether p and q agree in the most likely class, where it is asked for.
Found: TypeAlias = tuple[Tensor, Tensor | None]


def measure_if_it_serves(p: Tensor, q: Tensor, options: "Options", agrees: bool = False) -> Found | None:
    """Measure rows of shape (..., classes); None where the kernel does not serve, or has not shown that it is right."""
    if not (
        p.device.type in DEVICES
        and p.device == q.device
        and p.dtype in DTYPES
        and q.dtype in DTYPES
        and type(p) in _DENSE
        and type(q) in _DENSE
        and p.numel()
        and p.shape[-1] <= WIDEST
        and not options.eps
        and options.direction in plain.SWAPPED
        and on_accelerators()
        and _is_right(p, q, options, agrees)
    ):
        return None
    return measure(p, q, options.input_format, options.direction, options.temperature, agrees=agrees)


_DENSE = (Tensor, Parameter)


# ---- the call ------------------------------------------------------------------------------------------------------
def measure(
    p: Tensor,
    q: Tensor,
    formats: tuple[str, str] = ("probs", "probs"),
    direction: str = "forward",
    temperature: float = 1.0,
    *,
    agrees: bool = False,
) -> Found:
    """Measure rows of shape (..., classes), of any strides; see `klmetric.arithmetic.native.measure`."""
    p, q = p.resolve_neg(), q.resolve_neg()
    shape, n = p.shape[:-1], math.prod(p.shape[:-1])
    kl = torch.empty(n, dtype=torch.float64, device=p.device)
    same = torch.empty(n if agrees else 0, dtype=torch.bool, device=p.device)
    with _on(p.device):
        first = 0
        for a, b, axes in _pieces(p, q) if n else ():
            here = slice(first, first + math.prod(size for size, *_ in axes))
            _launch(a, b, axes, formats, direction, temperature, kl[here], same[here])
            first = here.stop
    return kl.view(shape), same.view(shape) if agrees else None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # where Triton's interpreter has numpy compute, which would warn of every infinity
        import numpy as np

        return np.errstate(all="ignore")
    return getattr(torch, device.type).device(device)  # type: ignore[no-any-return]


# The axes of rows: the size, and the steps in p and in q.
_Axes = list[tuple[int, int, int]]


def _pieces(p: Tensor, q: Tensor) -> Iterator[tuple[Tensor, Tensor, _Axes]]:
    """Pairs whose rows lie on two axes, in order. They are copies of a part where p and q have more than that."""
    axes: _Axes = [(1, 0, 0)]
    for size, *steps in zip(p.shape[:-1], p.stride()[:-1], q.stride()[:-1], strict=True):
        outer, *outer_steps = axes[-1]
        if outer == 1 or outer_steps == [size * step for step in steps]:  # in both they lie in memory as one
            axes[-1] = (outer * size, steps[0], steps[1])
        elif size != 1:
            axes.append((size, steps[0], steps[1]))
    if len(axes) < 3:
        yield p, q, [(1, 0, 0), *axes][-2:]
        return
    size = SCRATCH // (p[0].numel() * (p.element_size() + q.element_size()))
    for start in range(0, len(p), max(1, size)):
        block = slice(start, start + size) if size else start
        yield from _pieces(p[block].contiguous() if size else p[block], q[block].contiguous() if size else q[block])


def _launch(
    p: Tensor,
    q: Tensor,
    axes: _Axes,
    formats: tuple[str, str],
    direction: str,
    temperature: float,
    kl: Tensor,
    same: Tensor,
) -> None:
    from klmetric.arithmetic import tiles

    classes, n, agrees = p.shape[-1], len(kl), len(same) > 0
    is_p, is_q = (x == "probs" for x in formats)
    fast = torch.float64 not in (p.dtype, q.dtype) and is_p == is_q and (temperature == 1 or not is_p)
    width = min(max(_power(classes), tiles.LEAST), tiles.TILE if fast else tiles.CAREFUL)
    warps = max(1, width // (tiles.OF_A_WARP if fast else tiles.OF_A_CAREFUL_WARP))
    count, swapped = -(-classes // width), plain.SWAPPED[direction]
    (_, *outer), (within, *inner) = axes
    # Parts of no more rows at once than find room.
    fields = tiles.FIELDS * len(swapped) + 4 * agrees
    size = min(n, max(1, SCRATCH // (8 * fields * count))) if count > 1 else min(n, MOST_ROWS)
    parts = torch.empty(fields * count * size if count > 1 else 0, dtype=torch.float64, device=p.device)
    for begin in range(0, n, size):
        rows = min(size, n - begin)
        tiles.measure_tiles[(rows, count)](
            p, q, kl, same, parts, begin, within, classes, outer[0], inner[0], p.stride(-1), outer[1], inner[1],
            q.stride(-1), *_scale(temperature), P=is_p, Q=is_q, UNIT_P=p.stride(-1) == 1, UNIT_Q=q.stride(-1) == 1,
            FIRST=int(swapped[0]), END=1 + int(swapped[-1]), AGREES=agrees, FAST=fast, ONE=count == 1, C=width,
            CHUNK=max(tiles.LEAST, width // 4) if fast else width, num_warps=warps, **_limits(p.device.type),
        )  # fmt: skip
        if count > 1:
            tiles.merge_tiles[(rows,)](
                parts, kl, same, begin, count, classes, DIRECTIONS=len(swapped), AGREES=agrees, N=tiles.MERGED,
                num_warps=1,
            )  # fmt: skip


def _power(classes: int) -> int:
    """The power of two that one tile of them takes."""
    return 1 << (classes - 1).bit_length()


@cache
def _limits(device: str) -> dict[str, int]:
    # Registers of a thread: with more, three programs of four warps would not find room on a multiprocessor.
    return {"maxnreg": 168} if device == "cuda" and not torch.version.hip else {}


@cache
def _scale(temperature: float) -> tuple[float, ...]:
    """1/T in float64, and in float32: 1/T, log2(e)/T, T ln 2 in two parts, how large x may be, where e^(x/T) is 0."""

    def rounded(x: float) -> float:
        (y,) = struct.unpack("f", struct.pack("f", x))
        return float(y)

    tau, of_2 = 1 / temperature, math.log(2) * temperature
    factor, ln2 = rounded(tau), rounded(of_2)
    return tau, factor, rounded(tau / math.log(2)), ln2, rounded(of_2 - ln2), rounded(1e6 * ln2), rounded(-86 / factor)


# ---- trust ---------------------------------------------------------------------------------------------------------
# As near as the plain expression is promised to come on a device.
RTOL, LEAST = 1e-5, 1e-13
# By the kind of device, and by what makes a program of the kernel's: whether it gave what the plain expression gives.
_RIGHT: dict[tuple[Any, ...], bool] = {}
# Kinds of devices on which one did not.
_PARTED: set[str] = set()


def _is_right(p: Tensor, q: Tensor, options: "Options", agrees: bool) -> bool:
    """Whether the kernel gives what the plain expression gives: found out where such inputs come for the first time."""
    name = _name_of(p.device)
    if name in _PARTED:
        return False
    width = min(_power(p.shape[-1]), ENOUGH)
    units = p.stride(-1) == 1, q.stride(-1) == 1
    asked = options.input_format, options.direction, options.temperature == 1, agrees
    program = name, p.dtype, q.dtype, width, units, asked
    if program not in _RIGHT:
        if p.is_cuda and torch.cuda.is_current_stream_capturing():  # where nothing can be looked at
            return False
        said = _difference(p, q, width, units, options, agrees)
        _RIGHT[program] = said is None
        if said is not None:
            _PARTED.add(name)
            warnings.warn(
                f"The kernel of accelerators must give what the plain expression gives. On {name}, {said}."
                " The plain expression serves there from now on: right, but slower. Please report it;"
                " KLMETRIC_KERNEL=plain does without the kernel, and without this warning.",
                UserWarning,
                stacklevel=2,
            )
    return _RIGHT[program]


ENOUGH = 2**13  # wider rows have more tiles, but no others


@cache
def _name_of(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def _difference(
    p: Tensor, q: Tensor, width: int, units: tuple[bool, bool], options: "Options", agrees: bool
) -> str | None:
    """Where the two part over rows of every convention, in the dtypes and formats of p and q; None if nowhere."""
    a, b = (x.to(like.dtype) for x, like in zip(_examples(width, options.input_format), (p, q), strict=True))
    with torch.no_grad():
        expected = plain.plain(a.double(), b.double(), options)
    agree = a.double().argmax(-1) == b.double().argmax(-1)
    there = [x.to(p.device) for x in (a, b)]
    x, y = (z if unit else z.repeat_interleave(2, -1)[:, ::2] for z, unit in zip(there, units, strict=True))
    try:
        kl, same = measure(x, y, options.input_format, options.direction, options.temperature, agrees=agrees)
        kl, same = kl.cpu(), agree if same is None else same.cpu()
    except torch.cuda.OutOfMemoryError:  # which says nothing of the kernel
        raise
    except Exception as error:  # of a compiler, of a driver, of anything between
        return f"it cannot be had: {type(error).__name__}, {str(error).strip().partition(chr(10))[0]}"
    near = (kl - expected).abs() <= RTOL * expected.clamp_min(LEAST)
    wrong = ~(near | (kl == expected) | (kl.isnan() & expected.isnan()))
    wrong |= ~expected.isnan() & (same != agree)
    if not wrong.any():
        return None
    i = int(wrong.nonzero()[0])
    return f"row {i} of those it is checked with came to {kl[i]:.9g} nats instead of {expected[i]:.9g}"


def _examples(width: int, formats: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """A row of each convention."""
    generator = torch.Generator().manual_seed(0)
    classes, kinds = width - width // 8, 18
    shape = (kinds, classes)
    logits, noise = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in range(2))
    logits[6] *= 30
    distance = torch.full((kinds, 1), 0.1, dtype=torch.float64, device="cpu")
    distance[:5, 0] = torch.tensor([0, 1e-6, 1e-3, 1, 10])
    sides = []
    for x, form in zip((logits, logits + distance * noise), formats, strict=True):
        sides.append(x.softmax(-1) if form == "probs" else x.log_softmax(-1) if form == "log_probs" else x)
    p, q = sides
    (none, low, bad), (none_q, low_q, bad_q) = (
        (0.0, 1e-30, -1.0) if x == "probs" else (-math.inf, -1e9, math.inf) for x in formats
    )
    if formats[1] != "probs":
        q[5] += 1e4
    p[7, ::3], q[7, ::3], p[8, ::3], q[9, ::3] = none, none_q, none, none_q
    p[10, ::3], p[11, ::3], q[11, ::3] = low, low, low_q
    p[12, 0], q[13, 0], p[14, -1], q[15, -1], p[16], q[17] = math.nan, math.nan, bad, bad_q, none, none_q
    return p, q
