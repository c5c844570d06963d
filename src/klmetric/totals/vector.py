"""The totals: one float64 vector that a stretch of data comes to, and that merges by addition.

Each of its sums is a pair (`klmetric.totals.pairs`), so the order in which they are added up does not matter.

Laws: `empty` is neutral, `merge` is associative and commutative. The last two entries are no sums but the fingerprint
of the options, the same in every part: it keeps totals that were measured differently from being taken for one another.
A batch is still without one.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from klmetric.arithmetic import native
from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.native import Totals
from klmetric.arithmetic.tracing import has_gradient, is_recorded, may_look
from klmetric.options import NanStrategy, Options, Reduction
from klmetric.rows.invalid import hint_for
from klmetric.rows.rows import Rows
from klmetric.totals import pairs

# The places in the vector: of the high part of each sum, of the low parts, and of the fingerprint.
KL, WEIGHT, SAMPLES, ROWS, INVALID, LOW = range(6)
FINGERPRINT = 2 * LOW
SIZE = FINGERPRINT + 2
MARKS = slice(FINGERPRINT, SIZE)
# What the kernel is asked for.
ASKED: Totals = (SIZE, 0, 0, 0, 0)


def empty(options: Options, with_rows: bool = False, also: tuple[object, ...] = ()) -> Tensor:
    """Totals of no data at all.

    Args:
        options: what is measured.
        with_rows: marks those of a metric that keeps its rows as well.
        also: marks whatever else tells them from others.
    """
    first, second = options.fingerprint(*also)
    return torch.tensor([0.0] * FINGERPRINT + [first + 2**16 * with_rows, second], dtype=torch.float64)


def merge(parts: Tensor) -> Tensor:
    """Totals of all data together, from the totals of its parts, shape (parts, 12), each sum rounded once."""
    numbers = parts.tolist()
    sums = pairs.merge([part[:FINGERPRINT] for part in numbers])
    marks = map(max, zip(*(part[FINGERPRINT:] for part in numbers), strict=True))
    return torch.tensor([*sums, *marks], dtype=torch.float64, device=parts.device)


def add(totals: Tensor, batch: Tensor) -> Tensor:
    """Totals with one more batch. It does not wait for an accelerator, as `merge` does."""
    if not is_recorded() and native.serves(totals, batch):
        return native.add(totals, batch)
    sums = pairs.add(totals[:FINGERPRINT], batch[:FINGERPRINT])
    return torch.cat([sums, torch.maximum(totals[FINGERPRINT:], batch[FINGERPRINT:])])


def of_batch(rows: Rows) -> Tensor:
    """Totals of one batch, without a fingerprint: those that came with the rows, if any did."""
    return of_rows(rows.kl, rows.weight) if rows.totals is None else rows.totals


def of_rows(kl: Tensor, weight: Tensor | None) -> Tensor:
    """Totals of one batch, without a fingerprint.

    Args:
        kl: divergence of each row in nats, shape (N, ...); NaN where a row is no pair of distributions.
        weight: weight of each row, of the shape of `kl`; None for 1.
    """
    device = device_of_float64(kl.device)
    if weight is None and kl.device.type == "cpu" and may_look() and not has_gradient(kl):
        # Few operations, for small batches, and no copy, for large ones.
        n, invalid = kl.numel(), 0
        samples = kl.shape[0] if kl.ndim and n else n
        high, low = pairs.total_in_pieces(kl)
        if math.isnan(high):
            valid = ~kl.isnan()
            invalid = n - int(valid.sum())
            samples = int(valid.reshape(samples, -1).any(1).sum())
            high, low = pairs.total_in_pieces(kl[valid])
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
    sums = [pairs.total(x) for x in (weighted, weight, samples_of_rows)]
    highs_and_lows = torch.stack(sums + [torch.stack([count, torch.zeros_like(count)]) for count in counts], 1)
    return torch.cat([highs_and_lows.flatten(), counts.new_zeros(2)])


def value(totals: Any, reduction: Reduction, nan_strategy: NanStrategy) -> Any:
    """The reduced divergence in nats; NaN where nothing was counted.

    Args:
        totals: as a tensor, which gives a float64 scalar and keeps the gradient; or as the list of its numbers, which
            gives a number and is much faster.
        reduction: see `klmetric.kl_divergence`.
        nan_strategy: likewise.
    """
    kl, weight, samples, _, invalid = totals[:LOW]
    divisor = weight if reduction == "mean" else samples if reduction == "batchmean" else 1.0
    if isinstance(totals, Tensor):
        kl = kl / divisor
        return torch.where(invalid > 0, math.nan, kl) if nan_strategy == "propagate" else kl
    return math.nan if not divisor or (invalid and nan_strategy == "propagate") else kl / divisor


def result(
    totals: Tensor,
    numbers: list[float],
    reduction: Reduction,
    options: Options,
    unit: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The reduced divergence in a unit, as a scalar with the gradient of the totals, if they have one.

    Args:
        totals: of a batch, or of all.
        numbers: the same as a list; empty where they cannot be known.
        reduction: see `klmetric.kl_divergence`.
        options: what was measured.
        unit: in nats.
        dtype: of the result.
        device: of the result.
    """
    if not numbers or has_gradient(totals):
        kl: Tensor = value(totals, reduction, options.nan_strategy) / unit
        return kl.to(device, dtype)
    return torch.scalar_tensor(value(numbers, reduction, options.nan_strategy) / unit, dtype=dtype, device=device)


def number_of_rows(totals: Tensor, options: Options) -> int:
    """How many rows there are a value of."""
    left_out = totals[INVALID] if options.nan_strategy == "ignore" else 0
    return int(totals[ROWS] - left_out)


def check_weights(totals: list[float]) -> None:
    """Raise if a weight was none. On an accelerator that is found here, so that no update waits for one."""
    if math.isnan(totals[WEIGHT]):
        raise ValueError(
            "`weight` must be finite and at least 0, and `targets` be classes or `ignore_index`. Got others in a batch"
            " on an accelerator. There they are not looked at before the result is computed; on the CPU they are, at"
            " once."
        )


def warn_of_invalid(totals: list[float], options: Options, stacklevel: int, p: type = Tensor, q: type = Tensor) -> bool:
    """Say how many rows were no distributions, and what became of them. Returns whether there was anything to say.

    Args:
        totals: as the list of its numbers.
        options: what was measured.
        stacklevel: of the warning.
        p: what the reference is: a tensor, a distribution...
        q: what the approximation is.
    """
    invalid = int(totals[INVALID])
    if invalid:
        outcome = "were left out" if options.nan_strategy == "ignore" else "make the result NaN"
        warnings.warn(
            f"{invalid} of {int(totals[ROWS])} rows were no distributions and {outcome}. nan_strategy='error' names the"
            f" first.{hint_for((p, q), options)}",
            stacklevel=stacklevel + 1,
        )
    return bool(invalid)
