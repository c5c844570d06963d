"""Classes without probability: masks of every kind, and where a probability ends."""

import math

import mpmath
import pytest
import torch
from cases import DIRECTIONS

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence

INF = math.inf
# ln 2^-1075: a number with this logarithm or a lower one is 0 in float64.
EDGE = float(-1075 * mpmath.log(2))
MASKS = {
    "-1e9": (-1e9, torch.float32),
    "min": (torch.finfo(torch.float32).min, torch.float32),
    "half": (-1e4, torch.float16),
    "min of half": (-65504.0, torch.float16),
    "min of bfloat16": (torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "min of double": (torch.finfo(torch.float64).min, torch.float64),
    "-2000": (-2000.0, torch.float64),
}
P, Q = [0.5, -1.0, 2.0, 0.25], [0.0, -0.5, 1.0, 0.75]


def exact(p, q, temperature=1.0):
    """By the definition, in 60 digits; classes that are masked left out."""
    a, b = ([mpmath.exp(mpmath.mpf(x) / mpmath.mpf(temperature)) for x in row] for row in (p, q))
    a, b = ([x / mpmath.fsum(row) for x in row] for row in (a, b))
    return float(mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True)))


def masked(mask, dtype, width=0):
    """Rows of which only the first four classes have probability: in p by `mask`, in q by -inf."""
    more = max(width - len(P), 1)
    return torch.tensor([P + [mask] * more] * 3).to(dtype), torch.tensor([Q + [-INF] * more] * 3).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("width", [5, 300, 40_000])
@pytest.mark.parametrize("case", MASKS)
def test_a_large_negative_number_is_a_mask(case, width, temperature):
    mask, dtype = MASKS[case]
    p, q = masked(mask, dtype, width)
    expected = exact(P, Q, temperature)
    for input_format in ("logits", "log_probs", ("logits", "log_probs")):
        options = {"input_format": input_format, "temperature": temperature}
        value = kl_divergence(p, q, **options)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        reverse = kl_divergence(q, p, direction="reverse", **options)
        assert reverse.item() == value.item()
    a, b = p.clone().requires_grad_(), q.clone().requires_grad_()
    loss = kl_divergence(a, b, input_format="logits", temperature=temperature)
    loss.backward()
    assert loss.item() == value.item()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    assert (a.grad[:, 4:] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_floor_beside_a_mask(direction):
    p, q = masked(-1e9, torch.float32)
    value = kl_divergence(p, q, input_format="logits", direction=direction, eps=1e-6)
    as_infinite = kl_divergence(p.masked_fill(p < -1e8, -INF), q, input_format="logits", direction=direction, eps=1e-6)
    assert value.isfinite()
    assert value.item() == pytest.approx(as_infinite.item(), rel=1e-5)


def test_probabilities_beside_logits():
    p, q = masked(-1e9, torch.float32)
    value = kl_divergence(p, q.softmax(-1), input_format=("logits", "probs"))
    assert value.item() == pytest.approx(exact(P, Q), rel=1e-5)


def test_where_q_has_some_it_is_infinite_in_neither():
    p, q = torch.tensor([[0.0, -1e9]]), torch.tensor([[0.0, -0.5]])
    assert kl_divergence(p, q, input_format="logits").item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-6)
    # q alone: a logit is no less than it says.
    assert kl_divergence(q, p, input_format="logits").item() == pytest.approx(1e9 / (1 + math.exp(0.5)), rel=1e-6)


@pytest.mark.parametrize("others", [1, 20, 300, 20_000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_a_probability_ends(dtype, others):
    # By the sum of all, which is not the same as that of the part in which a class is measured.
    lowest = EDGE + math.log(others)
    step = 1e-3 if dtype == torch.float32 else 1e-9
    p = torch.zeros(3, others + 1, dtype=dtype)
    p[:, -1] = torch.tensor([lowest + step, lowest - step, -INF], dtype=dtype)
    q = torch.zeros_like(p)
    q[:, -1] = -INF
    options = {"input_format": "logits", "reduction": "none"}
    for value in (
        kl_divergence(p, q, **options),
        kl_divergence(p, q.clone().requires_grad_(), **options).detach(),
        kl_divergence(q, p, direction="reverse", **options),
        torch.vmap(lambda p, q: kl_divergence(p, q, **options))(p, q),
    ):
        assert value.tolist() == [INF, 0, 0]


def test_where_a_probability_of_float64_ends():
    least = 5e-324
    p = torch.tensor([[1.0, least], [4.0, least], [1e300, 1e-200], [1e300, 0]], dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    for with_gradient in (False, True):
        value = kl_divergence(p.clone().requires_grad_(with_gradient), q, reduction="none")
        assert value.tolist() == [INF, 0, 0, 0]


def test_metric_and_summary():
    p, q = masked(-1e9, torch.float32)
    q[2, 0] = -INF
    metric, summary = (kind(input_format="logits") for kind in (KLDivergence, KLDivergenceSummary))
    for each in (metric, summary):
        each.update(p[:2], q[:2])
    assert metric.compute().item() == pytest.approx(exact(P, Q), rel=1e-5)
    assert summary.compute()["infinite"] == 0
    summary.update(p, q)
    assert summary.compute()["infinite"] == 1


# name: what becomes of p and q, unmasked rows of float32 logits, and how to read them
ZEROS = {
    "masked": (lambda x, m: x.masked_fill(m, -INF), "logits", 1.0),
    "masked, of large numbers": (lambda x, m: x.masked_fill(m, -1e9), "logits", 1.0),
    "at a temperature": (lambda x, m: x.masked_fill(m, -INF), "logits", 2.0),
    "in float64": (lambda x, m: x.double().masked_fill(m, -INF), "logits", 1.0),
    "soft labels": (lambda x, m: x.softmax(-1).masked_fill(m, 0), "probs", 1.0),
    "soft labels of half precision": (lambda x, m: x.softmax(-1).half().masked_fill(m, 0), "probs", 1.0),
}


@pytest.mark.parametrize("step", [0.0, 1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(40, 10), (20, 255), (10, 3000)], ids=str)
@pytest.mark.parametrize("case", ZEROS)
def test_zeros_in_both_are_as_if_they_were_not_there(case, shape, step):
    change, input_format, temperature = ZEROS[case]
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    is_masked = torch.arange(shape[1]) % 3 == 2
    p, q = (change(y, is_masked.expand(shape)) for y in (x, x + step * noise))
    options = {"input_format": input_format, "temperature": temperature, "reduction": "none"}
    value = kl_divergence(p, q, **options)
    alone = kl_divergence(p[:, ~is_masked].double(), q[:, ~is_masked].double(), **options)
    torch.testing.assert_close(value.double(), alone, rtol=1e-5, atol=1e-25)
    # Beside rows without any, and rows that are no distributions, each row is what it is alone.
    full = kl_divergence(x, x + step * noise, input_format="logits", reduction="none")
    if input_format == "logits" and temperature == 1:
        p, q = torch.cat([p, x.to(p.dtype)]), torch.cat([q, (x + step * noise).to(p.dtype)])
        assert torch.equal(kl_divergence(p, q, **options)[: shape[0]], value)
        if p.dtype == torch.float32:
            assert torch.equal(kl_divergence(p, q, **options)[shape[0] :], full)
