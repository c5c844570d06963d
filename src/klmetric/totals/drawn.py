r"""What the log-ratios of drawn tokens come to: three estimates of KL(p‖q), and how sure they are.

With the tokens x drawn from p and r = q(x) / p(x),

.. math:: k_1 = -\log r, \qquad k_2 = \tfrac{1}{2} (\log r)^2, \qquad k_3 = r - 1 - \log r.

(Schulman: Approximating KL Divergence, 2020.) The mean of r over p is 1, as far as p can draw all that q can, so that
k1 and k3 both have the mean KL(p‖q); k2 has another one, near to it where q is near to p.

The unit that is averaged is a token, or a sequence (sample) with the sum over its tokens. The sequences are taken for
independent, the tokens within one are not, as in `klmetric.totals.moments`, whose sums these are.

The state is one vector: the totals (`klmetric.totals.vector`) with k3 for the divergence, and pairs of sums
(`klmetric.totals.pairs`): those of `moments` of the three estimates, those of the square of each over the units, and
the numbers of tokens that count and of those whose k3 is infinite. Laws: `empty` is neutral, `merge` is associative and
commutative.
"""

import math
from fractions import Fraction
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from klmetric.arithmetic import native
from klmetric.arithmetic.curves import phi
from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.tracing import is_recorded
from klmetric.options import Options
from klmetric.totals import moments, pairs, vector
from klmetric.totals.estimates import Z
from klmetric.totals.moments import Means

Estimator: TypeAlias = Literal["k1", "k2", "k3"]
Unit: TypeAlias = Literal["token", "sequence"]

ESTIMATORS = ("k1", "k2", "k3")
UNITS = ("token", "sequence")
# To which the sums of squares are known.
_PRECISION = Fraction(1, 2**40)

# The places among the pairs, after those of `moments`.
_SQUARES = len(moments.empty(len(ESTIMATORS))) // 2
_TOKENS = _SQUARES + len(ESTIMATORS)
_INFINITE = _TOKENS + 1
_PAIRS = _INFINITE + 1


def empty(options: Options, unit: Unit) -> Tensor:
    """No tokens."""
    head = vector.empty(options, also=("drawn", unit))
    return torch.cat([head, head.new_zeros(2 * _PAIRS)])


def merge(parts: Tensor) -> Tensor:
    """The sums of all tokens together, from those of their parts, shape (parts, ...)."""
    sums = pairs.merge(parts[:, vector.SIZE :].tolist())
    return torch.cat([vector.merge(parts[:, : vector.SIZE]), parts.new_tensor(sums)])


def add(totals: Tensor, batch: Tensor) -> Tensor:
    """The same with one more batch. It does not wait for an accelerator, as `merge` does."""
    head = vector.add(totals[: vector.SIZE], batch[: vector.SIZE])
    return torch.cat([head, pairs.add(totals[vector.SIZE :], batch[vector.SIZE :])])


def of_tokens(k1: Tensor, weight: Tensor | None, unit: Unit) -> Tensor:
    """The sums of a batch, without a fingerprint.

    Args:
        k1: log p - log q of each token, shape (samples, tokens) or (samples,); NaN where there is none.
        weight: of the tokens, of the shape of `k1`; None for 1.
        unit: of the means.
    """
    k1 = k1.to(device_of_float64(k1.device), torch.float64)
    k1 = k1.reshape(len(k1), -1) if k1.numel() else k1.reshape(0, 1)
    weight = torch.ones_like(k1) if weight is None else weight.to(k1).reshape(k1.shape)
    k3 = phi(-k1)
    if k1.numel() and not is_recorded() and native.serves(k3, weight):
        head = native.totals_of(k3, None, weight, vector.ASKED)
    else:
        head = vector.of_rows(k3, weight)
    invalid = k1.isnan()
    # With such a token, the sum over its sequence is not known.
    invalid = (invalid & (weight > 0)).any(1, keepdim=True) if unit == "sequence" else invalid
    weight = weight.masked_fill(invalid, 0)
    counted = weight > 0
    x = torch.where(counted, torch.stack([k1, k1.square() / 2, k3]), 0)
    counts = torch.stack([counted, x[-1] == math.inf]).sum(2).double()
    if unit == "sequence":
        # A sequence counts as much as the weightiest of its tokens, as a sample does with `reduction="batchmean"`.
        sums = (x * weight).cumsum(2)[..., -1:]
        weight = weight.amax(1, keepdim=True)
        x = sums / torch.where(weight > 0, weight, 1)
    # One after the other, as `moments` does.
    squares = (x * weight * x).cumsum(2)[..., -1]
    parts = [moments.of_rows(x, weight).view(2, -1), moments.total(torch.cat([squares, counts]))]
    return torch.cat([head, torch.cat(parts, 1).flatten()])


def values(totals: Tensor, estimator: Estimator, unit: Unit, nan_strategy: str, scale: float) -> dict[str, float]:
    """What it all comes to, as numbers: those that count as int.

    Args:
        totals: of all tokens.
        estimator: whose mean it is.
        unit: of the mean.
        nan_strategy: see `klmetric.KLDivergenceEstimate`.
        scale: nats in a unit of the result.
    """
    numbers = totals[: vector.SIZE].tolist()
    sums = totals[vector.SIZE :].view(2, -1)
    means = Means(sums[:, :_SQUARES].flatten(), ESTIMATORS)
    highs = sums[0].tolist()
    invalid = int(numbers[vector.INVALID])
    tokens, sequences = int(highs[_TOKENS]), int(highs[moments.SAMPLES])
    mean, error = means[estimator], means.error({estimator: 1.0})
    size = math.nan
    if math.isfinite(error):
        size = _effective(sums, ESTIMATORS.index(estimator), tokens if unit == "token" else sequences, error)
    # The mean of r - 1, of a token or over a sequence.
    excess, its_error = means["k3"] - means["k1"], means.error({"k3": 1.0, "k1": -1.0})
    found = {
        "mean": mean / scale,
        "stderr": error / scale,
        "low": (mean - Z * error) / scale,
        "high": (mean + Z * error) / scale,
        "ess": size,
        "mismatch": excess / its_error if its_error else excess * math.inf if excess else 0.0,
    }
    if invalid and nan_strategy == "propagate":
        found = dict.fromkeys(found, math.nan)
    counts = {"tokens": tokens, "sequences": sequences, "infinite": int(highs[_INFINITE]), "invalid": invalid}
    return found | counts


def _effective(sums: Tensor, place: int, units: int, error: float) -> float:
    """The number of independent units, each of weight 1, whose plain mean has the same standard error.

    It is their number over the design effect of Kish (Survey Sampling, 1965, section 8.2): the variance of the mean,
    over the one that as many units drawn one by one would give.
    """
    total, second, weight = (
        Fraction(high) + Fraction(low)
        for high, low in sums[:, [moments.HEAD + place, _SQUARES + place, moments.WEIGHT]].T.tolist()
    )
    variance = second / weight - (total / weight) ** 2
    if variance <= second / weight * _PRECISION:  # all are equal, and the squares are rounded
        return float(units)
    return float(variance) * units / (units - 1) / error**2 if error else math.inf
