"""The metrics that one contract holds for: every reduction of `KLDivergence`, summaries, rows in parts, estimates."""

import warnings
from typing import Any

import torch
from torch import Tensor

from klmetric import Head, KLDivergence, KLDivergenceEstimate, KLDivergenceSummary, TopK, kl_divergence

# Of distributions over classes; and of tokens that were drawn, for whose log-probabilities here any numbers pass.
SUMMARIES = ("summary", "measures")
OF_CLASSES = ("mean", "sum", "batchmean", "none", *SUMMARIES)
OF_TOKENS = ("token", "sequence")
# Whose value is a dict, without a gradient.
DICTS = (*SUMMARIES, "bounds", *OF_TOKENS)


def of_topk(p: Tensor, q: Tensor) -> tuple[TopK, Tensor]:
    values, indices = p.topk(min(3, p.shape[-1]))
    return TopK(values, indices, p.shape[-1], "probs"), q


def of_heads(p: Tensor, q: Tensor) -> tuple[Head, Head]:
    return Head(p.log(), torch.eye(p.shape[-1], device=p.device)), Head(
        q.log(), torch.eye(q.shape[-1], device=q.device)
    )


def of_topk_and_head(p: Tensor, q: Tensor) -> tuple[TopK, Head]:
    return of_topk(p, q)[0], of_heads(p, q)[1]


class InParts:
    """Measures parts of the probabilities that it is given."""

    def _measure(self, p: Tensor, q: Tensor, *rest: Any) -> Any:
        return super()._measure(*self.parts(p, q), *rest)  # type: ignore[misc]


class OfTopK(InParts, KLDivergence):
    parts = staticmethod(of_topk)


class Bounds(InParts, KLDivergenceSummary):
    parts = staticmethod(of_topk)


class OfHeads(InParts, KLDivergence):
    parts = staticmethod(of_heads)


class OfTopKAndHead(InParts, KLDivergence):
    parts = staticmethod(of_topk_and_head)


IN_PARTS = {"top-k": OfTopK, "bounds": Bounds, "heads": OfHeads, "top-k, head": OfTopKAndHead}
KINDS = (*OF_CLASSES, *IN_PARTS, *OF_TOKENS)


def make(kind: str, **options: Any) -> KLDivergence | KLDivergenceEstimate | KLDivergenceSummary:
    if kind in IN_PARTS:
        return IN_PARTS[kind](**({"bounds": True} if kind == "bounds" else {}), **options)
    if kind in OF_TOKENS:
        return KLDivergenceEstimate(mean=kind, **options)
    if kind in SUMMARIES:
        return KLDivergenceSummary(top=3, measures=kind == "measures", **options)
    return KLDivergence(reduction=kind, **options)


def value_of(kind: str, p: Tensor, q: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
    """The value of one batch alone."""
    if kind in IN_PARTS and kind not in DICTS:
        return kl_divergence(*IN_PARTS[kind].parts(p, q), weight=weight, **options)
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
