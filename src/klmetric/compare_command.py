"""`klmetric compare`: from the arguments, which have been checked, to the exit status."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Task as Bar,
)
from rich.text import Text

from klmetric.arguments import Arguments, limits_of, options_of, quantile_of
from klmetric.beside import labels_of, weights_of
from klmetric.compare import Comparison, Task, empty, measure_share, merge_over_processes
from klmetric.ending import BAD_INPUT, DONE, FAILED, INTERRUPTED, ctrl_c, discard_output
from klmetric.options import Options, unit_name
from klmetric.report import PAGE, as_dict, exceeded, show, to_csv, to_json, to_markdown
from klmetric.saved import Choice, InputError, Saved, in_the_order_of, open_saved
from klmetric.summary import QUANTILES
from klmetric.totals.picture import draw_several
from klmetric.whole import write_whole


def run_compare(arguments: Arguments) -> int:
    """Do what the command says, and return its exit status.

    Raises:
        InputError: for what cannot be measured, or written.
    """
    with _processes() as (rank, processes):
        return _run(arguments, rank, processes)


def _run(arguments: Arguments, rank: int, processes: int) -> int:
    above, below = limits_of(arguments)
    task = _task(arguments, {**above, **below})
    names = _names(arguments.paths[1:])
    if arguments.plot_file is not None:
        _pyplot()  # which may be missing
    result = empty(task)
    failure: InputError | None = None
    with _interruptible() as is_interrupted, _progress(result, rank, processes) as advance:
        try:
            measure_share(result, rank, processes, advance, is_interrupted)
        except InputError as error:
            failure = error
    if processes > 1:
        have_all = merge_over_processes(result, rank, processes, failure is not None)
        if failure is None and not have_all:
            return BAD_INPUT  # which another process explains
    if failure is not None:
        raise failure
    if rank:
        return _status(result, [])
    if not result.samples:
        print("Interrupted. No sample was measured.", file=sys.stderr)
        return INTERRUPTED
    report = as_dict(result, names, _more_options(arguments))
    found = exceeded(report, above, below)
    report["limits"] = {"above": above, "below": below, "failed": found}
    faults = _write(arguments, report, result, names)
    if result.is_partial:
        print(f"Interrupted: this is of {result.samples:,} of {result.task.samples:,} samples.", file=sys.stderr)
    for sentence in found:
        print(f"Failed: {sentence}", file=sys.stderr)
    if faults:
        raise InputError("\n".join(faults))
    return _status(result, found)


def _more_options(arguments: Arguments) -> dict[str, Any]:
    """What decides a report, besides the options of the metric."""
    names = ("key", "columns", "header", "id_column", "documents", "limit", "mask", "weight", "groups")
    return {name: str(x) if isinstance(x := getattr(arguments, name), Path) else x for name in names}


def _status(result: Comparison, found: list[str]) -> int:
    return INTERRUPTED if result.is_partial else FAILED if found else DONE


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller: rich would end the program, with a status that means something else here."""
        raise BrokenPipeError


def _write(arguments: Arguments, report: dict[str, Any], result: Comparison, names: list[str]) -> list[str]:
    """Print and write all that can be, and return what is to be said of the rest."""
    faults = []
    try:
        if str(arguments.json_file) == "-":
            sys.stdout.write(to_json(report))
        elif arguments.markdown:
            sys.stdout.write(to_markdown(report))
        else:
            # In a file or a pipe there is room.
            width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PAGE
            show(report, _Console(width=width, emoji=False))
        sys.stdout.flush()
    except OSError as error:
        if told := discard_output(error):
            faults.append(told)
    plot = arguments.plot_file
    files: list[tuple[Path | None, Callable[[], bytes]]] = [
        (arguments.json_file, lambda: _encoded(to_json(report))),
        (arguments.csv_file, lambda: _encoded(to_csv(report))),
        (plot, lambda: _picture(plot.suffix if plot else "", result, names, report)),
    ]
    for path, content in files:
        if path is not None and str(path) != "-":
            try:
                write_whole(path, content())
            except InputError as error:
                faults.append(str(error))
    return faults


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _pyplot() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise InputError("--plot needs matplotlib: pip install 'klmetric[compare]'.") from error
    return pyplot


