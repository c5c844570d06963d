"""The history of a callback: one record for each epoch end, and the picture of them."""

from collections.abc import Sequence
from typing import Any, TypeAlias

History: TypeAlias = list[dict[str, Any]]

# What a record says besides the logged values.
FIELDS = ("stage", "epoch", "step")


def names(history: History) -> list[str]:
    """The names of all values."""
    return list({key: None for record in history for key in record if key not in FIELDS})


def draw(history: History, names: Sequence[str], ax: Any) -> Any:
    """Draw the values of these names, over the epochs (over the steps where an epoch has several values).

    Args:
        history: with at least one record.
        names: of the values.
        ax: a matplotlib axis to draw on; None for a new figure.

    Returns:
        The figure and the axis.
    """
    try:
        from matplotlib import pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install 'klmetric[plot]'") from error
    ax = plt.subplots(figsize=(6.4, 4.0))[1] if ax is None else ax
    ends = [(record["stage"], record["epoch"]) for record in history]
    x = "epoch" if len(set(ends)) == len(ends) else "step"
    for name in names:
        points = [(record[x], record[name]) for record in history if name in record]
        ax.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    ax.set_xlabel(x)
    ax.set_ylabel("KL divergence")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()
    return ax.get_figure(), ax
