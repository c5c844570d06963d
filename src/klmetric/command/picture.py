"""How a picture is made a file, or a part of a page."""

import io
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from klmetric.saved.errors import InputError

# Draws on an axis of matplotlib.
Draw = Callable[[Any], None]

# In inches: of a file, and of a part of a page, which may be read on a phone.
SIZE, SIZE_OF_PART = (7.2, 4.5), (5.4, 4.2)
# Text and axes, where they are to have the color of the page around them.
_INK = "#010203"
_IN_INK = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
# Names are no formulas.
_STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "klmetric"}

_DIVERGENCES = {
    "forward": "KL divergence",
    "reverse": "Reverse KL divergence",
    "jeffreys": "Jeffreys divergence",
    "jensen_shannon": "Jensen-Shannon divergence",
}


def pyplot_for_files() -> Any:
    """Matplotlib's pyplot, without a screen.

    Raises:
        InputError: if it is missing.
    """
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise InputError("A picture needs matplotlib: pip install 'klmetric[compare]'.") from error
    return pyplot


def as_file(draw: Draw, suffix: str) -> bytes:
    """The picture as a file of this kind, which is said by its suffix with the dot."""
    return _saved(draw, SIZE, suffix.removeprefix("."), {})


def as_part(draw: Draw, name: str, title: str, description: str) -> str:
    """The picture as a part of a page of HTML, in whose color and font it writes.

    Args:
        draw: makes it.
        name: which no other part of the page has.
        title: for those who cannot see it.
        description: likewise, of what is to be seen.
    """
    style = {"svg.fonttype": "none", **dict.fromkeys(_IN_INK, _INK)}
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    root = ElementTree.fromstring(_saved(draw, SIZE_OF_PART, "svg", style, metadata))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith("}style")]:
            parent.remove(child)  # it would be of the page
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _on_page(key, value, name) for key, value in attributes.items()})
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib.update({"role": "img", "aria-labelledby": f"{name}-title {name}-description"})
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'description' if place else 'title'}"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def title_of(report: dict[str, Any]) -> str:
    """Which divergence it is, from what."""
    at_least = ", at least" if "at_least" in report["models"][0] else ""
    return f"{_DIVERGENCES[report['options']['direction']]} from {printable(Path(report['reference']).name)}{at_least}"


def add_legend(ax: Any) -> None:
    """Below the picture, which grows with it."""
    handles, labels = ax.get_legend_handles_labels()
    longest = max(len(line) for label in labels for line in label.split("\n"))
    figure = ax.get_figure()
    width, height = figure.get_size_inches()
    columns = max(1, min(3, len(labels), int(width / (0.45 + 0.067 * longest))))
    figure.set_size_inches(width, height - 0.4 + 0.2 * math.ceil(len(labels) / columns))
    style = {"fontsize": "small", "frameon": False, "columnspacing": 1.2}
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def lines_of(text: str, length: int) -> str:
    """A text in lines of this length, broken between words if it can be; a very long one without its middle."""
    if len(text) > 4 * length:
        text = f"{text[: 2 * length - 1]}…{text[-2 * length :]}"
    lines = [""]
    for word in re.findall(rf"[^-_. ]{{,{length - 1}}}[-_. ]|[^-_. ]{{1,{length}}}", text):
        if len(lines[-1] + word) > length:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines).strip("\n")


def ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Powers of ten between two numbers, or numbers between them where these are few; and how they are written."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last > first:
        powers = range(first, last + 1, math.ceil((last - first + 1) / 8))
        return [float(f"1e{k}") for k in powers], [_power(k) for k in powers]
    some = [float(f"{m}e{k}") for k in (first - 1, first) for m in (1, 2, 5)]
    inside = [x for x in some if low <= x <= high]
    if len(inside) < 2:
        inside = [float(f"{low ** (1 - share) * high**share:.4g}") for share in (0.1, 0.5, 0.9)]
    return inside, [f"{x:g}" for x in inside]


def _power(k: int) -> str:
    return f"{10.0**k:g}" if -2 <= k <= 2 else "10" + str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def printable(name: str) -> str:
    """A name of a file, which may hold anything, as something that can be drawn, and stand in XML."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
    return f" {name}" if name.startswith("_") else name  # which matplotlib would leave out of a legend


def _saved(
    draw: Draw, size: tuple[float, float], kind: str, style: dict[str, Any], metadata: dict[str, Any] | None = None
) -> bytes:
    pyplot, file = pyplot_for_files(), io.BytesIO()
    with pyplot.rc_context({**_STYLE, **style}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is drawn
        figure, axis = pyplot.subplots(figsize=size, layout="constrained")
        try:
            draw(axis)
            figure.savefig(file, dpi=150, format=kind, metadata=metadata, transparent=metadata is not None)
        finally:
            pyplot.close(figure)
    return file.getvalue()


def _on_page(key: str, value: str, name: str) -> str:
    """An attribute, where other pictures stand on the same page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
    return value.replace("url(#", f"url(#{name}-").replace(_INK, "currentColor")
