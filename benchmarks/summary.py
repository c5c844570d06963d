"""What does `KLDivergenceSummary.update` cost beside `KLDivergence.update`?"""

import functools
from collections.abc import Callable

import torch
from side_by_side import Contenders, report, table
from torchmetrics import Metric

from klmetric import KLDivergence, KLDivergenceSummary

SHAPES = ((32, 10), (100_000, 10), (20_000, 100), (8192, 1000), (512, 32_000))
METRICS = {
    "KLDivergence": KLDivergence,
    "summary": KLDivergenceSummary,
    "top=10": functools.partial(KLDivergenceSummary, top=10),
    "Jensen-Shannon": functools.partial(KLDivergenceSummary, direction="jensen_shannon"),
    "measures=True": functools.partial(KLDivergenceSummary, measures=True),
}


def setup(which: Callable[..., Metric], rows: int, classes: int) -> Callable[[], object]:
    """One update."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(rows, classes, generator=generator)
    q = p + 0.1 * torch.randn(rows, classes, generator=generator)
    metric = which(input_format="logits")
    return lambda: metric.update(p, q)


def main() -> None:
    """Time an update of each, in milliseconds."""
    figures, lines = [], []
    with Contenders(METRICS) as contenders:
        for rows, classes in SHAPES:
            setups = {name: (setup, (which, rows, classes)) for name, which in METRICS.items()}
            seconds = contenders.medians(setups, rounds=7, calls=300 if rows == 32 else 1)
            figures.append({"rows": rows, "classes": classes, "seconds": seconds})
            own = seconds["KLDivergence"]
            ratios = [f"{seconds[name] / own:.2f}" for name in list(METRICS)[1:]]
            lines.append([f"{rows:,} x {classes:,}", f"{1e3 * own:.2f}", *ratios])
    state = KLDivergenceSummary().totals
    size = f"The state is {state.numel() * state.element_size():,} bytes, whatever the number of rows."
    head = ["shape", "KLDivergence (ms)", *(f"{name} (times that)" for name in list(METRICS)[1:])]
    report("Summary", f"{table(head, lines)}\n\n{size}", figures)


if __name__ == "__main__":
    main()
