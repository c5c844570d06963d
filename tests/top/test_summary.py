"""The summary: what each number is, against numpy and the textbook's formulas."""

import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributions as D
from cases import logits, pair
from kinds import same
from torchmetrics import BootStrapper, ClasswiseWrapper, MetricCollection, MetricTracker, MinMaxMetric
from torchmetrics.wrappers import MultioutputWrapper, Running

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence
from klmetric.arithmetic import native
from klmetric.options import Options
from klmetric.rows.rows import Rows
from klmetric.totals import histogram, picture, sketch

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}


def with_divergences(x):
    """Logits of two classes, of which each row has the divergence x."""
    x = torch.as_tensor(np.asarray(x, dtype=np.float64))
    zero = torch.zeros_like(x)
    other = torch.where(x > 30, x, x.clamp(max=30).expm1().log())  # KL((1, 0) || q) = log(1 + e^other)
    p = torch.stack([zero, zero - math.inf], -1)
    q = torch.stack([torch.where(x == math.inf, -math.inf, zero), torch.where(x == math.inf, 0, other)], -1)
    return p, q


def summary_of(x, weight=None, **options):
    metric = KLDivergenceSummary(input_format="logits", **options).set_dtype(torch.float64)
    metric.update(*with_divergences(x), weight)
    return metric


def of_divergences(x, **options):
    """The summary of rows of which nothing but the divergence is known, of any size."""
    metric = KLDivergenceSummary(**options).set_dtype(torch.float64)
    metric.add_rows(Rows(torch.from_numpy(np.asarray(x, dtype=np.float64)), None))
    return metric


NO_ERROR = "ignore:`stderr` is NaN:UserWarning"


def rows_of(metric):
    return {key: value.item() for key, value in metric.compute().items()}


def shape(name, n):
    rng = np.random.default_rng(n)
    return {
        "lognormal": lambda: rng.lognormal(-5, 2, n),
        "heavy-tailed": lambda: 1e-4 * (1 + rng.pareto(0.7, n)),
        "bimodal": lambda: np.where(rng.random(n) < 0.5, rng.normal(1e-3, 1e-5, n), rng.normal(10, 1, n)),
        "mostly zero": lambda: np.where(rng.random(n) < 0.93, 0, rng.exponential(0.1, n)),
        "constant": lambda: np.full(n, 0.3),
        "with infinities": lambda: np.where(rng.random(n) < 0.02, np.inf, rng.exponential(1, n)),
        "uniform": lambda: rng.random(n),
        "near-equal models": lambda: 10 ** rng.uniform(-12, -8, n),
        "far apart": lambda: 10 ** rng.uniform(0, 4, n),
        "two values": lambda: np.where(rng.random(n) < 0.5, 1e-6, 5.0),
    }[name]()


SHAPES = ["lognormal", "heavy-tailed", "bimodal", "mostly zero", "constant", "with infinities", "uniform"]
SHAPES += ["near-equal models", "far apart", "two values"]


def exact_quantile(x, q):
    """numpy's own; its interpolation makes NaN of infinities."""
    x = np.sort(x)
    place = q * (len(x) - 1)
    low, high = x[math.floor(place)], x[math.ceil(place)]
    return (
        low
        if low == high
        else np.quantile(x[np.isfinite(x)], q)
        if np.isfinite(x).all()
        else low + (place % 1) * (high - low)
    )


def divergences_of(metric):
    return sketch.histogram_of(metric.totals, histogram.fineness_for(metric.relative_accuracy))


# What real data can come to beyond the sizes of `shape`.
FAR_OUT = {
    "near-equal models in float64": lambda rng: 10 ** rng.uniform(-24, -12, 1000),
    "one small number": lambda rng: np.full(1000, 1.06e-14),
    "one large number": lambda rng: np.full(1000, 70916.0),
    "masks of one model only": lambda rng: np.where(rng.random(1000) < 0.9, 3e38, rng.exponential(1, 1000)),
    "masks of -1e9": lambda rng: 1e9 * rng.random(1000),
}


