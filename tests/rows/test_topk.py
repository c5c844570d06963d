"""`TopK`: what is known of its rows, against sixty digits; what bounds it gives; and what it refuses."""

import math
import re
import sys
from contextlib import nullcontext

import mpmath
import pytest
import torch
import torch.distributions as D
from cases import DIRECTIONS, logits
from fuzz import kl_of_logs
from processes import alone, peak, peak_from_now
from reference import kl_of_row
from tails import KINDS, pairs, worst
from torch import Tensor

import klmetric
from klmetric import Head, KLDivergence, KLDivergenceSummary, TopK, kl_divergence, kl_divergence_bounds
from klmetric.rows import head as heads

ROWS = {"reduction": "none"}
LOGITS = {"input_format": "logits", **ROWS}


def top(x: Tensor, k: int, input_format: str = "log_probs") -> TopK:
    """The k likeliest classes of rows of logits."""
    values, indices = x.log_softmax(-1).topk(k)
    return TopK(values if input_format == "log_probs" else values.exp(), indices, x.shape[-1], input_format)


# ---- the bounds ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("input_format", ["log_probs", "probs"])
def test_lower_exact_upper(input_format):
    seen = dict.fromkeys(KINDS, 0)
    for kind, log_p, log_q, k in pairs(6600, at_once=25):
        p, q = (x if input_format == "log_probs" else x.exp() for x in (log_p, log_q))
        exact = kl_of_logs(*(x if input_format == "log_probs" else x.log() for x in (p, q)))
        teacher = TopK(p.gather(-1, log_p.topk(k).indices), log_p.topk(k).indices, p.shape[-1], input_format)
        low, high, tail = kl_divergence_bounds(teacher, q, input_format=input_format, **ROWS)
        assert (low <= exact * (1 + 1e-9) + 1e-13).all(), kind
        assert (exact * (1 - 1e-9) - 1e-13 <= high).all(), kind
        assert (low <= high).all(), kind
        true_tail = 1 - p.gather(-1, teacher.indices).exp().sum(-1) if input_format == "log_probs" else None
        if true_tail is not None:
            torch.testing.assert_close(tail, true_tail.clamp_min(0), rtol=0, atol=1e-14)
        seen[kind] += len(p)
    assert min(seen.values()) >= 600


@pytest.mark.parametrize("direction", ["reverse", "jeffreys", "jensen_shannon"])
@pytest.mark.parametrize("input_format", ["log_probs", "probs"])
def test_at_least_in_other_directions(direction, input_format):
    """Also where the tail of one side is next to nothing, which the divergence from it depends on."""
    for kind, log_p, log_q, k in pairs(3300, at_once=25):
        if input_format == "probs":  # some of which are 0 in float64
            log_p, log_q = (x.exp().log() for x in (log_p, log_q))
        q = log_q if input_format == "log_probs" else log_q.exp()
        values, indices = log_p.topk(k)
        teacher = TopK(values if input_format == "log_probs" else values.exp(), indices, log_p.shape[-1], input_format)
        if direction == "jensen_shannon":
            middle = torch.logaddexp(log_p, log_q) - math.log(2)
            exact = (kl_of_logs(log_p, middle) + kl_of_logs(log_q, middle)) / 2
        else:
            exact = kl_of_logs(log_q, log_p) + (kl_of_logs(log_p, log_q) if direction == "jeffreys" else 0)
        for pair in ((teacher, q), (q, teacher), (teacher, top(log_q, min(k + 1, log_q.shape[-1])))):
            its_exact = exact
            if direction == "reverse" and pair[0] is q:
                its_exact = kl_of_logs(log_p, log_q)
            value = kl_divergence(*pair, input_format=input_format, direction=direction, **ROWS)
            assert (value <= its_exact * (1 + 1e-9) + 1e-13).all(), kind


def test_both_bounds_are_reached():
    log_p, log_q = (logits(50, 12, seed=seed, dtype=torch.float64).log_softmax(-1) for seed in (0, 1))
    values, indices = log_p.topk(4)
    teacher = TopK(values, indices, 12)
    low, high, _ = kl_divergence_bounds(teacher, log_q, input_format="log_probs", **ROWS)
    is_kept = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, indices, True)
    within = log_q.masked_fill(is_kept, -math.inf).log_softmax(-1)
    like_q = torch.where(is_kept, log_p, within + log_p.masked_fill(is_kept, -math.inf).logsumexp(-1, keepdim=True))
    torch.testing.assert_close(kl_of_logs(like_q, log_q), low, rtol=1e-12, atol=0)
    worst_p = torch.stack([worst(a, b, 4) for a, b in zip(log_p, log_q, strict=True)])
    torch.testing.assert_close(kl_of_logs(worst_p, log_q), high, rtol=1e-12, atol=0)


def test_of_rows_in_full_both_bounds_are_the_divergence():
    p, q = logits(5, 7), logits(5, 7, seed=1)
    exact = kl_divergence(p, q, **LOGITS)
    low, high, tail = kl_divergence_bounds(p, q, **LOGITS)
    assert torch.equal(low, exact)
    torch.testing.assert_close(high, exact, rtol=1e-6, atol=0)
    assert not tail.any()
    low, high, tail = kl_divergence_bounds(top(p, 7), q, **LOGITS)  # k is all of them
    torch.testing.assert_close(low, exact, rtol=1e-6, atol=1e-13)
    assert torch.equal(low, high)
    assert not tail.any()


