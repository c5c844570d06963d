"""`KLDivergenceEstimate`: the divergence from samples, where there are no whole distributions."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.metric import CompositionalMetric

from klmetric.accumulate.metric import Accumulator
from klmetric.accumulate.seen import Kind
from klmetric.accumulate.single import Take, refuse
from klmetric.options import NAN_STRATEGIES, NanStrategy, Options, check_choice
from klmetric.rows.drawn import log_ratios
from klmetric.rows.looks import Doubt, doubt_of_logs
from klmetric.rows.rows import Rows
from klmetric.totals import drawn, vector
from klmetric.totals.drawn import ESTIMATORS, UNITS, Estimator, Unit


class KLDivergenceEstimate(Accumulator):
    r"""An estimate of KL(p‖q) from drawn tokens: their log-probabilities under p and under q.

    This is what reinforcement learning logs as "kl": p is the policy, which has drawn the tokens, and q the reference.
    With r = q(x) / p(x) for each drawn token x, the estimate is the mean of

        k1 = -log r,    k3 = r - 1 - log r,    or    k2 = (log r)² / 2

    The means of k1 and of k3 are right (unbiased) where x was drawn from p, given what stands before it. k3 is never
    negative, and varies far less where q is near to p; beyond 0.6 nats a token or so, a few rare tokens make most of
    it, and k1 is the surer one. k2 is biased. Nothing is clamped. Where all classes are at hand,
    `klmetric.KLDivergence` measures each token's divergence exactly, which varies less than any of these.

    `update(log_p, log_q, weight=None)` takes shape (samples, tokens), with weight 0 for padding, which may be NaN; or
    (samples,), each one drawn for itself. A sample, or sequence, must come whole, in one update. Log-probabilities may
    be densities' (above 0). `compute()` gives a dict of scalars:

    - `mean`: the estimate of KL(p‖q) of a token (given those before it), or with `mean="sequence"` of a whole sequence:
      the sum over its tokens. In nats, or the unit of `base`. k1 can make it negative, which no divergence is.
    - `stderr`: its standard error. The sequences (first axis) are taken for independent, the tokens within one are not.
      NaN for fewer than two sequences, and where a token's estimate is infinite.
    - `low`, `high`: `mean ± 1.96 * stderr`, which holds KL(p‖q) 95 % of the time if there are many sequences: fewer
      times where a few of them make most of the mean.
    - `ess`: the effective sample size: how many independent tokens (sequences) would give this standard error. (Kish,
      Survey Sampling, 1965: their number over the design effect.)
    - `mismatch`: how far k3 is from k1, in standard errors of their difference, which is the mean of r - 1. Beyond some
      ±3, the tokens were not drawn from p (another temperature or top-p, an older policy, a text of others), or q can
      draw what p cannot, or there are too few for k3. A small mismatch proves nothing: with a sampler at another
      temperature it may stay near 0, and the estimate be wrong.
    - `tokens` and `sequences`: those that count, of weight above 0. `infinite`: tokens of which k3 is +inf, as q gives
      them no probability. `invalid`: tokens of weight above 0 that cannot have been drawn (log p is -inf), or where one
      of the two is NaN or +inf; with any, and `nan_strategy="propagate"`, every value but the counts is NaN.

    `estimate["mean"]` is one of these values as a metric of its own, for what wants a single number. In a
    `MetricCollection`, those of several estimators share their totals.

    Args:
        estimator: `"k3"`, `"k1"` or `"k2"`.
        mean: `"token"`: over all tokens, weighted. `"sequence"`: over sequences, of the weighted sum of each one's
            tokens; a sequence counts with the largest weight among them.
        base: of the logarithm; None for e.
        nan_strategy: `"propagate"`, `"ignore"` or `"error"`: what invalid tokens do. With `mean="sequence"`, `"ignore"`
            leaves out the whole sequence.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError: for an input of the wrong kind. A call that raises changes nothing.
        ValueError: for a wrong shape, device, option or weight, and for invalid tokens with `nan_strategy="error"`.

    Examples:
        >>> import torch
        >>> from klmetric import KLDivergenceEstimate
        >>> metric = KLDivergenceEstimate()
        >>> log_p = torch.tensor([[-0.5, -1.0, -2.0], [-0.1, -3.0, 0.0]])  # of the drawn tokens, under the policy
        >>> log_q = torch.tensor([[-0.6, -1.0, -2.5], [-0.3, -2.5, 0.0]])  # of the same tokens, under the reference
        >>> metric.update(log_p, log_q, weight=torch.tensor([[1, 1, 1], [1, 1, 0]]))
        >>> values = metric.compute()
        >>> values["mean"], values["stderr"]
        (tensor(0.0558), tensor(0.0224))
    """

    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        *,
        estimator: Estimator = "k3",
        mean: Unit = "token",
        base: float | None = None,
        nan_strategy: NanStrategy = "propagate",
        **kwargs: Any,
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("mean", mean, UNITS)
        check_choice("nan_strategy", nan_strategy, NAN_STRATEGIES)
        self.estimator: Estimator = estimator
        self.mean: Unit = mean
        super().__init__(Options(nan_strategy=nan_strategy), base, **kwargs)

    def update(self, log_p: Tensor, log_q: Tensor, weight: Tensor | None = None) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            log_p: of the drawn tokens under p, which they were drawn from, shape (samples, tokens) or (samples,).
            log_q: of the same tokens under q.
            weight: bool or non-negative, of each sample or token; 0 for padding.
        """
        super().update(log_p, log_q, weight)

    def compute(self) -> dict[str, Tensor]:
        """The values of all that was added, over all processes."""
        values: dict[str, Tensor] = super().compute()
        if values["sequences"] == 1 and values["mean"].isfinite():
            warnings.warn(
                "`stderr` is NaN: a standard error needs at least two sequences (the first axis) of weight above 0. Got"
                " one, whose tokens are not taken for independent. Where each is drawn for itself, the shape is"
                " (tokens,).",
                stacklevel=4,
            )
        return values

    @torch.jit.unused
    def forward(self, log_p: Tensor, log_q: Tensor, weight: Tensor | None = None) -> Any:  # type: ignore[override]
        """Add a batch and return the values of this batch alone."""
        return super().forward(log_p, log_q, weight)

    def plot(self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Any = None) -> Any:
        """Plot the mean with its interval, of one result or a sequence of them, as torchmetrics does.

        Args:
            val: a result of `forward` or `compute`, or a list of them; None calls `compute`.
            ax: a matplotlib axis to draw on.

        Returns:
            The figure and the axis.
        """
        results = self.compute() if val is None else val
        if isinstance(results, Mapping):
            return self._plot(_drawn(results), ax)
        return self._plot([_drawn(one) for one in results], ax)

    def __getitem__(self, name: str) -> CompositionalMetric:  # type: ignore[override]
        """One value as a metric of its own: `estimate["mean"]`, for wrappers and arithmetic, which want one number."""
        with torch.device("cpu"):
            nothing = self._values(self._empty())
        check_choice("name", name, tuple(nothing))
        return CompositionalMetric(Take(name), self.clone(), None)

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        return {"estimator": (self.estimator, "k3"), "mean": (self.mean, "token")}

    def _empty(self) -> Tensor:
        return drawn.empty(self.options, self.mean)

    def _rows(self, p: Any, q: Any, weight: Tensor | None, targets: Tensor | None, before: Tensor | None) -> Rows:
        return log_ratios(p, q, weight, self.options)

    def _kind_of(self, p: Any, q: Any) -> Kind:
        return Tensor, Tensor, None

    def _doubt_of(self, p: Any, q: Any, rows: Rows) -> Doubt | None:
        return doubt_of_logs(p, q, rows.left_out)

    def _of_batch(self, rows: Rows) -> Tensor:
        return drawn.of_tokens(rows.kl, rows.weight, self.mean)

    def _merging(self) -> Callable[[Tensor], Tensor]:
        return drawn.merge

    def _adding(self, sums: Tensor, batch: Tensor) -> Tensor:
        return drawn.add(sums, batch)

    def _values(self, sums: Tensor) -> dict[str, float]:
        return drawn.values(sums, self.estimator, self.mean, self.options.nan_strategy, self._unit)

    def _result(self, sums: Tensor, rows: list[Tensor], stacklevel: int) -> dict[str, Tensor]:
        sums = sums.cpu()  # an accelerator is waited for once
        self._warn_of_invalid(sums[: vector.SIZE].tolist(), stacklevel)
        return {
            name: torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else self.dtype, device=self.device)
            for name, value in self._values(sums).items()
        }

    def _say_invalid(self, numbers: list[float], stacklevel: int) -> bool:
        invalid = int(numbers[vector.INVALID])
        if invalid:
            outcome = "were left out" if self.options.nan_strategy == "ignore" else "make the result NaN"
            warnings.warn(
                f"{invalid} of {int(numbers[vector.ROWS])} tokens cannot have been drawn (log p is -inf), or have a"
                f" log-probability of NaN or +inf, and {outcome}. Give padding the weight 0. nan_strategy='error' names"
                " the first.",
                stacklevel=stacklevel + 1,
            )
        return bool(invalid)


def _drawn(result: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: result[name] for name in ("mean", "low", "high")}


refuse(KLDivergenceEstimate, "estimate['mean'], estimate['stderr']")