class TestQuantiles:
    @pytest.mark.parametrize(
        ("name", "n"),
        [
            *((name, n) for name in SHAPES for n in (10**3, 10**5)),
            pytest.param("lognormal", 10**6, marks=pytest.mark.slow),
        ],
    )
    def test_within_the_promised_accuracy_and_the_same_after_any_split(self, name, n):
        x = shape(name, n)
        p, q = with_divergences(x)
        parts = [KLDivergenceSummary(input_format="logits").set_dtype(torch.float64) for _ in range(3)]
        cuts = np.sort(np.random.default_rng(1).integers(0, n, 8)).tolist()
        for k, (start, end) in enumerate(zip([0, *cuts], [*cuts, n], strict=True)):
            parts[k % 3].update(p[start:end], q[start:end])
        merged = parts[2]
        merged.merge_state(parts[0])
        merged.merge_state(parts[1])
        whole = summary_of(x)
        same(merged.compute(), whole.compute())
        values = rows_of(whole)
        for key, share in QUANTILES.items():
            assert values[key] == pytest.approx(exact_quantile(x, share), rel=0.01, abs=0), key
        assert values["max"] == pytest.approx(x.max(), rel=1e-6)
        assert values["count"] == n
        assert values["infinite"] == np.isinf(x).sum()

    def test_another_accuracy(self):
        x = shape("lognormal", 1000)
        for accuracy in (0.1, 0.001):
            values = rows_of(summary_of(x, relative_accuracy=accuracy))
            for key, share in QUANTILES.items():
                assert values[key] == pytest.approx(np.quantile(x, share), rel=accuracy, abs=0)

    @pytest.mark.parametrize("name", FAR_OUT)
    def test_far_out_in_range(self, name):
        x = FAR_OUT[name](np.random.default_rng(0))
        values = rows_of(of_divergences(x))
        for key, share in QUANTILES.items():
            assert values[key] == pytest.approx(np.quantile(x, share), rel=0.01, abs=0), key

    @pytest.mark.filterwarnings(NO_ERROR)
    @pytest.mark.parametrize(("below", "above"), [(0.9, 0), (0, 0.9), (0.45, 0.45), (0.999, 0), (1, 0), (0, 1)])
    def test_out_of_range_it_is_never_the_edge(self, below, above):
        rng = np.random.default_rng(0)
        n, tiny, huge = 1000, 2.0**-81, 2.0**128
        parts = [10 ** rng.uniform(-320, -26, int(below * n)), 10 ** rng.uniform(39, 308, int(above * n))]
        x = np.concatenate([*parts, rng.exponential(1, n - sum(map(len, parts)))])
        values = rows_of(of_divergences(x, quantiles=(0, 0.1, 0.5, 0.9, 0.999, 1)))
        assert values["p0"] == x.min()
        assert values["p100"] == values["max"] == x.max()
        for key, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99_9", 0.999)):
            low, high = np.quantile(x, share, method="lower"), np.quantile(x, share, method="higher")
            for end in (tiny, huge):
                assert values[key] != pytest.approx(end, rel=0.01, abs=0)
            if tiny <= low and high < huge:
                assert values[key] == pytest.approx(np.quantile(x, share), rel=0.01, abs=0)
            elif high < tiny:  # evenly spread on a logarithmic axis, as these numbers are
                assert x.min() <= values[key] < tiny
                assert np.log10(values[key]) == pytest.approx(np.log10(low), abs=15)
            elif low >= huge:
                assert huge < values[key] <= x.max()
                assert np.log10(values[key]) == pytest.approx(np.log10(low), abs=20)

    @pytest.mark.filterwarnings(NO_ERROR)
    def test_out_of_range_the_same_bits_in_any_split_and_order(self):
        rng = np.random.default_rng(0)
        x = np.concatenate([10 ** rng.uniform(-320, 300, 500), [0, 0, np.inf, 5e-324, 1.7e308]])
        whole = of_divergences(x).compute()
        for parts in (1, 2, 7):
            metrics = [of_divergences(part) for part in np.array_split(rng.permutation(x), parts)]
            for other in metrics[1:]:
                metrics[0].merge_state(other)
            same({**metrics[0].compute(), "stderr": 0}, {**whole, "stderr": 0})

    @pytest.mark.parametrize("size", [3484, 0, 8178])
    def test_totals_of_another_version_are_refused(self, size):
        metric = summary_of([0.1, 0.2])
        before = metric.totals
        text = rf"Totals are 8179 numbers. Got shape \({size},\) for .* Are they of another version, or metric\?"
        with pytest.raises(RuntimeError, match=text):
            metric.load_state_dict({"totals": torch.zeros(size, dtype=torch.float64)})
        with pytest.raises(ValueError, match=text):
            metric.merge_state({"totals": torch.zeros(size, dtype=torch.float64)})
        assert metric.totals is before

    def test_names(self):
        names = {0.5: "p50", 0.999: "p99_9", 0.9999: "p99_99", 0.07: "p7", 0.005: "p0_5", 0: "p0", 1.0: "p100"}
        names |= {1e-7: "p0_00001", 0.3333: "p33_33"}
        metric = KLDivergenceSummary(quantiles=list(names))
        metric.update(*pair(4, 5))
        assert [key for key in metric.compute() if key.startswith("p")] == list(names.values())

    def test_rows_of_weight_0_do_not_count_and_others_count_once(self):
        x = shape("lognormal", 1000)
        weight = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul(3).floor().div(2)
        values = rows_of(summary_of(x, weight))
        counted = x[weight.numpy() > 0]
        for key, share in QUANTILES.items():
            assert values[key] == pytest.approx(np.quantile(counted, share), rel=0.01, abs=0)
        assert values["count"] == len(counted)
        assert values["mean"] == pytest.approx(np.average(x, weights=weight))


