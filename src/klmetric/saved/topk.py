"""Top-k predictions on disk: an array of values, and one of the same shape that says which classes they are of."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from klmetric.saved.array import Array, Arrays, Saved
from klmetric.saved.errors import InputError

# Rows to look at for what may be numbers of classes.
ROWS = 16


def paired(values: Saved, indices: Saved, asked: str) -> Saved:
    """Values with the numbers of their classes.

    Args:
        values: shape (..., k).
        indices: likewise.
        asked: what named the indices.

    Raises:
        InputError: if they do not go together.
    """
    if not _are_whole(indices.dtype):
        raise InputError(
            f"--indices must be integers, the numbers of classes. Got {_named(indices.dtype)} in {indices.name}. Are"
            " they the values?"
        )
    samples = values.shape[0] if values.shape else 0
    if values.shape != indices.shape or not values.lengths(0, samples).equal(indices.lengths(0, samples)):
        raise InputError(
            f"--indices must have the shape of the values. Got {indices.shape} in {indices.name} and {values.shape} in"
            f" {values.name}. Are both of the same top k?"
        )

    def read(start: int, stop: int) -> Tensor:
        return indices.read(start, stop).long()

    known = replace(indices, read=read, dtype=torch.int64, source=asked)
    return replace(values, indices=known, is_sequential=values.is_sequential or indices.is_sequential)


def beside(every: list[Saved], files: list[tuple[str, Saved]]) -> list[Saved]:
    """Predictions with the files of class numbers that were named: each goes to the one of its shape, in their order.

    Raises:
        InputError: if there are not as many of the one as of the other.
    """
    every = list(every)
    for shape in dict.fromkeys(indices.shape for _, indices in files):
        ours = [pair for pair in files if pair[1].shape == shape]
        places = [k for k, saved in enumerate(every) if saved.shape == shape and saved.indices is None]
        if len(ours) != len(places):
            whose = ", ".join(every[k].name for k in places) or "none of " + ", ".join(saved.name for saved in every)
            raise InputError(
                f"A file of --indices must belong to one file of its shape. Got {', '.join(name for name, _ in ours)}"
                f" of shape {shape}, which is that of {whose}. Name one for each, in their order; or save each with its"
                " values, in one .npz."
            )
        for k, (name, indices) in zip(places, ours, strict=True):
            every[k] = paired(every[k], indices, name)
    return every


def with_all_classes(every: list[Saved], asked: int | None) -> list[Saved]:
    """Predictions of which it is known how many classes there are: as many as in those in full, or as was said.

    Raises:
        InputError: if it cannot be known.
    """
    if all(saved.indices is None for saved in every):
        return every
    full = {saved.classes: saved.name for saved in every if saved.indices is None}
    fewest, most = min(full, default=0), max(full, default=0)
    if asked is None and not full:
        raise InputError(
            "--classes must say how many classes there are (the vocabulary) where no file has all of them. Got top-k"
            f" predictions in {' and '.join(dict.fromkeys(saved.name for saved in every))}. Add --classes 32000, or as"
            " many as there are."
        )
    if asked is None and fewest < most:
        raise InputError(
            f"Files in full must have the same classes. Got {fewest} in {full[fewest]} and {most} in {full[most]}. If"
            f" the last {most - fewest} are padding, say --classes {fewest}."
        )
    return [saved if saved.indices is None else replace(saved, all_classes=asked or most) for saved in every]


def widened(parts: list[Saved]) -> list[Saved]:
    """Shards of top-k predictions, which may have more or fewer classes, all as wide as the widest.

    Raises:
        InputError: if some are in full.
    """
    without = [part.name for part in parts if part.indices is None]
    if len(without) == len(parts):
        return parts
    if without:
        raise InputError(f"--indices must be in every shard, or in none. Got {without[0]} without them.")
    width = max(part.width for part in parts)
    return [part if part.width == width else _as_wide_as(width, part) for part in parts]


def _as_wide_as(width: int, part: Saved) -> Saved:
    def padded(saved: Saved, value: float) -> Saved:
        def read(start: int, stop: int) -> Tensor:
            return torch.nn.functional.pad(saved.read(start, stop), (0, width - part.width), value=value)

        return replace(saved, shape=(*saved.shape[:-1], width), read=read)

    assert part.indices is not None
    return replace(padded(part, torch.nan), indices=padded(part.indices, -1))


def check_no_indices(path: Path, arrays: Arrays, chosen: Iterable[str]) -> None:
    """Ask where an array looks like the numbers of the classes of one of those that are chosen, and is not named."""
    opened: list[tuple[str, Saved]] = []
    for name, opens in arrays:
        with suppress(Exception):  # of another kind, which is no reason not to read those that are chosen
            opened.append((name, opens()))
    chosen = {*chosen}
    values = {saved.shape: name for name, saved in opened if name in chosen and saved.dtype.is_floating_point}
    for name, saved in opened:
        is_alike = saved.shape in values and len(saved.shape) > 1 and saved.rows > 0
        if is_alike and _are_whole(saved.dtype) and are_indices(saved.read(0, min(ROWS, saved.rows)).numpy()):
            raise ask_for_indices(path, values[saved.shape], name)


def are_indices(rows: Array) -> bool:
    """Whether whole numbers of shape (rows, k) look like those of classes; negative ones are padding.

    Those of a row all differ, and some are beyond what an array has that is the order of all classes, or that has 0 and
    1 for what is right.
    """
    order = np.sort(rows.astype(np.int64), -1)
    is_again = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    return bool(order.size and order.max() >= order.shape[-1] and not is_again.any())


def ask_for_indices(path: Path, values: str, indices: str) -> InputError:
    """The question whether predictions are top-k."""
    return InputError(
        f"It must be clear whether rows have all classes. Got {path} with {values!r} and {indices!r}, whole numbers of"
        f" the same shape. If they are the numbers of its classes (a top k), say --indices {indices}; if not, choose"
        " the array with --key, or the column with --columns, and say --no-check."
    )


def _are_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
