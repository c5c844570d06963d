"""The picture of a comparison: how the divergences of each model are spread over the rows."""

import io
from collections.abc import Mapping
from typing import Any

from klmetric.command.comparison import Comparison
from klmetric.options import unit_name
from klmetric.saved.errors import InputError
from klmetric.totals.histogram import Histogram
from klmetric.totals.picture import BESIDE, bars, finish, stairs


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
        raise InputError("--plot needs matplotlib: pip install 'klmetric[compare]'.") from error
    return pyplot


def picture(suffix: str, comparison: Comparison, names: list[str], report: dict[str, Any]) -> bytes:
    """The distributions of all models, as a file of this kind.

    Args:
        suffix: of the file, with its dot.
        comparison: what was measured.
        names: of its models.
        report: of it, for the order of the models.
    """
    summaries = {name: measured.summary for name, measured in zip(names, comparison.models, strict=True)}
    models = {
        model["name"]: (summary._divergences(summary.totals), summary.compute()["mean"].item())
        for model in report["models"]
        for summary in [summaries[model["name"]]]
    }
    pyplot, file = pyplot_for_files(), io.BytesIO()
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    _draw(axis, models, comparison.unit, unit_name(comparison.task.base))
    figure.savefig(file, dpi=150, format=suffix.removeprefix("."))
    pyplot.close(figure)
    return file.getvalue()


def _draw(ax: Any, models: Mapping[str, tuple[Histogram, float]], unit: float, unit_name: str) -> None:
    """Draw the distributions of several models as outlines over one another, with their means.

    Args:
        ax: a matplotlib axis.
        models: the divergences of the rows and their mean in `unit`, by name.
        unit: in nats.
        unit_name: its name.
    """
    for k, (name, (divergences, mean)) in enumerate(models.items()):
        counts = divergences.counts
        n, color = counts.sum().item(), f"C{k % 10}"
        beside = [f"{100 * counts[i].item() / n:.3g} % are {what}" for what, i in BESIDE.items() if n and counts[i]]
        name = name.replace("$", r"\$")  # which would begin a formula
        name = f" {name}" if name.startswith("_") else name  # which would hide it
        label = "; ".join([f"{name}: mean = {mean:.3g}", *beside])
        if counts[1:-1].sum():
            edges, numbers = bars(divergences)
            stairs(ax, edges / unit, 100 * numbers / n, color=color, linewidth=1.5, label=label)
        else:
            ax.plot([], [], color=color, label=label)
        if 0 < mean < float("inf"):
            ax.axvline(mean, color=color, linestyle="--", linewidth=1)
    finish(ax, unit_name)
    ax.legend(fontsize="small")