class TestMean:
    @pytest.mark.parametrize("options", [{}, {"base": 2}, {"direction": "jeffreys"}, {"eps": 1e-3}], ids=str)
    def test_is_that_of_the_metric(self, options):
        p, q = pair(50, 3, 5)
        weight = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
        metric, summary = KLDivergence(**options), KLDivergenceSummary(**options)
        for one in (metric, summary):
            one.update(p, q, weight)
        values = summary.compute()
        same(values["mean"], metric.compute())
        rows = kl_divergence(p, q, reduction="none", **options)
        torch.testing.assert_close(values["max"], rows.max(), rtol=2e-7, atol=0)  # rounded once, not twice
        assert values["p50"] == pytest.approx(rows.median().item(), rel=0.01)


def ratio_error(x, weight):
    """The standard error of a ratio of two totals over samples, straight from the formula."""
    s, n = (x * weight).sum(1), weight.sum(1)
    s, n = s[n > 0], n[n > 0]
    g = len(s)
    return np.sqrt(g / (g - 1) * np.sum((s - s.sum() / n.sum() * n) ** 2)) / n.sum()


class TestStandardError:
    def test_of_one_row_per_sample_it_is_the_usual_formula(self):
        x = shape("lognormal", 1000)
        expected = x.std(ddof=1) / np.sqrt(1000)
        assert rows_of(summary_of(x))["stderr"] == pytest.approx(expected, rel=1e-6)
        near = 1 + 1e-9 * np.random.default_rng(0).random(1000)  # where a sum of squares has no digits left
        divergences = kl_divergence(*with_divergences(near), input_format="logits", reduction="none")
        expected = divergences.std().item() / np.sqrt(1000)
        assert rows_of(summary_of(near))["stderr"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("weighted", ["no", "mask", "weights"])
    def test_of_samples(self, weighted):
        rng = np.random.default_rng(0)
        x = rng.lognormal(size=(200, 1)) * rng.lognormal(size=(200, 20))
        weight = {"no": np.ones_like(x), "mask": rng.random(x.shape) < 0.7, "weights": rng.random(x.shape)}[weighted]
        weight[5] = 0
        given = None if weighted == "no" else torch.from_numpy(weight)
        if given is None:
            x, weight = np.delete(x, 5, 0), np.delete(weight, 5, 0)
        assert rows_of(summary_of(x, given))["stderr"] == pytest.approx(ratio_error(x, weight), rel=1e-6)

    @pytest.mark.parametrize("size", [1, 3, 1000])
    def test_of_equal_rows_it_is_0(self, size):
        assert rows_of(summary_of(np.full((7, size), 0.1)))["stderr"] == 0

    def test_where_there_is_none(self):
        for x in ([], [0.1, math.inf]):
            assert math.isnan(rows_of(summary_of(x))["stderr"])

    @pytest.mark.parametrize(
        ("x", "weight"), [([0.1], None), ([[0.1, 0.2, 0.3]], None), ([0.1, 0.2], [1, 0]), ([[0.1], [0.2]], [0, 1])]
    )
    def test_of_fewer_than_two_samples_it_says_why_there_is_none(self, x, weight):
        metric = summary_of(x, None if weight is None else torch.tensor(weight))
        text = (
            "`stderr` is NaN: a standard error needs at least two samples (the first axis) of weight above 0. Got one,"
            " whose rows are not taken for independent. Where each row is a sample of its own, the shape is (rows,"
            " classes)."
        )
        with pytest.warns(UserWarning, match=f"^{re.escape(text)}$") as said:
            assert math.isnan(rows_of(metric)["stderr"])
        assert [warning.filename for warning in said] == [__file__]
        metric.compute()  # again without a word
        metric.update(*with_divergences(np.empty((0, 3))))
        with pytest.warns(UserWarning, match="`stderr` is NaN"):
            metric.compute()
        metric.update(*with_divergences([0.4]))
        assert rows_of(metric)["stderr"] >= 0

    def test_in_forward_it_is_not_explained_for_every_batch(self):
        metric = KLDivergenceSummary(input_format="logits")
        for _ in range(3):
            assert metric(*with_divergences([[0.1, 0.2]]))["stderr"].isnan()

    def test_of_invalid_rows_only_these_are_spoken_of(self):
        metric = KLDivergenceSummary()
        metric.update(torch.tensor([[[math.nan, 1.0], [0.5, 0.5]]]), torch.full((1, 2, 2), 0.5))
        with pytest.warns(UserWarning, match="1 of 2 rows") as said:
            metric.compute()
        assert len(said) == 1

    @pytest.mark.slow
    def test_the_interval_covers_the_truth(self):
        generator = torch.Generator().manual_seed(0)
        samples, tokens, trials, truth = 100, 10, 1500, 1.0
        covered = covered_if_independent = 0
        for _ in range(trials):
            of_sample = torch.rand(samples, 1, generator=generator, dtype=torch.float64) - 0.5
            of_token = torch.rand(samples, tokens, generator=generator, dtype=torch.float64) - 0.5
            x = truth + of_sample + of_token
            mask = torch.rand(samples, tokens, generator=generator) < torch.rand(samples, 1, generator=generator)
            numbers = sketch.of_rows(Rows(x, mask), 1, 0).tolist()
            mean = numbers[0] / numbers[1]
            rows = x[mask]
            covered += abs(mean - truth) <= 1.96 * sketch.standard_error(numbers)
            covered_if_independent += abs(mean - truth) <= 1.96 * rows.std().item() / len(rows) ** 0.5
        assert 0.93 <= covered / trials <= 0.97
        assert covered_if_independent / trials < 0.7

    @pytest.mark.parametrize("size", [1e-150, 1e-158, 1e-200, 1e150, 1e160])
    def test_at_the_ends_of_float64(self, size):
        x = np.array([0.1, 0.2, 0.4])
        right = x.std(ddof=1) / np.sqrt(3)
        for metric, scale in (
            (summary_of(x, torch.full((3,), size, dtype=torch.float64)), 1),
            (summary_of(x * size), size),
        ):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                error = rows_of(metric)["stderr"]
            if math.isnan(error):
                assert ["squares of divergences or weights" in str(warning.message) for warning in said] == [True]
            else:
                assert error == pytest.approx(right * scale, rel=1e-9)


class TestAgreement:
    def test_share_of_rows_with_the_same_most_likely_class(self):
        p = logits(300, 70).round(decimals=1)
        q = (p + logits(300, 70, seed=1)).round(decimals=1)  # many ties
        expected = (p.argmax(-1) == q.argmax(-1)).double().mean()
        for a, b in ((p, q), (p.double(), q.double()), (p.bfloat16(), q.bfloat16())):
            metric = KLDivergenceSummary(input_format="logits").set_dtype(torch.float64)
            metric.update(a, b)
            assert metric.compute()["agreement"] == expected

    def test_of_equal_classes_the_first(self):
        p = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.3, 0.3, 0.4]])
        q = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.4, 0.5], [0.1, 0.1, 0.8]])
        for classes in (3, 90):  # wide rows are looked at otherwise
            metric = KLDivergenceSummary()
            metric.update(*(torch.nn.functional.pad(x, (0, classes - 3)) for x in (p, q)))
            assert metric.compute()["agreement"] == torch.tensor(2 / 3)

    def test_of_a_view_that_numpy_does_not_know(self):
        p = torch.randn(4, 70, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)).conj().imag
        metric = KLDivergenceSummary(input_format="logits")
        metric.update(p, p)
        assert metric.compute()["agreement"] == 1

    def test_only_rows_that_count(self):
        p, q = pair(6, 5)
        q[:3] = p[:3]
        q[3:] = p[3:].roll(1, -1)
        p[1] = math.nan
        metric = KLDivergenceSummary(nan_strategy="ignore")
        metric.update(p, q, torch.tensor([1, 1, 0, 1, 0, 0]))
        with pytest.warns(UserWarning, match="1 of 3 rows were no distributions"):
            assert metric.compute()["agreement"] == 0.5

    def test_classes_on_another_axis_and_gradients(self):
        p, q = pair(4, 6, 5)
        a, b = KLDivergenceSummary(), KLDivergenceSummary(dim=1)
        a.update(p, q)
        b.update(p.movedim(-1, 1).requires_grad_(), q.movedim(-1, 1))
        same(a.compute(), b.compute())

    def test_of_distributions(self):
        p, q = pair(40, 5)
        a, b = KLDivergenceSummary(), KLDivergenceSummary()
        a.update(p, q)
        b.update(D.Categorical(probs=p), D.Categorical(probs=q))
        same(a.compute(), b.compute())
        b.update(D.Normal(torch.zeros(3), torch.ones(3)), D.Normal(torch.ones(3), torch.ones(3)))
        values = b.compute()
        assert values["agreement"].isnan()
        assert values["count"] == 43


