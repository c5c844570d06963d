"""`KLDivergenceSummary`: how the divergence is spread, accumulated like the divergence itself."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.metric import CompositionalMetric

from klmetric.accumulate.metric import Accumulator
from klmetric.accumulate.single import Take, refuse
from klmetric.options import (
    Direction,
    Format,
    NanStrategy,
    as_int,
    as_number,
    check_choice,
    check_options,
    quantile_name,
    unit_name,
)
from klmetric.rows.fields import OF_CLASSES, OF_TAILS, OF_TARGETS
from klmetric.rows.looks import Doubt, doubt_of_top
from klmetric.rows.measure import Input
from klmetric.rows.rows import Rows
from klmetric.totals import estimates, histogram, moments, pairs, sketch, tails, vector
from klmetric.totals.histogram import Histogram

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


class KLDivergenceSummary(Accumulator):
    """The mean of the KL divergence, how sure it is, and how the divergence is spread over the rows.

    It measures what `klmetric.KLDivergence` measures, of the same inputs, and keeps one vector of fixed size (64 KiB at
    the accuracy of 1 %), which is brought together in one collective. The result is the same for every batch size and
    number of processes.

    `update(p, q, weight=None, targets=None)` takes what `klmetric.kl_divergence` takes. `compute()` gives a dict of
    scalars:

    - `mean`: KL(p‖q) over the rows, weighted, in nats (or the unit of `base`).
    - `stderr`: its standard error. The samples (first axis) are taken for independent, the rows within one (tokens of a
      text) are not. `mean ± 1.96 * stderr` covers the true mean 95 % of the time, if there are many samples of a
      like size: fewer times where a few of some dozens make most of the mean.
      NaN for fewer than two samples, and where a divergence is infinite. A sample must come whole,
      in one update: where a sample is a document of several windows, update with p and q of (1, its tokens, classes).
    - `max`: the largest divergence of a row.
    - `p50`, `p90`, `p95`, `p99`, `p99_9`: the quantiles, as `numpy.quantile` has them, each to `relative_accuracy` of
      itself while the rows next to it are between 5e-25 and 3e38 nats (the largest number of float32). Exact zeros and
      infinities are told apart from what is near. Beyond that range the smallest and the largest divergence are known
      exactly, and what lies between one of these and the range is interpolated on a logarithmic axis. Each is one of a
      fixed grid of values, at most 2 % apart, so that two data sets may share one.
    - `agreement`: the share of rows whose most likely class is the same (the first one, of equally likely ones). NaN
      for distributions that are not categorical.
    - `count`: the rows that count: of weight above 0, and pairs of distributions. `infinite`: those of them with a
      divergence of +inf; with any, the mean is +inf. `invalid`: rows of weight above 0 that were no distributions; with
      any, and `nan_strategy="propagate"`, every divergence and the agreement is NaN.
    - with `top=K`: `top1`, `top1_sample`, `top1_position` to `topK`...: the largest divergences, the running number of
      their samples and their places in those (0 where a sample is one row). Samples are numbered from 0 in the order of
      the updates, those of weight 0 included; where totals are merged, or come from several processes, in the order of
      these. NaN, -1 and -1 where there are fewer rows, or invalid ones.
    - with `measures=True`: `reverse`, KL(q‖p), and `jensen_shannon`, in the unit; `total_variation`, half the sum of
      |p - q|; `agreement_1`, `agreement_5`, `agreement_10`, the share of rows whose 1, 5, 10 most likely classes are
      the same in the same order. Each is a weighted mean, with its standard error as `reverse_stderr` and so on.
    - with `perplexity=True`, which takes `targets` (the tokens that came next) with each batch, by the names of
      `klmetric compare`: `perplexity_reference` of p and `perplexity_model` of q, `perplexity_ratio` and
      `perplexity_ln_ratio` of the second by the first, their `perplexity_difference`, `perplexity_correlation` of the
      log-probabilities of the targets, and `delta_p_mean` and `delta_p_rms` of what q gives a target more than p. Each
      with its standard error.

    - with `bounds=True`, for a `klmetric.TopK`: `at_least` and `at_most`, bounds on KL(p‖q) over all classes
      (`klmetric.kl_divergence_bounds`). `at_least` is the same number as `mean`; `max` and the quantiles are of
      lower bounds, too. `tail_mass` is the probability of the classes that are not known, in p (in q, if p is in full):
      its mean, with the quantiles as `tail_mass_p50` and so on, and `tail_mass_max`. `at_most` and `tail_mass` have
      standard errors.

    `summary["p99"]` is one of these values as a metric of its own, for what wants a single number: arithmetic and
    torchmetrics' wrappers (`MetricTracker`, `MinMaxMetric`, `BootStrapper`...).

    Weights scale the means and their standard errors. The rest counts rows: one of weight above 0 once, whatever the
    weight.

    Args:
        log_prob: True is the old spelling of `input_format="log_probs"`.
        input_format: see `klmetric.KLDivergence`, and so are dim, direction, temperature, base, eps, nan_strategy.
        dim: likewise.
        classes: likewise.
        direction: likewise.
        temperature: likewise.
        base: likewise.
        eps: likewise. (For a mean that is finite where q misses a class.)
        nan_strategy: likewise.
        ignore_index: likewise.
        class_group: likewise.
        quantiles: from 0 to 1; 0.999 is reported as `p99_9`.
        relative_accuracy: of the quantiles, at least 0.0001. Half of it takes twice the memory.
        top: the number of worst rows to keep.
        measures: whether to measure what else tells p from q, in several times the time.
        perplexity: whether to measure how well both predict the targets.
        bounds: whether to measure how large the divergence may be where not all classes are known.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError: for an input of the wrong kind. A call that raises changes nothing.
        ValueError: for a wrong shape, device, option or weight, and for bad rows with `nan_strategy="error"`.

    Examples:
        >>> import torch
        >>> from klmetric import KLDivergenceSummary
        >>> metric = KLDivergenceSummary(input_format="logits", quantiles=(0.5, 0.99))
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
        >>> student = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
        >>> for p, q in zip(teacher.split(2), student.split(2)):
        ...     metric.update(p, q)
        >>> values = metric.compute()
        >>> values["mean"], values["p99"]
        (tensor(0.0988), tensor(0.1757))
        >>> low, high = (values["mean"] + z * values["stderr"] for z in (-1.96, 1.96))  # a 95 % interval
        >>> metric = KLDivergenceSummary(input_format="logits", measures=True, perplexity=True)
        >>> metric.update(teacher, student, targets=torch.tensor([0, 2, -100]))  # the last row does not count
        >>> values = metric.compute()
        >>> values["perplexity_reference"], values["perplexity_model"], values["jensen_shannon"]
        (tensor(1.2857), tensor(1.8866), tensor(0.0405))
    """

    is_differentiable = False
    higher_is_better = None
    asks_for_agreement = True

    def __init__(
        self,
        *,
        log_prob: bool = False,
        input_format: Format | tuple[Format, Format] | None = None,
        dim: int = -1,
        classes: int | None = None,
        direction: Direction = "forward",
        temperature: float = 1.0,
        base: float | None = None,
        eps: float = 0.0,
        nan_strategy: NanStrategy = "propagate",
        ignore_index: int = -100,
        class_group: Any = None,
        quantiles: Sequence[float] = QUANTILES,
        relative_accuracy: float = 0.01,
        top: int = 0,
        measures: bool = False,
        perplexity: bool = False,
        bounds: bool = False,
        **kwargs: Any,
    ) -> None:
        options = check_options(
            log_prob, input_format, dim, direction, temperature, eps, nan_strategy, classes, ignore_index
        )
        self.quantiles = _check_quantiles(quantiles)
        accuracy, number = as_number("relative_accuracy", relative_accuracy), as_int("top", top)
        if accuracy is None or not 1e-4 <= accuracy < 1:
            raise ValueError(
                f"`relative_accuracy` must be a share of a quantile, from 0.0001 to below 1. Got {relative_accuracy!r}."
                " Use 0.01 for 1 %."
            )
        if number is None or number < 0:
            raise ValueError(f"`top` must be a number of rows, at least 0. Got {top!r}.")
        self.relative_accuracy = accuracy
        self.top = number
        self._fineness = histogram.fineness_for(accuracy)
        for name, value in (("measures", measures), ("perplexity", perplexity), ("bounds", bounds)):
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be a bool. Got {value!r}.")
            if value and options.eps:
                raise ValueError(f"`eps` must be 0 with {name}=True, which is of q as it is. Got {eps!r}.")
        if bounds and options.direction != "forward":
            raise ValueError(
                f"`direction` must be 'forward' with bounds=True. Got {direction!r}: of the others there is no upper"
                " bound. Their mean is at least so much, without bounds=True as well."
            )
        self.measures, self.perplexity, self.bounds = measures, perplexity, bounds
        self._fields = (
            *(OF_CLASSES if measures else ()),
            *(OF_TARGETS if perplexity else ()),
            *(OF_TAILS if bounds else ()),
        )
        self._tail = tails.size(self._fineness) if bounds else 0
        asked = sketch.asked(self._fineness, number)
        self._size = asked[0]  # of the sketch; the sums of the fields come after it, and the tails
        self._asked = None if self._fields else asked
        super().__init__(options, base, class_group=class_group, **kwargs)

    def plot(self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Any = None) -> Any:
        """Draw the distribution of the divergence over the rows, on a logarithmic axis, with its mean and quantiles.

        Args:
            val: None; or results of `forward` or `compute`, which are drawn as torchmetrics does.
            ax: a matplotlib axis to draw on; None for a new figure.

        Returns:
            The figure and the axis.

        Raises:
            RuntimeError: if no row has a divergence to draw.
            ModuleNotFoundError: without matplotlib.
        """
        if val is not None:
            return self._plot(val, ax)
        from klmetric.totals.picture import draw  # matplotlib is an optional dependency

        with self.sync_context(should_sync=self.sync_on_compute and not self._is_synced):
            divergences = self._divergences(self.totals)
            values = self._values(self.totals.tolist(), divergences)
        return draw(ax, divergences, values, self._unit, unit_name(self.base))

    def __getitem__(self, name: str) -> CompositionalMetric:  # type: ignore[override]
        """One value as a metric of its own: `summary["p99"]`, for wrappers and arithmetic, which want a single number.

        It measures for itself from here on, so that in `summary["p99"] / summary["p50"]` no row counts twice.
        """
        with torch.device("cpu"):
            nothing = self._empty()
        check_choice("name", name, tuple(self._values(nothing.tolist(), self._divergences(nothing))))
        return CompositionalMetric(Take(name), self.clone(), None)

    def compute(self) -> dict[str, Tensor]:
        """The values of all that was added, over all processes."""
        numbers = self.totals.tolist()
        if not self._is_lost(numbers) and (reason := sketch.why_no_error(numbers)):
            warnings.warn(f"`stderr` is NaN: {reason}", stacklevel=4)
        values: dict[str, Tensor] = super().compute()
        return values

    def _doubt_of(self, p: Input, q: Input, rows: Rows) -> Doubt | None:
        of_formats, of_top = super()._doubt_of(p, q, rows), doubt_of_top(p, rows.left_out) if self.bounds else None
        return of_formats + of_top if of_formats and of_top else of_formats or of_top

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        accuracy = (self.relative_accuracy, 0.01)
        return {"quantiles": (self.quantiles, QUANTILES), "relative_accuracy": accuracy, "top": (self.top, 0)} | {
            name: (getattr(self, name), False) for name in ("measures", "perplexity", "bounds")
        }

    def _empty(self) -> Tensor:
        empty = sketch.empty(self.options, self._fineness, self.top)
        parts = [empty, moments.empty(len(self._fields))] if self._fields else [empty]
        return torch.cat([part.to(empty) for part in (*parts, *([tails.empty(self._fineness)] if self.bounds else ()))])

    def _of_batch(self, rows: Rows) -> Tensor:
        sums = sketch.of_rows(rows, self._fineness, self.top)
        if rows.fields is None:
            return sums
        kl, x = rows.kl.to(sums.device), rows.fields
        shape = (len(kl), kl[0].numel()) if kl.ndim and kl.numel() else (kl.numel(), 1)  # samples, places in them
        valid = ~kl.isnan()
        weight = (valid if rows.weight is None else torch.where(valid, rows.weight.to(x), 0)).reshape(shape)
        parts = [sums, moments.of_rows(x.reshape(len(x), *shape), weight)]
        if self.bounds:
            masses = x[self._fields.index("tail_mass")].reshape(shape)
            parts.append(tails.of_rows(masses, weight, self._fineness))
        return torch.cat(parts)

    def _divergences(self, sums: Tensor) -> Histogram:
        return sketch.histogram_of(sums, self._fineness)

    def _merging(self) -> Callable[[Tensor], Tensor]:
        if self._fields:
            return partial(_merge, size=self._size, top=self.top, tail=self._tail)
        return partial(sketch.merge, top=self.top)

    def _adding(self, sums: Tensor, batch: Tensor) -> Tensor:
        if not self._fields:
            return sketch.add(sums, batch, self.top)
        (a, b, c), (x, y, z) = (_apart(both, self._size, self._tail) for both in (sums, batch))
        parts = [sketch.add(a, x, self.top), pairs.add(b, y)]
        return torch.cat([*parts, tails.merge(torch.stack([c, z]))] if self.bounds else parts)

    def _result(self, sums: Tensor, rows: list[Tensor], stacklevel: int) -> dict[str, Tensor]:
        numbers = sums.tolist()
        self._warn_of_invalid(numbers, stacklevel)
        divergences = self._divergences(sums)
        return {
            name: torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else self.dtype, device=self.device)
            for name, value in self._values(numbers, divergences).items()
        }

    def _is_lost(self, numbers: list[float]) -> bool:
        """Whether rows that were no distributions make every divergence NaN."""
        return numbers[vector.INVALID] > 0 and self.options.nan_strategy == "propagate"

    def _values(self, numbers: list[float], divergences: Histogram) -> dict[str, float]:
        """What `compute` gives, as numbers: those that count as int."""
        invalid = int(numbers[vector.INVALID])
        count = int(numbers[vector.ROWS]) - invalid
        is_lost = self._is_lost(numbers)

        def of_rows(value: float) -> float:
            return math.nan if is_lost or not count else value

        infinite = int(divergences.counts[histogram.INFINITE])
        compared = numbers[sketch.COMPARED]
        values = {
            "mean": vector.value(numbers, "mean", self.options.nan_strategy) / self._unit,
            "stderr": of_rows(sketch.standard_error(numbers)) / self._unit,
            "max": of_rows(math.inf if infinite else divergences.largest) / self._unit,
        }
        for q in self.quantiles:
            values[quantile_name(q)] = of_rows(histogram.quantile(divergences, q)) / self._unit
        values["agreement"] = of_rows(numbers[sketch.AGREED] / compared if count and compared == count else math.nan)
        values |= {"count": count, "infinite": infinite, "invalid": invalid}
        worst = numbers[self._size - 3 * self.top : self._size]
        for k in range(self.top):
            value, sample, position = worst[k :: self.top]
            if value < 0 or is_lost:
                value, sample, position = math.nan, -1, -1
            values[f"top{k + 1}"] = value / self._unit
            values |= {f"top{k + 1}_sample": int(sample), f"top{k + 1}_position": int(position)}
        if self.bounds:
            values["at_least"] = values["mean"]
        for name, one in self._estimates(numbers).items():
            values |= {name: of_rows(one["value"]), f"{name}_stderr": of_rows(one["stderr"])}
        if self.bounds:
            masses = tails.histogram_of(torch.tensor(numbers[-self._tail :], dtype=torch.float64))
            spread = {quantile_name(q): histogram.quantile(masses, q) for q in self.quantiles}
            spread["max"] = masses.largest
            values |= {f"tail_mass_{name}": of_rows(value) for name, value in spread.items()}
        return values

    def _estimates(self, numbers: list[float]) -> dict[str, estimates.Estimate]:
        """Of the means of the fields."""
        sums = torch.tensor(numbers[self._size : len(numbers) - self._tail], dtype=torch.float64)
        means = moments.Means(sums, self._fields)
        names = (*(OF_CLASSES if self.measures else ()), *(OF_TAILS if self.bounds else ()))
        found = {name: estimates.mean_of(means, name, self._unit) for name in names}
        if self.perplexity:
            found |= {f"perplexity_{name}": one for name, one in estimates.perplexity_of(means).items()}
            found |= {"delta_p_mean": estimates.mean_of(means, "delta_p", 1.0), "delta_p_rms": estimates.rms_of(means)}
        return found


def _apart(x: Tensor, size: int, tail: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sketch of so many numbers, the sums of the fields, and the tails of so many numbers."""
    end = x.shape[-1] - tail
    return x[..., :size], x[..., size:end], x[..., end:]


def _merge(parts: Tensor, size: int, top: int, tail: int) -> Tensor:
    of_rows, of_fields, of_tails = _apart(parts, size, tail)
    return torch.cat([sketch.merge(of_rows, top), moments.merge(of_fields), tails.merge(of_tails)])


refuse(KLDivergenceSummary, "summary['mean'], summary['p99']")


def _check_quantiles(quantiles: Sequence[float]) -> tuple[float, ...]:
    is_array = isinstance(quantiles, (Tensor, np.ndarray)) and quantiles.ndim == 1
    if not (is_array or isinstance(quantiles, Sequence)) or isinstance(quantiles, str):
        raise TypeError(f"`quantiles` must be a sequence of numbers. Got {quantiles!r}. Write (0.5, 0.99).")
    numbers = []
    for q in quantiles:
        number = as_number("quantiles", q)
        if number is None or not 0 <= number <= 1:
            hint = f" Write {number / 100:g} for {number:g} %." if number is not None and 1 < number <= 100 else ""
            raise ValueError(f"`quantiles` must be numbers from 0 to 1. Got {q!r}.{hint}")
        numbers.append(number)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"`quantiles` must differ. Got {quantiles!r}.")
    return tuple(numbers)
