"""What the tensor `targets` may be: in each row the class that came true, or that the row does not count."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.tracing import may_look
from klmetric.options import Options
from klmetric.rows.fields import OF_TARGETS
from klmetric.rows.tensors import check_data, check_storage

if TYPE_CHECKING:
    from klmetric.rows.topk import TopK

_OF_ONE_HOT = "If they are one-hot, take .argmax(-1)."


def check_targets(
    targets: Tensor, p: "Tensor | TopK", weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Check `targets`, and leave out the rows that have none.

    Args:
        targets: as they were given.
        p: the reference, shape (N, ..., classes).
        weight: of the rows, shape (N, ...); None for 1.
        options: which number stands for no target.

    Returns:
        The targets on the device of p, any class where there is none; and the weight that the rows have left.
    """
    check_kind_of_targets(targets, p)
    shape, classes, device = p.shape[:-1], p.shape[-1], p.device
    targets = targets.to(device, torch.int64, non_blocking=True)
    counts = targets != options.ignore_index
    is_class = (targets >= 0) & (targets < classes)
    if device_of_float64(device).type != "cpu":  # it is not waited for: `vector.check_weights` finds the NaN
        weight = torch.ones(shape, dtype=torch.float64, device=device) if weight is None else weight.double()
        weight = torch.where(is_class | ~counts, weight, torch.nan)
    elif may_look(targets):
        if not bool((is_class | ~counts).all()):
            row = tuple((counts & ~is_class).nonzero()[0].tolist())
            where = str(row[0]) if len(row) == 1 else str(row)
            raise ValueError(
                f"`targets` must be classes, from 0 to {classes - 1}, or ignore_index={options.ignore_index} in rows"
                f" that do not count. Got {int(targets[row])} in row {where}. Are they of another vocabulary, or padded"
                " with another number?"
            )
        if bool(counts.all()):
            return targets, weight
    left = counts if weight is None else weight.masked_fill(~counts, 0)
    return torch.where(is_class, targets, 0), left


def check_kind_of_targets(targets: Tensor, p: "Tensor | TopK") -> None:
    """Raise for what is wrong whatever the classes are."""
    shape, device = p.shape[:-1], p.device
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"`targets` must be a torch.Tensor. Got {type(targets).__name__}. Convert it with torch.as_tensor."
        )
    check_storage("targets", targets)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype is torch.bool:
        hint = "A mask of rows is a `weight`." if targets.dtype is torch.bool else "Convert it with .long()."
        if targets.shape == p.shape:
            hint = _OF_ONE_HOT
        raise TypeError(f"`targets` must be integers, the numbers of classes. Got {targets.dtype}. {hint}")
    if targets.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"`targets` must be on the device of `p`, or on the CPU. Got targets on {targets.device} and p on {device}."
        )
    check_data("targets", targets)
    if targets.shape != shape:
        hint = "Of a language model they are the tokens one place on: those of logits[:, :-1] are tokens[:, 1:]."
        raise ValueError(
            "`targets` must have one class for each row: the batch shape. Got targets"
            f" {tuple(targets.shape)} for batch shape {tuple(shape)}."
            f" {_OF_ONE_HOT if targets.shape == p.shape else hint}"
        )


def check_targets_are_there(fields: tuple[str, ...]) -> None:
    """Raise for rows without targets, where something is asked of these."""
    if any(name in OF_TARGETS for name in fields):  # a compiler knows no sets of keys
        raise ValueError(
            "`targets` must come with every batch, for the perplexity. Got none. Give update(p, q, targets=...) the"
            " class that came true in each row, or leave perplexity=True out."
        )