@pytest.mark.parametrize("swapped", [False, True])
def test_of_a_student_with_k_classes_there_is_no_upper_bound(swapped):
    p, q = logits(5, 7), logits(5, 7, seed=1)
    low, high, tail = kl_divergence_bounds(top(p, 3) if swapped else p, top(q, 3), **LOGITS)
    assert (high == math.inf).all()
    assert (low <= kl_divergence(p, q, **LOGITS)).all()
    is_known = top(q, 3).indices.unsqueeze(-1) == torch.arange(7)
    if swapped:  # of both, the classes that both know
        is_known = is_known.any(1) & (top(p, 3).indices.unsqueeze(-1) == torch.arange(7)).any(1)
    else:
        is_known = is_known.any(1)
    of_rest = (p if swapped else q).softmax(-1).masked_fill(is_known, 0).sum(-1)
    torch.testing.assert_close(tail, of_rest, rtol=1e-5, atol=0)


def test_values_that_are_not_the_likeliest_have_no_upper_bound():
    q = torch.full((1, 4), 0.25)
    of = torch.tensor([[0.6, 0.01]]), torch.tensor([[0, 1]])  # the other two have 0.39, more than 0.01 each
    with pytest.warns(
        UserWarning, match="leaves 0.39 to 2 other classes, and its least value is 0.01. Is the first col"
    ):
        assert kl_divergence_bounds(TopK(*of, 4, "probs"), q).at_most == math.inf


def test_a_line_says_what_it_is():
    top = logits(4, 3, 9).log_softmax(-1).topk(2)
    assert repr(TopK(*top, 9)) == "TopK(2 classes of each row, of shape (4, 3, 9), log_probs, torch.float32, cpu)"
    assert "of shape (4, 3, 9), probs, sampled, torch" in repr(TopK(*top, 9, "probs", sampled=True))


def test_a_drawn_token_is_none_of_the_likeliest():
    p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.2, 0.26, 0.03, 0.01]], dtype=torch.float64)
    exact = kl_divergence(p, q)
    indices = torch.tensor([[4, 0, 1]])  # the drawn one, and the two likeliest
    values = p.gather(-1, indices)
    bounds = kl_divergence_bounds(TopK(values, indices, 5, "probs", sampled=True), q)
    assert bounds.at_least <= exact <= bounds.at_most < math.inf
    with pytest.warns(UserWarning, match="sampled=True"):
        assert kl_divergence_bounds(TopK(values, indices, 5, "probs"), q).at_most == math.inf  # 0.05 would be the cap
    among = torch.tensor([[1, 0, 1]])
    twice = TopK(p.gather(-1, among), among, 5, "probs", sampled=True)
    once = TopK(p[:, :2], torch.tensor([[0, 1]]), 5, "probs")
    assert kl_divergence_bounds(twice, q) == kl_divergence_bounds(once, q)


def test_reductions_weights_and_units_of_the_bounds():
    p, q = logits(4, 3, 9), logits(4, 3, 9, seed=1)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    q[1] = math.nan
    rows = kl_divergence_bounds(top(p, 4), q, weight=weight, **LOGITS)
    bits = kl_divergence_bounds(top(p, 4), q, weight=weight, input_format="logits", base=2)
    for name, unit in (("at_least", math.log(2)), ("at_most", math.log(2)), ("tail_mass", 1.0)):
        of_rows = getattr(rows, name)
        assert of_rows.shape == (4, 3)
        assert not of_rows[1].any()
        mean = (of_rows * weight.unsqueeze(-1)).sum() / (3 * weight.sum())
        torch.testing.assert_close(getattr(bits, name), mean / unit, rtol=1e-6, atol=0)
    batch = kl_divergence_bounds(top(p, 4), q, weight=weight, input_format="logits", reduction="batchmean")
    torch.testing.assert_close(batch.at_most, (rows.at_most * weight.unsqueeze(-1)).sum() / weight.sum())
    with pytest.warns(UserWarning, match="3 of 12 rows were no distributions and were left out"):
        ignored = kl_divergence_bounds(top(p, 4), q, input_format="logits", nan_strategy="ignore", reduction="none")
    assert not ignored.at_most[1].any()
    with pytest.warns(UserWarning, match="3 of 12 rows were no distributions and make the result NaN"):
        assert all(x.isnan() for x in kl_divergence_bounds(top(p, 4), q, input_format="logits"))


# ---- the coarse pair -------------------------------------------------------------------------------------------------
def coarse(x: Tensor | TopK, kept: set[int], input_format: str) -> list[mpmath.mpf]:
    """One row in sixty digits: the kept classes in order, and all others together."""
    if isinstance(x, TopK):
        values = [mpmath.mpf(v) for v in x.values.double().tolist()]
        probs = values if x.input_format == "probs" else [mpmath.exp(v) for v in values]
        known = {i: v for i, v in zip(x.indices.tolist(), probs, strict=True) if i >= 0}
        single = [known[i] for i in sorted(kept)]
        return [*single, 1 - mpmath.fsum(single)]
    values = [mpmath.mpf(v) for v in x.double().tolist()]
    probs = values if input_format == "probs" else [mpmath.exp(v) for v in values]
    total = mpmath.fsum(probs)
    rest = mpmath.fsum(v for i, v in enumerate(probs) if i not in kept)
    return [*(probs[i] / total for i in sorted(kept)), rest / total]


