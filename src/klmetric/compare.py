"""Saved predictions of several models measured against a reference, in one pass and in constant memory."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from klmetric.accumulate.sync import gather
from klmetric.clipped import Rest, nearest, rest_of
from klmetric.llama import storage_error
from klmetric.options import Format, Options, check_base
from klmetric.rows.invalid import fault
from klmetric.rows.measure import measure
from klmetric.rows.rows import Rows
from klmetric.saved import InputError, Saved
from klmetric.summary import KLDivergenceSummary
from klmetric.totals import paired, pairs, sketch, vector

# Bytes of one file that are held at once, by all threads.
BATCHES = 2**25
# More would wait for Python.
MOST_THREADS = 16
# Rows of samples of different lengths that are added at once, each sample as long as the longest.
PADDED = 2**20


@dataclass
class Measured:
    """What one model comes to.

    Attributes:
        saved: its predictions.
        summary: of all rows.
        groups: of the rows of each group, by its label.
        step: the coarsest grid that log-probabilities were rounded to; 0 where they were not.
        clipped: over the rows, the sums of what p has, and q has, in classes that are clipped, as
            `klmetric.totals.pairs`.
    """

    saved: Saved
    summary: KLDivergenceSummary
    groups: dict[str, KLDivergenceSummary] = field(default_factory=dict)
    step: float = 0.0
    clipped: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    @property
    def summaries(self) -> list[KLDivergenceSummary]:
        """All of them."""
        return [self.summary, *self.groups.values()]


@dataclass(frozen=True)
class Task:
    """What to compare, and how.

    Attributes:
        reference: p.
        models: each of them q, in turn.
        options: what is measured of a row, as in `klmetric.KLDivergence`.
        base: of the logarithm.
        quantiles: to report.
        top: how many of the worst rows.
        weight: gives the weights of rows from one number to another.
        labels: gives the groups of them, as numbers of `label_names`.
        label_names: of the groups.
        classes: how many of the first classes to take; None for all.
        samples: how many of the first samples to take.
        batch_rows: rows that a thread reads at once; None for a few MiB.
        is_checked: whether to look at the first rows for another format than was said.
    """

    reference: Saved
    models: list[Saved]
    options: Options
    base: float | None
    quantiles: tuple[float, ...]
    top: int
    weight: Callable[[int, int], Tensor] | None
    labels: Callable[[int, int], Tensor] | None
    label_names: list[str]
    classes: int | None
    samples: int
    batch_rows: int | None
    is_checked: bool = True


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        task: what was asked for.
        models: what each of them comes to.
        differences: for each pair of models (i, j), the sums of `klmetric.totals.paired` over the rows that count for
            all.
        samples: how many were measured.
        step: as in `Measured`, of the reference.
    """

    task: Task
    models: list[Measured]
    differences: dict[tuple[int, int], Tensor]
    samples: int = 0
    step: float = 0.0

    @property
    def is_partial(self) -> bool:
        """Whether it was ended before all samples were measured."""
        return self.samples < self.task.samples

    @property
    def unit(self) -> float:
        """The nats in one unit."""
        return check_base(self.task.base)

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """Mean of model i less that of model j, over the same rows, and its standard error, in the unit of `base`."""
        sign = 1 if i < j else -1
        mean, error = paired.difference(self.differences[min(i, j), max(i, j)])
        return sign * mean / self.unit + 0.0, error / self.unit  # not -0

    def storage_error(self, measured: Measured) -> tuple[float, float] | None:
        """What rounding in the files can add to the mean, in the unit of `base`; None where nothing was rounded."""
        if not (self.step or measured.step):
            return None
        mean = vector.value(measured.summary.totals.tolist(), "mean", "ignore")
        usual, largest = storage_error(self.step, measured.step, mean)
        return usual / self.unit, largest / self.unit

    def clipped(self, measured: Measured) -> tuple[float, float] | None:
        """The mean mass of p, and of q, in classes that are clipped; None where none is."""
        weight = measured.summary.totals[vector.WEIGHT].item()
        p, q, *_ = measured.clipped.tolist()
        return (p / weight, q / weight) if p or q else None


def empty(task: Task) -> Comparison:
    """Nothing measured yet."""

    def summary() -> KLDivergenceSummary:
        options = {name: getattr(task.options, name) for name in ("input_format", "direction", "temperature", "eps")}
        # Rows that are no distributions have been refused before they come here, or are left out.
        one = KLDivergenceSummary(
            **options,
            base=task.base,
            nan_strategy="ignore",
            quantiles=task.quantiles,
            top=task.top,
            sync_on_compute=False,
        )
        one.set_dtype(torch.float64)
        return one

    models = [Measured(saved, summary(), {name: summary() for name in task.label_names}) for saved in task.models]
    return Comparison(task, models, {pair: paired.empty() for pair in combinations(range(len(models)), 2)})


