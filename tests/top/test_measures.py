"""What a summary measures besides, against plain float64 numpy, and the same however the data are dealt out."""

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributions as D
from cases import FORMATS, logits, pair
from fake_device import Device
from kinds import same
from language import normalised, of_classes, of_targets
from processes import Processes

from klmetric import KLDivergenceSummary, kl_divergence
from klmetric.arithmetic import choose, native
from klmetric.totals import moments

SAMPLES, PLACES, CLASSES = 40, 6, 30
P = 2 * logits(SAMPLES, PLACES, CLASSES)
NOISE = logits(SAMPLES, PLACES, CLASSES, seed=1)
TARGETS = torch.randint(CLASSES, (SAMPLES, PLACES), generator=torch.Generator().manual_seed(0))
TARGETS[:3], TARGETS[5:9, 4:] = -100, -100
WEIGHT = torch.rand(SAMPLES, PLACES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALL = {"measures": True, "perplexity": True}
OF_CLASSES = ("reverse", "jensen_shannon", "total_variation", "agreement_1", "agreement_5", "agreement_10")


@pytest.fixture(params=["kernel", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *_: False)
        monkeypatch.setattr(choose, "_serves", lambda *_: False)
    elif native.level() is None:
        pytest.skip("there is no kernel here")


def computed(*inputs, targets=None, **options):
    metric = KLDivergenceSummary(**options).set_dtype(torch.float64)
    metric.update(*inputs, targets=targets)
    return {name: value.item() for name, value in metric.compute().items()}


def check(found, p, q, weight, targets, unit=1.0):
    """Hold values to those of normalised log-probabilities."""
    at = [np.take_along_axis(x, np.maximum(targets, 0)[..., None], -1)[..., 0] for x in (p, q)]
    of_all = of_targets(*at, weight)
    expected = of_classes(p, q, weight)
    expected |= {f"perplexity_{name}": value for name, value in of_all["perplexity"].items()}
    expected |= {f"delta_p_{name}": of_all["delta_p"][name] for name in ("mean", "rms")}
    for name, value in expected.items():
        scale = unit if name in ("reverse", "jensen_shannon") else 1
        assert found[name] == pytest.approx(value.value / scale, rel=1e-6, abs=1e-9), name
        assert found[f"{name}_stderr"] == pytest.approx(value.stderr / scale, rel=1e-6, abs=1e-12), name
    assert len(found) == 12 + 2 * len(expected)


@pytest.mark.parametrize("weight", [None, WEIGHT, WEIGHT > 0.4])
@pytest.mark.parametrize("distance", [1e-3, 0.3, 3.0])
def test_against_numpy(way, distance, weight):
    q = P + distance * NOISE
    found = computed(P, q, weight, targets=TARGETS, input_format="logits", base=2, **ALL)
    left = (TARGETS != -100).double() * (1 if weight is None else weight)
    rows = [normalised(x.numpy().astype(np.float64)) for x in (P, q)]
    check(found, *rows, left.numpy(), TARGETS.numpy(), unit=math.log(2))


@pytest.mark.parametrize("p_format", FORMATS)
@pytest.mark.parametrize("q_format", FORMATS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_formats_and_temperatures(way, p_format, q_format, temperature):
    p, q = (
        pair(SAMPLES, PLACES, CLASSES, input_format=form, dtype=torch.float64)[k]
        for k, form in enumerate((p_format, q_format))
    )
    options = {"input_format": (p_format, q_format), "temperature": temperature, **ALL}
    found = computed(p, q, targets=TARGETS, **options)
    logs = [(x.log() if form == "probs" else x) / temperature for x, form in ((p, p_format), (q, q_format))]
    check(found, *(normalised(x.numpy()) for x in logs), (TARGETS != -100).double().numpy(), TARGETS.numpy())


def test_with_fewer_classes_on_another_axis_and_of_distributions():
    q = P + NOISE
    expected = computed(P, q, targets=TARGETS, input_format="logits", **ALL)
    moved = [torch.cat([x, x], -1).movedim(-1, 1) for x in (P, q)]
    assert computed(*moved, targets=TARGETS, input_format="logits", dim=1, classes=CLASSES, **ALL) == expected
    made = computed(*(D.Categorical(logits=x) for x in (P, q)), targets=TARGETS, **ALL)
    assert made == pytest.approx(expected, rel=1e-4)  # torch has normalised its logits in float32


def test_they_are_those_of_the_function_and_the_command_asks_for():
    p, q = pair(20, 30, input_format="logits")
    found = computed(p, q, input_format="logits", measures=True)
    for name in ("reverse", "jensen_shannon"):
        assert found[name] == pytest.approx(kl_divergence(p, q, input_format="logits", direction=name).item(), rel=1e-6)
    assert found["agreement_1"] == found["agreement"]
    usual = computed(p, q, input_format="logits")
    assert {name: found[name] for name in usual} == usual
    assert list(found) == [*usual, *(name + end for name in OF_CLASSES for end in ("", "_stderr"))]


def test_nothing_of_it_costs_those_who_do_not_ask():
    assert KLDivergenceSummary().totals.shape == KLDivergenceSummary(ignore_index=1).totals.shape
    more = KLDivergenceSummary(**ALL).totals.numel() - KLDivergenceSummary().totals.numel()
    assert more == moments.empty(13).numel() < 250


class TestAccumulating:
    def filled(self, rows=slice(None), size=7, **options):
        metric = KLDivergenceSummary(input_format="logits", top=2, **ALL, **options)
        for p, q, w, t in zip(*(x[rows].split(size) for x in (P, P + NOISE, WEIGHT, TARGETS)), strict=True):
            metric.update(p, q, w, t)
        return metric

    def test_any_batches(self):
        whole = self.filled(size=SAMPLES).compute()
        for size in (1, 7, 16):
            same(self.filled(size=size).compute(), whole)

    def test_merged(self):
        first, second = self.filled(slice(0, 9)), self.filled(slice(9, None))
        first.merge_state(second)
        same(first.compute(), self.filled().compute())
        with pytest.raises(ValueError, match=r"Only what was measured with the same options can be merged"):
            first.merge_state(KLDivergenceSummary(input_format="logits", top=2, measures=True))

    def test_a_state_dict(self):
        metric, other = self.filled(), self.filled(slice(0, 2))
        metric.persistent(True)
        other.load_state_dict(metric.state_dict())
        same(other.compute(), metric.compute())
        same(copy.deepcopy(metric).compute(), metric.compute())

    def test_forward_is_of_the_batch(self):
        metric = self.filled()
        value = metric(P[:20], P[:20] + NOISE[:20], WEIGHT[:20], TARGETS[:20])
        same(value, self.filled(slice(0, 20)).compute())

    def test_in_processes(self, processes: Processes):
        expected = self.filled().compute()
        for value in processes(computed_in_processes):
            same(
                {k: x for k, x in value.items() if "_sample" not in k},
                {k: x for k, x in expected.items() if "_sample" not in k},
            )

    def test_one_value_alone(self):
        metric = KLDivergenceSummary(input_format="logits", perplexity=True)["perplexity_ratio"]
        metric.update(P, P + NOISE, targets=TARGETS)
        whole = KLDivergenceSummary(input_format="logits", perplexity=True)
        whole.update(P, P + NOISE, targets=TARGETS)
        assert metric.compute() == whole.compute()["perplexity_ratio"]


def computed_in_processes(rank, size):
    rows = slice(0, 31) if rank == 0 else slice(31, None) if rank == 1 else slice(0, 0)
    metric = TestAccumulating().filled(rows)
    if not metric.update_called:
        metric._update_count = 1  # or torchmetrics warns of what is tested here
    return metric.compute()


class TestConventions:
    def test_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = KLDivergenceSummary(**ALL).compute()
        assert all(x.isnan() for name, x in values.items() if name not in ("count", "infinite", "invalid"))
        found = computed(P[:0], P[:0], targets=TARGETS[:0], input_format="logits", **ALL)
        assert math.isnan(found["reverse"])
        assert found["count"] == 0

    def test_rows_that_are_no_distributions(self):
        q = P + NOISE
        bad = q.clone()
        bad[12, 3, 2] = math.nan
        options = {"input_format": "logits", **ALL}
        with pytest.warns(UserWarning, match="1 of 214 rows were no distributions and make the result NaN"):
            found = computed(P, bad, targets=TARGETS, **options)
        assert all(math.isnan(found[name]) for name in ("reverse", "reverse_stderr", "perplexity_model"))
        with pytest.warns(UserWarning, match="1 of 214 rows were no distributions and were left out"):
            found = computed(P, bad, targets=TARGETS, nan_strategy="ignore", **options)
        weight = torch.ones(SAMPLES, PLACES)
        weight[12, 3] = 0
        expected = computed(P, q, weight, targets=TARGETS, **options)
        assert {**found, "invalid": 0} == expected

    def test_zeros(self):
        p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]).double()
        q = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.2, 0.6]]).double()
        found = computed(p, q, targets=torch.tensor([1, 2]), **ALL)
        assert (found["mean"], found["infinite"]) == (math.inf, 1)
        assert found["reverse"] == pytest.approx(math.log(2) / 2)
        assert (found["perplexity_model"], found["perplexity_ratio"]) == (math.inf, math.inf)
        assert found["perplexity_reference"] == pytest.approx((0.5 * 0.6) ** -0.5)
        assert found["delta_p_mean"] == pytest.approx(-0.25)

    def test_one_row_without_a_batch(self):
        with pytest.warns(UserWarning, match="`stderr` is NaN"):
            found = computed(P[0, 0], NOISE[0, 0], targets=torch.tensor(3), input_format="logits", **ALL)
        assert found["perplexity_reference"] == pytest.approx(1 / P[0, 0].double().softmax(-1)[3].item(), rel=1e-6)
        assert math.isnan(found["reverse_stderr"])

    def test_inputs_with_gradients(self):
        p, q = (x.clone().requires_grad_() for x in (P, P + NOISE))
        assert computed(p, q, targets=TARGETS, input_format="logits", **ALL) == computed(
            P, P + NOISE, targets=TARGETS, input_format="logits", **ALL
        )