def expected(p: Tensor | TopK, q: Tensor | TopK, direction: str, input_format: str) -> float:
    sides = [{i for i in x.indices.tolist() if i >= 0} for x in (p, q) if isinstance(x, TopK)]
    kept = set.intersection(*sides)
    a, b = (coarse(x, kept, input_format) for x in (p, q))

    def kl(a, b):
        return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b, strict=True) if x)

    middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    return float(
        {
            "forward": lambda: kl(a, b),
            "reverse": lambda: kl(b, a),
            "jeffreys": lambda: kl(a, b) + kl(b, a),
            "jensen_shannon": lambda: (kl(a, middle) + kl(b, middle)) / 2,
        }[direction]()
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("sides", ["p", "q", "both"])
@pytest.mark.parametrize("input_format", ["log_probs", "probs"])
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6])
def test_near_equal_models_keep_their_digits(direction, sides, input_format, distance):
    p = 2 * logits(4, 40, dtype=torch.float64)
    q = p + distance * logits(4, 40, seed=1, dtype=torch.float64)
    q = q - 30  # logits are not normalised
    p, q = (top(x, 10, input_format) if sides in (side, "both") else x for side, x in zip("pq", (p, q), strict=True))
    if sides != "both" and input_format == "probs":
        p, q = (x if isinstance(x, TopK) else x.softmax(-1) for x in (p, q))
    full = "logits" if input_format == "log_probs" else "probs"
    values = kl_divergence(p, q, input_format=full, direction=direction, **ROWS)
    for i, value in enumerate(values):
        true = expected(p[i], q[i], direction, full)
        assert value.item() == pytest.approx(true, rel=1e-6, abs=1e-19), (true, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [50, 40_000])
def test_lower_precision_is_taken_as_it_stands(dtype, classes):
    p = 2 * logits(2, classes)
    q = (p + 0.1 * logits(2, classes, seed=1)).to(dtype)
    teacher = top(p, 20)
    for i, value in enumerate(kl_divergence(teacher, q, **LOGITS)):
        assert value.item() == pytest.approx(expected(teacher[i], q[i], "forward", "logits"), rel=1e-6)


def test_classes_that_one_side_knows_go_to_the_tail():
    p = TopK(torch.tensor([[0.5, 0.25, 0.125]]), torch.tensor([[0, 1, 2]]), 8, "probs")
    q = TopK(torch.tensor([[0.125, 0.5]]).log(), torch.tensor([[3, 1]]), 8)
    merged = kl_of_row(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5]))  # class 1, and all others
    torch.testing.assert_close(kl_divergence(p, q).item(), merged, rtol=1e-6, atol=0)
    assert kl_divergence(p, TopK(q.values[:, :1], q.indices[:, :1], 8)) == 0  # nothing in common


def test_order_padding_and_duplicates_change_nothing():
    p, q = logits(6, 30), logits(6, 30, seed=1)
    teacher = top(p, 5)
    true = kl_divergence(teacher, q, **LOGITS)
    order = torch.tensor([4, 0, 3, 1, 2])
    values, indices = teacher.values[:, order], teacher.indices[:, order]
    assert torch.equal(kl_divergence(TopK(values, indices, 30), q, **LOGITS), true)
    for padding in (math.nan, 0.0, 7.0, -math.inf):
        more = torch.cat([torch.full((6, 2), padding), values, values[:, 2:3]], 1)
        where = torch.cat([torch.tensor([[-1, -100]]).expand(6, 2), indices, indices[:, 2:3]], 1)
        torch.testing.assert_close(kl_divergence(TopK(more, where, 30), q, **LOGITS), true, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            kl_divergence(q, TopK(more, where, 30), **LOGITS), kl_divergence(q, teacher, **LOGITS)
        )


def test_k_may_differ_by_row():
    p, q = logits(3, 30), logits(3, 30, seed=1)
    full = top(p, 5)
    indices = full.indices.clone()
    indices[1, 3:] = -1
    value = kl_divergence(TopK(full.values, indices, 30), q, **LOGITS)
    torch.testing.assert_close(value[[0, 2]], kl_divergence(full, q, **LOGITS)[[0, 2]], rtol=1e-6, atol=0)
    torch.testing.assert_close(value[1], kl_divergence(top(p, 3), q, **LOGITS)[1], rtol=1e-6, atol=0)


def test_a_row_is_the_same_in_any_batch_and_however_it_lies():
    p, q = 2 * logits(40, 3, 20_000), 2 * logits(40, 3, 20_000, seed=1)
    teacher = top(p, 20)
    together = kl_divergence(teacher, q, **LOGITS)
    for rows in (slice(7, 8), slice(3, 20)):
        assert torch.equal(kl_divergence(teacher[rows], q[rows], **LOGITS), together[rows])
    turned = q.movedim(-1, 1).contiguous()
    assert torch.equal(kl_divergence(teacher, turned, dim=1, **LOGITS), together)
    padded = torch.cat([q, torch.full((40, 3, 7), 50.0)], -1)
    assert torch.equal(kl_divergence(teacher, padded, classes=20_000, **LOGITS), together)
    lone = kl_divergence(teacher[4][1], q[4, 1], **LOGITS)
    assert torch.equal(lone, together[4, 1])


