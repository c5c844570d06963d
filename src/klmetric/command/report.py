"""What a comparison comes to, as plain data: all that is shown and written is made from this."""

import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from klmetric.command.comparison import Comparison, Measured
from klmetric.command.numbers import Z
from klmetric.options import unit_name
from klmetric.saved.array import Saved

if TYPE_CHECKING:
    from klmetric.summary import KLDivergenceSummary

Value = dict[str, Any]
# What people call columns that tell rows apart.
_ID = re.compile(r"(.*[_ ])?(id|uuid|key|index)", re.IGNORECASE)


def as_dict(comparison: Comparison, names: list[str], more_options: Value) -> Value:
    """The report as plain data, the models sorted by their means.

    Args:
        comparison: what was measured.
        names: of the models.
        more_options: to name among the options.
    """
    task = comparison.task
    values = [_values_of(measured.summary) for measured in comparison.models]
    order = sorted(range(len(values)), key=lambda k: (math.isnan(values[k]["mean"]), values[k]["mean"]))
    options = {name: getattr(task.options, name) for name in ("direction", "temperature", "eps", "nan_strategy")}
    return {
        "schema": 1,
        "reference": task.reference.name,
        "unit": unit_name(task.base),
        "samples": comparison.samples,
        "classes": task.classes or task.reference.classes,
        **_source(task.reference),
        "partial": comparison.is_partial,
        "options": {
            "input_format": list(task.options.input_format),
            **options,
            "base": task.base,
            "classes": task.classes,
            **more_options,
        },
        "models": [
            {
                "name": names[k],
                "path": comparison.models[k].saved.name,
                **_source(comparison.models[k].saved),
                **values[k],
                **_difference(comparison, k, order[0], names),
                **_storage_error(comparison, comparison.models[k]),
                **_unused_ids(task.reference, comparison.models[k].saved),
                **_same_arrays(task.reference, comparison.models[k].saved),
                **({"worst": _worst_of(comparison.models[k].summary, task.reference)} if task.top else {}),
                **_groups(comparison.models[k]),
            }
            for k in order
        ],
    }


def _source(saved: Saved) -> Value:
    """Which columns of a table the classes are."""
    return {} if saved.source is None else {"columns": saved.source}


def _computed(summary: "KLDivergenceSummary") -> Value:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are left out are counted in the report
        return {key: value.item() for key, value in summary.compute().items()}


def _values_of(summary: "KLDivergenceSummary") -> Value:
    values = {key: value for key, value in _computed(summary).items() if not key.startswith("top")}
    mean, margin = values.pop("mean"), Z * values["stderr"]
    interval = {"low": max(0.0, mean - margin) if margin == margin else math.nan, "high": mean + margin}
    return {"mean": mean, "stderr": values.pop("stderr"), **interval, **values}


def _difference(comparison: Comparison, k: int, best: int, names: list[str]) -> Value:
    if k == best:
        return {}
    mean, error = comparison.difference(k, best)
    interval = {"low": mean - Z * error, "high": mean + Z * error}
    return {"difference": {"to": names[best], "mean": mean, "stderr": error, **interval}}


def _storage_error(comparison: Comparison, measured: Measured) -> Value:
    error = comparison.storage_error(measured)
    clipped = comparison.clipped(measured)
    return {
        **({} if error is None else {"storage_error": dict(zip(("usual", "largest"), error, strict=True))}),
        **({} if clipped is None else {"clipped": dict(zip(("reference", "model"), clipped, strict=True))}),
    }


def _unused_ids(reference: Saved, model: Saved) -> Value:
    """A column that is called like one of ids, and that the rows cannot be aligned by: only one of the two has it."""
    if reference.ids is not None:
        return {}
    odd = [name for name in sorted(set(reference.others) ^ set(model.others)) if _ID.fullmatch(name)]
    return {"unused_ids": odd[0]} if odd else {}


def _same_arrays(reference: Saved, model: Saved) -> Value:
    """How many arrays of a model are those of the reference."""
    same = len(set(reference.arrays) & set(model.arrays)) if reference.source == model.source else 0
    return {"same_arrays": same} if same else {}


def _worst_of(summary: "KLDivergenceSummary", reference: Saved) -> list[Value]:
    """The worst rows, by number and where there are ids by these as well."""
    values = _computed(summary)
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


def _groups(measured: Measured) -> Value:
    return {"groups": {name: _values_of(group) for name, group in measured.groups.items()}} if measured.groups else {}
