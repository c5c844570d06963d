"""The contract of a metric: what holds for any torchmetrics metric, whatever it measures."""

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.distributions as D
from cases import DIRECTIONS, logits, pair
from kinds import DICTS, IN_PARTS, KINDS, OF_CLASSES, OF_TOKENS, SUMMARIES, make, same, value_of, without_order
from torchmetrics import BootStrapper, MetricCollection, MetricTracker
from torchmetrics.regression import KLDivergence as TorchmetricsKL
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from klmetric import KLDivergence, KLDivergenceSummary, kl_divergence

# Any numbers pass for the log-probabilities of drawn tokens here.
pytestmark = pytest.mark.filterwarnings("ignore:`log_p` and `log_q` should be logarithms")

BATCHES = [pair(n, 5, seed=n) for n in (4, 1, 7)]


def joined():
    return [torch.cat(xs) for xs in zip(*BATCHES, strict=True)]


def filled(kind="mean", **options):
    metric = make(kind, **options)
    for p, q in BATCHES:
        metric.update(p, q)
    return metric


COUNTS = {"count", "tokens", "sequences", "infinite", "invalid"}
COUNTS |= {f"top{k}_{what}" for k in (1, 2, 3) for what in ("sample", "position")}


def dtypes(value):
    """Of all that is no count."""
    return {x.dtype for k, x in value.items() if k not in COUNTS} if isinstance(value, dict) else {value.dtype}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class TestAccumulation:
    def test_compute_is_the_divergence_of_all_batches(self, kind):
        same(filled(kind).compute(), value_of(kind, *joined()))

    def test_weights(self, kind):
        metric = make(kind)
        weights = [torch.rand(len(p), generator=torch.Generator().manual_seed(0)) for p, _ in BATCHES]
        weights[2][3] = 0
        for (p, q), weight in zip(BATCHES, weights, strict=True):
            metric.update(p, q, weight)
        same(metric.compute(), value_of(kind, *joined(), torch.cat(weights)))

    def test_order_does_not_matter(self):
        metric = KLDivergence()
        for p, q in reversed(BATCHES):
            metric.update(p, q)
        same(metric.compute(), filled().compute())

    def test_tokens_and_distributions(self):
        p, q = pair(3, 4, 5)
        metric = KLDivergence(reduction="batchmean")
        metric.update(p, q)
        metric.update(D.Categorical(probs=p), D.Categorical(probs=q))
        same(metric.compute(), kl_divergence(p, q, reduction="batchmean"))

    def test_an_empty_batch_changes_nothing(self, kind):
        metric = filled(kind)
        value, before = metric.compute(), metric.totals
        metric.update(torch.zeros(0, 5), torch.zeros(0, 5))
        same(metric.compute(), value)
        assert torch.equal(metric.totals, before)

    def test_none_is_one_dimension_even_for_one_row(self):
        p, q = pair(1, 5)
        metric = KLDivergence(reduction="none")
        assert metric(p, q).shape == (1,)
        assert metric.compute().shape == (1,)
        metric.update(*pair(2, 3, 5))
        assert metric.compute().shape == (7,)

    def test_compute_twice(self, kind):
        metric = filled(kind)
        same(metric.compute(), metric.compute())
        uncached = filled(kind, compute_with_cache=False)
        same(uncached.compute(), uncached.compute())

    def test_reset(self, kind):
        metric = filled(kind)
        value = metric.compute()
        metric.reset()
        assert metric.update_count == 0
        for p, q in BATCHES:
            metric.update(p, q)
        same(metric.compute(), value)

    def test_inputs_stay_as_they_were(self, kind):
        p, q = pair(4, 5)
        kept = p.clone(), q.clone()
        make(kind)(p, q)
        assert torch.equal(p, kept[0])
        assert torch.equal(q, kept[1])

    def test_totals_are_replaced_and_not_written_to(self):
        metric = KLDivergence()
        shared = metric.totals
        before = shared.clone()
        metric.update(*BATCHES[0])
        metric(*BATCHES[0])
        assert torch.equal(shared, before)

    def test_many_small_values_add_up_in_double(self):
        p, q = (x.double() for x in pair(1, 5))
        metric = KLDivergence()
        for _ in range(1000):
            metric.update(p.expand(1000, 5), q.expand(1000, 5))
        same(metric.compute(), kl_divergence(p, q).float())
        assert metric.totals.dtype == torch.float64


