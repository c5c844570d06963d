"""What a comparison comes to, as a table, Markdown, JSON and CSV."""

import csv
import io
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from klmetric.compare import Comparison, Measured
from klmetric.options import unit_name
from klmetric.saved import Saved
from klmetric.summary import KLDivergenceSummary

# Of a normal distribution, this many standard deviations on either side hold 95 %.
Z = 1.96
# Longer names of columns and rows may be folded, and tables with more lines are not turned.
SHORTEST, LONGEST = 12, 30
# The width of a page, in characters: where nothing says how wide it is, and in Markdown.
PAGE = 160

Value = dict[str, Any]


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


def _computed(summary: KLDivergenceSummary) -> Value:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that are left out are counted in the report
        return {key: value.item() for key, value in summary.compute().items()}


def _values_of(summary: KLDivergenceSummary) -> Value:
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


def _same_arrays(reference: Saved, model: Saved) -> Value:
    """How many arrays of a model are those of the reference."""
    same = len(set(reference.arrays) & set(model.arrays)) if reference.source == model.source else 0
    return {"same_arrays": same} if same else {}


def _worst_of(summary: KLDivergenceSummary, reference: Saved) -> list[Value]:
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
                row["id"] = reference.ids[sample].item()
            found.append(row)
    return found


def _groups(measured: Measured) -> Value:
    return {"groups": {name: _values_of(group) for name, group in measured.groups.items()}} if measured.groups else {}


