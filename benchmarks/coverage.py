"""How often does the 95 % interval hold the truth, where neighbouring tokens are alike?"""

import math
import sys

import numpy as np
import torch
from side_by_side import report, table
from torch import Tensor

from klmetric import KLDivergenceSummary
from klmetric.rows.fields import OF_TARGETS
from klmetric.rows.rows import Rows
from klmetric.totals import moments
from klmetric.totals.estimates import mean_of, perplexity_of
from klmetric.totals.moments import Means

CHUNKS, POSITIONS, AT_ONCE = 100, 255, 50
# Of the logarithm of -log p, of that of the divergence, and of log p - log q: their means and standard deviations.
NLL, KL, LN_RATIO = (0.3, 1.0), (math.log(0.01), 1.0), (0.002, 0.1)
NAMES = ("mean of KL", "perplexity", "ln ratio", "mean of Δp")


def truth() -> dict[str, float]:
    """The values of the whole distribution."""
    x, weight = np.polynomial.hermite_e.hermegauss(200)
    weight = weight / weight.sum()
    p = (weight * np.exp(-np.exp(NLL[0] + NLL[1] * x))).sum()
    growth = math.expm1(-LN_RATIO[0] + LN_RATIO[1] ** 2 / 2)  # of p, in which ln ratio has no part
    perplexity = math.exp(math.exp(NLL[0] + NLL[1] ** 2 / 2))
    return dict(zip(NAMES, (math.exp(KL[0] + KL[1] ** 2 / 2), perplexity, LN_RATIO[0], p * growth), strict=True))


def correlated(shape: tuple[int, ...], correlation: float, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, each with this correlation to the one before it along the last axis."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x[..., 1:] *= math.sqrt(1 - correlation**2)
    for k in range(1, shape[-1]):
        x[..., k] += correlation * x[..., k - 1]
    return x


def ours(kl: Tensor, log_p: Tensor, log_q: Tensor) -> dict[str, tuple[float, float]]:
    """The intervals of the report."""
    summary = KLDivergenceSummary().set_dtype(torch.float64)
    summary.add_rows(Rows(kl, None))
    values = {name: value.item() for name, value in summary.compute().items()}
    fields = torch.stack([of_row(log_p, log_q) for of_row in OF_TARGETS.values()])
    means = Means(moments.of_rows(fields, torch.ones_like(kl)), [*OF_TARGETS])
    perplexity = perplexity_of(means)
    found = [perplexity["reference"], perplexity["ln_ratio"], mean_of(means, "delta_p", 1.0)]
    low, high = (values["mean"] + z * values["stderr"] for z in (-1.96, 1.96))
    return dict(zip(NAMES, [(low, high), *((x["low"], x["high"]) for x in found)], strict=True))


def theirs(kl: Tensor, log_p: Tensor, log_q: Tensor) -> dict[str, tuple[float, float]]:
    """Those of `llama-perplexity --kl-divergence`, for which every token is independent of the others."""
    found = []
    for x in (kl, -log_p, log_p - log_q, log_q.exp() - log_p.exp()):
        error = math.sqrt((x.square().mean() - x.mean() ** 2).item() / (x.numel() - 1))
        found.append((x.mean().item(), error))
    nll, error = found[1]
    found[1] = (math.exp(nll), math.exp(nll) * error)
    return {name: (x - 1.96 * e, x + 1.96 * e) for name, (x, e) in zip(NAMES, found, strict=True)}


def main() -> None:
    """Print how many intervals of a hundred hold the truth; `--quick` takes a tenth of the draws."""
    draws = 100 if "--quick" in sys.argv else 1000
    true, figures, lines = truth(), [], []
    for correlation in (0.0, 0.5, 0.9):
        generator = torch.Generator().manual_seed(0)
        held = {(who, name): 0 for who in ("ours", "theirs") for name in NAMES}
        for _ in range(draws // AT_ONCE):
            z = correlated((3, AT_ONCE, CHUNKS, POSITIONS), correlation, generator)
            log_p, kl = -(NLL[0] + NLL[1] * z[0]).exp(), (KL[0] + KL[1] * z[1]).exp()
            log_q = log_p - LN_RATIO[0] - LN_RATIO[1] * z[2]
            for row in zip(kl, log_p, log_q, strict=True):
                for who, intervals in (("ours", ours(*row)), ("theirs", theirs(*row))):
                    for name, (low, high) in intervals.items():
                        held[who, name] += low <= true[name] <= high
        for name in NAMES:
            shares = [held[who, name] / draws for who in ("ours", "theirs")]
            figures.append({"correlation": correlation, "value": name, "ours": shares[0], "theirs": shares[1]})
            lines.append([f"{correlation:g}", name, *(f"{100 * share:.1f} %" for share in shares)])
    head = ["correlation of neighbours", "value", "klmetric", "tokens for independent, as llama.cpp"]
    text = f"{draws:,} draws of {CHUNKS} chunks of {POSITIONS} tokens: how many 95 % intervals hold the truth.\n\n"
    report("Coverage", text + table(head, lines), {"draws": draws, "coverage": figures})


if __name__ == "__main__":
    main()
