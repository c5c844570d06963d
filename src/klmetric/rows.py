r"""The arithmetic: the KL divergence of each row.

Written as a Bregman divergence, every term of the sum is non-negative, so nothing cancels and no row can come out
below zero:

.. math:: KL(p \| q) = \sum_c p_c \log\frac{p_c}{q_c} = \sum_c \left( p_c \log\frac{p_c}{q_c} + q_c - p_c \right)

With :math:`s = \log(q_c / p_c)` a term is :math:`p_c (e^s - 1 - s)`, with :math:`u = q_c / p_c - 1` it is
:math:`p_c (u - \log(1 + u))`: the forms to use where q is near p. (Banerjee, Merugu, Dhillon, Ghosh: Clustering with
Bregman Divergences, JMLR 6, 2005.)

All functions here take the classes on the last axis, in float32 or float64. A row that is no pair of distributions
gives NaN, and no other row does.
"""

import math

import torch
from torch import Tensor

from klmetric.options import Format, Options

# Within this distance of s = 0 (or u = 0) a term takes the form above; beyond it the plain form, which no longer
# cancels and, unlike exp(s), does not overflow.
NEAR = 0.5


def kl_rows(p: Tensor, q: Tensor, options: Options) -> Tensor:
    """KL divergence of each row in nats, in the direction and at the temperature of `options`.

    Args:
        p: reference, shape (..., classes), in the first of `options.input_format`.
        q: approximation, of the shape of `p`, in the second format.
        options: see `klmetric.kl_divergence`.

    Returns:
        shape (...), in the dtype that p and q promote to, at least float32.
    """
    p, q, as_logits = _prepare(p, q, options)
    kl = _kl_of_logits if as_logits else _kl_of_probs
    floor = _floor_logits if as_logits else _floor_probs
    invalid = _invalid(p, q, as_logits)
    rows: Tensor | None = None
    for divergence, a, b in (("forward", p, q), ("reverse", q, p)):
        if options.direction in (divergence, "jeffreys"):
            one = kl(a, floor(b, options.eps) if options.eps else b)
            rows = one if rows is None else rows + one
    assert rows is not None
    return rows.masked_fill(invalid, math.nan)


def _prepare(p: Tensor, q: Tensor, options: Options) -> tuple[Tensor, Tensor, bool]:
    """Bring p and q to one dtype and one scale, and say whether that is the scale of logits."""
    dtype = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    p, q = p.to(dtype), q.to(dtype)
    if options.input_format == ("probs", "probs") and options.temperature == 1:
        return p, q, False
    p_format, q_format = options.input_format
    return (
        _logits(p, p_format, options.temperature),
        _logits(q, q_format, options.temperature),
        True,
    )


def _logits(x: Tensor, input_format: Format, temperature: float) -> Tensor:
    if input_format == "probs":
        # log(0) has no finite gradient: take it of 1 instead, then put -inf in its place. A negative value gives NaN.
        zero = x == 0
        x = x.masked_fill(zero, 1).log().masked_fill(zero, -math.inf)
    return x if temperature == 1 else x / temperature


def _invalid(p: Tensor, q: Tensor, as_logits: bool) -> Tensor:
    """Rows that are no distributions although the sums below would not say so: a negative or infinite entry."""
    if as_logits:
        return (p.amax(-1) == math.inf) | (q.amax(-1) == math.inf)
    return (p.amin(-1) < 0) | (q.amin(-1) < 0)


def _floor_logits(x: Tensor, eps: float) -> Tensor:
    # In the scale of the logits themselves, so that the classes above the floor keep every digit.
    return torch.maximum(x, x.logsumexp(-1, keepdim=True) + math.log(eps))


def _floor_probs(x: Tensor, eps: float) -> Tensor:
    return torch.maximum(x, x.sum(-1, keepdim=True) * eps)


def _kl_of_logits(a: Tensor, b: Tensor) -> Tensor:
    log_sum_a, log_sum_b = a.logsumexp(-1, keepdim=True), b.logsumexp(-1, keepdim=True)
    p, q = (a - log_sum_a).exp(), (b - log_sum_b).exp()
    # The difference of the logits comes first: between near-equal models it is exact, and their normalisers are not.
    s = torch.where(p == 0, 0, (b - a) - (log_sum_b - log_sum_a))
    near = s.abs() < NEAR
    s_near = torch.where(near, s, 0)
    return _sum_of_terms(p, q, near, torch.expm1(s_near) - s_near, -torch.where(near, 0, s))


def _kl_of_probs(p: Tensor, q: Tensor) -> Tensor:
    p, q = _normalised(p), _normalised(q)
    # Where p is 0 the term is q, whatever stands in for p here.
    some_p = torch.where(p == 0, 1, p)
    u = torch.where(p == 0, 0, q - p) / some_p
    near = u.abs() < NEAR
    u_near = torch.where(near, u, 0)
    log_ratio = torch.where(near, 1, some_p).log() - torch.where(near, 1, q).log()
    return _sum_of_terms(p, q, near, u_near - torch.log1p(u_near), log_ratio)


def _normalised(x: Tensor) -> Tensor:
    # By the largest entry first: the sum of large ones could overflow.
    x = x / x.amax(-1, keepdim=True)
    return x / x.sum(-1, keepdim=True)


def _sum_of_terms(p: Tensor, q: Tensor, near: Tensor, term_over_p: Tensor, log_ratio: Tensor) -> Tensor:
    """Add up the terms: p times `term_over_p` where q is near p, p log(p/q) + q - p where it is not."""
    terms = torch.where(near, p * term_over_p.clamp_min(0), p * log_ratio + (q - p))
    return torch.where(p == 0, q, terms).sum(-1)
