"""Every error: its kind, its text, and that nothing has changed after it."""

import pickle
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributions as D
from cases import INVALID_ROWS, pair
from torch._subclasses import FakeTensorMode

from klmetric import KLDivergence, kl_divergence

P, Q = pair(4, 3)
FAKE = FakeTensorMode().from_tensor(P)
FLOAT8 = [x for name in dir(torch) if name.startswith("float8_") and isinstance(x := getattr(torch, name), torch.dtype)]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, about kinds of tensors that are new, or old
    QUANTIZED = torch.quantize_per_tensor(P, 0.01, 0, torch.quint8)
    SPARSE = {layout: P.to_sparse(layout=layout) for layout in (torch.sparse_csr, torch.sparse_csc)}
    NESTED = {
        layout: [torch.nested.nested_tensor(parts, layout=layout) for parts in ([P, P[:2]], [P[:, 0], P[:2, 0]])]
        for layout in (torch.strided, torch.jagged)
    }

# name: (options, p, q, weight, kind, text)
BAD_INPUT = {
    "shapes_differ": (
        {}, P, torch.rand(4, 2), None, ValueError,
        "`q` must have the shape of `p`. Got p (4, 3) and q (4, 2). Were both made with the same label set, of the same"
        " batch?",
    ),
    "transposed": (
        {}, P, Q.T, None, ValueError,
        "Got p (4, 3) and q (3, 4). `q` has the shape of `p` transposed: which of the two needs .T?",
    ),
    "axes_in_another_order": (
        {}, P.view(2, 2, 3), Q.view(2, 3, 2), None, ValueError,
        "These are the same axes in another order: which of the two needs .movedim()?",
    ),
    "dict": ({}, {"logits": P}, Q, None, TypeError, "Got dict. Take p['logits']."),
    "dict_of_others": ({}, P, {"loss": 1, "y": Q}, None, TypeError, "Got dict. Take one of ['loss', 'y']."),
    "output": ({}, SimpleNamespace(logits=P), Q, None, TypeError, "Got SimpleNamespace. Take p.logits."),
    "hidden_and_weight": (
        {}, (P, Q), Q, None, TypeError,
        "Got tuple. Of hidden states and the weight of a head, make a klmetric.Head(hidden, weight).",
    ),
    "values_and_indices": (
        {}, P.topk(2), Q, None, TypeError,
        "Got topk. Of values and indices of a topk, make a klmetric.TopK(values, indices, classes).",
    ),
    "no_classes": (
        {}, P[:, :0], Q[:, :0], None, ValueError,
        "The class axis must not be empty. Got shape (4, 0), dim=-1. Is `dim` right?",
    ),
    "no_such_axis": (
        {"dim": 2}, P, Q, None, ValueError,
        "`dim` must be an axis of the input. Got dim=2 for shape (4, 3). Classes are mostly last.",
    ),
    "scalar": (
        {}, torch.tensor(1.0), torch.tensor(1.0), None, ValueError,
        "`dim` must be an axis of the input. Got dim=-1 for shape (). Classes are mostly last.",
    ),
    "integers": (
        {}, torch.ones(4, 3, dtype=torch.int64), Q, None, TypeError,
        "`p` must hold floating-point probabilities, log-probabilities or logits. Got torch.int64, shape (4, 3). If"
        " they are one-hot already, .float(). Class indices become probabilities by torch.nn.functional.one_hot(...)",
    ),
    "class_indices": (
        {}, torch.ones(4, dtype=torch.int64), Q, None, TypeError,
        "Got torch.int64, shape (4,). Class indices become probabilities by torch.nn.functional.one_hot(...).float().",
    ),
    "complex": (
        {}, P, Q.to(torch.complex64), None, TypeError,
        "`q` must hold floating-point probabilities, log-probabilities or logits. Got torch.complex64, shape (4, 3). If"
        " the imaginary parts are 0, take .real.",
    ),
    "no_tensor": (
        {}, P.tolist(), Q, None, TypeError,
        "`p` must be a torch.Tensor or a torch.distributions.Distribution. Got list. Convert it with torch.as_tensor.",
    ),
    "nothing": (
        {}, P, None, None, TypeError,
        "`q` must be a torch.Tensor or a torch.distributions.Distribution. Got NoneType.",
    ),
    "sparse": (
        {}, P, Q.to_sparse(), None, TypeError,
        "`q` must be dense. Got layout torch.sparse_coo. Convert it with .to_dense().",
    ),
    "two_devices": (
        {}, P, Q.to("meta"), None, ValueError,
        "`p` and `q` must share a device. Got p on cpu, q on meta. Use q.to(p.device).",
    ),
    "weight_on_another_device": (
        {}, P, Q, torch.ones(4, device="meta"), ValueError,
        "`weight` must be on the device of `p`, or on the CPU. Got weight on meta and p on cpu.",
    ),
    "weight_of_classes": (
        {}, P, Q, torch.ones(4, 3), ValueError,
        "`weight` must have one entry per sample or per row: its shape a prefix of the batch shape. Got weight (4, 3)"
        " for batch shape (4,). The class axis has no weights.",
    ),
    "weight_of_another_batch": (
        {}, P, Q, torch.ones(3), ValueError, "Got weight (3,) for batch shape (4,).",
    ),
    "negative_weight": (
        {}, P, Q, torch.tensor([1.0, -0.5, 1.0, 1.0]), ValueError,
        "`weight` must be finite and at least 0. Got -0.5, shape (4,).",
    ),
    "nan_weight": (
        {}, P, Q, torch.tensor([1.0, torch.nan, 1.0, 1.0]), ValueError,
        "`weight` must be finite and at least 0. Got NaN, shape (4,).",
    ),
    "infinite_weight": (
        {}, P, Q, torch.tensor([1.0, torch.inf, 1.0, 1.0]), ValueError,
        "`weight` must be finite and at least 0. Got inf, shape (4,).",
    ),
    "weight_no_tensor": (
        {}, P, Q, [1.0] * 4, TypeError, "`weight` must be a torch.Tensor. Got list. Convert it with",
    ),
    "complex_weight": (
        {}, P, Q, torch.ones(4, dtype=torch.complex64), TypeError,
        "`weight` must be bool or real. Got torch.complex64. Take .real or .abs().",
    ),
    "bool": (
        {}, P > 0.5, Q, None, TypeError,
        "Got torch.bool, shape (4, 3). Masks of classes become probabilities by .float().",
    ),
    "meta": (
        {"nan_strategy": "error"}, P.to("meta"), Q.to("meta"), None, ValueError,
        "nan_strategy='error' must look at the data, which compiled code cannot. Got it under torch.compile, under"
        " torch.vmap, or on the device 'meta'.",
    ),
    "fake": (
        {}, P, FAKE, None, TypeError, "`q` must hold data. Got a FakeTensor, shape (4, 3), which has a shape alone.",
    ),
    "fake_weight": ({}, P, Q, FAKE[:, 0], TypeError, "`weight` must hold data. Got a FakeTensor, shape (4,)"),
    "quantized": (
        {}, QUANTIZED, Q, None, TypeError,
        "`p` must hold plain numbers. Got torch.quint8. Convert it with .dequantize().",
    ),
    "weight_quantized": (
        {}, P, Q, QUANTIZED[:, 0], TypeError,
        "`weight` must hold plain numbers. Got torch.quint8. Convert it with .dequantize().",
    ),
    "sparse_weight": (
        {}, P, Q, torch.ones(4).to_sparse(), TypeError,
        "`weight` must be dense. Got layout torch.sparse_coo. Convert it with .to_dense().",
    ),
    "tensor_with_distribution": (
        {}, P, D.Categorical(probs=Q), None, TypeError,
        "`p` and `q` must both be tensors or both be distributions. Got Tensor and Categorical. Wrap the tensor:"
        " Categorical(probs=...).",
    ),
    "pair_without_divergence": (
        {}, D.Normal(0.0, 1.0), D.Categorical(probs=Q), None, TypeError,
        "The pair of distributions must have a KL divergence registered in torch.distributions. Got Normal and"
        " Categorical. Must both be wrapped in Independent? Otherwise register one with"
        " torch.distributions.kl.register_kl, or estimate it from samples.",
    ),
    "temperature_of_a_normal": (
        {"temperature": 2.0}, D.Normal(0.0, 1.0), D.Normal(0.0, 2.0), None, ValueError,
        "`temperature` is for categorical distributions. Got temperature=2.0 with Normal and Normal.",
    ),
    "eps_of_a_normal": (
        {"eps": 0.1}, D.Normal(0.0, 1.0), D.Normal(0.0, 2.0), None, ValueError,
        "`eps` is for categorical distributions. Got eps=0.1 with Normal and Normal.",
    ),
    "categorical_of_other_classes": (
        {}, D.Categorical(probs=P), D.Categorical(probs=torch.rand(4, 2)), None, ValueError,
        "`q` must have the shape of `p`. Got p (4, 3) and q (4, 2).",
    ),
}  # fmt: skip

