r"""The arithmetic: the KL divergence of each row.

Written as a Bregman divergence, every term of the sum is non-negative, so nothing cancels and no row can come out
below zero:

.. math:: KL(p \| q) = \sum_c p_c \log\frac{p_c}{q_c} = \sum_c \left( p_c \log\frac{p_c}{q_c} + q_c - p_c \right)

With :math:`s = \log(q_c / p_c)` a term is :math:`p_c (e^s - 1 - s)`, with :math:`u = q_c / p_c - 1` it is
:math:`p_c (u - \log(1 + u))`: the forms to use where q is near p. (Banerjee, Merugu, Dhillon, Ghosh: Clustering with
Bregman Divergences, JMLR 6, 2005.)

This file has that expression as it stands, differentiable and for any row. `klmetric.arithmetic.native` has the kernel,
which is faster; `klmetric.arithmetic.choose` says which file measures what.

All functions here take the classes on the last axis, in float32 or float64. A row that is no pair of distributions
gives NaN, and no other row does.
"""

import math
from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from klmetric.options import Format, Options

# Within this distance of s = 0 (or u = 0) a term takes the form above; beyond it the plain form, which no longer
# cancels and, unlike exp(s), does not overflow.
NEAR = 0.5
# Logits that a floor may not simply be added to.
LARGE = 100.0
# A class whose probability is 0 in float64 has none in p, whatever its logit: so a mask of -1e9 is a mask. The
# logarithm of the probability is then at most that of half the least number of float64.
NOTHING = -1075 * math.log(2)
# The divergences that make up a direction: whether that of p from q.
SWAPPED = {"forward": (False,), "reverse": (True,), "jeffreys": (False, True)}


def result_dtype(p: Tensor, q: Tensor) -> torch.dtype:
    """The dtype of the divergences of p and q: the one they promote to, at least float32."""
    return torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)


def are_logits(options: "Options") -> bool:
    """Whether the arithmetic takes logits (or log-probabilities), rather than probabilities."""
    return options.input_format != ("probs", "probs") or options.temperature != 1


def as_they_stand(options: "Options") -> bool:
    """Whether the arithmetic takes the inputs as they are. Others become logits of the right scale, and are rounded."""
    return options.temperature == 1 and (
        options.input_format == ("probs", "probs") or "probs" not in options.input_format
    )


def plain(p: Tensor, q: Tensor, options: "Options") -> Tensor:
    """KL divergence of each row by the expression as it stands; see `klmetric.arithmetic.choose.measure_rows`."""
    as_logits = are_logits(options)
    dtype, (p_format, q_format) = result_dtype(p, q), options.input_format
    p, q = prepare(p, p_format, options, dtype), prepare(q, q_format, options, dtype)
    parts = [kl(a, b, as_logits) for a, b in pairs(p, q, options)]
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return total.masked_fill(invalid(p, q, as_logits), math.nan)


def prepare(
    x: Tensor, input_format: "Format", options: "Options", dtype: torch.dtype, peak: Tensor | None = None
) -> Tensor:
    """Bring p or q to the dtype and the scale of both. Of a part of the classes, `peak` is the largest of all."""
    x = x.to(dtype)
    if as_they_stand(options):
        return x
    if input_format == "probs":
        # log(0) has no finite gradient: take it of 1 instead, then put -inf in its place. A negative value gives NaN.
        zero = x == 0
        x = x.masked_fill(zero, 1).log().masked_fill(zero, -math.inf)
    elif options.temperature != 1:  # apart from the largest: a quotient of large logits would have no digits to spare
        x = x - (x.amax(-1, keepdim=True).detach() if peak is None else peak)
    return x if options.temperature == 1 else x / options.temperature


def pairs(p: Tensor, q: Tensor, options: "Options") -> list[tuple[Tensor, Tensor]]:
    """The divergences that make up the direction: of the second from the first, the floor already under it."""
    every = [(q, p) if swapped else (p, q) for swapped in SWAPPED[options.direction]]
    if not options.eps:
        return every
    return [(a, floored(b, floor_of([b], options))) for a, b in every]


def floor_of(parts: Iterable[Tensor], options: "Options") -> tuple[Tensor, Tensor]:
    """What `eps` is in the scale of a row of q, given in parts of its classes: a shift, and then their floor."""
    if are_logits(options):
        # In the scale of the logits themselves, so that the classes above the floor keep every digit; of large ones
        # apart from the largest, or the floor would have none.
        peak = reduce(torch.maximum, (x.amax(-1, keepdim=True).detach() for x in parts))
        shift = torch.where(peak.abs() > LARGE, peak, 0)
        mass = reduce(torch.logaddexp, ((x - shift).logsumexp(-1, keepdim=True) for x in parts))
        return shift, mass + math.log(options.eps)
    least = reduce(torch.minimum, (x.amin(-1, keepdim=True).detach() for x in parts))
    mass = reduce(torch.add, (x.sum(-1, keepdim=True) for x in parts))
    return torch.zeros_like(least), (mass * options.eps).masked_fill(least < 0, math.nan)


def floored(x: Tensor, floor: tuple[Tensor, Tensor]) -> Tensor:
    """Classes of q with the floor under them."""
    shift, least = floor
    return torch.maximum(x - shift, least)


def kl(p: Tensor, q: Tensor, as_logits: bool) -> Tensor:
    """KL(p‖q) of each row, from logits or from probabilities that need not be normalised."""
    return _kl_of_logits(p, q) if as_logits else _kl_of_probs(p, q)


