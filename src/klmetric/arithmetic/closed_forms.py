# mypy: disable-error-code="no-any-return, no-untyped-call"
# (The parameters of the distributions of torch have no types.)
r"""Closed forms of the divergence of two distributions, in the place of those of torch that lose digits.

torch's forms subtract numbers that are nearly the same where the distributions are. Here each is a sum of terms that
cannot be negative, so that nothing is left to cancel. They are made of the curves in `klmetric.arithmetic.curves`.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import kl as torchs
from torch.distributions.multivariate_normal import _batch_mahalanobis

from klmetric.arithmetic import plain
from klmetric.arithmetic.curves import (
    BERNOULLI,
    LARGE,
    excess,
    excess_of_product,
    in_blocks,
    lgamma_rest,
    log_ratio,
    of_masses,
    of_ratio,
    phi,
)
from klmetric.arithmetic.tracing import may_look
from klmetric.options import Format, Options

Form: TypeAlias = Callable[[Any, Any], Tensor]

# The places in 0 to 1 and the weights of the quadrature of Gauss and Legendre.
GAUSS = (
    (0.5, 0.28444444444444444),
    (0.23076534494715845, 0.23931433524968324),
    (0.7692346550528415, 0.23931433524968324),
    (0.046910077030668, 0.11846344252809454),
    (0.953089922969332, 0.11846344252809454),
)
# An event of at most so many numbers has a covariance matrix small enough to be made.
SMALL = 256


def _bernoulli_poisson(p: Tensor, rate: Tensor) -> Tensor:
    return of_masses(p, rate) + of_masses(1 - p, torch.ones_like(rate))


def _gamma(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    # The ratio of the means, and the concentrations apart from it.
    return c * excess_of_product(a / c, (a - c) / c, d / b, (d - b) / b) + lgamma_rest(a, c)


def _gamma_exponential(a: Tensor, b: Tensor, rate: Tensor) -> Tensor:
    return _gamma(a, b, torch.ones_like(rate), rate)


def _exponential_gamma(rate: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return _gamma(torch.ones_like(rate), rate, c, d)


def _dirichlet(a: Tensor, c: Tensor) -> Tensor:
    # As of gammas with one rate, less what their sum, a gamma too, already says.
    sum_a, sum_c = a.sum(-1, keepdim=True), c.sum(-1, keepdim=True)
    more = (c - a).sum(-1, keepdim=True) / sum_a
    terms = c * excess_of_product(a / c, (a - c) / c, sum_c / sum_a, more) + lgamma_rest(a, c)
    return terms.sum(-1) - lgamma_rest(sum_a, sum_c).squeeze(-1)


def _normal(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    r, u = s / t, (s - t) / t
    return (excess(r.square(), u * (2 + u)) + ((m - n) / t).square()) / 2


def _half_normal(s: Tensor, t: Tensor) -> Tensor:
    return _normal(s, s, s, t)


def _laplace(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    # Not `abs`: its derivative at 0 would be lost on the second one.
    d = torch.where(m < n, n - m, m - n)
    return of_ratio(t, s) + s / t * phi(-d / s)


def _gumbel(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    return _gumbels_apart((n - m) / t, s / t)


def _gumbels_apart(d: Tensor, r: Tensor) -> Tensor:
    """From the distance of the locations and the scale of p, both in scales of q."""
    one = torch.ones_like(r)
    log_gamma = of_masses(r, one) + lgamma_rest(one, r)
    return phi(d + torch.lgamma(1 + r)) + log_gamma


def _weibull(s: Tensor, a: Tensor, t: Tensor, b: Tensor) -> Tensor:
    # The negative logarithm of what is Weibull's is Gumbel's, at -log s and of the scale 1/a.
    return _gumbels_apart(b * log_ratio(t, s), b / a)


def _normal_gumbel(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    d, r = (m - n) / t, s / t
    return d - r.log() + (r.square() / 2 - d).exp() - (1 + math.log(2 * math.pi)) / 2


def _cauchy(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    return torch.log1p(((s - t).square() + (m - n).square()) / (4 * s * t))


def _pareto(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return torch.where(s < t, math.inf, b * log_ratio(t, s) + of_ratio(a, b))


def _uniform(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    outside = (c > a) | (d < b)
    return torch.where(outside, math.inf, torch.log1p(torch.where(outside, 0, ((d - b) + (a - c)) / (b - a))))


def _continuous_bernoulli(s: Tensor, t: Tensor) -> Tensor:
    """From the logits: how far `_log_norm` at t lies above its tangent at s."""
    d = t - s
    near = d.abs() < 0.5
    h = torch.where(near, d, 0)
    # d^2 times the integral of (1 - x) times the second derivative at s + x d, from 0 to 1.
    integral = sum(w * (1 - x) * _log_norm(s + x * h, 2) for x, w in GAUSS)
    return torch.where(near, h.square() * integral, _log_norm(t) - _log_norm(s) - d * _log_norm(s, 1))


def _log_norm(t: Tensor, derivative: int = 0) -> Tensor:
    """Of the integral of e^(t (x - 1/2)) over 0 to 1, the logarithm, or its first or second derivative by t."""
    near = t.abs() < 1
    s, size = torch.where(near, t, 0), torch.where(near, 1, t).abs()
    series = torch.zeros_like(s)
    for n, b in reversed([*zip(range(2, 22, 2), BERNOULLI, strict=True)]):
        c = b / math.factorial(n)
        series = series * s.square() + (c / n, c, c * (n - 1))[derivative]
    less = -torch.expm1(-size)
    far = (
        size / 2 + less.log() - size.log(),
        (1 / less - 1 / size - 1 / 2) * t.sign(),
        1 / size.square() - torch.exp(-size) / less.square(),
    )[derivative]
    return torch.where(near, series * (s.square(), s, 1)[derivative], far)


def _continuous_bernoulli_exponential(t: Tensor, rate: Tensor) -> Tensor:
    mean, _, entropy = _moments(t)
    return rate * mean - rate.log() - entropy


def _continuous_bernoulli_uniform(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _from_uniform(_continuous_bernoulli(t, torch.zeros_like(t)), low, high)


def _beta_uniform(a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return _from_uniform(_dirichlet(a, torch.ones_like(a)), low, high)


def _from_uniform(kl: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of p within 0 to 1 from a uniform distribution, where it is `kl` from that on 0 to 1."""
    outside = (low > 0) | (high < 1)
    return torch.where(outside, math.inf, kl + torch.where(outside, 1, high - low).log())


