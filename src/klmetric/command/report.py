"""What a comparison comes to, as plain data: all that is shown and written is made from this."""

import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from klmetric.command.comparison import Comparison, Measured, Task, as_said
from klmetric.command.sizes import Sizes
from klmetric.options import quantile_name, unit_name
from klmetric.rows.fields import OF_CLASSES
from klmetric.saved.array import Saved
from klmetric.totals.estimates import Z, delta_p_of, estimate, mean_of, perplexity_of
from klmetric.totals.histogram import Histogram, quantile, signed_quantile
from klmetric.totals.moments import Means

if TYPE_CHECKING:
    from klmetric.summary import KLDivergenceSummary

Value = dict[str, Any]
# What people call columns that tell rows apart.
_ID = re.compile(r"(.*[_ ])?(id|uuid|key|index)", re.IGNORECASE)


def as_dict(comparison: Comparison, names: list[str], more_options: Value, sizes: Sizes | None) -> Value:
    """The report as plain data, the models sorted by their means.

    Args:
        comparison: what was measured.
        names: of the models.
        more_options: to name among the options.
        sizes: of the models, but for the floor.
    """
    task = comparison.task
    values = [_all_values_of(comparison, measured) for measured in comparison.models]
    floor = len(values) - 1 if task.has_floor else None
    ranked = range(len(values) - task.has_floor)
    order = sorted(ranked, key=lambda k: (math.isnan(values[k]["mean"]), values[k]["mean"]))

    def model(k: int) -> Value:
        measured = comparison.models[k]
        others = {"difference": order[0], **({} if floor is None else {"above_floor": floor})}
        others = {key: other for key, other in others.items() if k not in (other, floor)}
        return {
            "name": names[k],
            "path": measured.saved.name,
            **_source(measured.saved),
            **({"size": sizes.of[names[k]]} if sizes and k != floor else {}),
            **values[k],
            **{key: _difference(comparison, k, other, names) for key, other in others.items()},
            **_storage_error(comparison, measured),
            **_unused_ids(task.reference, measured.saved),
            **_same_arrays(task.reference, measured.saved),
            **({"worst": measured.worst} if task.top else {}),
            **_parts("groups", measured.groups),
            **_parts("bands", measured.bands),
        }

    options = {name: getattr(task.options, name) for name in ("direction", "temperature", "eps", "nan_strategy")}
    return {
        "schema": 1,
        "reference": task.reference.name,
        "unit": unit_name(task.base),
        "samples": comparison.samples,
        "classes": task.classes or task.reference.classes,
        **({"size_unit": sizes.unit} if sizes else {}),
        **_source(task.reference),
        "partial": comparison.is_partial,
        "options": {
            "input_format": as_said(task.formats[: len(task.formats) - task.has_floor]),
            **options,
            "base": task.base,
            "classes": task.classes,
            **more_options,
        },
        "models": [model(k) for k in order],
        **({} if floor is None else {"floor": model(floor)}),
        **({} if task.why_no_targets is None else {"no_targets": task.why_no_targets}),
    }


def _source(saved: Saved) -> Value:
    """Which columns of a table the classes are, and how many of a row are known where not all are."""
    return {
        **({} if saved.source is None else {"columns": saved.source}),
        **({} if saved.indices is None else {"top_k": saved.width}),
    }


def computed(summary: "KLDivergenceSummary") -> Value:
    """Its values as numbers, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are left out are counted in the report
        return {key: value.item() for key, value in summary.compute().items()}


def _values_of(summary: "KLDivergenceSummary") -> Value:
    values = {key: value for key, value in computed(summary).items() if not key.startswith("top")}
    mean, margin = values.pop("mean"), Z * values["stderr"]
    interval = {"low": max(0.0, mean - margin) if margin == margin else math.nan, "high": mean + margin}
    return {"mean": mean, "stderr": values.pop("stderr"), **interval, **values}


def _all_values_of(comparison: Comparison, measured: Measured) -> Value:
    """Those of the divergence, and of the fields."""
    values, unit = _values_of(measured.summary), comparison.unit
    means = Means(measured.moments, comparison.task.fields)
    if "nll" in means:
        least = quantile(_divergences(measured.summary), 0) / unit
        before = ("mean", "stderr", "low", "high", "max")
        values = {name: values[name] for name in before} | {"min": least} | values
        above, below = (_divergences(measured.spreads[name]) for name in ("delta_p", "-delta_p"))
        values["perplexity"] = perplexity_of(means)
        values["delta_p"] = delta_p_of(means, lambda q: signed_quantile(above, below, q))
    if comparison.task.is_bounded:
        values["at_least"] = estimate(values["mean"], values["stderr"], 0.0)
        values |= _bounds_of(comparison.task, measured, means, unit)
    alone = [name for name in (*OF_CLASSES, "llama_cpp") if name in means]
    return values | {name: mean_of(means, name, unit) for name in alone}


def _bounds_of(task: Task, measured: Measured, means: Means, unit: float) -> Value:
    """What the mean is at most, and how much the classes have that are not known."""
    masses = _divergences(measured.spreads["tail_mass"])
    spread = {quantile_name(q): quantile(masses, q) for q in task.quantiles}
    return {
        **({"at_most": mean_of(means, "at_most", unit)} if "at_most" in means else {}),
        "tail_mass": {**mean_of(means, "tail_mass", unit), **spread, "max": quantile(masses, 1)},
    }


def _divergences(summary: "KLDivergenceSummary") -> Histogram:
    return summary._divergences(summary.totals)


def _difference(comparison: Comparison, k: int, other: int, names: list[str]) -> Value:
    """What model k has more than another one, over the same rows."""
    means, unit = comparison.difference(k, other), comparison.unit
    mean, error = means["kl"] / unit, means.error({"kl": 1.0}) / unit
    interval = {"low": mean - Z * error, "high": mean + Z * error}
    fields = {name: mean_of(means, name, unit, is_difference=True) for name in comparison.task.compared}
    return {"to": names[other], "mean": mean, "stderr": error, **interval, **fields}


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


def _parts(key: str, parts: "dict[str, KLDivergenceSummary]") -> Value:
    return {key: {name: _values_of(part) for name, part in parts.items()}} if parts else {}
