"""What p, q and weight may be; their checks; and the one path from them to the divergence of each row."""

import math
import warnings
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributions import Categorical, Distribution, OneHotCategorical

from klmetric.arithmetic.choose import kl_of_rows
from klmetric.arithmetic.tracing import may_look
from klmetric.options import Format, Options
from klmetric.rows.distributions import kl_of_distributions

Input: TypeAlias = Tensor | Distribution

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# From so many classes on, numpy finds the largest sooner than torch.
WIDE = 64


class Rows(NamedTuple):
    """The divergence of each row, and what it counts.

    Attributes:
        kl: in nats, of the batch shape (N, ...); NaN where a row is no pair of distributions.
        weight: of the shape of `kl`, or None where every row counts 1.
        agrees: whether p and q have the same most likely class, of the shape of `kl`; None where nobody asked, or
            where there are no classes.
    """

    kl: Tensor
    weight: Tensor | None
    agrees: Tensor | None = None

    @property
    def left_out(self) -> Tensor:
        """Rows of weight 0, as a mask of the shape of `kl`."""
        return torch.zeros_like(self.kl, dtype=torch.bool) if self.weight is None else self.weight == 0


def measure(p: Input, q: Input, weight: Tensor | None, options: Options, asks_for_agreement: bool = False) -> Rows:
    """Check the inputs and measure the divergence of each row, and whether its most likely class is the same."""
    is_of_tensors = isinstance(p, Tensor)
    if isinstance(p, Distribution) and isinstance(q, Distribution):
        if not (isinstance(p, _CATEGORICAL) and isinstance(q, _CATEGORICAL)):
            kl = kl_of_distributions(p, q, options)
            rows = Rows(kl, _check_weight(weight, kl))
            _check_rows(rows, None, options)
            return rows
        p, q, options = _categorical(p, q, options)
    elif isinstance(p, Distribution) or isinstance(q, Distribution):
        raise TypeError(
            "`p` and `q` must both be tensors or both be distributions."
            f" Got {type(p).__name__} and {type(q).__name__}. Wrap the tensor: Categorical(probs=...)."
        )
    p, q = _first_classes("p", p, options), _first_classes("q", q, options)
    _check_tensors(p, q, options.dim)
    if is_of_tensors and p.shape[options.dim] == 1 and not torch.compiler.is_compiling():
        _warn_of_one_class(p, options.dim, stacklevel=3)
    if options.dim not in (-1, p.ndim - 1):
        p, q = p.movedim(options.dim, -1), q.movedim(options.dim, -1)
    kl = kl_of_rows(p, q, options)
    agrees = most_likely(p) == most_likely(q) if asks_for_agreement else None
    rows = Rows(kl, _check_weight(weight, kl), agrees)
    _check_rows(rows, (p, q), options)
    return _without_gradient_of_left_out(rows, p, q, options)


def most_likely(x: Tensor) -> Tensor:
    """The first of the classes with the largest value, in each row."""
    if x.device.type != "cpu":
        return x.argmax(-1)
    # torch looks for the place of a maximum one number at a time; numpy several, in wide rows of float32.
    if x.dtype == torch.float32 and x.shape[-1] >= WIDE and x.ndim > 1:
        return torch.from_numpy(x.detach().resolve_neg().numpy().argmax(-1))
    return x.max(-1).indices


_CATEGORICAL = (Categorical, OneHotCategorical)


def _check_tensors(p: Tensor, q: Tensor, dim: int) -> None:
    for name, x in (("p", p), ("q", q)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"`{name}` must be a torch.Tensor or a torch.distributions.Distribution. Got {type(x).__name__}."
                + (" Convert it with torch.as_tensor." if x is not None else "")
            )
        _check_storage(name, x)
        if not x.is_floating_point():
            hint = "Class indices become probabilities by torch.nn.functional.one_hot(...).float()."
            if x.dtype is torch.bool:
                hint = "Masks of classes become probabilities by .float()."
            elif x.is_complex():
                hint = "If the imaginary parts are 0, take .real."
            raise TypeError(
                f"`{name}` must hold floating-point probabilities, log-probabilities or logits. Got {x.dtype}, shape"
                f" {tuple(x.shape)}. {hint}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"`{name}` must be float16, bfloat16, float32 or float64. Got {x.dtype}, shape {tuple(x.shape)}."
                " Convert it with .float(), times its scale if it has one."
            )
    if p.shape != q.shape:
        raise ValueError(
            f"`q` must have the shape of `p`. Got p {tuple(p.shape)} and q {tuple(q.shape)}."
            " Were both made with the same label set, of the same batch?"
        )
    if p.device != q.device:
        raise ValueError(f"`p` and `q` must share a device. Got p on {p.device}, q on {q.device}. Use q.to(p.device).")
    for name, x in (("p", p), ("q", q)):
        _check_data(name, x)
    if not -p.ndim <= dim < p.ndim:
        raise ValueError(
            f"`dim` must be an axis of the input. Got dim={dim} for shape {tuple(p.shape)}. Classes are mostly last."
        )
    if p.shape[dim] == 0:
        raise ValueError(f"The class axis must not be empty. Got shape {tuple(p.shape)}, dim={dim}. Is `dim` right?")