def _picture(suffix: str, result: Comparison, names: list[str], report: dict[str, Any]) -> bytes:
    models = {}
    summaries = {name: measured.summary for name, measured in zip(names, result.models, strict=True)}
    for name in (model["name"] for model in report["models"]):  # in the order of the table
        summary = summaries[name]
        models[name] = (summary._divergences(summary.totals), summary.compute()["mean"].item())
    pyplot, file = _pyplot(), io.BytesIO()
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    draw_several(axis, models, result.unit, unit_name(result.task.base))
    figure.savefig(file, dpi=150, format=suffix.removeprefix("."))
    pyplot.close(figure)
    return file.getvalue()


# --- From the arguments to the task


def _task(arguments: Arguments, limits: dict[str, float]) -> Task:
    columns = arguments.columns or []
    choice = Choice(
        arguments.key,
        next(iter(columns), None),
        arguments.id_column,
        arguments.header,
        documents=arguments.documents,
    )
    reference = open_saved(arguments.paths[0], choice)
    choice = replace(choice, columns=next(reversed(columns), None), classes=reference.columns)
    models = [open_saved(path, choice) for path in arguments.paths[1:]]
    for saved in (reference, *models):
        _check_array(saved)
    for model in models:
        if arguments.key is not None and (same := set(reference.arrays) & set(model.arrays)):
            name = min(name for *_, name in same)
            raise InputError(
                f"--key must not name the same array on both sides. Got {name!r} of one file as {reference.name} and"
                f" {model.name}: its divergence from itself is 0. Save the array of the model in a file of its own."
            )
        _check_pair(reference, model, arguments.classes)
        if not (arguments.id_column or arguments.no_check):
            _check_order(reference, model)
    if reference.ids is not None:
        models = [in_the_order_of(reference.ids, model) for model in models]
    for model in models:
        _check_lengths(reference, model)
    quantiles = sorted({*QUANTILES, *(q for key in limits if (q := quantile_of(key)) is not None)})
    groups = arguments.groups
    labels, label_names = (None, []) if groups is None else labels_of(groups, reference, arguments.id_column)
    return Task(
        reference=reference,
        models=models,
        options=_options(arguments, [reference, *models]),
        base=arguments.base,
        quantiles=tuple(quantiles),
        top=arguments.worst,
        weight=weights_of(arguments.mask, arguments.weight, reference),
        labels=labels,
        label_names=label_names,
        classes=arguments.classes,
        samples=min(reference.shape[0], arguments.limit or reference.shape[0]),
        batch_rows=arguments.batch_rows,
        is_checked=not arguments.no_check,
    )


def _options(arguments: Arguments, every: list[Saved]) -> Options:
    unknown = next((saved for saved in every if saved.input_format is None), None)
    if not (arguments.input_format or "").strip(" ,") and unknown is not None:
        raise InputError(
            f"--input-format must say what the files hold: logits, log_probs or probs. Got none. {_hint(unknown)}"
        )
    return options_of(arguments)


def _hint(saved: Saved) -> str:
    """What the first rows look like."""
    x = saved.read(0, min(saved.rows, 16)).double()
    sums = x.sum(-1)
    if bool((x >= 0).all()) and bool(((sums - 1).abs() < 0.02).all()):
        return f"{saved.name} looks like probs: nothing is negative, and rows add up to 1."
    if bool((x <= 1e-3).all()) and bool((x.logsumexp(-1).abs() < 0.02).all()):
        return f"{saved.name} looks like log_probs: the exponentials of a row add up to 1."
    return f"{saved.name} looks like logits: rows do not add up to 1."


def _check_array(saved: Saved) -> None:
    if len(saved.shape) < 2:
        raise InputError(
            f"Predictions must be of (rows, classes) or (samples, positions, classes). Got shape {saved.shape} in"
            f" {saved.name}. Are they class indices?"
        )
    if saved.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        hint = "Convert them." if saved.dtype.is_floating_point else "Are they class indices?"
        raise InputError(
            "Predictions must be float16, bfloat16, float32 or float64. Got"
            f" {str(saved.dtype).removeprefix('torch.')} in {saved.name}. {hint}"
        )
    if saved.classes == 1:
        raise InputError(
            f"Predictions must have two classes or more. Got shape {saved.shape} in {saved.name}: with one, every"
            " divergence is 0. Of a sigmoid, save both classes: x and 1 - x, or the logits 0 and x."
        )
    if not saved.rows or not saved.classes:
        raise InputError(f"Predictions must have rows and classes. Got shape {saved.shape} in {saved.name}.")


