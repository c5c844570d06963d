"""Random pairs of every kind, and their divergences in float64, term by term."""

import math
import random
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from klmetric import kl_divergence
from klmetric.arithmetic import sharded
from klmetric.options import Options

RTOL, LEAST = 1e-6, 1e-13  # the promise, and from which divergence on it holds
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLASSES = (2, 3, 5, 10, 33, 64, 100, 128, 129, 257)
KINDS = ("plain", "masked", "masked in p", "masked in q", "offset", "peaked", "strided", "one in many")
OFFSETS = (1.0, 30.0, 1e4, -1e4)


class Case(NamedTuple):
    """Rows of one kind."""

    kind: str
    p: Tensor
    q: Tensor
    formats: tuple[str, str]
    temperature: float

    def measured(self, direction: str = "forward") -> Tensor:
        """What klmetric makes of them."""
        options = {"input_format": self.formats, "temperature": self.temperature, "reduction": "none"}
        options["direction"] = direction
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the rows whose only class is too small for half precision
            return kl_divergence(self.p, self.q, **options)

    def of_shares(self, direction: str = "forward", number: int = 3) -> Tensor:
        """What it makes of them where so many processes have a share of the classes each."""
        options = Options(self.formats, temperature=self.temperature, direction=direction)
        shares = [*zip(*(x.tensor_split(number, -1) for x in (self.p, self.q)), strict=True)]
        widths = [len(p.T) for p, _ in shares]
        first = [sum(widths[:i]) for i in range(number)]
        whole = sharded.together(torch.stack([sharded.look(p, q, options) for p, q in shares]), first, options)
        if direction == "forward":
            return whole.kls[0]
        found = [sharded.look_again(p, q, options, whole.masses) for p, q in shares]
        return sharded.together_again(torch.stack(found), first, options, whole).jensen_shannon

    def exact(self, direction: str = "forward") -> Tensor:
        """What they are."""
        a, b = (log_of(x, f, self.temperature) for x, f in zip((self.p, self.q), self.formats, strict=True))
        if direction == "forward":
            return kl_of_logs(a, b)
        middle = torch.logaddexp(a, b) - math.log(2)
        return (kl_of_logs(a, middle) + kl_of_logs(b, middle)) / 2

    def wrong(self, direction: str = "forward") -> Tensor:
        """Which rows are further off than promised, whole or in shares: "forward" or "jensen_shannon"."""
        true, wrong = self.exact(direction), torch.zeros(len(self.p), dtype=torch.bool)
        for value in (self.measured(direction).double(), self.of_shares(direction)):
            is_near = (value - true).abs() <= RTOL * true.clamp_min(LEAST)
            wrong |= ~(is_near | (value == true) | (value.isnan() & true.isnan()))
        return wrong


def log_of(x: Tensor, input_format: str, temperature: float = 1.0) -> Tensor:
    """Logarithms of probabilities in float64, each row apart from its largest, so that a constant costs no digits."""
    x = x.double().log() if input_format == "probs" else x.double()
    return ((x - x.amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def kl_of_logs(a: Tensor, b: Tensor) -> Tensor:
    """The sum of p (e^s - 1 - s) with s = log(q / p), which has no cancellation."""
    seen = a > -math.inf
    s = torch.where(seen, b - a, 0)
    s_near = torch.where(s.abs() < 1, s, 0)
    near = a.exp() * (torch.expm1(s_near) - s_near)
    far = torch.where(a.exp() == 0, 0, -a.exp() * s) + b.exp() - a.exp()
    return torch.where(seen, torch.where(s.abs() < 1, near, far), b.exp()).sum(-1)


def cases(rows: int, seed: int = 0, classes: tuple[int, ...] = CLASSES) -> Iterator[Case]:
    """So many rows."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    while rows > 0:
        width = choose.choice(classes)
        n = min(rows, 200, max(1, 2**17 // width))
        rows -= n
        yield case(n, width, choose, g)


def case(n: int, classes: int, choose: random.Random, g: torch.Generator) -> Case:
    """Rows of one kind, at divergences from far below the least to some nats."""
    kind = choose.choice(KINDS)

    def noise() -> Tensor:
        return torch.randn(n, classes, generator=g, dtype=torch.float64)

    a = noise() * 10 ** choose.uniform(-1, 0.7)
    b = a + noise() * 10 ** (torch.rand(n, 1, generator=g, dtype=torch.float64) * 8.5 - 7.5)
    if kind == "peaked":
        a[:, 0] += choose.uniform(0, 60)
        b[:, choose.choice([0, -1])] += choose.uniform(0, 60)
    if kind == "one in many":
        b[:, 0] += 3
    formats = choose.choice(["probs", "log_probs", "logits"]), choose.choice(["probs", "log_probs", "logits"])
    masked = torch.rand(n, classes, generator=g) < 0.3
    masked[:, 0] = False
    sides = []
    for x, name, input_format in zip((a, b), "pq", formats, strict=True):
        x = {"probs": x.softmax(-1), "log_probs": x.log_softmax(-1), "logits": x}[input_format]
        if kind == "offset" and name == "q" and input_format != "probs":
            x = x + choose.choice(OFFSETS)
        x = x.to(choose.choice(DTYPES))
        if kind in ("masked", f"masked in {name}"):
            x = x.masked_fill(masked, 0 if input_format == "probs" else -math.inf)
        if kind == "strided":
            x = choose.choice([lambda x: x.repeat_interleave(2, 1)[:, ::2], lambda x: x.T.contiguous().T])(x)
        sides.append(x)
    return Case(kind, *sides, formats, choose.choice([1.0, 1.0, 0.7, 3.0]))