def _first_classes(name: str, x: Tensor, options: Options) -> Tensor:
    """The classes that count; what is no such tensor is left to `_check_tensors`."""
    classes, dim = options.classes, options.dim
    is_plain = isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested
    if classes is None or not is_plain or not -x.ndim <= dim < x.ndim:
        return x
    if classes > x.shape[dim]:
        raise ValueError(
            f"`classes` must be no more than both inputs have. Got classes={classes}, and `{name}` has"
            f" {x.shape[dim]}: shape {tuple(x.shape)}, dim={dim}. Is `dim` right?"
        )
    return x.narrow(dim, 0, classes)


def _check_storage(name: str, x: Tensor) -> None:
    """Raise for a tensor that is more than one number for each place."""
    if x.is_nested:
        raise TypeError(
            f"`{name}` must be one dense tensor. Got a nested one. Pad it with torch.nested.to_padded_tensor and leave"
            " the padding out with `weight`, or measure its parts one by one."
        )
    if x.layout is not torch.strided:
        raise TypeError(f"`{name}` must be dense. Got layout {x.layout}. Convert it with .to_dense().")
    if x.is_quantized:
        raise TypeError(f"`{name}` must hold plain numbers. Got {x.dtype}. Convert it with .dequantize().")


def _check_data(name: str, x: Tensor) -> None:
    """Raise for a tensor that claims to have data, but where the code is compiled, which is done on such."""
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
        raise TypeError(
            f"`{name}` must hold data. Got a FakeTensor, shape {tuple(x.shape)}, which has a shape alone. Make it"
            " outside of FakeTensorMode; for the shape of the result, on the device 'meta'."
        )


def _warn_of_one_class(x: Tensor, dim: int, stacklevel: int) -> None:
    """Say what a class axis of length 1 comes to."""
    warnings.warn(
        f"With one class its probability is 1, and the divergence 0. Got shape {tuple(x.shape)}, dim={dim}. Of a"
        " sigmoid, there are two classes: give torch.distributions.Bernoulli(logits=...) for p and q.",
        stacklevel=stacklevel + 1,
    )


