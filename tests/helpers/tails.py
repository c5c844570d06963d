"""Random and adversarial pairs of which the k likeliest classes of p are known."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = (
    "unrelated",
    "near",
    "peaked",
    "flat",
    "ties",
    "q lies in the tail",
    "q like p in the tail",
    "the worst tail",
    "masked in both",
    "masked in q",
    "masked in p",
)
CLASSES = (2, 3, 5, 10, 50, 200)


class Pair(NamedTuple):
    """Rows of one kind, as log-probabilities in float64."""

    kind: str
    p: Tensor
    q: Tensor
    k: int


def pairs(rows: int, seed: int = 0, at_once: int = 100) -> Iterator[Pair]:
    """At least so many rows, of every kind, number of classes, and k."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < rows:
        for kind in KINDS:
            for classes in CLASSES:
                k = int(torch.randint(1, classes + 1, (), generator=generator))
                yield Pair(kind, *_pair(kind, at_once, classes, k, generator), k)
                done += at_once


def _pair(kind: str, rows: int, classes: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def noise() -> Tensor:
        return torch.randn(rows, classes, generator=generator, dtype=torch.float64)

    scale = 10 ** (2 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 1)
    p = scale * noise()
    q = scale * noise() if kind == "unrelated" else p + 0.3 * noise()
    if kind == "near":
        q = p + 10 ** (-7 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)) * noise()
    elif kind == "peaked":
        p, q = 30 * p, 30 * q
    elif kind == "flat":
        p, q = 0.01 * noise(), scale * noise()
    elif kind == "ties":
        p = p.round()
    is_tail = torch.ones_like(p, dtype=torch.bool).scatter(-1, p.topk(k).indices, False)
    if kind == "q lies in the tail":
        q = torch.where(is_tail, q + 20, q)
    elif kind.startswith("masked"):
        mask = noise() > 0.5
        mask[:, 0] = False
        p = p if kind == "masked in q" else p.masked_fill(mask, -math.inf)
        q = q if kind == "masked in p" else q.masked_fill(mask, -math.inf)
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    if kind == "q like p in the tail":
        q = torch.where(is_tail, p + 0.5, q).log_softmax(-1)
    elif kind == "the worst tail":
        p = torch.stack([worst(a, b, k) for a, b in zip(p, q, strict=True)])
    return p, q


def worst(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    """The p of the largest divergence from q of those with the same k likeliest classes, one class after the other."""
    p = log_p.exp().tolist()
    order = sorted(range(len(p)), key=lambda c: -p[c])
    left, cap = sum(p[c] for c in order[k:]), p[order[k - 1]]
    for c in sorted(order[k:], key=lambda c: log_q[c].item()):
        p[c] = min(left, cap)
        left -= p[c]
    return torch.tensor(p, dtype=torch.float64).clamp_min(0).log()
