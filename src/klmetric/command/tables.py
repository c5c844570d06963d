"""The tables that a report is shown as, and the notes to them, as text."""

import math
from typing import Any

from klmetric.command.numbers import number
from klmetric.rows.fields import FIRST
from klmetric.totals.estimates import DELTA_P, Z

Value = dict[str, Any]
Lines = list[list[str]]
# How a table of the worst rows begins.
SAMPLE = "sample"
# Of the text before a row, so many characters are shown.
BEFORE = 24

# Of a model, what is no line of the first table; nor is what consists of parts.
_SKIPPED = ("name", "path", "columns", "top_k", "size", "unused_ids", "same_arrays", "low", "high")
_OF_ESTIMATES = ("value", "stderr", "low", "high")
# The lines of the other tables: what, where it is in the report, and by what it is multiplied.
_PERPLEXITY = [
    ("perplexity of the reference", "perplexity.reference", 1),
    ("perplexity", "perplexity.model", 1),
    ("difference", "perplexity.difference", 1),
    ("ratio", "perplexity.ratio", 1),
    ("ln ratio", "perplexity.ln_ratio", 1),
    ("more than the best", "difference.ln_ratio", 1),
    ("above the floor", "above_floor.ln_ratio", 1),
    ("correlation of log p and log q", "perplexity.correlation", 1),
    ("KL as llama.cpp estimates it", "llama_cpp", 1),
]
_DELTA_P = [
    ("mean", "delta_p.mean", 100),
    ("more than the best", "difference.delta_p", 100),
    ("above the floor", "above_floor.delta_p", 100),
    ("root mean square", "delta_p.rms", 100),
    *((name.replace("_", "."), f"delta_p.{name}", 100) for name in ("max", *reversed(DELTA_P), "min")),
]
_OTHERS = [
    ("reverse KL(q‖p)", "reverse", 1),
    ("Jensen-Shannon", "jensen_shannon", 1),
    ("total variation", "total_variation", 1),
    *((f"same top {k}, in order" if k > 1 else "same top 1", f"agreement_{k}", 1) for k in FIRST),
]


def _cells(models: list[Value]) -> list[tuple[str, list[str]]]:
    """The lines of the table: what, and its value for each model."""
    lines = []
    is_bounded = _is_bounded(models)
    for key in [key for key, value in models[0].items() if key not in _SKIPPED and not isinstance(value, (dict, list))]:
        label = "mean, at least" if is_bounded and key == "mean" else _label(key)
        lines.append((label, [number(model[key]) for model in models]))
        if key == "mean":
            intervals = [_interval(model) for model in models]
            lines.append(("95 % interval", intervals))
        if key == "stderr":
            if "at_most" in models[0]:
                lines.append(("mean, at most", [_cell(model, "at_most", 1) for model in models]))
            for label, part in (("more than the best", "difference"), ("above the floor", "above_floor")):
                if any(part in model for model in models):
                    lines.append((label, [_difference_cell(model, part) for model in models]))
    if any("storage_error" in model for model in models):
        errors = [model.get("storage_error") for model in models]
        lines.append(("added by storage", [f"{number(e['usual'])}" if e else "" for e in errors]))
        lines.append(("at most", [f"{number(e['largest'])}" if e else "" for e in errors]))
    return lines


def _is_bounded(models: list[Value]) -> bool:
    """Whether divergences are known as at least so much."""
    return "at_least" in models[0]


def _tail(models: list[Value]) -> list[tuple[str, str, int]]:
    """The lines of what is not known, with every quantile there is."""
    spread = [name for name in models[0].get("tail_mass", {}) if name not in _OF_ESTIMATES]
    return [("mean", "tail_mass", 1), *((_label(name), f"tail_mass.{name}", 1) for name in spread)]


def _interval(model: Value) -> str:
    return "not known" if math.isnan(model["low"]) else f"{number(model['low'])} to {number(model['high'])}"


def _difference_cell(model: Value, part: str) -> str:
    return _with_error(model[part]["mean"], model[part]["stderr"]) if part in model else ""


def _lines(models: list[Value], wanted: list[tuple[str, str, int]]) -> Lines:
    """Those of which any model has a value."""
    lines = [[label, *(_cell(model, path, factor) for model in models)] for label, path, factor in wanted]
    return [line for line in lines if any(line[1:])]


def _cell(model: Value, path: str, factor: int) -> str:
    """A value of the report, with half of its 95 % interval where it has one; nothing where it is not there."""
    found: Any = model
    for name in path.split("."):
        if name not in found:
            return ""
        found = found[name]
    if isinstance(found, dict):
        return _with_error(factor * found["value"], factor * found["stderr"])
    return number(factor * found)


def _with_error(mean: float, stderr: float) -> str:
    """A mean and half of its 95 % interval."""
    if math.isnan(mean):
        return "not known"
    return number(mean) if math.isnan(stderr) else f"{number(mean, Z * stderr)} ± {number(Z * stderr)}"


def _label(key: str) -> str:
    return key.replace("_", ".") if key[:1] == "p" and key[1:2].isdigit() else key


