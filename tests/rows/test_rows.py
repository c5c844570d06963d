"""The divergence of each row against 60 digits from the definition."""

import math
import warnings

import pytest
import reference
import torch
from cases import DIRECTIONS, FORMATS, INVALID_ROWS, logits, pair

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence

# What the package promises of float32 for a divergence of 1e-4 and more.
RTOL = 1e-4


def check(p, q, rtol=RTOL, with_gradient=True, **options):
    rows = kl_divergence(p, q, reduction="none", **options)
    exact = reference.kl_rows(p, q, **options)
    torch.testing.assert_close(rows.double(), exact, rtol=rtol, atol=0)
    if with_gradient:  # which has an arithmetic of its own
        differentiable = kl_divergence(p, q.clone().requires_grad_(), reduction="none", **options)
        torch.testing.assert_close(differentiable.double(), exact, rtol=rtol, atol=0)
    return rows


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("shape", [(5, 2), (4, 10), (2, 3, 7), (2, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_rows(shape, input_format, direction, dtype):
    p, q = pair(*shape, input_format=input_format, dtype=dtype)
    rows = check(p, q, input_format=input_format, direction=direction, rtol=1e-12 if dtype == torch.float64 else RTOL)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rows.shape == shape[:-1]


@pytest.mark.parametrize("p_format", FORMATS)
@pytest.mark.parametrize("q_format", FORMATS)
def test_mixed_formats(p_format, q_format):
    p, q = pair(4, 6, input_format=p_format)[0], pair(4, 6, input_format=q_format)[1]
    check(p, q, input_format=(p_format, q_format))


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("input_format", FORMATS)
def test_temperature(input_format, direction, temperature):
    p, q = pair(4, 6, input_format=input_format)
    check(p, q, input_format=input_format, direction=direction, temperature=temperature)


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("input_format", FORMATS)
def test_eps_puts_a_floor_under_the_approximation(input_format, direction, eps):
    p, q = pair(4, 6, input_format=input_format)
    nothing = 0.0 if input_format == "probs" else -math.inf
    p[0, 1] = q[1, 2] = q[2, 3] = p[2, 3] = nothing
    rows = check(p, q, input_format=input_format, direction=direction, eps=eps)
    assert rows.isfinite().all()


@pytest.mark.parametrize("step", [1e-1, 1e-2])
@pytest.mark.parametrize("input_format", FORMATS)
def test_close_to_one_another(input_format, step):
    a = logits(4, 50, dtype=torch.float64)
    b = a + step * logits(4, 50, seed=9, dtype=torch.float64)
    convert = {"probs": torch.Tensor.softmax, "log_probs": torch.Tensor.log_softmax}.get(input_format)
    p, q = ((convert(x, -1) if convert else x).float() for x in (a, b))
    check(p, q, input_format=input_format)


@pytest.mark.parametrize("gap", [30.0, 100.0, 700.0, 10_000.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peaked_logits(gap, direction):
    p = torch.tensor([[gap, 0.0, -1.0], [gap, 0.0, -1.0], [0.0, gap, 1.0], [-gap, gap, 0.0]])
    q = torch.tensor([[gap, 1.0, -1.0], [0.0, gap, -1.0], [0.0, 1.0, gap], [-gap, gap - 1, 3.0]])
    rows = kl_divergence(p, q, input_format="logits", direction=direction, reduction="none")
    exact = reference.kl_rows(p, q, input_format="logits", direction=direction)
    # What is smaller than the smallest normal float32 comes out as anything from there down to 0.
    torch.testing.assert_close(rows.double(), exact, rtol=RTOL, atol=torch.finfo(torch.float32).tiny)
    assert (rows >= 0).all()


@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6, 1e9, -1e9, -3e38])
def test_a_constant_in_all_logits(offset):
    p, q = pair(4, 6, input_format="logits")
    q = (q + offset).requires_grad_()
    for rows in (
        kl_divergence(p, q, input_format="logits", reduction="none"),
        kl_divergence(p, q.detach(), input_format="logits", reduction="none"),
    ):
        exact = reference.kl_rows(p, q, input_format="logits")
        torch.testing.assert_close(rows.double(), exact, rtol=RTOL, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.3, 7.0])
def test_near_equal_logits_at_any_temperature(temperature):
    p = 6 * logits(20, 100)
    q = p + 0.01 * logits(20, 100, seed=1)
    # Where there are gradients, the division of the logits rounds in float32.
    check(p, q, input_format="logits", temperature=temperature, with_gradient=False)


def test_infinite_although_p_underflows():
    p, q = torch.tensor([[0.0, -700.0]]), torch.tensor([[0.0, -math.inf]])
    assert kl_divergence(p, q, input_format="logits") == math.inf
    assert kl_divergence(p, q.requires_grad_(), input_format="logits") == math.inf


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e38])
def test_probabilities_of_any_scale(scale):
    p, q = pair(4, 6)
    rows = kl_divergence(p / p.amax() * scale, q, reduction="none")
    torch.testing.assert_close(rows.double(), reference.kl_rows(p, q), rtol=RTOL, atol=0)


ONE_CLASS = r"With one class its probability is 1.*shape \(1, 1\), dim=-1.*give torch\.distributions\.Bernoulli"


def test_one_class_has_no_divergence_and_says_so():
    p, q = torch.tensor([[0.3]]), torch.tensor([[7.0]])
    for options in ({}, {"input_format": "logits"}):
        with pytest.warns(UserWarning, match=ONE_CLASS):
            assert kl_divergence(p, q, **options) == 0
    for metric in (KLDivergence(), KLDivergenceSummary()):
        with pytest.warns(UserWarning, match=ONE_CLASS):
            metric.update(p, q)
    with pytest.warns(UserWarning, match=r"shape \(1, 3\), dim=0"):
        kl_divergence(torch.rand(1, 3), torch.rand(1, 3), dim=0)


def test_one_class_is_said_once():
    p = torch.tensor([[0.3]])
    metric = KLDivergence()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            kl_divergence(p, p)
            metric.update(p, p)
    assert len(caught) == 2


def test_a_categorical_distribution_of_one_class_is_meant_so():
    one = torch.distributions.Categorical(probs=torch.ones(2, 1))
    assert kl_divergence(one, one) == 0


def test_one_hot_against_one_hot():
    one_hot = torch.eye(3)
    rows = kl_divergence(one_hot, one_hot.roll(1, 0), reduction="none")
    assert rows.isposinf().all()
    assert (kl_divergence(one_hot, one_hot, reduction="none") == 0).all()


@pytest.mark.parametrize("side", ["p", "q", "both"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", INVALID_ROWS)
def test_a_row_that_is_no_distribution_is_nan_and_no_other(case, direction, side):
    input_format, values, _ = INVALID_ROWS[case]
    bad = torch.tensor(values)
    p, q = pair(3, 3, input_format=input_format)
    if side in ("p", "both"):
        p[1] = bad
    if side in ("q", "both"):
        q[1] = bad
    for eps in (0.0, 1e-3):
        with pytest.warns(UserWarning, match="1 of 3 rows were no distributions and make the result NaN"):
            rows = kl_divergence(p, q, input_format=input_format, direction=direction, eps=eps, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]
