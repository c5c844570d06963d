"""Gradients: right to the second order, and in no more memory than `F.kl_div` takes."""

import sys

import pytest
import torch
from cases import DIRECTIONS, FORMATS, logits, pair
from processes import alone, peak, peak_from_now
from torch.nn import functional

from klmetric import kl_divergence
from klmetric.arithmetic.plain import plain
from klmetric.options import Options


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("p_format", FORMATS)
@pytest.mark.parametrize("q_format", FORMATS)
def test_first_and_second_derivatives(p_format, q_format, direction, temperature):
    p = pair(1, 3, input_format=p_format, dtype=torch.float64)[0].requires_grad_()
    q = pair(1, 3, input_format=q_format, dtype=torch.float64)[1].requires_grad_()
    check_derivatives(p, q, input_format=(p_format, q_format), direction=direction, temperature=temperature)


def test_derivatives_of_more_axes():
    p, q = (x.requires_grad_() for x in pair(2, 3, 4, input_format="logits", dtype=torch.float64))
    check_derivatives(p, q, input_format="logits", direction="jeffreys")


def check_derivatives(p, q, **options):
    def rows(p, q):
        return kl_divergence(p, q, reduction="none", **options)

    assert torch.autograd.gradcheck(rows, (p, q), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rows, (p, q))


@pytest.mark.parametrize("eps", [1e-3, 0.3])
@pytest.mark.parametrize("input_format", FORMATS)
def test_with_a_floor(input_format, eps):
    p, q = (x.requires_grad_() for x in pair(3, 4, input_format=input_format, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda p, q: kl_divergence(p, q, input_format=input_format, eps=eps), (p, q))


@pytest.mark.parametrize("wanted", ["p", "q"])
def test_of_one_alone(wanted):
    p, q = pair(3, 4, input_format="logits", dtype=torch.float64)
    (p if wanted == "p" else q).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: kl_divergence(p, q, input_format="logits"), (p, q))


@pytest.mark.parametrize("shape", [(7, 10), (300, 2000), (3, 1000, 500)], ids=str)
def test_as_kl_div_has_it(shape):
    p, q = logits(*shape, dtype=torch.float64), logits(*shape, seed=1, dtype=torch.float64)
    gradients = []
    for loss in (
        lambda a, b: functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"),
        lambda a, b: kl_divergence(a, b, input_format="logits", reduction="sum"),
    ):
        a, b = p.clone().requires_grad_(), q.clone().requires_grad_()
        loss(a, b).backward()
        gradients.append((a.grad, b.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("formats", [("probs", "probs"), ("probs", "logits"), ("logits", "probs")], ids="-".join)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("apart", [1, 1e-6])
def test_as_the_expression_has_it_with_zeros_too(formats, direction, apart):
    p = logits(6, 7, dtype=torch.float64)
    q = p + apart * logits(6, 7, seed=1, dtype=torch.float64)
    p, q = (3 * x.softmax(-1) if f == "probs" else x for x, f in zip((p, q), formats, strict=True))
    for x, f in zip((p, q), formats, strict=True):
        x[:, 2] = 0 if f == "probs" else -torch.inf
    if direction == "forward" and formats[0] == "probs":
        p[:, 4] = 0
    gradients = []
    for divergence in (
        lambda p, q: kl_divergence(p, q, input_format=formats, direction=direction, reduction="none"),
        lambda p, q: plain(p, q, Options(formats, direction=direction)),
    ):
        x, y = p.clone().requires_grad_(), q.clone().requires_grad_()
        divergence(x, y).sum().backward()
        gradients.append(torch.cat([x.grad, y.grad]))
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * apart)


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_value_is_the_one_without_gradients(classes):
    p, q = logits(5, classes), logits(5, classes, seed=1)
    alone = kl_divergence(p, q, input_format="logits", reduction="none")
    assert torch.equal(kl_divergence(p, q.requires_grad_(), input_format="logits", reduction="none"), alone)


def test_zero_for_equal_rows():
    p = logits(3, 5)
    q = p.clone().requires_grad_()
    kl_divergence(p, q, input_format="logits").backward()
    assert (q.grad == 0).all()


def test_under_the_transforms_of_torch():
    p, q = pair(3, 4, input_format="logits", dtype=torch.float64)

    def mean(q):
        return kl_divergence(p, q, input_format="logits")

    q_with = q.clone().requires_grad_()
    mean(q_with).backward()
    torch.testing.assert_close(torch.func.grad(mean)(q), q_with.grad)
    tangent = logits(3, 4, seed=9, dtype=torch.float64)
    along = torch.func.jvp(mean, (q,), (tangent,))[1]
    torch.testing.assert_close(along, (q_with.grad * tangent).sum())


def loss(which, p, q):
    if which == "ours":
        return kl_divergence(p, q, input_format="logits")
    return functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")


def extra_memory(which):
    """MiB at the peak of a forward and backward pass, beyond the inputs."""
    p = torch.randn(512, 32_000)
    q = (p + torch.randn(512, 32_000)).requires_grad_()
    loss(which, p[:2], q[:2].detach().requires_grad_()).backward()
    before = peak_from_now()
    loss(which, p, q).backward()
    return peak() - before


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from /proc")
def test_takes_the_memory_of_the_gradient_alone():
    ours, theirs = (alone(extra_memory, which) for which in ("ours", "theirs"))
    gradient = 512 * 32_000 * 4 / 2**20
    assert gradient <= ours < 1.5 * gradient
    assert ours < theirs
