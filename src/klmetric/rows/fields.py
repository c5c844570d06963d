"""What may be asked of each row besides its divergence: a line for each number, of which the totals keep the mean."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command asks for the names before torch is imported, which takes seconds
    from torch import Tensor

    from klmetric.arithmetic.statistics import Statistics
    from klmetric.options import Format, Options

# How many of the most likely classes are looked at, in order.
FIRST = (1, 5, 10)

# Of all classes.
OF_CLASSES: "dict[str, Callable[[Statistics], Tensor]]" = {
    "reverse": lambda row: row.reverse,
    "jensen_shannon": lambda row: row.jensen_shannon,
    "total_variation": lambda row: row.total_variation,
    "agreement_1": lambda row: row.agree[..., 0].double(),
    "agreement_5": lambda row: row.agree[..., 1].double(),
    "agreement_10": lambda row: row.agree[..., 2].double(),
}
# Of the logarithms of the probability of the target, in the reference and in the model. The products are for the
# correlation, and for the root of the mean square.
OF_TARGETS: "dict[str, Callable[[Tensor, Tensor], Tensor]]" = {
    "nll": lambda log_p, log_q: -log_p,
    "ln_ratio": lambda log_p, log_q: log_p - log_q,
    "nll_squared": lambda log_p, log_q: log_p.square(),
    "nll_by_ln_ratio": lambda log_p, log_q: -log_p * (log_p - log_q),
    "ln_ratio_squared": lambda log_p, log_q: (log_p - log_q).square(),
    "delta_p": lambda log_p, log_q: log_q.exp() - log_p.exp(),
    "delta_p_squared": lambda log_p, log_q: (log_q.exp() - log_p.exp()).square(),
}
# Of rows of which not all classes are known: what p (q, if p is in full) has in those that are not, and the largest
# divergence that there may be.
OF_TAILS = ("tail_mass", "at_most")


def fields_of(
    names: Sequence[str], p: "Tensor", q: "Tensor", kl: "Tensor | None", targets: "Tensor | None", options: "Options"
) -> "tuple[Statistics, Tensor]":
    """Ask them of rows: what else is known of these, and the fields, shape (names, ...), in float64.

    Args:
        names: of the fields.
        p: reference, shape (..., classes).
        q: approximation, of the shape of p.
        kl: the divergences of the rows, if they are known already.
        targets: a class of each row, where fields are of targets.
        options: how p and q are read.
    """
    from klmetric.arithmetic.device import device_of_float64
    from klmetric.arithmetic.statistics import statistics

    host = device_of_float64(p.device)
    p, q, kl = p.to(host), q.to(host), None if kl is None else kl.to(host)
    are_of_classes = any(name in OF_CLASSES for name in names)
    ks = FIRST if are_of_classes else FIRST[:1]
    known = statistics(p, q, options.input_format, options.temperature, ks, are_of_classes, kl)
    logs = None
    if targets is not None:
        sides = zip((p, q), options.input_format, strict=True)
        logs = [log_of_targets(x, form, targets.to(host), options.temperature) for x, form in sides]
    return known, values_of(names, known, logs)


def values_of(names: Sequence[str], known: "Statistics", logs: "Sequence[Tensor] | Tensor | None") -> "Tensor":
    """The fields, of what is known of rows, and of what p and q give their targets (`log_of_targets`)."""
    import torch

    values = {name: of_row(known) for name, of_row in OF_CLASSES.items() if name in names}
    if logs is not None:
        log_p, log_q = logs[0] - known.log_mass_p, logs[1] - known.log_mass_q
        values |= {name: of_row(log_p, log_q) for name, of_row in OF_TARGETS.items() if name in names}
    values |= {"tail_mass": torch.zeros_like(known.kl), "at_most": known.kl}  # of rows in full
    return torch.stack([values[name] for name in names])


def log_of_targets(x: "Tensor", input_format: "Format", targets: "Tensor", temperature: float) -> "Tensor":
    """The logarithm of what a row gives its target, before it is normalised."""
    of_target = x.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double()
    return (of_target.log() if input_format == "probs" else of_target) / temperature