class TestTop:
    def test_the_worst_rows_and_where_they_are(self):
        x = np.array([[1, 5, 0], [7, 2, 2], [5, 0, 0], [3, 9, 4]], dtype=float)
        metric = KLDivergenceSummary(input_format="logits", top=5)
        weight = torch.ones(4, 3)
        weight[1, 0] = 0
        for k in range(0, 4, 2):
            p, q = with_divergences(x[k : k + 2])
            metric.update(p, q, weight[k : k + 2])
        values = rows_of(metric)
        expected = [(9, 3, 1), (5, 0, 1), (5, 2, 0), (4, 3, 2), (3, 3, 0)]
        for k, (value, sample, position) in enumerate(expected, 1):
            assert values[f"top{k}"] == pytest.approx(value)
            assert (values[f"top{k}_sample"], values[f"top{k}_position"]) == (sample, position)

    def test_fewer_rows(self):
        with pytest.warns(UserWarning, match="`stderr` is NaN"):
            values = rows_of(summary_of([0.5], top=2))
        assert values["top1"] == pytest.approx(0.5)
        assert (values["top1_sample"], values["top1_position"]) == (0, 0)
        assert math.isnan(values["top2"])
        assert (values["top2_sample"], values["top2_position"]) == (-1, -1)

    def test_samples_are_numbered_with_those_that_do_not_count(self):
        metric = KLDivergenceSummary(input_format="logits", top=1, nan_strategy="ignore")
        p, q = with_divergences([0.1, 0.2, 0.3, 9.0])
        metric.update(p[:2], q[:2], torch.zeros(2))
        metric.update(p[:0], q[:0])
        metric.update(p[2:3].fill_(math.nan), q[2:3])
        metric.update(p[3:], q[3:])
        metric.update(p[3:], q[3:])
        with pytest.warns(UserWarning, match="1 of 3 rows"):
            assert metric.compute()["top1_sample"] == 3