def _beta_continuous_bernoulli(a: Tensor, t: Tensor) -> Tensor:
    mean = a[..., 0] / a.sum(-1)
    return _dirichlet(a, torch.ones_like(a)) + _log_norm(t) - t * (mean - 1 / 2)


def _uniform_continuous_bernoulli(low: Tensor, high: Tensor, t: Tensor) -> Tensor:
    kl = _log_norm(t) - t * ((high - 1 / 2) + (low - 1 / 2)) / 2
    return torch.where((low < 0) | (high > 1), math.inf, kl - (high - low).log())


def _uniform_beta(low: Tensor, high: Tensor, c: Tensor) -> Tensor:
    outside = (low < 0) | (high > 1)
    of_logs = [(low, high), (1 - high, 1 - low)]
    more = sum((c[..., i] - 1) * _mean_log(*ends, outside) for i, ends in enumerate(of_logs))
    return torch.where(outside, math.inf, _dirichlet(torch.ones_like(c), c) - more - (high - low).log())


def _uniform_gamma(low: Tensor, high: Tensor, c: Tensor, rate: Tensor) -> Tensor:
    outside = low < 0
    mean_log = _mean_log(low, high, outside) - 1
    kl = torch.lgamma(c) - c * rate.log() - (c - 1) * mean_log + rate * (high + low) / 2
    return torch.where(outside, math.inf, kl - (high - low).log())


def _uniform_pareto(low: Tensor, high: Tensor, alpha: Tensor, scale: Tensor) -> Tensor:
    outside = low < scale
    mean_log = _mean_log(low, high, outside) - 1
    kl = alpha * (mean_log - scale.log()) + mean_log - alpha.log()
    return torch.where(outside, math.inf, kl - (high - low).log())


