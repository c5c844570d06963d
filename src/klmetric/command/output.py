"""What is printed and written of a report: all that can be."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from klmetric.command.arguments import Arguments
from klmetric.command.ending import discard_output
from klmetric.command.fitting import PAGE
from klmetric.command.formats import to_csv, to_json
from klmetric.command.markdown import to_markdown
from klmetric.command.terminal import show
from klmetric.command.whole import write_whole
from klmetric.saved.errors import InputError


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller: rich would end the program, with a status that means something else here."""
        raise BrokenPipeError


def write(
    arguments: Arguments, report: dict[str, Any], draw: Callable[[], bytes], to_page: Callable[[], str]
) -> list[Exception]:
    """Print and write all that can be, and return what went wrong with the rest.

    Args:
        arguments: where to.
        report: as plain data.
        draw: gives the picture.
        to_page: gives the page.
    """
    faults: list[Exception] = []
    try:
        if str(arguments.json_file) == "-":
            sys.stdout.write(to_json(report))
        elif str(arguments.csv_file) == "-":
            sys.stdout.write(to_csv(report))
        elif arguments.markdown:
            sys.stdout.write(to_markdown(report))
        else:
            # In a file or a pipe there is room.
            width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PAGE
            show(report, _Console(width=width, emoji=False))
        sys.stdout.flush()
    except OSError as error:
        if told := discard_output(error):
            faults.append(InputError(told))
    except Exception as error:
        faults.append(error)
    files: list[tuple[Path | None, Callable[[], bytes]]] = [
        (arguments.json_file, lambda: _encoded(to_json(report))),
        (arguments.csv_file, lambda: _encoded(to_csv(report))),
        (arguments.plot_file, draw),
        (arguments.html_file, lambda: _encoded(to_page())),
    ]
    for path, content in files:
        if path is not None and str(path) != "-":
            try:
                write_whole(path, content())
            except Exception as error:  # of whatever kind: what was measured goes where it can
                faults.append(error)
    return faults


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")