def _check_pair(reference: Saved, model: Saved, classes: int | None) -> None:
    fewest, most = sorted((reference.classes, model.classes))
    if classes is not None and classes > fewest:
        raise InputError(
            f"--classes must be no more than every file has. Got {classes}, and {reference.name} has"
            f" {reference.classes}, {model.name} {model.classes}."
        )
    if fewest != most and classes is None:
        hint = f"If the last {most - fewest} are padding, say --classes {fewest}."
        if reference.shape[:-1] != model.shape[:-1]:
            hint = "Is one of them transposed, or of other data?"
        raise InputError(
            f"Both must have the same classes. Got shape {reference.shape} in {reference.name} and {model.shape} in"
            f" {model.name}. {hint}"
        )
    if (reference.ids is None) != (model.ids is None):
        raise InputError(f"--id is for tables. Got {reference.name} and {model.name}, one of which is none.")
    if reference.shape[:-1] != model.shape[:-1] and reference.ids is None:
        raise InputError(
            f"Both must have the same rows. Got shape {reference.shape} in {reference.name} and {model.shape} in"
            f" {model.name}. Are they of the same data?"
        )
    if reference.tokens is not None and model.tokens is not None:
        if len(reference.tokens) != len(model.tokens):
            raise InputError(
                f"Both must have contexts of the same length. Got others in {reference.name} and {model.name}."
            )
        other = (reference.tokens != model.tokens).nonzero()[0]
        if len(other):
            raise InputError(
                f"Both must be of the same tokens. Got {reference.tokens[other[0]]} in {reference.name} and"
                f" {model.tokens[other[0]]} in {model.name} as token {other[0]}. Were they made from the same text?"
            )


def _check_lengths(reference: Saved, model: Saved) -> None:
    """Of samples that are in the same order."""
    ours, theirs = (saved.lengths(0, saved.shape[0]) for saved in (reference, model))
    if len(other := (ours != theirs).nonzero()):
        k = int(other[0])
        raise InputError(
            f"Both must have samples of the same lengths. Got {ours[k]} and {theirs[k]} rows in sample {k} of"
            f" {reference.name} and {model.name}. Are they of the same data?"
        )


def _check_order(reference: Saved, model: Saved) -> None:
    """Ask where a column that is no class says that the rows are the same, in another order."""
    for name in reference.others:
        if name in model.others:
            ours, theirs = reference.others[name](), model.others[name]()
            is_key = len(np.unique(ours)) == len(ours)
            if is_key and not np.array_equal(ours, theirs) and np.array_equal(np.sort(ours), np.sort(theirs)):
                raise InputError(
                    f"Rows must be in the same order. Got the same values of the column {name!r} in another order in"
                    f" {reference.name} and {model.name}. Align them with --id {name}; or --no-check."
                )


def _names(paths: list[Path]) -> list[str]:
    """Names that tell the models apart, as short as can be."""
    for name in (lambda path: path.stem, lambda path: path.name, str):
        names = [name(path) or str(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({k})" for k, path in enumerate(paths, 1)]


# --- Around the measuring


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """The rank and the number of processes: of the group that there is, or that torchrun asks for."""
    is_ours = not torch.distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_ours:
        torch.distributed.init_process_group("gloo")
    try:
        if torch.distributed.is_initialized():
            yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            yield 0, 1
    finally:
        if is_ours:
            torch.distributed.destroy_process_group()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the measuring after the batch that is being read; a second one ends the program."""
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    with ctrl_c(interrupt):
        yield lambda: is_interrupted


class _Rate(ProgressColumn):
    def render(self, task: Bar) -> Text:
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


@contextmanager
def _progress(result: Comparison, rank: int, processes: int) -> Iterator[Callable[[int], None]]:
    """A bar of the rows of this process, where there is somebody to see it."""
    total = result.task.reference.first_row(result.task.samples) // processes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=rank > 0 or not sys.stderr.isatty()
    ) as bar:
        of_rows = bar.add_task(
            "Measuring" if processes == 1 else f"Measuring (1 of {processes} processes)", total=total
        )
        yield lambda rows: bar.advance(of_rows, rows)
