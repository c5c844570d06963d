"""Targets: which rows count, and what is wrong with them."""

import math
import re

import pytest
import torch
import torch.distributions as D
from cases import logits
from fake_device import Device
from torchmetrics import MetricCollection

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence
from klmetric.arithmetic import choose

SHAPE, CLASSES = (4, 6), 5
LABELS = torch.randint(CLASSES, SHAPE, generator=torch.Generator().manual_seed(0))
LABELS[0], LABELS[1, :3], LABELS[3, 5] = -100, -100, -100
COUNTS = LABELS != -100
WEIGHT = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
P, Q = (logits(*SHAPE, CLASSES, seed=seed) for seed in (0, 1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT, WEIGHT[:, 0], WEIGHT > 0.5, torch.tensor([1, 2, 0, 3])])
def test_rows_without_a_target_have_weight_0(reduction, weight):
    spread = torch.ones(SHAPE) if weight is None else weight.reshape(*weight.shape, *[1] * (2 - weight.ndim))
    left = spread * COUNTS
    options = {"input_format": "logits", "reduction": reduction}
    expected = kl_divergence(P, Q, weight=left, **options)
    assert torch.equal(kl_divergence(P, Q, weight=weight, targets=LABELS, **options), expected)
    metric = KLDivergence(**options)
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update(P[rows], Q[rows], None if weight is None else weight[rows], LABELS[rows])
    found = metric.compute()
    if reduction == "none":
        expected = kl_divergence(P, Q, **options)[left > 0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    summary = KLDivergenceSummary(input_format="logits")
    summary(P, Q, weight=weight, targets=LABELS)
    assert summary.compute()["count"] == (left > 0).sum()


def test_targets_that_all_count_change_nothing():
    labels = LABELS.clamp_min(0)
    for p, q in ((P, Q), (P.double(), Q.double())):
        assert torch.equal(
            kl_divergence(p, q, targets=labels, input_format="logits"), kl_divergence(p, q, input_format="logits")
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_integers_and_another_number(dtype):
    labels = torch.where(COUNTS, LABELS, -1).to(dtype)
    expected = kl_divergence(P, Q, weight=COUNTS, input_format="logits")
    assert kl_divergence(P, Q, targets=labels, ignore_index=-1, input_format="logits") == expected
    metric = KLDivergence(input_format="logits", ignore_index=-1)
    metric.update(P, Q, targets=labels)
    assert metric.compute() == expected
    assert "ignore_index=-1" in repr(metric)
    # A class may stand for it, as that of padding does.
    labels = torch.where(COUNTS & (LABELS != 3), LABELS, 3)
    assert kl_divergence(P, Q, targets=labels, ignore_index=3, input_format="logits") == kl_divergence(
        P, Q, weight=labels != 3, input_format="logits"
    )


def test_metrics_with_other_numbers_are_never_taken_for_one_another():
    metrics = {str(number): KLDivergence(input_format="logits", ignore_index=number) for number in (-100, 3)}
    collection = MetricCollection(metrics)
    collection.update(P[2:3], Q[2:3], targets=torch.zeros_like(LABELS[2:3]))  # of which all count, for either
    collection.update(P, Q, targets=LABELS.clamp_min(0))
    first, second = collection.compute().values()
    assert first != second
    with pytest.raises(ValueError, match="Only what was measured with the same options can be merged"):
        metrics["3"].merge_state(metrics["-100"])


def test_other_axes_fewer_classes_and_distributions():
    expected = kl_divergence(P, Q, weight=COUNTS, input_format="logits")
    moved = [x.movedim(-1, 1) for x in (P, Q)]
    assert kl_divergence(*moved, dim=1, targets=LABELS, input_format="logits") == expected
    padded = [torch.cat([x, x], -1) for x in (P, Q)]
    assert kl_divergence(*padded, classes=CLASSES, targets=LABELS, input_format="logits") == expected
    with pytest.raises(ValueError, match=r"from 0 to 1, or ignore_index=-100 in rows.*Got [234] in row"):
        kl_divergence(P, Q, classes=2, targets=LABELS, input_format="logits")
    made = kl_divergence(D.Categorical(logits=P), D.Categorical(logits=Q), targets=LABELS)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=0)


def test_nothing_counts():
    assert kl_divergence(P, Q, targets=torch.full(SHAPE, -100), input_format="logits").isnan()
    assert kl_divergence(P[:0], Q[:0], targets=LABELS[:0], input_format="logits").isnan()


def test_bad_rows_and_gradients_of_rows_that_do_not_count():
    p, q = P.clone(), Q.clone().requires_grad_()
    p[0, 0] = math.nan
    value = kl_divergence(p, q, targets=LABELS, input_format="logits", nan_strategy="error")
    value.backward()
    assert q.grad.isfinite().all()
    assert ((q.grad != 0).all(-1) == COUNTS).all()


ERRORS = {
    "list": (
        LABELS.tolist(),
        TypeError,
        "`targets` must be a torch.Tensor. Got list. Convert it with torch.as_tensor.",
    ),
    "float": (
        LABELS.float(),
        TypeError,
        "`targets` must be integers, the numbers of classes. Got torch.float32. Convert it with .long().",
    ),
    "mask": (
        COUNTS,
        TypeError,
        "`targets` must be integers, the numbers of classes. Got torch.bool. A mask of rows is a `weight`.",
    ),
    "one-hot": (
        torch.nn.functional.one_hot(LABELS.clamp_min(0), 5),
        ValueError,
        "Got targets (4, 6, 5) for batch shape (4, 6). If they are one-hot, take .argmax(-1).",
    ),
    "one-hot floats": (
        torch.nn.functional.one_hot(LABELS.clamp_min(0), 5).float(),
        TypeError,
        "Got torch.float32. If they are one-hot, take .argmax(-1).",
    ),
    "shifted": (
        LABELS[:, 1:],
        ValueError,
        "`targets` must have one class for each row: the batch shape. Got targets (4, 5) for batch shape (4, 6). Of a"
        " language model they are the tokens one place on: those of logits[:, :-1] are tokens[:, 1:].",
    ),
    "one for each sample": (LABELS[:, 0], ValueError, "Got targets (4,) for batch shape (4, 6)."),
    "too large": (
        LABELS.masked_fill(LABELS == 4, 5),
        ValueError,
        "`targets` must be classes, from 0 to 4, or ignore_index=-100 in rows that do not count. Got 5 in row ",
    ),
    "negative": (LABELS.masked_fill(LABELS == 4, -1), ValueError, "Got -1 in row ("),
    "elsewhere": (LABELS.to("meta"), ValueError, "`targets` must be on the device of `p`, or on the CPU."),
    "sparse": (LABELS.to_sparse(), TypeError, "`targets` must be dense. Got layout torch.sparse_coo."),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    labels, kind, message = ERRORS[case]
    metric = KLDivergence(input_format="logits")
    before = metric.totals.clone()
    for call in (
        lambda: kl_divergence(P, Q, targets=labels, input_format="logits"),
        lambda: metric.update(P, Q, targets=labels),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            call()
    assert torch.equal(metric.totals, before)
    assert metric.update_count == 0


@pytest.mark.parametrize("value", ["-100", 1.5, None])
def test_the_number_must_be_one(value):
    for kind in (KLDivergence, KLDivergenceSummary):
        with pytest.raises(TypeError, match=r"`ignore_index` must be an int, what stands for no target\. Got "):
            kind(ignore_index=value)


def test_distributions_of_other_families_have_no_classes():
    with pytest.raises(ValueError, match=r"`targets` is for categorical distributions\. Got Normal and Normal\."):
        kl_divergence(D.Normal(0.0, 1.0), D.Normal(0.0, 2.0), targets=torch.tensor(1))


def test_under_vmap_and_compiled():
    batch = torch.stack([LABELS, LABELS.flip(0)])
    value = torch.vmap(lambda t: kl_divergence(P, Q, targets=t, input_format="logits"))(batch)
    expected = torch.stack([kl_divergence(P, Q, targets=t, input_format="logits") for t in batch])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    compiled = torch.compile(kl_divergence, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(P, Q, targets=LABELS, input_format="logits"), expected[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("options", [None, {}, {"measures": True, "perplexity": True}])
def test_no_update_waits_for_an_accelerator(options, weight, monkeypatch):
    """And a target out of range is said at the end."""
    monkeypatch.setattr(choose, "is_recorded", lambda: False)
    with Device("cuda") as device:
        wrong = LABELS.masked_fill(LABELS == 4, 5)
        for labels in (LABELS, wrong):
            make = KLDivergence if options is None else KLDivergenceSummary
            metric = make(input_format="logits", **(options or {})).to("cuda")
            inputs = [device.put(x) for x in (P, Q)]
            put = None if weight is None else device.put(weight)
            metric.update(*inputs, put, device.put(labels))
            if labels is wrong:
                with pytest.raises(ValueError, match=r"`targets` be classes or `ignore_index`.*not looked at before"):
                    metric.compute()
            else:
                found = metric.compute()
    expected = make(input_format="logits", **(options or {}))
    expected.update(P, Q, weight, LABELS)
    expected = expected.compute()
    found, expected = (x if isinstance(x, dict) else {"mean": x} for x in (found, expected))
    for name, value in expected.items():
        value_there = found[name].held if hasattr(found[name], "held") else found[name]
        torch.testing.assert_close(value_there, value, rtol=1e-5, atol=1e-9, equal_nan=True)