class TestErrors:
    @pytest.mark.parametrize("name", ALL)
    def test_options(self, name):
        with pytest.raises(TypeError, match=rf"`{name}` must be a bool\. Got 1\."):
            KLDivergenceSummary(**{name: 1})
        with pytest.raises(
            ValueError, match=rf"`eps` must be 0 with {name}=True, which is of q as it is\. Got 0\.01\."
        ):
            KLDivergenceSummary(**{name: True}, eps=0.01)

    def test_without_targets(self):
        metric = KLDivergenceSummary(input_format="logits", perplexity=True)
        message = "`targets` must come with every batch, for the perplexity. Got none. Give update(p, q, targets=...)"
        with pytest.raises(ValueError, match=re.escape(message)):
            metric.update(P, P)
        assert metric.update_count == 0

    def test_other_families(self):
        with pytest.raises(ValueError, match=r"`measures` is for categorical distributions\. Got Normal and Normal\."):
            KLDivergenceSummary(measures=True).update(D.Normal(0.0, 1.0), D.Normal(1.0, 1.0))

    def test_a_name_of_a_value(self):
        with pytest.raises(ValueError, match=r"Got 'revers'\. Did you mean 'reverse'\?"):
            KLDivergenceSummary(measures=True)["revers"]
        with pytest.raises(ValueError, match="`name` must be one of"):
            KLDivergenceSummary()["reverse"]


