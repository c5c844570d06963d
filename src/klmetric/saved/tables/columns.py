"""Which columns of a table are the classes. Nothing is guessed: what is not clear from their names is asked."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from klmetric.saved.errors import InputError
from klmetric.saved.names import listed

# The last number in a name. What stands around it is the stem.
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)
# What pandas and people call columns that are no classes. A number after it is no class either: `Unnamed: 0`.
NO_CLASSES = re.compile(
    r"|unnamed: \d+|(__)?index(_level_\d+__)?|id|labels?|targets?|y|pred(iction)?s?|(sample_)?weights?|mask|loss|"
    r"scores?|kld?|nll|entropy|perplexity|ppl|confidence|accuracy|temperature|epoch|fold|split|groups?",
    re.IGNORECASE,
)


def unclear(path: Path, what: str) -> InputError:
    """The question which columns are classes."""
    return InputError(
        f"It must be clear which columns are classes. Got {path} with {what}. Name the classes with --columns, and one"
        " that names the rows with --id."
    )


def recognised(kinds: Mapping[str, bool], path: Path) -> dict[str, str]:
    """The classes by what names them in every table: a number, or a word; and the columns that they are in.

    They have nothing but numbers for names, or one stem with running numbers, or all are words and all hold floats.

    Args:
        kinds: the names of the columns, and whether they hold floats.
        path: of the table, for the message.

    Raises:
        InputError: for anything else, with the columns that do not belong.
    """
    names = list(kinds)
    running = {stem: by_number for stem, by_number in _stems(names).items() if len(by_number) > 1}
    if all(name.isdecimal() for name in names) or (len(running) == 1 and not _besides(names, running)):
        return _numbered(names, path)
    if len(running) > 1:
        ranges = [described(by_number[k] for k in sorted(by_number)) for by_number in running.values()]
        raise unclear(path, f"{', and '.join(ranges)}: numbers after {len(running)} stems")
    if running:
        (by_number,) = running.values()
        raise unclear(
            path,
            f"{described(by_number[k] for k in sorted(by_number))}, and {listed(_besides(names, running))} besides",
        )
    if odd := sorted(name for name, is_float in kinds.items() if not is_float or NO_CLASSES.fullmatch(name)):
        raise unclear(path, f"{len(names) - len(odd)} columns of floats, and {listed(odd)} besides")
    return {name: name for name in names}


def named(patterns: str, names: list[str], path: Path) -> dict[str, str]:
    """As `recognised`, of the columns that `--columns` names, in its order; those of one pattern by number.

    A class is named by the number after the stem, by what the star of the one pattern stands for, or by its column.
    """
    chosen: dict[str, None] = {}
    for pattern in map(str.strip, patterns.split(",")):
        fitting = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise InputError(f"`--columns` must be of the table. Got {pattern!r}, and {path} has {listed(names)}.")
        numbers = _stems(fitting)
        if len(numbers) == 1 and not _besides(fitting, numbers):
            (by_number,) = numbers.values()
            fitting = [by_number[k] for k in sorted(by_number)]
        chosen.update(dict.fromkeys(fitting))
    found, stems = list(chosen), _stems(list(chosen))
    if len(stems) == 1 and not _besides(found, stems):
        return {str(_number(name)): name for name in found}
    if patterns.count("*") == 1 and not re.search(r"[,?\[]", patterns):
        before, after = patterns.strip().split("*")
        return {name[len(before) : len(name) - len(after)]: name for name in found}
    return {name: name for name in found}


def in_the_order_of(other: Mapping[str, str], own: dict[str, str], path: Path) -> dict[str, str]:
    """The columns of the classes of another table, and then what more there is: it may be padding.

    Raises:
        InputError: if one is missing.
    """
    if missing := [name for key, name in other.items() if key not in own]:
        raise InputError(
            f"Every table must have the same classes. Got no column {missing[0]!r} in {path}, but"
            f" {described(own.values())}, for {described(other.values())}. Name the classes with --columns, twice if"
            " those of the models have other names."
        )
    return {key: own[key] for key in (*other, *(key for key in own if key not in other))}


def described(names: Iterable[str]) -> str:
    """The columns, for a reader: p_0 to p_9."""
    names = list(names)
    stems = _stems(names)
    if len(names) > 2 and len(stems) == 1:
        (numbers,) = stems.values()
        if list(numbers) == list(range(_number(names[0]), _number(names[0]) + len(names))):
            return f"{names[0]} to {names[-1]}"
    return listed(names)


def _stems(names: Iterable[str]) -> dict[tuple[str, str], dict[int, str]]:
    """For each stem, the columns by their numbers."""
    stems: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for name in names:
        if match := NUMBERED.fullmatch(name):
            stems[match[1], match[3]].setdefault(int(match[2]), name)
    return stems


def _number(name: str) -> int:
    match = NUMBERED.fullmatch(name)
    assert match is not None
    return int(match[2])


def _besides(names: list[str], stems: Mapping[tuple[str, str], Mapping[int, str]]) -> list[str]:
    """The names without one of these stems, or with a number that is there already (p_1 and p_01)."""
    within = {name for by_number in stems.values() for name in by_number.values()}
    return sorted(set(names) - within)


def _numbered(names: list[str], path: Path) -> dict[str, str]:
    """By number, without gaps. Where the names are nothing but numbers, these may be numbers of anything."""
    by_number: dict[int, str] = {_number(name): name for name in names}
    numbers = sorted(by_number)
    if len(by_number) < len(names):
        raise unclear(path, f"{listed(names)}, of which some have the same number")
    first = 0 if 0 in by_number else 1
    if not names[0].isdecimal() and numbers != list(range(first, first + len(names))):
        missing = next(k for k in range(first, numbers[-1]) if k not in by_number)
        raise unclear(path, f"{listed(by_number[k] for k in numbers)}, and none with the number {missing}")
    return {str(k): by_number[k] for k in numbers}
