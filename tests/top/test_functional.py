"""`kl_divergence`: conventions, options, gradients, and the answers of the functions it takes the place of."""

import math
import warnings

import pytest
import reference
import torch
import torch.distributions as D
import torch.nn.functional as F
from cases import DIRECTIONS, FORMATS, logits, pair
from scipy.stats import entropy
from torchmetrics.functional.regression import kl_divergence as torchmetrics_kl

from klmetric import kl_divergence

INF = math.inf


class TestConventions:
    """One test for each row of the table in the README."""

    def test_zero_times_log_zero_is_zero(self):
        p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
        assert kl_divergence(p, q) == kl_divergence(p[:, :2], q[:, :2])

    def test_p_zero_contributes_nothing(self):
        p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        torch.testing.assert_close(kl_divergence(p, q), torch.tensor(math.log(2)))

    def test_p_above_zero_against_q_zero_is_infinite(self):
        assert kl_divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])) == INF
        logits = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -INF]])
        assert kl_divergence(*logits, input_format="logits") == INF
        assert kl_divergence(*logits, input_format="logits", direction="reverse") == pytest.approx(math.log(2))

    def test_masked_on_both_sides_contributes_nothing(self):
        p, q = pair(4, 5, input_format="logits")
        masked = [torch.cat([x[:, :2], torch.full((4, 1), -INF), x[:, 2:]], dim=1) for x in (p, q)]
        exact = reference.kl_rows(p, q, input_format="logits")
        rows = kl_divergence(*masked, input_format="logits", reduction="none")
        torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("input_format", FORMATS)
    def test_equal_rows_are_exactly_zero(self, input_format):
        p = pair(20, 1000, input_format=input_format)[0]
        for direction in DIRECTIONS:
            options = {"input_format": input_format, "direction": direction, "reduction": "none"}
            assert (kl_divergence(p, p.clone(), **options) == 0).all()
            assert (kl_divergence(p, p.clone(), temperature=3.0, eps=1e-4, **options) == 0).all()

    @pytest.mark.parametrize("distance", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
    def test_never_negative(self, distance):
        p = logits(50, 2000)
        q = p + distance * logits(50, 2000, seed=1)
        for direction in DIRECTIONS:
            options = {"direction": direction, "reduction": "none"}
            assert (kl_divergence(p, q, input_format="logits", **options) >= 0).all()
            assert (kl_divergence(p.softmax(-1), q.softmax(-1), **options) >= 0).all()

    def test_an_empty_batch(self):
        p = torch.zeros(0, 3)
        assert kl_divergence(p, p).isnan()  # as in torchmetrics: the mean of nothing
        assert kl_divergence(p, p, reduction="sum") == 0
        assert kl_divergence(p, p, reduction="none").shape == (0,)
        assert kl_divergence(torch.zeros(4, 0, 3), torch.zeros(4, 0, 3), reduction="none").shape == (4, 0)

    def test_a_row_of_weight_zero_never_touches_the_result(self):
        p, q = pair(3, 4)
        for bad in (math.nan, INF, -1.0):
            p[1, 0] = bad
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                value = kl_divergence(p, q, weight=torch.tensor([True, False, True]), nan_strategy="error")
                assert value == kl_divergence(p[::2], q[::2])

    def test_log_prob_and_logits_are_normalised(self):
        p, q = pair(4, 5, input_format="logits")
        exact = kl_divergence(p.double(), q.double(), input_format="logits")
        for input_format in ("logits", "log_probs"):
            value = kl_divergence(p.double() + 3, q.double() - 5, input_format=input_format)
            torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)