class TestInvalidAndInfinite:
    def test_an_infinite_row(self):
        values = rows_of(summary_of([0.1, math.inf, 0.3]))
        assert (values["mean"], values["max"], values["infinite"], values["count"]) == (math.inf, math.inf, 1, 3)
        assert values["p50"] == pytest.approx(0.3, rel=0.01)

    def test_counts(self):
        p, q = pair(5, 4)
        p[0] = -1
        q[1] = math.nan
        metric = KLDivergenceSummary(nan_strategy="ignore")
        metric.update(p, q, torch.tensor([1, 0, 1, 1, 1]))
        with pytest.warns(UserWarning, match="1 of 4 rows were no distributions"):
            values = rows_of(metric)
        assert (values["count"], values["invalid"], values["infinite"]) == (3, 1, 0)


class TestState:
    def test_memory(self):
        metric = KLDivergenceSummary()
        before = metric.totals.numel()
        assert 8 * before <= 2**16
        for _ in range(3):
            metric.update(*pair(1000, 3))
        assert metric.totals.numel() == before
        assert list(metric.metric_state) == ["totals"]

    def test_an_update_copies_nothing_to_the_host(self):
        # A tensor without data cannot be looked at.
        metric = KLDivergenceSummary(top=3).to("meta")
        p = torch.rand(6, 4, 5, device="meta")
        metric.update(p, p)
        metric.update(p, p, torch.ones(6, 4, dtype=torch.bool, device="meta"))
        assert metric.totals.is_meta
        with pytest.raises((RuntimeError, NotImplementedError)):
            metric.totals.sum().item()

    def test_in_the_operations_of_a_device(self, monkeypatch):
        """The same sums where nothing may be looked at: those of `add` by TwoSum."""
        monkeypatch.setattr(native, "serves", lambda a, b: False)
        x = torch.rand(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
        agrees = x > 2
        batches = [sketch.of_rows(Rows(a, None, b), 6, 2) for a, b in zip(x.split(70), agrees.split(70), strict=True)]
        whole = sketch.empty(Options(), 6, 2)
        whole[10:12] = 0
        for one in batches:
            whole = sketch._together(
                torch.stack([whole, one]), 2, lambda ab: _add_on_a_device(*ab), lambda ab: sketch.pairs.add(*ab)
            )
        assert torch.equal(whole, sketch.merge(torch.stack(batches), 2))
        assert torch.equal(whole[:5], sketch.of_rows(Rows(x, None, agrees), 6, 2)[:5])

    def test_merge_is_associative(self):
        parts = [sketch.of_rows(Rows(torch.rand(9, 2).double(), None, None), 6, 3) for _ in range(4)]
        a, b, c, d = parts

        def merge(*xs):
            return sketch.merge(torch.stack(xs), 3)

        whole = merge(a, b, c, d)
        for other in (merge(merge(a, b), merge(c, d)), merge(a, merge(b, merge(c, d)))):
            torch.testing.assert_close(other, whole, rtol=1e-15, atol=1e-30)


def _add_on_a_device(a, b):
    sums = sketch.pairs.add(a[:10], b[:10])
    return torch.cat([sums, torch.maximum(a[10:12], b[10:12])])


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            (
                {"quantiles": (0.5, 99)},
                ValueError,
                r"`quantiles` must be numbers from 0 to 1. Got 99. Write 0.99 for 99 %",
            ),
            ({"quantiles": (-0.1,)}, ValueError, r"`quantiles` must be numbers from 0 to 1. Got -0.1"),
            ({"quantiles": (True,)}, ValueError, r"`quantiles` must be numbers from 0 to 1. Got True"),
            ({"quantiles": 0.5}, TypeError, r"`quantiles` must be a sequence of numbers. Got 0.5. Write \(0.5, 0.99\)"),
            ({"quantiles": (0.5, 0.5)}, ValueError, "`quantiles` must differ"),
            ({"relative_accuracy": 0}, ValueError, "`relative_accuracy` must be a share of a quantile, from 0.0001"),
            ({"relative_accuracy": 1}, ValueError, "Got 1. Use 0.01 for 1 %"),
            ({"top": -1}, ValueError, "`top` must be a number of rows, at least 0. Got -1"),
            ({"top": 1.5}, ValueError, "`top` must be a number of rows"),
            ({"base": 1}, ValueError, "`base` must be a finite number above 1"),
            ({"direction": "both"}, ValueError, "`direction` must be one of"),
        ],
    )
    def test_bad_ones(self, options, error, match):
        with pytest.raises(error, match=match):
            KLDivergenceSummary(**options)

    def test_the_result_is_the_callers(self):
        metric = summary_of([0.1, 0.2])
        metric.compute().pop("mean")
        assert "mean" in metric.compute()

    def test_no_quantiles(self):
        metric = KLDivergenceSummary(quantiles=())
        metric.update(*pair(4, 5))
        assert list(metric.compute()) == ["mean", "stderr", "max", "agreement", "count", "infinite", "invalid"]

    def test_repr(self):
        assert repr(KLDivergenceSummary()) == "KLDivergenceSummary()"
        assert repr(KLDivergenceSummary(top=2, base=2)) == "KLDivergenceSummary(top=2, base=2)"

    def test_before_any_update(self):
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            values = {key: value.item() for key, value in KLDivergenceSummary().compute().items()}
        counts = {key: values.pop(key) for key in ("count", "infinite", "invalid")}
        assert set(counts.values()) == {0}
        assert all(map(math.isnan, values.values()))


