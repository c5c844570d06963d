"""What the first batch looks like: a warning where it is another thing than was said, once, and no other."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributions as D
from cases import logits
from fake_device import Device

from klmetric import (
    Head,
    KLDivergence,
    KLDivergenceEstimate,
    KLDivergenceSummary,
    TopK,
    kl_divergence,
    kl_divergence_bounds,
)
from klmetric.arithmetic import choose

METRICS = [KLDivergence, KLDivergenceSummary]


def probs(*shape, seed=0, dim=-1):
    return logits(*shape, seed=seed).softmax(dim)


def said_by(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [f"{one.message}" for one in caught]


def said_of(p, q, metric_class=KLDivergence, times=2, **options) -> list[str]:
    """Of some updates and a result."""
    metric = metric_class(**options)

    def measure():
        for _ in range(times):
            metric.update(p, q)
        metric.compute()

    return said_by(measure)


P, Q = probs(16, 10), probs(16, 10, seed=1)
LOGITS = logits(16, 10)
FORMAT = (
    "`input_format` should say what the tensors hold. Got {!r}, but {} like probabilities: nothing is negative, and"
    " rows add up to 1 (the first rows of the first batch). Did you mean input_format={!r}?"
)


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize(
    ("p", "q", "said", "who", "meant"),
    [
        (P, Q, "logits", "`p` and `q` look", "probs"),
        (P, Q, "log_probs", "`p` and `q` look", "probs"),
        (P, LOGITS, "logits", "`p` looks", ("probs", "logits")),
        (LOGITS.log_softmax(-1), Q, "log_probs", "`q` looks", ("log_probs", "probs")),
        (P, Q, ("probs", "logits"), "`q` looks", "probs"),
        (P[0], Q[0], "logits", "`p` and `q` look", "probs"),
        (P.bfloat16(), Q.half(), "logits", "`p` and `q` look", "probs"),
        (torch.eye(10), LOGITS[:10], "logits", "`p` looks", ("probs", "logits")),
        (P, TopK(*Q.log().topk(3), 10), "logits", "`p` looks", ("probs", "logits")),
        (Head(logits(16, 3), logits(10, 3)), Q, "logits", "`q` looks", ("logits", "probs")),
    ],
    ids=["both", "log_probs", "p", "q", "a pair", "a row", "half", "labels", "TopK", "Head"],
)  # fmt: skip
def test_probabilities_where_others_were_said(p, q, said, who, meant, metric_class):
    expected = FORMAT.format(said, who, meant)
    assert said_of(p, q, metric_class, input_format=said) == [expected]


@pytest.mark.parametrize("metric_class", METRICS)
def test_classes_on_another_axis(metric_class):
    p, q = (probs(4, 5, 6, 6, seed=k, dim=1) for k in (0, 1))
    text = (
        "`dim` should be the axis of the classes, along which probabilities add up to 1. Got dim={} for shape {}, but"
        " in `{}` they add up to 1 along dim={}. Did you mean dim={}?"
    )
    assert said_of(p, q, metric_class) == [text.format(-1, (4, 5, 6, 6), "p", 1, 1)]
    assert said_of(P, Q.T.contiguous().T, metric_class, dim=0) == [text.format(0, (16, 10), "p", 1, 1)]
    others = {"input_format": ("logits", "probs")}
    assert said_of(logits(4, 5, 6, 6), q, metric_class, **others) == [text.format(-1, (4, 5, 6, 6), "q", 1, 1)]
    assert said_of(p, q, metric_class, dim=1) == []


NOTHING_TO_SAY = {
    "probabilities": (P, Q, {}),
    "one-hot labels": (torch.eye(10), Q[:10], {}),
    "not normalised": (3 * P, torch.arange(1.0, 161).view(16, 10), {}),
    "all ones": (torch.ones(1, 10), torch.ones(1, 10), {}),
    "logits": (LOGITS, logits(16, 10, seed=1), {"input_format": "logits"}),
    "log-probabilities": (P.log(), Q.log(), {"input_format": "log_probs"}),
    "log-probabilities as logits": (P.log(), Q.log(), {"input_format": "logits"}),
    "logits of a ReLU": (LOGITS.relu(), LOGITS.relu() / 9, {"input_format": "logits"}),
    "logits that add up to 1": (LOGITS - LOGITS.mean(-1, keepdim=True) + 0.1, LOGITS, {"input_format": "logits"}),
    "zeros": (torch.zeros(16, 10), torch.zeros(16, 10), {"input_format": "logits"}),
    "a first empty batch": (P[:0], Q[:0], {"input_format": "probs", "reduction": "sum"}),
    "distributions": (D.Categorical(probs=P), D.Categorical(logits=LOGITS), {}),
    "not categorical": (D.Normal(P, 1.0), D.Normal(Q, 1.0), {}),
    "a TopK": (TopK(*P.log().topk(3), 10), Q, {}),
    "a padded vocabulary": (torch.nn.functional.pad(P, (0, 2)), torch.nn.functional.pad(Q, (0, 2)), {"classes": 10}),
    "masked classes": (P.masked_fill(P < 0.1, 0), Q, {}),
}


@pytest.mark.parametrize("case", NOTHING_TO_SAY)
def test_nothing_is_said_of_what_is_right(case):
    p, q, options = NOTHING_TO_SAY[case]
    assert said_of(p, q, **options) == []


def test_the_first_rows_are_looked_at_and_no_more():
    p = torch.cat([P, LOGITS])
    assert len(said_of(p, logits(32, 10, seed=1), input_format="logits")) == 1
    assert said_of(p.flip(0), logits(32, 10, seed=1), input_format="logits") == []
    p = logits(20, 20, 10)
    p[:16, 0] = P
    assert len(said_of(p, logits(20, 20, 10, seed=1), input_format="logits")) == 1
    p = logits(1, 20, 10)
    p[0, :16] = P
    assert len(said_of(p, logits(1, 20, 10, seed=1), input_format="logits")) == 1
    p[0, 15] = LOGITS[0]
    assert said_of(p, logits(1, 20, 10, seed=1), input_format="logits") == []
    metric = KLDivergence(input_format="logits")
    assert said_by(lambda: metric.update(P[:0], Q[:0])) == []
    assert len(said_by(lambda: metric.update(P, Q))) == 1


def test_one_class_is_said_to_be_one_class():
    said = said_of(torch.ones(16, 1), torch.ones(16, 1), times=1, input_format="logits")
    assert [text.partition(" its ")[0] for text in said] == ["With one class"]


def test_once_in_the_life_of_a_metric_and_at_the_line_of_the_user():
    metric = KLDivergence(input_format="logits")
    with pytest.warns(UserWarning, match="look like probabilities") as caught:
        metric(P, Q)
    assert [one.filename for one in caught] == [__file__]

    def more():
        metric.update(P, Q)
        metric.reset()
        metric.update(P, Q)
        for another in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
            another.update(P, Q)
            another.compute()

    assert said_by(more) == []


def test_the_numbers_stay_what_they_were():
    metric = KLDivergence(input_format="logits")
    with pytest.warns(UserWarning, match="look like probabilities"):
        metric.update(P, Q)
    torch.testing.assert_close(metric.compute(), kl_divergence(P, Q, input_format="logits"))


def test_a_warning_that_is_an_error_changes_nothing():
    metric = KLDivergence(input_format="logits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="look like probabilities"):
            metric.update(P, Q)
    assert metric.update_count == 0
    assert not metric.totals[:4].any()


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_accelerator_is_asked_when_the_result_is_computed(name, monkeypatch):
    with Device(name) as device:
        monkeypatch.setattr(choose, "is_recorded", lambda: False)
        p, q = device.put(P), device.put(Q)
        metric = KLDivergence(input_format="logits").to(name)
        device.waits.clear()
        assert said_by(lambda: [metric.update(p, q) for _ in range(2)]) == []
        assert not device.waits or name == "mps"  # which has no float64, and is waited for anyway
        assert len(said_by(metric.compute)) == 1
        metric.update(p, q)
        assert said_by(metric.compute) == []
        metric = KLDivergenceEstimate().to(name)
        device.waits.clear()
        assert said_by(lambda: metric.update(p, q)) == []
        assert not device.waits or name == "mps"
        assert len(said_by(metric.compute)) == 1


# ---- another number of classes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("metric_class", METRICS)
def test_another_number_of_classes(metric_class):
    metric = metric_class(input_format="logits")
    batches = [logits(3, n) for n in (10, 5, 10, 5)]
    said = said_by(lambda: [metric.update(x, x) for x in batches])
    assert said == [
        "All batches of a metric should have the same classes. Got 5 of them after 10. Is `dim` right? If only padding"
        " differs, say with `classes` how many count. Give other data a metric of their own."
    ]


def test_the_same_classes_of_another_kind():
    heads = [Head(logits(16, 3), logits(10, 3))] * 2
    top = TopK(*P.log().topk(3), 10)
    metric = KLDivergence(dim=1)
    assert said_by(lambda: [metric.update(*both) for both in ((P, Q), heads, (top, Q), (P, Q), (P, top))]) == []
    assert len(said_by(lambda: metric.update(TopK(*P[:, :5].log().topk(3), 5), Q[:, :5]))) == 1


def test_numbers_of_classes_that_may_vary():
    metric = KLDivergence(classes=5)
    assert said_by(lambda: [metric.update(x[:, :n], x[:, :n]) for x in (P, Q) for n in (10, 7)]) == []
    metric = KLDivergence()
    assert said_by(lambda: [metric.update(*[D.Categorical(probs=P[:, :n])] * 2) for n in (10, 7)]) == []
    metric = KLDivergence()

    def two_data_sets():
        metric.update(P, Q)
        metric.reset()
        metric.update(P[:, :5], Q[:, :5])

    assert said_by(two_data_sets) == []
    metric = KLDivergenceEstimate()
    assert said_by(lambda: [metric.update(-P[:, :n], -Q[:, :n]) for n in (10, 7)]) == []


# ---- drawn tokens ----------------------------------------------------------------------------------------------------
OF_LOGS = (
    "`log_p` and `log_q` should be logarithms of probabilities. Got a first batch in which all values are from 0 to 1."
    " Are they the probabilities themselves? Then take .log() of both."
)


def test_probabilities_for_their_logarithms():
    metric, mask = KLDivergenceEstimate(), torch.rand(16, 10) < 0.8
    p, q = (torch.where(mask, x, torch.nan) for x in (P, Q))
    assert said_by(lambda: [metric.update(p, q, mask) for _ in range(2)]) == [OF_LOGS]
    assert said_by(lambda: KLDivergenceEstimate().update(P[:, 0], Q[:, 0])) == [OF_LOGS]
    assert said_by(lambda: KLDivergenceEstimate()(P, Q)) == [OF_LOGS]


@pytest.mark.parametrize(
    ("log_p", "log_q"),
    [
        (P.log(), Q.log()),
        (torch.zeros(3, 4), torch.zeros(3, 4)),  # tokens that are sure
        (torch.zeros(3, 4), Q[:3, :4].log()),
        (D.Normal(0.0, 0.2).log_prob(0.3 * LOGITS), D.Normal(0.0, 0.3).log_prob(0.3 * LOGITS)),
        (D.Normal(0.0, 0.1).log_prob(0.01 * LOGITS), D.Normal(0.0, 0.1).log_prob(0.02 * LOGITS)),
        (D.Uniform(0.0, 0.5).log_prob(0.5 * P), D.Uniform(0.0, 1.0).log_prob(0.5 * P)),
        (P[:0], Q[:0]),
    ],
    ids=["logarithms", "sure", "sure of p", "densities", "narrow densities", "uniform densities", "nothing"],
)
def test_nothing_is_said_of_logarithms(log_p, log_q):
    assert said_by(lambda: KLDivergenceEstimate().update(log_p, log_q)) == []


# ---- drawn tokens among the likeliest classes ------------------------------------------------------------------------
HINT = "Is the first column a drawn token, as vLLM puts it there? Then say sampled=True."


def with_drawn(rows=64, classes=50, k=5, **options):
    """Rows in full, and what vLLM gives of them: a drawn token before the likeliest."""
    log_p = logits(rows, classes).log_softmax(-1)
    tokens = D.Categorical(logits=log_p).sample().unsqueeze(-1)
    values, indices = log_p.topk(k)
    return log_p, TopK(
        torch.cat([log_p.gather(-1, tokens), values], -1), torch.cat([tokens, indices], -1), classes, **options
    )


def test_a_tail_that_does_not_fit():
    _, p = with_drawn()
    q = logits(64, 50, seed=1)
    metric = KLDivergenceSummary(input_format="logits", bounds=True)
    said = said_by(lambda: [metric.update(p, q) for _ in range(2)])
    assert len(said) == 1
    assert said[0].startswith(
        "`values` should be of the k likeliest classes, so that no other has more than the least of them. Got a row"
        " that leaves 0."
    )
    assert said[0].endswith(HINT)
    assert len(said_by(lambda: kl_divergence_bounds(p, q, input_format="logits"))) == 1
    assert said_by(lambda: kl_divergence_bounds(p, p)) == []  # there is no upper bound anyway
    metric = KLDivergenceSummary(input_format="logits")
    assert said_by(lambda: metric.update(p, q)) == []  # nor is one asked for
    weight = torch.zeros(64)
    assert said_by(lambda: kl_divergence_bounds(p, q, input_format="logits", weight=weight, reduction="sum")) == []


def test_a_first_column_that_is_not_the_largest():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).repeat(20, 1)
    drawn = torch.tensor([[2, 0, 1]]).repeat(20, 1)
    text = (
        "`values` should be of the k likeliest classes. Got columns that fall from the second on, and a first one that"
        f" is not the largest. {HINT}"
    )
    for padding in (0, 2):
        values = torch.nn.functional.pad(p.gather(-1, drawn), (0, padding), value=9.0)
        indices = torch.nn.functional.pad(drawn, (0, padding), value=-1)
        assert said_by(lambda v=values, i=indices: kl_divergence_bounds(TopK(v, i, 5, "probs"), p)) == [text]
        assert said_by(lambda v=values, i=indices: kl_divergence_bounds(TopK(v, i, 5, "probs", sampled=True), p)) == []
    few = TopK(p[:5].gather(-1, drawn[:5]), drawn[:5], 5, "probs")  # which may be by chance
    assert said_by(lambda: kl_divergence_bounds(few, p[:5])) == []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2, 3][::-1]):
        at = torch.tensor([order]).repeat(20, 1)
        assert said_by(lambda at=at: kl_divergence_bounds(TopK(p.gather(-1, at), at, 5, "probs"), p)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nothing_is_said_of_the_likeliest(dtype):
    log_p, _ = with_drawn()
    q = logits(64, 50, seed=1)
    for x in (log_p, torch.zeros(64, 50).log_softmax(-1), (5 * log_p).log_softmax(-1)):
        for k in (1, 2, 5, 50):
            values, indices = x.to(dtype).topk(k)
            assert (
                said_by(lambda v=values, i=indices: kl_divergence_bounds(TopK(v, i, 50), q, input_format="logits"))
                == []
            )
    _, p = with_drawn(sampled=True)
    assert said_by(lambda: kl_divergence_bounds(p, q, input_format="logits")) == []


# ---- what to look for where rows are no distributions ----------------------------------------------------------------
FORMAT_HINT = " Were they logits or log-probabilities? Then say so with input_format."
TOP_HINT = (
    " Do the `values` of the TopK hold probabilities? Then say so with its input_format. Or logits? Then take"
    " logits.log_softmax(-1).topk(k)."
)
HEAD_HINT = " Look for NaN in what the Head is made of."


@pytest.mark.parametrize(
    ("p", "q", "options", "hints"),
    [
        (LOGITS, LOGITS, {}, FORMAT_HINT),
        (LOGITS * torch.nan, LOGITS, {"input_format": "logits"}, ""),
        (TopK(*Q.log().topk(3), 10), LOGITS, {}, TOP_HINT + FORMAT_HINT),
        (TopK(*P.topk(3), 10), LOGITS, {"input_format": "logits"}, TOP_HINT),
        (Head(logits(16, 3), logits(10, 3)), LOGITS, {}, HEAD_HINT + FORMAT_HINT),
        (LOGITS, Head(logits(16, 3), logits(10, 3)), {"input_format": ("probs", "logits")}, FORMAT_HINT + HEAD_HINT),
    ],
    ids=["tensors", "logits", "TopK", "TopK of probabilities", "Head", "Head as q"],
)
def test_hints_go_by_what_p_and_q_are(p, q, options, hints):
    expected = f"of 16 rows were no distributions and make the result NaN. nan_strategy='error' names the first.{hints}"
    metric = KLDivergence(**options)
    metric.update(p, q)
    for call in (lambda: kl_divergence(p, q, **options), metric.compute):
        [said] = said_by(call)
        assert said.partition(" ")[2] == expected
