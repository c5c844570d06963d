"""The worst rows of each model, looked at once more: which class was right there, and which were likely."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klmetric.command.batch import Read, Side, log_probs_of, nearest_of, options_for, side_of
from klmetric.command.comparison import Comparison, Task
from klmetric.command.report import computed
from klmetric.rows.topk import TopK
from klmetric.saved.array import IGNORED, Saved

if TYPE_CHECKING:
    from klmetric.saved.vocabulary import Vocabulary
    from klmetric.summary import KLDivergenceSummary

Value = dict[str, Any]
# The most likely classes that are shown, and the tokens that came before.
SHOWN, BEFORE = 5, 8


def find_worst(result: Comparison) -> None:
    """Tell each model its worst rows, by number and where there are ids by these as well."""
    for measured in result.models:
        measured.worst = _worst_of(measured.summary, result.task.reference)


def _worst_of(summary: "KLDivergenceSummary", reference: Saved) -> list[Value]:
    values = computed(summary)
    found = []
    for k in range(1, summary.top + 1):
        sample, position = values[f"top{k}_sample"], values[f"top{k}_position"]
        if sample >= 0:
            row = {"kl": values[f"top{k}"], "sample": sample}
            if len(reference.shape) > 2:
                row["position"] = position
            if reference.ids is not None:
                value = reference.ids[sample]  # JSON has no dates
                row["id"] = value.item() if value.dtype.kind in "iufU" else str(value)
            found.append(row)
    return found


def look_at_worst(result: Comparison, vocabulary: "Vocabulary | None", advance: Callable[[int], None]) -> None:
    """Read the worst rows again, and add what they hold.

    They are read from the first to the last, so a file that is read in order is read once more, and no more is held
    than one row of each.

    Args:
        result: of which `find_worst` has found them. Each has all that is said of it, or nothing.
        vocabulary: the text of classes.
        advance: is called with the number of rows that were looked at, after each place.

    Raises:
        InputError: for files that cannot be read.
    """
    task = result.task
    places: dict[int, list[tuple[int, Value]]] = {}
    for k, measured in enumerate(result.models, 1):
        for value in measured.worst:
            row = task.reference.first_row(value["sample"]) + value.get("position", 0)
            places.setdefault(row, []).append((k, value))
    for row, values in sorted(places.items(), key=lambda place: place[0]):
        p = _side_of(task, 0, row)
        targets = _targets_until(task, row)
        for k, value in values:
            value.update(_said_of(task, k, p, _side_of(task, k, row), targets, vocabulary))
        advance(len(values))


def _side_of(task: Task, place: int, row: int) -> Side:
    return side_of(task, place, row, row + 1, Read(torch.ones(1), torch.zeros(1), None, {}))


def _targets_until(task: Task, row: int) -> list[int]:
    """That of a row, and before it those of some rows of its sample."""
    if task.targets is None:
        return []
    first = task.reference.first_row(task.reference.sample_at(row))
    targets: list[int] = task.targets(max(first, row - BEFORE), row + 1).tolist()
    return [target for target in targets if target != IGNORED]


def _log_mass(x: Tensor | TopK, its_format: str, temperature: float) -> Tensor:
    """What to subtract from logits for log-probabilities."""
    if isinstance(x, TopK):
        return torch.zeros(1)
    return ((x.double().log() if its_format == "probs" else x.double()) / temperature).logsumexp(-1)


def _most_likely(x: Tensor | TopK, its_format: str) -> Tensor:
    """The classes of a row that are most likely, of those that are known."""
    if isinstance(x, TopK):
        known = x.known()
        values, classes = known.probs[0], known.classes[0]
    else:
        values, classes = x[0], torch.arange(x.shape[-1])
    # Of a class that is clipped, or has no chance at all, there is nothing to be said.
    order = values.sort(descending=True, stable=True).indices[:SHOWN]
    return classes[order[values[order] > (0 if isinstance(x, TopK) or its_format == "probs" else -torch.inf)]]


def _said_of(task: Task, k: int, p: Side, q: Side, targets: list[int], vocabulary: "Vocabulary | None") -> Value:
    """What is to be said of one row of model number k, from 1 on; `targets` end with its own."""
    options = options_for(task, k)
    formats, temperature = options.input_format, options.temperature
    masses = [_log_mass(x, form, temperature) for x, form in zip(nearest_of(p, q, options), formats, strict=True)]
    sides = dict(zip(("reference", "model"), zip((p, q), formats, masses, strict=True), strict=True))

    def probabilities(name: str, classes: Tensor) -> list[float]:
        found: list[float] = log_probs_of(*sides[name], classes.unsqueeze(0), temperature).exp()[0].tolist()
        return found

    def said(number: int) -> Value:
        text = None if vocabulary is None else vocabulary.text([number])
        return {"class": number, **({} if text is None else {"text": text})}

    values: Value = {}
    if targets:
        known = {name: probabilities(name, torch.tensor(targets[-1:]))[0] for name in sides}
        values["target"] = {**said(targets[-1]), **known}
    for name, (side, its_format, _) in sides.items():
        order = _most_likely(side.x, its_format)
        each = zip(order.tolist(), probabilities(name, order), strict=True)
        values[name] = [{**said(number), "probability": probability} for number, probability in each]
    if vocabulary is not None and (before := vocabulary.text(targets[:-1])):
        values["before"] = before
    return values
