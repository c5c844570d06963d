"""How far does the mean drift from the exact one after a million updates?"""

import math
import sys

import torch
from side_by_side import report, table
from torchmetrics.regression import KLDivergence as Theirs

from klmetric import KLDivergence, kl_divergence

BATCH, CLASSES, POOL = 4, 10, 1000


def main() -> None:
    """Add the batches of a pool over and over; `--quick` takes a hundredth of the updates."""
    updates = 10_000 if "--quick" in sys.argv else 1_000_000
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(POOL, BATCH, CLASSES, generator=generator) for _ in range(2))
    rows = kl_divergence(p, q, input_format="logits", reduction="none").double()
    # Sums without any rounding, of the values that the metrics are given.
    exact = math.fsum(rows.flatten().tolist()) / rows.numel()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    a, b = log_p.double(), log_q.double()
    exact_theirs = math.fsum((a.exp() * (a - b)).sum(-1).flatten().tolist()) / rows.numel()
    ours, theirs = KLDivergence(input_format="logits"), Theirs(log_prob=True)
    for i in range(updates):
        ours.update(p[i % POOL], q[i % POOL])
        theirs.update(log_p[i % POOL], log_q[i % POOL])
    ours.set_dtype(torch.float64)
    figures = {
        "updates": updates,
        "klmetric": abs(ours.compute().item() / exact - 1),
        "torchmetrics": abs(theirs.compute().item() / exact_theirs - 1),
    }
    lines = [[name, f"{figures[name]:.0e}"] for name in ("klmetric", "torchmetrics")]
    text = table([f"relative error of the mean after {updates:,} updates of {BATCH} x {CLASSES}", ""], lines)
    report("Drift", text, figures)


if __name__ == "__main__":
    main()
