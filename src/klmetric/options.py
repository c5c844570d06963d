"""The options that every entry point shares, checked once and kept together."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from typing import Literal, TypeAlias
from zlib import crc32

Format: TypeAlias = Literal["probs", "log_probs", "logits"]
Direction: TypeAlias = Literal["forward", "reverse", "jeffreys", "jensen_shannon"]
Reduction: TypeAlias = Literal["mean", "sum", "batchmean", "none"]
NanStrategy: TypeAlias = Literal["propagate", "ignore", "error"]

FORMATS = ("probs", "log_probs", "logits")
DIRECTIONS = ("forward", "reverse", "jeffreys", "jensen_shannon")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
NAN_STRATEGIES = ("propagate", "ignore", "error")
# What other libraries call these options.
ELSEWHERE = {
    "from_logits": "input_format='logits'",
    "log_target": "input_format='log_probs'",
    "axis": "dim",
    "num_classes": "classes",
}


@dataclass
class Options:
    """What decides the divergence of a row: how the inputs are read, and what is measured of them.

    Once made they do not change. (A frozen one takes five times as long to make, and the function makes one a call.)
    """

    input_format: tuple[Format, Format] = ("probs", "probs")
    dim: int = -1
    direction: Direction = "forward"
    temperature: float = 1.0
    eps: float = 0.0
    nan_strategy: NanStrategy = "propagate"
    # Not shown, so that the fingerprints of earlier versions, which did not have them, stay what they were.
    classes: int | None = field(default=None, repr=False)
    ignore_index: int = field(default=-100, repr=False)

    def fingerprint(self, *also: object) -> tuple[int, int]:
        """Two numbers of 16 bits that tell apart totals that were measured with other options, or of something else.

        torchmetrics takes states for the same that differ by less than 1e-5, which numbers of 16 bits never do.
        """
        if self.classes is not None:
            also = (*also, "classes", self.classes)
        if self.ignore_index != -100:
            also = (*also, "ignore_index", self.ignore_index)
        return divmod(crc32(repr((self, *also) if also else self).encode()), 2**16)


def check_options(
    log_prob: bool,
    input_format: Format | tuple[Format, Format] | None,
    dim: int,
    direction: Direction,
    temperature: float,
    eps: float,
    nan_strategy: NanStrategy,
    classes: int | None = None,
    ignore_index: int = -100,
) -> Options:
    """Check the public arguments and return them as one value."""
    axis = as_int("dim", dim)
    if axis is None:
        raise TypeError(f"`dim` must be an int, the index of the class axis. Got {dim!r}.")
    first = None if classes is None else as_int("classes", classes)
    if classes is not None and first is None:
        raise TypeError(f"`classes` must be an int, how many of the first classes to take, or None. Got {classes!r}.")
    if first is not None and first < 1:
        raise ValueError(f"`classes` must be how many of the first classes to take, at least 1. Got {classes!r}.")
    no_target = as_int("ignore_index", ignore_index)
    if no_target is None:
        raise TypeError(f"`ignore_index` must be an int, what stands for no target. Got {ignore_index!r}.")
    check_choice("direction", direction, DIRECTIONS)
    check_choice("nan_strategy", nan_strategy, NAN_STRATEGIES)
    divisor, floor = as_number("temperature", temperature), as_number("eps", eps)
    if divisor is None or not 0 < divisor < math.inf:
        raise ValueError(f"`temperature` must be a finite number above 0. Got {temperature!r}.")
    if floor is None or not 0 <= floor < 1:
        raise ValueError(
            f"`eps` must be a probability, at least 0 and below 1. Got {eps!r}. It is a floor under probabilities."
        )
    formats = _formats(log_prob, input_format)
    return Options(formats, axis, direction, float(divisor), float(floor), nan_strategy, first, no_target)


def check_reduction(reduction: Reduction | None) -> Reduction:
    """Check `reduction`; None is another spelling of "none"."""
    reduction = "none" if reduction is None else reduction
    check_choice("reduction", reduction, REDUCTIONS)
    return reduction


def check_base(base: float | None) -> float:
    """Check `base` and return the nats in one unit of it."""
    if base is None:
        return 1.0
    number = as_number("base", base)
    if number is None or not 1 < number < math.inf:
        raise ValueError(f"`base` must be a finite number above 1. Got {base!r}. Use 2 for bits, None for nats.")
    return math.log(number)


def unit_name(base: float | None) -> str:
    """The name of the unit that `base` makes."""
    return "nats" if base is None else "bits" if base == 2 else f"base {base:g}"


def quantile_name(q: float) -> str:
    """The name of a quantile, from the digits of its percentage: p50, p99_9."""
    percent = format(Decimal(str(abs(q))) * 100, "f")
    percent = percent.rstrip("0").rstrip(".") if "." in percent else percent
    return "p" + percent.replace(".", "_")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`, with the nearest of them as the likely fix."""
    if isinstance(value, str) and value in allowed:
        return
    near = nearest(value, allowed)
    hint = f" Did you mean {near!r}?" if near else ""
    raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Got {value!r}.{hint}")