class TestForward:
    def test_value_of_the_batch_and_total_of_all(self, kind):
        metric = make(kind)
        for p, q in BATCHES:
            same(metric(p, q), value_of(kind, p, q))
        same(metric.compute(), filled(kind).compute())
        assert metric.update_count == len(BATCHES)

    def test_gradient(self, kind):
        p, q = (x.requires_grad_() for x in pair(4, 5))
        metric = make(kind)
        if kind in DICTS:
            assert not any(value.requires_grad for value in metric(p, q).values())
            return
        metric(p, q).sum().backward()
        ours = p.grad, q.grad
        p.grad = q.grad = None
        value_of(kind, p, q).sum().backward()
        torch.testing.assert_close(ours, (p.grad, q.grad))
        assert not any(x.requires_grad for x in [metric.totals, *getattr(metric, "rows", [])])

    def test_gradcheck(self):
        p, q = (x.requires_grad_() for x in pair(3, 4, dtype=torch.float64))
        metric = KLDivergence().set_dtype(torch.float64)
        torch.autograd.gradcheck(metric, (p, q))

    def test_while_synced(self):
        metric = filled()
        metric._is_synced = True
        for call in (metric, metric.update):
            with pytest.raises(TorchMetricsUserError, match="must not be synced when a batch is added"):
                call(*BATCHES[0])

    def test_compute_on_cpu_keeps_the_rows(self):
        metric = KLDivergence(reduction="none", compute_on_cpu=True)
        metric(*BATCHES[0])
        metric.update(*BATCHES[1])
        same(metric.compute(), kl_divergence(*[torch.cat(x[:2]) for x in zip(*BATCHES, strict=True)], reduction="none"))


class TestBeforeAnyUpdate:
    def test_as_torchmetrics(self):
        for reduction in ("mean", "sum"):
            with pytest.warns(UserWarning, match="was called before the ``update`` method"):
                ours = KLDivergence(reduction=reduction).compute()
            with pytest.warns(UserWarning, match="was called before the ``update`` method"):
                torch.testing.assert_close(ours, TorchmetricsKL(reduction=reduction).compute(), equal_nan=True)
        for cls in (KLDivergence, TorchmetricsKL):
            with (
                pytest.warns(UserWarning, match="was called before"),
                pytest.raises(ValueError, match="No samples to concatenate"),
            ):
                cls(reduction="none").compute()

    def test_a_call_that_raised_is_no_update(self):
        metric = KLDivergence()
        with pytest.raises(ValueError, match="shape of `p`"):
            metric(torch.rand(2, 3), torch.rand(2, 4))
        assert not metric.update_called


class TestDtype:
    def test_result_in_the_dtype_of_the_metric(self, kind):
        exact = filled(kind).compute()
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            metric = filled(kind).set_dtype(dtype)
            metric = metric.to("cpu")  # torchmetrics forgets the dtype here
            assert dtypes(metric.compute()) == {dtype}
            assert metric.totals.dtype == torch.float64
            metric.reset()
            assert metric.totals.dtype == torch.float64
            metric.update(*joined())
            cast = (
                {k: x if k in COUNTS else x.to(dtype) for k, x in exact.items()} if kind in DICTS else exact.to(dtype)
            )
            torch.testing.assert_close(metric.compute(), cast)

    def test_only_set_dtype_changes_it(self, kind):
        for change in ("half", "double", "float", "bfloat16"):
            metric = filled(kind)
            getattr(metric, change)()
            assert dtypes(metric.compute()) == {torch.float32}
        assert dtypes(filled(kind).to(torch.float16).compute()) == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_input_of_any_dtype(self, dtype):
        p, q = pair(6, 5, dtype=dtype)
        metric = KLDivergence().set_dtype(torch.float64)
        metric.update(p, q)
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(metric.compute(), kl_divergence(p.double(), q.double()), rtol=rtol, atol=0)

    def test_inference_mode_and_no_grad(self):
        metric = KLDivergence()
        with torch.inference_mode():
            metric.update(*BATCHES[0])
        with torch.no_grad():
            metric.update(*BATCHES[1])
        p, q = (x.clone().requires_grad_() for x in BATCHES[2])
        metric(p, q).backward()
        same(metric.compute(), filled().compute())

    def test_autocast(self):
        with torch.autocast("cpu", torch.bfloat16):
            same(filled().compute(), kl_divergence(*joined()))


