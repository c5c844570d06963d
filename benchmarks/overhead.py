"""What does a call cost where the data cost nothing: 32 rows of 10 classes?

The summary stands beside torchmetrics' divergence: it has no summary.
"""

from collections.abc import Callable

import torch
from side_by_side import Contenders, report, table
from torchmetrics import Metric
from torchmetrics.functional.regression import kl_divergence as theirs
from torchmetrics.regression import KLDivergence as Theirs

from klmetric import KLDivergence as Ours
from klmetric import KLDivergenceSummary
from klmetric import kl_divergence as ours

FORMATS = ("probs", "log_probs")
CALLS = {
    "update": (Ours, Theirs),
    "forward": (Ours, Theirs),
    "compute": (Ours, Theirs),
    "update of the summary": (KLDivergenceSummary, Theirs),
    "function": (ours, theirs),
}


def setup(which: Callable[..., Metric], input_format: str, call: str) -> Callable[[], object]:
    """One call of a function, or of a metric that has seen a batch."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(32, 10, generator=generator).softmax(-1) for _ in range(2))
    log_prob = input_format == "log_probs"
    if log_prob:
        p, q = p.log(), q.log()
    if call == "function":
        return lambda: which(p, q, log_prob=log_prob)
    metric = which(log_prob=log_prob)
    metric.update(p, q)

    def compute() -> object:
        metric._computed = None  # or it would only look up what it knows
        return metric.compute()

    if call == "compute":
        return compute
    return (lambda: metric(p, q)) if call == "forward" else (lambda: metric.update(p, q))


def main() -> None:
    """Time each call of both, in microseconds."""
    figures, lines = [], []
    with Contenders(("ours", "theirs")) as contenders:
        for input_format in FORMATS:
            for call, both in CALLS.items():
                setups = {
                    name: (setup, (which, input_format, call))
                    for name, which in zip(("ours", "theirs"), both, strict=True)
                }
                seconds = contenders.medians(setups, rounds=9, calls=300)
                own, other = seconds["ours"], seconds["theirs"]
                figures.append({"format": input_format, "call": call, "seconds": seconds})
                cells = [f"{1e6 * own:.0f}", f"{1e6 * other:.0f}", f"{other / own:.2f}"]
                lines.append([f"{call}, {input_format}", *cells])
    text = table(["call", "klmetric (us)", "torchmetrics (us)", "times faster"], lines)
    report("Overhead on 32 x 10", text, figures)


if __name__ == "__main__":
    main()
