"""Saved predictions of several models measured against a reference, in one pass and in constant memory."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from klmetric.command.batch import Read, measure_batch, stretch_of
from klmetric.command.comparison import Batch, Comparison, Measured, Task, together
from klmetric.command.fields import BAND_NAMES, SPREADS
from klmetric.rows.rows import Rows
from klmetric.saved.array import IGNORED, Saved
from klmetric.summary import KLDivergenceSummary
from klmetric.totals import moments, pairs

# Bytes of one file that are held at once, by all threads.
BATCHES = 2**25
# More would wait for Python.
MOST_THREADS = 16
# Rows that are added at once, at least: the sums take as long for a few.
ADDED = 2**10
# Rows of samples of different lengths that are added at once, each sample as long as the longest.
PADDED = 2**20


def empty(task: Task) -> Comparison:
    """Nothing measured yet."""

    def summary(top: int = 0) -> KLDivergenceSummary:
        options = {name: getattr(task.options, name) for name in ("input_format", "direction", "temperature", "eps")}
        # Rows that are no distributions have been refused before they come here, or are left out.
        one = KLDivergenceSummary(
            **options,
            base=task.base,
            nan_strategy="ignore",
            quantiles=task.quantiles,
            top=top,
            sync_on_compute=False,
        )
        one.set_dtype(torch.float64)
        return one

    def measured(saved: Saved) -> Measured:
        groups, bands = ({name: summary() for name in names} for names in (task.label_names, bands_of))
        spreads = {name: summary() for name, (field, _) in SPREADS.items() if field in task.fields}
        return Measured(saved, summary(task.top), groups, bands, spreads, moments.empty(len(task.fields)))

    bands_of = BAND_NAMES if task.has_bands else ()
    models = [measured(saved) for saved in task.models]
    nothing = moments.empty(1 + len(task.compared))
    return Comparison(task, models, dict.fromkeys(combinations(range(len(models)), 2), nothing))


def measure_share(
    result: Comparison,
    rank: int,
    processes: int,
    advance: Callable[[int], None],
    is_interrupted: Callable[[], bool],
    keep: Callable[[Batch, int, Tensor], object] | None = None,
) -> None:
    """Measure this process's share of the samples, the next one in the order of the ranks.

    Args:
        result: to add to. Whatever happens, it holds whole samples, of all models.
        rank: of this process.
        processes: how many share the samples.
        advance: is called with the number of rows after each batch.
        is_interrupted: whether to end after this batch.
        keep: is called with the rows of samples that were added, the number of the first and the rows of each.

    Raises:
        InputError: for rows that are no distributions, and files that cannot be read.
    """
    reference = result.task.reference
    sample, end = result.task.share(rank, processes)
    at_once = end if reference.starts is None else max(1, PADDED // reference.positions)
    row = reference.first_row(sample)
    pending: Batch | None = None
    for batch in _larger(_batches(result.task, row, reference.first_row(end), is_interrupted), advance):
        pending = batch if pending is None else Batch.joined(pending, batch)
        while (whole := min(end, reference.sample_at(row + len(pending)), sample + at_once)) > sample:
            rows = reference.first_row(whole) - row
            part, lengths = pending.part(slice(rows)), reference.lengths(sample, whole)
            _add(result, part, lengths)
            if keep is not None:
                keep(part, sample, lengths)
            pending = pending.part(slice(rows, None))
            sample, row = whole, row + rows


def _larger(batches: Iterator[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    """Batches of as many rows as it pays to add at once."""
    some: list[Batch] = []
    for batch in batches:
        some.append(batch)
        advance(len(batch))
        if sum(map(len, some)) >= ADDED:
            yield reduce(Batch.joined, some)
            some.clear()
    if some:
        yield reduce(Batch.joined, some)


def _batches(task: Task, row: int, end: int, is_interrupted: Callable[[], bool]) -> Iterator[Batch]:
    """The rows from one number to another, measured by several threads, in order.

    Threads that each measure a batch of their own do not wait for one another, as those do that share each operation on
    one batch: where other programs hold the cores, waiting takes most of the time. Rows that are computed are of one
    large batch at a time all the same: matrices are multiplied in it, for which many rows are needed at once.
    """
    cores = torch.get_num_threads()
    threads = min(cores, MOST_THREADS)
    of_a_row = max(saved.width * saved.dtype.itemsize for saved in task.every)
    size = task.batch_rows or max(1, BATCHES // (threads + 2) // of_a_row)
    of_each = 1
    if at_once := [saved.at_once for saved in task.every if saved.at_once is not None]:
        size, threads, of_each = task.batch_rows or min(at_once), 1, cores
    running: deque[Future[Batch]] = deque()
    is_first = True
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(of_each)) as pool:
        try:
            while (row < end and not is_interrupted()) or running:
                while row < end and len(running) <= threads and not is_interrupted():
                    stop = min(end, row + size)
                    read = _read_in_order(task, row, stop)
                    running.append(pool.submit(measure_batch, task, row, stop, read, is_first))
                    row, is_first = stop, False
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _read_in_order(task: Task, start: int, stop: int) -> Read:
    weight = torch.ones(stop - start) if task.weight is None else task.weight(start, stop)
    targets = None if task.targets is None else task.targets(start, stop)
    return Read(
        weight if targets is None else torch.where(targets == IGNORED, 0, weight),
        torch.zeros(stop - start, dtype=torch.int64) if task.labels is None else task.labels(start, stop),
        targets,
        {id(saved): stretch_of(saved, start, stop) for saved in task.every if saved.is_sequential},
    )


def _add(result: Comparison, rows: Batch, lengths: Tensor) -> None:
    """Add samples that are whole, of so many rows each."""
    task = result.task
    positions, is_even = task.reference.positions, task.reference.starts is None

    def of_samples(x: Tensor) -> Tensor:
        """As (..., samples, positions), filled up with 0 to the longest of all: no sum depends on others."""
        if is_even:
            return x.reshape(*x.shape[:-1], x.shape[-1] // positions, positions)
        places = torch.arange(positions) < lengths.unsqueeze(-1)
        filled = x.new_zeros(*x.shape[:-1], *places.shape)
        filled[..., places] = x
        return filled

    weight, labels, bands = of_samples(rows.weight), of_samples(rows.labels), of_samples(rows.bands)
    all_kl, all_agrees, all_fields = of_samples(rows.kl), of_samples(rows.agrees), of_samples(rows.fields)
    counts_1 = is_even and task.weight is None and task.targets is None
    for k, measured in enumerate(result.models):
        kl, agrees, fields = all_kl[k], all_agrees[k], all_fields[k]
        measured.summary.add_rows(Rows(kl, None if counts_1 else weight, agrees))
        for numbers, parts in ((labels, measured.groups), (bands, measured.bands)):
            for number, part in enumerate(parts.values()):
                # Of all samples, so that they keep their numbers.
                part.add_rows(Rows(kl, torch.where(numbers == number, weight, 0), agrees))
        if task.fields:
            valid = torch.where(kl.isnan(), 0, weight)
            measured.moments = together(measured.moments, moments.of_rows(fields, valid))
            for name, part in measured.spreads.items():
                field, sign = SPREADS[name]
                x = fields[task.fields.index(field)]
                part.add_rows(Rows(sign * x, torch.where(x >= 0 if sign > 0 else x < 0, valid, 0)))
        if bool(rows.clipped[k].any()):
            masses = torch.where(rows.kl[k].isnan(), 0, rows.clipped[k]) * rows.weight
            batch = torch.stack([pairs.total(mass) for mass in masses.double()], 1).flatten()
            measured.clipped = together(measured.clipped, batch)
    # Of the rows that count for all models.
    common = torch.where(all_kl.isnan().any(0), 0, weight)
    places = [task.fields.index(name) for name in task.compared]
    compared = torch.cat([all_kl.double().unsqueeze(1), all_fields[:, places]], 1)
    for (i, j), sums in result.differences.items():
        result.differences[i, j] = together(sums, moments.of_rows(compared[i] - compared[j], common))
    result.samples += len(lengths)
    result.step = max(result.step, rows.steps[0])
    for measured, step in zip(result.models, rows.steps[1:], strict=True):
        measured.step = max(measured.step, step)
