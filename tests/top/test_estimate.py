"""Estimates from drawn tokens: what each value is, against sixty digits, numpy and distributions that are known."""

import math
import pickle
import re

import mpmath
import numpy as np
import pytest
import torch
import torch.distributions as D
from cases import logits
from kinds import same
from torchmetrics import MetricCollection, MinMaxMetric

from klmetric import KLDivergence, KLDivergenceEstimate
from klmetric.totals import drawn

ESTIMATORS = ("k1", "k2", "k3")
MEANS = ("token", "sequence")
NAN, INF = math.nan, math.inf
NO_ERROR = "ignore:`stderr` is NaN:UserWarning"


def of(log_p, log_q, weight=None, **options):
    """The values, as numbers."""
    metric = KLDivergenceEstimate(**options).set_dtype(torch.float64)
    metric.update(log_p, log_q, weight)
    return {name: value.item() for name, value in metric.compute().items()}


def tokens(samples=40, positions=7, distance=0.3, dtype=torch.float64):
    """Log-probabilities, alike within a sample, and a mask of lengths from 0 on, with NaN where it is 0."""
    log_p = logits(samples, positions, dtype=dtype).abs().neg()
    alike = logits(samples, 1, seed=1, dtype=dtype) + 0.3 * logits(samples, positions, seed=2, dtype=dtype)
    length = torch.arange(samples) % (positions + 1)
    mask = torch.arange(positions) < length.unsqueeze(1)
    return log_p.masked_fill(~mask, NAN), (log_p + distance * alike).masked_fill(~mask, NAN), mask


def estimates(log_p, log_q):
    """k1, k2 and k3 of each token by their definitions, without their rounding."""
    with mpmath.workdps(60):
        d = [mpmath.mpf(a) - mpmath.mpf(b) for a, b in zip(log_p.tolist(), log_q.tolist(), strict=True)]
        return {"k1": d, "k2": [x * x / 2 for x in d], "k3": [mpmath.exp(-x) - 1 + x for x in d]}


