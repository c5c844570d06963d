"""What lies beside predictions: masks, weights and groups, one entry for each sample or for each row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klmetric.saved import Choice, InputError, Saved, open_saved

OfRows = Callable[[int, int], Tensor]

# Each takes memory of its own.
MOST_GROUPS = 1000


def weights_of(mask: Path | None, weight: Path | None, predictions: Saved) -> OfRows | None:
    """What gives the weights of rows from one number to another; None where every row counts 1."""
    factors = []
    for option, path in (("--mask", mask), ("--weight", weight)):
        if path is not None:
            factors.append(_checked(_spread(_opened(path, option), predictions, option, path), option, path))
    if not factors:
        return None

    def read(start: int, stop: int) -> Tensor:
        product = factors[0](start, stop)
        for factor in factors[1:]:
            product = product * factor(start, stop)
        return product

    return read


def labels_of(path: Path, predictions: Saved) -> tuple[OfRows, list[str]]:
    """What gives the groups of rows as numbers, and the names of the groups."""
    labels = _labels(path)
    names, numbers = np.unique(labels, return_inverse=True)
    if len(names) > MOST_GROUPS:
        raise InputError(f"--groups must have at most {MOST_GROUPS} groups. Got {len(names)} in {path}.")
    of_samples = torch.from_numpy(numbers.reshape(labels.shape))

    def read(start: int, stop: int) -> Tensor:
        return of_samples[start:stop]

    saved = Saved(str(path), tuple(of_samples.shape), of_samples.dtype, read)
    return _spread(saved, predictions, "--groups", path), list(map(str, names))


def _opened(path: Path, option: str) -> Saved:
    try:
        return open_saved(path, Choice())
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _labels(path: Path) -> "np.ndarray[Any, Any]":
    if not path.exists():
        raise InputError(f"--groups must name a file. Got {path}, which is not there.")
    if path.suffix == ".txt":
        return np.array(path.read_text(encoding="utf-8").splitlines())
    if path.suffix in (".csv", ".parquet"):
        from klmetric.tables import only_column

        return only_column(path)
    if path.suffix == ".npy":
        try:
            labels: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"--groups: {path} cannot be read as .npy: {error}") from error
        return labels
    raise InputError(f"--groups must be a .txt, .csv, .parquet or .npy file. Got {path}.")


def _spread(saved: Saved, predictions: Saved, option: str, path: Path) -> OfRows:
    """From one entry for each sample, or for each row, to rows."""
    samples, positions = predictions.shape[0], predictions.positions
    if saved.shape in ((samples,), (samples, 1)):

        def of_samples(start: int, stop: int) -> Tensor:
            first = start // positions
            values = saved.read(first, (stop - 1) // positions + 1).reshape(-1)
            return values.repeat_interleave(positions)[start - first * positions :][: stop - start]

        return of_samples
    if saved.shape == predictions.shape[:-1]:

        def of_rows(start: int, stop: int) -> Tensor:
            first = start // positions
            values = saved.read(first, (stop - 1) // positions + 1).reshape(-1)
            return values[start - first * positions :][: stop - start]

        return of_rows
    raise InputError(
        f"{option} must have one entry for each sample, {(samples,)}, or for each row, {predictions.shape[:-1]}."
        f" Got shape {saved.shape} in {path}."
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
