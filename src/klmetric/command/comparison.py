"""What is to be compared, and what it comes to: the values that the command works on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klmetric.command.fields import COMPARED
from klmetric.options import Format, Options, check_base
from klmetric.saved.array import Saved
from klmetric.saved.formats.llama import storage_error
from klmetric.totals import moments, pairs, vector
from klmetric.totals.moments import Means

if TYPE_CHECKING:
    from klmetric.summary import KLDivergenceSummary


@dataclass(frozen=True)
class Task:
    """What to compare, and how.

    Attributes:
        reference: p.
        models: each of them q, in turn; the last one may be the floor.
        has_floor: whether it is: the reference run a second time.
        options: what is measured of a row, as in `klmetric.KLDivergence`.
        formats: of the reference and of each model, where the file does not say its own.
        base: of the logarithm.
        quantiles: to report.
        top: how many of the worst rows.
        fields: names of what is asked of each row besides its divergence.
        has_bands: whether the divergence is to be told by the confidence of the reference.
        weight: gives the weights of rows from one number to another.
        targets: gives the targets of them, `klmetric.saved.array.IGNORED` where none counts.
        why_no_targets: why there is no perplexity of targets that are known.
        labels: gives the groups of them, as numbers of `label_names`.
        label_names: of the groups.
        classes: how many of the first classes to take; None for all.
        samples: how many of the first samples to take.
        batch_rows: rows that a thread reads at once; None for a few MiB.
        is_checked: whether to look at the first rows for another format than was said.
        sampled: whether the first one of the top k is a drawn token.
    """

    reference: Saved
    models: list[Saved]
    options: Options
    formats: tuple[Format, ...]
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
    has_floor: bool = False
    fields: tuple[str, ...] = ()
    has_bands: bool = False
    targets: Callable[[int, int], Tensor] | None = None
    why_no_targets: str | None = None
    sampled: bool = False

    @property
    def every(self) -> list[Saved]:
        """The reference and the models."""
        return [self.reference, *self.models]

    @property
    def is_bounded(self) -> bool:
        """Whether not all classes are known of some file, so that divergences are known as at least so much."""
        return "tail_mass" in self.fields

    @property
    def compared(self) -> tuple[str, ...]:
        """The fields of which the differences between models are kept."""
        return tuple(name for name in COMPARED if name in self.fields)

    def share(self, rank: int, processes: int) -> tuple[int, int]:
        """The first sample of a process, and that of the next one in the order of the ranks."""
        return rank * self.samples // processes, (rank + 1) * self.samples // processes


@dataclass
class Batch:
    """Rows of every model.

    Attributes:
        kl: divergences, shape (models, rows).
        agrees: whether the most likely class is the same, likewise.
        fields: what else is asked of them, shape (models, fields, rows).
        clipped: the masses of p and of q in classes that are clipped, shape (models, 2, rows).
        weight: shape (rows,).
        labels: the numbers of their groups, likewise.
        bands: the numbers of the bands of the reference's confidence, likewise.
        targets: the classes that came true, likewise; `klmetric.saved.array.IGNORED` where none is known.
        steps: the coarsest of the grids that the reference and each model were rounded to.
    """

    kl: Tensor
    agrees: Tensor
    fields: Tensor
    clipped: Tensor
    weight: Tensor
    labels: Tensor
    bands: Tensor
    targets: Tensor
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


_OF_ROWS = ("kl", "agrees", "fields", "clipped", "weight", "labels", "bands", "targets")


@dataclass
class Measured:
    """What one model comes to.

    Attributes:
        saved: its predictions.
        summary: of all rows.
        groups: of the rows of each group, by its label.
        bands: of the rows in each band of the confidence of the reference.
        spreads: how fields are spread, by the names of `klmetric.command.fields.SPREADS`: of the rows where they are at
            least 0, how far they are above; or of the others, how far they are below.
        moments: the sums of `klmetric.totals.moments` of the fields.
        step: the coarsest grid that log-probabilities were rounded to; 0 where they were not.
        clipped: over the rows, the sums of what p has, and q has, in classes that are clipped, as
            `klmetric.totals.pairs`.
        worst: the worst rows as the report has them, once they are asked for.
    """

    saved: Saved
    summary: "KLDivergenceSummary"
    groups: "dict[str, KLDivergenceSummary]"
    bands: "dict[str, KLDivergenceSummary]"
    spreads: "dict[str, KLDivergenceSummary]"
    moments: Tensor
    step: float = 0.0
    clipped: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    worst: list[dict[str, Any]] = field(default_factory=list)

    @property
    def summaries(self) -> "list[KLDivergenceSummary]":
        """All of them."""
        return [self.summary, *self.groups.values(), *self.bands.values(), *self.spreads.values()]


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        task: what was asked for.
        models: what each of them comes to.
        differences: for each pair of models (i, j), the sums of `klmetric.totals.moments` of what is compared, over the
            rows that count for all: that of the first less that of the other, beginning with the divergence.
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

    def difference(self, i: int, j: int) -> Means:
        """The means of model i less those of model j, over the same rows, of what is compared."""
        names = ("kl", *self.task.compared)
        if i < j:
            return Means(self.differences[i, j], names)
        return Means(moments.negative(self.differences[j, i], len(names)), names)

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


def as_said(formats: Sequence[str]) -> list[str]:
    """The formats of the reference and of each model, as short as they can be said: one for all models, if it is."""
    first, *others = formats
    return [first, *(others[:1] if len({*others}) == 1 else others)]


def together(*sums: Tensor) -> Tensor:
    """Sums of `klmetric.totals.pairs` merged."""
    return torch.tensor(pairs.merge([part.tolist() for part in sums]), dtype=torch.float64)
