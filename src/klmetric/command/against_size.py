"""The picture of a comparison against the sizes of the models."""

import math
from typing import Any

from klmetric.command.names_in_picture import place_names
from klmetric.command.picture import add_legend, lines_of, printable, ticks, title_of

Value = dict[str, Any]

# What is drawn of each model.
SHOWN = ("p10", "p50", "p90", "mean", "p99_9")
_BLUE, _ORANGE = "#2b7bba", "#d9632b"
_UNITS = {"GiB": "size (GiB)", "bpw": "bits a weight"}


def draw_against_size(ax: Any, report: Value) -> None:
    """Draw median, band, mean and tail of each model at its size, and a line through those that no other one beats.

    Args:
        ax: a matplotlib axis.
        report: of models with sizes, in which p10 is a quantile.
    """
    models = [model for model in report["models"] if not math.isnan(model["mean"])]
    floor = report.get("floor")
    scale = _Scale([model[key] for model in (*models, *([floor] if floor else [])) for key in SHOWN])
    best = unbeaten(models)
    for model in models:
        _draw_model(ax, model, scale, any(model is other for other in best))
    ax.plot([model["size"] for model in best], [scale.at(model["mean"]) for model in best], **_STYLES["line"])
    for name, text in _LEGEND.items():
        ax.plot([], [], label=text, **_STYLES[name])
    if floor and not math.isnan(floor["mean"]):
        _draw_floor(ax, floor, scale)
    scale.set_on(ax)
    ax.margins(x=0.12)
    ax.grid(alpha=0.2)
    ax.set_title(lines_of(title_of(report), 60))
    without = [printable(model["name"]) for model in report["models"] if math.isnan(model["mean"])]
    not_drawn = f"\nnot known, and not drawn: {', '.join(without)}" if without else ""
    ax.set_xlabel(_UNITS[report["size_unit"]] + not_drawn)
    ax.set_ylabel(f"divergence of a row ({report['unit']})")
    add_legend(ax)
    place_names(
        ax,
        [(printable(model["name"]), model["size"], scale.at(model["mean"])) for model in models],
        [(model["size"], *(scale.at(model[key]) for key in SHOWN)) for model in models],
        [(model["size"], scale.at(model["mean"])) for model in best],
    )


def unbeaten(models: list[Value]) -> list[Value]:
    """Those of which no other one is at most as large and at most as far, and one of both less; by size."""

    def beats(other: Value, model: Value) -> bool:
        a, b = ((x["size"], x["mean"]) for x in (other, model))
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    known = [model for model in models if model["mean"] < math.inf]
    best = [model for model in known if not any(beats(other, model) for other in known)]
    return sorted(best, key=lambda model: (model["size"], model["mean"]))


class _Scale:
    """A logarithmic axis, with places for zero below and for infinity above where they are needed."""

    def __init__(self, values: list[float]) -> None:
        inside = [x for x in values if 0 < x < math.inf] or [1.0]
        # Not as far as the numbers there are: an axis has margins.
        low, high = (min(max(x, 1e-280), 1e280) for x in (min(inside), max(inside)))
        margin = max(2.0, (high / low) ** 0.07)
        self.inside = (low / margin, high * margin)
        self.zero, self.infinity = self.inside[0] / margin, self.inside[1] * margin
        self.has_zero, self.has_infinity = 0 in values, math.inf in values
        self.has_others = any(0 < x < math.inf for x in values)

    def at(self, x: float) -> float:
        """Where to draw a value."""
        return float(min(max(x, self.zero), self.infinity))

    def set_on(self, ax: Any) -> None:
        """Make it that of the vertical axis."""
        low, high = self.inside
        ends = [name for name, is_there in (("0", self.has_zero), ("∞", self.has_infinity)) if is_there]
        places = {"0": self.zero, "∞": self.infinity}
        ax.set_yscale("log")
        ax.set_ylim(self.zero / 1.5 if self.has_zero else low, self.infinity * 1.5 if self.has_infinity else high)
        numbers, written = ticks(low, high) if self.has_others else ([], [])
        ax.set_yticks([*numbers, *(places[name] for name in ends)], [*written, *ends])
        ax.minorticks_off()
        for name, edge in (("0", low), ("∞", high)):
            if name in ends:
                ax.axhline(edge, color="0.5", linewidth=0.8, linestyle=(0, (1, 3)))


# How each of them looks.
_STYLES: dict[str, Value] = {
    "band": {"color": _BLUE, "alpha": 0.3, "linewidth": 9, "zorder": 2},
    "median": {"color": _BLUE, "marker": "_", "markersize": 13, "markeredgewidth": 2, "linestyle": "none", "zorder": 3},
    "tail": {"color": _ORANGE, "marker": "v", "markersize": 5, "linestyle": "none", "zorder": 3},
    "mean": {"color": _BLUE, "marker": "o", "markersize": 6.5, "linestyle": "none", "zorder": 5},
    "line": {"color": _BLUE, "alpha": 0.7, "linewidth": 1.2, "zorder": 1},
}
_LEGEND = {
    "band": "10 to 90 % of the rows",
    "median": "median",
    "mean": "mean, 95 % interval",
    "tail": "99.9 % quantile",
    "line": "not beaten in both (Pareto)",
}


def _draw_model(ax: Any, model: Value, scale: _Scale, is_best: bool) -> None:
    size = model["size"]
    p10, p50, p90, mean, tail = (scale.at(model[key]) for key in SHOWN)
    ax.vlines(size, min(p90, mean), max(tail, mean), color="0.5", linewidth=0.8, linestyle=":", zorder=1)
    if p90 > p10:
        ax.vlines(size, p10, p90, **_STYLES["band"])
    ax.plot(size, p50, **_STYLES["median"])
    ax.plot(size, tail, **_STYLES["tail"])
    if not math.isnan(model["stderr"]):
        ax.vlines(size, scale.at(model["low"]), scale.at(model["high"]), color=_BLUE, linewidth=1.8, zorder=4)
    ax.plot(size, mean, **_STYLES["mean"], **({} if is_best else {"markerfacecolor": "none"}))


def _draw_floor(ax: Any, floor: Value, scale: _Scale) -> None:
    p10, p90, mean = (scale.at(floor[key]) for key in ("p10", "p90", "mean"))
    if p90 > p10:
        ax.axhspan(p10, p90, color="0.5", alpha=0.18, linewidth=0, zorder=0)
    name = lines_of(f"floor: {printable(floor['name'])}", 26)
    ax.axhline(mean, color="0.5", linewidth=1.2, linestyle="--", zorder=0, label=name)