def nearest(value: object, allowed: Iterable[str]) -> str | None:
    """The one that was probably meant, if any is near."""
    near = get_close_matches(value, allowed, n=1, cutoff=0.5) if isinstance(value, str) else []
    return near[0] if near else None


def meant_by(name: str, known: Iterable[str]) -> str | None:
    """The argument that was probably meant by one of this name, as it is written."""
    return ELSEWHERE.get(name) or nearest(name, known)


def _formats(log_prob: bool, input_format: Format | tuple[Format, Format] | None) -> tuple[Format, Format]:
    if not isinstance(log_prob, bool):
        from torch import Tensor  # as in `as_number`

        if isinstance(log_prob, Tensor):
            hint = " Data go to metric.update(p, q), or to the function kl_divergence(p, q)."
            raise TypeError(f"`log_prob` must be a bool. Got a tensor.{hint}")
        near = nearest(log_prob, (*FORMATS, *REDUCTIONS))
        hint = f" Did you mean {'input_format' if near in FORMATS else 'reduction'}={near!r}?" if near else ""
        raise TypeError(f"`log_prob` must be a bool. Got {log_prob!r}.{hint}")
    if input_format is None:
        return ("log_probs", "log_probs") if log_prob else ("probs", "probs")
    # A pair may arrive as a list, from YAML.
    pair = tuple(input_format) if isinstance(input_format, (tuple, list)) else (input_format, input_format)
    if len(pair) != 2:
        raise ValueError(f"`input_format` must be one format, or a pair (for p, for q). Got {input_format!r}.")
    for one in pair:
        check_choice("input_format", one, FORMATS)
    if log_prob and pair != ("log_probs", "log_probs"):
        raise ValueError(
            "`log_prob=True` means `input_format='log_probs'`, and the two must agree."
            f" Got log_prob=True and input_format={input_format!r}. Leave `log_prob` out."
        )
    return pair


def as_number(name: str, value: object) -> float | None:
    """The number as Python has it, whether it came from there, from numpy or in a tensor; None if it is none.

    Raises:
        TypeError: for a tensor that requires a gradient: none would come back.
    """
    if type(value) is int or type(value) is float:
        return value
    # Here, because the command checks its options without them.
    import numpy as np
    import torch

    is_short = False
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise TypeError(
                f"`{name}` must be a number: no gradient flows into it. Got a tensor that requires grad. Give"
                " tensor.item(), or have it in the logits, through which gradients flow."
            )
        is_short = value.is_floating_point() and value.dtype is not torch.float64
        value = value.item() if value.numel() == 1 else None
    elif isinstance(value, (np.generic, np.ndarray)):
        is_short = value.dtype.kind == "f" and value.itemsize < 8
        value = value.item() if value.size == 1 else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # 0.1 in float32 is meant to be 0.1, and not the number nearest to it with so few bits.
    return float(str(np.float32(value))) if is_short else value


def as_int(name: str, value: object) -> int | None:
    """The same for a whole number."""
    number = as_number(name, value)
    return number if isinstance(number, int) else None
