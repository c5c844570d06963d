"""A report as a page of HTML that stands for itself: it needs no other file, no network and no script."""

import math
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch

from klmetric import __version__
from klmetric.arithmetic.level import level, on_accelerators
from klmetric.command.limits import exceeded, value_at
from klmetric.command.method import method_of
from klmetric.command.numbers import number
from klmetric.command.picture import Draw, as_part, printable, title_of
from klmetric.command.tables import Lines, columns_of, notes_of, sections_of

Value = dict[str, Any]

# With more columns than these, intervals are written in two lines.
MANY = 5


def to_page(report: Value, distributions: Draw, against_size: Draw | None) -> str:
    """The whole page.

    Args:
        report: as plain data.
        distributions: draws them.
        against_size: draws the divergences against the sizes, where there are any.
    """
    first, *others = sections_of(report)
    parts = [
        f"<h1>{_text(title_of(report))}</h1>",
        *(f'<p class="{kind}">{_text(text)}</p>' for kind, text in _summary(report)),
        *_limits(report),
        *([_against_size(report, against_size)] if against_size else []),
        "<h2>Divergence of the rows</h2>",
        _table(*first),
        _list(notes_of(report), "notes"),
        _distributions(report, distributions),
        *(["<h2>More of the same rows</h2>"] if others else []),
        *(_table(*section) for section in others),
        "<h2>How it was measured</h2>",
        *(f"<p>{_text(sentence)}</p>" for sentence in method_of(report)),
        "<h2>How it was made</h2>",
        _pairs(_made(report, sys.argv[1:])),
    ]
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(title=_text(title_of(report)), body="\n".join(parts), version=_text(__version__))


def _text(text: str) -> str:
    """As it stands in HTML, whatever it is."""
    return escape(printable(text).strip())


def _summary(report: Value) -> Iterable[tuple[str, str]]:
    best = report["models"][0]
    count = f"{best['count']:,} rows in {report['samples']:,} samples, {report['classes']:,} classes"
    if math.isnan(best["mean"]):
        yield "lead", "No divergence is known."
    else:
        at_least = "at least " if "at_least" in best else ""
        what = "has the least bound" if at_least else "is the nearest"
        name = best["name"] + (f" {what} of {len(report['models'])}" if len(report["models"]) > 1 else "")
        interval = f" (95 % interval: {number(best['low'])} to {number(best['high'])})"
        known = "" if math.isnan(best["low"]) else interval
        yield "lead", f"{name}: {at_least}{number(best['mean'])} {report['unit']} in the mean{known}."
    yield "faint", f"{count}. Reference: {report['reference']}."
    if report["partial"]:
        yield "failed", "The measuring was interrupted: this is of a part of the samples."


def _limits(report: Value) -> list[str]:
    """What was asked for, and whether it holds, for each model."""
    limits = [(key, x, side) for side in ("above", "below") for key, x in report["limits"][side].items()]
    if not limits:
        return []
    head = _heads(["limit", *(model["name"] for model in report["models"])])
    lines = []
    for key, limit, side in limits:
        cells = []
        for model in report["models"]:
            value = value_at(model, key)
            one = ({key: limit}, {}) if side == "above" else ({}, {key: limit})
            failed = exceeded({"models": [model]}, *one)
            shown = "" if value is None else "not known" if math.isnan(value) else number(value)
            kind = "failed" if failed else "passed"
            cells.append(f'<td>{_text(shown)} <br><span class="{kind}">{kind}</span></td>')
        what = f"{key} {'at most' if side == 'above' else 'at least'} {limit:g}"
        lines.append(f'<tr><th scope="row">{_text(what)}</th>{"".join(cells)}</tr>')
    said = "All limits hold." if not report["limits"]["failed"] else "Not all limits hold."
    return ["<h2>Limits</h2>", _framed(said, head, lines)]


def _table(title: str, head: list[str], lines: Lines) -> str:
    rows = [
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in lines
    ]
    return _framed(title, _heads(head), rows)


def _heads(names: list[str]) -> str:
    return "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in names)


def _cell(text: str) -> str:
    """A value, whose lines are kept, with a place where they end if there is little room."""
    lines = "\n".join(map(_text, text.split("\n")))
    return re.sub(r" (to|±) ", r" \1 <br>", lines)


def _framed(title: str, head: str, rows: list[str]) -> str:
    """A table that is scrolled where it is too wide, with the keyboard too."""
    kind = "table many" if head.count("<th") > MANY else "table"
    return (
        f'<div class="{kind}" role="region" tabindex="0" aria-label="{_text(title)}"><table>'
        f"<caption><span>{_text(title)}</span></caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _list(items: list[str], kind: str) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{_text(item)}</li>" for item in items)}</ul>'


def _pairs(pairs: list[tuple[str, str]]) -> str:
    """What, which is text, and its value, which is HTML."""
    return f"<dl>{''.join(f'<dt>{_text(key)}</dt><dd>{value}</dd>' for key, value in pairs)}</dl>"


def _against_size(report: Value, draw: Draw) -> str:
    unit = {"GiB": "GiB", "bpw": "bits a weight"}[report["size_unit"]]
    models = sorted(report["models"], key=lambda model: model["size"])
    values = [
        f"{model['name']}, {model['size']:g} {unit}: median {number(model['p50'])}, mean {number(model['mean'])},"
        f" 99.9 % quantile {number(model['p99_9'])}"
        for model in models
    ]
    picture = as_part(draw, "sizes", "Divergence against size", printable("; ".join(values)))
    caption = (
        "Divergence against size, on a logarithmic axis. The line joins the models that no other one beats in size and"
        " mean both; of these the mean is a full circle, of the others an empty one."
    )
    if "floor" in report:
        caption += " The floor is the reference run a second time: no model can be told to be nearer."
    return _figure(picture, caption)


def _distributions(report: Value, draw: Draw) -> str:
    columns, _ = columns_of(report)
    values = [
        f"{model['name']}: median {number(model['p50'])}, 90 % below {number(model['p90'])}, 99.9 % below"
        f" {number(model['p99_9'])}"
        for model in columns
    ]
    picture = as_part(draw, "rows", "How the divergences are spread over the rows", printable("; ".join(values)))
    return _figure(picture, "How the divergences are spread over the rows. Dashed lines are the means.")


def _figure(picture: str, caption: str) -> str:
    return f"<figure>\n{picture}\n<figcaption>{_text(caption)}</figcaption>\n</figure>"


def _made(report: Value, given: list[str]) -> list[tuple[str, str]]:
    """With what and when, and where from; as HTML."""
    columns, names = columns_of(report)
    command = shlex.join(["klmetric", *map(_without_folders, given)])
    values = [
        ("Date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("klmetric", f"{__version__}, kernel: {level() or 'plain'}, on accelerators: {on_accelerators() or 'plain'}"),
        ("PyTorch", torch.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("Reference", report["reference"]),
        *((name, model["path"]) for name, model in zip(names, columns, strict=True)),
    ]
    return [("Command", _code(command)), *((key, _text(value)) for key, value in values)]


def _code(command: str) -> str:
    """Lines of it end between words alone: a hyphen is a part of a word."""
    return f"<code>{' '.join(f'<span>{_text(word)}</span>' for word in command.split(' '))}</code>"


def _without_folders(argument: str) -> str:
    """An argument without the folders of a path from the root, which are nobody's business."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"
