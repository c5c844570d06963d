"""The transforms of `torch.func`, and batches of gradients: as `F.kl_div` has them."""

import math

import pytest
import torch
from cases import logits
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional

from klmetric import kl_divergence

N, C = 4, 3
CASES = {
    "logits": ({"input_format": "logits"}, lambda x: x),
    "log_probs": ({"input_format": "log_probs"}, lambda x: x.log_softmax(-1)),
    "probs": ({}, lambda x: x.softmax(-1)),
    "reverse": ({"input_format": "logits", "direction": "reverse"}, lambda x: x),
    "jensen_shannon": ({"input_format": "logits", "direction": "jensen_shannon"}, lambda x: x),
    "temperature": ({"input_format": "logits", "temperature": 2.0}, lambda x: x),
    "weight": ({"input_format": "logits", "weight": torch.tensor([1.0, 0.0, 2.0, 0.5])}, lambda x: x),
    "ignore": ({"input_format": "logits", "nan_strategy": "ignore"}, lambda x: x),
}


def functions(case, reduction="mean"):
    """Ours, and the same by `F.kl_div`, of the same inputs."""
    options, convert = CASES[case]
    weight = options.get("weight", torch.ones(N)).double()

    def ours(a, b):
        return kl_divergence(convert(a), convert(b), reduction=reduction, **options)

    def theirs(a, b):
        a, b = ((x / options.get("temperature", 1.0)).log_softmax(-1) for x in (a, b))
        a, b = (b, a) if options.get("direction") == "reverse" else (a, b)
        rows = functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
        if options.get("direction") == "jensen_shannon":
            middle = torch.logaddexp(a, b) - math.log(2)
            both = [functional.kl_div(middle, x, log_target=True, reduction="none").sum(-1) for x in (a, b)]
            rows = (both[0] + both[1]) / 2
        return rows if reduction == "none" else (rows * weight).sum() / weight.sum()

    return ours, theirs


A, B = (logits(N, C, seed=seed, dtype=torch.float64) for seed in (0, 1))
MANY = logits(5, N, C, seed=2, dtype=torch.float64)
BOTH = (0, 1)


def batched(f):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    rows = f(a, b)
    ways = torch.eye(rows.numel(), dtype=torch.float64).reshape(-1, *rows.shape)
    return torch.autograd.grad(rows, (a, b), ways, is_grads_batched=True)


def twice(f):
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    rows = f(a, b)
    ways = torch.eye(rows.numel(), dtype=torch.float64).reshape(-1, *rows.shape)
    first = torch.autograd.grad(rows, (a, b), ways, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), (a, b))


TRANSFORMS = {
    "vmap": lambda f: vmap(f, in_dims=(None, 0))(A, MANY),
    "vmap of another axis": lambda f: vmap(f, in_dims=(None, 1))(A, MANY.movedim(0, 1)),
    "vmap with randomness": lambda f: vmap(f, in_dims=(0, None), randomness="different")(MANY, B),
    "vmap twice": lambda f: vmap(vmap(f, in_dims=(0, None)), in_dims=(None, 0))(MANY, MANY),
    "grad": lambda f: grad(lambda a, b: f(a, b).sum(), argnums=BOTH)(A, B),
    "jacrev": lambda f: jacrev(f, argnums=BOTH)(A, B),
    "jacfwd": lambda f: jacfwd(f, argnums=BOTH)(A, B),
    "hessian": lambda f: hessian(f, argnums=BOTH)(A, B),
    "jvp": lambda f: jvp(f, (A, B), (B, A)),
    "vmap of grad": lambda f: vmap(grad(lambda a, b: f(a, b).sum(), argnums=1), in_dims=(None, 0))(A, MANY),
    "grad of vmap": lambda f: grad(lambda x: vmap(f, in_dims=(None, 0))(A, x).sum())(MANY),
    "is_grads_batched": batched,
    "is_grads_batched, twice": twice,
    "jacobian": lambda f: torch.autograd.functional.jacobian(f, (A, B), vectorize=True),
    "jacobian, forward": lambda f: torch.autograd.functional.jacobian(
        f, (A, B), vectorize=True, strategy="forward-mode"
    ),
    "autograd hessian": lambda f: torch.autograd.functional.hessian(lambda a, b: f(a, b).sum(), (A, B), vectorize=True),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of F.kl_div
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_as_kl_div_has_it(case, transform):
    for reduction in ("mean", "none") if case != "weight" else ("mean",):
        ours, theirs = (TRANSFORMS[transform](f) for f in functions(case, reduction))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_vmap_over_the_weight_and_over_rows_that_are_no_distributions():
    weight = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    bad = B.clone()
    bad[1] = torch.nan
    options = {"input_format": "logits"}
    value = vmap(lambda w: kl_divergence(A, bad, weight=w, **options))(weight)
    expected = torch.stack([kl_divergence(A, bad, weight=w, **options) for w in weight])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert vmap(lambda q: kl_divergence(A, q, **options))(bad.expand(2, N, C)).isnan().all()


def test_what_needs_a_look_at_the_data_says_so():
    with pytest.raises(ValueError, match=r"must look at the data.*under torch\.vmap.*Use 'propagate' or 'ignore'"):
        vmap(lambda q: kl_divergence(A, q, input_format="logits", nan_strategy="error"))(MANY)
