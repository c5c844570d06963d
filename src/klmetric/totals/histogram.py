r"""Counts in bins of a stated relative width, from which quantiles are read: mergeable by addition, and exact counts.

The bins are from 2^-81 (4e-25) to 2^128 (3e38, the largest number of float32) nats. Every power of two is cut into 3m
of them, for a fineness of m, at nearly equal ratios: where m f (4 - f), for the numbers (1 + f) 2^e, is whole. That is
close to 3m log2(1 + f), but takes no logarithm: made of the first bits of the number, as whole numbers, it rounds
nothing and is the same on every device. A bin from a to b is reported as its harmonic mean 2ab/(a+b), from which
nothing in it differs by more than (b-a)/(b+a) of itself, at most 1 part in 8m.

(The guarantee is that of Masson, Rim, Lee: DDSketch, VLDB 12, 2019, whose bins are exact logarithms; a quadratic in
their place is one of the mappings that its authors' libraries offer.)

Beside them are bins of their own for 0, for what is smaller and larger than all these, and for +inf. How small and how
large the numbers in the second and third are is known by the smallest and the largest of all.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

# The powers of two between which the bins are.
LOWEST, HIGHEST = -81, 128
# The other bins: the first two, and the last two.
ZERO, TINY, HUGE, INFINITE = 0, 1, -2, -1

# Of a float64: the bits of its fraction, those of them that decide its bin, and what is added to its exponent.
_FRACTION, _BITS, _BIAS = 52, 25, 1023


class Histogram(NamedTuple):
    """The numbers of a data set.

    Attributes:
        counts: of each bin, on the CPU.
        smallest: of the numbers above 0; inf where there are none.
        largest: of those that are finite; 0 where there are none.
    """

    counts: Tensor
    smallest: float
    largest: float

    @property
    def fineness(self) -> int:
        """Of the bins."""
        return (len(self.counts) - 4) // (3 * (HIGHEST - LOWEST))


def fineness_for(relative_accuracy: float) -> int:
    """The least fineness that tells numbers apart to `relative_accuracy`."""
    # A thousandth is left for the rounding to float32.
    return math.ceil(1 / (8 * 0.999 * relative_accuracy))


def size(fineness: int) -> int:
    """The number of bins."""
    return (HIGHEST - LOWEST) * 3 * fineness + 4


def count(x: Tensor, counted: Tensor, fineness: int) -> Tensor:
    """How many of the numbers are in each bin.

    Args:
        x: float64, at least 0; of any value where they are not counted.
        counted: which of them are, as a mask of the same shape.
        fineness: see above.
    """
    bins = size(fineness)
    code = x.view(torch.int64) >> (_FRACTION - _BITS)
    fraction = code & (2**_BITS - 1)
    # f (4 - f) m; with 25 bits of f it stays below 2^63.
    within = (fraction * (2 ** (_BITS + 2) - fraction) * fineness) >> 2 * _BITS
    place = ((code >> _BITS) - (LOWEST + _BIAS)) * (3 * fineness) + within + 2
    place = torch.where(x == 0, 0, torch.where(x == math.inf, bins - 1, place.clamp_(1, bins - 2)))
    place = torch.where(counted, place, bins).flatten()  # one bin more, for what is not counted
    if x.device.type == "cpu":
        return torch.bincount(place, minlength=bins + 1)[:bins].double()
    # `bincount` would wait for the device to know how many bins there are.
    return x.new_zeros(bins + 1).index_add(0, place, torch.ones_like(x).flatten())[:bins]


def edges(fineness: int) -> Tensor:
    """Where the bins between `TINY` and `HUGE` begin, and where the last one ends."""
    return torch.tensor([_edge(k, fineness) for k in range(size(fineness) - 3)], dtype=torch.float64)


def _edge(number: int, fineness: int) -> float:
    """Where the bin of this number begins, of those between `TINY` and `HUGE`."""
    power, k = divmod(number, 3 * fineness)
    one = 2**_BITS
    # The least f of so many bits with m f (4 - f) >= k: with g = 2 - f it is m (4 - g^2) >= k.
    f = 2 * one - math.isqrt((4 * fineness - k) * one**2 // fineness)
    return math.ldexp(one + f, LOWEST + power - _BITS)


def quantile(histogram: Histogram, q: float) -> float:
    """The quantile as `numpy.quantile` and `torch.quantile` have it, to the accuracy of the bins; NaN if there is none.

    Of the numbers beyond the bins the smallest and the largest are exact, and the others are taken to be evenly spread,
    on a logarithmic axis, from there to the bins.

    Args:
        histogram: of the numbers.
        q: from 0 to 1.
    """
    cumulative = histogram.counts.cumsum(0)
    return _quantile(int(cumulative[-1]), lambda rank: _at(rank, histogram, cumulative), q)


def signed_quantile(above: Histogram, below: Histogram, q: float) -> float:
    """The same of numbers of either sign.

    Args:
        above: of those that are at least 0.
        below: of the others, without their sign.
        q: from 0 to 1.
    """
    of_above, of_below = (x.counts.cumsum(0) for x in (above, below))
    negative, others = int(of_below[-1]), int(of_above[-1])

    def at(rank: int) -> float:
        if rank < negative:
            return -_at(negative - 1 - rank, below, of_below)
        return _at(rank - negative, above, of_above)

    return _quantile(negative + others, at, q)


def _quantile(n: int, at: Callable[[int], float], q: float) -> float:
    """The quantile of n numbers, of which one gives that with so many before it in order."""
    if n == 0:
        return math.nan
    place = Fraction(q) * (n - 1)
    if abs(place - round(place)) <= (n - 1) * 2.0**-52:  # as 0.9 of ten is, but for its digits
        place = Fraction(round(place))
    below = math.floor(place)
    share = float(place - below)
    low = at(below)
    # Between two neighbours in order, each of which is known to the accuracy of its bin.
    if share == 0 or low == math.inf:
        return low
    high = at(below + 1)
    return low + share * (high - low)


def _at(rank: int, histogram: Histogram, cumulative: Tensor) -> float:
    """The number with so many before it in order."""
    counts, smallest, largest = histogram
    place = int(torch.searchsorted(cumulative, rank, right=True))
    last = len(counts) - 1
    if place in (0, last):
        return math.inf if place else 0.0
    if rank == cumulative[ZERO]:
        return smallest
    if rank == cumulative[HUGE] - 1:
        return largest
    if place in (1, last - 1):
        begin, end = (smallest, min(2.0**LOWEST, largest)) if place == 1 else (max(2.0**HIGHEST, smallest), largest)
        number = rank - int(cumulative[place - 1])
        return float(begin * (end / begin) ** ((number + 0.5) / int(counts[place])))
    begin, end = (_edge(place - k, histogram.fineness) for k in (2, 1))
    return min(max(2 * begin * end / (begin + end), smallest), largest)