class TestMadeWithoutData:
    """Of the device "meta", brought to life by `to_empty`."""

    @pytest.mark.parametrize("updated", [False, True])
    @pytest.mark.parametrize("resets", [False, True])
    def test_to_empty(self, kind, resets, updated):
        with torch.device("meta"):
            metric = make(kind)
            if updated and kind != "none":  # whose rows cannot be told without data
                metric.update(*(x.to("meta") for x in BATCHES[0]))
        assert metric.totals.is_meta
        assert metric.to_empty(device="cpu") is metric
        if resets:
            metric.reset()
        assert metric.device == torch.device("cpu")
        assert metric.update_count == 0
        for p, q in BATCHES:
            metric.update(p, q)
        same(metric.compute(), filled(kind).compute())
        metric.reset()
        metric.update(*joined())
        same(metric.compute(), filled(kind).compute())

    def test_in_a_module(self, kind):
        with torch.device("meta"):
            module = torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 5), "kl": make(kind)})
            module.to_empty(device="cpu")  # also where another device is the default
        for p, q in BATCHES:
            module["kl"].update(p, q)
        same(module["kl"].compute(), filled(kind).compute())

    def test_in_a_collection(self, kind):
        with torch.device("meta"):
            collection = MetricCollection({"a": make(kind), "b": make(kind)})
        collection.to_empty(device="cpu")
        collection.reset()
        collection.update(*joined())
        same(collection["a"].compute(), filled(kind).compute())

    def test_what_was_measured_is_not_lost(self, kind):
        metric = filled(kind)
        metric.compute()
        metric.to_empty(device="cpu")  # there is nothing to empty: totals only move
        same(metric.compute(), filled(kind).compute())

    def test_without_to_empty_torch_says_what_to_do(self, kind):
        with torch.device("meta"):
            metric = make(kind)
        with pytest.raises(NotImplementedError, match="to_empty"):
            metric.to("cpu")


NUMBERS = {
    "float": float,
    "numpy float32": np.float32,
    "numpy float64": np.float64,
    "numpy array": np.array,
    "tensor": torch.tensor,
    "tensor of float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "tensor of one element": lambda x: torch.tensor([x]),
}
WHOLE_NUMBERS = {
    "int": int,
    "numpy int64": np.int64,
    "numpy uint8": np.uint8,
    "tensor": torch.tensor,
    "tensor of int32": lambda x: torch.tensor(x, dtype=torch.int32),
}


of_classes = pytest.mark.parametrize("kind", OF_CLASSES)