for layout in SPARSE:
    BAD_INPUT[str(layout)] = (
        {}, SPARSE[layout], Q, None, TypeError, f"`p` must be dense. Got layout {layout}. Convert it with",
    )  # fmt: skip
for layout in NESTED:
    nested, lengths = NESTED[layout]
    text = "must be one dense tensor. Got a nested one. Pad it with torch.nested.to_padded_tensor and leave the padding"
    BAD_INPUT[f"nested_{layout}"] = ({}, nested, nested, None, TypeError, f"`p` {text}")
    BAD_INPUT[f"nested_{layout}_beside_dense"] = ({}, P, nested, None, TypeError, f"`q` {text}")
    BAD_INPUT[f"nested_{layout}_weight"] = ({}, P, Q, lengths, TypeError, f"`weight` {text}")
for dtype in FLOAT8:
    converted = torch.zeros(4, 3, dtype=torch.uint8).view(dtype)
    BAD_INPUT[str(dtype)] = (
        {}, P, converted, None, TypeError,
        f"`q` must be float16, bfloat16, float32 or float64. Got {dtype}, shape (4, 3). Convert it with .float(), times"
        " its scale if it has one.",
    )  # fmt: skip
    BAD_INPUT[f"weight_{dtype}"] = (
        {}, P, Q, converted[:, 0], TypeError,
        f"`weight` must be bool, an integer, float16, bfloat16, float32 or float64. Got {dtype}. Convert it",
    )  # fmt: skip

