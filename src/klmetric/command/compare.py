"""`klmetric compare`: from the arguments, which have been checked, to the exit status."""

import sys
from functools import partial
from pathlib import Path
from signal import default_int_handler
from typing import Any

from klmetric.command.against_size import draw_against_size
from klmetric.command.arguments import Arguments, limits_of, names_of, sizes_of
from klmetric.command.comparison import Comparison, Task
from klmetric.command.distributions import divergences_of, draw_distributions
from klmetric.command.ending import BAD_INPUT, DONE, FAILED, INTERRUPTED, ctrl_c, interruptible
from klmetric.command.kept_rows import KeptRows, kept_rows
from klmetric.command.limits import exceeded
from klmetric.command.measure import empty, measure_share
from klmetric.command.opening import open_task
from klmetric.command.output import write
from klmetric.command.page import to_page
from klmetric.command.picture import Draw, as_file, pyplot_for_files
from klmetric.command.processes import merge_over_processes, processes_of_this_run
from klmetric.command.progress import progress
from klmetric.command.report import as_dict
from klmetric.command.worst import find_worst, look_at_worst
from klmetric.saved.errors import InputError, said_of
from klmetric.saved.vocabulary import Vocabulary, open_vocabulary


def run_compare(arguments: Arguments) -> int:
    """Do what the command says, and return its exit status.

    Raises:
        InputError: for what cannot be measured, or written.
    """
    with processes_of_this_run() as (rank, processes):
        return _run(arguments, rank, processes)


def _run(arguments: Arguments, rank: int, processes: int) -> int:
    above, below = limits_of(arguments)
    task = open_task(arguments, {**above, **below})
    names, sizes = names_of(arguments), sizes_of(arguments)
    if arguments.plot_file or arguments.html_file:
        pyplot_for_files()  # which may be missing
    vocabulary = None if arguments.vocab is None else open_vocabulary(arguments.vocab)
    with kept_rows(arguments.rows, task, names) as rows:
        result, have_all = _measured(task, rank, processes, rows)
        if not have_all:
            return BAD_INPUT  # which another process explains
        faults = rows.finish(rank, processes) if rows and result.samples else []
    if rank:
        return _status(result, [])
    if not result.samples:
        print("Interrupted. No sample was measured.", file=sys.stderr)
        return INTERRUPTED
    faults += _look_at_worst(result, vocabulary)
    report = as_dict(result, names, _more_options(arguments), sizes)
    failed = exceeded(report, above, below)
    report["limits"] = {"above": above, "below": below, "failed": failed}
    distributions: Draw = partial(
        draw_distributions, report=report, divergences=divergences_of(result, names), unit=result.unit
    )
    against_size: Draw | None = partial(draw_against_size, report=report) if sizes else None
    suffix = arguments.plot_file.suffix if arguments.plot_file else ""
    faults += write(
        arguments,
        report,
        lambda: as_file(against_size or distributions, suffix),
        lambda: to_page(report, distributions, against_size),
    )
    if result.is_partial:
        print(f"Interrupted: this is of {result.samples:,} of {task.samples:,} samples.", file=sys.stderr)
    for sentence in failed:
        print(f"Failed: {sentence}", file=sys.stderr)
    if faults:
        unexpected = next((fault for fault in faults if not isinstance(fault, InputError)), None)
        raise InputError("\n".join(map(said_of, faults))) from unexpected
    return _status(result, failed)


def _measured(task: Task, rank: int, processes: int, kept: KeptRows | None) -> tuple[Comparison, bool]:
    """What all processes have measured, and whether all of them have.

    Raises:
        InputError: if this process could not; after the others have heard of it, or they would wait.
    """
    result = empty(task)
    rows = task.reference.first_row(task.samples) // processes
    failure: InputError | None = None
    with interruptible() as is_interrupted, progress(rows, rank, processes) as advance:
        try:
            keep = None if kept is None else kept.add
            measure_share(result, rank, processes, advance, is_interrupted, keep)
        except InputError as error:
            failure = error
    have_all = processes == 1 or merge_over_processes(result, rank, processes, failure is not None)
    if failure is not None:
        raise failure
    return result, have_all


def _look_at_worst(result: Comparison, vocabulary: Vocabulary | None) -> list[Exception]:
    """Find the worst rows, and read them again, unless Ctrl-C ends that; and what went wrong with it."""
    find_worst(result)
    rows = sum(len(measured.worst) for measured in result.models)
    if rows:
        try:
            with ctrl_c(default_int_handler), progress(rows, 0, 1, "Reading the worst rows") as advance:
                look_at_worst(result, vocabulary, advance)
        except KeyboardInterrupt:
            print("Interrupted: not all of the worst rows have been read again.", file=sys.stderr)
        except InputError as error:
            return [error]
    return []


def _more_options(arguments: Arguments) -> dict[str, Any]:
    """What decides a report, besides the options of the metric."""
    of_files = ("key", "columns", "indices", "sampled", "header", "id_column", "documents", "limit")
    names = (*of_files, "mask", "weight", "targets", "groups", "more", "floor")
    given = {name: str(x) if isinstance(x := getattr(arguments, name), Path) else x for name in names}
    return {**given, "key": given["key"][0] if given["key"] and len(given["key"]) == 1 else given["key"]}


def _status(result: Comparison, failed: list[str]) -> int:
    return INTERRUPTED if result.is_partial else FAILED if failed else DONE
