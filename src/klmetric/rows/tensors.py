"""What the tensors p, q and weight may be."""

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.tracing import may_look
from klmetric.options import Options

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How far probabilities may add up to more than 1, at least: those that were printed with a few decimals do.
EXCESS = 1e-3


def is_sharded(x: Any) -> bool:
    """Whether it is a `DTensor`, which is not imported for that."""
    return type(x) is not Tensor and type(x).__name__ == "DTensor"


def check_tensors(p: Tensor, q: Tensor, dim: int) -> None:
    """Raise unless p and q are tensors of the same distributions, as far as can be told without their data."""
    if (
        type(p) is type(q) is Tensor
        and p.dtype in DTYPES
        and q.dtype in DTYPES
        and p.layout is q.layout is torch.strided
        and not (p.is_nested or q.is_nested)
        and p.shape == q.shape
        and p.device == q.device
        and -p.ndim <= dim < p.ndim
        and p.shape[dim]
    ):
        return  # nothing is wrong, which is known sooner than what is
    for name, x in (("p", p), ("q", q)):
        check_one(name, x)
    if p.shape != q.shape:
        raise ValueError(
            f"`q` must have the shape of `p`. Got p {tuple(p.shape)} and q {tuple(q.shape)}. {_hint_of_shapes(p, q)}"
        )
    if p.device != q.device:
        raise ValueError(f"`p` and `q` must share a device. Got p on {p.device}, q on {q.device}. Use q.to(p.device).")
    for name, x in (("p", p), ("q", q)):
        check_data(name, x)
    check_axis(p, dim)


def check_one(name: str, x: object) -> None:
    """Raise unless p or q is a tensor that can hold distributions."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor or a torch.distributions.Distribution. Got {type(x).__name__}."
            f"{_hint_of_kind(name, x)}"
        )
    check_storage(name, x)
    if not x.is_floating_point():
        hint = "Class indices become probabilities by torch.nn.functional.one_hot(...).float()."
        if x.ndim > 1:
            hint = f"If they are one-hot already, .float(). {hint}"
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


def _hint_of_shapes(p: Tensor, q: Tensor) -> str:
    if p.ndim == 2 and p.shape == q.shape[::-1]:
        return "`q` has the shape of `p` transposed: which of the two needs .T?"
    if sorted(p.shape) == sorted(q.shape):
        return "These are the same axes in another order: which of the two needs .movedim()?"
    return "Were both made with the same label set, of the same batch?"


def _hint_of_kind(name: str, x: Any) -> str:
    """What to do with something that is no tensor."""
    if x is None:
        return ""
    if isinstance(x, Mapping):
        return f" Take {name}['logits']." if "logits" in x else f" Take one of {list(x)[:8]}."
    if isinstance(getattr(x, "logits", None), Tensor):
        return f" Take {name}.logits."
    if isinstance(x, (list, tuple)) and len(x) == 2 and all(isinstance(one, Tensor) for one in x):
        if not x[1].is_floating_point():
            return " Of values and indices of a topk, make a klmetric.TopK(values, indices, classes)."
        return " Of hidden states and the weight of a head, make a klmetric.Head(hidden, weight)."
    return " Convert it with torch.as_tensor."


def check_axis(x: Tensor, dim: int) -> None:
    """Raise unless there is such an axis of classes."""
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"`dim` must be an axis of the input. Got dim={dim} for shape {tuple(x.shape)}. Classes are mostly last."
        )
    if x.shape[dim] == 0:
        raise ValueError(f"The class axis must not be empty. Got shape {tuple(x.shape)}, dim={dim}. Is `dim` right?")


def first_classes(name: str, x: Tensor, options: Options) -> Tensor:
    """The classes that count; what is no such tensor is left to `check_tensors`."""
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


def check_storage(name: str, x: Tensor) -> None:
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


def check_data(name: str, x: Tensor) -> None:
    """Raise for a tensor that claims to have data, but where the code is compiled, which is done on such."""
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
        raise TypeError(
            f"`{name}` must hold data. Got a FakeTensor, shape {tuple(x.shape)}, which has a shape alone. Make it"
            " outside of FakeTensorMode; for the shape of the result, on the device 'meta'."
        )


def warn_of_one_class(x: Tensor, dim: int) -> None:
    """Say what a class axis of length 1 comes to, at the line that gave it."""
    warnings.warn(
        f"With one class its probability is 1, and the divergence 0. Got shape {tuple(x.shape)}, dim={dim}. Of a"
        " sigmoid, there are two classes: give torch.distributions.Bernoulli(logits=...) for p and q.",
        stacklevel=level_of_user(),
    )


def level_of_user() -> int:
    """Of the caller's callers, the first that is neither in this library nor in those that call it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "klmetric",
        "torchmetrics",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    return level


def weight_of_rows(weight: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Check `weight` and spread it over the rows."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"`weight` must be a torch.Tensor. Got {type(weight).__name__}. Convert it with torch.as_tensor."
        )
    check_storage("weight", weight)
    if weight.is_complex():
        raise TypeError(f"`weight` must be bool or real. Got {weight.dtype}. Take .real or .abs().")
    if weight.is_floating_point() and weight.dtype not in DTYPES:
        raise TypeError(
            "`weight` must be bool, an integer, float16, bfloat16, float32 or float64."
            f" Got {weight.dtype}. Convert it with .float()."
        )
    if weight.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"`weight` must be on the device of `p`, or on the CPU. Got weight on {weight.device} and p on {device}."
        )
    check_data("weight", weight)
    if weight.shape != shape[: weight.ndim]:
        raise ValueError(
            "`weight` must have one entry per sample or per row: its shape a prefix of the batch shape."
            f" Got weight {tuple(weight.shape)} for batch shape {tuple(shape)}. The class axis has no weights."
        )
    if not weight.is_floating_point() and weight.dtype is not torch.bool:
        weight = weight.long()  # unsigned ones of 16 bits and more have no arithmetic
    if weight.dtype is not torch.bool:
        is_valid = (weight >= 0) & (weight < math.inf)
        if device_of_float64(weight.device).type != "cpu":  # it is not waited for: `vector.check_weights` finds the NaN
            weight = torch.where(is_valid, weight.double(), math.nan)
        elif may_look(weight) and not bool(is_valid.all()):
            lowest = weight.min().item()
            what = "NaN" if weight.isnan().any() else f"{lowest:g}" if lowest < 0 else "inf"
            raise ValueError(f"`weight` must be finite and at least 0. Got {what}, shape {tuple(weight.shape)}.")
    weight = weight.detach().to(device, non_blocking=True)
    return weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim)).expand(shape)