class TestNumbersHoweverSpelt:
    @of_classes
    @pytest.mark.parametrize("spelling", NUMBERS)
    def test_options(self, kind, spelling):
        options = {"temperature": 1.7, "base": 2.5} | ({} if kind == "measures" else {"eps": 1e-3})
        spelt = {name: NUMBERS[spelling](value) for name, value in options.items()}
        metric, expected = filled(kind, **spelt), filled(kind, **options)
        same(metric.compute(), expected.compute())
        assert repr(metric) == repr(expected)
        assert torch.equal(metric.totals, expected.totals)
        metric.merge_state(expected)
        value_of(kind, *joined(), **spelt)

    @of_classes
    @pytest.mark.parametrize("spelling", WHOLE_NUMBERS)
    def test_whole_ones(self, kind, spelling):
        options = {"temperature": 2, "base": 2, "dim": 1, "classes": 4, "ignore_index": 7}
        spelt = {name: WHOLE_NUMBERS[spelling](value) for name, value in options.items()}
        metric, expected = filled(kind, **spelt), filled(kind, **options)
        same(metric.compute(), expected.compute())
        assert repr(metric) == repr(expected)
        assert torch.equal(metric.totals, filled(kind, **{**options, "temperature": 2.0}).totals)
        value_of(kind, *joined(), **spelt)

    @pytest.mark.parametrize("spelling", NUMBERS)
    def test_of_the_summary(self, spelling):
        number = NUMBERS[spelling]
        whole = WHOLE_NUMBERS["tensor" if "tensor" in spelling else "numpy int64"]
        metric = KLDivergenceSummary(
            quantiles=[number(0.99), number(0.999)], relative_accuracy=number(0.02), top=whole(2)
        )
        expected = KLDivergenceSummary(quantiles=[0.99, 0.999], relative_accuracy=0.02, top=2)
        assert repr(metric) == repr(expected)
        for one in (metric, expected):
            one.update(*joined())
        same(metric.compute(), expected.compute())
        assert torch.equal(metric.totals, expected.totals)

    @pytest.mark.parametrize("make_array", [np.array, torch.tensor, np.float32])
    def test_quantiles_in_one_array(self, make_array):
        metric = KLDivergenceSummary(quantiles=make_array([0.5, 0.999]))
        assert metric.quantiles == (0.5, 0.999)

    @pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), torch.ones(2), np.ones(2), "2", None, 2j])
    def test_what_is_no_number(self, value):
        for name in ("temperature", "eps", "base", "relative_accuracy", "top", "dim", "classes"):
            if value is None and name in ("base", "classes"):
                continue
            with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
                KLDivergenceSummary(**{name: value})
        with pytest.raises(ValueError, match="`quantiles` must be numbers from 0 to 1"):
            KLDivergenceSummary(quantiles=[value])

    @pytest.mark.parametrize("name", ["temperature", "eps", "base"])
    def test_a_tensor_that_requires_grad(self, name):
        value = torch.tensor(1.5, requires_grad=True)
        text = (
            f"`{name}` must be a number: no gradient flows into it. Got a tensor that requires grad. Give tensor.item()"
        )
        with pytest.raises(TypeError, match=re.escape(text)):
            kl_divergence(*BATCHES[0], **{name: value})
        with pytest.raises(TypeError, match=re.escape(text)):
            KLDivergence(**{name: value})