def to_json(report: Value) -> str:
    """As JSON. It has no NaN and no infinity: they are null and "Infinity"."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(value) for value in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
        return x

    return json.dumps(plain(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def to_csv(report: Value) -> str:
    """As CSV: a table with one line for each model, and one for each of its groups."""
    lines = []
    for model in report["models"]:
        difference = {f"difference_{key}": value for key, value in model.get("difference", {}).items()}
        scalars = {key: value for key, value in model.items() if not isinstance(value, (dict, list))}
        lines.append({"name": model["name"], "group": "", "classes": report["classes"], **scalars, **difference})
        lines += [{"name": model["name"], "group": name, **group} for name, group in model.get("groups", {}).items()]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def exceeded(report: Value, above: dict[str, float], below: dict[str, float]) -> list[str]:
    """Where a value is beyond a limit, or not known; each as a sentence."""
    found = []
    for model in report["models"]:
        for limits, word in ((above, "above"), (below, "below")):
            for key, limit in limits.items():
                value = float(model[key])
                if math.isnan(value):
                    found.append(f"{model['name']}: {key} is not known, and must not be {word} {limit:g}")
                elif value > limit if word == "above" else value < limit:
                    found.append(f"{model['name']}: {key} = {_number(value)} is {word} {limit:g}")
    return found


# --- Tables

# Of a model, what is no line of its own.
_SKIPPED = (
    *("name", "path", "columns", "difference", "storage_error", "clipped", "same_arrays", "worst", "groups"),
    *("low", "high"),
)


def _cells(models: list[Value]) -> list[tuple[str, list[str]]]:
    """The lines of the table: what, and its value for each model."""
    lines = []
    for key in [key for key in models[0] if key not in _SKIPPED]:
        lines.append((_label(key), [_number(model[key]) for model in models]))
        if key == "mean":
            intervals = [f"{_number(model['low'])} to {_number(model['high'])}" for model in models]
            lines.append(("95 % interval", intervals))
        if key == "stderr" and len(models) > 1:
            lines.append(("more than the best", [_difference_cell(model) for model in models]))
    if any("storage_error" in model for model in models):
        errors = [model.get("storage_error") for model in models]
        lines.append(("added by storage", [f"{_number(e['usual'])}" if e else "" for e in errors]))
        lines.append(("at most", [f"{_number(e['largest'])}" if e else "" for e in errors]))
    return lines


def _difference_cell(model: Value) -> str:
    if "difference" not in model:
        return ""
    difference = model["difference"]
    return f"{_number(difference['mean'])} ± {_number(Z * difference['stderr'])}"


def _label(key: str) -> str:
    return key.replace("_", ".") if key[:1] == "p" and key[1:2].isdigit() else key


def _number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:.4g}"


def _sections(report: Value) -> list[tuple[str, list[str], "Lines"]]:
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
                *(
                    f"{_number(model['groups'][group]['mean'])} ± {_number(Z * model['groups'][group]['stderr'])}"
                    for model in models
                ),
                _number(models[0]["groups"][group]["count"]),
            ]
            for group in models[0]["groups"]
        ]
        sections.append((f"Means of the groups ({unit})", ["group", *names, "count"], lines))
    for model in models:
        if model.get("worst"):
            where = [key for key in model["worst"][0] if key != "kl"]
            lines = [[*(str(row[key]) for key in where), _number(row["kl"])] for row in model["worst"]]
            sections.append((f"Worst rows of {model['name']}", [*where, unit], lines))
    return sections


def _notes(report: Value) -> list[str]:
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
            masses = [f"{_number(x)} of {side}" for side, x in zip("pq", model["clipped"].values(), strict=True) if x]
            notes.append(
                f"{model['name']}: the divergence is a lower bound. The files have clipped the classes with"
                f" {' and '.join(masses)} (a mean over the rows); they count as near to each other as is possible."
            )
        if "same_arrays" in model:
            notes.append(
                f"{model['name']}: it is read from the same file as the reference, at least in part, and is equal"
                " there."
            )
    return notes


def show(report: Value, console: Console) -> None:
    """Print the tables, so that they fit."""
    for title, head, lines in _sections(report):
        for part, (names, values) in enumerate(_fitted(head, lines, console.width)):
            table = Table(title=None if part else escape(title), title_justify="left")
            for k, text in enumerate(names):
                table.add_column(escape(text), justify="left" if k == 0 else "right", overflow="fold")
            for line in values:
                table.add_row(*map(escape, line))
            console.print(table)
    for note in _notes(report):
        console.print(Text(note))


def to_markdown(report: Value) -> str:
    """As tables of Markdown."""
    blocks = []
    for title, head, lines in _sections(report):
        if not _fits(head, lines, PAGE):
            head, lines = _turned(head, lines)  # in one piece: what shows Markdown can scroll
        rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        blocks.append(f"**{title}**\n\n{table}\n")
    return "\n".join([*blocks, *(f"{note}\n" for note in _notes(report))])


# --- Tables that fit: of many models, a row a model

Lines = list[list[str]]


def _turned(head: list[str], lines: Lines) -> tuple[list[str], Lines]:
    """Rows for columns."""
    first, *rest = map(list, zip(["model", *head[1:]], *lines, strict=True))
    return first, rest


def _fitted(head: list[str], lines: Lines, width: int) -> Iterator[tuple[list[str], Lines]]:
    """The table; or if it is too wide, turned; or if that is, in parts with some of the columns."""
    if not _fits(head, lines, width) and len(lines) <= LONGEST:
        head, lines = _turned(head, lines)
    begin = 1
    while begin < len(head):
        end = begin + 1
        while end < len(head) and _fits(*_part(head, lines, begin, end + 1), width):
            end += 1
        yield _part(head, lines, begin, end)
        begin = end


def _part(head: list[str], lines: Lines, begin: int, end: int) -> tuple[list[str], Lines]:
    return [head[0], *head[begin:end]], [[line[0], *line[begin:end]] for line in lines]


def _fits(head: list[str], lines: Lines, width: int) -> bool:
    """Whether it does with its numbers whole. Names may be folded, within reason."""
    columns = [list(column) for column in zip(*lines, strict=True)]
    first = min(max(map(cell_len, [head[0], *columns[0]])), max(width // 4, SHORTEST))
    others = [
        max(min(cell_len(name), SHORTEST), *map(cell_len, column))
        for name, column in zip(head[1:], columns[1:], strict=True)
    ]
    return first + sum(others) + 3 * len(head) + 1 <= width
