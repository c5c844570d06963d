"""`Head`: the divergence of logits that are never all there is that of the logits."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from cases import DIRECTIONS, logits
from fake_device import Device
from kinds import OF_CLASSES, make, same, value_of
from lightning.pytorch import LightningModule, Trainer
from processes import alone, peak, peak_from_now
from reference import kl_rows
from torch import nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from klmetric import Head, KLDivergence, KLDivergenceSummary, kl_divergence
from klmetric.arithmetic import choose, projection
from klmetric.lightning import KLDivergenceCallback
from klmetric.rows import head as heads

CLASSES, WIDTH = 37, 6
WEIGHTS = [logits(CLASSES, WIDTH, seed=10 + i, dtype=torch.float64) for i in (0, 1)]
BIASES = [logits(CLASSES, seed=20 + i, dtype=torch.float64) for i in (0, 1)]


def hidden(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return logits(*shape, WIDTH, seed=seed, dtype=dtype)


def by_numpy(x, weight, bias=None, scale=1.0, softcap=None):
    """Logits in float64, by another library."""
    y = x.double().numpy() @ weight.double().numpy().T
    y = (y + (0 if bias is None else bias.double().numpy())) * scale
    return torch.from_numpy(y if softcap is None else softcap * np.tanh(y / softcap))


@pytest.fixture(params=["one block", "blocks of two rows", "blocks of one row"])
def blocks(request, monkeypatch):
    rows = {"one block": None, "blocks of two rows": 2, "blocks of one row": 0}[request.param]
    if rows is not None:
        monkeypatch.setattr(projection, "BLOCK", 4 * CLASSES * rows)
    return request.param


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"scale": 0.5}, {"scale": 2.0, "softcap": 5.0}],
    ids=lambda x: "-".join(x) or "plain",
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 2, 2)], ids=str)
def test_it_is_the_divergence_of_the_logits(blocks, shape, has_bias, options, direction):
    bias = BIASES if has_bias else (None, None)
    x, y = hidden(*shape), hidden(*shape, seed=1)
    p, q = Head(x, WEIGHTS[0], bias[0], **options), Head(y, WEIGHTS[1], bias[1], **options)
    expected = kl_rows(by_numpy(x, WEIGHTS[0], bias[0], **options), by_numpy(y, WEIGHTS[1], bias[1], **options),
                       input_format="logits", direction=direction, temperature=1.5)  # fmt: skip
    given = kl_divergence(p, q, reduction="none", direction=direction, temperature=1.5)
    torch.testing.assert_close(given, expected.reshape(given.shape), rtol=1e-12, atol=0)
    assert given.shape == shape
    assert given.dtype is torch.float64


@pytest.mark.parametrize("form", ["logits", "log_probs", "probs"])
def test_a_tensor_on_the_other_side(blocks, form):
    x = hidden(3, 4)
    other = logits(3, 4, CLASSES, dtype=torch.float64)
    given = {"logits": other, "log_probs": other.log_softmax(-1), "probs": other.softmax(-1)}[form]
    head, made = Head(x, WEIGHTS[0]), by_numpy(x, WEIGHTS[0])
    for p, q, a, b in ((head, given, made, other), (given, head, other, made)):
        expected = kl_rows(a, b, input_format="logits")
        for formats in (form, (form, "logits"), ("logits", form)):
            if formats == form or formats[p is head] == form:  # of the head it is not asked
                value = kl_divergence(p, q, reduction="none", input_format=formats)
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="must have the shape of `p`"):
        kl_divergence(head, given[..., :-1], input_format=form)
    strided = given.movedim(0, 1).contiguous().movedim(0, 1)[:, ::2]
    value = kl_divergence(Head(x[:, ::2], WEIGHTS[0]), strided, input_format=form)
    torch.testing.assert_close(value, kl_rows(made[:, ::2], other[:, ::2], input_format="logits").mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_less_than_float32_are_not_rounded(dtype, monkeypatch):
    """The head is converted some classes at a time."""
    monkeypatch.setattr(projection, "CONVERTED", 4 * WIDTH * 10)
    x, y = hidden(50, dtype=dtype), hidden(50, seed=1, dtype=dtype)
    weight = WEIGHTS[0].to(dtype)
    p, q = Head(x, weight), Head(y, weight, BIASES[0].to(dtype))
    assert p.dtype is torch.float32
    value = kl_divergence(p, q, reduction="none")
    expected = kl_rows(by_numpy(x, weight), by_numpy(y, weight, BIASES[0].to(dtype)), input_format="logits")
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kl_divergence(p, q, reduction="none"), value)


def test_dtypes_may_differ():
    p, q = Head(hidden(5, dtype=torch.bfloat16), WEIGHTS[0].float()), Head(hidden(5, seed=1), WEIGHTS[0].half())
    assert (p.dtype, q.dtype) == (torch.float32, torch.float64)
    expected = kl_rows(by_numpy(p.hidden, WEIGHTS[0].float()), by_numpy(q.hidden, WEIGHTS[0].half()),
                       input_format="logits")  # fmt: skip
    torch.testing.assert_close(kl_divergence(p, q, reduction="none"), expected, rtol=1e-5, atol=0)


class Int8(nn.Module):
    """A head whose weights are whole numbers, with a scale for each class."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(-1) / 127
        self.weight = (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        self.bias = linear.bias.detach()

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T * self.scale + self.bias


def test_what_is_called(blocks):
    linear = nn.Linear(WIDTH, CLASSES)
    int8 = Int8(linear)
    x, y = hidden(3, 4, dtype=torch.float32), hidden(3, 4, seed=1, dtype=torch.float32)
    options = {"scale": 0.5, "softcap": 4.0}
    p, q = Head(x, linear.weight, linear.bias, **options), Head(y, int8, **options)
    assert q.shape == (3, 4, CLASSES)
    given = kl_divergence(p, q, reduction="none")
    cap = lambda z: 4 * (z * 0.5 / 4).tanh()  # noqa: E731
    expected = kl_divergence(cap(linear(x)), cap(int8(y)), input_format="logits", reduction="none")
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-7)
    rounded = Head(x.bfloat16(), linear.to(torch.bfloat16))
    assert rounded.dtype is torch.bfloat16  # as the model has them
    stored = by_numpy(x, WEIGHTS[0])
    looked_up = Head(torch.arange(12.0).view(12, 1), lambda h: stored.view(12, -1)[h[:, 0].long()], scale=2.0)
    kl_divergence(looked_up, looked_up)
    assert torch.equal(stored, by_numpy(x, WEIGHTS[0])), "what is called keeps what it gave"


