r"""Counts in bins of a stated relative width, from which quantiles are read: mergeable by addition, and exact counts.

Every power of two from 2^-40 (9e-13) to 2^14 (16,384) nats is cut into 2^bits equal bins. Which bin a number is in
stands in the first bits of the number itself, so finding it takes no logarithm and rounds nothing: it is the same on
every device. A bin from a to b is reported as its harmonic mean 2ab/(a+b), from which nothing in it differs by more
than (b-a)/(b+a) of itself, at most 1 part in 2^(bits+1) + 1.

(The guarantee is that of Masson, Rim, Lee: DDSketch, VLDB 12, 2019, whose bins are exact logarithms; bins within powers
of two are one of the mappings that its authors' libraries offer.)

Beside them are bins of their own for 0, for what is smaller and larger than all these, and for +inf.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

# The powers of two between which the bins are.
LOWEST, HIGHEST = -40, 14
# The other bins: the first two, and the last two.
ZERO, TINY, HUGE, INFINITE = 0, 1, -2, -1

# Of a float64: the bits of its fraction, and what is added to its exponent.
_FRACTION, _BIAS = 52, 1023


def bits_for(relative_accuracy: float) -> int:
    """The fewest bits that tell numbers apart to `relative_accuracy`."""
    # A thousandth is left for the rounding to float32.
    return next(bits for bits in range(_FRACTION) if 1 / (2 ** (bits + 1) + 1) <= 0.999 * relative_accuracy)


def size(bits: int) -> int:
    """The number of bins."""
    return ((HIGHEST - LOWEST) << bits) + 4


def count(x: Tensor, counted: Tensor | None, bits: int) -> Tensor:
    """How many of the numbers are in each bin.

    Args:
        x: float64, at least 0; of any value where they are not counted.
        counted: which of them are, as a mask of the same shape; None for all.
        bits: see above.
    """
    bins = size(bits)
    place = ((x.view(torch.int64) >> (_FRACTION - bits)) - (_first(bits) - 2)).clamp_(1, bins - 2)
    place = torch.where(x == 0, 0, torch.where(x == math.inf, bins - 1, place))
    if counted is not None:
        place = torch.where(counted, place, bins)  # one bin more, for what is not counted
    place = place.flatten()
    if x.device.type == "cpu":
        return torch.bincount(place, minlength=bins + 1)[:bins].double()
    # `bincount` would wait for the device to know how many bins there are.
    return x.new_zeros(bins + 1).index_add(0, place, torch.ones_like(x).flatten())[:bins]


def edges(bits: int) -> Tensor:
    """Where the bins between `TINY` and `HUGE` begin, and where the last one ends."""
    codes = _first(bits) + torch.arange(size(bits) - 3)
    return (codes << (_FRACTION - bits)).view(torch.float64)


def quantile(counts: Tensor, q: float, largest: float) -> float:
    """The quantile as `numpy.quantile` and `torch.quantile` have it, to the accuracy of the bins; NaN if there is none.

    Args:
        counts: of each bin, on the CPU.
        q: from 0 to 1.
        largest: of all numbers, which is known exactly.
    """
    cumulative = counts.cumsum(0)
    n = int(cumulative[-1])
    if n == 0:
        return math.nan
    place = Fraction(q) * (n - 1)
    if abs(place - round(place)) <= (n - 1) * 2.0**-52:  # as 0.9 of ten is, but for its digits
        place = Fraction(round(place))
    below = math.floor(place)
    share = float(place - below)
    low = _at(below, cumulative, largest)
    # Between two neighbours in order, each of which is known to the accuracy of its bin.
    if share == 0 or low == math.inf:
        return low
    high = _at(below + 1, cumulative, largest)
    return low + share * (high - low)


def _at(rank: int, cumulative: Tensor, largest: float) -> float:
    """The number with so many before it in order."""
    if rank == cumulative[-1] - 1:
        return largest
    place = int(torch.searchsorted(cumulative, rank, right=True))
    bits = ((len(cumulative) - 4) // (HIGHEST - LOWEST)).bit_length() - 1
    return min(_value(place, bits), largest)


def _value(place: int, bits: int) -> float:
    """What stands for the numbers in a bin."""
    last = size(bits) - 1
    if place in (ZERO, TINY, last - 1, last):
        return {ZERO: 0.0, TINY: 2.0 ** (LOWEST - 1), last - 1: 2.0**HIGHEST, last: math.inf}[place]
    begin, end = edges(bits)[place - 2 : place].tolist()
    mean: float = 2 * begin * end / (begin + end)
    return mean


def _first(bits: int) -> int:
    """The first bits of the least number in the bins, as an integer."""
    return (LOWEST + _BIAS) << bits
