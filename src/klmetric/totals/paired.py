"""The difference of two models' mean divergences over the same rows, and its standard error.

Where two models are measured on the same rows, what is hard about a row is hard for both, and cancels in the difference
of the two: it is known far better than either mean.

The state is a vector of sums (`klmetric.totals.pairs`) that merges by addition: over the samples, with D the weighted
sum of the differences and n the sum of the weights, those of max(D, 0), max(-D, 0), D^2, max(D, 0) n, max(-D, 0) n, n,
n^2 and 1.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from klmetric.totals import pairs
from klmetric.totals.sketch import PRECISION, of_samples

SUMS = 8


def empty() -> Tensor:
    """No rows."""
    return torch.zeros(2 * SUMS, dtype=torch.float64)


def of_rows(kl: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """The sums of a batch.

    Args:
        kl: divergences of one model, shape (samples, positions).
        other: those of the other, of the same rows.
        weight: of the rows; those of weight 0 may have any divergence.
    """
    difference = torch.where(weight > 0, kl.double() - other.double(), 0) * weight
    d, n = of_samples(difference), of_samples(weight)
    up, down, ones = d.clamp_min(0), (-d).clamp_min(0), torch.ones_like(n)
    products = ((up, ones), (down, ones), (d.abs(), d.abs()), (up, n), (down, n), (n, ones), (n, n))
    sums = [pairs.total_of_products(x, y) for x, y in products]
    return torch.stack([*sums, torch.stack([(n > 0).sum().double(), n.new_zeros(())])], 1).flatten()


def difference(sums: Tensor) -> tuple[float, float]:
    """The difference of the means, the first less the other, and its standard error, in nats.

    The standard error is that of `klmetric.totals.sketch.standard_error`, for the differences of the rows.
    """
    numbers = sums.tolist()
    if not all(map(math.isfinite, numbers)) or not numbers[5]:
        return math.nan, math.nan
    up, down, dd, up_n, down_n, n, nn, samples = (
        Fraction(high) + Fraction(low) for high, low in zip(numbers[:SUMS], numbers[SUMS:], strict=True)
    )
    mean = (up - down) / n
    if samples < 2:
        return float(mean), math.nan
    spread = dd - 2 * mean * (up_n - down_n) + mean * mean * nn
    if spread <= dd * PRECISION:
        return float(mean), 0.0
    return float(mean), math.sqrt(spread * samples / ((samples - 1) * n * n))