def test_in_a_collection():
    collection = MetricCollection({"kl": KLDivergence(), "summary": KLDivergenceSummary()}, prefix="val_")
    p, q = pair(20, 5)
    for a, b in zip(p.split(7), q.split(7), strict=True):
        collection.update(a, b)
    values = collection.compute()
    assert values["val_mean"] == values["val_kl"]
    assert values["val_count"] == 20
    two = MetricCollection({"a": KLDivergenceSummary(), "b": KLDivergenceSummary(direction="reverse")})
    two.update(p, q)
    assert two.compute()["a_mean"] == kl_divergence(p, q)
    assert two.compute()["b_p99"] != two.compute()["a_p99"]


REFUSED = {
    "MinMaxMetric": MinMaxMetric,
    "BootStrapper": lambda m: BootStrapper(m, num_bootstraps=2),
    "ClasswiseWrapper": ClasswiseWrapper,
    "MultioutputWrapper": lambda m: MultioutputWrapper(m, 2),
}
ARITHMETIC = {
    "a + b": lambda m: m + KLDivergenceSummary(),
    "kl + a": lambda m: KLDivergence() + m,
    "a * 2": lambda m: m * 2,
    "2 / a": lambda m: 2 / m,
    "tensor - a": lambda m: torch.tensor(1.0) - m,
    "abs": abs,
    "neg": lambda m: -m,
    "a < 1": lambda m: m < 1,
    "of a window": lambda m: Running(m, 2) + 1,
}