def test_the_number_of_threads_does_not_matter():
    p, q = 2 * logits(7, 40_000), (2 * logits(7, 40_000, seed=1)).double().softmax(-1)
    teacher, threads = top(p, 20), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            one_by_one = [kl_divergence(*row, **ROWS) for row in zip(teacher.split(1), q.split(1), strict=True)]
            found += [kl_divergence(teacher, q, **ROWS), torch.cat(one_by_one)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_from_0(dtype):
    """Whose exponentials are no numbers, in rows beside others."""
    p = logits(6, 30, dtype=dtype)
    q = p + 0.5 * logits(6, 30, seed=1, dtype=dtype)
    teacher = top(p, 5)
    q = q + torch.tensor([0.0, 600.0, 1e4, -600.0, -1e4, 0.0], dtype=dtype).unsqueeze(-1)
    q[5] = q[5].where(torch.isin(torch.arange(30), teacher.indices[5]), q[5] - 700)  # its tail is next to nothing
    values = kl_divergence(teacher, q, **LOGITS)
    for i, value in enumerate(values):
        assert value.item() == pytest.approx(expected(teacher[i], q[i], "forward", "logits"), rel=1e-6)
        assert torch.equal(kl_divergence(teacher[i], q[i], **LOGITS), value)
    q = q.requires_grad_()
    kl_divergence(teacher, q, input_format="logits", reduction="sum").backward()
    tail = 1 - teacher.values.double().exp().sum(-1, keepdim=True)
    is_known = torch.zeros(6, 30, dtype=torch.bool).scatter(-1, teacher.indices, True)
    shares = q.detach().double().masked_fill(is_known, -math.inf).softmax(-1)
    of_p = (tail * shares).scatter(-1, teacher.indices, teacher.values.double().exp())
    by_hand = q.detach().double().softmax(-1) - of_p
    torch.testing.assert_close(q.grad.double(), by_hand, rtol=1e-4, atol=2e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("input_format", ["probs", "logits"])
def test_bounds_of_a_row_are_the_same_in_any_batch(input_format):
    scale = logits(300, 1, seed=2).exp()  # flat and peaked ones, whose tails fill more classes or fewer
    p, q = scale * logits(300, 500), logits(300, 500, seed=1).double().log_softmax(-1)
    teacher, q = top(p, 10), q.exp() if input_format == "probs" else q
    given = {"input_format": input_format, "reduction": "none"}
    together = kl_divergence_bounds(teacher, q, **given)
    for k in range(0, 300, 7):
        alone = kl_divergence_bounds(teacher[k : k + 1], q[k : k + 1], **given)
        assert [x.item() for x in alone] == [x[k].item() for x in together]


def test_rounding_in_a_tail_makes_nothing_infinite():
    p = torch.tensor([[20.0, 10.0, -10.0, -10.0]])
    q = torch.tensor([[20.0, 10.0, -math.inf, -math.inf]])
    for a, b in ((top(p, 2), q), (p.double(), top(q, 2).to(torch.float64)), (top(p, 2), top(q, 2))):
        assert kl_divergence(a, b, input_format="logits") < 1e-6
    assert kl_divergence(top(torch.zeros(1, 4), 2), q, input_format="logits") == math.inf  # half of p is there
    # What rounding may have hidden counts in the upper bound.
    assert kl_divergence_bounds(top(p, 2), q, input_format="logits").at_most == math.inf


# ---- rows that are no distributions ----------------------------------------------------------------------------------
FAULTS = {
    "too much": ([0.9, 0.3], [0, 1], "has probabilities that add up to 1.2, which is more than 1"),
    "nan": ([0.5, math.nan], [0, 1], "has NaN"),
    "negative": ([0.5, -0.1], [0, 1], "has a negative probability"),
    "two values": ([0.5, 0.4], [3, 3], "has two values of one class"),
    "padding alone": ([0.5, 0.4], [-1, -1], "has padding alone: no class is known"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("side", ["p", "q"])
def test_rows_that_are_no_distributions(name, side):
    values, indices, text = FAULTS[name]
    top2 = TopK(torch.tensor([[0.5, 0.25], values]), torch.tensor([[0, 1], indices]), 4, "probs")
    full = torch.full((2, 4), 0.25)
    p, q = (top2, full) if side == "p" else (full, top2)
    with pytest.warns(UserWarning, match="1 of 2 rows were no distributions"):
        value = kl_divergence(p, q, **ROWS)
    assert value.isnan().tolist() == [False, True]
    assert kl_divergence(p, q, weight=torch.tensor([1, 0])) == value[0]
    with pytest.raises(ValueError, match=re.escape(f"the first is row 1: `{side}` {text}.")):
        kl_divergence(p, q, nan_strategy="error")


@pytest.mark.parametrize(
    ("values", "is_valid"), [([0.6, 0.4004], True), ([0.6, 0.402], False), ([1.0, 1e-8], True)], ids=str
)
def test_a_sum_above_1_by_rounding_alone(values, is_valid):
    teacher = TopK(torch.tensor([values]), torch.tensor([[0, 1]]), 3, "probs")
    with nullcontext() if is_valid else pytest.warns(UserWarning, match="1 of 1 rows were no distributions"):
        value, _, tail = kl_divergence_bounds(teacher, torch.tensor([[0.5, 0.4, 0.1]]))
    assert value.isnan() != is_valid
    assert tail < 1e-6 or not is_valid


def test_bad_rows_in_full_beside_a_top_k():
    q = logits(4, 9)
    q[1, 8], q[2, 0], q[3] = math.nan, math.inf, -math.inf
    with pytest.warns(UserWarning, match="3 of 4 rows"):
        assert kl_divergence(top(logits(4, 9, seed=1), 3), q, **LOGITS).isnan().tolist() == [False, True, True, True]
    q = torch.full((2, 9), 1 / 8)
    q[1, 8] = -0.1  # in the tail
    teacher = TopK(torch.full((2, 1), 0.5), torch.zeros(2, 1, dtype=torch.int64), 9, "probs")
    with pytest.raises(ValueError, match=r"row 1: `q` has a negative probability at class 8 \(-0.1\)"):
        kl_divergence(teacher, q, nan_strategy="error")


# ---- errors ----------------------------------------------------------------------------------------------------------
V, C = torch.tensor([[0.5, 0.25]]), torch.tensor([[0, 1]])
REFUSED = {
    "logits": (
        (V, C, 4, "logits"), ValueError,
        "`input_format` of a TopK must be 'log_probs' or 'probs'. Got 'logits': what normalises them is a sum"
        " over all classes, of which k are known. Take logits.log_softmax(-1).topk(k), in this order.",
    ),
    "format": (
        (V, C, 4, "log_prob"), ValueError,
        "`input_format` must be one of 'log_probs', 'probs'. Got 'log_prob'. Did you mean 'log_probs'?",
    ),
    "list": (([[0.5]], C, 4), TypeError, "`values` must be a torch.Tensor. Got list. Convert it with torch.as_tensor."),
    "swapped": (
        (C, V, 4), TypeError,
        "`values` must be float16, bfloat16, float32 or float64. Got torch.int64. Are `values` and `indices` in"
        " the right order?",
    ),
    "float indices": (
        (V, C.float(), 4), TypeError,
        "`indices` must be integers, the numbers of classes. Got torch.float32. Convert it with .long().",
    ),
    "shapes": (
        (V, C[:, :1], 4), ValueError,
        "`indices` must have the shape of `values`. Got values (1, 2) and indices (1, 1). Are both of the same"
        " topk?",
    ),
    "no axis": (
        (V[0, 0], C[0, 0], 4), ValueError,
        "`values` must have a last axis of k classes, at least 1. Got shape ().",
    ),
    "no classes": (
        (V[:, :0], C[:, :0], 4), ValueError,
        "`values` must have a last axis of k classes, at least 1. Got shape (1, 0).",
    ),
    "outside": (
        (V, C + 3, 4), ValueError,
        "`indices` must be classes, from 0 to 3, or negative for padding. Got 4. Are there more `classes`, those"
        " of another vocabulary, or padding by another number?",
    ),
    "float classes": (
        (V, C, 4.0), TypeError,
        "`classes` must be an int, how many classes there are (the vocabulary). Got 4.0.",
    ),
    "0 classes": ((V, -C - 1, 0), ValueError, "`classes` must be how many classes there are, at least 1. Got 0."),
    "sampled": ((V, C, 4, "probs", 1), TypeError, "`sampled` must be a bool. Got 1."),
    "device": (
        (V, C.to("meta"), 4), ValueError,
        "`values` and `indices` must share a device. Got values on cpu and indices on meta. Use"
        " indices.to(values.device).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_top_k(name):
    arguments, kind, text = REFUSED[name]
    with pytest.raises(kind, match=re.escape(text)):
        TopK(*arguments)


TEACHER, Q = TopK(V, C, 4, "probs"), torch.full((1, 4), 0.25)
BAD = {
    "temperature": (
        {"temperature": 2.0}, TEACHER, Q, ValueError,
        "`temperature` must be 1 with a TopK: what normalises at another temperature is a sum over all classes,"
        " of which k are known. Got 2. Have the teacher give log-probabilities at that temperature.",
    ),
    "eps": (
        {"eps": 1e-9}, TEACHER, Q, ValueError,
        "`eps` must be 0 with a TopK: a floor is under single classes, and the tail is many, of which k are"
        " known. Got 1e-09.",
    ),
    "distribution": (
        {}, TEACHER, D.Categorical(Q), TypeError,
        "`q` must be a tensor or a TopK where the other one is a TopK. Got Categorical. Give its `logits`, with"
        " input_format='logits'.",
    ),
    "list": (
        {}, Q.tolist(), TEACHER, TypeError,
        "`p` must be a torch.Tensor or a torch.distributions.Distribution. Got list.",
    ),
    "integers": (
        {}, TEACHER, Q.long(), TypeError,
        "`q` must hold floating-point probabilities, log-probabilities or logits. Got torch.int64",
    ),
    "shape": (
        {}, TEACHER, torch.full((1, 5), 0.2), ValueError,
        "`q` must have the shape of `p`, with all classes. Got p (1, 4) and q (1, 5). Where one has padding"
        " behind its classes, say how many there are with `classes`.",
    ),
    "batch": ({}, TEACHER, Q.expand(2, 4), ValueError, "Got p (1, 4) and q (2, 4)."),
    "axis": ({"dim": 2}, TEACHER, Q, ValueError, "`dim` must be an axis of the input. Got dim=2 for shape (1, 4)."),
    "classes": (
        {"classes": 3}, TEACHER, Q, ValueError,
        "`classes` must be that of the TopK, whose probabilities cannot be normalised again. Got classes=3, and"
        " `p` has 4.",
    ),
    "device": (
        {}, TEACHER, Q.to("meta"), ValueError,
        "`p` and `q` must share a device. Got p on cpu, q on meta. Use q.to(p.device).",
    ),
    "weight": ({"weight": torch.ones(2)}, TEACHER, Q, ValueError, "Got weight (2,) for batch shape (1,)."),
    "targets": (
        {"targets": torch.tensor([4])}, TEACHER, Q, ValueError,
        "`targets` must be classes, from 0 to 3, or ignore_index=-100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_pair(name):
    options, p, q, kind, text = BAD[name]
    with pytest.raises(kind, match=re.escape(text)):
        kl_divergence(p, q, **options)


@pytest.mark.parametrize("option", ["measures", "perplexity"])
def test_what_else_a_summary_measures_needs_rows_in_full(option):
    metric = KLDivergenceSummary(**{option: True})
    targets = torch.tensor([0]) if option == "perplexity" else None
    with pytest.raises(ValueError, match=r"`measures` and `perplexity` must have p and q in full. Got a TopK"):
        metric.update(TEACHER, Q, targets=targets)
    assert metric.update_count == 0


# ---- beside a head ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("swapped", [False, True])
def test_beside_a_head(swapped):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    head, full, teacher = Head(hidden, weight), hidden @ weight.T, top(logits(3, 5, 40), 6)
    rows = torch.tensor([1, 0, 2])
    a, b = ((head, teacher), (full, teacher)) if swapped else ((teacher, head), (teacher, full))
    value = kl_divergence(*a, reduction="none", weight=rows)
    torch.testing.assert_close(value, kl_divergence(*b, weight=rows, **LOGITS), rtol=1e-5, atol=0)
    summaries = KLDivergenceSummary(bounds=True), KLDivergenceSummary(input_format="logits", bounds=True)
    for summary, pair in zip(summaries, (a, b), strict=True):
        summary.update(*pair, weight=rows)
    of_head, of_full = (summary.compute() for summary in summaries)
    for name in ("at_least", "at_most", "tail_mass", "agreement"):
        torch.testing.assert_close(of_head[name], of_full[name], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="`temperature` must be 1 with a TopK"):
        kl_divergence(*a, temperature=2.0)
    with pytest.raises(ValueError, match="`classes` must be that of the TopK"):
        kl_divergence(*a, classes=30)


def test_a_head_learns_from_it():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator, requires_grad=True)
    teacher = top(logits(5, 40), 6)
    (of_head,) = torch.autograd.grad(kl_divergence(teacher, Head(hidden, weight)), weight)
    (of_full,) = torch.autograd.grad(kl_divergence(teacher, hidden @ weight.T, input_format="logits"), weight)
    torch.testing.assert_close(of_head, of_full)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("swapped", [False, True])
def test_gradients_of_both_sides_beside_a_head(swapped, direction, monkeypatch):
    monkeypatch.setattr(heads, "rows_at_once", lambda classes: 4)
    hidden, weight = (logits(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 5, 8), (40, 8)))
    values, indices = logits(3, 5, 40, seed=1, dtype=torch.float64).log_softmax(-1).topk(6)
    teacher, of_rows = TopK(values.requires_grad_(), indices, 40), torch.tensor([1.0, 0.0, 2.0])

    def gradients(student):
        pair = (student, teacher) if swapped else (teacher, student)
        value = kl_divergence(*pair, input_format="logits", direction=direction, weight=of_rows)
        return torch.autograd.grad(value, (values, hidden, weight))

    found = gradients(Head(hidden, weight))
    assert found[0][[0, 2]].any()
    torch.testing.assert_close(found, gradients(hidden @ weight.T), rtol=1e-9, atol=1e-15)


# ---- gradients -------------------------------------------------------------------------------------------------------
def test_by_the_formula():
    """The tails have their gradients, through the values of p and through all classes of q."""
    q = logits(4, 9, dtype=torch.float64).requires_grad_()
    values, indices = logits(4, 9, seed=1, dtype=torch.float64).log_softmax(-1).topk(3)
    values.requires_grad_()
    is_known = torch.zeros(4, 9, dtype=torch.bool).scatter(-1, indices, True)
    log_q, tail = q.log_softmax(-1), 1 - values.exp().sum(-1)
    others = log_q.masked_fill(is_known, -math.inf).logsumexp(-1)
    formula = (values.exp() * (values - log_q.gather(-1, indices))).sum(-1) + tail * (tail.log() - others)
    by_hand = torch.autograd.grad(formula.mean(), (values, q))
    found = torch.autograd.grad(kl_divergence(TopK(values, indices, 9), q, input_format="logits"), (values, q))
    torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_format", ["logits", "probs"])
def test_gradients_of_lower_precision(dtype, input_format):
    x = 2 * logits(6, 30, seed=1)
    q = (x.softmax(-1) if input_format == "probs" else x).to(dtype)
    teacher = top(logits(6, 30), 5)
    grads = []
    for student in (q.clone(), q.double()):
        student.requires_grad_()
        kl_divergence(teacher, student, input_format=input_format).backward()
        assert student.grad.dtype == student.dtype
        grads.append(student.grad.double())
    torch.testing.assert_close(*grads, rtol=4 * torch.finfo(dtype).eps, atol=2e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("input_format", ["logits", "log_probs", "probs"])
@pytest.mark.parametrize("sides", ["p", "q", "both"])
def test_first_and_second_derivatives(direction, input_format, sides):
    x, y = (logits(2, 6, seed=seed, dtype=torch.float64).log_softmax(-1) for seed in (0, 1))
    x, y = (z.exp() if input_format == "probs" else z for z in (x, y))
    form = "probs" if input_format == "probs" else "log_probs"
    inputs, makes = [], []
    for side, z in zip("pq", (x, y), strict=True):
        if sides in (side, "both"):
            values, indices = z.topk(3)
            inputs.append(values.clone().requires_grad_())
            makes.append(lambda v, indices=indices: TopK(v, indices, 6, form))
        else:
            inputs.append(z.clone().requires_grad_())
            makes.append(lambda v: v)

    def rows(*xs):
        p, q = (make(v) for make, v in zip(makes, xs, strict=True))
        return kl_divergence(p, q, direction=direction, input_format=input_format, **ROWS)

    assert torch.autograd.gradcheck(rows, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rows, inputs)


def test_a_row_that_does_not_count_has_no_gradient():
    q = logits(4, 9)
    q[1, 3] = math.nan
    q[2] = -math.inf
    q.requires_grad_()
    teacher = top(logits(4, 9, seed=1), 3)
    kl_divergence(teacher, q, input_format="logits", weight=torch.tensor([1, 0, 0, 1])).backward()
    assert not q.grad[1:3].any()
    alone = q.detach()[[0, 3]].requires_grad_()
    kl_divergence(teacher[[0, 3]], alone, input_format="logits").backward()
    torch.testing.assert_close(q.grad[[0, 3]], alone.grad)


def test_padding_has_no_gradient():
    teacher, q = top(logits(4, 9), 3), logits(4, 9, seed=1).requires_grad_()
    pad = torch.full((4, 2), math.nan), torch.full((4, 2), -1)
    padded = TopK(*(torch.cat(both, -1) for both in zip((teacher.values, teacher.indices), pad, strict=True)), 9)
    (found,) = torch.autograd.grad(kl_divergence(padded, q, input_format="logits"), q)
    (expected,) = torch.autograd.grad(kl_divergence(teacher, q, input_format="logits"), q)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_a_student_learns_from_it():
    teacher, student = logits(8, 50), torch.zeros(8, 50, requires_grad=True)
    optimizer = torch.optim.Adam([student], 0.1)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = kl_divergence(top(teacher, 10), student, input_format="logits")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 100


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_torch_func():
    teacher, q = top(logits(3, 9), 3), logits(3, 9, seed=1)
    one = torch.func.grad(lambda x: kl_divergence(teacher, x, input_format="logits"))(q)
    x = q.clone().requires_grad_()
    kl_divergence(teacher, x, input_format="logits").backward()
    torch.testing.assert_close(one, x.grad)


# ---- in the metrics --------------------------------------------------------------------------------------------------
def test_metrics_take_it_in_batches():
    p, q = logits(12, 5, 40), logits(12, 5, 40, seed=1)
    weight = (torch.arange(60).reshape(12, 5) % 4).float()
    teacher = top(p, 6)
    rows = kl_divergence_bounds(teacher, q, weight=weight, **LOGITS)
    metric = KLDivergence(input_format="logits")
    summary = KLDivergenceSummary(input_format="logits", bounds=True, top=2, quantiles=(0.5, 0.9))
    halves = [summary.clone(), summary.clone()]
    for i in range(0, 12, 3):
        batch = slice(i, i + 3)
        metric.update(teacher[batch], q[batch], weight[batch])
        summary.update(teacher[batch], q[batch], weight[batch])
        halves[i > 5].update(teacher[batch], q[batch], weight[batch])
    values = summary.compute()
    mean = (rows.at_least.double() * weight).sum() / weight.sum()
    torch.testing.assert_close(metric.compute(), mean.float(), rtol=1e-6, atol=0)
    assert values["mean"] == values["at_least"] == metric.compute()
    torch.testing.assert_close(values["at_most"], (rows.at_most * weight).sum() / weight.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(values["tail_mass"], (rows.tail_mass * weight).sum() / weight.sum(), rtol=1e-6, atol=0)
    counted = rows.tail_mass[weight > 0]
    for name, q_ in (("tail_mass_p50", 0.5), ("tail_mass_p90", 0.9)):
        torch.testing.assert_close(values[name], counted.quantile(q_), rtol=0.02, atol=0)
    assert values["tail_mass_max"] == counted.max()
    assert values["agreement"] == (p.argmax(-1) == q.argmax(-1))[weight > 0].float().mean()
    assert values["count"] == 45
    halves[0].merge_state(halves[1])
    assert halves[0].compute() == values
    assert summary["at_most"].compute() == values["at_most"]


def test_a_summary_of_rows_in_full_has_bounds_as_well():
    p, q = logits(5, 9), logits(5, 9, seed=1)
    summary = KLDivergenceSummary(input_format="logits", bounds=True, measures=True)
    summary.update(p, q)
    values = summary.compute()
    torch.testing.assert_close(values["at_most"], values["mean"])
    assert values["tail_mass"] == values["tail_mass_max"] == 0
    assert values["reverse"] > 0


def test_the_bounds_of_other_directions_are_refused():
    text = "`direction` must be 'forward' with bounds=True. Got 'reverse': of the others there is no upper bound."
    with pytest.raises(ValueError, match=re.escape(text)):
        KLDivergenceSummary(direction="reverse", bounds=True)
    with pytest.raises(TypeError, match=r"`bounds` must be a bool. Got 1"):
        KLDivergenceSummary(bounds=1)


@pytest.mark.parametrize("input_format", ["logits", "probs"])
def test_agreement_where_classes_are_equally_likely(input_format):
    """Of equals the first one counts, among the known ones and among the others."""
    teacher = TopK(torch.tensor([[0.5, 0.25]]).expand(5, 2), torch.tensor([[3, 1]]).expand(5, 2), 6, "probs")
    likeliest = ([3], [2, 3], [3, 5], [1, 3], [4])  # of q, in each row
    q = torch.ones(5, 6)
    for row, classes in zip(q, likeliest, strict=True):
        row[classes] = 4
    summary = KLDivergenceSummary(input_format=input_format)
    rows = [summary(teacher[i : i + 1], q[i : i + 1])["agreement"].item() for i in range(5)]
    assert rows == [classes[0] == 3 for classes in likeliest]
    assert summary.compute()["agreement"] == pytest.approx(2 / 5)


def test_targets_leave_rows_out():
    p, q = logits(3, 9), logits(3, 9, seed=1)
    teacher = top(p, 4)
    value = kl_divergence(teacher, q, input_format="logits", targets=torch.tensor([1, -100, 8]))
    torch.testing.assert_close(value, kl_divergence(teacher, q, **LOGITS)[[0, 2]].mean())


def test_it_moves_and_counts_like_a_tensor():
    teacher = TopK(torch.zeros(3, 5, 2, dtype=torch.float64), torch.zeros(3, 5, 2, dtype=torch.int32), 7)
    assert teacher.shape == (3, 5, 7)
    assert len(teacher) == teacher.ndim == 3
    moved = teacher.to("meta", torch.float32)
    assert (moved.device.type, moved.indices.device.type, moved.values.dtype) == ("meta", "meta", torch.float32)
    assert moved.indices.dtype == torch.int32
    assert teacher[1:].shape == (2, 5, 7)
    assert klmetric.TopK is TopK


def _update(rank: int, size: int, p: Tensor, q: Tensor) -> dict[str, Tensor]:
    metric = KLDivergenceSummary(input_format="logits", bounds=True)
    teacher, share = top(p, 6), slice(rank * 7 // size, (rank + 1) * 7 // size)
    if rank or size == 2:  # of three, the first has none
        metric.update(teacher[share], q[share])
    return metric.compute()


def test_over_processes(processes):
    p, q = logits(7, 5, 40), logits(7, 5, 40, seed=1)
    start = 7 // 3 if processes.size == 3 else 0
    expected = KLDivergenceSummary(input_format="logits", bounds=True)
    expected.update(top(p, 6)[start:], q[start:])
    for values in processes(_update, p, q):
        assert values == expected.compute()


# ---- memory ----------------------------------------------------------------------------------------------------------
def most_memory(call: str) -> tuple[float, float]:
    """MiB beyond the inputs, and of q."""
    q = torch.randn(512, 128_256)
    teacher = top(q[:, :1000], 20)
    teacher = TopK(teacher.values, teacher.indices, 128_256)
    weight = torch.ones(512).index_fill(0, torch.tensor([3]), 0)

    def run(teacher: TopK, q: Tensor, weight: Tensor) -> None:
        options = {"input_format": "logits", "weight": weight}
        if call == "backward":
            kl_divergence(teacher, q.requires_grad_(), **options).backward()
        elif call == "summary":
            KLDivergenceSummary(input_format="logits").update(teacher, q, weight)
        else:
            pair = (q, teacher) if call == "reverse" else (teacher, q)
            kl_divergence(*pair, **options)

    run(teacher[:2], q[:2].clone(), weight[:2])
    before = peak_from_now()
    run(teacher, q, weight)
    return peak() - before, q.numel() * q.element_size() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("call", ["forward", "reverse", "summary", "backward"])
def test_memory(call):
    memory, of_q = alone(most_memory, call)
    gradient = of_q if call == "backward" else 0
    assert gradient <= memory < gradient + 16
