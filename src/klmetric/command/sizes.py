"""The sizes of models, which their divergences are drawn against."""

import math
import re
from typing import NamedTuple

from klmetric.saved.errors import InputError

# Of memory, and bits a weight.
UNITS = ("GiB", "bpw")
_SIZE = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)


class Sizes(NamedTuple):
    """The size of each model by its name, all in one unit."""

    unit: str
    of: dict[str, float]


def parsed_sizes(given: list[str] | None, models: list[str]) -> Sizes | None:
    """The sizes, one for each of the models; None where none is given.

    Raises:
        InputError: if they are anything else.
    """
    if not given:
        return None
    sizes: dict[str, float] = {}
    units: dict[str, str] = {}
    for text in given:
        name, equals, size = text.rpartition("=")  # a name may have another
        number, unit = _parsed(size.strip())
        if not (name and equals and unit and 0 < number < math.inf):
            raise InputError(
                "--size must be a name and a number above 0, in GiB or bpw (bits a weight), as int8=7.6GiB or"
                f" int8=4.5bpw. Got {text!r}."
            )
        if name not in models:
            raise InputError(f"--size must name a model as the report does: {', '.join(models)}. Got {name!r}.")
        if name in sizes:
            raise InputError(f"--size must be given once for each model. Got two for {name}. Leave one out.")
        sizes[name] = number
        units.setdefault(unit, text)
    if missing := [name for name in models if name not in sizes]:
        raise InputError(
            f"--size must be given for every model, or for none. Got none for {', '.join(missing)}. Add"
            f" --size {missing[0]}=..."
        )
    if len(units) > 1:
        raise InputError(f"--size must have one unit for all models. Got {' and '.join(units.values())}.")
    return Sizes(next(iter(units)), sizes)


def _parsed(size: str) -> tuple[float, str]:
    """A number and its unit, GiB where there is none; nothing where it is no size."""
    match = _SIZE.fullmatch(size)
    if not match:
        return 0.0, ""
    units = {unit.lower(): unit for unit in UNITS}
    return float(match["number"]), units.get(match["unit"].lower() or "gib", "")