class TestOneValueOfIt:
    """A dict goes where a dict can; a value of it is a metric; and what wants one number says so when it is made."""

    @pytest.mark.parametrize("name", [*REFUSED, *ARITHMETIC])
    def test_what_wants_a_number_refuses_it_when_made(self, name):
        what, make = (name, REFUSED[name]) if name in REFUSED else ("Arithmetic", ARITHMETIC[name])
        text = (
            f"{what} must have a metric that computes one number. Got KLDivergenceSummary, which computes a dict. Take"
            " one of its values before: summary['mean'], summary['p99']."
        )
        with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
            make(KLDivergenceSummary())

    @pytest.mark.parametrize("name", REFUSED)
    def test_others_are_not_meddled_with(self, name):
        class Worst(KLDivergenceSummary):
            def compute(self):
                return super().compute()["max"]

        for metric in (KLDivergence(), Worst(), KLDivergenceSummary()["mean"]):
            REFUSED[name](metric)

    def test_a_list_can_be_searched(self):
        assert KLDivergenceSummary() in [KLDivergenceSummary(), KLDivergence()]

    def test_a_value_of_it_is_a_metric(self):
        p, q = pair(40, 5)
        summary = KLDivergenceSummary(top=1)
        summary.update(p, q)
        values = summary.compute()
        for key, value in values.items():
            one = KLDivergenceSummary(top=1)[key]
            for a, b in zip(p.split(7), q.split(7), strict=True):
                one.update(a, b)
            same(one.compute(), value)
            same(pickle.loads(pickle.dumps(one)).compute(), value)
            one.reset()
            one.update(p, q)
            same(one.compute(), value)
        assert "p99" in repr(summary["p99"])

    def test_in_arithmetic_no_row_counts_twice(self):
        p, q = pair(40, 5)
        summary = KLDivergenceSummary()
        ratio, counts = summary["p99"] / summary["p50"], summary["count"] + summary["count"]
        for one in (ratio, counts, summary):
            one.update(p, q)
        values = summary.compute()
        assert ratio.compute() == values["p99"] / values["p50"]
        assert counts.compute() == 80
        assert values["count"] == 40

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match=r"`name` must be one of 'mean', .*. Got 'p99.9'. Did you mean 'p99_9'\?"):
            KLDivergenceSummary()["p99.9"]

    def test_within_wrappers(self):
        p, q = pair(40, 5)
        tracker = MetricTracker(KLDivergenceSummary(), maximize=False)
        best = MetricTracker(KLDivergenceSummary()["mean"], maximize=False)
        extremes = MinMaxMetric(KLDivergenceSummary()["p99"])
        shares = BootStrapper(KLDivergenceSummary()["mean"], num_bootstraps=3)
        window = Running(KLDivergenceSummary(), 1)
        for a, b in ((p, q), (p, p)):
            for one in (tracker, best):
                one.increment()
            for one in (tracker, best, extremes, shares, window):
                one.update(a, b)
            extremes.compute()
        summary = KLDivergenceSummary()
        summary.update(p, q)
        values = summary.compute()
        assert tracker.compute_all()["p99"].tolist() == [values["p99"], 0]
        assert best.best_metric(return_step=True) == (0, 1)
        assert extremes.compute()["max"] == values["p99"]
        assert 0 < shares.compute()["mean"] < values["max"]
        assert window.compute()["max"] == 0


