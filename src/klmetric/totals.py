"""The totals: one float64 vector that a stretch of data comes to, and that merges by addition.

Laws: `empty` is neutral, `merge` is associative and commutative. The last two entries are no sums but the fingerprint
of the options, the same in every part: it keeps totals that were measured differently from being taken for one another.
A batch is still without one, so that it is added by a mere `+`.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from klmetric.divergence import has_gradient
from klmetric.options import NanStrategy, Options, Reduction

# Rows that are added up at once: torch makes a float64 copy of what it adds up in float64.
PIECE = 2**18

# The places in the vector.
KL, WEIGHT, SAMPLES, ROWS, INVALID, FINGERPRINT = range(6)


def empty(options: Options) -> Tensor:
    """Totals of no data at all."""
    return torch.tensor([0.0] * FINGERPRINT + [*options.fingerprint], dtype=torch.float64)


def merge(parts: Tensor) -> Tensor:
    """Totals of all data together, from the totals of its parts, shape (parts, 7)."""
    return torch.cat([parts[:, :FINGERPRINT].sum(0), parts[:, FINGERPRINT:].amax(0)])


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
        pieces = (kl,) if n <= PIECE else torch.split(kl.reshape(-1), PIECE)
        total = sum(piece.sum(dtype=torch.float64).item() for piece in pieces)
        if math.isnan(total):
            total = sum(piece.nansum(dtype=torch.float64).item() for piece in pieces)
            invalid = sum(int(piece.isnan().sum()) for piece in pieces)
            samples = int((~kl.isnan()).reshape(samples, -1).any(1).sum())
        return torch.tensor([total, n - invalid, samples, n, invalid, 0, 0], dtype=torch.float64)
    kl = kl.to(device, torch.float64)
    weight = torch.ones_like(kl) if weight is None else weight.to(device, torch.float64)
    invalid_rows = kl.isnan() & (weight > 0)
    weight = torch.where(invalid_rows, 0, weight)
    # Not a product with 0: that would turn an infinity, or a NaN, of a row that is left out into NaN.
    weighted = torch.where(weight > 0, kl, 0) * weight
    # A sample counts as much as the weightiest of its rows: once if any of its tokens is left, and not at all if none.
    samples_of_rows = weight.flatten(1).amax(1) if weight.ndim > 1 and weight.numel() else weight
    counted = ((weight > 0) | invalid_rows).sum()
    nothing = torch.zeros_like(counted)
    parts = [weighted.sum(), weight.sum(), samples_of_rows.sum(), counted, invalid_rows.sum(), nothing, nothing]
    return torch.stack([part.double() for part in parts])


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