def test_the_order_of_equals_without_the_kernel(monkeypatch):
    monkeypatch.setattr(native, "serves", lambda *_: False)
    p = (2 * logits(200, 40)).round()
    q = p + (logits(200, 40, seed=1) > 1.5)
    order = [x.sort(dim=-1, descending=True, stable=True).indices for x in (p, q)]
    found = computed(p, q, input_format="logits", measures=True)
    for k in (1, 5, 10):
        agree = (order[0][:, :k] == order[1][:, :k]).all(-1)
        assert found[f"agreement_{k}"] == pytest.approx(agree.double().mean().item(), rel=1e-12)
        assert 0 < agree.sum() < 200


@pytest.mark.parametrize("direction", ["forward", "jeffreys"])
def test_on_a_device_without_float64(direction, monkeypatch):
    monkeypatch.setattr(choose, "is_recorded", lambda: False)
    options = {"input_format": "logits", "direction": direction, **ALL}
    with Device("mps") as device:
        metric = KLDivergenceSummary(**options).to("mps")
        metric.update(device.put(P), device.put(P + NOISE), targets=device.put(TARGETS))
        found = metric.compute()
    expected = KLDivergenceSummary(**options)
    expected.update(P, P + NOISE, targets=TARGETS)
    for name, value in expected.compute().items():
        torch.testing.assert_close(getattr(found[name], "held", found[name]), value, rtol=1e-6, atol=1e-9)
