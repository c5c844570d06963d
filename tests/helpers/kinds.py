"""The metrics that one contract holds for: every reduction of `KLDivergence`, two summaries, and the estimates."""

import warnings
from typing import Any

import torch
from torch import Tensor

from klmetric import KLDivergence, KLDivergenceEstimate, KLDivergenceSummary, kl_divergence

# Of distributions over classes; and of tokens that were drawn, for whose log-probabilities here any numbers pass.
SUMMARIES = ("summary", "measures")
OF_CLASSES = ("mean", "sum", "batchmean", "none", *SUMMARIES)
OF_TOKENS = ("token", "sequence")
KINDS = OF_CLASSES + OF_TOKENS
# Whose value is a dict, without a gradient.
DICTS = (*SUMMARIES, *OF_TOKENS)


def make(kind: str, **options: Any) -> KLDivergence | KLDivergenceEstimate | KLDivergenceSummary:
    if kind in OF_TOKENS:
        return KLDivergenceEstimate(mean=kind, **options)
    if kind in SUMMARIES:
        return KLDivergenceSummary(top=3, measures=kind == "measures", **options)
    return KLDivergence(reduction=kind, **options)


def value_of(kind: str, p: Tensor, q: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
    """The value of one batch alone."""
    if kind not in DICTS:
        value = kl_divergence(p, q, reduction=kind, weight=weight, **options)
        return value if weight is None or kind != "none" else value[weight > 0]
    metric = make(kind, **options)
    metric.update(p, q, weight)
    with warnings.catch_warnings():  # a batch of one sample has no standard error
        warnings.filterwarnings("ignore", message="`stderr` is NaN")
        return metric.compute()


def same(a: Any, b: Any) -> None:
    """Equal to the last bit, dtype included."""
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")
    else:
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def without_order(value: Any) -> Any:
    """The value without what depends on the order of the batches: whose rows come first."""
    if isinstance(value, dict):
        return {key: x for key, x in value.items() if not key.endswith("_sample")}
    return value.sort().values if value.ndim else value
