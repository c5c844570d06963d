"""What does a call cost where the data cost nothing: 32 rows of 10 classes?"""

from collections.abc import Callable

import torch
from side_by_side import Contenders, report, table
from torchmetrics import Metric
from torchmetrics.regression import KLDivergence as Theirs

from klmetric import KLDivergence as Ours

FORMATS = ("probs", "log_probs")


def setup(which: type[Metric], input_format: str, call: str) -> Callable[[], object]:
    """One call of a metric that has seen a batch."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(32, 10, generator=generator).softmax(-1) for _ in range(2))
    if input_format == "log_probs":
        p, q = p.log(), q.log()
    metric = which(log_prob=input_format == "log_probs")
    metric.update(p, q)

    def compute() -> object:
        metric._computed = None  # or it would only look up what it knows
        return metric.compute()

    return {"update": lambda: metric.update(p, q), "forward": lambda: metric(p, q), "compute": compute}[call]


def main() -> None:
    """Time each call of both, in microseconds."""
    figures, lines = [], []
    with Contenders(("ours", "theirs")) as contenders:
        for input_format in FORMATS:
            for call in ("update", "forward", "compute"):
                both = {
                    name: (setup, (which, input_format, call)) for name, which in (("ours", Ours), ("theirs", Theirs))
                }
                seconds = contenders.medians(both, rounds=15, calls=300)
                ours, theirs = seconds["ours"], seconds["theirs"]
                figures.append({"format": input_format, "call": call, "seconds": seconds})
                cells = [f"{1e6 * ours:.0f}", f"{1e6 * theirs:.0f}", f"{theirs / ours:.2f}"]
                lines.append([f"{call}, {input_format}", *cells])
    text = table(["call", "klmetric (us)", "torchmetrics (us)", "times faster"], lines)
    report("Overhead on 32 x 10", text, figures)


if __name__ == "__main__":
    main()