def test_the_first_classes(blocks):
    x, y = hidden(7), hidden(7, seed=1)
    wider = torch.cat([WEIGHTS[1], WEIGHTS[1][:5]])
    expected = kl_rows(by_numpy(x, WEIGHTS[0])[:, :30], by_numpy(y, WEIGHTS[1])[:, :30], input_format="logits")
    heads = Head(y, wider), Head(y, lambda h: h @ wider.T), by_numpy(y, wider)
    for q in heads:
        value = kl_divergence(
            Head(x, WEIGHTS[0], 0 * BIASES[0]), q, classes=30, reduction="none", input_format="logits"
        )
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for q in heads:
        with pytest.raises(
            ValueError, match=re.escape("no more than both inputs have. Got classes=40, and `p` has 37")
        ):
            kl_divergence(Head(x, WEIGHTS[0]), q, classes=40)
    with pytest.raises(ValueError, match=re.escape("Got p (7, 37) and q (7, 42)")):
        kl_divergence(Head(x, WEIGHTS[0]), heads[0])


@pytest.mark.parametrize("kind", OF_CLASSES)
def test_every_metric(blocks, kind):
    x, y = hidden(6, 4), hidden(6, 4, seed=1)
    weight = torch.tensor([1, 0, 2, 1, 1, 3.0])
    p, q = Head(x, WEIGHTS[0]), Head(y, WEIGHTS[1])
    for w in (None, weight, weight.view(6, 1).expand(6, 4) * torch.tensor([1.0, 0, 1, 1])):
        # The last bits of a product depend on how many rows are multiplied at once.
        close(value_of(kind, p, q, w), value_of(kind, p[...], q[...], w, input_format="logits"))
    metric, whole = make(kind), make(kind)
    for part in range(0, 6, 2):
        here = slice(part, part + 2)
        metric.update(Head(x[here], WEIGHTS[0]), Head(y[here], WEIGHTS[1]), weight[here])
    whole.update(p, q, weight)
    close(metric.compute(), whole.compute())
    value = make(kind)(p, q, weight)
    close(value, whole.compute())