for name, (input_format, values, fault) in INVALID_ROWS.items():
    p, q = pair(4, 3, input_format=input_format)
    q[2] = torch.tensor(values)
    BAD_INPUT[f"row_{name}"] = (
        {"nan_strategy": "error", "input_format": input_format}, p, q, None, ValueError,
        "Every row must be a distribution (nan_strategy='error'). 1 of 4 rows are not; the first is row 2: `q`"
        f" {fault}",
    )  # fmt: skip

# name: (options, kind, text)
BAD_OPTIONS = {
    "log_prob": ({"log_prob": 1}, TypeError, "`log_prob` must be a bool. Got 1."),
    "log_prob_is_a_reduction": (
        {"log_prob": "mean"}, TypeError, "`log_prob` must be a bool. Got 'mean'. Did you mean reduction='mean'?",
    ),
    "log_prob_is_a_format": (
        {"log_prob": "logits"}, TypeError,
        "`log_prob` must be a bool. Got 'logits'. Did you mean input_format='logits'?",
    ),
    "log_prob_is_data": (
        {"log_prob": P}, TypeError,
        "`log_prob` must be a bool. Got a tensor. Data go to metric.update(p, q), or to the function"
        " kl_divergence(p, q).",
    ),
    "reduction": (
        {"reduction": "means"}, ValueError,
        "`reduction` must be one of 'mean', 'sum', 'batchmean', 'none'. Got 'means'. Did you mean 'mean'?",
    ),
    "input_format": (
        {"input_format": "logit"}, ValueError,
        "`input_format` must be one of 'probs', 'log_probs', 'logits'. Got 'logit'. Did you mean 'logits'?",
    ),
    "input_format_of_three": (
        {"input_format": ("probs", "probs", "probs")}, ValueError,
        "`input_format` must be one format, or a pair (for p, for q). Got ('probs', 'probs', 'probs').",
    ),
    "input_format_number": (
        {"input_format": 3}, ValueError, "`input_format` must be one of 'probs', 'log_probs', 'logits'. Got 3.",
    ),
    "log_prob_against_input_format": (
        {"log_prob": True, "input_format": "probs"}, ValueError,
        "`log_prob=True` means `input_format='log_probs'`, and the two must agree. Got log_prob=True and"
        " input_format='probs'. Leave `log_prob` out.",
    ),
    "direction": (
        {"direction": "backward"}, ValueError,
        "`direction` must be one of 'forward', 'reverse', 'jeffreys', 'jensen_shannon'. Got 'backward'.",
    ),
    "nan_strategy": (
        {"nan_strategy": "warn"}, ValueError,
        "`nan_strategy` must be one of 'propagate', 'ignore', 'error'. Got 'warn'.",
    ),
    "dim": ({"dim": 1.0}, TypeError, "`dim` must be an int, the index of the class axis. Got 1.0."),
    "temperature": ({"temperature": 0}, ValueError, "`temperature` must be a finite number above 0. Got 0."),
    "temperature_nan": ({"temperature": float("nan")}, ValueError, "`temperature` must be a finite number above 0."),
    "base": (
        {"base": 1}, ValueError,
        "`base` must be a finite number above 1. Got 1. Use 2 for bits, None for nats.",
    ),
    "eps": (
        {"eps": -0.1}, ValueError,
        "`eps` must be a probability, at least 0 and below 1. Got -0.1. It is a floor under probabilities.",
    ),
}  # fmt: skip


