"""What the means of the fields come to: values with their standard errors and 95 % intervals."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from klmetric.options import quantile_name

if TYPE_CHECKING:
    from klmetric.totals.moments import Means

Estimate = dict[str, float]

# Of a normal distribution, this many standard deviations on either side hold 95 %.
Z = 1.96
# The fields in nats, which are reported in the unit of `base`.
IN_NATS = ("reverse", "jensen_shannon", "at_most", "llama_cpp")

# The quantiles of delta p, which llama.cpp has as well.
QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
DELTA_P = tuple(map(quantile_name, QUANTILES))
PERPLEXITY = ("reference", "model", "ln_ratio", "ratio", "difference", "correlation")


def estimate(value: float, stderr: float, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """A value between two limits, with its standard error and its 95 % interval."""
    low, high = value - Z * stderr, value + Z * stderr
    # A comparison with NaN would give the limit.
    return {
        "value": value,
        "stderr": stderr,
        "low": low if math.isnan(low) else max(low, least),
        "high": high if math.isnan(high) else min(high, most),
    }


def mean_of(means: "Means", name: str, unit: float, is_difference: bool = False) -> Estimate:
    """The mean of one field, in the unit of `base` if it is in nats."""
    scale = unit if name in IN_NATS else 1.0
    least = -math.inf if is_difference or name in ("ln_ratio", "delta_p") else 0.0
    return estimate(means[name] / scale, means.error({name: 1.0}) / scale, least)


def perplexity_of(means: "Means") -> dict[str, Estimate]:
    """The perplexities of both, and how they compare, from the mean of -log p and that of log p - log q of the targets.

    The errors come from those of the logarithms, whose intervals are carried over.
    """
    nll, ln_ratio = means["nll"], means["ln_ratio"]
    base, growth = _exp(nll), math.expm1(ln_ratio) if ln_ratio < _MOST else ln_ratio
    ratio_error = means.error({"ln_ratio": 1.0})
    slopes = {"nll": base * growth, "ln_ratio": base * (growth + 1)}
    return {
        "reference": _exponential(nll, means.error({"nll": 1.0})),
        "model": _exponential(nll + ln_ratio, means.error({"nll": 1.0, "ln_ratio": 1.0})),
        "ln_ratio": estimate(ln_ratio, ratio_error),
        "ratio": _exponential(ln_ratio, ratio_error),
        "difference": estimate(base * growth, means.error(slopes)),
        "correlation": _correlation(means),
    }


# The exponentials of larger numbers are infinite.
_MOST = 709.0


def _exp(x: float) -> float:
    return math.exp(x) if not x > _MOST else math.inf


def _exponential(log: float, error: float) -> Estimate:
    value = _exp(log)
    return {"value": value, "stderr": value * error, "low": _exp(log - Z * error), "high": _exp(log + Z * error)}


def _correlation(means: "Means") -> Estimate:
    """Pearson's, of a = -log p and b = a + d, d = log p - log q."""
    a, d = means["nll"], means["ln_ratio"]
    of_a, of_d = means["nll_squared"] - a * a, means["ln_ratio_squared"] - d * d
    of_both = means["nll_by_ln_ratio"] - a * d
    covariance, of_b = of_a + of_both, of_a + 2 * of_both + of_d
    if not (0 < of_a < math.inf and 0 < of_b < math.inf and covariance):
        return estimate(math.nan, math.nan)
    value = covariance / math.sqrt(of_a * of_b)
    by_a, by_both, by_d = (
        value * (1 / covariance - 0.5 / of_a - 0.5 / of_b),
        value * (1 / covariance - 1 / of_b),
        value * (-0.5 / of_b),
    )
    gradient = {
        "nll": -2 * a * by_a - d * by_both,
        "ln_ratio": -2 * d * by_d - a * by_both,
        "nll_squared": by_a,
        "nll_by_ln_ratio": by_both,
        "ln_ratio_squared": by_d,
    }
    return estimate(value, means.error(gradient), -1.0, 1.0)


def delta_p_of(means: "Means", quantile: Callable[[float], float]) -> dict[str, Any]:
    """The probability of the target in the model less that in the reference: mean, root mean square, quantiles."""
    quantiles = {name: quantile(q) for name, q in zip(("min", *DELTA_P, "max"), (0, *QUANTILES, 1), strict=True)}
    return {"mean": mean_of(means, "delta_p", 1.0), "rms": rms_of(means), **quantiles}


def rms_of(means: "Means") -> Estimate:
    """The root of the mean square of that difference."""
    rms = math.sqrt(means["delta_p_squared"])
    error = means.error({"delta_p_squared": 0.5 / rms}) if rms else 0.0 * rms
    return estimate(rms, error, 0.0)
