"""Names beside the points of a picture, so that none lies over another, nor over what is drawn."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from klmetric.command.picture import lines_of

# Longer names are written in several lines.
LINE = 24
# How far from a point, in pixels.
GAP = 12
# Half of the width of what is drawn of a model.
HALF = 10

# From left, bottom to right, top, in pixels.
Box = tuple[float, float, float, float]
Point = tuple[float, float]


def place_names(
    ax: Any, points: list[tuple[str, float, float]], bars: list[tuple[float, ...]], line: list[Point]
) -> None:
    """Write a name beside each point.

    Args:
        ax: a matplotlib axis, on which everything else has been drawn.
        points: names with the places that they belong to.
        bars: a place on the horizontal axis, and those on the vertical one that are drawn above it.
        line: through these points.
    """
    figure = ax.get_figure()
    figure.draw_without_rendering()  # which decides where the axes are
    figure.set_layout_engine("none")

    def at(x: float, y: float) -> Point:
        place = ax.transData.transform((x, y))
        return float(place[0]), float(place[1])

    def around(x: float, *values: float) -> Box:
        (left, bottom), (_, top) = at(x, min(values)), at(x, max(values))
        return left - HALF, bottom - 4, left + HALF, top + 4

    taken = [*(around(*bar) for bar in bars), *_along([at(*point) for point in line])]
    frame = tuple(ax.get_window_extent().extents)
    pixel = 72 / figure.dpi
    short = without_common([name for name, *_ in points])
    for k in sorted(range(len(points)), key=lambda k: points[k][1:]):
        _, x, y = points[k]
        style = {"textcoords": "offset points", "va": "bottom", "fontsize": "small", "linespacing": 1.05}
        text = ax.annotate(lines_of(short[k], LINE), (x, y), (0, 0), **style)
        text.set_in_layout(False)
        box = text.get_window_extent()
        width, height = box.width, box.height
        center = at(x, y)
        places = list(_places(center, width, height))
        costs = [_outside(place, frame) + sum(_common(place, other) for other in taken) for place in places]
        free = (place for place, cost in zip(places, costs, strict=True) if cost <= 1)
        place = next(free, places[costs.index(min(costs))])
        taken.append(place)
        text.set_position(((place[0] - center[0]) * pixel, (place[1] - center[1]) * pixel))
        if not place[1] - GAP <= center[1] <= place[3] + GAP:
            _lead(ax, figure, center, place)


def without_common(names: list[str]) -> list[str]:
    """Names without the words that all of them begin and end with, if some are long."""
    if len(set(names)) < 2 or max(map(len, names)) <= LINE:
        return names
    before = _words_before(names)
    after = _words_before([name[before:][::-1] for name in names])
    return ["…" * (before > 0) + name[before : len(name) - after] + "…" * (after > 0) for name in names]


def _words_before(names: list[str]) -> int:
    """The length of what all begin with, in whole words, of which each has more. Q4_K_M is one, and 4.5bpw."""
    first, last = min(names), max(names)  # what these have in common, all have
    common = next(k for k, (a, b) in enumerate(zip(f"{first}\0", f"{last}\1", strict=False)) if a != b)
    shortest = min(map(len, names))
    return max((m.end() for m in re.finditer("[- ]", first[:common]) if m.end() < shortest), default=0)


def _places(center: Point, width: float, height: float) -> Iterator[Box]:
    """Boxes around a point, the nearest first."""
    x, y = center
    for step in range(0, 40):
        for away in (step, -step) if step else (0,):
            bottom = y - height / 2 + away * 8
            yield (x + GAP, bottom, x + GAP + width, bottom + height)
            yield (x - GAP - width, bottom, x - GAP, bottom + height)
            if abs(away * 8) > height / 2 + GAP:
                yield (x - width / 2, bottom, x + width / 2, bottom + height)


def _along(points: list[Point]) -> list[Box]:
    """Small boxes on the way from each point to the next."""
    boxes = []
    for (a, b), (c, d) in pairwise(points):
        steps = max(1, int(max(abs(c - a), abs(d - b)) / 4))
        for k in range(steps + 1):
            x, y = a + (c - a) * k / steps, b + (d - b) * k / steps
            boxes.append((x - 2, y - 2, x + 2, y + 2))
    return boxes


def _common(a: Box, b: Box) -> float:
    """The area that two boxes have in common."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box, frame: Box) -> float:
    """The area of a box that is out of the frame."""
    return 3 * ((box[2] - box[0]) * (box[3] - box[1]) - _common(box, frame))


def _lead(ax: Any, figure: Any, center: Point, place: Box) -> None:
    """A thin line from a point to its name."""
    x = min(max(center[0], place[0]), place[2])
    y = place[1] if place[1] > center[1] else place[3]
    a, b = (figure.transFigure.inverted().transform(point) for point in (center, (x, y)))
    ax.plot(*zip(a, b, strict=True), transform=figure.transFigure, color="0.5", linewidth=0.6, zorder=1)
