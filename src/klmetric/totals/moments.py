r"""Means of several numbers of the same rows, and the standard errors of what is made of these means.

The samples are taken for independent, the rows within one are not. With S_i the weighted sum of the i-th number over a
sample and n the sum of its weights, the covariance of two means m_i = ΣS_i / Σn over G samples is

.. math:: \frac{G}{G-1} \frac{\sum_g (S_{gi} - m_i n_g) (S_{gj} - m_j n_g)}{(\sum_g n_g)^2}

that of ratios of two totals of samples; on the diagonal it is the square of `klmetric.totals.sketch.standard_error`.
A function f of the means has the variance ∇f · covariance · ∇f. (The delta method; van der Vaart: Asymptotic
Statistics, 1998, chapter 3.) The difference of two models over the same rows is the mean of one number, the difference:
what is hard about a row is hard for both, and cancels, so that it is known far better than either mean.

The state is a vector of sums (`klmetric.totals.pairs`) that merges by addition: over the samples, those of 1, n, n^2,
of each S_i, of each S_i n, and of each S_i S_j with i <= j.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import reduce
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from klmetric.totals import pairs

# The places of the sums before those of the numbers.
SAMPLES, WEIGHT, SIZES, HEAD = range(4)
# Samples that are taken at once.
AT_ONCE = pairs.MOST


def empty(numbers: int) -> Tensor:
    """No rows, of so many numbers each."""
    return torch.zeros(2 * _size(numbers), dtype=torch.float64)


def _size(numbers: int) -> int:
    return HEAD + 2 * numbers + numbers * (numbers + 1) // 2


def of_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The sums of a batch.

    Args:
        x: the numbers of each row, shape (numbers, samples, positions), in float64.
        weight: of the rows, shape (samples, positions), or which of them count; in others the numbers may be anything.
    """
    weight = weight.double()
    if x.shape[1] <= AT_ONCE:
        return _of_some(x, weight)
    parts = [_of_some(*both) for both in zip(torch.split(x, AT_ONCE, 1), torch.split(weight, AT_ONCE), strict=True)]
    if parts[0].device.type != "cpu":  # it is not waited for
        return reduce(pairs.add, parts)
    return torch.tensor(pairs.merge([part.tolist() for part in parts]), dtype=torch.float64)


def merge(parts: Tensor) -> Tensor:
    """The sums of all rows together, from the sums of their parts, shape (parts, sums)."""
    return torch.tensor(pairs.merge(parts.tolist()), dtype=torch.float64, device=parts.device)


def negative(sums: Tensor, numbers: int) -> Tensor:
    """The sums of the same rows with every number of the other sign."""
    sign = torch.ones(2, _size(numbers), dtype=torch.float64)
    sign[:, HEAD : HEAD + 2 * numbers] = -1
    return torch.where(sums == 0, 0, sums * sign.flatten())  # not -0


def _of_some(x: Tensor, weight: Tensor) -> Tensor:
    n, s = pairs.of_samples(weight), pairs.of_samples(torch.where(weight > 0, x * weight, 0))
    numbers = torch.cat([torch.stack([(n > 0).double(), n]), s])
    plain, products = numbers.sum(-1), pairs.products(numbers)
    # The first number is 1: its products are the others, but where one of them is out of range.
    of_infinite = torch.stack([torch.where(plain == -math.inf, math.nan, plain), torch.zeros_like(plain)])
    of_one = torch.where(products[0, 0].isfinite(), products[:, 0], of_infinite)
    i, j = torch.triu_indices(1 + len(s), 1 + len(s), device=s.device)
    of_two = products[:, 1:, 1:][:, i, j]
    return torch.cat([of_one[:, :2], of_two[:, :1], of_one[:, 2:], of_two[:, 1:]], 1).flatten()


def total(x: Tensor) -> Tensor:
    """The sums along the last axis as pairs, high parts and low parts, shape (2, sums).

    As `klmetric.totals.pairs` adds up numbers that are not negative. An infinite one makes its sum infinite, and one of
    either sign, or NaN, makes it NaN.
    """
    _, exponent = torch.frexp(x.abs().sum(-1, keepdim=True))
    cut = 3 * ((exponent.long().clamp(min=-1021) + 1023) << 52).view(torch.float64)
    above = (x + cut) - cut
    high, low = above.sum(-1), (x - above).sum(-1)
    both = high + low
    plain = x.sum(-1)
    is_finite = plain.isfinite() & both.isfinite()
    plain = torch.where(plain == -math.inf, math.nan, plain)
    return torch.stack([torch.where(is_finite, both, plain), torch.where(is_finite, low - (both - high), 0)])


class Means:
    """The means of the numbers, and how sure they are.

    Args:
        sums: of all rows.
        names: of the numbers.
    """

    def __init__(self, sums: Tensor, names: Sequence[str]) -> None:
        self._highs, self._lows = sums.view(2, -1).tolist()
        self._names = {name: i for i, name in enumerate(names)}

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> float:
        """The mean; NaN where nothing counts."""
        place = HEAD + self._names[name]
        if not self._highs[WEIGHT] or not math.isfinite(self._highs[WEIGHT]):
            return math.nan
        total: float = self._highs[place]
        return float(self._exact(place) / self._exact(WEIGHT)) if math.isfinite(total) else total

    def error(self, gradient: Mapping[str, float]) -> float:
        """The standard error of a function of the means, from its derivatives.

        NaN for fewer than two samples, and where something is infinite.
        """
        k = len(self._names)
        pairs_of_all = list(combinations_with_replacement(range(k), 2))
        products = {both: HEAD + 2 * k + place for place, both in enumerate(pairs_of_all)}
        slopes = {self._names[name]: slope for name, slope in gradient.items()}
        wanted = [both for both in pairs_of_all if slopes.keys() >= {*both}]
        used = [*range(HEAD), *(HEAD + i for i in slopes), *(HEAD + k + i for i in slopes)]
        numbers = [*(self._highs[place] for place in (*used, *map(products.__getitem__, wanted))), *slopes.values()]
        if not all(map(math.isfinite, numbers)) or self._highs[SAMPLES] < 2:
            return math.nan
        samples, n, nn = map(self._exact, range(HEAD))
        mean = {i: self._exact(HEAD + i) / n for i in slopes}
        with_n = {i: self._exact(HEAD + k + i) for i in slopes}
        spread = scale = Fraction(0)
        for i, j in wanted:
            product = self._exact(products[i, j])
            factor = Fraction(slopes[i]) * Fraction(slopes[j]) * (1 if i == j else 2)
            spread += factor * (product - mean[i] * with_n[j] - mean[j] * with_n[i] + mean[i] * mean[j] * nn)
            scale += abs(factor * product)
        if spread <= scale * pairs.PRECISION:  # of equal samples it is 0, and the sums are rounded
            return 0.0
        return math.sqrt(spread * samples / ((samples - 1) * n * n))

    def _exact(self, place: int) -> Fraction:
        return Fraction(self._highs[place]) + Fraction(self._lows[place])