def _mean_log(low: Tensor, high: Tensor, outside: Tensor) -> Tensor:
    """The mean of 1 + log x from low to high, which is 0 from 0 to 1. It is of no account outside."""
    high = torch.where(outside, 1, high)
    inner = (low > 0) & ~outside
    low = torch.where(inner, low, high / 2)
    return high.log() + torch.where(inner, low * log_ratio(low, high) / (high - low), 0)


def _moments(p: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the variance and the entropy; of a tensor, those of the continuous Bernoulli with these logits."""
    if isinstance(p, td.ContinuousBernoulli):
        return _moments(p.logits)
    if isinstance(p, Tensor):
        slope = _log_norm(p, 1)
        return slope + 1 / 2, _log_norm(p, 2), _log_norm(p) - p * slope
    return p.mean, p.variance, p.entropy()


def _onto_normal(p: Any, q: Any) -> Tensor:
    """Of the normal distribution that has the moments of p, and of p from it."""
    mean, variance, entropy = _moments(p)
    infinite = variance == math.inf
    mean, variance = torch.where(infinite, 0, mean), torch.where(infinite, 1, variance)
    # The entropy that p lacks. Next to nothing where the concentration is large: the leading terms are gone already.
    if isinstance(p, td.Gamma):
        beyond = 1 / (2 * p.concentration) - _of_stirling(p.concentration, 1)
    elif isinstance(p, td.Beta):
        a, b = p.concentration1, p.concentration0
        beyond = 1 / (2 * a) + 1 / (2 * b) - 1 / (a + b) - torch.log1p(1 / (a + b)) / 2
        beyond = beyond - _of_stirling(a, 1) - _of_stirling(b, 1) + _of_stirling(a + b, 2)
    else:
        beyond = (2 * math.pi * math.e * variance).log() / 2 - entropy
    return torch.where(infinite, math.inf, _normal(mean, variance.sqrt(), q.loc, q.scale) + beyond)


def _of_stirling(x: Tensor, offset: int) -> Tensor:
    """T - (x - offset) T', of T = log gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2, what Stirling leaves."""
    low = x < LARGE
    small, large = torch.where(low, x, 1), torch.where(low, LARGE, x)
    value = torch.lgamma(small) - (small - 1 / 2) * small.log() + small - math.log(2 * math.pi) / 2
    slope = torch.digamma(small) - small.log() + 1 / (2 * small)
    series = torch.zeros_like(large)
    for m, b in reversed([*zip(range(1, 2 * len(BERNOULLI), 2), BERNOULLI, strict=True)]):
        series = series / large.square() + b / (m * (m + 1)) * (1 + m * (large - offset) / large)
    return torch.where(low, value - (small - offset) * slope, series / large)


def _classes(p: Any, q: Any) -> Tensor:
    """Of categorical distributions, and of Bernoulli's as those of two classes: by the arithmetic of the rows."""
    (a, p_format), (b, q_format) = _row(p), _row(q)
    if a.shape[-1] != b.shape[-1]:
        raise NotImplementedError
    return plain.plain(a, b, Options(input_format=(p_format, q_format)))


def _row(d: Any) -> tuple[Tensor, Format]:
    name: Format = "probs" if "probs" in vars(d) else "logits"  # whichever it was made from
    x = getattr(d, name)
    if isinstance(d, td.Categorical):
        return x, name
    if name == "probs":
        return torch.stack([1 - x, x], -1), name
    # Apart from the larger of the two, which may be infinite.
    return torch.stack([torch.where(x > 0, -x, 0), torch.where(x > 0, 0, x)], -1), name


def _one_hot(p: Any, q: Any) -> Tensor:
    return _classes(p._categorical, q._categorical)


def _binomial(p: Any, q: Any) -> Tensor:
    unknown = p.total_count < q.total_count
    if may_look() and bool(unknown.any()):
        raise NotImplementedError
    # The more trials of p are beyond what q can count, unless none succeeds.
    infinite = (p.total_count > q.total_count) & (p.probs > 0)
    return torch.where(infinite, math.inf, q.total_count * _classes(p, q)).masked_fill(unknown, math.nan)


def _geometric(p: Any, q: Any) -> Tensor:
    return _classes(p, q) / p.probs


def _poisson_binomial(p: Any, q: Any) -> Tensor:
    trials = q.total_count if isinstance(q, td.Binomial) else 1
    return torch.where(p.rate == 0, -trials * torch.log1p(-q.probs), _infinite(p, q))


def _infinite(p: Any, q: Any) -> Tensor:
    """Of p from a q that has no mass where p has; NaN where a parameter is."""
    every = [getattr(d, name) for d in (p, q) for name in d.arg_constraints]
    return torch.where(sum(x * 0 for x in every) == 0, math.inf, math.nan)


def _multivariate_normal(p: Any, q: Any) -> Tensor:
    if p.event_shape != q.event_shape:
        raise NotImplementedError
    tril = _scale_tril(q)
    r, u, below = _of_trils(_scale_tril(p), tril)
    distance: Tensor = _batch_mahalanobis(tril, q.loc - p.loc)
    return (excess(r, u).sum(-1) + below + distance) / 2


def _scale_tril(d: Any) -> Tensor:
    if isinstance(d, td.LowRankMultivariateNormal):
        factor, diag = d._unbroadcasted_cov_factor, d._unbroadcasted_cov_diag
        return torch.linalg.cholesky(factor @ factor.mT + torch.diag_embed(diag))
    return d._unbroadcasted_scale_tril


def _of_trils(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of q^-1 p the squares of the diagonal, what they are more than 1, and the sum of the squares below it."""
    below = torch.linalg.solve_triangular(q, p - q, upper=False).tril(-1).square().sum((-2, -1))
    s, t = (x.diagonal(dim1=-2, dim2=-1) for x in (p, q))
    u = (s - t) / t
    return (s / t).square(), u * (2 + u), below


def _low_rank(torchs_form: Form) -> Form:
    def form(p: Any, q: Any) -> Tensor:
        return (_multivariate_normal if p.event_shape[0] <= SMALL else torchs_form)(p, q)

    return form


def _exponential_family(p: Any, q: Any) -> Tensor:
    both = isinstance(p, td.Wishart) and isinstance(q, td.Wishart)
    return (_wishart if both else torchs._kl_expfamily_expfamily)(p, q)


def _wishart(p: Any, q: Any) -> Tensor:
    if p.event_shape != q.event_shape:
        raise NotImplementedError
    # As gammas of half the degrees of freedom, one of each dimension.
    a, c = p.df.unsqueeze(-1) / 2, q.df.unsqueeze(-1) / 2
    r, u, below = _of_trils(_scale_tril(p), _scale_tril(q))
    less = torch.arange(p.event_shape[-1], dtype=a.dtype, device=a.device) / 2
    of_gammas = lgamma_rest(a - less, c - less) + of_masses(c - less, a - less) - of_masses(c, a)
    return (c * excess_of_product(a / c, (a - c) / c, r, u) + of_gammas).sum(-1) + a.squeeze(-1) * below


def _of(f: Callable[..., Tensor], p_names: str, q_names: str) -> Form:
    """The form that is a function of these parameters of p and q."""

    def form(p: Any, q: Any) -> Tensor:
        return f(*(_parameter(p, name) for name in p_names.split()), *(_parameter(q, name) for name in q_names.split()))

    return form


def _parameter(d: Any, name: str) -> Tensor:
    return d._dirichlet.concentration if isinstance(d, td.Beta) else getattr(d, name)


def _elementwise(f: Callable[..., Tensor], p_names: str, q_names: str | None = None) -> Form:
    return _of(in_blocks(f), p_names, p_names if q_names is None else q_names)


_OWN: dict[tuple[type, type], Form] = {
    (td.Bernoulli, td.Bernoulli): _classes,
    (td.Bernoulli, td.Poisson): _elementwise(_bernoulli_poisson, "probs", "rate"),
    (td.Beta, td.Beta): _of(_dirichlet, "concentration", "concentration"),
    (td.Beta, td.ContinuousBernoulli): _of(_beta_continuous_bernoulli, "concentration", "logits"),
    (td.Beta, td.Normal): _onto_normal,
    (td.Beta, td.Uniform): _of(_beta_uniform, "concentration", "low high"),
    (td.Binomial, td.Binomial): _binomial,
    (td.Categorical, td.Categorical): _classes,
    (td.Cauchy, td.Cauchy): _elementwise(_cauchy, "loc scale"),
    (td.ContinuousBernoulli, td.ContinuousBernoulli): _elementwise(_continuous_bernoulli, "logits"),
    (td.ContinuousBernoulli, td.Exponential): _elementwise(_continuous_bernoulli_exponential, "logits", "rate"),
    (td.ContinuousBernoulli, td.Normal): _onto_normal,
    (td.ContinuousBernoulli, td.Uniform): _elementwise(_continuous_bernoulli_uniform, "logits", "low high"),
    (td.Dirichlet, td.Dirichlet): _of(_dirichlet, "concentration", "concentration"),
    (td.Exponential, td.Exponential): _elementwise(of_ratio, "rate"),
    (td.Exponential, td.Gamma): _elementwise(_exponential_gamma, "rate", "concentration rate"),
    (td.Exponential, td.Normal): _onto_normal,
    (td.ExponentialFamily, td.ExponentialFamily): _exponential_family,
    (td.Gamma, td.Exponential): _elementwise(_gamma_exponential, "concentration rate", "rate"),
    (td.Gamma, td.Gamma): _elementwise(_gamma, "concentration rate"),
    (td.Gamma, td.Normal): _onto_normal,
    (td.Geometric, td.Geometric): _geometric,
    (td.Gumbel, td.Gumbel): _elementwise(_gumbel, "loc scale"),
    (td.Gumbel, td.Normal): _onto_normal,
    (td.HalfNormal, td.HalfNormal): _elementwise(_half_normal, "scale"),
    (td.Laplace, td.Laplace): _elementwise(_laplace, "loc scale"),
    (td.Laplace, td.Normal): _onto_normal,
    (td.MultivariateNormal, td.MultivariateNormal): _multivariate_normal,
    (td.Normal, td.Gumbel): _elementwise(_normal_gumbel, "loc scale"),
    (td.Normal, td.Normal): _elementwise(_normal, "loc scale"),
    (td.OneHotCategorical, td.OneHotCategorical): _one_hot,
    (td.Pareto, td.Normal): _onto_normal,
    (td.Pareto, td.Pareto): _elementwise(_pareto, "alpha scale"),
    (td.Poisson, td.Binomial): _poisson_binomial,
    (td.Poisson, td.Poisson): _elementwise(of_masses, "rate"),
    (td.Uniform, td.Beta): _of(_uniform_beta, "low high", "concentration"),
    (td.Uniform, td.ContinuousBernoulli): _elementwise(_uniform_continuous_bernoulli, "low high", "logits"),
    (td.Uniform, td.Gamma): _elementwise(_uniform_gamma, "low high", "concentration rate"),
    (td.Uniform, td.Normal): _onto_normal,
    (td.Uniform, td.Pareto): _elementwise(_uniform_pareto, "low high", "alpha scale"),
    (td.Uniform, td.Uniform): _elementwise(_uniform, "low high"),
}
_LOW_RANK = (
    (td.LowRankMultivariateNormal, td.LowRankMultivariateNormal),
    (td.LowRankMultivariateNormal, td.MultivariateNormal),
    (td.MultivariateNormal, td.LowRankMultivariateNormal),
)
# By the form of torch that each takes the place of, so that what users have registered is left alone.
IN_PLACE_OF: dict[Form | type, Form] = {
    **{form: _infinite for form in torchs._KL_REGISTRY.values() if form.__name__.endswith("_infinity")},
    **{torchs._KL_REGISTRY[pair]: form for pair, form in _OWN.items()},
    **{torchs._KL_REGISTRY[pair]: _low_rank(torchs._KL_REGISTRY[pair]) for pair in _LOW_RANK},
    # To torch it is a transformed distribution, and of none with another concentration.
    td.Weibull: _elementwise(_weibull, "scale concentration"),
}
