"""One batch: the same rows of every model, measured against the reference by one thread."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klmetric.command.checks import check_format, check_nothing_is_clipped, check_rows
from klmetric.command.comparison import Task
from klmetric.options import Options
from klmetric.rows.measure import measure
from klmetric.saved.array import Saved
from klmetric.saved.clipped import Rest, nearest, rest_of


@dataclass
class Batch:
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

    def part(self, rows: slice) -> "Batch":
        """Some of the rows."""
        return replace(self, **{name: getattr(self, name)[..., rows] for name in _OF_ROWS})

    @staticmethod
    def joined(a: "Batch", b: "Batch") -> "Batch":
        """One after the other."""
        joined = {name: torch.cat([getattr(a, name), getattr(b, name)], -1) for name in _OF_ROWS}
        return Batch(**joined, steps=[*map(max, a.steps, b.steps)])


_OF_ROWS = ("kl", "agrees", "clipped", "weight", "labels")


@dataclass
class Read:
    """What one thread reads for all: weights and groups of rows, and what can be read only from the beginning on."""

    weight: Tensor
    labels: Tensor
    predictions: dict[int, Tensor]  # by id, because one file may be read twice, for other columns of it


@dataclass(frozen=True)
class _Side:
    """The same rows of one file: the numbers, what is known of clipped classes, and the coarsest grid of the rest."""

    x: Tensor
    rest: Rest | None
    step: float


def measure_batch(task: Task, start: int, stop: int, read: Read, is_first: bool) -> Batch:
    """The divergences of the rows from `start` to `stop`; one model after the other, so that few rows are held."""
    counts = read.weight > 0
    p = _side(task, task.reference, start, stop, read)
    kl, agrees, clipped, steps = [], [], [], [p.step]
    for model in task.models:
        q = _side(task, model, start, stop, read)
        options = _options_for(task.options, task.reference, model)
        if task.is_checked and is_first:
            for k, (saved, side) in enumerate(((task.reference, p), (model, q))):
                if saved.input_format is None:  # else the file itself has said it
                    check_format(saved, side.x[counts], options.input_format, k)
        rows = measure(*_nearest(p, q, options), None, replace(options, nan_strategy="propagate"), True)
        if options.nan_strategy == "error":
            check_rows(task.reference, model, p.x, q.x, rows.kl, counts, options, start)
        assert rows.agrees is not None
        kl.append(rows.kl)
        agrees.append(rows.agrees)
        clipped.append(torch.stack([_mass(side.rest, len(counts)) for side in (p, q)]))
        steps.append(q.step)
    return Batch(torch.stack(kl), torch.stack(agrees), torch.stack(clipped), read.weight, read.labels, steps)


def _side(task: Task, saved: Saved, start: int, stop: int, read: Read) -> _Side:
    known = read.predictions.get(id(saved))
    x = saved.read(start, stop) if known is None else known
    if saved.grid is None:
        return _Side(x[:, : task.classes], None, 0.0)
    grid = saved.grid(start, stop)
    rest = rest_of(x, grid, task.classes)
    if rest is not None and task.options.temperature != 1:
        check_nothing_is_clipped(saved, rest.is_clipped[read.weight > 0], task.options)
    return _Side(x[:, : task.classes], rest, grid[:, 0].max().item())


def _nearest(p: _Side, q: _Side, options: Options) -> tuple[Tensor, Tensor]:
    """What is measured: clipped classes as near to the other side as they may be, the others as they stand."""
    if p.rest is None and q.rest is None:
        return p.x, q.x
    a, b = (s.x.log() if f == "probs" else s.x for s, f in zip((p, q), options.input_format, strict=True))
    log_p, log_q = nearest(a, b, p.rest, q.rest)
    return p.x if p.rest is None else log_p, q.x if q.rest is None else log_q


def _mass(rest: Rest | None, rows: int) -> Tensor:
    """Of the classes that are clipped, in each row."""
    return torch.zeros(rows).double() if rest is None else rest.likely.squeeze(-1)


def _options_for(options: Options, reference: Saved, model: Saved) -> Options:
    """The formats that were asked for, but where a file knows its own."""
    p_format, q_format = options.input_format
    return replace(options, input_format=(reference.input_format or p_format, model.input_format or q_format))