class TestMean:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("distance", [1e-8, 1e-6, 1e-3, 1.0, 30.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_to_the_last_digits(self, estimator, distance, dtype):
        log_p, log_q, mask = tokens(distance=distance)
        log_p, log_q = log_p.to(dtype), log_q.to(dtype)
        k = estimates(log_p[mask].double(), log_q[mask].double())[estimator]
        with mpmath.workdps(60):
            of_token, of_sequence = (float(mpmath.fsum(k) / n) for n in (len(k), int(mask.any(1).sum())))
        assert of(log_p, log_q, mask, estimator=estimator)["mean"] == pytest.approx(of_token, rel=1e-12, abs=0)
        found = of(log_p, log_q, mask, estimator=estimator, mean="sequence")["mean"]
        assert found == pytest.approx(of_sequence, rel=1e-12, abs=0)

    def test_near_equal_float32_keeps_six_digits(self):
        log_p = logits(1000).abs().neg()
        log_q = log_p + 1e-6 * logits(1000, seed=1)
        d = log_p.double() - log_q.double()
        assert of(log_p, log_q)["mean"] == pytest.approx((d.square() / 2 - d**3 / 6).mean().item(), rel=1e-9, abs=0)
        naive = torch.exp(log_q - log_p) - 1 - (log_q - log_p)
        assert naive.mean().item() != pytest.approx(d.square().mean().item() / 2, rel=1e-2)

    def test_no_clamp(self):
        assert of(torch.tensor([-1.0, -1.0]), torch.tensor([-601.0, -1.0]))["mean"] == 299.5
        r = of(torch.tensor([-601.0, -1.0]), torch.tensor([-1.0, -1.0]))["mean"]
        assert r == pytest.approx((math.exp(600) - 1 - 600) / 2)

    def test_the_unit(self):
        batch = tokens()
        nats, bits = of(*batch), of(*batch, base=2)
        for name in ("mean", "stderr", "low", "high"):
            assert bits[name] == pytest.approx(nats[name] / math.log(2))
        for name in ("ess", "mismatch", "tokens", "sequences"):
            assert bits[name] == nats[name]

    @pytest.mark.parametrize("shape", [(280,), (280, 1), (40, 7)])
    def test_weights(self, shape):
        log_p, log_q = logits(*shape, dtype=torch.float64), logits(*shape, seed=1, dtype=torch.float64)
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        k = (log_q - log_p).exp() - 1 + (log_p - log_q)
        found = of(log_p, log_q, weight)
        assert found["mean"] == pytest.approx(((k * weight).sum() / weight.sum()).item())
        largest = weight.reshape(shape[0], -1).amax(1)
        found = of(log_p, log_q, weight, mean="sequence")
        assert found["mean"] == pytest.approx(((k * weight).sum() / largest.sum()).item())

    def test_the_mean_of_means_is_a_matter_of_weights(self):
        log_p, log_q, mask = tokens()
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1)
        d = torch.where(mask, log_p - log_q, 0)
        expected = (d.sum(1) / mask.sum(1))[mask.any(1)].mean().item()
        assert of(log_p, log_q, weight, estimator="k1")["mean"] == pytest.approx(expected)


def by_hand(log_p, log_q, weight, estimator, mean):
    """Mean, standard error and effective sample size, straight from the formulas."""
    d = np.where(weight > 0, np.nan_to_num((log_p - log_q).numpy()), 0)
    k = {"k1": d, "k2": d**2 / 2, "k3": np.expm1(-d) + d}[estimator]
    weight = weight.double().numpy()
    if mean == "sequence":
        largest = weight.max(1, keepdims=True)
        k, weight = (k * weight).sum(1, keepdims=True) / np.where(largest > 0, largest, 1), largest
    s, n = (k * weight).sum(1), weight.sum(1)
    m, samples, units = s.sum() / n.sum(), (n > 0).sum(), (weight > 0).sum()
    error = np.sqrt(samples / (samples - 1) * ((s - m * n) ** 2).sum()) / n.sum()
    variance = ((k - m) ** 2 * weight).sum() / n.sum() * units / (units - 1)
    return m, error, variance / error**2


class TestHowSure:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("mean", MEANS)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_by_hand(self, estimator, mean, weighted):
        log_p, log_q, weight = tokens()
        if weighted:
            weight = weight * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = of(log_p, log_q, weight, estimator=estimator, mean=mean)
        m, error, size = by_hand(log_p, log_q, weight, estimator, mean)
        assert found["mean"] == pytest.approx(m)
        assert found["stderr"] == pytest.approx(error)
        assert found["ess"] == pytest.approx(size)
        assert (found["low"], found["high"]) == pytest.approx((m - 1.96 * error, m + 1.96 * error))
        assert (found["tokens"], found["sequences"]) == ((weight > 0).sum(), (weight > 0).any(1).sum())

    def test_of_independent_tokens_all_are_effective(self):
        log_p, log_q = logits(300), logits(300, seed=1)
        for mean in MEANS:
            for estimator in ESTIMATORS:
                found = of(log_p, log_q, estimator=estimator, mean=mean)
                assert found["ess"] == pytest.approx(300)
                assert (found["tokens"], found["sequences"]) == (300, 300)

    def test_of_tokens_that_are_all_alike_one_of_a_sequence_is(self):
        log_p, log_q = (logits(300, 1, seed=seed).expand(300, 20) for seed in (0, 1))
        assert of(log_p, log_q)["ess"] == pytest.approx(300, rel=0.01)
        assert of(log_p, log_q, mean="sequence")["ess"] == pytest.approx(300)

    def test_of_equal_ones_nothing_varies(self):
        log_p = logits(6, 7).abs().neg()
        assert of(log_p, log_p) == {
            **{"mean": 0, "stderr": 0, "low": 0, "high": 0, "ess": 42, "mismatch": 0},
            **{"tokens": 42, "sequences": 6, "infinite": 0, "invalid": 0},
        }

    @pytest.mark.parametrize("mean", MEANS)
    def test_of_one_sequence_there_is_no_error(self, mean):
        metric = KLDivergenceEstimate(mean=mean)
        metric.update(logits(1, 7), logits(1, 7, seed=1))
        text = "`stderr` is NaN: a standard error needs at least two sequences (the first axis) of weight above 0."
        with pytest.warns(UserWarning, match=re.escape(text)) as said:
            values = metric.compute()
        assert [warning.filename for warning in said] == [__file__]
        assert values["mean"].isfinite()
        assert all(values[name].isnan() for name in ("stderr", "low", "high", "ess", "mismatch"))
        metric.update(logits(1, 7, seed=2), logits(1, 7, seed=3))
        assert metric.compute()["stderr"] > 0

    def test_of_none(self):
        found = of(torch.zeros(0, 5), torch.zeros(0, 5))
        assert all(math.isnan(found[name]) for name in ("mean", "stderr", "ess", "mismatch"))
        assert [found[name] for name in ("tokens", "sequences", "infinite", "invalid")] == [0, 0, 0, 0]
        assert of(torch.zeros(5, 0), torch.zeros(5, 0))["tokens"] == 0


class Topics:
    """Each sequence has a topic, which sets its length, and how far q is from p in all of its tokens."""

    def __init__(self, distance):
        generator = torch.Generator().manual_seed(0)
        self.logits = 2 * torch.randn(8, 12, generator=generator, dtype=torch.float64)
        noise = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        self.log_p = self.logits.log_softmax(-1)
        self.log_q = (self.logits + distance * torch.linspace(0.2, 1.5, 8).unsqueeze(1) * noise).log_softmax(-1)
        self.length = torch.tensor([3, 12, 5, 9, 4, 10, 7, 8])
        kl = (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)
        self.truth = {"sequence": (kl * self.length).mean().item()}
        self.truth["token"] = self.truth["sequence"] / self.length.double().mean().item()

    def draw(self, sequences, seed, by="log_p"):
        generator = torch.Generator().manual_seed(seed)
        topic = torch.randint(8, (sequences,), generator=generator)
        token = torch.multinomial(getattr(self, by).exp()[topic], 12, replacement=True, generator=generator)
        mask = torch.arange(12) < self.length[topic].unsqueeze(1)
        return self.log_p[topic].gather(1, token), self.log_q[topic].gather(1, token), mask


@pytest.mark.slow
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("distance", [0.05, 0.5])
def test_the_interval_holds_the_truth(mean, distance):
    topics, draws = Topics(distance), 600
    held, means, own = dict.fromkeys(ESTIMATORS, 0), {name: [] for name in ESTIMATORS}, []
    held_if_independent = 0
    for seed in range(draws):
        batch = topics.draw(150, seed)
        for estimator in ESTIMATORS:
            found = of(*batch, estimator=estimator, mean=mean)
            held[estimator] += found["low"] <= topics.truth[mean] <= found["high"]
            means[estimator].append(found["mean"])
        own.append(found["mismatch"])
        log_p, log_q, mask = batch
        k = (torch.expm1(log_q - log_p) + log_p - log_q)[mask]
        held_if_independent += abs(k.mean() - topics.truth["token"]) <= 1.96 * k.std() / len(k) ** 0.5
    assert 0.93 <= held["k1"] / draws <= 0.97
    assert 0.93 <= held["k3"] / draws <= 0.97
    assert held_if_independent / draws < 0.8
    for estimator in ("k1", "k3"):  # without a bias beyond what so many draws can show
        error = np.std(means[estimator]) / draws**0.5
        assert np.mean(means[estimator]) == pytest.approx(topics.truth[mean], abs=3.5 * error)
    if distance > 0.1:
        error = np.std(means["k2"]) / draws**0.5
        assert abs(np.mean(means["k2"]) - topics.truth[mean]) > 5 * error, "k2 is biased"
    assert np.std(own) == pytest.approx(1, abs=0.15)
    assert abs(np.mean(own)) < 0.3


class TestMismatch:
    """The mean of r is 1 over tokens that were drawn from p."""

    def test_of_tokens_that_p_has_drawn(self):
        found = of(*Topics(0.5).draw(2000, 0))
        assert abs(found["mismatch"]) < 3

    @pytest.mark.parametrize("mean", MEANS)
    def test_of_tokens_that_q_has_drawn(self, mean):
        assert of(*Topics(0.5).draw(2000, 0, by="log_q"), mean=mean)["mismatch"] > 10

    def test_of_the_most_likely_tokens_alone(self):
        topics = Topics(0.5)
        log_p, log_q, mask = topics.draw(20_000, 0)
        of_top_p = mask & (log_p > math.log(0.1))
        assert abs(of(log_p, log_q, of_top_p)["mismatch"]) > 8

    def test_by_hand(self):
        log_p, log_q, mask = tokens()
        r = torch.where(mask, (log_q - log_p).exp() - 1, 0)
        m = r.sum() / mask.sum()
        residual = r.sum(1) - m * mask.sum(1)
        samples = int(mask.any(1).sum())
        error = (samples / (samples - 1) * residual.square().sum()).sqrt() / mask.sum()
        for estimator in ESTIMATORS:
            assert of(log_p, log_q, mask, estimator=estimator)["mismatch"] == pytest.approx((m / error).item())


def test_a_text_of_others_gives_the_ratio_of_perplexities():
    log_p, log_q = logits(50, 20).abs().neg(), logits(50, 20, seed=1).abs().neg() * 0.8
    found = of(log_p, log_q, estimator="k1")
    perplexity = [math.exp(-x.double().mean().item()) for x in (log_p, log_q)]
    assert found["mean"] == pytest.approx(math.log(perplexity[1] / perplexity[0]))
    assert found["mean"] < 0, "which is no divergence"


def test_the_variance_of_k3_where_log_r_is_normal():
    """The formula of the documentation: e^s - 1 - s beside s of k1."""
    s, n = 0.3, 200_000
    log_r = s**0.5 * logits(n, dtype=torch.float64) - s / 2
    for estimator, variance in (("k1", s), ("k3", math.expm1(s) - s)):
        found = of(torch.zeros(n), log_r, estimator=estimator)
        assert n * found["stderr"] ** 2 == pytest.approx(variance, rel=0.05)
        assert found["mean"] == pytest.approx(s / 2, abs=4 * found["stderr"])


class TestConventions:
    def test_a_token_that_q_rules_out(self):
        log_p, log_q, mask = tokens()
        log_q[5, 0] = -INF
        for estimator in ESTIMATORS:
            for mean in MEANS:
                found = of(log_p, log_q, mask, estimator=estimator, mean=mean)
                assert (found["mean"], found["infinite"], found["invalid"]) == (INF, 1, 0)
                assert all(math.isnan(found[name]) for name in ("stderr", "low", "high", "ess", "mismatch"))
        mask[5, 0] = False
        assert of(log_p, log_q, mask)["infinite"] == 0

    def test_a_ratio_beyond_float64(self):
        found = of(torch.tensor([-800.0, -1.0]), torch.tensor([-1.0, -1.0]))
        assert (found["mean"], found["infinite"]) == (INF, 1)
        assert of(torch.tensor([-800.0, -1.0]), torch.tensor([-1.0, -1.0]), estimator="k1")["mean"] == -399.5

    def test_log_probabilities_of_densities(self):
        p, q = D.Normal(0.0, 0.01), D.Normal(0.001, 0.01)
        torch.manual_seed(0)
        x = p.sample((10_000,))
        assert (p.log_prob(x) > 0).any()
        found = of(p.log_prob(x), q.log_prob(x))
        assert found["low"] < D.kl_divergence(p, q).item() < found["high"]

    @pytest.mark.parametrize("bad", [(-INF, -1.0), (NAN, -1.0), (-1.0, NAN), (INF, -1.0), (-1.0, INF), (-INF, -INF)])
    @pytest.mark.parametrize("mean", MEANS)
    def test_tokens_that_cannot_have_been_drawn(self, bad, mean):
        log_p, log_q, mask = tokens()
        log_p[5, 1], log_q[5, 1] = bad  # of five tokens
        text = "1 of 140 tokens cannot have been drawn (log p is -inf), or have a log-probability of NaN or +inf, and "
        with pytest.warns(UserWarning, match=re.escape(text + "make the result NaN. Give padding the weight 0.")):
            found = of(log_p, log_q, mask, mean=mean)
        assert found["invalid"] == 1
        counts = {"tokens", "sequences", "infinite", "invalid"}
        assert {name for name, x in found.items() if math.isnan(x)} == found.keys() - counts
        with pytest.warns(UserWarning, match=re.escape(text + "were left out.")):
            found = of(log_p, log_q, mask, mean=mean, nan_strategy="ignore")
        if mean == "token":
            mask[5, 1] = False
        else:
            mask[5] = False  # of which the sum is not known
        assert found == {**of(log_p, log_q, mask, mean=mean), "invalid": 1}
        assert found["tokens"] == (139 if mean == "token" else 135)

    def test_ignore_says_so_once(self):
        metric = KLDivergenceEstimate(nan_strategy="ignore")
        for _ in range(2):
            metric.update(torch.tensor([NAN, -1.0, -2.0]), torch.tensor([-1.0, -1.0, -1.0]))
        with pytest.warns(UserWarning, match="2 of 6 tokens"):
            metric.compute()
        metric.update(torch.tensor([-1.0]), torch.tensor([-1.0]))
        assert metric.compute()["invalid"] == 2  # warnings are errors here

    def test_error_names_the_first(self):
        metric = KLDivergenceEstimate(nan_strategy="error")
        log_p, log_q, mask = tokens()
        metric.update(log_p, log_q, mask)
        before = metric.totals
        log_p[5, 1] = log_p[6, 2] = -INF
        text = (
            "Every token must have a finite log-probability under p, and one below +inf under q (nan_strategy='error')."
            " 2 of 280 tokens have not; the first is token (5, 1): log p is -inf, log q is"
        )
        for call in (metric.update, metric):
            with pytest.raises(ValueError, match=re.escape(text)):
                call(log_p, log_q, mask)
        assert metric.totals is before
        assert metric.update_count == 1
        with pytest.raises(ValueError, match="must look at the data"):
            KLDivergenceEstimate(nan_strategy="error").to("meta").update(*(x.to("meta") for x in (log_p, log_q)))

    def test_what_comes_in_has_no_gradient(self):
        log_p = logits(4, 5).requires_grad_()
        metric = KLDivergenceEstimate()
        assert not metric(log_p, logits(4, 5, seed=1))["mean"].requires_grad
        metric.update(log_p, logits(4, 5, seed=1))
        assert not metric.totals.requires_grad


GATHER = "log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)"
X = torch.zeros(2, 3)
REFUSED = {
    "a list": ([0.1], X, "`log_p` must be a torch.Tensor: the log-probability of each drawn token. Got list."),
    "a distribution": (
        X,
        D.Normal(0.0, 1.0),
        "`log_q` must be a torch.Tensor: the log-probability of each drawn token. Got Normal. Of a distribution take"
        " .log_prob(x), of x drawn from p.",
    ),
    "tokens": (
        X.long(),
        X,
        "`log_p` must hold log-probabilities in float16, bfloat16, float32 or float64. Got torch.int64, shape (2, 3)."
        f" Are these the tokens? {GATHER}",
    ),
    "sparse": (X, X.to_sparse(), "`log_q` must be dense."),
    "all classes": (
        *(torch.zeros(2, 3, 9),) * 2,
        "`log_p` must have the shape (samples, tokens), or (samples,): one number for each drawn token. Got (2, 3, 9)."
        f" With those of all classes, {GATHER}",
    ),
    "a number": (torch.zeros(()), torch.zeros(()), "`log_p` must have the shape (samples, tokens)"),
    "other tokens": (
        X,
        torch.zeros(2, 4),
        "`log_q` must have the shape of `log_p`. Got log_p (2, 3) and log_q (2, 4). Are both of the same tokens?",
    ),
    "two devices": (X, X.to("meta"), "`log_p` and `log_q` must share a device. Got log_p on cpu, log_q on meta."),
}


class TestErrors:
    @pytest.mark.parametrize("name", REFUSED)
    def test_inputs(self, name):
        log_p, log_q, text = REFUSED[name]
        metric = KLDivergenceEstimate()
        before = metric.totals
        with pytest.raises(
            TypeError if name in ("a list", "a distribution", "tokens", "sparse") else ValueError
        ) as error:
            metric.update(log_p, log_q)
        assert str(error.value).startswith(text)
        assert metric.totals is before
        assert not metric.update_called

    def test_weights(self):
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match=re.escape("Got weight (3,) for batch shape (2, 3)")):
            KLDivergenceEstimate().update(x, x, torch.ones(3))
        with pytest.raises(ValueError, match=r"`weight` must be finite and at least 0\. Got -1"):
            KLDivergenceEstimate().update(x, x, torch.tensor([1.0, -1.0]))

    def test_options(self):
        with pytest.raises(ValueError, match=r"`estimator` must be one of 'k1', 'k2', 'k3'. Got 'k4'."):
            KLDivergenceEstimate(estimator="k4")
        with pytest.raises(ValueError, match=r"`mean` must be one of 'token', 'sequence'. Got 'tokens'. Did you mean"):
            KLDivergenceEstimate(mean="tokens")
        with pytest.raises(ValueError, match="`nan_strategy` must be one of"):
            KLDivergenceEstimate(nan_strategy="warn")
        with pytest.raises(ValueError, match="`base` must be a finite number above 1"):
            KLDivergenceEstimate(base=1)


