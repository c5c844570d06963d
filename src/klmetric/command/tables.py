"""The tables that a report is shown as, and the notes to them, as text."""

import math
from typing import Any

from klmetric.command.numbers import Z, number

Value = dict[str, Any]
Lines = list[list[str]]


# Of a model, what is no line of its own.
_SKIPPED = (
    *(
        "name",
        "path",
        "columns",
        "difference",
        "storage_error",
        "clipped",
        "unused_ids",
        "same_arrays",
        "worst",
        "groups",
    ),
    *("low", "high"),
)


def _cells(models: list[Value]) -> list[tuple[str, list[str]]]:
    """The lines of the table: what, and its value for each model."""
    lines = []
    for key in [key for key in models[0] if key not in _SKIPPED]:
        lines.append((_label(key), [number(model[key]) for model in models]))
        if key == "mean":
            intervals = [_interval(model) for model in models]
            lines.append(("95 % interval", intervals))
        if key == "stderr" and len(models) > 1:
            lines.append(("more than the best", [_difference_cell(model) for model in models]))
    if any("storage_error" in model for model in models):
        errors = [model.get("storage_error") for model in models]
        lines.append(("added by storage", [f"{number(e['usual'])}" if e else "" for e in errors]))
        lines.append(("at most", [f"{number(e['largest'])}" if e else "" for e in errors]))
    return lines


def _interval(model: Value) -> str:
    return "not known" if math.isnan(model["low"]) else f"{number(model['low'])} to {number(model['high'])}"


def _difference_cell(model: Value) -> str:
    if "difference" not in model:
        return ""
    return _with_error(**{key: model["difference"][key] for key in ("mean", "stderr")})


def _with_error(mean: float, stderr: float) -> str:
    """A mean and half of its 95 % interval."""
    return "not known" if math.isnan(mean) else f"{number(mean)} ± {number(Z * stderr)}"


def _label(key: str) -> str:
    return key.replace("_", ".") if key[:1] == "p" and key[1:2].isdigit() else key


def sections_of(report: Value) -> list[tuple[str, list[str], Lines]]:
    """Every table: its title, its head and its lines."""
    models = report["models"]
    names = [model["name"] for model in models]
    unit = report["unit"]
    title = f"KL divergence from {report['reference']} ({unit})"
    sections = [(title, ["", *names], [[label, *cells] for label, cells in _cells(models)])]
    if "groups" in models[0]:
        lines = [
            [
                group,
                *(_with_error(model["groups"][group]["mean"], model["groups"][group]["stderr"]) for model in models),
                number(models[0]["groups"][group]["count"]),
            ]
            for group in models[0]["groups"]
        ]
        sections.append((f"Means of the groups ({unit})", ["group", *names, "count"], lines))
    for model in models:
        if model.get("worst"):
            where = [key for key in model["worst"][0] if key != "kl"]
            lines = [[*(str(row[key]) for key in where), number(row["kl"])] for row in model["worst"]]
            sections.append((f"Worst rows of {model['name']}", [*where, unit], lines))
    return sections


def notes_of(report: Value) -> list[str]:
    """What is to be said to the tables."""
    both = [(report["reference"], report), *((model["path"], model) for model in report["models"])]
    sources = [f"{one['columns']} of {path}" for path, one in both if "columns" in one]
    notes = [f"{report['classes']:,} classes{': ' if sources else ''}{'; '.join(sources)}."]
    for model in report["models"]:
        if model["infinite"]:
            notes.append(
                f"{model['name']}: {model['infinite']:,} rows are infinite, and so is the mean: there q is 0 where p is"
                " not. --eps 1e-9 puts a floor under q."
            )
        if model["count"] and math.isnan(model["stderr"]) and not model["infinite"]:
            notes.append(
                f"{model['name']}: the standard error needs at least two samples (the first axis) of weight above 0;"
                " the rows of one sample are not taken for independent."
            )
        if model["invalid"]:
            notes.append(f"{model['name']}: {model['invalid']:,} rows were no distributions and were left out.")
        if "clipped" in model:
            masses = [f"{number(x)} of {side}" for side, x in zip("pq", model["clipped"].values(), strict=True) if x]
            notes.append(
                f"{model['name']}: the divergence is a lower bound. The files have clipped the classes with"
                f" {' and '.join(masses)} (a mean over the rows); they count as near to each other as is possible."
            )
        if "unused_ids" in model:
            notes.append(
                f"{model['name']}: its rows pair with those of the reference in their order. The column"
                f" {model['unused_ids']!r} is in one of the two only, and is not used."
            )
        if "same_arrays" in model:
            notes.append(
                f"{model['name']}: it is read from the same file as the reference, at least in part, and is equal"
                " there."
            )
    return notes