class TestClasses:
    """The first so many classes of vocabularies that are padded, each to a length of its own."""

    @of_classes
    @pytest.mark.parametrize("input_format", ["probs", "log_probs", "logits"])
    @pytest.mark.parametrize("lengths", [(9, 7), (7, 9), (5, 8), (5, 5)])
    def test_of_the_first(self, kind, lengths, input_format):
        p, q = pair(6, 3, 9, input_format=input_format)
        expected = value_of(kind, p[..., :5], q[..., :5], input_format=input_format)
        p, q = p[..., : lengths[0]], q[..., : lengths[1]]
        same(value_of(kind, p, q, classes=5, input_format=input_format), expected)
        along_1 = {"classes": 5, "dim": 1, "input_format": input_format}
        same(value_of(kind, p.movedim(-1, 1), q.movedim(-1, 1), **along_1), expected)

    def test_gradients_reach_them_and_no_others(self):
        p, q = pair(6, 9, input_format="logits")
        q.requires_grad_()
        kl_divergence(p[:, :7], q, classes=5, input_format="logits").backward()
        assert (q.grad[:, :5] != 0).all()
        assert (q.grad[:, 5:] == 0).all()

    @of_classes
    @pytest.mark.parametrize("one_hot", [D.Categorical, D.OneHotCategorical])
    def test_of_categorical_distributions(self, kind, one_hot):
        p, q = pair(6, 9, input_format="logits")
        expected = value_of(kind, one_hot(logits=p[:, :5]), one_hot(logits=q[:, :5]))
        torch.testing.assert_close(value_of(kind, one_hot(logits=p[:, :7]), one_hot(logits=q), classes=5), expected)
        prior = value_of(kind, one_hot(logits=p[:1, :5].expand(6, 5)), one_hot(logits=q[:, :5]))
        torch.testing.assert_close(value_of(kind, one_hot(logits=p[:1]), one_hot(logits=q[:, :7]), classes=5), prior)

    @of_classes
    def test_they_tell_totals_apart(self, kind):
        metric = filled(kind, classes=4)
        with pytest.raises(ValueError, match="Only what was measured with the same options can be merged"):
            metric.merge_state(filled(kind))
        with pytest.raises(ValueError, match="Only what was measured with the same options can be merged"):
            metric.merge_state(filled(kind, classes=3))
        assert "classes=4" in repr(metric)

    def test_bad_ones(self):
        p, q = pair(6, 9)
        text = "`classes` must be no more than both inputs have. Got classes=8, and `q` has 7: shape (6, 7), dim=-1."
        with pytest.raises(ValueError, match=re.escape(text)):
            kl_divergence(p, q[:, :7], classes=8)
        with pytest.raises(ValueError, match=re.escape("and `p` has 6: shape (6, 9), dim=0. Is `dim` right?")):
            kl_divergence(p, q, classes=8, dim=0)
        with pytest.raises(ValueError, match=re.escape("`classes` must be how many of the first classes to take, at")):
            KLDivergence(classes=0)
        with pytest.raises(TypeError, match=re.escape("`classes` must be an int, how many of the first classes to")):
            KLDivergence(classes=5.0)
        with pytest.raises(ValueError, match=re.escape("`classes` is for categorical distributions. Got classes=5")):
            kl_divergence(D.Normal(0.0, 1.0), D.Normal(1.0, 1.0), classes=5)
        with pytest.raises(
            TypeError, match=re.escape("`p` must be a torch.Tensor or a torch.distributions.Distribution. Got list")
        ):
            kl_divergence(p.tolist(), q, classes=5)
        with pytest.raises(ValueError, match=re.escape("`dim` must be an axis of the input. Got dim=2")):
            kl_divergence(p, q, classes=5, dim=2)


