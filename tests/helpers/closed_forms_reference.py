"""What the divergence of two distributions of torch is, computed independently, from the parameters as they stand.

`integral` goes by the definition, with the density alone; `textbook` by the formulas as they are printed, in 60 digits.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import torch.distributions as D
from mpmath import digamma, exp, inf, log, loggamma, mpf, pi, sqrt

mpmath.mp.dps = 60


def number(x: Any) -> mpf:
    return mpf(float(x))


def numbers(x: Any) -> list[mpf]:
    return [number(v) for v in x.tolist()]


def success(d: Any) -> mpf:
    """The probability of 1, from what the distribution was made of."""
    return (
        number(d.probs)
        if next(n for n in vars(d) if n in ("probs", "logits")) == "probs"
        else 1 / (1 + exp(-number(d.logits)))
    )


def log_density(d: Any) -> Callable[[mpf], mpf]:
    kind = type(d)
    if kind is D.Bernoulli or kind is D.Geometric or kind is D.Binomial:
        p, n = success(d), number(getattr(d, "total_count", 1))
        if kind is D.Geometric:
            return lambda x: x * log(1 - p) + log(p)
        return lambda x: log(mpmath.binomial(n, x) * p**x * (1 - p) ** (n - x)) if 0 <= x <= n else -inf
    if kind is D.Poisson:
        rate = number(d.rate)
        return lambda x: log(rate**x) - rate - loggamma(x + 1)
    if kind is D.Beta:
        a, b = number(d.concentration1), number(d.concentration0)
        return lambda x: (a - 1) * log(x) + (b - 1) * log(1 - x) - log(mpmath.beta(a, b))
    if kind is D.ContinuousBernoulli:
        p = success(d)
        t = log(p) - log(1 - p)
        return lambda x: t * x - (log(mpmath.expm1(t) / t) if t else 0)
    if kind is D.Exponential or kind is D.Gamma or kind is D.Chi2:
        a, b = number(getattr(d, "concentration", 1)), number(d.rate)
        return lambda x: a * log(b) + (a - 1) * log(x) - b * x - loggamma(a)
    if kind is D.Pareto:
        a, s = number(d.alpha), number(d.scale)
        return lambda x: log(a) + a * log(s) - (a + 1) * log(x)
    if kind is D.Uniform:
        low, high = number(d.low), number(d.high)
        return lambda x: -log(high - low)
    if kind is D.HalfNormal:
        s = number(d.scale)
        return lambda x: log(2 / (s * sqrt(2 * pi))) - (x / s) ** 2 / 2
    m, s = number(d.loc), number(d.scale)
    return {
        D.Normal: lambda x: -log(s * sqrt(2 * pi)) - ((x - m) / s) ** 2 / 2,
        D.Laplace: lambda x: -log(2 * s) - abs(x - m) / s,
        D.Cauchy: lambda x: -log(pi * s * (1 + ((x - m) / s) ** 2)),
        D.Gumbel: lambda x: -log(s) - (x - m) / s - exp(-(x - m) / s),
    }[kind]


def places(d: Any) -> list[mpf]:
    """Where the mass of the distribution is: what lies beyond is no part of 25 digits."""
    kind = type(d)
    if kind in (D.Bernoulli, D.Binomial, D.Geometric, D.Poisson):
        return [
            mpf(x) for x in range(int(getattr(d, "total_count", 1)) + 1 if kind in (D.Bernoulli, D.Binomial) else 400)
        ]
    if kind in (D.Beta, D.ContinuousBernoulli):
        return [mpf(x) / 8 for x in range(9)]
    if kind in (D.Exponential, D.Gamma, D.Chi2):
        return [x / number(d.rate) for x in (0, 1, 5, 20, 50, 120)]
    if kind is D.Pareto:
        return [number(d.scale) * exp(x / number(d.alpha)) for x in (0, 1, 5, 20, 50, 100)]
    if kind is D.Uniform:
        return [number(d.low), number(d.high)]
    if kind is D.HalfNormal:
        return [x * number(d.scale) for x in (0, 2, 5, 12)]
    m, s = number(d.loc), number(d.scale)
    spread = {
        D.Normal: (-12, -5, -2, 0, 2, 5, 12),
        D.Laplace: (-80, -20, -5, 0, 5, 20, 80),
        D.Gumbel: (-5, -2, 0, 5, 20, 80),
        D.Cauchy: (-inf, -10, 0, 10, inf),
    }[kind]
    return [m + s * x for x in spread]


def integral(p: Any, q: Any) -> mpf:
    """KL(p‖q) by the definition, to 20 digits or so."""
    a, b = log_density(p), log_density(q)

    def term(x: mpf) -> mpf:
        value = a(x)
        return mpf(0) if value == -inf else exp(value) * (value - b(x))

    where = places(p)
    if type(p) in (D.Bernoulli, D.Binomial, D.Geometric, D.Poisson):
        return mpmath.fsum(term(x) for x in where)
    inside = {number(x) for x in (getattr(q, "loc", where[0]),) if where[0] < number(x) < where[-1]}
    with mpmath.workdps(30):
        return mpmath.quad(term, sorted({*where, *inside}))


def _binary(p: mpf, q: mpf) -> mpf:
    terms = [(p, q), (1 - p, 1 - q)]
    return mpmath.fsum(a * log(a / b) if b else inf for a, b in terms if a)


def _gamma(a: mpf, b: mpf, c: mpf, d: mpf) -> mpf:
    return (a - c) * digamma(a) - loggamma(a) + loggamma(c) + c * log(b / d) + a * (d - b) / b


def _dirichlet(a: list[mpf], c: list[mpf]) -> mpf:
    total_a, total_c = mpmath.fsum(a), mpmath.fsum(c)
    pairs = list(zip(a, c, strict=True))
    return (
        loggamma(total_a)
        - loggamma(total_c)
        + mpmath.fsum(loggamma(y) - loggamma(x) + (x - y) * (digamma(x) - digamma(total_a)) for x, y in pairs)
    )


def _normal(m: mpf, s: mpf, n: mpf, t: mpf) -> mpf:
    return log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - mpf(1) / 2


def _laplace(m: mpf, s: mpf, n: mpf, t: mpf) -> mpf:
    d = abs(m - n)
    return log(t / s) + (s * exp(-d / s) + d) / t - 1


def _gumbel(m: mpf, s: mpf, n: mpf, t: mpf) -> mpf:
    e = mpmath.euler
    return log(t / s) + e * (s / t - 1) + (m - n) / t + exp((n - m) / t) * mpmath.gamma(1 + s / t) - 1


def _cauchy(m: mpf, s: mpf, n: mpf, t: mpf) -> mpf:
    return log(((s + t) ** 2 + (m - n) ** 2) / (4 * s * t))


def _continuous_bernoulli(p: mpf, q: mpf) -> mpf:
    s, t = (log(x / (1 - x)) for x in (p, q))

    def norm(x: mpf) -> mpf:
        return log(mpmath.expm1(x) / x) if x else mpf(0)

    mean = 1 / (1 - exp(-s)) - 1 / s if s else mpf(1) / 2
    return norm(t) - norm(s) - (t - s) * mean


def covariance(d: Any) -> mpmath.matrix:
    if isinstance(d, D.LowRankMultivariateNormal):
        factor = mpmath.matrix(d.cov_factor.tolist())
        return factor * factor.T + mpmath.diag(numbers(d.cov_diag))
    name = next(n for n in vars(d) if n in ("covariance_matrix", "precision_matrix", "scale_tril"))
    given = mpmath.matrix(getattr(d, name).tolist())
    return {"covariance_matrix": given, "precision_matrix": given**-1, "scale_tril": given * given.T}[name]


def multivariate_normal(p: Any, q: Any) -> mpf:
    a, b = covariance(p), covariance(q)
    between = b**-1 * a
    d = mpmath.matrix(numbers(p.loc)) - mpmath.matrix(numbers(q.loc))
    trace = mpmath.fsum(between[i, i] for i in range(a.rows))
    return (trace - a.rows - log(mpmath.det(between)) + (d.T * b**-1 * d)[0]) / 2


def wishart(p: Any, q: Any) -> mpf:
    a, b = covariance(p), covariance(q)
    n, m, size = number(p.df), number(q.df), a.rows
    between = b**-1 * a
    trace = mpmath.fsum(between[i, i] for i in range(size))
    gammas = mpmath.fsum(
        loggamma((m - i) / 2) - loggamma((n - i) / 2) + (n - m) / 2 * digamma((n - i) / 2) for i in range(size)
    )
    return -m / 2 * log(mpmath.det(between)) + n / 2 * (trace - size) + gammas


def textbook(p: Any, q: Any) -> mpf:
    """KL(p‖q) of two of one family."""
    kind = type(p)
    if isinstance(p, (D.MultivariateNormal, D.LowRankMultivariateNormal)):
        return multivariate_normal(p, q)
    if kind is D.Wishart:
        return wishart(p, q)
    if kind in (D.Bernoulli, D.Binomial, D.Geometric):
        kl = _binary(success(p), success(q))
        return kl * number(p.total_count) if kind is D.Binomial else kl / success(p) if kind is D.Geometric else kl
    if kind is D.ContinuousBernoulli:
        return _continuous_bernoulli(success(p), success(q))
    if kind is D.Dirichlet:
        return _dirichlet(numbers(p.concentration), numbers(q.concentration))
    names = {
        D.Beta: ("concentration1", "concentration0"),
        D.Gamma: ("concentration", "rate"),
        D.Exponential: ("rate",),
        D.Poisson: ("rate",),
        D.HalfNormal: ("scale",),
        D.Pareto: ("alpha", "scale"),
        D.Uniform: ("low", "high"),
    }.get(kind, ("loc", "scale"))
    a, b = ([number(getattr(d, name)) for name in names] for d in (p, q))
    formulas: dict[type, Callable[[], mpf]] = {
        D.Beta: lambda: _dirichlet(a, b),
        D.Gamma: lambda: _gamma(*a, *b),
        D.Exponential: lambda: _gamma(mpf(1), *a, mpf(1), *b),
        D.Poisson: lambda: (a[0] * log(a[0] / b[0]) if a[0] else 0) - a[0] + b[0],
        D.HalfNormal: lambda: _normal(mpf(0), *a, mpf(0), *b),
        D.Pareto: lambda: b[0] * log(a[1] / b[1]) - log(b[0] / a[0]) + b[0] / a[0] - 1,
        D.Uniform: lambda: log((b[1] - b[0]) / (a[1] - a[0])),
        D.Normal: lambda: _normal(*a, *b),
        D.Laplace: lambda: _laplace(*a, *b),
        D.Gumbel: lambda: _gumbel(*a, *b),
        D.Cauchy: lambda: _cauchy(*a, *b),
    }
    return formulas[kind]()
