"""Limits of the values of a report, beyond which the command fails."""

import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from klmetric.command.fields import COMPARED, OF_LLAMA
from klmetric.command.numbers import number
from klmetric.options import nearest, quantile_name
from klmetric.rows.fields import OF_CLASSES
from klmetric.saved.errors import InputError
from klmetric.totals.estimates import DELTA_P, PERPLEXITY

# A value of the report and a number.
LIMIT = re.compile(r"(?P<key>[a-z][\w.]*)=(?P<limit>\S+)")
PLAIN = ("mean", "stderr", "low", "high", "max", "agreement", "count", "infinite", "invalid")
# What a model has more than another one.
DIFFERENCES = ("difference", "above_floor")
OF_DIFFERENCES = ("mean", "stderr", "low", "high")
# Each is a value with its error and its interval, which have these names.
OF_ESTIMATES = ("value", *OF_DIFFERENCES[1:])
BOUNDS = ("at_least", "at_most", "tail_mass")
# Of the tail there are quantiles as well.
OF_TAIL = "tail_mass."
OF_MODELS = (
    *OF_CLASSES,
    *OF_LLAMA,
    *BOUNDS,
    *(f"perplexity.{name}" for name in PERPLEXITY),
    "delta_p.mean",
    "delta_p.rms",
)
ESTIMATES = (*OF_MODELS, *(f"{of}.{name}" for of in DIFFERENCES for name in COMPARED))


def parsed(given: list[str] | None, tightest: Callable[[float, float], float]) -> dict[str, float]:
    """The limit of each value, of several the tightest."""
    limits: dict[str, float] = {}
    for text in (part for limit in given or [] for part in re.split(r"[,\s]+", limit.strip())):
        match = LIMIT.fullmatch(text)
        try:
            key, limit = (match["key"], float(match["limit"])) if match else ("", math.nan)
        except ValueError:
            key, limit = "", math.nan
        if not key or math.isnan(limit):
            raise InputError(f"A limit must be a value and a number, as mean=0.01. Got {text!r}.")
        key = _as_in_the_report(key)
        if not _is_known(key):
            some = (*PLAIN, *OF_MODELS, *(f"{of}.mean" for of in DIFFERENCES))
            near = "p50" if key == "median" else None if re.match(r"p\d", key) else nearest(key, some)
            if near is not None:
                raise InputError(f"A limit must be of a value of the report. Got {key!r}. Did you mean {near!r}?")
            raise InputError(
                f"A limit must be of {', '.join(some)}, or of a quantile, as p99_9 or delta_p.p99_9. Got {key!r}."
            )
        limits[key] = tightest(limits.get(key, limit), limit)
    return limits


def _as_in_the_report(key: str) -> str:
    """With p99_9 for p99.9, which is what the table has."""
    before, dot, last = re.sub(r"(?<![^.])(p\d+)\.(\d+)$", r"\1_\2", key).rpartition(".")
    quantile = quantile_of(last)
    return before + dot + (last if quantile is None else quantile_name(quantile))


def _is_known(key: str) -> bool:
    of, _, last = key.rpartition(".")
    return (
        key in (*PLAIN, *ESTIMATES)
        or quantile_of(key) is not None
        or (of in ESTIMATES and last in OF_ESTIMATES)
        or (of in DIFFERENCES and last in OF_DIFFERENCES)
        or (of == "delta_p" and last in (*DELTA_P, "min", "max"))
        or (key.startswith(OF_TAIL) and (last == "max" or quantile_of(last) is not None))
    )


def asked_for(keys: Iterable[str]) -> set[str]:
    """The parts of the report that these are in, and of differences also the fields."""
    parts = [key.split(".") for key in keys]
    return {part[0] for part in parts} | {part[1] for part in parts if part[0] in DIFFERENCES}


def quantile_of(key: str) -> float | None:
    """The quantile that a key names."""
    if not re.fullmatch(r"p\d+(_\d+)?", key):
        return None
    share = Decimal(key[1:].replace("_", ".")) / 100
    return float(share) if share <= 1 else None


def value_at(model: dict[str, Any], key: str) -> float | None:
    """The value of a model that a key names; None where it has none, as the best has no difference."""
    found: Any = model
    for name in key.split("."):
        if name not in found:
            return None
        found = found[name]
    return float(found["value"] if isinstance(found, dict) else found)


def exceeded(report: dict[str, Any], above: dict[str, float], below: dict[str, float]) -> list[str]:
    """Where a value is beyond a limit, or not known; each as a sentence."""
    found = []
    for model in report["models"]:
        for limits, word in ((above, "above"), (below, "below")):
            for key, limit in limits.items():
                value = value_at(model, key)
                if value is None:
                    continue
                if math.isnan(value):
                    found.append(f"{model['name']}: {key} is not known, and must not be {word} {limit:g}")
                elif value > limit if word == "above" else value < limit:
                    found.append(f"{model['name']}: {key} = {number(value)} is {word} {limit:g}")
    return found
