"""Tables as text (.csv, .tsv): what parts the cells, how decimals are written, whether the first row names the columns.

pyarrow reads them; here is what it has to be told. Nothing is guessed: what the first lines leave open is asked.
"""

import csv
import gzip
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc

from klmetric.saved.errors import HeaderError, InputError
from klmetric.saved.names import listed, suffix_of

# Lines to look at, and characters after the first two.
LINES, CHARACTERS = 50, 2**20

WITH_POINT = re.compile(r"[+-]?\d*\.\d+(e[+-]?\d+)?", re.IGNORECASE)
WITH_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)
LIKE_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")


@dataclass(frozen=True)
class Delimited:
    """How a file of text is to be read.

    Attributes:
        path: of the file.
        delimiter: what parts the cells.
        decimal: what stands before the decimals.
        width: how many cells the first row has.
        has_header: whether the first row names the columns; without one, they are called 0, 1, 2 and so on.
    """

    path: Path
    delimiter: str
    decimal: str
    width: int
    has_header: bool

    def open(self, **convert: Any) -> Any:
        """A reader of batches, one after the other, with these options of `pyarrow.csv.ConvertOptions`."""
        stream = pa.input_stream(str(self.path), compression="gzip" if _is_gzip(self.path) else None)
        names = None if self.has_header else [str(k) for k in range(self.width)]
        # Blocks hold some rows, however wide.
        reading = pc.ReadOptions(block_size=max(2**20, 256 * self.width), column_names=names)
        # Of one column, an empty line is a row: without it, the rows after it would be those of other samples.
        parsing = pc.ParseOptions(delimiter=self.delimiter, ignore_empty_lines=self.width > 1)
        return pc.open_csv(stream, reading, parsing, pc.ConvertOptions(decimal_point=self.decimal, **convert))


def look_at_text(path: Path, header: bool | None) -> Delimited:
    """How the file is to be read, by its first lines.

    Args:
        path: of the file.
        header: whether the first row names the columns, where that is known.

    Raises:
        InputError: where the lines can be read in more than one way.
        HeaderError: where the first row can.
    """
    lines = _first_lines(path)
    delimiter = "\t" if suffix_of(path).startswith(".tsv") else _delimiter(lines, path)
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    decimal = _decimal(rows, path)
    if header is None:
        header = _has_header([[cell.replace(decimal, ".") for cell in row] for row in rows], path)
    return Delimited(path, delimiter, decimal, len(rows[0]) if rows else 0, header)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _first_lines(path: Path) -> list[str]:
    lines: list[str] = []
    with (gzip.open if _is_gzip(path) else open)(
        path, "rt", encoding="utf-8-sig", errors="replace", newline=""
    ) as file:
        for line in file:
            if line.strip("\r\n"):  # an empty one says nothing
                lines.append(line)
            if len(lines) == LINES or (len(lines) > 1 and sum(map(len, lines)) > CHARACTERS):
                break
    return lines


def _delimiter(lines: list[str], path: Path) -> str:
    """A comma, a semicolon or a tab. Commas may also stand before the decimals, where another sign parts the cells."""
    # Without the first condition, a wide line would be one cell, and longer than csv allows.
    found = [
        sign
        for sign in ",;\t"
        if any(sign in line and len(next(csv.reader([line], delimiter=sign))) > 1 for line in lines[:1])
    ]
    if len(found) > 1:
        both = found
        found = [
            sign
            for sign in found
            if sign != ","
            and all(
                "," not in cell or WITH_COMMA.fullmatch(cell.strip())
                for cell in chain.from_iterable(csv.reader(lines, delimiter=sign))
            )
        ]
        if len(found) != 1:
            raise InputError(
                f"It must be clear what parts the cells of a table. Got {' and '.join(map(repr, both))} in the first"
                f" line of {path}. Save it with commas and decimal points."
            )
    if not found and all(_is_number(cell) for line in lines for cell in line.split(" ")):  # as numpy.savetxt writes
        return " "
    return found[0] if found else ","


def _decimal(rows: list[list[str]], path: Path) -> str:
    cells = list(chain.from_iterable(rows))
    commas = [cell for cell in cells if WITH_COMMA.fullmatch(cell)]
    if not commas:
        return "."
    points = [cell for cell in cells if WITH_POINT.fullmatch(cell)]
    if points or all(LIKE_THOUSANDS.fullmatch(cell) for cell in commas):
        also = f" and {points[0]}" if points else ", which may be thousands"
        raise InputError(
            f"It must be clear what stands before the decimals. Got {commas[0]}{also} in {path}. Save it with decimal"
            " points, and nothing between thousands."
        )
    return ","


def _has_header(rows: list[list[str]], path: Path) -> bool:
    """Whether the first row names the columns: numbers are data, unless they count the classes."""
    if not rows:
        return True
    first, *others = rows
    numbers = [cell for cell in first if _is_number(cell)]
    if not numbers:
        return True
    are_all, are_whole = len(numbers) == len(first), all(map(str.isdecimal, numbers))
    counts = [float(cell) - float(numbers[0]) for cell in numbers] == list(range(len(numbers)))
    if counts and are_whole and int(numbers[0]) in (0, 1) and (len(numbers) > 2 or "" in first):  # "": of the index
        return True
    # A first row of whole numbers, each another, may name the classes where no other row is of that kind.
    may_be_names = are_whole and len({*numbers}) == len(numbers) and not any(all(map(str.isdecimal, r)) for r in others)
    if are_all and not may_be_names and not (counts and float(numbers[0]) in (0, 1)):
        return False
    raise HeaderError(
        f"It must be clear whether the first row of a table names its columns. Got {listed(first)} in {path}. Say"
        " --header if it names them, --no-header if it is data."
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_0 as 10
