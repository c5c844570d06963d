"""Limits of the values of a report, beyond which the command fails."""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from klmetric.command.numbers import number
from klmetric.options import quantile_name
from klmetric.saved.errors import InputError

# A value of the report and a number.
LIMIT = re.compile(r"(?P<key>[a-z][\w.]*)=(?P<limit>\S+)")
KEYS = ("mean", "stderr", "low", "high", "max", "agreement", "count", "infinite", "invalid")


def parsed(given: list[str] | None, tightest: Callable[[float, float], float]) -> dict[str, float]:
    """The limit of each value, of several the tightest."""
    limits: dict[str, float] = {}
    for text in (part for limit in given or [] for part in re.split(r"[,\s]+", limit.strip())):
        match = LIMIT.fullmatch(text)
        try:
            # p99.9 as the table has it, or p99_9 as the report has it.
            key, limit = (match["key"].replace(".", "_"), float(match["limit"])) if match else ("", math.nan)
        except ValueError:
            key, limit = "", math.nan
        if not key or math.isnan(limit):
            raise InputError(f"A limit must be a value and a number, as mean=0.01. Got {text!r}.")
        quantile = quantile_of(key)
        key = key if quantile is None else quantile_name(quantile)
        if key not in KEYS and quantile is None:
            raise InputError(f"A limit must be of {', '.join(KEYS)}, or of a quantile, as p99_9. Got {key!r}.")
        limits[key] = tightest(limits.get(key, limit), limit)
    return limits


def quantile_of(key: str) -> float | None:
    """The quantile that a key names."""
    if not re.fullmatch(r"p\d+(_\d+)?", key):
        return None
    share = Decimal(key[1:].replace("_", ".")) / 100
    return float(share) if share <= 1 else None


def exceeded(report: dict[str, Any], above: dict[str, float], below: dict[str, float]) -> list[str]:
    """Where a value is beyond a limit, or not known; each as a sentence."""
    found = []
    for model in report["models"]:
        for limits, word in ((above, "above"), (below, "below")):
            for key, limit in limits.items():
                value = float(model[key])
                if math.isnan(value):
                    found.append(f"{model['name']}: {key} is not known, and must not be {word} {limit:g}")
                elif value > limit if word == "above" else value < limit:
                    found.append(f"{model['name']}: {key} = {number(value)} is {word} {limit:g}")
    return found
