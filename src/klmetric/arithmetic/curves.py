# mypy: disable-error-code="no-any-return, no-untyped-call"
r"""The convex curves that closed forms are made of, to the last digit also where they touch 0.

Nearly all of it is one curve of a ratio r of parameters,

.. math:: r - 1 - \log r \ge 0,

which is the Bregman divergence of the logarithm, and times x that of :math:`x \log x - x`, for r = y/x:
:math:`x \log(x/y) - x + y`. The gamma function brings one more, `lgamma_rest`.

All functions here take float64, and broadcast. What they divide by or take the logarithm of is made harmless where the
branch is not taken, so that gradients, also second ones, are finite where the divergence is smooth.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klmetric.arithmetic.tracing import has_gradient, may_look

# Within this distance of r = 1 the curve is a series; beyond it the plain form, which no longer cancels.
NEAR = 0.125
# From here on the asymptotic series of the gamma function has every digit. Below, its recurrence leads up to it.
LARGE = 8
# Bernoulli's numbers B_2, B_4, ...
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330)
# So many numbers at a time stay in the cache.
BLOCK = 8192


def in_blocks(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of numbers, one block after another where that is faster."""

    def blocked(*xs: Tensor) -> Tensor:
        first = xs[0]
        if not may_look() or first.device.type != "cpu" or has_gradient(*xs):
            return f(*xs)
        xs = torch.broadcast_tensors(*xs)
        if xs[0].numel() <= BLOCK:
            return f(*xs)
        parts = zip(*(x.reshape(-1).split(BLOCK) for x in xs), strict=True)
        return torch.cat([f(*part) for part in parts]).view(xs[0].shape)

    return blocked


def excess(r: Tensor, u: Tensor) -> Tensor:
    """The curve r - 1 - log(r), for the ratio r and what it is more than 1, which says more of a ratio near 1."""
    near = u.abs() < NEAR
    return torch.where(near, _excess_near(torch.where(near, u, 0)), u - torch.where(near, 1, r).log())


def _excess_near(u: Tensor) -> Tensor:
    # log(1 + u) is 2 (s + s^3/3 + s^5/5 + ...), and u - 2 s is u s.
    s = u / (2 + u)
    squared = s.square()
    series = torch.full_like(s, 1 / 17)
    for k in range(15, 1, -2):
        series = series * squared + 1 / k
    return s * (u - 2 * squared * series)


@in_blocks
def excess_of_product(r: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """`excess` of r s, of which u and v are what they are more than 1."""
    near = (u.abs() < 0.5) & (v.abs() < 0.5)
    return excess(r * s, torch.where(near, u + v + u * v, r * s - 1))


def of_ratio(x: Tensor, y: Tensor) -> Tensor:
    """`excess` of y / x."""
    return excess(y / x, (y - x) / x)


def of_masses(x: Tensor, y: Tensor) -> Tensor:
    """The divergence x log(x/y) - x + y of two masses, which need not sum to 1: y where x is 0."""
    nothing = x == 0
    some = torch.where(nothing, 1, x)
    return torch.where(nothing, torch.where(y < 0, math.nan, y), x * of_ratio(some, torch.where(nothing, 1, y)))


def log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """The logarithm of y / x, to the last digit also where they are nearly the same."""
    u = (y - x) / x
    near = u.abs() < NEAR
    return torch.where(near, torch.log1p(torch.where(near, u, 0)), torch.where(near, 1, y / x).log())


@in_blocks
def phi(t: Tensor) -> Tensor:
    """The curve e^t - 1 - t, to the last digit also near 0."""
    near = t.abs() < NEAR
    s, far = torch.where(near, t, 0), torch.where(near, NEAR, t)
    series = torch.full_like(t, 1 / math.factorial(11))
    for k in reversed(range(2, 11)):
        series = series * s + 1 / math.factorial(k)
    return torch.where(near, s.square() * series, torch.expm1(far) - far)


@in_blocks
def lgamma_rest(x: Tensor, y: Tensor) -> Tensor:
    r"""How far :math:`S(x) = \log\Gamma(x) - x \log x + x` at y lies above its tangent at x; never negative.

    With `of_masses(y, x)`, which is that of x log x - x, it is that of log gamma. Far out S is half a negative
    logarithm and a few powers of 1/x, each with a distance of its own. Nearer there are n steps to there,
    :math:`\log\Gamma(x) = \log\Gamma(x + n) - \sum_k \log(x + k)`, each again a logarithm.
    """
    low = torch.minimum(x, y) < LARGE
    n = torch.where(low, LARGE, 0)
    far_x, far_y, d = x + n, y + n, y - x
    u, v = d / far_x, far_x / far_y
    total = excess(far_y / far_x, u) / 2
    # Of c / x^m, with the sum of (m - i) v^i over i < m.
    powers, sums = 1 / far_x, torch.ones_like(v)
    series = powers * sums / 12
    for m in range(2, 2 * len(BERNOULLI)):
        powers, sums = powers / far_x, sums * v + m
        if m % 2:
            series = series + powers * sums * (BERNOULLI[m // 2] / (m * (m + 1)))
    total = total + u.square() * v * series
    # Of the steps, near x by their series, far from it by one logarithm of them all.
    x, y, d = torch.where(low, x, LARGE), torch.where(low, y, LARGE), torch.where(low, d, 0)
    near = (d / x).abs() < NEAR
    small, product, steps = torch.where(near, d, 0), torch.ones_like(x), torch.zeros_like(x)
    far = torch.zeros_like(x)
    for k in range(LARGE):
        steps = steps + _excess_near(small / (x + k))
        far = far + d / (x + k)
        product = product * torch.where(near, 1, (y + k) / (x + k))
    # What x log x - x changes on the way, in the form that does not cancel there.
    steps = steps + of_masses(y + LARGE, x + LARGE) - of_masses(y, x)
    a, b = torch.where(near, 1, x), torch.where(near, 1, y)
    far = far - product.log() + b * (torch.log1p(LARGE / b) - torch.log1p(LARGE / a))
    far = far + LARGE * ((b + LARGE) / (a + LARGE)).log()
    return total + torch.where(low, torch.where(near, steps, far), 0)
