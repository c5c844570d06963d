"""One batch: the same rows of every model, measured against the reference by one thread."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from klmetric.arithmetic.statistics import Statistics, statistics
from klmetric.command.checks import check_format, check_nothing_is_clipped, check_rows
from klmetric.command.comparison import Batch, Task
from klmetric.command.fields import BANDS
from klmetric.command.top_k import log_probs_of as log_probs_of_top_k
from klmetric.command.top_k import rows_of
from klmetric.options import Options
from klmetric.rows.fields import FIRST, OF_CLASSES, OF_TARGETS
from klmetric.rows.measure import measure
from klmetric.rows.topk import TopK
from klmetric.saved.array import IGNORED, Saved
from klmetric.saved.clipped import Rest, nearest, rest_of
from klmetric.saved.formats.llama import their_estimate

# Values, and of the top k the numbers of their classes.
Stretch: TypeAlias = tuple[Tensor, Tensor | None]


@dataclass
class Read:
    """What one thread reads for all: weights, groups and targets, and what can be read only from the beginning on."""

    weight: Tensor
    labels: Tensor
    targets: Tensor | None
    predictions: dict[int, Stretch]  # by id, because one file may be read twice, for other columns of it


def stretch_of(saved: Saved, start: int, stop: int) -> Stretch:
    """The rows of one file from `start` to `stop`, as they stand there."""
    return saved.read(start, stop), None if saved.indices is None else saved.indices.read(start, stop)


@dataclass(frozen=True)
class Side:
    """The same rows of one file: the numbers, what is known of clipped classes, and the grid of the rest."""

    saved: Saved
    x: Tensor | TopK
    rest: Rest | None
    grid: Tensor | None

    @property
    def step(self) -> float:
        """The coarsest; 0 where nothing was rounded."""
        return 0.0 if self.grid is None else self.grid[:, 0].max().item()


def measure_batch(task: Task, start: int, stop: int, read: Read, is_first: bool) -> Batch:
    """The divergences of the rows from `start` to `stop`; one model after the other, so that few rows are held."""
    counts = read.weight > 0
    p = side_of(task, 0, start, stop, read)
    kl, agrees, fields, clipped, steps = [], [], [], [], [p.step]
    bands = torch.zeros_like(read.labels)
    for k, model in enumerate(task.models, 1):
        q = side_of(task, k, start, stop, read)
        options = options_for(task, k)
        if task.is_checked and is_first:
            for place, side in ((0, p), (k, q)):
                if side.saved.input_format is None:  # else the file itself has said it
                    check_format(task, place, side.x[counts])
        both = nearest_of(p, q, options)
        known = _known(task, both, options) if task.fields and not task.is_bounded else None
        if known is None or options.eps or options.direction != "forward":
            its_fields = task.fields if task.is_bounded else ()
            rows = measure(*both, None, replace(options, nan_strategy="propagate"), True, fields=its_fields)
            assert rows.agrees is not None
            of_rows, same, of_tails = rows.kl, rows.agrees, rows.fields
        else:
            of_rows, same, of_tails = known.kl, known.agree[:, 0], None
        if options.nan_strategy == "error":
            check_rows(task.reference, model, p.x, q.x, of_rows, counts, options, start)
        kl.append(of_rows)
        agrees.append(same)
        clipped.append(torch.stack([_mass(side.rest, len(counts)) for side in (p, q)]))
        steps.append(q.step)
        if of_tails is not None:
            fields.append(of_tails)
        if known is not None:
            fields.append(_fields(task, p, q, both, options, read.targets, known))
            if k == 1 and task.has_bands:
                bands = torch.bucketize(known.confidence, torch.tensor(BANDS[1:]).double(), right=True)
    of_models = torch.stack(fields) if fields else torch.zeros(len(kl), 0, len(counts))
    several = (torch.stack(kl), torch.stack(agrees), of_models, torch.stack(clipped))
    targets = torch.full_like(read.labels, IGNORED) if read.targets is None else read.targets
    return Batch(*several, read.weight, read.labels, bands, targets, steps)


def side_of(task: Task, place: int, start: int, stop: int, read: Read) -> Side:
    """The rows of one file from `start` to `stop`: of the reference (0), or of a model (from 1 on)."""
    saved = task.every[place]
    known = read.predictions.get(id(saved))
    x, indices = stretch_of(saved, start, stop) if known is None else known
    if indices is not None:
        top = rows_of(saved, x, indices, task.formats[place], task.sampled, read.weight > 0)
        return Side(saved, top, None, None)
    if saved.grid is None:
        return Side(saved, x[:, : task.classes], None, None)
    grid = saved.grid(start, stop)
    rest = rest_of(x, grid, task.classes)
    if rest is not None and task.options.temperature != 1:
        check_nothing_is_clipped(saved, rest.is_clipped[read.weight > 0], task.options)
    return Side(saved, x[:, : task.classes], rest, grid)


def nearest_of(p: Side, q: Side, options: Options) -> tuple[Tensor | TopK, Tensor | TopK]:
    """What is measured: clipped classes as near to the other side as they may be, the others as they stand."""
    if p.rest is None and q.rest is None:
        return p.x, q.x
    a, b = (_logs(side.x, its_format) for side, its_format in zip((p, q), options.input_format, strict=True))
    log_p, log_q = nearest(a, b, p.rest, q.rest)
    return p.x if p.rest is None else log_p, q.x if q.rest is None else log_q


def _logs(x: Tensor | TopK, input_format: str) -> Tensor:
    assert isinstance(x, Tensor)  # what is clipped meets no top k
    return x.log() if input_format == "probs" else x


def _mass(rest: Rest | None, rows: int) -> Tensor:
    """Of the classes that are clipped, in each row."""
    return torch.zeros(rows).double() if rest is None else rest.likely.squeeze(-1)


def _known(task: Task, both: tuple[Tensor | TopK, Tensor | TopK], options: Options) -> Statistics:
    """The divergences, and what else the fields are made of."""
    p, q = both
    assert isinstance(p, Tensor)
    assert isinstance(q, Tensor)
    measures = any(name in OF_CLASSES for name in task.fields)
    return statistics(p, q, options.input_format, options.temperature, FIRST if measures else FIRST[:1], measures)


def _fields(
    task: Task,
    p: Side,
    q: Side,
    both: tuple[Tensor | TopK, Tensor | TopK],
    options: Options,
    targets: Tensor | None,
    known: Statistics,
) -> Tensor:
    """What else is asked of each row, shape (fields, rows)."""
    temperature, formats = options.temperature, options.input_format
    masses = (known.log_mass_p, known.log_mass_q)
    values = {name: of_row(known) for name, of_row in OF_CLASSES.items() if name in task.fields}
    if targets is not None:
        sides = zip((p, q), formats, masses, strict=True)
        log_p, log_q = (log_probs_of(*side, targets.unsqueeze(1), temperature).squeeze(1) for side in sides)
        values |= {name: of_row(log_p, log_q) for name, of_row in OF_TARGETS.items()}
    if "llama_cpp" in task.fields:
        assert isinstance(p.x, Tensor)
        assert isinstance(both[1], Tensor)
        b = both[1].double().log() if formats[1] == "probs" else both[1]
        values["llama_cpp"] = their_estimate(p.x, b, masses[1])
    return torch.stack([values[name] for name in task.fields])


def log_probs_of(side: Side, input_format: str, log_mass: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The logarithms of the probabilities of some classes: of those that are clipped, the edge; NaN if not known.

    Args:
        side: p or q.
        input_format: of it.
        log_mass: what to subtract for log-probabilities that are normalised, shape (rows,).
        classes: of each row, shape (rows, some), `klmetric.saved.array.IGNORED` for none.
        temperature: divides logits.
    """
    if isinstance(side.x, TopK):
        return log_probs_of_top_k(side.x, classes)
    x = side.x.gather(1, classes.where(classes != IGNORED, 0)).double()
    x = x.log() if input_format == "probs" else x
    if side.grid is not None:
        x = torch.where(x == -torch.inf, side.grid[:, 1:], x)
        if temperature == 1 and side.x.shape[1] == side.saved.classes:
            return x  # of a normaliser that has seen every class before they were rounded
    return x / temperature - log_mass.unsqueeze(1)


def options_for(task: Task, place: int) -> Options:
    """With the formats of the reference and of one model: those that were asked for, but where a file knows its own."""
    p_format, q_format = (task.every[k].input_format or task.formats[k] for k in (0, place))
    return replace(task.options, input_format=(p_format, q_format))