class TestReductions:
    def test_against_scipy(self):
        p, q = pair(6, 9, dtype=torch.float64)
        rows = torch.from_numpy(entropy(p, q, axis=-1))
        for reduction, exact in (
            ("mean", rows.mean()),
            ("sum", rows.sum()),
            ("batchmean", rows.mean()),
            ("none", rows),
            (None, rows),
        ):
            torch.testing.assert_close(kl_divergence(p, q, reduction=reduction), exact, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("base", [2, 10, 2.5])
    def test_base(self, base):
        p, q = pair(6, 9, dtype=torch.float64)
        for reduction in ("none", "mean"):
            exact = torch.as_tensor(entropy(p, q, base=base, axis=-1))
            exact = exact if reduction == "none" else exact.mean()
            torch.testing.assert_close(kl_divergence(p, q, base=base, reduction=reduction), exact, rtol=1e-12, atol=0)

    def test_batchmean_is_that_of_torch_for_tokens_as_well(self):
        p, q = pair(3, 5, 7, input_format="log_probs", dtype=torch.float64)
        exact = F.kl_div(q, p, reduction="batchmean", log_target=True)
        value = kl_divergence(p, q, input_format="log_probs", reduction="batchmean")
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("weight_shape", [(), (3,), (3, 5)], ids=str)
    def test_weight(self, weight_shape):
        p, q = pair(3, 5, 7, dtype=torch.float64)
        weight = torch.rand(weight_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rows = torch.from_numpy(entropy(p, q, axis=-1))
        spread = weight.reshape(weight_shape + (1,) * (2 - len(weight_shape))).expand(3, 5)
        exact = {
            "mean": (spread * rows).sum() / spread.sum(),
            "sum": (spread * rows).sum(),
            "batchmean": (spread * rows).sum() / spread.amax(1).sum(),
            "none": rows,
        }
        for reduction, value in exact.items():
            torch.testing.assert_close(
                kl_divergence(p, q, reduction=reduction, weight=weight), value, rtol=1e-12, atol=0
            )

    def test_batchmean_counts_a_sample_while_one_of_its_tokens_is_left(self):
        p, q = pair(3, 2, 4, dtype=torch.float64)
        mask = torch.tensor([[1, 1], [1, 0], [0, 0]])  # an attention mask, as tokenizers give it
        rows = torch.from_numpy(entropy(p, q, axis=-1))
        value = kl_divergence(p, q, reduction="batchmean", weight=mask)
        torch.testing.assert_close(value, (rows * mask).sum() / 2, rtol=1e-12, atol=0)

    def test_none_keeps_the_batch_shape_and_puts_zero_where_the_weight_is_zero(self):
        p, q = pair(2, 3, 4)
        p[1, 2] = math.nan
        mask = torch.tensor([[True, True, False], [True, True, False]])
        rows = kl_divergence(p, q, reduction="none", weight=mask)
        assert rows.shape == (2, 3)
        assert (rows[:, 2] == 0).all()
        assert (rows[:, :2] > 0).all()

    def test_dim(self):
        p, q = pair(2, 3, 4)
        exact = kl_divergence(p, q, reduction="none")
        for dim in (0, 1, 2, -3, -2):
            moved = [x.movedim(-1, dim) for x in (p, q)]
            torch.testing.assert_close(kl_divergence(*moved, dim=dim, reduction="none"), exact)

    def test_one_distribution_is_one_row(self):
        p, q = pair(4)
        assert kl_divergence(p, q, reduction="none").shape == ()
        torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p[None], q[None]))


class TestNanStrategy:
    def bad(self):
        p, q = pair(4, 3)
        p[1, 0], q[3] = math.nan, 0
        return p, q

    def test_propagate(self):
        for reduction in ("mean", "sum", "batchmean"):
            with pytest.warns(UserWarning, match=r"^2 of 4 rows were no distributions and make the result NaN\."):
                assert kl_divergence(*self.bad(), reduction=reduction).isnan()

    def test_the_warning_names_the_likely_mistake(self):
        p, q = pair(4, 3, input_format="logits")
        with pytest.warns(UserWarning, match="Were they logits or log-probabilities. Then say so with input_format"):
            kl_divergence(p, q)

    def test_ignore(self):
        p, q = self.bad()
        with pytest.warns(UserWarning, match=r"^2 of 4 rows were no distributions and were left out\."):
            value = kl_divergence(p, q, nan_strategy="ignore")
        assert value == kl_divergence(p[::2], q[::2])
        with pytest.warns(UserWarning, match="2 of 4"):
            rows = kl_divergence(p, q, nan_strategy="ignore", reduction="none")
        assert (rows == 0).tolist() == [False, True, False, True]

    def test_infinite_is_not_invalid(self):
        p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kl_divergence(p, q, nan_strategy="ignore") == INF


