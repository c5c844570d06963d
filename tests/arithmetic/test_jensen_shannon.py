"""The Jensen-Shannon divergence, by the kernel, by the plain expression, and with gradients."""

import math

import pytest
import torch
import torch.distributions as D
from cases import FORMATS, logits, pair
from every_kind import LOGITS, cases_by_kind, check, reference
from scipy.spatial.distance import jensenshannon

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence
from klmetric.arithmetic import choose, native
from klmetric.arithmetic.choose import measure_rows
from klmetric.options import Options

CASES = cases_by_kind((1, 2, 3, 10, 64, 129, 1000, 2500))
INF = math.inf


@pytest.fixture(params=["kernel", "plain", "gradient"])
def way(request, monkeypatch):
    """What measures."""
    if request.param == "plain":
        monkeypatch.setattr(choose, "_serves", lambda *_: False)
    elif native.level() is None:
        pytest.skip("there is no kernel here")
    return request.param


def rows(p, q, input_format="logits", **options):
    return kl_divergence(
        p, q, input_format=input_format, direction="jensen_shannon", reduction="none", **options
    ).double()


@pytest.mark.parametrize("kind", CASES)
def test_to_a_millionth_down_to_1e_13(way, kind):
    def measure(p, q, formats, temperature):
        options = Options(formats, direction="jensen_shannon", temperature=temperature)
        if way == "gradient":  # in which the expression is whole
            kl = choose.plain(p.double().requires_grad_(), q.double(), options).detach()
            return kl, p.double().argmax(-1) == q.double().argmax(-1)
        return measure_rows(p, q, options, agrees=True)[:2]

    for case in CASES[kind]:
        check(measure, *case, places=(0, 1, 2, 10) if len(case[0]) > 10 else (0, 2), direction="jensen_shannon")


@pytest.mark.parametrize("base", [None, 2])
def test_as_scipy_has_it(way, base):
    p, q = pair(6, 9, dtype=torch.float64)
    if way == "gradient":
        q.requires_grad_()
    expected = torch.from_numpy(jensenshannon(p.numpy(), q.detach().numpy(), base=base, axis=-1) ** 2)
    torch.testing.assert_close(rows(p, q, "probs", base=base).detach(), expected, rtol=1e-12, atol=0)


