"""One batch: the same rows of every model, measured against the reference by one thread."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klmetric.arithmetic.statistics import Statistics, statistics
from klmetric.command.checks import check_format, check_nothing_is_clipped, check_rows
from klmetric.command.comparison import Batch, Task
from klmetric.command.fields import BANDS
from klmetric.options import Options
from klmetric.rows.fields import FIRST, OF_CLASSES, OF_TARGETS
from klmetric.rows.measure import measure
from klmetric.saved.array import IGNORED, Saved
from klmetric.saved.clipped import Rest, nearest, rest_of
from klmetric.saved.formats.llama import their_estimate


@dataclass
class Read:
    """What one thread reads for all: weights, groups and targets, and what can be read only from the beginning on."""

    weight: Tensor
    labels: Tensor
    targets: Tensor | None
    predictions: dict[int, Tensor]  # by id, because one file may be read twice, for other columns of it


@dataclass(frozen=True)
class Side:
    """The same rows of one file: the numbers, what is known of clipped classes, and the grid of the rest."""

    saved: Saved
    x: Tensor
    rest: Rest | None
    grid: Tensor | None

    @property
    def step(self) -> float:
        """The coarsest; 0 where nothing was rounded."""
        return 0.0 if self.grid is None else self.grid[:, 0].max().item()


def measure_batch(task: Task, start: int, stop: int, read: Read, is_first: bool) -> Batch:
    """The divergences of the rows from `start` to `stop`; one model after the other, so that few rows are held."""
    counts = read.weight > 0
    p = side_of(task, task.reference, start, stop, read)
    kl, agrees, fields, clipped, steps = [], [], [], [], [p.step]
    bands = torch.zeros_like(read.labels)
    for k, model in enumerate(task.models):
        q = side_of(task, model, start, stop, read)
        options = options_for(task, model)
        if task.is_checked and is_first:
            for side, (saved, x) in enumerate(((task.reference, p.x), (model, q.x))):
                if saved.input_format is None:  # else the file itself has said it
                    check_format(saved, x[counts], options.input_format, side)
        both = nearest_of(p, q, options)
        known = _known(task, both, options) if task.fields else None
        if known is None or options.eps or options.direction != "forward":
            rows = measure(*both, None, replace(options, nan_strategy="propagate"), True)
            assert rows.agrees is not None
            of_rows, same = rows.kl, rows.agrees
        else:
            of_rows, same = known.kl, known.agree[:, 0]
        if options.nan_strategy == "error":
            check_rows(task.reference, model, p.x, q.x, of_rows, counts, options, start)
        kl.append(of_rows)
        agrees.append(same)
        clipped.append(torch.stack([_mass(side.rest, len(counts)) for side in (p, q)]))
        steps.append(q.step)
        if known is not None:
            fields.append(_fields(task, p, q, both, options, read.targets, known))
            if k == 0 and task.has_bands:
                bands = torch.bucketize(known.confidence, torch.tensor(BANDS[1:]).double(), right=True)
    of_models = torch.stack(fields) if fields else torch.zeros(len(kl), 0, len(counts))
    several = (torch.stack(kl), torch.stack(agrees), of_models, torch.stack(clipped))
    targets = torch.full_like(read.labels, IGNORED) if read.targets is None else read.targets
    return Batch(*several, read.weight, read.labels, bands, targets, steps)


def side_of(task: Task, saved: Saved, start: int, stop: int, read: Read) -> Side:
    """The rows of one file from `start` to `stop`."""
    known = read.predictions.get(id(saved))
    x = saved.read(start, stop) if known is None else known
    if saved.grid is None:
        return Side(saved, x[:, : task.classes], None, None)
    grid = saved.grid(start, stop)
    rest = rest_of(x, grid, task.classes)
    if rest is not None and task.options.temperature != 1:
        check_nothing_is_clipped(saved, rest.is_clipped[read.weight > 0], task.options)
    return Side(saved, x[:, : task.classes], rest, grid)


def nearest_of(p: Side, q: Side, options: Options) -> tuple[Tensor, Tensor]:
    """What is measured: clipped classes as near to the other side as they may be, the others as they stand."""
    if p.rest is None and q.rest is None:
        return p.x, q.x
    a, b = (s.x.log() if f == "probs" else s.x for s, f in zip((p, q), options.input_format, strict=True))
    log_p, log_q = nearest(a, b, p.rest, q.rest)
    return p.x if p.rest is None else log_p, q.x if q.rest is None else log_q


def _mass(rest: Rest | None, rows: int) -> Tensor:
    """Of the classes that are clipped, in each row."""
    return torch.zeros(rows).double() if rest is None else rest.likely.squeeze(-1)


def _known(task: Task, both: tuple[Tensor, Tensor], options: Options) -> Statistics:
    """The divergences, and what else the fields are made of."""
    measures = any(name in OF_CLASSES for name in task.fields)
    return statistics(*both, options.input_format, options.temperature, FIRST if measures else FIRST[:1], measures)


def _fields(
    task: Task,
    p: Side,
    q: Side,
    both: tuple[Tensor, Tensor],
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
        b = both[1].double().log() if formats[1] == "probs" else both[1]
        values["llama_cpp"] = their_estimate(p.x, b, masses[1])
    return torch.stack([values[name] for name in task.fields])


def log_probs_of(side: Side, input_format: str, log_mass: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The logarithms of the probabilities of some classes; of those that are clipped, the edge.

    Args:
        side: p or q.
        input_format: of it.
        log_mass: what to subtract for log-probabilities that are normalised, shape (rows,).
        classes: of each row, shape (rows, some), `klmetric.saved.array.IGNORED` for none.
        temperature: divides logits.
    """
    x = side.x.gather(1, classes.where(classes != IGNORED, 0)).double()
    x = x.log() if input_format == "probs" else x
    if side.grid is not None:
        x = torch.where(x == -torch.inf, side.grid[:, 1:], x)
        if temperature == 1 and side.x.shape[1] == side.saved.classes:
            return x  # of a normaliser that has seen every class before they were rounded
    return x / temperature - log_mass.unsqueeze(1)


def options_for(task: Task, model: Saved) -> Options:
    """The formats that were asked for, but where a file knows its own. The floor is of the reference's."""
    p_format, q_format = task.options.input_format
    if task.has_floor and model is task.models[-1]:
        q_format = p_format
    formats = (task.reference.input_format or p_format, model.input_format or q_format)
    return replace(task.options, input_format=formats)
