"""Sums that do not depend on the order: each one a pair of float64, high + low, of some hundred bits.

What a sum in float64 loses depends on the order, and so on the batch size and the number of processes; what a pair
loses is far below the last digit of any result. A vector of sums holds the high parts of all of them, then the low
parts. All sums are of non-negative numbers.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from klmetric.arithmetic.tracing import has_gradient, may_look

# Numbers that are added up at once: adding takes copies of them in float64.
PIECE = 2**18
# To which sums of products are known.
PRECISION = Fraction(1, 2**80)
# So few numbers are added up sooner by Python than by torch.
FEW = 256
# So many numbers of a row, at most, have products that add up exactly.
MOST = 2**11
# Adding this rounds numbers below 2 to 19 bits after the point, and to 39.
_COARSE, _FINE = 1.5 * 2.0**33, 1.5 * 2.0**13


def merge(parts: Sequence[Sequence[float]]) -> list[float]:
    """Vectors of sums together, each sum rounded once."""
    columns = list(zip(*parts, strict=True))
    n = len(columns) // 2
    sums = [exact_sum(high + low) for high, low in zip(columns[:n], columns[n:], strict=True)]
    return [part for half in zip(*sums, strict=True) for part in half]


def add(a: Tensor, b: Tensor) -> Tensor:
    """`merge` of two as tensors, in the operations of a device, without waiting for it (Knuth's TwoSum)."""
    (a_high, a_low), (b_high, b_low) = a.view(2, -1), b.view(2, -1)
    high = a_high + b_high
    of_b = high - a_high
    lost = (a_high - (high - of_b)) + (b_high - of_b)
    low = torch.where(high.isfinite(), lost + (a_low + b_low), 0)
    both = high + low
    low = torch.where(both.isfinite(), low - (both - high), 0)
    return torch.cat([both, low])


def total(x: Tensor) -> Tensor:
    """The sum of non-negative float64 numbers as a pair, shape (2,); the gradient goes through it."""
    if not may_look():  # a batch alone: nothing is added to it
        plain = x.sum()
        return torch.stack([plain, torch.zeros_like(plain)])
    if x.device.type == "cpu" and not has_gradient(x):
        return torch.tensor(total_in_pieces(x), dtype=torch.float64)
    return _total_on_a_grid(x)


def total_in_pieces(x: Tensor) -> tuple[float, float]:
    """The same as two numbers, of numbers in any dtype on the CPU, without a copy of all of them."""
    if x.numel() <= FEW:
        return exact_sum(x.reshape(-1).tolist())
    pieces = (x,) if x.numel() <= PIECE else torch.split(x.reshape(-1), PIECE)
    return exact_sum([part for piece in pieces for part in _total_on_a_grid(piece.double()).tolist()])


def _total_on_a_grid(x: Tensor) -> Tensor:
    """The sum of non-negative float64 numbers, no more than `PIECE`, as a pair.

    Each number is cut at a power of two. The parts above have so few bits that their sum is exact in any order; those
    below are so small that what their own sum loses is below 2^-67 of the total, and mostly nothing at all.
    (The first step of Rump, Ogita and Oishi, "Accurate floating-point summation", 2008.)
    """
    plain = x.sum()
    _, exponent = torch.frexp(plain.detach())
    # plain < 2^exponent, and the spacing of numbers beside `cut` is 2^(exponent - 51). The power of two is made of its
    # bits, because torch.ldexp had the range of the default dtype in earlier versions.
    cut = 3 * ((exponent.long().clamp(min=-1021) + 1023) << 52).view(torch.float64)
    above = (x + cut) - cut
    high, low = above.sum(), (x - above).sum()
    both = high + low
    pair = torch.stack([both, low - (both - high)])
    return torch.where(cut.isfinite() & plain.isfinite(), pair, torch.stack([plain, torch.zeros_like(plain)]))


def total_of_products(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the products of non-negative float64 numbers as a pair, without the rounding of the products.

    (Dekker's product, "A floating-point technique for extending the available precision", 1971.)
    """
    product = x * y
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    lost = ((x_high * y_high - product) + (x_high * y_low + x_low * y_high)) + x_low * y_low
    return total(torch.cat([product, torch.where(lost.isfinite(), lost, 0)]))


def products(x: Tensor) -> Tensor:
    """The sums of the products of every two rows, as pairs of shape (2, rows, rows), of up to `MOST` numbers a row.

    With the power of two that makes the largest of a row 1 to 2, its numbers are cut at 2^-19 and at 2^-39. Products of
    first parts, and of a first and a second part, are so few bits that a product of matrices adds them up exactly,
    whatever the order. What is lost of the others is below 2^-80 of the squares. With a number that is not finite both
    parts are NaN. (Ozaki, Ogita, Oishi, Rump: "Error-free transformations of matrix multiplication by using fast
    routines of matrix multiplication and its applications", Numerical Algorithms 59, 2012.)
    """
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(len(x), 1)
    power = (largest.view(torch.int64) & -(2**52)).view(torch.float64)  # without its fraction
    coarse, fine = power * _COARSE, power * _FINE
    first = (x + coarse) - coarse
    rest = x - first
    second = (rest + fine) - fine
    high, middle, low = (first @ part.T for part in (first, second, rest - second))
    middle, low = middle + middle.T, (low + low.T) + rest @ rest.T
    # Dekker's sum, which is exact also of a smaller first number, if that ends before the last bit of the second.
    both = high + middle
    low = (middle - (both - high)) + low
    high = both + low
    return torch.stack([high, low - (high - both)])


def of_samples(x: Tensor) -> Tensor:
    """The sums along the last axis, over each sample, the same to the last bit whatever other samples there are."""
    return x[..., 0] if x.shape[-1] == 1 else x.cumsum(-1)[..., -1]  # one by one, as the kernel does


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last 26 bits."""
    c = (2**27 + 1) * x
    high = c - (c - x)
    return high, x - high


def exact_sum(numbers: Sequence[float]) -> tuple[float, float]:
    """The sum as a pair, each part rounded once."""
    try:
        high = math.fsum(numbers)
        return high, math.fsum([*numbers, -high]) if math.isfinite(high) else 0.0
    except OverflowError:
        return math.nan if any(map(math.isnan, numbers)) else math.inf, 0.0
