"""Tables that fit into a width: of many models, a row a model."""

from collections.abc import Iterator

from rich.cells import cell_len

from klmetric.command.tables import SAMPLE, Lines

# The width of a page, in characters: where nothing says how wide it is, and in Markdown.
PAGE = 160
# Longer names of columns and rows may be folded, and tables with more lines are not turned.
SHORTEST, LONGEST = 12, 30


def turned(head: list[str], lines: Lines) -> tuple[list[str], Lines]:
    """Rows for columns. These are models, but where they are samples."""
    corner = head[0] if head[0] == SAMPLE else "model"
    first, *rest = map(list, zip([corner, *head[1:]], *lines, strict=True))
    return first, rest


def fitted(head: list[str], lines: Lines, width: int) -> Iterator[tuple[list[str], Lines]]:
    """The table; or if it is too wide, turned; or if that is, in parts with some of the columns."""
    if not fits(head, lines, width) and len(lines) <= LONGEST:
        head, lines = turned(head, lines)
    begin = 1
    while begin < len(head):
        end = begin + 1
        while end < len(head) and fits(*_part(head, lines, begin, end + 1), width):
            end += 1
        yield _part(head, lines, begin, end)
        begin = end


def _part(head: list[str], lines: Lines, begin: int, end: int) -> tuple[list[str], Lines]:
    return [head[0], *head[begin:end]], [[line[0], *line[begin:end]] for line in lines]


def fits(head: list[str], lines: Lines, width: int) -> bool:
    """Whether it does with its numbers whole. Names may be folded, within reason."""
    columns = [list(column) for column in zip(*lines, strict=True)]
    first = min(max(map(_width, [head[0], *columns[0]])), max(width // 4, SHORTEST))
    others = [
        max(min(cell_len(name), SHORTEST), *map(_width, column))
        for name, column in zip(head[1:], columns[1:], strict=True)
    ]
    return first + sum(others) + 3 * len(head) + 1 <= width


def _width(cell: str) -> int:
    """Of its longest line."""
    return max(map(cell_len, cell.split("\n")))