class TestAsAMetric:
    def test_by_name(self):
        log_p, log_q, mask = tokens()
        metric = KLDivergenceEstimate()
        batch = metric(log_p=log_p, log_q=log_q, weight=mask)
        metric.reset()
        metric.update(log_p=log_p, log_q=log_q, weight=mask)
        same(metric.compute(), batch)

    def test_several_estimators_share_their_totals(self):
        makes = {name: {"estimator": name} for name in ESTIMATORS}
        makes |= {f"sequence_{name}": {"estimator": name, "mean": "sequence"} for name in ESTIMATORS}
        collection = MetricCollection({name: KLDivergenceEstimate(**options) for name, options in makes.items()})
        batch = tokens()
        for part in zip(*(x.split(9) for x in batch), strict=True):
            collection.update(*part)
        values = collection.compute()
        assert len(collection.compute_groups) == 2, "one for each mean"
        for name, options in makes.items():
            metric = KLDivergenceEstimate(**options)
            metric.update(*batch)
            same({key: values[f"{name}_{key}"] for key in metric.compute()}, metric.compute())

    def test_merging(self):
        log_p, log_q, mask = tokens()
        whole, first, second = (KLDivergenceEstimate(estimator=name) for name in ("k1", "k1", "k3"))
        whole.update(log_p, log_q, mask)
        first.update(log_p[:11], log_q[:11], mask[:11])
        second.update(log_p[11:], log_q[11:], mask[11:])
        first.merge_state(second)
        same(first.compute(), whole.compute())
        other = KLDivergenceEstimate(mean="sequence")
        other.update(log_p, log_q, mask)
        for incoming in (other, KLDivergenceEstimate(nan_strategy="ignore"), KLDivergence()):
            with pytest.raises(ValueError, match="Only what was measured with the same options can be merged"):
                first.merge_state(incoming)

    def test_the_laws_of_the_totals(self):
        empty = drawn.empty(KLDivergenceEstimate().options, "token")
        parts = []
        for part in zip(*(x.split(9) for x in tokens()), strict=True):
            metric = KLDivergenceEstimate()
            metric.update(*part)
            parts.append(metric.totals)
        assert torch.equal(drawn.merge(torch.stack([empty, parts[0]])), parts[0])
        assert torch.equal(drawn.add(parts[0], empty), parts[0])
        whole = drawn.merge(torch.stack(parts))
        for order in ([4, 2, 0, 1, 3], [1, 0, 3, 4, 2]):
            assert torch.equal(drawn.merge(torch.stack([parts[i] for i in order])), whole)

    def test_one_value_of_it(self):
        batch = tokens()
        metric = KLDivergenceEstimate()
        metric.update(*batch)
        for name, value in metric.compute().items():
            one = pickle.loads(pickle.dumps(metric[name]))
            same(one.compute(), value)
        extremes = MinMaxMetric(KLDivergenceEstimate()["mean"])
        extremes.update(*batch)
        assert extremes.compute()["max"] == metric.compute()["mean"]
        with pytest.raises(ValueError, match=r"`name` must be one of 'mean', .* Got 'k1'"):
            metric["k1"]
        text = (
            "MinMaxMetric must have a metric that computes one number. Got KLDivergenceEstimate, which computes a dict."
        )
        with pytest.raises(TypeError, match=re.escape(text + " Take one of its values before: estimate['mean']")):
            MinMaxMetric(KLDivergenceEstimate())

    def test_repr(self):
        assert repr(KLDivergenceEstimate()) == "KLDivergenceEstimate()"
        shown = "KLDivergenceEstimate(estimator='k1', mean='sequence', base=2, nan_strategy='ignore')"
        options = {"estimator": "k1", "mean": "sequence", "base": 2, "nan_strategy": "ignore"}
        assert repr(KLDivergenceEstimate(**options)) == shown

    def test_plot(self):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("agg")
        metric = KLDivergenceEstimate()
        metric.update(*tokens())
        for drawn_of in (None, metric.compute(), [metric.compute()] * 3):
            figure, axis = metric.plot(drawn_of)
            labels = {text.get_text() for text in axis.get_legend().get_texts()}
            assert labels == {"mean", "low", "high"}
            matplotlib.pyplot.close(figure)