def measure_share(
    result: Comparison, rank: int, processes: int, advance: Callable[[int], None], is_interrupted: Callable[[], bool]
) -> None:
    """Measure this process's share of the samples, the next one in the order of the ranks.

    Args:
        result: to add to. Whatever happens, it holds whole samples, of all models.
        rank: of this process.
        processes: how many share the samples.
        advance: is called with the number of rows after each batch.
        is_interrupted: whether to end after this batch.

    Raises:
        InputError: for rows that are no distributions, and files that cannot be read.
    """
    reference = result.task.reference
    sample, end = _share(result.task, rank, processes)
    at_once = end if reference.starts is None else max(1, PADDED // reference.positions)
    row = reference.first_row(sample)
    pending: _Batch | None = None
    for batch in _batches(result, row, reference.first_row(end), is_interrupted):
        pending = batch if pending is None else _Batch.joined(pending, batch)
        while (whole := min(end, reference.sample_at(row + len(pending)), sample + at_once)) > sample:
            rows = reference.first_row(whole) - row
            _add(result, pending.part(slice(rows)), reference.lengths(sample, whole))
            pending = pending.part(slice(rows, None))
            sample, row = whole, row + rows
        advance(len(batch))


def _share(task: Task, rank: int, processes: int) -> tuple[int, int]:
    """The first sample of a process, and that of the next."""
    return rank * task.samples // processes, (rank + 1) * task.samples // processes


def _batches(result: Comparison, row: int, end: int, is_interrupted: Callable[[], bool]) -> Iterator["_Batch"]:
    """The rows from one number to another, measured by several threads, in order.

    Threads that each measure a batch of their own do not wait for one another, as those do that share each operation on
    one batch: where other programs hold the cores, waiting takes most of the time.
    """
    reference = result.task.reference
    threads = min(torch.get_num_threads(), MOST_THREADS)
    of_a_row = reference.classes * reference.dtype.itemsize
    size = result.task.batch_rows or max(1, BATCHES // (threads + 2) // of_a_row)
    running: deque[Future[_Batch]] = deque()
    is_first = True
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            while (row < end and not is_interrupted()) or running:
                while row < end and len(running) <= threads and not is_interrupted():
                    stop = min(end, row + size)
                    read = _read_in_order(result, row, stop)
                    running.append(pool.submit(_measure, result, row, stop, read, is_first))
                    row, is_first = stop, False
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


@dataclass
class _Read:
    """What one thread reads for all: weights and groups of rows, and what can be read only from the beginning on."""

    weight: Tensor
    labels: Tensor
    predictions: dict[int, Tensor]  # by id, because one file may be read twice, for other columns of it


def _read_in_order(result: Comparison, start: int, stop: int) -> _Read:
    task = result.task
    every = (task.reference, *(measured.saved for measured in result.models))
    return _Read(
        torch.ones(stop - start) if task.weight is None else task.weight(start, stop),
        torch.zeros(stop - start, dtype=torch.int64) if task.labels is None else task.labels(start, stop),
        {id(saved): saved.read(start, stop) for saved in every if saved.is_sequential},
    )


def merge_over_processes(result: Comparison, rank: int, processes: int, has_failed: bool) -> bool:
    """Bring together what all processes have measured, in one collective.

    Args:
        result: of this process; afterwards, of all.
        rank: of this process.
        processes: how many share the samples.
        has_failed: whether it could not measure its share.

    Returns:
        Whether none has failed.
    """
    summaries = [summary for measured in result.models for summary in measured.summaries]
    begin, end = _share(result.task, rank, processes)
    for summary in summaries:
        # If it was interrupted: the samples of the next process are numbered by where they are.
        summary.totals = summary.totals.index_fill(0, torch.tensor(sketch.SEEN), end - begin)
    steps = [result.step, *(measured.step for measured in result.models)]
    head = torch.tensor([has_failed, result.samples, *steps], dtype=torch.float64)
    sums = [*result.differences.values(), *(measured.clipped for measured in result.models)]
    states = [head, *(summary.totals for summary in summaries), *sums]
    gathered = torch.stack(gather(torch.cat(states)))
    head, *parts = torch.split(gathered, [len(state) for state in states], 1)
    result.samples = int(head[:, 1].sum())
    result.step, *of_models = head[:, 2:].amax(0).tolist()
    for measured, step in zip(result.models, of_models, strict=True):
        measured.step = step
    for summary, part in zip(summaries, parts[: len(summaries)], strict=True):
        summary.totals = summary._merging()(part)
        summary._update_count, summary._computed = 1, None
    merged = iter([_together(*part) for part in parts[len(summaries) :]])
    result.differences = {pair: next(merged) for pair in result.differences}
    for measured in result.models:
        measured.clipped = next(merged)
    return not bool(head[:, 0].any())


@dataclass
class _Batch:
    """Rows of every model.

    Attributes:
        kl: divergences, shape (models, rows).
        agrees: whether the most likely class is the same, likewise.
        weight: shape (rows,).
        labels: the numbers of their groups, likewise.
        clipped: the masses of p and of q in classes that are clipped, shape (models, 2, rows).
        steps: the coarsest of the grids that the reference and each model were rounded to.
    """

    kl: Tensor
    agrees: Tensor
    clipped: Tensor
    weight: Tensor
    labels: Tensor
    steps: list[float]

    def __len__(self) -> int:
        return self.kl.shape[1]

    def part(self, rows: slice) -> "_Batch":
        return replace(self, **{name: getattr(self, name)[..., rows] for name in _OF_ROWS})

    @staticmethod
    def joined(a: "_Batch", b: "_Batch") -> "_Batch":
        joined = {name: torch.cat([getattr(a, name), getattr(b, name)], -1) for name in _OF_ROWS}
        return _Batch(**joined, steps=[*map(max, a.steps, b.steps)])


_OF_ROWS = ("kl", "agrees", "clipped", "weight", "labels")


def _measure(result: Comparison, start: int, stop: int, read: _Read, is_first: bool) -> _Batch:
    """The divergences of the rows from `start` to `stop`."""
    task, weight = result.task, read.weight

    def rows_of(saved: Saved) -> tuple[Tensor, Rest | None, float]:
        known = read.predictions
        x = known[id(saved)] if id(saved) in known else saved.read(start, stop)
        if saved.grid is None:
            return x[:, : task.classes], None, 0.0
        grid = saved.grid(start, stop)
        rest = rest_of(x, grid, task.classes)
        if rest is not None and task.options.temperature != 1:
            _check_nothing_is_clipped(saved, rest.is_clipped[weight > 0], task.options)
        return x[:, : task.classes], rest, grid[:, 0].max().item()

    p, rest_of_p, step_of_p = rows_of(task.reference)
    kl, agrees, clipped, steps = [], [], [], [step_of_p]
    for measured in result.models:
        q, rest_of_q, step_of_q = rows_of(measured.saved)
        options = _options_for(task.options, task.reference, measured.saved)
        if task.is_checked and is_first:
            for k, (saved, x) in enumerate(((task.reference, p), (measured.saved, q))):
                _check_format(saved, x[weight > 0], options.input_format, k)
        a, b, rests = p, q, (rest_of_p, rest_of_q)
        if rest_of_p is not None or rest_of_q is not None:
            log_p, log_q = (x.log() if f == "probs" else x for x, f in zip((p, q), options.input_format, strict=True))
            log_p, log_q = nearest(log_p, log_q, *rests)
            # What has nothing clipped is measured as it stands.
            a, b = (p if rest_of_p is None else log_p), (q if rest_of_q is None else log_q)
        rows = measure(a, b, None, replace(options, nan_strategy="propagate"), True)
        if options.nan_strategy == "error":
            _check_rows(task.reference, measured.saved, p, q, rows.kl, weight, options, start)
        assert rows.agrees is not None
        kl.append(rows.kl)
        agrees.append(rows.agrees)
        masses = [torch.zeros(len(p)).double() if rest is None else rest.likely.squeeze(-1) for rest in rests]
        clipped.append(torch.stack(masses))
        steps.append(step_of_q)
    return _Batch(torch.stack(kl), torch.stack(agrees), torch.stack(clipped), weight, read.labels, steps)


def _check_nothing_is_clipped(saved: Saved, is_clipped: Tensor, options: Options) -> None:
    if count := int(is_clipped.any(-1).sum()):
        raise InputError(
            "--temperature must be 1 where log-probabilities are clipped: their sum is known, and that of their powers"
            f" is not. Got {options.temperature:g}, and {count:,} such rows at once in {saved.name}. Save the logits"
            " themselves."
        )


def _add(result: Comparison, rows: _Batch, lengths: Tensor) -> None:
    """Add samples that are whole, of so many rows each."""
    task = result.task
    positions, is_even = task.reference.positions, task.reference.starts is None

    def of_samples(x: Tensor) -> Tensor:
        """As (samples, positions), each filled up with 0 to the longest of all: no sum depends on others."""
        if is_even:
            return x.reshape(-1, positions)
        places = torch.arange(positions) < lengths.unsqueeze(-1)
        return x.new_zeros(places.shape).masked_scatter_(places, x)

    weight, labels = of_samples(rows.weight), of_samples(rows.labels)
    for k, measured in enumerate(result.models):
        kl, agrees = of_samples(rows.kl[k]), of_samples(rows.agrees[k])
        measured.summary.add_rows(Rows(kl, None if is_even and task.weight is None else weight, agrees))
        for number, group in enumerate(measured.groups.values()):
            # Of all samples, so that they keep their numbers.
            group.add_rows(Rows(kl, torch.where(labels == number, weight, 0), agrees))
        if bool(rows.clipped[k].any()):
            masses = torch.where(rows.kl[k].isnan(), 0, rows.clipped[k]) * rows.weight
            batch = torch.stack([pairs.total(mass) for mass in masses.double()], 1).flatten()
            measured.clipped = _together(measured.clipped, batch)
    # Of the rows that count for all models.
    common = of_samples(torch.where(rows.kl.isnan().any(0), 0, rows.weight)).double()
    for (i, j), sums in result.differences.items():
        batch = paired.of_rows(of_samples(rows.kl[i]), of_samples(rows.kl[j]), common)
        result.differences[i, j] = _together(sums, batch)
    result.samples += len(lengths)
    result.step = max(result.step, rows.steps[0])
    for measured, step in zip(result.models, rows.steps[1:], strict=True):
        measured.step = max(measured.step, step)


def _together(*sums: Tensor) -> Tensor:
    return torch.tensor(pairs.merge([part.tolist() for part in sums]), dtype=torch.float64)


def _options_for(options: Options, reference: Saved, model: Saved) -> Options:
    """The formats that were asked for, but where a file knows its own."""
    p_format, q_format = options.input_format
    return replace(options, input_format=(reference.input_format or p_format, model.input_format or q_format))


def _check_format(saved: Saved, x: Tensor, formats: tuple[Format, Format], k: int) -> None:
    """Ask where the numbers look like another format than was said: nothing is guessed."""

    def better(its_format: Format) -> str:
        pair = [its_format if i == k else formats[i] for i in range(2)]
        return f"--input-format {','.join(dict.fromkeys(pair))}"

    x = x.double()
    x = x[~x.isnan().any(-1)]
    if not x.numel():
        return
    negative, sums = bool((x < 0).any()), x.sum(-1)
    are_sums_1 = bool(((sums - 1).abs() < 0.02).all())
    if formats[k] == "probs" and negative:
        are_logs = bool((x <= 0).all())
        what = "log-probabilities" if are_logs else "logits"
        raise InputError(
            f"Probabilities must not be negative. Got {x.min().item():g} in {saved.name}. Are they {what}? Then say so"
            f" with {better('log_probs' if are_logs else 'logits')}."
        )
    if formats[k] == "probs" and not bool(((sums - 1).abs() < 0.5).all()):
        raise InputError(
            f"Probabilities should add up to 1. Got {sums[(sums - 1).abs().argmax()].item():g} in {saved.name}. Are"
            f" they logits? Then say so with {better('logits')}; if they are only not normalised, with --no-check."
        )
    if formats[k] != "probs" and not negative and are_sums_1:
        raise InputError(
            f"{saved.name} looks like probabilities: nothing in it is negative, and rows add up to 1. If so, say"
            f" {better('probs')}; if they are {formats[k]} all the same, --no-check."
        )


def _check_rows(
    reference: Saved, model: Saved, p: Tensor, q: Tensor, kl: Tensor, weight: Tensor, options: Options, start: int
) -> None:
    bad = (kl.isnan() & (weight > 0)).nonzero()
    if not len(bad):
        return
    i = int(bad[0, 0])
    sample = reference.sample_at(start + i)
    position = start + i - reference.first_row(sample)
    where = f"sample {sample}, position {position}" if len(reference.shape) > 2 else f"row {sample}"
    both = zip((reference, model), (p, q), options.input_format, strict=True)
    faults = [(saved.name, fault(x[i], input_format)) for saved, x, input_format in both]
    name, reason = next(((name, text) for name, text in faults if text), (model.name, "has a divergence of NaN"))
    raise InputError(
        f"Every row must be a distribution. Got {where} of {name}, which {reason}. Leave such rows out with"
        " --nan-strategy ignore, or with --mask."
    )