def _check_weight(weight: Tensor | None, kl: Tensor) -> Tensor | None:
    """Check `weight` and spread it over the rows."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"`weight` must be a torch.Tensor. Got {type(weight).__name__}. Convert it with torch.as_tensor."
        )
    _check_storage("weight", weight)
    if weight.is_complex():
        raise TypeError(f"`weight` must be bool or real. Got {weight.dtype}. Take .real or .abs().")
    if weight.is_floating_point() and weight.dtype not in DTYPES:
        raise TypeError(
            "`weight` must be bool, an integer, float16, bfloat16, float32 or float64."
            f" Got {weight.dtype}. Convert it with .float()."
        )
    if weight.device not in (kl.device, torch.device("cpu")):
        raise ValueError(
            f"`weight` must be on the device of `p`, or on the CPU. Got weight on {weight.device} and p on {kl.device}."
        )
    _check_data("weight", weight)
    if weight.shape != kl.shape[: weight.ndim]:
        raise ValueError(
            "`weight` must have one entry per sample or per row: its shape a prefix of the batch shape."
            f" Got weight {tuple(weight.shape)} for batch shape {tuple(kl.shape)}. The class axis has no weights."
        )
    if may_look(weight) and weight.dtype is not torch.bool and not bool(((weight >= 0) & (weight < math.inf)).all()):
        lowest = weight.min().item()
        what = "NaN" if weight.isnan().any() else f"{lowest:g}" if lowest < 0 else "inf"
        raise ValueError(f"`weight` must be finite and at least 0. Got {what}, shape {tuple(weight.shape)}.")
    weight = weight.detach().to(kl.device, non_blocking=True)
    return weight.reshape(weight.shape + (1,) * (kl.ndim - weight.ndim)).expand(kl.shape)


def _categorical(p: Distribution, q: Distribution, options: Options) -> tuple[Tensor, Tensor, Options]:
    """The tensors that two categorical distributions were made from, and how to read them."""
    (p_param, p_format), (q_param, q_format) = _parameter(p), _parameter(q)
    options = replace(options, input_format=(p_format, q_format), dim=-1)
    p_param, q_param = _first_classes("p", p_param, options), _first_classes("q", q_param, options)
    if p_param.shape[-1] == q_param.shape[-1]:  # one prior for a batch of posteriors
        shape = torch.broadcast_shapes(p_param.shape, q_param.shape)  # type: ignore[no-untyped-call]
        p_param, q_param = p_param.expand(shape), q_param.expand(shape)
    return p_param, q_param, options


def _parameter(d: Distribution) -> tuple[Tensor, Format]:
    # `.logits` of a distribution made from probabilities are clamped, `.probs` of one made from logits rounded: only
    # `_param` is what it was made from.
    own = d._categorical if isinstance(d, OneHotCategorical) else d
    assert isinstance(own, Categorical)
    return own._param, "probs" if own._param is vars(own).get("probs") else "logits"


def _check_rows(rows: Rows, inputs: tuple[Tensor, Tensor] | None, options: Options) -> None:
    """With nan_strategy="error", raise if a row that counts is no pair of distributions."""
    if options.nan_strategy != "error":
        return
    if not may_look(rows.kl):
        raise ValueError(
            "nan_strategy='error' must look at the data, which compiled code cannot. Got it under torch.compile, under"
            " torch.vmap, or on the device 'meta'. Use 'propagate' or 'ignore' there."
        )
    invalid = rows.kl.isnan() & ~rows.left_out
    if not bool(invalid.any()):
        return
    first = tuple(invalid.nonzero()[0].tolist())
    where = str(first[0]) if len(first) == 1 else str(first)
    reason = "its divergence is NaN; look for NaN, and for values out of range, in the parameters"
    if inputs is not None:
        reason = "its divergence is NaN"
        faults = [(name, fault(x[first], f)) for name, x, f in zip("pq", inputs, options.input_format, strict=True)]
        reason = next((f"`{name}` {fault}" for name, fault in faults if fault), reason)
    raise ValueError(
        f"Every row must be a distribution (nan_strategy='error'). {int(invalid.sum())} of {invalid.numel()} rows are"
        f" not; the first is row {where}: {reason}. Mask it with `weight`, or use nan_strategy='ignore'."
    )


def fault(row: Tensor, input_format: Format) -> str | None:
    """What keeps one row from being a distribution, if anything does."""
    for text, bad in (
        ("NaN", row.isnan()),
        ("inf", row == math.inf),
        ("a negative probability", (row < 0) & (input_format == "probs")),
    ):
        if bool(bad.any()):
            place = int(bad.nonzero()[0, 0])
            return f"has {text} at class {place} ({row[place].item():g})"
    nothing = 0 if input_format == "probs" else -math.inf
    return f"is {nothing} in every class" if bool((row == nothing).all()) else None


def _without_gradient_of_left_out(rows: Rows, p: Tensor, q: Tensor, options: Options) -> Rows:
    """Keep NaN and infinite gradients of rows that do not count from reaching p and q.

    A gradient of 0 that flows into such a row comes out as 0 times infinity. Only a row that was never there has none:
    measure again with two equal rows in its place.
    """
    ignores = options.nan_strategy == "ignore"
    if not rows.kl.requires_grad or (rows.weight is None and not ignores):
        return rows
    invalid = rows.kl.isnan()
    left_out = rows.left_out | invalid if ignores else rows.left_out
    if may_look(left_out) and not bool(left_out.any()):
        return rows
    mask = left_out.unsqueeze(-1)
    kl = kl_of_rows(p.masked_fill(mask, 1), q.masked_fill(mask, 1), options)
    return rows._replace(kl=kl.masked_fill(invalid & left_out, math.nan))