def close(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-12, equal_nan=True, check_dtype=False)
    else:
        torch.testing.assert_close(a.view(b.shape), b, rtol=1e-6, atol=1e-12, equal_nan=True, check_dtype=False)


def test_targets_and_perplexities(blocks):
    p, q = Head(hidden(6, 4), WEIGHTS[0]), Head(hidden(6, 4, seed=1), WEIGHTS[1])
    targets = torch.randint(0, CLASSES, (6, 4), generator=torch.Generator().manual_seed(0))
    targets[:, 0] = -100
    values = []
    for a, b in ((p, q), (p[...], q[...])):
        metric = KLDivergenceSummary(measures=True, perplexity=True, input_format="logits")
        metric.update(a, b, targets=targets)
        values.append(metric.compute())
    close(*values)
    targets[1, 1] = CLASSES
    with pytest.raises(ValueError, match="must be classes, from 0 to 36"):
        kl_divergence(p, q, targets=targets)


def test_rows_of_weight_0_are_not_made():
    rows = []
    head = Head(hidden(4, 5), lambda h: rows.append(len(h)) or h @ WEIGHTS[0].T)
    rows.clear()
    weight = torch.zeros(4, 5)
    weight[1:3, 2] = 1
    kl_divergence(head, Head(hidden(4, 5, seed=1), WEIGHTS[0]), weight=weight)
    assert rows == [2]
    for nothing in (weight * 0, None):
        shape = (4, 5) if nothing is not None else (0, 5)
        p, q = Head(hidden(*shape), WEIGHTS[0]), Head(hidden(*shape, seed=1), lambda h: h @ WEIGHTS[0].T)
        for kind in OF_CLASSES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # there is nothing to have a standard error of
                a, b = (value_of(kind, *x, nothing, input_format="logits") for x in ((p, q), (p[...], q[...])))
            close(a, b)