class TestGradients:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("input_format", FORMATS)
    def test_gradcheck(self, input_format, direction, reduction):
        p, q = (x.requires_grad_() for x in pair(3, 4, input_format=input_format, dtype=torch.float64))

        def function(p, q):
            return kl_divergence(
                p, q, input_format=input_format, direction=direction, reduction=reduction, temperature=1.5, base=2
            )

        torch.autograd.gradcheck(function, (p, q))

    def test_second_derivative(self):
        p, q = (x.requires_grad_() for x in pair(2, 4, input_format="logits", dtype=torch.float64))
        torch.autograd.gradgradcheck(lambda p, q: kl_divergence(p, q, input_format="logits"), (p, q))

    def test_gradient_of_a_distilled_student_is_the_difference_of_the_probabilities(self):
        p, q = pair(5, 10, input_format="logits")
        q.requires_grad_()
        kl_divergence(p, q, input_format="logits", reduction="sum").backward()
        torch.testing.assert_close(q.grad, q.detach().softmax(-1) - p.softmax(-1), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("input_format", FORMATS)
    def test_finite_where_p_is_zero(self, input_format):
        p, q = pair(3, 4, input_format=input_format)
        p[0, 1] = 0 if input_format == "probs" else -INF
        p.requires_grad_()
        q.requires_grad_()
        kl_divergence(p, q, input_format=input_format, temperature=2.0).backward()
        assert p.grad.isfinite().all()
        assert q.grad.isfinite().all()

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("small", [1e-10, 1e-20, 1e-30])
    def test_finite_where_a_probability_is_small(self, small, direction):
        p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[small, 1.0]])
        grads = []
        for dtype in (torch.float32, torch.float64):
            a, b = (x.clone().to(dtype).requires_grad_() for x in (p, q))
            kl_divergence(a, b, direction=direction).backward()
            grads.append((a.grad.double(), b.grad.double()))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("bad", [math.nan, INF, -1.0, "q is zero"])
    def test_rows_that_do_not_count_get_none(self, bad):
        p, q = pair(3, 4)
        if bad == "q is zero":
            q[1, 2] = 0
        else:
            p[1, 2] = bad
        q.requires_grad_()
        kl_divergence(p, q, weight=torch.tensor([1.0, 0.0, 2.0])).backward()
        assert q.grad.isfinite().all()
        assert (q.grad[1] == 0).all()
        assert (q.grad[0] != 0).all()
        if bad != "q is zero":
            q.grad = None
            with pytest.warns(UserWarning, match="1 of 3"):
                kl_divergence(p, q, nan_strategy="ignore").backward()
            assert q.grad.isfinite().all()