def state(metric):
    return pickle.dumps((metric.metric_state, metric.update_count))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("call", ["update", "forward", "functional"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, call, reduction):
    options, p, q, weight, kind, text = BAD_INPUT[case]
    if call == "functional":
        with pytest.raises(kind, match=re.escape(text)):
            kl_divergence(p, q, weight=weight, reduction=reduction, **options)
        return
    metric = KLDivergence(reduction=reduction, **options)
    good = pair(2, 3, input_format=options.get("input_format", "probs"))
    good = good if "is for categorical" not in text else [D.Categorical(probs=x) for x in good]
    if "dim" not in options:
        metric.update(*good)
    before = state(metric)
    with pytest.raises(kind, match=re.escape(text)):
        getattr(metric, call)(p, q, weight)
    assert state(metric) == before
    if "dim" not in options:
        expected = KLDivergence(reduction=reduction, **options)
        expected.update(*good)
        assert torch.equal(metric.compute(), expected.compute())


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case):
    options, kind, text = BAD_OPTIONS[case]
    with pytest.raises(kind, match=re.escape(text)):
        kl_divergence(P, Q, **options)
    with pytest.raises(kind, match=re.escape(text)):
        KLDivergence(**options)


def test_unknown_option():
    with pytest.raises(TypeError, match="unexpected keyword argument 'reduce'"):
        kl_divergence(P, Q, reduce="mean")
    for name, meant in {
        "reduce": "reduction",
        "format": "input_format",
        "from_logits": "input_format='logits'",
        "log_target": "input_format='log_probs'",
        "axis": "dim",
        "num_classes": "classes",
    }.items():
        with pytest.raises(ValueError, match=rf"^Unexpected keyword arguments: `{name}`\. Did you mean {meant}\?$"):
            KLDivergence(**{name: "mean"})
    with pytest.raises(ValueError, match=r"^Unexpected keyword arguments: `xyz`$"):
        KLDivergence(xyz=1)
    with pytest.raises(ValueError, match="Expected keyword argument `dist_sync_on_step` to be an `bool` but got 1"):
        KLDivergence(dist_sync_on_step=1)


def test_unknown_argument_names_no_inner_class():
    for call in (KLDivergence().update, KLDivergence().forward):
        with pytest.raises(TypeError, match=r"^(update|forward)\(\) got an unexpected keyword argument 'mask'"):
            call(P, Q, mask=P)


def test_bad_row_of_a_sequence_is_named_by_its_indices():
    p, q = pair(2, 3, 4)
    p[1, 2, 0] = -1.0
    with pytest.raises(ValueError, match=re.escape("1 of 6 rows are not; the first is row (1, 2): `p` has a negative")):
        kl_divergence(p, q, nan_strategy="error")


def test_metric_on_another_device_than_its_input():
    metric = KLDivergence().to("meta")
    text = "The metric must be on the device of its input. Got p on cpu and the metric on meta. Use metric.to('cpu')."
    with pytest.raises(ValueError, match=re.escape(text)):
        metric.update(P, Q)