@pytest.mark.parametrize("is_called", [False, True], ids=["tensor", "called"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
def test_gradients(blocks, direction, is_called):
    def of(make):
        sides = [hidden(3, 4, seed=i).requires_grad_() for i in (0, 1)]
        weights, biases = ([x.clone().requires_grad_() for x in xs] for xs in (WEIGHTS, BIASES))
        mask = torch.arange(12).view(3, 4) % 5 != 0
        with torch.no_grad():
            sides[0][~mask] = math.nan  # of rows that do not count, none comes back
        value = make(sides, weights, biases, mask)
        return value.detach(), torch.autograd.grad(value, [*sides, *weights, *biases])

    def by_heads(sides, weights, biases, mask):
        if is_called:
            heads = [Head(x, lambda h, w=w, b=b: h @ w.T + b, softcap=3.0)
                     for x, w, b in zip(sides, weights, biases, strict=True)]  # fmt: skip
        else:
            heads = [Head(x, w, b, softcap=3.0) for x, w, b in zip(sides, weights, biases, strict=True)]
        return kl_divergence(*heads, direction=direction, weight=mask)

    def by_logits(sides, weights, biases, mask):
        p, q = (3 * ((x[mask] @ w.T + b) / 3).tanh() for x, w, b in zip(sides, weights, biases, strict=True))
        return kl_divergence(p, q, direction=direction, input_format="logits")

    (value, given), (expected, by_torch) = of(by_heads), of(by_logits)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for a, b in zip(given, by_torch, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_no_gradient_of_rows_that_are_ignored(blocks):
    x, y = hidden(5), hidden(5, seed=1).requires_grad_()
    x[2, 0] = math.nan
    p, q = Head(x, WEIGHTS[0]), Head(y, WEIGHTS[1])
    with pytest.warns(UserWarning, match="1 of 5 rows were no distributions and were left out"):
        kl_divergence(p, q, nan_strategy="ignore").backward()
    assert y.grad.isfinite().all()
    assert (y.grad[2] == 0).all()
    assert (y.grad[1] != 0).any()


def test_bad_rows_are_named():
    x = hidden(3, 4)
    x[1, 2, 0] = math.nan
    p, q = Head(x, WEIGHTS[0]), Head(hidden(3, 4, seed=1), WEIGHTS[1])
    with pytest.raises(ValueError, match=re.escape("the first is row (1, 2): `p` has NaN at class 0 (nan)")):
        kl_divergence(p, q, nan_strategy="error")
    with pytest.warns(
        UserWarning, match="1 of 12 rows were no distributions .* NaN in what the Head is made of"
    ) as caught:
        assert kl_divergence(p, q).isnan()
    assert "input_format" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("error", "make", "text"),
    [
        (TypeError, lambda: Head([1.0], WEIGHTS[0]), "`hidden` must be a torch.Tensor, the last hidden states"),
        (TypeError, lambda: Head(torch.ones(2, WIDTH).long(), WEIGHTS[0]), "Got torch.int64, shape (2, 6)"),
        (TypeError, lambda: Head(torch.ones(2, WIDTH).to_sparse(), WEIGHTS[0]), "`hidden` must be dense"),
        (TypeError, lambda: Head(hidden(2), WEIGHTS[0].to(torch.int8)), "Quantised heads go in as a module"),
        (TypeError, lambda: Head(hidden(2), None), "Got NoneType. Of a model, give model.lm_head.weight"),
        (TypeError, lambda: Head(hidden(2), WEIGHTS[0], 3.0), "`bias` must be a torch.Tensor, shape (classes,)"),
        (ValueError, lambda: Head(torch.ones(()), WEIGHTS[0]), "a last axis, of the head's width. Got shape ()"),
        (ValueError, lambda: Head(torch.ones(3, 0), WEIGHTS[0]), "Got shape (3, 0)"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0][:, 1:]), "(37, 5) and hidden (2, 6). Is it of another model?"),
        (ValueError, lambda: Head(WEIGHTS[0], hidden(2, 3)), "hidden (37, 6). Are the two in the right order?"),
        (ValueError, lambda: Head(hidden(2), torch.ones(6, 7)), "the classes come first: give weight.T"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0][:0]), "Got weight (0, 6)"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0][0]), "Got weight (6,) and hidden (2, 6)"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0], BIASES[0][1:]), "Got bias (36,) and weight (37, 6)"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0].to("meta")), "Got hidden on cpu, weight on meta. Move one"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0], BIASES[0].to("meta")), "Got hidden on cpu, bias on meta"),
        (ValueError, lambda: Head(hidden(2), nn.Identity(), BIASES[0]), "Got a bias and Identity, which is called"),
        (ValueError, lambda: Head(hidden(2), lambda h: h.long()), "Got torch.int64, shape (1, 6), of hidden states"),
        (ValueError, lambda: Head(hidden(2), lambda h: [h]), "Got list, of hidden states of shape (1, 6)"),
        (ValueError, lambda: Head(hidden(2), lambda h: h[0]), "Got torch.float64, shape (6,)"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0], scale=math.inf), "`scale` must be a finite number. Got inf"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0], softcap=0), "`softcap` must be a finite number above 0"),
        (ValueError, lambda: Head(hidden(2), WEIGHTS[0], softcap="3"), "or None. Got '3'"),
    ],
)  # fmt: skip
def test_what_is_no_head(error, make, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


def test_what_does_not_go_together():
    head = Head(hidden(2, 3), WEIGHTS[0])
    with pytest.raises(TypeError, match=r"Got Categorical and Head. Of a categorical distribution, give its logits"):
        kl_divergence(Categorical(logits=torch.ones(2, 3, CLASSES)), head)
    with pytest.raises(
        TypeError, match=r"`q` must be a Head or a torch.Tensor where the other side is a Head. Got list"
    ):
        kl_divergence(head, [1])
    with pytest.raises(ValueError, match=r"`dim` must be -1 with a Head, whose classes are last. Got dim=1"):
        kl_divergence(head, head, dim=1)
    with pytest.raises(ValueError, match=re.escape("Got p (2, 3, 37) and q (3, 37)")):
        kl_divergence(head, Head(hidden(3), WEIGHTS[0]))
    with pytest.raises(ValueError, match=r"must share a device. Got p on cpu, q on meta"):
        kl_divergence(head, Head(hidden(2, 3).to("meta"), WEIGHTS[0].to("meta")))
    with pytest.raises(ValueError, match="its shape a prefix of the batch shape"):
        kl_divergence(head, head, weight=torch.ones(3))
    metric = KLDivergence()
    metric.update(head, Head(hidden(2, 3, seed=1), WEIGHTS[0]))
    before = metric.totals.clone()
    with pytest.raises(ValueError, match="of hidden states of shape"):
        metric.update(head, Head(hidden(2, 3), lambda h: h @ WEIGHTS[0].T if len(h) == 1 else h))
    assert torch.equal(metric.totals, before)
    assert repr(head) == "Head(logits of shape (2, 3, 37), torch.float64, cpu)"


def test_compiled():
    x, y = hidden(5, dtype=torch.float32), hidden(5, seed=1, dtype=torch.float32)
    weight = WEIGHTS[0].float()

    def loss(x, y):
        return kl_divergence(Head(x, weight), Head(y, weight))

    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="eager")(x, y), loss(x, y), rtol=1e-5, atol=0
    )


