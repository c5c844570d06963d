"""`kl_divergence_bounds`: a lower and an upper bound of the divergence where not all classes are known."""

from typing import NamedTuple

import torch
from torch import Tensor

from klmetric.arithmetic.tracing import may_look
from klmetric.options import Format, NanStrategy, Reduction, check_base, check_options, check_reduction
from klmetric.rows.fields import OF_TAILS
from klmetric.rows.looks import doubt_of_top
from klmetric.rows.measure import measure
from klmetric.rows.topk import TopK
from klmetric.totals import vector


class Bounds(NamedTuple):
    """What `kl_divergence_bounds` gives.

    Attributes:
        at_least: KL(p‖q) is at least this.
        at_most: and at most this; infinite where nothing can be said.
        tail_mass: what p has in the classes that are not known (on both sides, if both are a `TopK`); what q has there,
            if p is in full.
    """

    at_least: Tensor
    at_most: Tensor
    tail_mass: Tensor


def kl_divergence_bounds(
    p: Tensor | TopK,
    q: Tensor | TopK,
    *,
    reduction: Reduction | None = "mean",
    input_format: Format | tuple[Format, Format] | None = None,
    dim: int = -1,
    classes: int | None = None,
    base: float | None = None,
    nan_strategy: NanStrategy = "propagate",
    weight: Tensor | None = None,
) -> Bounds:
    r"""Lower and upper bound on KL(p‖q) when only the top k of p are known.

    With S the known classes, and t and u the probability of all others in p and in q,

    .. math:: \sum_{c \in S} p_c \log\frac{p_c}{q_c} + t \log\frac{t}{u} \; \le \; KL(p \| q) \; \le \;
       \sum_{c \in S} p_c \log\frac{p_c}{q_c} + \sum_{c \notin S} v_c \log\frac{v_c}{q_c}

    The lower bound takes all other classes as one: merging classes never makes a divergence larger. It is the
    divergence itself where p and q are proportional on those classes. For the upper bound, none of them has more than
    the least of the k likeliest. KL is convex in p, so it is largest at a vertex of what that allows: v fills the
    classes with the smallest q up to that limit, until t is used up.

    Args:
        p: the reference, a `TopK` (or a tensor, of which the divergence is known).
        q: the approximation, a tensor of all classes, shape (N, ..., classes). If q is a `TopK`, `at_most` is infinite:
            a class that it does not show may have next to no probability.
        reduction: see `klmetric.kl_divergence`, and so are input_format, dim, classes, base, nan_strategy, weight.
        input_format: likewise, of tensors.
        dim: likewise.
        classes: likewise.
        base: likewise.
        nan_strategy: likewise.
        weight: likewise.

    Returns:
        `at_least`, `at_most` and `tail_mass`, a named tuple, without gradients. (`kl_divergence` gives the first of
        them with its gradient.)

    Raises:
        TypeError: for an input of the wrong kind.
        ValueError: for a wrong shape, device, option or weight, and for bad rows with `nan_strategy="error"`.

    Examples:
        >>> import torch
        >>> from klmetric import TopK, kl_divergence, kl_divergence_bounds
        >>> p, q = torch.tensor([[3.0, 1.0, 0.0, -1.0, -1.0]]), torch.tensor([[2.0, 1.0, 1.0, -1.0, -2.0]])
        >>> teacher = TopK(*p.log_softmax(-1).topk(2), classes=5)
        >>> kl_divergence_bounds(teacher, q, input_format="logits")
        Bounds(at_least=tensor(0.1644), at_most=tensor(0.3886), tail_mass=tensor(0.0707))
        >>> kl_divergence(p, q, input_format="logits")
        tensor(0.1824)
    """
    options = check_options(False, input_format, dim, "forward", 1.0, 0.0, nan_strategy, classes)
    reduction = check_reduction(reduction)
    unit = check_base(base)
    with torch.no_grad():
        rows = measure(p, q, weight, options, fields=OF_TAILS)
    assert rows.fields is not None
    tail, most = rows.fields
    sums = vector.of_batch(rows)
    numbers = sums.tolist() if may_look(sums) else []
    if numbers:
        vector.check_weights(numbers)
        vector.warn_of_invalid(numbers, options, 2, type(p), type(q))
        if (doubt := doubt_of_top(p, rows.left_out)) is not None and isinstance(q, Tensor):
            doubt.say()

    def reduced(x: Tensor, unit: float) -> Tensor:
        if reduction == "none":
            left_out = rows.left_out | rows.kl.isnan() if nan_strategy == "ignore" else rows.left_out
            return torch.where(left_out, 0, x.to(left_out.device)).to(rows.dtype) / unit
        totals = vector.of_rows(x.masked_fill(rows.kl.to(x.device).isnan(), torch.nan), rows.weight)
        return vector.result(totals, [], reduction, options, unit, rows.dtype, rows.kl.device)

    return Bounds(reduced(rows.kl, unit), reduced(most, unit), reduced(tail, 1.0))
