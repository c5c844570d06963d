"""On other devices: nothing waits for them in `update`, and one without float64 gets its numbers all the same."""

import math

import pytest
import torch
from cases import logits, pair
from fake_device import Device

from klmetric import KLDivergence, KLDivergenceEstimate, KLDivergenceSummary, TopK, kl_divergence
from klmetric.arithmetic import choose
from klmetric.totals import moments


@pytest.fixture(params=["cuda", "mps"])
def device(request, monkeypatch):
    monkeypatch.setattr(choose, "is_recorded", lambda: False)  # the device of the tests is a mode of torch
    with Device(request.param) as device:
        yield device


def test_the_fake_device_counts_what_waits():
    with Device("cuda") as device:
        x = device.put(torch.arange(3.0))
        assert (x + 1).device.type == "cuda"
        assert not device.waits
        for wait in (lambda: bool(x.any()), lambda: x[x > 1], lambda: x.tolist(), lambda: x.cpu()):
            device.waits.clear()
            wait()
            assert device.waits.total() == 1
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
    with Device("mps") as device, pytest.raises(TypeError, match="support float64"):
        device.put(torch.arange(3.0)).double()


@pytest.mark.parametrize("metric_class", [KLDivergence, KLDivergenceSummary])
@pytest.mark.parametrize("nan_strategy", ["propagate", "ignore"])
@pytest.mark.parametrize("weight", ["none", "bool", "float", "int", "on the CPU"])
def test_no_update_waits(metric_class, nan_strategy, weight):
    p, q = logits(6, 7, 10), logits(6, 7, 10, seed=1)
    q[2, 3, 0] = math.nan
    w = torch.tensor([1, 0, 2, 1, 1, 3])
    w = {"none": None, "bool": w > 0, "float": w / 2, "on the CPU": w / 2, "int": w}[weight]
    with pytest.MonkeyPatch.context() as patch, Device("cuda") as device:
        patch.setattr(choose, "is_recorded", lambda: False)
        metric = metric_class(input_format="logits", nan_strategy=nan_strategy).to("cuda")
        there = w if w is None or weight == "on the CPU" else device.put(w)
        a, b = device.put(p), device.put(q)
        for _ in range(100):
            metric.update(a, b, there)
        assert not device.waits
        with pytest.warns(UserWarning, match="rows were no distributions"):
            value = metric.compute()
    expected = metric_class(input_format="logits", nan_strategy=nan_strategy)
    for _ in range(100):
        expected.update(p, q, w)
    with pytest.warns(UserWarning, match="rows were no distributions"):
        expected = expected.compute()
    for x, y in zip(*([x.values() if isinstance(x, dict) else [x] for x in (value, expected)]), strict=True):
        torch.testing.assert_close(x.held if hasattr(x, "held") else x, y, rtol=1e-6, atol=0, equal_nan=True)


def test_no_update_waits_that_keeps_all_rows(device):
    p, q = logits(6, 7, 10), logits(6, 7, 10, seed=1)
    metric = KLDivergence(input_format="logits", reduction="none").to(device.device)
    on_it = device.put(p), device.put(q)
    device.waits.clear()
    for _ in range(3):
        metric.update(*on_it)
    assert not device.waits or device.device.type == "mps"  # whose rows are measured on the CPU
    expected = kl_divergence(p, q, input_format="logits", reduction="none").flatten().repeat(3)
    torch.testing.assert_close(metric.compute().held, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_no_update_of_an_estimate_waits(device, mean):
    log_p, log_q = logits(6, 7), logits(6, 7, seed=1)
    log_q[2, 3] = -math.inf
    weight = torch.arange(42).reshape(6, 7) % 3
    metric, expected = (KLDivergenceEstimate(estimator="k1", mean=mean) for _ in range(2))
    metric.to(device.device)
    on_it = device.put(log_p), device.put(log_q), device.put(weight)
    device.waits.clear()
    for _ in range(3):
        metric.update(*on_it)
        expected.update(log_p, log_q, weight)
    if device.device.type != "mps":  # which has no float64
        assert not device.waits
    for (name, x), y in zip(metric.compute().items(), expected.compute().values(), strict=True):
        torch.testing.assert_close(x.held, y, rtol=1e-6, atol=0, equal_nan=True, msg=lambda m, k=name: f"{k}: {m}")


def test_a_large_batch_of_an_estimate_goes_in_pieces_without_waiting(device, monkeypatch):
    monkeypatch.setattr(moments, "AT_ONCE", 2)
    log_p, log_q = logits(6, 7), logits(6, 7, seed=1)
    metric, expected = KLDivergenceEstimate().to(device.device), KLDivergenceEstimate()
    on_it = device.put(log_p), device.put(log_q)
    device.waits.clear()
    metric.update(*on_it)
    if device.device.type != "mps":
        assert not device.waits
    expected.update(log_p, log_q)
    torch.testing.assert_close(metric.compute()["stderr"].held, expected.compute()["stderr"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("metric_class", [KLDivergence, KLDivergenceSummary])
def test_a_bad_weight_is_said_at_the_end(metric_class, bad):
    with pytest.MonkeyPatch.context() as patch, Device("cuda") as device:
        patch.setattr(choose, "is_recorded", lambda: False)
        p, q, weight = (device.put(x) for x in (logits(2, 3), logits(2, 3, seed=1), torch.tensor([1.0, bad])))
        metric = metric_class(input_format="logits").to("cuda")
        metric.update(p, q, weight)
        for result in (metric.compute, lambda: kl_divergence(p, q, input_format="logits", weight=weight)):
            with pytest.raises(ValueError, match=r"`weight` must be finite and at least 0.*not looked at before"):
                result()


@pytest.mark.parametrize("formats", [("logits", "logits"), ("probs", "probs"), ("probs", "log_probs")])
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 1e-3}, {"temperature": 2.0}, {"direction": "jeffreys"}, {"direction": "jensen_shannon"}],
    ids=str,
)
def test_the_value_is_that_of_the_cpu(device, formats, options):
    p, q = (pair(5, 40, input_format=f)[i] for i, f in enumerate(formats))
    options = {"input_format": formats, "reduction": "none", **options}
    value = kl_divergence(device.put(p), device.put(q), **options)
    assert value.device.type == device.device.type
    torch.testing.assert_close(value.held, kl_divergence(p, q, **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sides", ["p", "q", "both"])
def test_no_update_waits_for_a_top_k(device, sides):
    p, q = logits(6, 7, 30), logits(6, 7, 30, seed=1)
    weight = torch.arange(42).reshape(6, 7) % 3
    values, metrics = [], []
    for there in (True, False):
        put = device.put if there else (lambda x: x)
        pair = []
        for side, x in zip("pq", (p, q), strict=True):
            v, i = x.log_softmax(-1).topk(5)
            i[0, 0, 3:] = -1
            pair.append(TopK(put(v), put(i), 30) if sides in (side, "both") else put(x))
        w = put(weight)
        both = KLDivergence(input_format="logits"), KLDivergenceSummary(input_format="logits", bounds=True)
        metrics.append([metric.to(device.device) if there else metric for metric in both])
        device.waits.clear()
        for metric in metrics[-1]:
            metric.update(*pair, w)
        if device.device.type != "mps":  # which has no float64
            assert not device.waits
        values.append([metric.compute() for metric in metrics[-1]])
    torch.testing.assert_close(values[0][0].held, values[1][0], rtol=1e-6, atol=0)
    for name, x in values[1][1].items():
        torch.testing.assert_close(values[0][1][name].held, x, rtol=1e-6, atol=0, equal_nan=True)