class TestCopies:
    def test_pickle(self, kind):
        metric = pickle.loads(pickle.dumps(filled(kind)))
        metric.update(*BATCHES[0])
        exact = filled(kind)
        exact.update(*BATCHES[0])
        same(metric.compute(), exact.compute())

    def test_clone_is_independent(self, kind):
        metric = filled(kind)
        value = metric.compute()
        for other in (metric.clone(), copy.deepcopy(metric)):
            other.update(*BATCHES[0])
            metric._computed = None
            same(metric.compute(), value)

    def test_state_dict(self, kind):
        metric = filled(kind)
        assert not metric.state_dict()
        metric.persistent(True)
        file = io.BytesIO()
        torch.save(metric.state_dict(), file)
        file.seek(0)
        other = make(kind)
        other.persistent(True)
        other.load_state_dict(torch.load(file, weights_only=True))
        other.update(*BATCHES[0])
        metric.update(*BATCHES[0])
        same(other.compute(), metric.compute())

    def test_hash(self, kind):
        assert len({filled(kind), filled(kind)}) == 2

    def test_merge_state(self, kind):
        parts = [make(kind) for _ in BATCHES]
        for metric, (p, q) in zip(parts, BATCHES, strict=True):
            metric.update(p, q)
        exact = filled(kind).compute()
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            first, *rest = (parts[i].clone() for i in order)
            for one in rest:
                first.merge_state(one)
            same(*map(without_order, (first.compute(), exact)))
        first = parts[0].clone()
        first.merge_state(parts[1].metric_state)
        second = parts[0].clone()
        second.merge_state(parts[1])
        same(first.compute(), second.compute())

    def test_merge_after_compute(self):
        first, second = filled(), KLDivergence()
        second.update(*BATCHES[0])
        first.compute()
        first.merge_state(second)
        exact = filled()
        exact.update(*BATCHES[0])
        same(first.compute(), exact.compute())

    @pytest.mark.parametrize("other", [{"direction": "reverse"}, {"temperature": 9.0}, {"kind": "none"}], ids=str)
    def test_merge_with_other_options(self, other):
        metric = filled()
        before = metric.totals
        summaries = [KLDivergenceSummary(**options) for options in ({}, {"top": 1}, {"relative_accuracy": 0.1})]
        for incoming in (filled(**other), filled(**other).metric_state, *(one.metric_state for one in summaries)):
            with pytest.raises(ValueError, match="Only what was measured with the same options can be merged"):
                metric.merge_state(incoming)
        assert torch.equal(metric.totals, before)

    def test_clone_after_a_forward_with_gradient(self, kind):
        metric = make(kind)
        metric(BATCHES[0][0], BATCHES[0][1].clone().requires_grad_())
        same(metric.clone().compute(), metric.compute())

    def test_merge_with_nothing(self, kind):
        metric = filled(kind)
        value = metric.compute()
        metric.merge_state(make(kind))
        same(metric.compute(), value)


@pytest.mark.parametrize("kind", ["none", "summary"])
def test_merge_puts_the_rows_of_the_other_last(kind):
    parts = [make(kind) for _ in BATCHES]
    for metric, (p, q) in zip(parts, BATCHES, strict=True):
        metric.update(p, q)
    merged = make(kind)
    for part in parts:
        merged.merge_state(part)
    same(merged.compute(), filled(kind).compute())  # without a warning that there was no update


@pytest.mark.parametrize("kind", ["mean", "none", "summary"])
class TestCheckpoint:
    def test_what_was_not_saved_is_missed(self, kind):
        state = filled(kind).state_dict()
        metric = make(kind)
        metric.load_state_dict(state)  # not persistent: as torchmetrics' own
        metric.persistent(True)
        with pytest.raises(RuntimeError, match=r"Missing key.*totals"):
            metric.load_state_dict(state)
        with pytest.raises(ValueError, match=r"Got no states for .*persistent\(True\)"):
            metric.merge_state(state)

    def test_of_another_reduction(self, kind):
        metric, saved = make("sum"), filled(kind)
        saved.persistent(True)
        if kind == "mean":
            metric.load_state_dict(saved.state_dict())
            same(metric.compute(), filled("sum").compute())
        else:
            self.is_refused(metric, saved.state_dict())

    def test_of_other_options(self, kind):
        saved = filled(kind, direction="reverse")
        saved.persistent(True)
        self.is_refused(make(kind), saved.state_dict())

    def is_refused(self, metric, state):
        before = metric.totals
        module = torch.nn.ModuleDict({"kl": metric})
        with pytest.raises(
            RuntimeError, match=r"Only what was measured with the same options can be loaded. (Got|Totals)"
        ):
            module.load_state_dict({f"kl.{key}": value for key, value in state.items()})
        assert torch.equal(metric.totals, before)

    def test_of_another_version(self, kind):
        metric = KLDivergence()
        with pytest.raises(RuntimeError, match=r"Totals are 12 numbers. Got shape \(7,\)"):
            metric.load_state_dict({"totals": torch.zeros(7)})