class TestConventions:
    def test_it_is_symmetric(self, way):
        p, q = logits(50, 300), logits(50, 300, seed=1)
        torch.testing.assert_close(rows(p, q), rows(q, p), rtol=1e-6, atol=0)

    def test_zeros(self, way):
        p, q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0, 0.0]]).double()
        expected = (math.log(2) + math.log(0.5 / 0.75) + 2 * math.log(1 / 0.75)) / 4
        assert rows(p, q, "probs").item() == pytest.approx(expected, rel=1e-14)
        assert rows(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize("classes", [2, 300, 5000])
    def test_nothing_in_common_is_log_2_and_no_more(self, way, classes):
        p, q = logits(9, classes, dtype=torch.float64).softmax(-1), logits(9, classes, dtype=torch.float64).softmax(-1)
        p[:, ::2] = q[:, 1::2] = 0
        value = rows(p, q, "probs")
        torch.testing.assert_close(value, torch.full_like(value, math.log(2)), rtol=1e-12, atol=0)
        assert (value <= math.log(2)).all()
        assert (rows(1000 * p, 1000 * q) <= math.log(2)).all()

    @pytest.mark.parametrize("eps", [1e-6, 1e-2])
    def test_a_floor_is_under_both(self, eps):
        p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([1.0, 0.0, 0.0]).double()
        floored = [x.clamp_min(eps) / x.clamp_min(eps).sum() for x in (p, q)]
        expected = jensenshannon(*floored) ** 2
        assert rows(p, q, "probs", eps=eps).item() == pytest.approx(expected, rel=1e-12)

    def test_one_row_has_its_bits_anywhere(self, way):
        p, q = logits(40, 300), logits(40, 300) + 0.1 * logits(40, 300, seed=1)
        if way == "gradient":
            q.requires_grad_()
        whole = rows(p, q).detach()
        assert torch.equal(torch.cat([rows(p[:7], q[:7]), rows(p[7:], q[7:])]).detach(), whole)
        assert torch.equal(rows(p.flip(0), q.flip(0)).detach().flip(0), whole)

    def test_distributions(self):
        p, q = pair(4, 6)
        made = rows(D.Categorical(probs=p), D.OneHotCategorical(probs=q))
        assert torch.equal(made, rows(p, q, "probs"))
        message = "direction='jensen_shannon' is for categorical distributions: of others, it has no closed form. Got"
        with pytest.raises(ValueError, match=rf"{message} Normal and Normal\. 'jeffreys' is symmetric as well\."):
            rows(D.Normal(0.0, 1.0), D.Normal(1.0, 1.0))


class TestGradients:
    @pytest.mark.parametrize("distance", [1e-6, 1e-3, 1.0, 30.0])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_of_logits(self, distance, temperature):
        a = logits(5, 50, dtype=torch.float64)
        b = (a + distance * logits(5, 50, seed=1, dtype=torch.float64)).requires_grad_()
        a.requires_grad_()
        kl_divergence(
            a, b, input_format="logits", direction="jensen_shannon", reduction="sum", temperature=temperature
        ).backward()
        p, q = ((x.detach() / temperature).softmax(-1) for x in (a, b))
        for x, mine in ((a, p), (b, q)):
            log_ratio = (2 * mine / (p + q)).log() / 2
            expected = mine * (log_ratio - (mine * log_ratio).sum(-1, keepdim=True)) / temperature
            torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-15)

    @pytest.mark.parametrize("input_format", FORMATS)
    def test_finite_at_zeros_and_beside_rows_that_do_not_count(self, input_format):
        p, q = pair(4, 5, input_format=input_format)
        nothing = 0.0 if input_format == "probs" else -INF
        p[0, 1] = q[1, 2] = p[2, 3] = q[2, 3] = nothing
        q[3, 0] = math.nan
        for x in (p, q):
            x.requires_grad_()
        weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
        value = kl_divergence(p, q, input_format=input_format, direction="jensen_shannon", weight=weight)
        value.backward()
        assert value.isfinite()
        assert p.grad.isfinite().all()
        assert q.grad.isfinite().all()
        assert (q.grad[3] == 0).all()

    def test_zero_for_equal_rows(self):
        p = logits(3, 5)
        q = p.clone().requires_grad_()
        kl_divergence(p, q, input_format="logits", direction="jensen_shannon").backward()
        assert (q.grad == 0).all()


def test_the_value_with_gradients_is_the_one_without(way):
    p, q = logits(5, 1000), logits(5, 1000, seed=1)
    assert torch.equal(rows(p, q.clone().requires_grad_()).detach(), rows(p, q))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])])
def test_metric_and_summary(weight):
    p, q = pair(6, 30, input_format="logits")
    options = {"input_format": "logits", "direction": "jensen_shannon"}
    value = kl_divergence(p, q, weight=weight, **options)
    for kind in (KLDivergence, KLDivergenceSummary):
        metric = kind(**options)
        for part in (slice(0, 2), slice(2, 6)):
            metric.update(p[part], q[part], None if weight is None else weight[part])
        found = metric.compute()
        assert (found["mean"] if isinstance(found, dict) else found) == value
    exact = [reference(a, b, LOGITS, direction="jensen_shannon") for a, b in zip(p, q, strict=True)]
    counts = torch.ones(6).double() if weight is None else weight.double()
    expected = (torch.tensor(exact).double() * counts).sum() / counts.sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_reductions_and_bad_rows():
    p, q = pair(4, 5)
    p[1, 2] = math.nan
    with pytest.warns(UserWarning, match="1 of 4 rows were no distributions and were left out"):
        value = kl_divergence(p, q, direction="jensen_shannon", nan_strategy="ignore", reduction="sum")
    expected = kl_divergence(p[[0, 2, 3]], q[[0, 2, 3]], direction="jensen_shannon", reduction="sum")
    assert value == expected
    with pytest.raises(ValueError, match="the first is row 1: `p` has NaN at class 2"):
        kl_divergence(p, q, direction="jensen_shannon", nan_strategy="error")
