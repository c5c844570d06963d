"""The options that every entry point shares, checked once and kept together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias
from zlib import crc32

from torch import Tensor

Format: TypeAlias = Literal["probs", "log_probs", "logits"]
Direction: TypeAlias = Literal["forward", "reverse", "jeffreys"]
Reduction: TypeAlias = Literal["mean", "sum", "batchmean", "none"]
NanStrategy: TypeAlias = Literal["propagate", "ignore", "error"]

FORMATS = ("probs", "log_probs", "logits")
DIRECTIONS = ("forward", "reverse", "jeffreys")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
NAN_STRATEGIES = ("propagate", "ignore", "error")


@dataclass(frozen=True)
class Options:
    """What decides the divergence of a row: how the inputs are read, and what is measured of them."""

    input_format: tuple[Format, Format] = ("probs", "probs")
    dim: int = -1
    direction: Direction = "forward"
    temperature: float = 1.0
    eps: float = 0.0
    nan_strategy: NanStrategy = "propagate"

    def fingerprint(self, *also: object) -> tuple[int, int]:
        """Two numbers of 16 bits that tell apart totals that were measured with other options, or of something else.

        torchmetrics takes states for the same that differ by less than 1e-5, which numbers of 16 bits never do.
        """
        return divmod(crc32(repr((self, *also) if also else self).encode()), 2**16)


def check_options(
    log_prob: bool,
    input_format: Format | tuple[Format, Format] | None,
    dim: int,
    direction: Direction,
    temperature: float,
    eps: float,
    nan_strategy: NanStrategy,
) -> Options:
    """Check the public arguments and return them as one value."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"`dim` must be an int, the index of the class axis. Got {dim!r}.")
    check_choice("direction", direction, DIRECTIONS)
    check_choice("nan_strategy", nan_strategy, NAN_STRATEGIES)
    if not (is_number(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"`temperature` must be a finite number above 0. Got {temperature!r}.")
    if not (is_number(eps) and 0 <= eps < 1):
        raise ValueError(
            f"`eps` must be a probability, at least 0 and below 1. Got {eps!r}. It is a floor under probabilities."
        )
    return Options(_formats(log_prob, input_format), dim, direction, float(temperature), float(eps), nan_strategy)


def check_reduction(reduction: Reduction | None) -> Reduction:
    """Check `reduction`; None is another spelling of "none"."""
    reduction = "none" if reduction is None else reduction
    check_choice("reduction", reduction, REDUCTIONS)
    return reduction


def check_base(base: float | None) -> float:
    """Check `base` and return the nats in one unit of it."""
    if base is None:
        return 1.0
    if not (is_number(base) and 1 < base < math.inf):
        raise ValueError(f"`base` must be a finite number above 1. Got {base!r}. Use 2 for bits, None for nats.")
    return math.log(base)


def unit_name(base: float | None) -> str:
    """The name of the unit that `base` makes."""
    return "nats" if base is None else "bits" if base == 2 else f"base {base:g}"


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`, with the nearest of them as the likely fix."""
    if isinstance(value, str) and value in allowed:
        return
    near = get_close_matches(value, allowed, n=1, cutoff=0.5) if isinstance(value, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Got {value!r}.{hint}")


def _formats(log_prob: bool, input_format: Format | tuple[Format, Format] | None) -> tuple[Format, Format]:
    if not isinstance(log_prob, bool):
        if isinstance(log_prob, Tensor):
            hint = " Data go to metric.update(p, q), or to the function kl_divergence(p, q)."
            raise TypeError(f"`log_prob` must be a bool. Got a tensor.{hint}")
        hint = " `reduction` is the second argument." if isinstance(log_prob, str) else ""
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


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