def invalid(p: Tensor, q: Tensor, as_logits: bool) -> Tensor:
    """Rows that are no distributions although the sums would not say so: a negative or infinite entry."""
    if as_logits:
        return (p.amax(-1) == math.inf) | (q.amax(-1) == math.inf)
    return (p.amin(-1) < 0) | (q.amin(-1) < 0)


def log_mass(x: Tensor, as_logits: bool) -> Tensor:
    """Logarithm of the sum of each row of unnormalised probabilities, shape (..., 1)."""
    return x.logsumexp(-1, keepdim=True) if as_logits else x.sum(-1, keepdim=True).log()


def merge_classes(log_p: Tensor, log_q: Tensor, within: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Put the divergence of a row together from blocks of its classes: the chain rule of KL.

    .. math:: KL(p \| q) = KL(P \| Q) + \sum_j P_j \, KL(p_{|j} \| q_{|j})

    with P and Q the masses of the blocks. (Cover and Thomas: Elements of Information Theory, 2nd edition, section 2.5.)
    The result is a block itself, so it can be merged again, in any grouping.

    Args:
        log_p: logarithm of the mass of p in each block, not necessarily normalised, shape (..., blocks).
        log_q: the same of q.
        within: divergence within each block, of its normalised parts. It is of no account where p has no mass.

    Returns:
        log_p, log_q and the divergence of all blocks together, each of shape (...).
    """
    share = log_p.softmax(-1)
    # Where p has mass and q has none, the masses say that it is infinite.
    inner = torch.where((share == 0) | (log_q == -math.inf), 0, share * within).sum(-1)
    return log_p.logsumexp(-1), log_q.logsumexp(-1), _kl_of_logits(log_p, log_q) + inner


def _kl_of_logits(a: Tensor, b: Tensor) -> Tensor:
    # Apart from the largest logit, so that a constant in all of them costs no digits.
    peak_a, peak_b = (x.amax(-1, keepdim=True).detach() for x in (a, b))
    w = (a - peak_a).exp()
    total = w.sum(-1, keepdim=True)
    has_mass = a - peak_a > NOTHING + total.log()
    w = torch.where(has_mass, w, 0)
    # The difference of the logits comes first: between near-equal models it is exact, and their normalisers are not.
    # Between logits that a large constant keeps apart it is not exact either.
    offset = peak_b - peak_a
    d = torch.where(offset.abs() < 1, (b - a) - offset, (b - peak_b) - (a - peak_a))
    d = torch.where(w == 0, 0, d)
    mean = (w * d).sum(-1, keepdim=True) / total
    t = d - mean
    # w e^t without w, which may be too small for a number. Where the largest of them would be too large for one, the
    # divergence is so large that it is their sum alone.
    huge = mean < -20
    shift = torch.where(huge, -mean, 0)
    weighted = (b - peak_b - mean - shift).exp()
    near = (t.abs() < NEAR) & (w > 0) & ~huge
    t_near, t_far = torch.where(near, t, 0), torch.where(near | (w == 0), 0, t)
    far = torch.where(huge, weighted, weighted - w * (1 + t_far))
    terms = torch.where(near, w * t_near.square() * _series(t_near), far).clamp_min(0)
    quotient = terms.sum(-1, keepdim=True) / total
    kl = torch.where(huge, shift + torch.where(huge, quotient, 1).log(), quotient.log1p()).squeeze(-1)
    # Also where exp(a) is too small for a number of this dtype. (The total is NaN where the row is no distribution.)
    infinite = ((b == -math.inf) & has_mass).any(-1) & (total.squeeze(-1) + offset.squeeze(-1)).isfinite()
    return kl.masked_fill(infinite, math.inf)


def _series(t: Tensor) -> Tensor:
    """The quotient (e^t - 1 - t) / t^2, to the last digit for |t| up to `NEAR`."""
    degree = 6 if t.dtype == torch.float32 else 12
    value = torch.full_like(t, 1 / math.factorial(degree + 2))
    for k in reversed(range(degree)):
        value = value * t + 1 / math.factorial(k + 2)
    return value


def _kl_of_probs(p: Tensor, q: Tensor) -> Tensor:
    missed = (q == 0) & (p > 0)
    p, q = _normalised(p), _normalised(q)
    if p.dtype == torch.float64:  # in float32 this rounds some probabilities to 0 that are none in float64
        missed &= p > 0
    # In each branch only numbers that it is for: of others the gradient would be 0 times infinity.
    near = (q - p).abs() < NEAR * p
    u = torch.where(near, q - p, 0) / torch.where(near, p, 1)
    far = ~near & (p != 0)  # where p is 0 the term is q
    log_ratio = torch.where(far, p, 1).log() - torch.where(far, q, 1).log()
    kl = _sum_of_terms(p, q, near, u - torch.log1p(u), log_ratio)
    return kl.masked_fill(missed.any(-1) & kl.isfinite(), math.inf)


def _normalised(x: Tensor) -> Tensor:
    # By the largest entry first: the sum of large ones could overflow.
    x = x / x.amax(-1, keepdim=True)
    return x / x.sum(-1, keepdim=True)


def _sum_of_terms(p: Tensor, q: Tensor, near: Tensor, term_over_p: Tensor, log_ratio: Tensor) -> Tensor:
    """Add up the terms: p times `term_over_p` where q is near p, p log(p/q) + q - p where it is not."""
    terms = torch.where(near, p * term_over_p.clamp_min(0), p * log_ratio + (q - p))
    # Rounding can leave a sum of denormal numbers below 0.
    return torch.where(p == 0, q, terms).sum(-1).clamp_min(0)
