"""The totals: one float64 vector that a stretch of data comes to, and that merges by addition.

Laws: `empty` is neutral, `merge` is associative and commutative. The last two entries are no sums but the fingerprint
of the options, the same in every part: it keeps totals that were measured differently from being taken for one another.
"""

import math
import warnings

import torch
from torch import Tensor

from klmetric.options import NanStrategy, Options, Reduction

# Rows that are added up at once.
PIECE = 2**18

# The places in the vector.
KL, WEIGHT, SAMPLES, ROWS, INVALID, FINGERPRINT = range(6)


def empty(options: Options) -> Tensor:
    """Totals of no data at all."""
    return torch.tensor([0.0] * FINGERPRINT + [*options.fingerprint], dtype=torch.float64)


def merge(parts: Tensor) -> Tensor:
    """Totals of all data together, from the totals of its parts, shape (parts, 7)."""
    return torch.cat([parts[:, :FINGERPRINT].sum(0), parts[0, FINGERPRINT:]])


def of_rows(kl: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Totals of one batch.

    Args:
        kl: divergence of each row in nats, shape (N, ...); NaN where a row is no pair of distributions.
        weight: weight of each row, of the shape of `kl`; None for 1.
        options: what was measured.
    """
    device = device_of_totals(kl.device)
    fingerprint = torch.tensor(options.fingerprint, dtype=torch.float64, device=device)
    if weight is None and not kl.requires_grad and device == kl.device:
        # The same, in pieces: torch makes a float64 copy of what it adds up in float64.
        n = kl.numel()
        pieces = torch.split(kl.reshape(-1), PIECE)
        total = torch.stack([piece.nansum(dtype=torch.float64) for piece in pieces]).sum()
        invalid = torch.stack([piece.isnan().sum() for piece in pieces]).sum()
        count = n - invalid
        samples = count if kl.ndim < 2 or not n else (~kl.isnan()).flatten(1).any(1).sum()
        return torch.cat([torch.stack([total, count, samples, torch.full_like(count, n), invalid]), fingerprint])
    kl = kl.to(device, torch.float64)
    weight = torch.ones_like(kl) if weight is None else weight.to(device, torch.float64)
    invalid = kl.isnan() & (weight > 0)
    weight = torch.where(invalid, 0, weight)
    # Not a product with 0: that would turn an infinity, or a NaN, of a row that is left out into NaN.
    weighted = torch.where(weight > 0, kl, 0) * weight
    # A sample counts as much as the weightiest of its rows: once if any of its tokens is left, and not at all if none.
    samples = weight.flatten(1).amax(1).sum() if weight.ndim > 1 and weight.numel() else weight.sum()
    counted = ((weight > 0) | invalid).sum()
    sums = torch.stack([weighted.sum(), weight.sum(), samples, counted.double(), invalid.sum().double()])
    return torch.cat([sums, fingerprint])


def value(totals: Tensor, reduction: Reduction, nan_strategy: NanStrategy) -> Tensor:
    """The reduced divergence in nats, a float64 scalar; NaN where nothing was counted."""
    kl = totals[KL]
    if reduction == "mean":
        kl = kl / totals[WEIGHT]
    elif reduction == "batchmean":
        kl = kl / totals[SAMPLES]
    return torch.where(totals[INVALID] > 0, math.nan, kl) if nan_strategy == "propagate" else kl


def warn_of_invalid(totals: Tensor, options: Options, stacklevel: int) -> bool:
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