@of_classes
class TestNanStrategy:
    def bad(self):
        p, q = pair(4, 5)
        p[1, 0], q[3] = -1, 0
        return p, q

    def test_propagate(self, kind):
        metric = filled(kind)
        metric.update(*self.bad())
        with pytest.warns(UserWarning, match=re.escape("2 of 16 rows were no distributions and make the result NaN.")):
            value = metric.compute()
        if kind in SUMMARIES:
            assert {key for key, x in value.items() if x.isnan()} == set(value) - COUNTS
            assert (value["count"], value["invalid"]) == (14, 2)
        else:
            assert value.isnan().sum() == (2 if kind == "none" else 1)

    def test_ignore_says_so_once(self, kind):
        metric = filled(kind, nan_strategy="ignore")
        p, q = self.bad()
        metric.update(p, q)
        with pytest.warns(UserWarning, match=re.escape("2 of 16 rows were no distributions and were left out.")):
            value = metric.compute()
        exact = filled(kind)
        exact.update(p[::2], q[::2])
        if kind in SUMMARIES:
            assert value["invalid"] == 2
            same(
                {k: x for k, x in value.items() if k != "invalid"},
                {k: x for k, x in exact.compute().items() if k != "invalid"},
            )
        else:
            same(value, exact.compute())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metric.update(p, q)
            metric.compute()
        metric.reset()
        metric.update(p, q)
        with pytest.warns(UserWarning, match="2 of 4 rows"):
            metric.compute()


