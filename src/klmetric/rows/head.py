"""`Head`: logits that are made of hidden states block by block, while they are measured."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klmetric.arithmetic.projection import Projection, rows_at_once
from klmetric.arithmetic.tracing import has_gradient, is_recorded
from klmetric.options import Format, Options, as_number
from klmetric.rows.rows import Rows
from klmetric.rows.tensors import DTYPES, check_storage, first_classes

if TYPE_CHECKING:
    from klmetric.rows.topk import TopK

    Input: TypeAlias = "Head | Tensor | TopK"

# Measures rows: the logits, or whatever else they are, of both sides, and the targets, if there are any.
OfBlock: TypeAlias = Callable[[Any, Any, Tensor | None], Rows]


class Head:
    """Hidden states and the head of a model, in the place of its logits, which are never held in memory all at once.

    Logits are made and measured in blocks of rows of 64 MiB, so that memory does not grow with the rows:

        logits = softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap)

    A weight that is a tensor is multiplied in float32, or in float64 if `hidden` or `weight` is float64: of a model in
    bfloat16, the logits are not rounded to that. Anything else is called, and its logits are taken as they come.
    Gradients flow to all of it: the logits are made once more for them, block by block.

    Args:
        hidden: what the head is given (after the last norm), shape (N, ..., width); a lone (width,) is one row.
        weight: of the head, shape (classes, width), as `torch.nn.Linear.weight`; or a callable that makes logits (rows,
            classes) of hidden states (rows, width), such as a module with quantised weights. (It is called with one row
            before, to see how many classes there are.)
        bias: shape (classes,); for a `weight` that is a tensor.
        scale: what the logits are multiplied by.
        softcap: what keeps them between -softcap and softcap; None for nothing.

    Attributes:
        shape: of the logits.
        dtype: of the logits.
        device: of the logits.

    Raises:
        TypeError: for an argument of the wrong kind.
        ValueError: for shapes or devices that do not belong together, and for a `scale` or `softcap` that is none.

    Examples:
        >>> import torch
        >>> from klmetric import Head, KLDivergence
        >>> teacher, student = torch.nn.Linear(16, 1000), torch.nn.Linear(8, 1000)
        >>> h_teacher, h_student = torch.randn(4, 128, 16), torch.randn(4, 128, 8)
        >>> metric = KLDivergence()
        >>> p = Head(h_teacher, teacher.weight, teacher.bias)
        >>> q = Head(h_student, student.weight, student.bias, softcap=30.0)
        >>> p.shape
        torch.Size([4, 128, 1000])
        >>> metric.update(p, q)
        >>> bool(metric.compute() > 0)
        True
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | Callable[[Tensor], Tensor],
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        _check_tensor("hidden", hidden, "the last hidden states, shape (N, ..., width)")
        factor, cap = as_number("scale", scale), None if softcap is None else as_number("softcap", softcap)
        if factor is None or not math.isfinite(factor):
            raise ValueError(f"`scale` must be a finite number. Got {scale!r}. Leave it out for 1.")
        if softcap is not None and (cap is None or not 0 < cap < math.inf):
            raise ValueError(f"`softcap` must be a finite number above 0, or None. Got {softcap!r}.")
        if hidden.ndim == 0 or not hidden.shape[-1]:
            raise ValueError(
                f"`hidden` must have a last axis, of the head's width. Got shape {tuple(hidden.shape)}. Give"
                " (N, ..., width)."
            )
        self.hidden, self._scale, self._softcap = hidden, float(factor), cap
        self._make: Projection | Callable[[Tensor], Tensor]
        if isinstance(weight, Tensor):
            _check_head(hidden, weight, bias)
            self._make = Projection(weight, bias, self._scale, cap)
            self._classes, self.dtype = len(weight), self._make.dtype_with(hidden)
            return
        if not callable(weight):
            raise TypeError(
                "`weight` must be a torch.Tensor, shape (classes, width), or a callable that makes logits of hidden"
                f" states. Got {type(weight).__name__}. Of a model, give model.lm_head.weight, or model.lm_head."
            )
        if bias is not None:
            raise ValueError(
                f"`bias` is for a `weight` that is a tensor. Got a bias and {type(weight).__name__}, which is called"
                " and adds its own. Leave it out."
            )
        self._make, self._classes = weight, 0
        with torch.no_grad():
            one = self._called(hidden.reshape(-1, hidden.shape[-1])[:1])
        self._classes, self.dtype = one.shape[-1], one.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size([*self.hidden.shape[:-1], self._classes])

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self.hidden.device

    @property
    def has_gradient(self) -> bool:
        """Whether derivatives may be wanted of what the logits are made of, which is not known of what is called."""
        return has_gradient(*self.made_of) if isinstance(self._make, Projection) else torch.is_grad_enabled()

    @property
    def made_of(self) -> list[Tensor]:
        """The tensors that the logits are made of, as far as they are known."""
        if not isinstance(self._make, Projection):
            return [self.hidden]
        bias = self._make.bias
        return [self.hidden, self._make.weight, *([] if bias is None else [bias])]

    def __repr__(self) -> str:
        return f"Head(logits of shape {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __getitem__(self, places: Any) -> Tensor:
        """The logits in some places of the batch shape, as `logits[places]` would give."""
        return self.logits(self.hidden[places])

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits of any hidden states, all at once.

        Args:
            hidden: shape (..., width).
            out: where they may be put, shape (at least the rows, classes).
        """
        if isinstance(self._make, Projection):
            return self._make(hidden, None if self.has_gradient else out)
        x = self._called(hidden.reshape(-1, hidden.shape[-1])) * self._scale
        x = x if self._softcap is None else (x / self._softcap).tanh() * self._softcap
        return x.view(*hidden.shape[:-1], self._classes)

    def memory(self, rows: int) -> Tensor | None:
        """What `logits` of so many rows may be put into, time and again."""
        is_ours = isinstance(self._make, Projection) and not self.has_gradient
        return torch.empty(rows, self._classes, dtype=self.dtype, device=self.device) if is_ours else None

    def first(self, classes: int) -> "Head":
        """The same of the first classes alone."""
        head = object.__new__(Head)
        head.__dict__.update(vars(self), _classes=classes)
        if isinstance(self._make, Projection):
            bias = self._make.bias
            bias = None if bias is None else bias[:classes]
            head._make = replace(self._make, weight=self._make.weight[:classes], bias=bias)
        return head

    def _called(self, hidden: Tensor) -> Tensor:
        """What the callable makes of rows, so many classes of it as are wanted."""
        x = self._make(hidden)
        classes = self._classes or (x.shape[-1] if isinstance(x, Tensor) and x.ndim else 0)
        if (
            not isinstance(x, Tensor)
            or x.dtype not in DTYPES
            or x.ndim != 2
            or len(x) != len(hidden)
            or not x.shape[-1] >= classes > 0
        ):
            what = f"{x.dtype}, shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                "`weight`, where it is called, must make floating-point logits (rows, classes) of hidden states (rows,"
                f" width). Got {what}, of hidden states of shape {tuple(hidden.shape)}. Wrap it in a function that"
                " does."
            )
        return x[:, :classes]


def _check_tensor(name: str, x: Any, what: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, {what}. Got {type(x).__name__}.")
    check_storage(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(
            f"`{name}` must be float16, bfloat16, float32 or float64: {what}. Got {x.dtype}, shape {tuple(x.shape)}."
            " Quantised heads go in as a module, which is called."
        )


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_tensor("weight", weight, "shape (classes, width)")
    if weight.ndim != 2 or weight.shape[-1] != hidden.shape[-1] or not len(weight):
        hint = "Is it of another model?"
        if weight.ndim == 2 and len(weight) == hidden.shape[-1]:
            hint = "As in torch.nn.Linear, the classes come first: give weight.T."
        elif hidden.ndim == 2 and weight.ndim != 2 and weight.shape[-1:] == hidden.shape[-1:]:
            hint = "Are the two in the right order? It is Head(hidden, weight)."
        raise ValueError(
            "`weight` must have the shape (classes, width), the width being that of `hidden`."
            f" Got weight {tuple(weight.shape)} and hidden {tuple(hidden.shape)}. {hint}"
        )
    if bias is not None:
        _check_tensor("bias", bias, "shape (classes,)")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"`bias` must have one number for each class. Got bias {tuple(bias.shape)} and weight"
                f" {tuple(weight.shape)}. Is it of another head?"
            )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"`hidden` and `{name}` must share a device. Got hidden on {hidden.device}, {name} on {x.device}."
                " Move one of them with .to()."
            )


# ---- a block of rows at a time -------------------------------------------------------------------------------------
def as_logits(p: Any, q: Any, options: Options) -> tuple[Head | Tensor, Head | Tensor, Options]:
    """The two sides, of which one at least is a head, with the classes that count; and how they are read."""
    for name, x, other in (("p", p, q), ("q", q, p)):
        if not isinstance(x, (Head, Tensor)):
            raise TypeError(
                f"`{name}` must be a Head or a torch.Tensor where the other side is a Head. Got {type(x).__name__} and"
                f" {type(other).__name__}. Of a categorical distribution, give its logits."
            )
    if options.dim not in (-1, len(p.shape) - 1):
        raise ValueError(
            f"`dim` must be -1 with a Head, whose classes are last. Got dim={options.dim}. Move those of the other side"
            " there."
        )
    formats = _format(p, options.input_format[0]), _format(q, options.input_format[1])
    options = replace(options, input_format=formats, dim=-1)
    return _first("p", p, options), _first("q", q, options), options


def _format(x: Head | Tensor, given: Format) -> Format:
    return "logits" if isinstance(x, Head) else given


def _first(name: str, x: Head | Tensor, options: Options) -> Head | Tensor:
    if isinstance(x, Tensor):
        return first_classes(name, x, options)
    first_classes(name, stand_in(x), options)  # raises where there are too few
    return x if options.classes is None else x.first(options.classes)


def stand_in(x: "Head | Tensor | TopK") -> Tensor:
    """A tensor of the shape, the dtype and the device of the logits, without their memory, to be checked."""
    return x if isinstance(x, Tensor) else torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)


def measure_in_blocks(p: "Input", q: "Input", weight: Tensor | None, targets: Tensor | None, of_block: OfBlock) -> Rows:
    """What `of_block` makes of the rows, a block of them at a time. Those of weight 0 are not even made.

    Args:
        p: reference.
        q: approximation, of the shape of p. One of the two at least is a head.
        weight: of each row; None for 1.
        targets: of each row, if there are any.
        of_block: what to do with each block.
    """
    if is_recorded() or p.device.type == "meta":  # the operations count, and there is nothing to be looked at
        return of_block(_logits(p), _logits(q), targets)._replace(weight=weight)
    shape = p.shape[:-1]
    batch = shape or torch.Size([1])  # a lone row is a batch of one
    counts = torch.ones(batch, dtype=torch.bool, device="cpu") if weight is None else weight.reshape(batch)
    places = counts.nonzero().to(p.device).unbind(-1)
    n = max(len(places[0]), 1)
    size = min(rows_at_once(p.shape[-1]), n)
    of_p, of_q = (x.memory(size) if isinstance(x, Head) else None for x in (p, q))

    def measure(a: Tensor, b: Tensor, chosen: Tensor | None) -> Rows:
        return of_block(_logits(p, a, of_p), _logits(q, b, of_q), chosen)

    def blocks(x: "Input | None") -> Iterable[Any]:
        if x is None:
            return repeat(None)
        x = x.hidden if isinstance(x, Head) else x
        x = x if shape else x[None]
        if isinstance(x, Tensor) and not has_gradient(x):
            return (x[tuple(place[k : k + size] for place in places)] for k in range(0, n, size))
        # Cut by one operation: each of many would have a gradient as large as all rows.
        return x[places].split(size)

    step: Callable[..., Rows] = measure
    if any(has_gradient(x) if isinstance(x, Tensor) else x.has_gradient for x in (p, q)):
        step = partial(checkpoint, measure, use_reentrant=False)  # the logits are made anew for their derivatives
    found = [step(*block) for block in zip(blocks(p), blocks(q), blocks(targets), strict=False)]

    def together(name: str) -> Tensor | None:
        parts = [getattr(rows, name) for rows in found]
        if parts[0] is None:
            return None
        x = torch.cat(parts, -1)
        others = x.shape[:-1]
        if weight is not None:
            measured, x = x, x.new_zeros((*others, *batch))
            where: Any = (..., *places)
            x[where] = measured
        return x.view((*others, *shape))

    kl = together("kl")
    assert kl is not None
    return Rows(kl, weight, together("agrees"), found[0].dtype, fields=together("fields"))


def _logits(x: "Input", rows: Any = None, out: Tensor | None = None) -> Any:
    """Of rows of hidden states (None for all): a tensor is its own, and so is a `TopK`."""
    if isinstance(x, Head):
        return x.logits(x.hidden if rows is None else rows, out)
    return x if rows is None else rows