def sections_of(report: Value) -> list[tuple[str, list[str], Lines]]:
    """Every table: its title, its head and its lines."""
    models, names = columns_of(report)
    unit = report["unit"]
    at_least = ", at least" if _is_bounded(models) else ""
    title = f"KL divergence from {report['reference']}{at_least} ({unit})"
    sizes = _lines(models, [(f"size ({report.get('size_unit')})", "size", 1)])
    sections = [(title, ["", *names], sizes + [[label, *cells] for label, cells in _cells(models)])]
    for title, wanted in (
        ("Perplexity of the targets", _PERPLEXITY),
        ("Δp: the probability of the target, less that in the reference (%)", _DELTA_P),
        (f"Other measures (divergences in {unit})", _OTHERS),
        ("Probability of the classes that are not known", _tail(models)),
    ):
        if lines := _lines(models, wanted):
            sections.append((title, ["", *names], lines))
    for title, key, what in (
        (f"Means of the groups{at_least} ({unit})", "groups", "group"),
        (f"Means by the largest probability of the reference ({unit})", "bands", "from, to"),
    ):
        if key in models[0]:
            lines = [
                [
                    part,
                    *(_with_error(model[key][part]["mean"], model[key][part]["stderr"]) for model in models),
                    number(models[0][key][part]["count"]),
                ]
                for part in models[0][key]
            ]
            sections.append((title, [what, *names, "count"], lines))
    worst = [(model["name"], model["worst"]) for model in models if model.get("worst")]
    return sections + [
        (f"Worst rows of {name}{at_least and ', by what is known'}", *_worst(rows, unit)) for name, rows in worst
    ]


def _worst(rows: list[Value], unit: str) -> tuple[list[str], Lines]:
    """The head and the lines of the worst rows, each of several classes one below the other."""
    where = [key for key in (SAMPLE, "position", "id") if key in rows[0]]
    what = [key for key in ("before", "target", "reference", "model") if any(key in row for row in rows)]
    names = {"reference": "likely in the reference", "model": "in the model"}

    def cell(row: Value, key: str) -> str:
        value = row.get(key)
        if key == "before":
            return "" if value is None else repr("…" + value[-BEFORE:] if len(value) > BEFORE else value)
        if key == "target" and value:
            both = (f"{letter} {_share(value[side])}" for letter, side in (("p", "reference"), ("q", "model")))
            return "\n".join((_class(value), *both))
        return "\n".join(f"{_class(one)}  {_share(one['probability'])}" for one in value or [])

    lines = [[*(str(row[key]) for key in where), number(row["kl"]), *(cell(row, key) for key in what)] for row in rows]
    return [*where, unit, *(names.get(key, key) for key in what)], lines


def _class(value: Value) -> str:
    """By its text, where there is one."""
    return repr(value["text"]) if "text" in value else str(value["class"])


def columns_of(report: Value) -> tuple[list[Value], list[str]]:
    """The models and their names, the floor last."""
    models, names = report["models"], [model["name"] for model in report["models"]]
    return ([*models, report["floor"]], [*names, "floor"]) if "floor" in report else (models, names)


def notes_of(report: Value) -> list[str]:
    """What is to be said to the tables."""
    columns, _ = columns_of(report)
    both = [(report["reference"], report), *((model["path"], model) for model in columns)]
    sources = [f"{one['columns']} of {path}" for path, one in both if "columns" in one]
    notes = [f"{report['classes']:,} classes{': ' if sources else ''}{'; '.join(sources)}."]
    if "no_targets" in report:
        notes.append(f"No perplexity of the tokens: {report['no_targets']}.")
    is_bounded = _is_bounded(columns)
    notes += _of_bounds(both, columns) if is_bounded else []
    for model in columns:
        if model["infinite"]:
            floor = "" if is_bounded else " --eps 1e-9 puts a floor under q."
            notes.append(
                f"{model['name']}: {model['infinite']:,} rows are infinite, and so is the mean: there q is 0 where p is"
                f" not.{floor}"
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


def _of_bounds(files: list[tuple[str, Value]], columns: list[Value]) -> list[str]:
    """What is to be said where not all classes are known."""
    top = [f"{one['top_k']:,} classes of a row are known of {path}" for path, one in files if "top_k" in one]
    notes = [
        f"At least: {'; '.join(top)}. The others count as one, so the divergence of all classes is at least what stands"
        " here, and may be beyond a limit that this keeps. A difference is that of two such bounds."
    ]
    if "at_most" in columns[0]:
        infinite = [model["name"] for model in columns if model["at_most"]["value"] == math.inf > model["mean"]]
        notes.append(
            "At most: the largest that the classes which are not known allow, each with no more than the least of those"
            " that are. It is a worst case, far above what is likely."
            + (f" Nothing is known of it for {', '.join(infinite)}." if infinite else "")
        )
    return notes


def _share(probability: float) -> str:
    """With the points one below the other, as long as there is something to be seen."""
    if math.isnan(probability):
        return "not known"
    return f"{probability:.4f}" if probability >= 1e-4 else number(probability)
