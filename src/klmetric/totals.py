"""The totals: one float64 vector that a stretch of data comes to, and that merges by addition.

Each of its sums is a pair, high + low, of some hundred bits. What a sum in float64 loses depends on the order, and so
on the batch size and the number of processes; what a pair loses is far below the last digit of any result.

Laws: `empty` is neutral, `merge` is associative and commutative. The last two entries are no sums but the fingerprint
of the options, the same in every part: it keeps totals that were measured differently from being taken for one another.
A batch is still without one.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from klmetric.divergence import has_gradient
from klmetric.options import NanStrategy, Options, Reduction

# Rows that are added up at once: adding takes copies of them in float64.
PIECE = 2**18
# So few numbers are added up sooner by Python than by torch.
FEW = 256

# The places in the vector: of the high part of each sum, of the low parts, and of the fingerprint.
KL, WEIGHT, SAMPLES, ROWS, INVALID, LOW = range(6)
FINGERPRINT = 2 * LOW
SIZE = FINGERPRINT + 2


def empty(options: Options, with_rows: bool = False) -> Tensor:
    """Totals of no data at all; `with_rows` marks those of a metric that keeps its rows as well."""
    first, second = options.fingerprint
    return torch.tensor([0.0] * FINGERPRINT + [first + 2**16 * with_rows, second], dtype=torch.float64)


def merge(parts: Tensor) -> Tensor:
    """Totals of all data together, from the totals of its parts, shape (parts, 12), each sum rounded once."""
    return _merge(parts.tolist()).to(parts.device)


def add(totals: Tensor, batch: Tensor) -> Tensor:
    """Totals with one more batch. It does not wait for an accelerator, as `merge` does."""
    if totals.device.type == "cpu":
        return _merge([totals.tolist(), batch.tolist()])
    return _two_sum(totals, batch)


def _merge(parts: list[list[float]]) -> Tensor:
    columns = list(zip(*parts, strict=True))
    sums = [_exact_sum(high + low) for high, low in zip(columns[:LOW], columns[LOW:FINGERPRINT], strict=True)]
    highs, lows = zip(*sums, strict=True)
    marks = map(max, columns[FINGERPRINT:])
    return torch.tensor([*highs, *lows, *marks], dtype=torch.float64)


def of_rows(kl: Tensor, weight: Tensor | None) -> Tensor:
    """Totals of one batch, without a fingerprint.

    Args:
        kl: divergence of each row in nats, shape (N, ...); NaN where a row is no pair of distributions.
        weight: weight of each row, of the shape of `kl`; None for 1.
    """
    device = device_of_totals(kl.device)
    if weight is None and kl.device.type == "cpu" and not (torch.compiler.is_compiling() or has_gradient(kl)):
        # Few operations, for small batches, and no copy, for large ones.
        n, invalid = kl.numel(), 0
        samples = kl.shape[0] if kl.ndim and n else n
        high, low = _sum_in_pieces(kl)
        if math.isnan(high):
            valid = ~kl.isnan()
            invalid = n - int(valid.sum())
            samples = int(valid.reshape(samples, -1).any(1).sum())
            high, low = _sum_in_pieces(kl[valid])
        highs, lows = [high, n - invalid, samples, n, invalid], [low, 0, 0, 0, 0]
        return torch.tensor([*highs, *lows, 0, 0], dtype=torch.float64)
    kl = kl.to(device, torch.float64)
    weight = torch.ones_like(kl) if weight is None else weight.to(device, torch.float64)
    invalid_rows = kl.isnan() & (weight > 0)
    weight = torch.where(invalid_rows, 0, weight)
    # Not a product with 0: that would turn an infinity, or a NaN, of a row that is left out into NaN.
    weighted = torch.where(weight > 0, kl, 0) * weight
    # A sample counts as much as the weightiest of its rows: once if any of its tokens is left, and not at all if none.
    samples_of_rows = weight.flatten(1).amax(1) if weight.ndim > 1 and weight.numel() else weight
    counted = ((weight > 0) | invalid_rows).sum()
    counts = torch.stack([counted, invalid_rows.sum()]).double()
    sums = [_sum(x) for x in (weighted, weight, samples_of_rows)]
    highs_and_lows = torch.stack(sums + [torch.stack([count, torch.zeros_like(count)]) for count in counts], 1)
    return torch.cat([highs_and_lows.flatten(), counts.new_zeros(2)])


def _sum(x: Tensor) -> Tensor:
    """The sum of non-negative float64 numbers as a pair, shape (2,); the gradient goes through it."""
    if torch.compiler.is_compiling():  # a batch alone: nothing is added to it
        total = x.sum()
        return torch.stack([total, torch.zeros_like(total)])
    if x.device.type == "cpu" and not has_gradient(x):
        return torch.tensor(_sum_in_pieces(x), dtype=torch.float64)
    return _sum_on_a_grid(x)


def _sum_in_pieces(x: Tensor) -> tuple[float, float]:
    if x.numel() <= FEW:
        return _exact_sum(x.reshape(-1).tolist())
    pieces = (x,) if x.numel() <= PIECE else torch.split(x.reshape(-1), PIECE)
    return _exact_sum([part for piece in pieces for part in _sum_on_a_grid(piece.double()).tolist()])


def _sum_on_a_grid(x: Tensor) -> Tensor:
    """The sum of non-negative float64 numbers, no more than `PIECE`, as a pair.

    Each number is cut at a power of two. The parts above have so few bits that their sum is exact in any order; those
    below are so small that what their own sum loses is below 2^-67 of the total, and mostly nothing at all.
    (The first step of Rump, Ogita and Oishi, "Accurate floating-point summation", 2008.)
    """
    total = x.sum()
    _, exponent = torch.frexp(total.detach())
    # total < 2^exponent, and the spacing of numbers beside `cut` is 2^(exponent - 51). The power of two is made of its
    # bits, because torch.ldexp had the range of the default dtype in earlier versions.
    cut = 3 * ((exponent.long().clamp(min=-1021) + 1023) << 52).view(torch.float64)
    above = (x + cut) - cut
    high, low = above.sum(), (x - above).sum()
    both = high + low
    pair = torch.stack([both, low - (both - high)])
    return torch.where(cut.isfinite() & total.isfinite(), pair, torch.stack([total, torch.zeros_like(total)]))


def _exact_sum(numbers: Sequence[float]) -> tuple[float, float]:
    """The sum as a pair, each part rounded once."""
    try:
        high = math.fsum(numbers)
        return high, math.fsum([*numbers, -high]) if math.isfinite(high) else 0.0
    except OverflowError:
        return math.nan if any(map(math.isnan, numbers)) else math.inf, 0.0


def _two_sum(a: Tensor, b: Tensor) -> Tensor:
    """`merge` of two, in the operations of a device (Knuth's TwoSum)."""
    high = a[:LOW] + b[:LOW]
    of_b = high - a[:LOW]
    lost = (a[:LOW] - (high - of_b)) + (b[:LOW] - of_b)
    low = torch.where(high.isfinite(), lost + (a[LOW:FINGERPRINT] + b[LOW:FINGERPRINT]), 0)
    both = high + low
    low = torch.where(both.isfinite(), low - (both - high), 0)
    return torch.cat([both, low, torch.maximum(a[FINGERPRINT:], b[FINGERPRINT:])])


def value(totals: Any, reduction: Reduction, nan_strategy: NanStrategy) -> Any:
    """The reduced divergence in nats; NaN where nothing was counted.

    Args:
        totals: as a tensor, which gives a float64 scalar and keeps the gradient; or as the list of its numbers, which
            gives a number and is much faster.
        reduction: see `klmetric.kl_divergence`.
        nan_strategy: likewise.
    """
    kl, weight, samples, _, invalid, *_ = totals
    divisor = {"mean": weight, "batchmean": samples}.get(reduction, 1.0)
    if isinstance(totals, Tensor):
        kl = kl / divisor
        return torch.where(invalid > 0, math.nan, kl) if nan_strategy == "propagate" else kl
    return math.nan if not divisor or (invalid and nan_strategy == "propagate") else kl / divisor


def warn_of_invalid(totals: list[float], options: Options, stacklevel: int) -> bool:
    """Say how many rows were no distributions, and what became of them. Returns whether there was anything to say."""
    invalid = int(totals[INVALID])
    if invalid:
        outcome = "were left out" if options.nan_strategy == "ignore" else "make the result NaN"
        hint = " nan_strategy='error' names the first."
        if "probs" in options.input_format:
            hint += " Were they logits or log-probabilities? Then say so with input_format."
        warnings.warn(
            f"{invalid} of {int(totals[ROWS])} rows were no distributions and {outcome}.{hint}",
            stacklevel=stacklevel + 1,
        )
    return bool(invalid)


def device_of_totals(device: torch.device) -> torch.device:
    """Where the totals of data on `device` live: there, or on the CPU if it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device