class TestPicture:
    def figure(self, metric, *args, **kwargs):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("agg")
        figure, axis = metric.plot(*args, **kwargs)
        labels = [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
        matplotlib.pyplot.close(figure)
        return axis, labels

    def test_of_a_distribution(self):
        axis, labels = self.figure(summary_of(shape("lognormal", 1000)))
        assert axis.get_xscale() == "log"
        assert axis.get_xlabel() == "KL divergence of a row (nats)"
        assert [label.split(" = ")[0] for label in labels] == ["mean", "p50", "p90", "p95", "p99", "p99.9"]
        marked = [line.get_xdata()[0] for line in axis.lines]
        assert marked[1:] == sorted(marked[1:])
        assert marked[0] == pytest.approx(shape("lognormal", 1000).mean())

    def test_zeros_and_infinities_stand_beside(self):
        _, labels = self.figure(summary_of([0.0, 0.0, 1.0, math.inf], base=2))
        assert labels[-2:] == ["50 % are 0", "25 % are infinite"]
        _, labels = self.figure(summary_of([0.0, 0.0]))
        assert labels[-1] == "100 % are 0"

    @pytest.mark.parametrize("name", SHAPES)
    def test_every_row_is_in_a_bar(self, name):
        x = shape(name, 1000)
        edges, numbers = picture.bars(divergences_of(summary_of(x)))
        assert len(numbers) <= picture.BARS
        assert numbers.sum() == ((x > 0) & np.isfinite(x)).sum()
        assert edges[0] <= x[x > 0].min() * 1.01
        assert edges[-1] >= x[np.isfinite(x)].max() * 0.99

    @pytest.mark.filterwarnings(NO_ERROR)
    @pytest.mark.parametrize(
        "x",
        [[1e-300] * 9 + [1.0], [1e-30] * 9, [1.0] + [1e300] * 9, [2.0**128], [5e-324, 1, 1.7e308], [1e-26, 1e39]],
    )
    def test_what_is_out_of_range_is_drawn_where_it_is(self, x):
        metric = of_divergences(np.array([*x, *x]))
        edges, numbers = picture.bars(divergences_of(metric))
        assert numbers.sum() == 2 * len(x)
        assert (edges.diff() > 0).all()
        assert edges[0] <= min(x)
        assert edges[-1] >= max(x)
        for number in {*x}:
            place = int(torch.searchsorted(edges, torch.tensor(number, dtype=torch.float64), right=True)) - 1
            assert numbers[min(place, len(numbers) - 1)] >= 2 * x.count(number)
        axis, _ = self.figure(metric)
        assert axis.get_xscale() == "log"
        heights = axis.patches[0].get_data().values
        assert np.isfinite(heights).all()
        assert heights.min() >= 0

    def test_on_an_axis_of_the_users_and_over_steps(self):
        matplotlib = pytest.importorskip("matplotlib")
        own = matplotlib.pyplot.subplots()[1]
        metric = summary_of(shape("uniform", 100))
        assert self.figure(metric, ax=own)[0] is own
        axis, _ = self.figure(metric, [metric.compute()] * 3)
        assert len(axis.lines) >= len(metric.compute())

    def test_of_nothing(self):
        with pytest.raises(RuntimeError, match=r"There must be a row to draw. Got none that counts"):
            KLDivergenceSummary().plot()
