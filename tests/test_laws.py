"""The laws of the divergence, for inputs that nobody chose."""

import math

import pytest
import torch
from cases import DIRECTIONS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from klmetric import KLDivergence, kl_divergence

settings.register_profile("klmetric", deadline=None, max_examples=150, derandomize=True)
settings.load_profile("klmetric")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:With one class")]

ONE_TO = {n: st.integers(1, n) for n in range(1, 9)}
FINITE = st.floats(-50, 50, width=32)
LOGIT = FINITE | st.just(-math.inf)


@st.composite
def logit_pairs(draw, rows=ONE_TO[5], classes=ONE_TO[8], logit=LOGIT):
    n, c = draw(rows), draw(classes)
    p, q = (torch.tensor(draw(st.lists(logit, min_size=n * c, max_size=n * c))).reshape(n, c) for _ in range(2))
    for x in (p, q):
        assume((x.amax(-1) > -math.inf).all())
    return p, q


def rows(p, q, **options):
    return kl_divergence(p, q, input_format="logits", reduction="none", **options)


@given(logit_pairs(), st.sampled_from(DIRECTIONS))
def test_never_negative_and_never_nan(pair, direction):
    assert (rows(*pair, direction=direction) >= 0).all()
    probs = [x.softmax(-1) for x in pair]
    assert (kl_divergence(*probs, direction=direction, reduction="none") >= 0).all()


@given(logit_pairs())
def test_zero_for_equal_rows(pair):
    p, q = pair
    assert (rows(p, p.clone()) == 0).all()
    assert (kl_divergence(q.softmax(-1), q.softmax(-1), reduction="none") == 0).all()


@given(logit_pairs(logit=FINITE))
def test_zero_for_equal_rows_only(pair):
    p, q = (x.double() for x in pair)
    p_probs, q_probs = p.softmax(-1), q.softmax(-1)
    # By Pinsker's inequality: KL >= 2 TV^2.
    distance = (p_probs - q_probs).abs().sum(-1) / 2
    assert (rows(p, q) >= 2 * distance**2 * (1 - 1e-9) - 1e-30).all()


@given(logit_pairs(), st.randoms(use_true_random=False))
def test_invariant_under_permutation_of_classes(pair, random):
    p, q = (x.double() for x in pair)
    order = list(range(p.shape[-1]))
    random.shuffle(order)
    torch.testing.assert_close(rows(p[:, order], q[:, order]), rows(p, q), rtol=1e-12, atol=1e-200)


@given(logit_pairs(), st.floats(-20, 20), st.floats(-20, 20))
def test_invariant_under_a_constant_added_to_logits(pair, a, b):
    p, q = (x.double() for x in pair)
    torch.testing.assert_close(rows(p + a, q + b), rows(p, q), rtol=1e-9, atol=1e-12)


@given(logit_pairs())
def test_directions(pair):
    p, q = pair
    assert torch.equal(rows(p, q, direction="reverse"), rows(q, p))
    both = rows(p, q).double() + rows(q, p).double()
    torch.testing.assert_close(rows(p, q, direction="jeffreys").double(), both, rtol=2e-7, atol=0)
    assert torch.equal(rows(p, q, direction="jeffreys", eps=1e-3), rows(q, p, direction="jeffreys", eps=1e-3))


@given(logit_pairs())
def test_jensen_shannon(pair):
    p, q = (x.double() for x in pair)
    value = rows(p, q, direction="jensen_shannon")
    probs = [x.softmax(-1) for x in (p, q)]
    middle = (probs[0] + probs[1]) / 2
    both = sum(kl_divergence(x, middle, reduction="none") for x in probs) / 2
    torch.testing.assert_close(value, both, rtol=1e-9, atol=1e-20)
    torch.testing.assert_close(rows(q, p, direction="jensen_shannon"), value, rtol=1e-9, atol=1e-20)
    # By Pinsker's inequality on either side; and by Lin's theorem 3.
    distance = (probs[0] - probs[1]).abs().sum(-1) / 2
    assert (value >= distance**2 / 2 * (1 - 1e-9) - 1e-30).all()
    assert (value <= distance * math.log(2) * (1 + 1e-9) + 1e-30).all()


@given(logit_pairs(rows=st.integers(2, 6)), st.integers(1, 5))
def test_a_row_does_not_depend_on_its_batch(pair, cut):
    p, q = pair
    whole = rows(p, q)
    parts = torch.cat([rows(a, b) for a, b in zip(p.split(cut), q.split(cut), strict=True)])
    assert torch.equal(parts, whole)
    assert torch.equal(rows(p.flip(0), q.flip(0)).flip(0), whole)


@given(logit_pairs(rows=st.integers(2, 6)), st.integers(1, 5))
def test_splitting_the_data_into_batches_changes_nothing(pair, cut):
    p, q = (x.double() for x in pair)
    metric = KLDivergence(input_format="logits").set_dtype(torch.float64)
    for batch in zip(p.split(cut), q.split(cut), strict=True):
        metric.update(*batch)
    expected = rows(p, q).mean()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-14, atol=0)


@given(logit_pairs(classes=st.integers(2, 8), logit=FINITE), st.integers(1, 7))
def test_chain_rule(pair, cut):
    """KL(p‖q) = KL(P‖Q) + Σ P_j KL(p|j ‖ q|j), for classes in two blocks of masses P and Q."""
    p, q = (x.double().log_softmax(-1) for x in pair)
    cut = min(cut, p.shape[-1] - 1)
    p_blocks, q_blocks = ([x[:, :cut], x[:, cut:]] for x in (p, q))
    p_mass, q_mass = (torch.stack([b.logsumexp(-1) for b in blocks], -1) for blocks in (p_blocks, q_blocks))
    within = sum(p_mass[:, j].exp() * rows(p_blocks[j], q_blocks[j]) for j in (0, 1))
    torch.testing.assert_close(rows(p, q), rows(p_mass, q_mass) + within, rtol=1e-9, atol=1e-13)


@given(logit_pairs(logit=FINITE), st.floats(1, 5))
def test_a_weight_counts_like_that_many_rows(pair, weight):
    p, q = pair
    copies = int(weight)
    repeated = kl_divergence(p.repeat(copies, 1), q.repeat(copies, 1), input_format="logits")
    weighted = kl_divergence(p, q, input_format="logits", weight=torch.full((len(p),), float(copies)))
    torch.testing.assert_close(weighted, repeated, rtol=2e-7, atol=0)
