"""How the mass that rows have in classes that are not known is spread: a vector that merges.

First the largest of the masses and minus the smallest above 0, which merge by the maximum; then the counts of
`klmetric.totals.histogram`, which merge by addition, and exactly.
"""

import math

import torch
from torch import Tensor

from klmetric.totals import histogram
from klmetric.totals.histogram import Histogram

HEAD = 2


def size(fineness: int) -> int:
    """The length of the vector."""
    return HEAD + histogram.size(fineness)


def empty(fineness: int) -> Tensor:
    """No rows."""
    return torch.tensor([0.0, -math.inf, *[0.0] * histogram.size(fineness)], dtype=torch.float64)


def of_rows(mass: Tensor, weight: Tensor, fineness: int) -> Tensor:
    """Of a batch.

    Args:
        mass: of each row, in float64; anything where the weight is 0.
        weight: of each row.
        fineness: of the bins.
    """
    counted = weight > 0
    mass = torch.where(counted, mass, 0)
    if mass.numel():
        ends = torch.stack([mass.amax(), torch.where(mass > 0, -mass, -math.inf).amax()])
    else:
        ends = mass.new_tensor([0, -math.inf])
    return torch.cat([ends, histogram.count(mass, counted, fineness)])


def merge(parts: Tensor) -> Tensor:
    """Of all rows together, from those of their parts, shape (parts, ...)."""
    return torch.cat([parts[:, :HEAD].amax(0), parts[:, HEAD:].sum(0)])


def histogram_of(vector: Tensor) -> Histogram:
    """The masses."""
    return Histogram(vector[HEAD:].cpu(), -vector[1].item(), vector[0].item())