class TestDistributions:
    def test_categorical_keeps_the_zeros_that_torch_clamps(self):
        p = D.Categorical(probs=torch.tensor([[0.5, 0.5, 0.0]]))
        q = D.Categorical(probs=torch.tensor([[0.25, 0.75, 0.0]]))
        exact = kl_divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]]))
        torch.testing.assert_close(kl_divergence(p, q), exact)
        assert p.logits.isfinite().all()  # and looking at them does not change what is measured
        torch.testing.assert_close(kl_divergence(p, q), exact)

    @pytest.mark.parametrize("kind", [D.Categorical, D.OneHotCategorical], ids=lambda kind: kind.__name__)
    def test_categorical(self, kind):
        p, q = pair(4, 6, input_format="logits")
        exact = kl_divergence(p, q, input_format="logits", direction="jeffreys", temperature=2.0)
        for made in (kind(logits=p), kind(probs=p.softmax(-1))):
            value = kl_divergence(made, kind(logits=q), direction="jeffreys", temperature=2.0)
            torch.testing.assert_close(value, exact)

    def test_one_prior_for_a_batch(self):
        p, q = pair(4, 6)
        value = kl_divergence(D.Categorical(probs=p), D.Categorical(probs=q[0]))
        torch.testing.assert_close(value, kl_divergence(p, q[:1].expand(4, 6)))

    @pytest.mark.parametrize("direction", ["forward", "reverse", "jeffreys"])
    def test_normal(self, direction):
        mean, scale = logits(4, 3), logits(4, 3, seed=1).exp()
        p = D.Independent(D.Normal(mean, scale), 1)
        q = D.Independent(D.Normal(torch.zeros(3), torch.ones(3)), 1)
        forward, reverse = D.kl_divergence(p, q), D.kl_divergence(q, p)
        exact = {"forward": forward, "reverse": reverse, "jeffreys": forward + reverse}[direction]
        torch.testing.assert_close(kl_divergence(p, q, direction=direction, reduction="none"), exact)

    def test_one_row_per_batch_element(self):
        p, q = D.Normal(logits(4, 3), 1.0), D.Normal(0.0, 1.0)
        assert kl_divergence(p, q, reduction="none").shape == (4, 3)
        torch.testing.assert_close(kl_divergence(p, q, reduction="batchmean"), D.kl_divergence(p, q).sum() / 4)

    def test_near_equal_distributions_are_not_negative(self):
        concentration = 3 + 1e-5 * logits(1000, 4)
        p, q = D.Dirichlet(concentration), D.Dirichlet(concentration.flip(0))
        assert D.kl_divergence(p, q).min() < 0  # what torch itself answers
        assert kl_divergence(p, q, reduction="none").min() >= 0

    def test_gradient_reaches_the_parameters(self):
        mean = logits(4).requires_grad_()
        kl_divergence(D.Normal(mean, 1.0), D.Normal(0.0, 1.0)).backward()
        torch.testing.assert_close(mean.grad, mean.detach() / 4)


class TestInTorchmetricsPlace:
    """Same arguments, same answers, where theirs are right."""

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none", None])
    @pytest.mark.parametrize("log_prob", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_same_answer(self, log_prob, reduction, dtype):
        p, q = pair(10, 6, input_format="log_probs" if log_prob else "probs", dtype=dtype)
        theirs = torchmetrics_kl(p, q, log_prob, reduction)
        ours = kl_divergence(p, q, log_prob, reduction)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0)

    def test_zero_probability_and_infinity(self):
        p = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.8, 0.0], [0.4, 0.3, 0.3]])
        q = torch.tensor([[0.1, 0.4, 0.5], [0.3, 0.7, 0.0], [0.5, 0.5, 0.0]])
        theirs = torchmetrics_kl(p, q, reduction="none")
        ours = kl_divergence(p, q, reduction="none")
        torch.testing.assert_close(ours, theirs)
        assert ours.isposinf().tolist() == [False, False, True]

    def test_masked_classes_are_where_the_answers_part(self):
        p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.3, 0.7, 0.0]]).log()
        assert torchmetrics_kl(p, q, log_prob=True).isnan()
        torch.testing.assert_close(kl_divergence(p, q, log_prob=True), kl_divergence(p[:, :2], q[:, :2], log_prob=True))

    def test_autocast_computes_in_float32(self):
        p, q = pair(10, 6, input_format="logits")
        exact = kl_divergence(p, q, input_format="logits")
        with torch.autocast("cpu", torch.bfloat16):
            value = kl_divergence(p, q, input_format="logits")
        assert value.dtype == torch.float32
        assert value == exact

    def test_inference_mode(self):
        p, q = pair(10, 6)
        with torch.inference_mode():
            assert kl_divergence(p, q) == kl_divergence(p, q)

    def test_inputs_stay_as_they_were(self):
        p, q = pair(10, 6)
        before = p.clone(), q.clone()
        kl_divergence(p, q, eps=0.1, temperature=2.0, weight=torch.ones(10))
        assert torch.equal(p, before[0])
        assert torch.equal(q, before[1])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64], ids=str
)
def test_weights_of_any_integers(dtype):
    p, q = pair(3, 5)
    weight = torch.tensor([2, 0, 1])
    assert kl_divergence(p, q, weight=weight.to(dtype)) == kl_divergence(p, q, weight=weight.double())
