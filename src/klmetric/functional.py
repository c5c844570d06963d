"""`kl_divergence`: the divergence of one batch."""

from typing import Any

import torch
from torch import Tensor

from klmetric.arithmetic.tracing import may_look
from klmetric.options import (
    Direction,
    Format,
    NanStrategy,
    Reduction,
    check_base,
    check_options,
    check_reduction,
)
from klmetric.rows.measure import Input, measure
from klmetric.totals import vector


def kl_divergence(
    p: Input,
    q: Input,
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
    weight: Tensor | None = None,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    class_group: Any = None,
) -> Tensor:
    """KL divergence of an approximation q from a reference p, never negative and accurate for near-equal rows.

        KL(p‖q) = Σ_c p_c · log(p_c / q_c)

    (Kullback and Leibler: On Information and Sufficiency, 1951.) It takes the place of
    `torchmetrics.functional.regression.kl_divergence`: the first four arguments are the same.

    Args:
        p: the reference (data, teacher), shape (N, ..., classes), where a lone (classes,) is one row; or a
            `torch.distributions.Distribution`, one row per batch element; or a `klmetric.Head`, which makes logits;
            or a `klmetric.TopK`, of which not all classes are known: the value is then a lower bound.
        q: the approximation (prediction, student), like `p`.
        log_prob: True is the old spelling of `input_format="log_probs"`.
        reduction: `"mean"` over rows, weighted; `"sum"`; `"batchmean"`, the sum over the number of samples (the length
            of the first axis, as in `torch.nn.KLDivLoss`); `"none"` or None, one value per row.
        input_format: `"probs"` (default), `"log_probs"` or `"logits"`, or a pair (for p, for q). All are normalised.
        dim: the class axis. (`dim` and `input_format` are of tensors; a distribution knows its own.)
        classes: take the first so many classes of both, which may have more, and not equally many (padded
            vocabularies). They are normalised again. None for all.
        direction: `"forward"` KL(p‖q), `"reverse"` KL(q‖p), `"jeffreys"` their sum, `"jensen_shannon"` the mean of
            KL(p‖m) and KL(q‖m) with m = (p + q)/2, at most log 2.
        temperature: divides the logits and log-probabilities of both; probabilities go to the power 1/temperature.
            The value is not multiplied by temperature². As a distillation loss, multiply it (Hinton, Vinyals, Dean:
            Distilling the Knowledge in a Neural Network, 2015).
        base: of the logarithm; None for e.
        eps: floor under the probabilities of the approximation (q, p where the direction is reversed, both for
            Jensen-Shannon), which are normalised again afterwards. 0 leaves them alone.
        nan_strategy: what rows that are no distributions do (NaN, negative, all zero, infinite logits).
            `"propagate"` makes the result NaN, with a warning that counts them; `"ignore"` leaves them out, with a
            warning; `"error"` raises.
        weight: bool or non-negative, its shape a prefix of the batch shape (N, ...): one per sample or one per row. A
            row of weight 0 never touches the result.
        targets: integers of the batch shape, the class that came true in each row (the next token): rows whose target
            is `ignore_index` have weight 0, as in `torch.nn.functional.cross_entropy`. They change nothing else.
        ignore_index: what stands for no target.
        class_group: the `torch.distributed.ProcessGroup` of the processes that have the other classes of the same rows,
            in the order of these (tensor-parallel heads). All of them must call, and get the value of all classes; the
            gradients are of their own. A `DTensor` knows by itself.

    Returns:
        A scalar in nats (or the unit of `base`), float64 for float64 input and float32 otherwise. With
        `reduction="none"` the batch shape, not scaled by `weight`; rows of weight 0 and ignored rows are 0. It is +inf
        where q gives no probability to a class that p has.

    Raises:
        TypeError: for an input of the wrong kind (integers, a tensor with a distribution, a pair of distributions
            without a registered divergence).
        ValueError: for a wrong shape, device, option, weight or target, and for bad rows with `nan_strategy="error"`.

    Examples:
        >>> import torch
        >>> from klmetric import kl_divergence
        >>> p = torch.tensor([[0.36, 0.48, 0.16]])
        >>> q = torch.tensor([[1 / 3, 1 / 3, 1 / 3]])
        >>> kl_divergence(p, q)
        tensor(0.0853)
        >>> student = torch.tensor([[0.1, 0.2, 0.3], [2.0, 0.0, -torch.inf]])
        >>> teacher = torch.tensor([[0.1, 0.2, 0.3], [1.0, 1.0, -torch.inf]])
        >>> kl_divergence(teacher, student, input_format="logits", reduction="none")
        tensor([0.0000, 0.4338])
        >>> labels = torch.tensor([-100, 1])  # the first token is of the prompt, and does not count
        >>> kl_divergence(teacher, student, input_format="logits", targets=labels)
        tensor(0.4338)
    """
    options = check_options(
        log_prob, input_format, dim, direction, temperature, eps, nan_strategy, classes, ignore_index
    )
    reduction = check_reduction(reduction)
    unit = check_base(base)
    rows = measure(p, q, weight, options, totals=vector.ASKED, targets=targets, class_group=class_group)
    sums = vector.of_batch(rows)
    numbers = sums.tolist() if rows.totals is not None or may_look(sums) else []
    if numbers:
        vector.check_weights(numbers)
        vector.warn_of_invalid(numbers, options, 2, type(p), type(q))
    if reduction == "none":
        left_out = rows.left_out | rows.kl.isnan() if nan_strategy == "ignore" else rows.left_out
        return torch.where(left_out, 0, rows.kl).to(rows.dtype) / unit
    return vector.result(sums, numbers, reduction, options, unit, rows.dtype, rows.kl.device)
