"""What lies beside predictions: masks, weights, targets and groups, one entry for each sample or for each row."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from klmetric.saved.array import IGNORED, Array, Choice, Saved
from klmetric.saved.errors import HeaderError, InputError, as_bad_input
from klmetric.saved.names import are_running, listed
from klmetric.saved.open import TABLES, kind_of, open_saved
from klmetric.saved.order import in_the_order_of

OfRows = Callable[[int, int], Tensor]

# The group of samples without a label.
MISSING = "(none)"
# Each takes memory of its own.
MOST_GROUPS = 1000


def weights_of(
    mask: Path | None, weight: Path | None, predictions: Saved, id_column: str | None = None
) -> OfRows | None:
    """What gives the weights of rows from one number to another; None where every row counts 1.

    They are in the order of the predictions, or have ids by which they are brought into it.
    """
    factors = []
    for option, path in (("--mask", mask), ("--weight", weight)):
        if path is not None:
            saved = _opened(path, option, predictions, id_column)
            factors.append(_checked(_spread(saved, predictions, option, path), option, path))
    if not factors:
        return None

    def read(start: int, stop: int) -> Tensor:
        product = factors[0](start, stop)
        for factor in factors[1:]:
            product = product * factor(start, stop)
        return product

    return read


def targets_of(path: Path, predictions: Saved, classes: int, id_column: str | None = None) -> OfRows:
    """What gives the targets of rows from one number to another: the class that came true, or `IGNORED`.

    They are in the order of the predictions, or have ids by which they are brought into it.
    """
    saved = _opened(path, "--targets", predictions, id_column)
    samples = predictions.shape[0]
    if predictions.rows > samples and saved.shape in ((samples,), (samples, 1)):
        raise InputError(
            f"--targets must have one entry for each row, {predictions.shape[:-1]}. Got shape {saved.shape} in {path}."
            " Has each position a target of its own?"
        )
    read = _spread(saved, predictions, "--targets", path)

    def checked(start: int, stop: int) -> Tensor:
        values = read(start, stop)
        whole = values.long()
        good = (whole.double() == values.double()) & ((whole == IGNORED) | ((whole >= 0) & (whole < classes)))
        if not bool(good.all()):
            raise InputError(
                f"--targets must be classes, from 0 to {classes - 1}, or {IGNORED} for rows that do not count. Got"
                f" {values[~good][0].item():g} in {path}. Were they made with the same vocabulary?"
            )
        return whole

    return checked


def labels_of(path: Path, predictions: Saved, id_column: str | None) -> tuple[OfRows, list[str]]:
    """What gives the groups of rows as numbers, and the names of the groups.

    They are in the order of the predictions, or have ids by which they are brought into it.
    """
    labels, ids = _labels(path, id_column, predictions.shape[0])
    if ids is not None and predictions.ids is not None:
        theirs = predictions.ids
        if ids.dtype.kind != theirs.dtype.kind:
            ids, theirs = ids.astype(str), theirs.astype(str)
        if len(ids) != len(np.unique(ids)) or not np.array_equal(np.sort(ids), np.sort(theirs)):
            raise InputError(f"--groups must have the ids of the predictions, each once. Got others in {path}.")
        labels = labels[np.argsort(ids)[np.argsort(np.argsort(theirs))]]
    if labels.dtype.kind == "U":
        labels = np.where(labels == "", MISSING, labels)
    names, numbers = np.unique(labels, return_inverse=True)
    if len(names) > MOST_GROUPS:
        raise InputError(f"--groups must have at most {MOST_GROUPS} groups. Got {len(names)} in {path}.")
    of_samples = torch.from_numpy(numbers.reshape(labels.shape))

    rows = of_samples.reshape(-1, of_samples.shape[-1]) if of_samples.ndim > 2 else of_samples

    def read(start: int, stop: int) -> Tensor:
        return rows[start:stop]

    saved = Saved(str(path), tuple(of_samples.shape), of_samples.dtype, read)
    return _spread(saved, predictions, "--groups", path), list(map(str, names))


def _opened(path: Path, option: str, predictions: Saved, id_column: str | None) -> Saved:
    """Where it is not clear whether a table has a header, the number of its rows says so."""
    choice = Choice(columns="*", id=id_column, needs_id=False)
    samples = predictions.shape[0]
    try:
        try:
            saved = open_saved(path, choice)
        except HeaderError:
            without = open_saved(path, replace(choice, header=False))
            saved = open_saved(path, replace(choice, header=True)) if without.shape[0] == samples + 1 else without
        columns = saved.columns or {}
        if len(columns) > 1 and not are_running(columns):
            raise InputError(
                f"Columns of a table must be numbered, one for each position. Got {listed(columns.values())} in {path}."
                " Leave one, and that of --id."
            )
        if predictions.ids is None or saved.ids is None:
            return saved
        return in_the_order_of(predictions.ids, saved)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _labels(path: Path, id_column: str | None, samples: int) -> tuple[Array, Array | None]:
    if not path.exists():
        raise InputError(f"--groups must name a file. Got {path}, which is not there.")
    kind = kind_of(path)
    if kind == ".txt":
        try:
            return np.array(path.read_text(encoding="utf-8").splitlines()), None
        except UnicodeDecodeError as error:
            raise InputError(f"--groups must be text in UTF-8. Got {path}: {error}") from error
    if kind in TABLES:
        with as_bad_input(path, kind):
            from klmetric.saved.tables.labels import labels_in

            return labels_in(path, id_column, samples)
    if kind == ".npy":
        try:
            return np.load(path, allow_pickle=False), None
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"--groups: {path} cannot be read as .npy: {error}") from error
    raise InputError(f"--groups must be a file of {', '.join(('.txt', '.npy', *TABLES))}. Got {path}.")


def _spread(saved: Saved, predictions: Saved, option: str, path: Path) -> OfRows:
    """From one entry for each sample, or for each row, to rows."""
    samples, positions = predictions.shape[0], predictions.positions
    # Where samples differ in length, the rows of one after the other.
    each_row = predictions.shape[:-1] if predictions.starts is None else (predictions.rows,)
    if saved.shape in ((samples,), (samples, 1)):

        def of_samples(start: int, stop: int) -> Tensor:
            first, last = predictions.sample_at(start), predictions.sample_at(stop - 1) + 1
            values = saved.read(first, last).reshape(-1).repeat_interleave(predictions.lengths(first, last))
            return values[start - predictions.first_row(first) :][: stop - start]

        return of_samples
    if saved.shape == each_row:
        width = saved.width if len(saved.shape) > 1 else 1  # its own rows are along its last axis

        def of_rows(start: int, stop: int) -> Tensor:
            first = start // width
            values = saved.read(first, (stop - 1) // width + 1).reshape(-1)
            return values[start - first * width :][: stop - start]

        return of_rows
    of_rows_text = f", or for each row, {each_row}" if positions > 1 else ""
    hint = " Is the first one a header, or the last an empty line?" if saved.shape == (samples + 1,) else ""
    raise InputError(
        f"{option} must have one entry for each sample, {(samples,)}{of_rows_text}. Got shape {saved.shape} in {path}."
        f"{hint}"
    )


def _checked(read: OfRows, option: str, path: Path) -> OfRows:
    def checked(start: int, stop: int) -> Tensor:
        values = read(start, stop).double()
        good = (values == 0) | (values == 1) if option == "--mask" else (values >= 0) & values.isfinite()
        if not bool(good.all()):
            rule = "must be 0 or 1" if option == "--mask" else "must be finite and at least 0"
            raise InputError(f"{option} {rule}. Got {values[~good][0].item():g} in {path}.")
        return values

    return checked