class TestWithTorchmetrics:
    def test_collection(self):
        collection = MetricCollection(
            {"mean": KLDivergence(), "sum": KLDivergence(reduction="sum"), "bits": KLDivergence(base=2)}, prefix="val_"
        )
        for p, q in BATCHES:
            collection.update(p, q)
        values = collection.compute()
        p, q = joined()
        same(values["val_mean"], kl_divergence(p, q))
        same(values["val_sum"], kl_divergence(p, q, reduction="sum"))
        same(values["val_bits"], kl_divergence(p, q, base=2))
        assert len(collection.compute_groups) == 1, "they share their totals, so one update serves all"

    @pytest.mark.parametrize("distance", [0.0, 1e-5, 1e-3])
    def test_collection_does_not_mix_up_near_equal_metrics(self, distance):
        # torchmetrics lets metrics share a state that is equal to 1e-5 after the first batch.
        a = logits(4, 5)
        near = a.softmax(-1), (a + distance * logits(4, 5, seed=1)).softmax(-1)
        metrics = {
            "kl": {"direction": "forward"},
            "reverse_kl": {"direction": "reverse"},
            "warm": {"temperature": 2.0},
            "floor": {"eps": 1e-3},
        }
        collection = MetricCollection({name: KLDivergence(**options) for name, options in metrics.items()})
        collection.update(*near)
        p, q = pair(4, 5)
        collection.update(p, q)
        for name, value in collection.compute().items():
            metric = KLDivergence(**metrics[name])
            metric.update(*near)
            metric.update(p, q)
            same(value, metric.compute())

    @pytest.mark.parametrize("calls", ["uuf", "ufu", "uff", "fuf", "fff"])
    def test_collection_of_rows(self, calls):
        collection = MetricCollection(
            {"nats": KLDivergence(reduction="none"), "bits": KLDivergence(False, "none", base=2)}
        )
        for call, (p, q) in zip(calls, BATCHES, strict=True):
            collection.update(p, q) if call == "u" else collection(p, q)
        values = collection.compute()
        same(values["nats"], kl_divergence(*joined(), reduction="none"))
        same(values["bits"], kl_divergence(*joined(), reduction="none", base=2))

    def test_tracker(self):
        tracker = MetricTracker(KLDivergence(), maximize=False)
        for p, q in BATCHES:
            tracker.increment()
            tracker.update(p, q)
        values = tracker.compute_all()
        best, step = tracker.best_metric(return_step=True)
        assert best == values.min()
        assert step == values.argmin()
        same(values, torch.stack([kl_divergence(p, q) for p, q in BATCHES]))

    def test_bootstrapper(self):
        metric = BootStrapper(KLDivergence(), num_bootstraps=200, raw=True)
        p, q = pair(100, 5)
        torch.manual_seed(0)
        metric.update(p, q)
        values = metric.compute()
        rows = kl_divergence(p, q, reduction="none")
        assert abs(values["mean"] - rows.mean()) < 4 * rows.std() / 10 / 200**0.5
        assert 0.7 < values["std"] / (rows.std() / 10) < 1.3

    def test_arithmetic(self):
        both = KLDivergence() + KLDivergence(direction="reverse")
        for p, q in BATCHES:
            both.update(p, q)
        torch.testing.assert_close(both.compute(), kl_divergence(*joined(), direction="jeffreys"))
        doubled = 2 * KLDivergence()
        same(doubled(*BATCHES[0]), 2 * kl_divergence(*BATCHES[0]))

    def test_script(self):
        # What torchmetrics promises of scripting: the metric can be part of a module that is scripted.
        assert isinstance(torch.jit.script(TorchmetricsKL()), torch.jit.ScriptModule)
        assert isinstance(torch.jit.script(KLDivergence()), torch.jit.ScriptModule)
        assert isinstance(torch.jit.script(KLDivergence(reduction="none")), torch.jit.ScriptModule)

    def test_plot(self):
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("agg")
        metric = filled()
        for values in (None, metric.compute(), [kl_divergence(p, q) for p, q in BATCHES]):
            figure, axis = metric.plot(values)
            assert axis.lines
            matplotlib.pyplot.close(figure)

    def test_repr(self):
        assert repr(KLDivergence()) == "KLDivergence()"
        metric = KLDivergence(reduction="sum", input_format="logits", base=2)
        assert repr(metric) == "KLDivergence(reduction='sum', base=2, input_format=('logits', 'logits'))"

    def test_attributes(self):
        assert (KLDivergence.is_differentiable, KLDivergence.higher_is_better) == (True, False)

    @pytest.mark.parametrize("log_prob", [False, True])
    @pytest.mark.parametrize("theirs", ["mean", "sum", "none", None])
    def test_in_the_place_of_theirs(self, log_prob, theirs):
        batches = [pair(n, 5, input_format="log_probs" if log_prob else "probs", seed=n) for n in (4, 2, 7)]
        metrics = KLDivergence(log_prob, theirs), TorchmetricsKL(log_prob, theirs)
        for p, q in batches:
            torch.testing.assert_close(*(metric(p, q) for metric in metrics), rtol=1e-4, atol=0)
        ours, torchmetrics_value = (metric.compute() for metric in metrics)
        assert ours.dtype == torchmetrics_value.dtype
        assert ours.shape == torchmetrics_value.shape
        torch.testing.assert_close(ours, torchmetrics_value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_options_reach_the_metric(direction):
    p, q = pair(4, 3, 5, input_format="logits")
    options = {
        "input_format": ("logits", "log_probs"),
        "dim": 1,
        "direction": direction,
        "temperature": 2.0,
        "base": 2,
        "eps": 1e-3,
    }
    metric = KLDivergence(**options)
    metric.update(p, q)
    same(metric.compute(), kl_divergence(p, q, **options))


def test_a_warning_names_the_line_of_the_user(kind):
    metric, nothing = make(kind), torch.full((2, 3), torch.nan)
    metric.update(nothing, nothing)
    if kind in OF_TOKENS:
        calls = {"tokens cannot have been drawn": metric.compute, "tokens cannot": lambda: make(kind)(nothing, nothing)}
    elif kind in IN_PARTS:
        calls = {"no distributions": metric.compute, "no distributions and": lambda: make(kind)(nothing, nothing)}
    else:
        calls = {
            "no distributions": metric.compute,
            "With one class": lambda: make(kind).update(torch.ones(2, 1), torch.ones(2, 1)),
            "With one class its": lambda: make(kind)(torch.ones(2, 1), torch.ones(2, 1)),
        }
    for text, call in calls.items():
        with pytest.warns(UserWarning, match=text) as caught:
            call()
        assert {warning.filename for warning in caught if text in str(warning.message)} == {__file__}
