"""`KLDivergence`: the divergence accumulated over batches, devices and processes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from klmetric.accumulate.metric import Accumulator
from klmetric.options import (
    Direction,
    Format,
    NanStrategy,
    Reduction,
    check_options,
    check_reduction,
)
from klmetric.rows.rows import Rows
from klmetric.totals import vector


class KLDivergence(Accumulator):
    """KL divergence of an approximation q from a reference p, accumulated over batches, devices and processes.

        KL(p‖q) = Σ_c p_c · log(p_c / q_c)

    It takes the place of `torchmetrics.regression.KLDivergence`: the first two arguments are the same. Every batch adds
    to one float64 vector of totals, so the result depends neither on the batch size nor on the number of processes.

    Args:
        log_prob: True is the old spelling of `input_format="log_probs"`.
        reduction: `"mean"` over rows, weighted; `"sum"`; `"batchmean"`, the sum over the number of samples (the first
            axis; a sample counts as much as the weightiest of its rows); `"none"` or None, one value per row.
        input_format: `"probs"` (default), `"log_probs"` or `"logits"`, or a pair (for p, for q). All are normalised.
        dim: the class axis.
        classes: take the first so many classes of both, which may have more, and not equally many (padded
            vocabularies). They are normalised again. None for all.
        direction: `"forward"` KL(p‖q), `"reverse"` KL(q‖p), `"jeffreys"` their sum, `"jensen_shannon"` the mean of
            KL(p‖m) and KL(q‖m) with m = (p + q)/2, at most log 2.
        temperature: divides the logits and log-probabilities of both; probabilities go to the power 1/temperature.
            The value is not multiplied by temperature². As a distillation loss, multiply it (Hinton, Vinyals, Dean:
            Distilling the Knowledge in a Neural Network, 2015).
        base: of the logarithm; None for e.
        eps: floor under the probabilities of the approximation, normalised again afterwards; 0 leaves them alone.
        nan_strategy: `"propagate"`, `"ignore"` or `"error"`: what rows that are no distributions do.
        ignore_index: the target of rows that do not count.
        class_group: see `klmetric.kl_divergence`. `compute` takes each row once, from the first process of the group.
        kwargs: of `torchmetrics.Metric`.

    `update(p, q, weight=None, targets=None)` takes what `klmetric.kl_divergence` takes. `compute()` gives a scalar in
    nats (or the unit of `base`) in the dtype of the metric (`set_dtype`); with `reduction="none"` one dimension, in the
    order of the updates and of the processes, without the rows of weight 0.

    Raises:
        TypeError: for an input of the wrong kind. A call that raises changes nothing.
        ValueError: for a wrong shape, device, option, weight or target, and for bad rows with `nan_strategy="error"`.

    Examples:
        >>> import torch
        >>> from klmetric import KLDivergence
        >>> metric = KLDivergence(input_format="logits")
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
        >>> student = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> for p, q in zip(teacher.split(1), student.split(1)):
        ...     metric.update(p, q)
        >>> metric.compute()
        tensor(0.1482)
    """

    is_differentiable = True
    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        log_prob: bool = False,
        reduction: Reduction | None = "mean",
        *,
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
        **kwargs: Any,
    ) -> None:
        options = check_options(
            log_prob, input_format, dim, direction, temperature, eps, nan_strategy, classes, ignore_index
        )
        reduction = check_reduction(reduction)
        super().__init__(options, base, reduction == "none", class_group, **kwargs)
        self.reduction: Reduction = reduction

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or a sequence of them, as torchmetrics does.

        Args:
            val: a result of `forward` or `compute`, or a list of them; None calls `compute`.
            ax: a matplotlib axis to draw on.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)

    def _own_options(self) -> dict[str, tuple[Any, Any]]:
        return {"reduction": (self.reduction, "mean")}

    def _empty(self) -> Tensor:
        return vector.empty(self.options, self.keeps_rows)

    def _of_batch(self, rows: Rows) -> Tensor:
        return vector.of_batch(rows)

    def _merging(self) -> Callable[[Tensor], Tensor]:
        return vector.merge

    def _adding(self, sums: Tensor, batch: Tensor) -> Tensor:
        return vector.add(sums, batch)

    def _result(self, sums: Tensor, rows: list[Tensor], stacklevel: int) -> Tensor:
        numbers = sums.tolist()
        self._warn_of_invalid(numbers, stacklevel)
        if self.reduction == "none":
            return dim_zero_cat(rows).to(self.dtype) / self._unit
        return vector.result(sums, numbers, self.reduction, self.options, self._unit, self.dtype, self.device)
