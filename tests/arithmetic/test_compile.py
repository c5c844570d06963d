"""Under `torch.compile`: the whole function in one graph, forward and backward."""

import shutil

import pytest
import torch
from cases import logits, pair

from klmetric import kl_divergence

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs a C++ compiler"
    ),
    pytest.mark.filterwarnings("ignore"),  # of the compiler, about itself
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.parametrize(("dynamic", "shapes"), [(False, [(8, 300)]), (True, [(8, 300), (5, 70)])])
def test_same_value_and_gradient(dynamic, shapes):
    compiled = torch.compile(kl_divergence, fullgraph=True, dynamic=dynamic)
    for shape in shapes:
        p, q = logits(*shape), (logits(*shape) + 0.01 * logits(*shape, seed=1)).requires_grad_()
        value = compiled(p, q, input_format="logits")
        value.backward()
        gradient, q.grad = q.grad, None
        expected = kl_divergence(p, q, input_format="logits")
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, q.grad, rtol=1e-3, atol=1e-7)


def test_jensen_shannon():
    compiled = torch.compile(kl_divergence, fullgraph=True, backend="aot_eager")
    p, q = logits(8, 300), logits(8, 300, seed=1)
    options = {"input_format": "logits", "direction": "jensen_shannon", "reduction": "none"}
    for a in (p, p.clone().requires_grad_()):
        torch.testing.assert_close(compiled(a, q, **options), kl_divergence(a, q, **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize("nan_strategy", ["propagate", "ignore"])
def test_weights_and_bad_rows(nan_strategy):
    # What is asked here is whether it is one graph: without C++, which takes long to make and rounds as above.
    compiled = torch.compile(kl_divergence, fullgraph=True, backend="aot_eager")
    p, q = pair(6, 5)
    q[1] = torch.nan
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.5])
    options = {"weight": weight, "nan_strategy": nan_strategy}
    torch.testing.assert_close(compiled(p, q, **options), kl_divergence(p, q, **options))
    if nan_strategy == "propagate":
        assert compiled(p, q).isnan()


def test_what_needs_a_look_at_the_data_says_so():
    compiled = torch.compile(kl_divergence, fullgraph=True)
    with pytest.raises(Exception, match="nan_strategy='error' must look at the data"):
        compiled(*pair(6, 5), nan_strategy="error")


def test_near_equal_rows_keep_their_digits():
    compiled = torch.compile(kl_divergence, fullgraph=True)
    p = logits(4, 1000)
    for divergence in (1e-12, 1e-6, 1.0):
        q = (p.double() + (2 * divergence) ** 0.5 * logits(4, 1000, seed=1, dtype=torch.float64)).float()
        exact = kl_divergence(p.double(), q.double(), input_format="logits", reduction="none")
        value = compiled(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
