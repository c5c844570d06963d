"""The picture of a comparison: how the divergences of each model are spread over the rows."""

from typing import Any

from klmetric.command.comparison import Comparison
from klmetric.command.picture import add_legend, lines_of, printable, ticks, title_of
from klmetric.totals.histogram import Histogram
from klmetric.totals.picture import BESIDE, bars, finish, stairs


def draw_distributions(ax: Any, report: dict[str, Any], divergences: dict[str, Histogram], unit: float) -> None:
    """Draw the distributions of all models as outlines over one another, with their means, and the floor as an area.

    Args:
        ax: a matplotlib axis.
        report: of the comparison.
        divergences: of the rows, by the name of the model.
        unit: in nats.
    """
    for k, model in enumerate(report["models"]):
        _draw(ax, model, divergences[model["name"]], unit, printable(model["name"]), color=f"C{k % 10}")
    if floor := report.get("floor"):
        style = {"color": "0.5", "fill": True, "alpha": 0.35, "zorder": 0}
        _draw(ax, floor, divergences[floor["name"]], unit, f"floor ({printable(floor['name'])})", **style)
    finish(ax, report["unit"])
    if ax.get_xscale() == "log":
        ax.set_xticks(*ticks(*ax.get_xlim()))
        ax.minorticks_off()
    ax.set_title(lines_of(title_of(report), 60))
    add_legend(ax)


def divergences_of(comparison: Comparison, names: list[str]) -> dict[str, Histogram]:
    """Of the rows, by the names of the models."""
    summaries = [measured.summary for measured in comparison.models]
    return {name: summary._divergences(summary.totals) for name, summary in zip(names, summaries, strict=True)}


def _draw(ax: Any, model: dict[str, Any], divergences: Histogram, unit: float, name: str, **style: Any) -> None:
    counts, mean = divergences.counts, model["mean"]
    n = counts.sum().item()
    beside = [f"{100 * counts[i].item() / n:.3g} % are {what}" for what, i in BESIDE.items() if n and counts[i]]
    label = "; ".join([f"{lines_of(name, 75)}: mean = {mean:.3g}", *beside])
    if counts[1:-1].sum():
        edges, numbers = bars(divergences)
        stairs(ax, edges / unit, 100 * numbers / n, linewidth=1.5, label=label, **style)
    else:
        ax.plot([], [], color=style["color"], label=label)
    if 0 < mean < float("inf"):
        ax.axvline(mean, color=style["color"], linestyle="--", linewidth=1)
