"""The picture of a summary: how the divergence is spread over the rows."""

from typing import Any

import torch
from torch import Tensor

from klmetric.totals import histogram
from klmetric.totals.histogram import Histogram

# The most bars to draw.
BARS = 60
# What has no place on a logarithmic axis.
BESIDE = {"0": histogram.ZERO, "infinite": histogram.INFINITE}


def draw(ax: Any, divergences: Histogram, values: dict[str, float], unit: float, unit_name: str) -> Any:
    """Draw a histogram on a logarithmic axis, with the mean and the quantiles marked.

    Args:
        ax: a matplotlib axis; None for a new figure.
        divergences: of the rows.
        values: of the summary, in `unit`.
        unit: in nats.
        unit_name: its name.

    Returns:
        The figure and the axis.
    """
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install 'klmetric[plot]'") from error
    counts = divergences.counts
    if not counts.sum():
        raise RuntimeError("There must be a row to draw. Got none that counts. Was `update` called before?")
    ax = plt.subplots(figsize=(6.4, 4.0))[1] if ax is None else ax
    n = counts.sum().item()
    if counts[1:-1].sum():
        edges, numbers = bars(divergences)
        stairs(ax, edges / unit, 100 * numbers / n, fill=True, color="0.75")
    marks = {name: value for name, value in values.items() if name == "mean" or _is_quantile(name)}
    colors = plt.get_cmap("viridis")(torch.linspace(0.9, 0, max(1, len(marks) - 1)).tolist())
    for k, (name, value) in enumerate(marks.items()):
        style = {"color": "C3", "linewidth": 2} if name == "mean" else {"color": colors[k - 1], "linestyle": "--"}
        label = f"{name.replace('_', '.')} = {value:.3g}"
        if 0 < value < float("inf"):
            ax.axvline(value, label=label, **style)
        else:  # beside the axis
            ax.plot([], [], label=label, **style)
    for name, place in BESIDE.items():
        if counts[place]:
            ax.plot([], [], " ", label=f"{100 * counts[place].item() / n:.3g} % are {name}")
    finish(ax, unit_name)
    ax.legend()
    return ax.get_figure(), ax


def stairs(ax: Any, edges: Tensor, shares: Tensor, **style: Any) -> None:
    """Draw shares of the rows between edges, as `bars` has them."""
    # By their widths, which differ a little, and from one picture to another: so that heights compare.
    ax.stairs(shares / edges.log2().diff(), edges, **style)
    if edges[0] < 1e-280 or edges[-1] > 1e280:  # a margin would end beyond the numbers there are
        ax.set_xmargin(0)
    ax.set_xscale("log")


def finish(ax: Any, unit_name: str) -> None:
    """Name the axes."""
    ax.set_xlabel(f"KL divergence of a row ({unit_name})")
    ax.set_ylabel("rows (% per doubling)")
    ax.grid(alpha=0.3)


def bars(divergences: Histogram) -> tuple[Tensor, Tensor]:
    """Edges of bars, evenly spaced on a logarithmic axis but for the width of a bin, and the counts in them.

    What is below or above all bins of a stated width is in one wide bar, from the smallest or to the largest number.
    """
    edges = histogram.edges(divergences.fineness)
    # At least a doubling, so that they have a width.
    begin, end = min(divergences.smallest, edges[0].item() / 2), max(divergences.largest, 2 * edges[-1].item())
    edges = torch.cat([edges.new_tensor([begin]), edges, edges.new_tensor([end])])
    counts = divergences.counts[1:-1]
    first, last = (counts > 0).nonzero().flatten()[[0, -1]].tolist()
    begin, end = edges[first].log2().item(), edges[last + 1].log2().item()
    number = min(BARS, last + 1 - first)
    even = torch.linspace(begin, end, number + 1, dtype=torch.float64).exp2()
    places = torch.searchsorted(edges, even * (1 - 1e-9)).clamp(first, last + 1)
    places = torch.unique_consecutive(places)
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return edges[places], before[places].diff()


def _is_quantile(name: str) -> bool:
    return name.startswith("p") and name[1:].replace("_", "").isdigit()
