"""`TopK` where torch takes the code apart: in one graph of `torch.compile`, and under `torch.func`."""

import shutil

import pytest
import torch
from cases import DIRECTIONS, logits
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree

from klmetric import Head, KLDivergence, KLDivergenceSummary, TopK, kl_divergence, kl_divergence_bounds

CLASSES = 30
compiled = pytest.mark.slow  # it takes seconds to find out what to compile


def top(x, k=5):
    return TopK(*x.log_softmax(-1).topk(k), x.shape[-1])


def divergence(p, q, **options):
    return kl_divergence(p, q, input_format="logits", **options)


def sides(which, rows=4, dtype=torch.float32):
    """A pair of which p, q, or both are a `TopK`."""
    p, q = logits(rows, CLASSES, dtype=dtype), logits(rows, CLASSES, seed=1, dtype=dtype)
    return top(p) if which != "q" else p, top(q, 7) if which != "p" else q


def in_one_graph(function, backend="aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


# ---- torch.compile ---------------------------------------------------------------------------------------------------
@compiled
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("dynamic", [False, True])
def test_same_value_and_gradient(dynamic):
    function = in_one_graph(divergence, "inductor", dynamic=dynamic)
    for rows in (8, 5) if dynamic else (8,):
        teacher, q = sides("p", rows)
        x, y = q.clone().requires_grad_(), q.clone().requires_grad_()
        value, expected = function(teacher, x), divergence(teacher, y)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        value.backward(), expected.backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(function(teacher, q), expected.detach(), rtol=1e-6, atol=0)


@compiled
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("which", ["p", "q", "both"])
def test_of_either_side_and_in_every_direction(which, direction):
    function, (p, q) = in_one_graph(divergence), sides(which)
    options = {"direction": direction, "weight": torch.tensor([1.0, 0.0, 2.0, 0.5]), "reduction": "none"}
    torch.testing.assert_close(function(p, q, **options), divergence(p, q, **options), rtol=1e-6, atol=0)


@compiled
def test_made_within_the_graph_with_gradients_on_both_sides():
    def loss(p, q):
        return divergence(top(p), q)

    p, q = (logits(4, CLASSES, seed=seed).requires_grad_() for seed in (0, 1))
    found = torch.autograd.grad(in_one_graph(loss)(p, q), (p, q))
    torch.testing.assert_close(found, torch.autograd.grad(loss(p, q), (p, q)), rtol=1e-5, atol=1e-9)


@compiled
def test_bounds_and_heads():
    p, q = sides("p")
    hidden, weight = logits(4, 3), logits(CLASSES, 3)

    def bounds(p, q):
        return kl_divergence_bounds(p, q, input_format="logits")

    torch.testing.assert_close(tuple(in_one_graph(bounds)(p, q)), tuple(bounds(p, q)), rtol=1e-6, atol=0)
    of_head = in_one_graph(lambda p, hidden: kl_divergence(p, Head(hidden, weight)))(p, hidden)
    torch.testing.assert_close(of_head, kl_divergence(p, Head(hidden, weight)), rtol=1e-5, atol=0)


@compiled
@pytest.mark.parametrize("which", ["p", "tensors"])
@pytest.mark.parametrize("kind", [KLDivergence, KLDivergenceSummary])
def test_in_an_update(kind, which):
    p, q = sides("p") if which == "p" else (logits(4, CLASSES), logits(4, CLASSES, seed=1))
    ours, usual = (kind(input_format="logits") for _ in range(2))

    def step(p, q):
        ours.update(p, q)
        return q + 1

    step = in_one_graph(step)
    for _ in range(2):
        step(p, q)
        usual.update(p, q)
    assert ours.update_count == 2
    torch.testing.assert_close(ours.compute(), usual.compute(), rtol=1e-6, atol=0)


@compiled
def test_what_would_have_to_look_at_the_data():
    p, q = sides("p")
    with pytest.raises(Exception, match="nan_strategy='error' must look at the data"):
        in_one_graph(divergence)(p, q, nan_strategy="error")

    def outside(values, indices, q):
        return divergence(TopK(values, indices, CLASSES), q, reduction="none")

    indices = p.indices.clone()
    indices[1, 2] = CLASSES  # an error, where there is something to look at
    assert in_one_graph(outside)(p.values, indices, q).isnan().tolist() == [False, True, False, False]


# ---- torch.func ------------------------------------------------------------------------------------------------------
P, Q = (logits(3, 4, 9, seed=seed, dtype=torch.float64) for seed in (0, 1))
VALUES, INDICES = P.log_softmax(-1).topk(3)


def rows(values, q):
    return divergence(TopK(values, INDICES[0], 9), q, reduction="none")


def by_autograd(function, *xs):
    xs = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(function(*xs).sum(), xs)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # how vmap lays it out is not ours
@pytest.mark.parametrize("which", ["p", "q", "both"])
def test_vmap_takes_it_as_it_stands(which):
    teachers, q = TopK(VALUES, INDICES, 9), top(Q, 4) if which == "both" else Q
    p, q = (q, teachers) if which == "q" else (teachers, q)
    expected = torch.stack([divergence(a, b) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(vmap(divergence)(p, q), expected, rtol=1e-12, atol=0)
    one = vmap(divergence, in_dims=(None, 0))(p[0], q)
    torch.testing.assert_close(one, torch.stack([divergence(p[0], b) for b in q]), rtol=1e-12, atol=0)


def test_vmap_of_bounds():
    def most(p, q):
        return kl_divergence_bounds(p, q, input_format="logits").at_most

    teachers = TopK(VALUES, INDICES, 9)
    expected = torch.stack([most(a, b) for a, b in zip(teachers, Q, strict=True)])
    torch.testing.assert_close(vmap(most)(teachers, Q), expected, rtol=1e-12, atol=0)


def test_derivatives():
    first = by_autograd(rows, VALUES[0], Q[0])
    by_func = grad(lambda values, q: rows(values, q).sum(), argnums=(0, 1))(VALUES[0], Q[0])
    torch.testing.assert_close(by_func, first, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(grad(divergence, argnums=1)(TopK(VALUES[0], INDICES[0], 9), Q[0]), first[1] / 4)
    for jacobian in (jacrev, jacfwd):
        of_rows = jacobian(rows, argnums=(0, 1))(VALUES[0], Q[0])
        torch.testing.assert_close(tuple(x.sum(0) for x in of_rows), first, rtol=1e-9, atol=1e-15)
    along = jvp(rows, (VALUES[0], Q[0]), (VALUES[1], Q[1]))[1]
    expected = (first[0] * VALUES[1]).sum(-1) + (first[1] * Q[1]).sum(-1)
    torch.testing.assert_close(along, expected, rtol=1e-9, atol=1e-15)
    second = hessian(lambda q: rows(VALUES[0], q).sum())(Q[0])
    by_hand = torch.autograd.functional.hessian(lambda q: rows(VALUES[0], q).sum(), Q[0])
    torch.testing.assert_close(second, by_hand, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_gradients(create_graph):
    values, q = VALUES[0].clone().requires_grad_(), Q[0].clone().requires_grad_()
    ways = torch.eye(4, dtype=torch.float64)
    found = torch.autograd.grad(rows(values, q), (values, q), ways, is_grads_batched=True, create_graph=create_graph)
    torch.testing.assert_close(found, jacrev(rows, argnums=(0, 1))(VALUES[0], Q[0]), rtol=1e-9, atol=1e-15)


def test_a_tree_of_it():
    teachers = TopK(VALUES, INDICES, 9, sampled=True)
    leaves, spec = _pytree.tree_flatten({"teacher": teachers})
    assert [x.shape for x in leaves] == [VALUES.shape, INDICES.shape]
    again = _pytree.tree_unflatten(leaves, spec)["teacher"]
    assert (again.classes, again.input_format, again.sampled) == (9, "log_probs", True)
