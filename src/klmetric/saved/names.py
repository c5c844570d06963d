"""Names of files, arrays and columns: what they end in, their order, and how a message lists them."""

import re
from collections.abc import Iterable
from pathlib import Path

# Of the file that makes a folder one of `klmetric record`.
RECORDING = "klmetric-record.json"


def suffix_of(path: Path) -> str:
    """What a name ends in: .csv, .CSV as well, and .csv.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix + (".gz" if name.endswith(".gz") else "")


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts part-10 after part-2."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", name)]


def listed(names: Iterable[str]) -> str:
    """Some of the names, for a message."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def are_running(names: Iterable[str]) -> bool:
    """Whether they are the numbers from 0 or 1 on, in any order."""
    names = list(names)
    numbers = sorted(int(name) for name in names if name.isdecimal())
    return numbers in (list(range(len(names))), list(range(1, len(names) + 1)))