def test_transforms():
    x, y = hidden(3, 4), hidden(3, 4, seed=1)

    def loss(x, y):
        return kl_divergence(Head(x, WEIGHTS[0]), Head(y, WEIGHTS[1], softcap=3.0))

    expected = torch.stack([loss(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, y), expected, rtol=1e-12, atol=0)
    leaf = y.clone().requires_grad_()
    loss(x, leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss, 1)(x, y), leaf.grad, rtol=1e-9, atol=1e-15)
    shapes = [Head(z.to("meta"), WEIGHTS[0].to("meta")) for z in (x, y)]
    assert kl_divergence(*shapes, reduction="none", weight=torch.ones(3, device="meta")).shape == (3, 4)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_on_another_device(name, monkeypatch):
    """Nothing waits for it but a weight, which says which rows to make."""
    x, y, weight = (z.float() for z in (hidden(3, 4), hidden(3, 4, seed=1), WEIGHTS[0]))
    for module in (choose, heads, projection):
        monkeypatch.setattr(module, "is_recorded", lambda: False)  # the device of the tests is a mode of torch
    with Device(name) as device:
        metric = KLDivergence().to(name)
        head = device.put(weight)
        metric.update(Head(device.put(x), head, softcap=9.0), Head(device.put(y), head))
        assert name == "mps" or not device.waits
        value = metric.compute().item()
    assert value == pytest.approx(kl_divergence(Head(x, weight, softcap=9.0), Head(y, weight)).item(), rel=1e-5)


def most_memory(backward):
    """MiB beyond the inputs, of 4,096 positions and 128,256 classes; a narrow head, whose product is quick."""
    torch.manual_seed(0)
    x, y = torch.randn(4096, 4), torch.randn(4096, 4)
    weight = torch.randn(128_256, 4)
    if backward:
        x, y, weight = x[:512], y[:512], weight.requires_grad_()
    kl_divergence(Head(x[:1], weight), Head(y[:1], weight))
    before = peak_from_now()
    value = kl_divergence(Head(x, weight), Head(y, weight), targets=torch.zeros(len(x), dtype=torch.long))
    if backward:
        value.backward()
    return value.item(), peak() - before


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory(backward):
    value, memory = alone(most_memory, backward)
    assert value > 0
    assert memory <= (512 if backward else 256)  # with a gradient, there are those of the logits too


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.teacher, self.student = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def validation_step(self, batch, batch_idx):
        return {name: Head(batch, layer.weight, layer.bias) for name, layer in
                (("teacher", self.teacher), ("student", self.student))}  # fmt: skip


def test_in_a_callback(tmp_path):
    torch.manual_seed(0)
    module, data = Module(), hidden(7, 3, dtype=torch.float32)
    metrics = MetricCollection({"kl": KLDivergence(), "all": KLDivergenceSummary()})
    kl = KLDivergenceCallback(metrics, p="teacher", q="student")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[kl], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, that the loader has no workers
        trainer.validate(module, DataLoader(data, batch_size=2), verbose=False)
    expected = kl_divergence(module.teacher(data), module.student(data), input_format="logits").item()
    assert kl.history[0]["val_kl_kl"] == pytest.approx(expected, rel=1e-5)
    assert kl.history[0]["val_kl_mean"] == pytest.approx(expected, rel=1e-5)


def in_processes(rank, size):
    metric = KLDivergenceSummary()
    for i in range(rank, 5, size):
        metric.update(Head(hidden(1, 4, seed=i), WEIGHTS[0]), Head(hidden(1, 4, seed=i), WEIGHTS[1]))
    return metric.compute()


def test_processes(two_processes):
    expected = in_processes(0, 1)
    for value in two_processes(in_processes):
        same(value, expected)
