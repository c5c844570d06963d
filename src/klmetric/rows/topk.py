"""`TopK`: rows of which only the top k classes are known, as inference engines and API servers return them."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import register_pytree_node

from klmetric.arithmetic.tracing import has_gradient, may_look
from klmetric.options import Format, Options, as_int, check_choice
from klmetric.rows.tensors import DTYPES, EXCESS, check_axis, check_data, check_one, check_storage, first_classes


@dataclass(eq=False, repr=False)
class TopK:
    """The top k classes of each row, with their probabilities.

    Give it in the place of a tensor, as `p`, as `q`, or as both. The probability that the other classes share (the
    tail) is known, but not how they share it. So the divergence is a **lower bound**; `klmetric.kl_divergence_bounds`
    also gives an upper one.

    Args:
        values: the probabilities of the known classes, or their logarithms, shape (N, ..., k), of the whole
            distribution: not normalised over the k.
        indices: the numbers of these classes, integers of the same shape. A negative one is padding, whatever its
            value: k may differ by row. A class that comes twice counts once; its values must be the same.
        classes: how many classes there are.
        input_format: `"log_probs"` (default) or `"probs"`. Logits are refused: what normalises them is not known.
        sampled: whether the first column is a drawn token, as vLLM puts it before the k likeliest classes. Classes that
            are not known may be likelier than that token.

    A row of which no class is known, whose probabilities add up to more than 1 (by more than a rounding of 0.001, or
    of 8 units in the last place of half precision), or in which a class has two values, is no distribution: see
    `nan_strategy`.

    Raises:
        TypeError: for values or indices of the wrong kind.
        ValueError: for a wrong shape, device or format, and for an index that is no class (on an accelerator such a
            row is no distribution).

    Examples:
        >>> import torch
        >>> from klmetric import TopK, kl_divergence
        >>> teacher = TopK(torch.tensor([[0.7, 0.2]]), torch.tensor([[3, 1]]), classes=5, input_format="probs")
        >>> student = torch.tensor([[0.1, 0.3, 0.1, 0.4, 0.1]])
        >>> kl_divergence(teacher, student)  # at least
        tensor(0.2008)
    """

    values: Tensor
    indices: Tensor
    classes: int
    input_format: Format = "log_probs"
    sampled: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def __repr__(self) -> str:
        kind = f"{self.input_format}{', sampled' if self.sampled else ''}, {self.dtype}, {self.device}"
        return f"TopK({self.values.shape[-1]} classes of each row, of shape {tuple(self.shape)}, {kind})"

    @property
    def shape(self) -> torch.Size:
        """Of all classes: (N, ..., classes)."""
        return torch.Size((*self.values.shape[:-1], self.classes))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim

    @property
    def device(self) -> torch.device:
        """Of the values and indices."""
        return self.values.device

    def to(self, *args: Any, **kwargs: Any) -> "TopK":
        """The same on another device, or with values of another dtype, as `Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        indices = self.indices.to(values.device, non_blocking=kwargs.get("non_blocking", False))
        return TopK(values, indices, self.classes, self.input_format, self.sampled)

    def detach(self) -> "TopK":
        """The same without gradients."""
        return _made_of((self.values.detach(), self.indices), _rest_of(self))

    def __getitem__(self, rows: Any) -> "TopK":
        """Some of the rows: samples, or anything else that leaves the last axis alone."""
        return TopK(self.values[rows], self.indices[rows], self.classes, self.input_format, self.sampled)

    def split(self, samples: int) -> list["TopK"]:
        """So many samples at a time, as `Tensor.split`."""
        parts = zip(torch.split(self.values, samples), torch.split(self.indices, samples), strict=True)
        return [_made_of(part, _rest_of(self)) for part in parts]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.values)

    @property
    def has_gradient(self) -> bool:
        """Whether derivatives may be wanted of the values."""
        return has_gradient(self.values)

    @property
    def rounding(self) -> float:
        """How far rounding may have put what the known probabilities leave of 1."""
        return 8 * torch.finfo(self.values.dtype).eps

    def known(self) -> "Known":
        """What is known, in order and in float64."""
        index = self.indices.long()
        is_class = (index >= 0) & (index < self.classes)
        outside = (index >= self.classes).any(-1)
        index, order = torch.where(is_class, index, self.classes).sort(dim=-1, stable=True)
        values = self.values.gather(-1, order).double()
        again = torch.nn.functional.pad(index[..., 1:] == index[..., :-1], (1, 0))
        kept = (index < self.classes) & ~again
        differ = again & (index < self.classes) & (values != values.roll(1, -1))
        nothing = 0.0 if self.input_format == "probs" else -math.inf
        # In place of what does not count before anything is done with it, so that no gradient of it comes back.
        values = torch.where(kept, values, nothing)
        probs = values if self.input_format == "probs" else values.exp()
        total = probs.sum(-1)
        too_much = total > 1 + max(EXCESS, self.rounding)
        invalid = outside | (differ | values.isnan() | (probs < 0)).any(-1) | too_much | ~kept.any(-1)
        # A drawn token that is among the likeliest as well comes twice.
        drawn = (order == 0) & ~torch.nn.functional.pad(again[..., 1:], (0, 1)) & self.sampled
        # If all classes are known, what their sum leaves of 1 is rounding.
        tail = torch.where(kept.sum(-1) < self.classes, (1 - total).clamp_min(0), 0)
        return Known(index, kept, values, probs, tail, invalid, drawn)

    def fault(self) -> str | None:
        """What keeps a single row from being a distribution, if anything does."""
        known = self.known()
        is_class = self.indices >= 0
        total = known.probs.sum().item()
        faults = {
            f"has an index that is no class, from 0 to {self.classes - 1}": (self.indices >= self.classes).any(),
            "has padding alone: no class is known": ~is_class.any(),
            "has NaN": (self.values.isnan() & is_class).any(),
            "has a negative probability": (known.probs < 0).any(),
            f"has probabilities that add up to {total:.6g}, which is more than 1": torch.tensor(total > 1 + EXCESS),
            "has two values of one class": known.invalid,
        }
        return next((text for text, is_so in faults.items() if bool(is_so)), None)


def _rest_of(x: TopK) -> tuple[int, Format, bool]:
    return x.classes, x.input_format, x.sampled


def _made_of(tensors: Any, rest: tuple[int, Format, bool]) -> TopK:
    """One of parts that need no check: those of another one, or what a transform of torch puts in their place."""
    x = object.__new__(TopK)
    x.values, x.indices = tensors
    x.classes, x.input_format, x.sampled = rest
    return x


# So `torch.func.vmap` takes it apart as it does lists.
register_pytree_node(
    TopK, lambda x: ([x.values, x.indices], _rest_of(x)), _made_of, serialized_type_name="klmetric.TopK"
)


class Known(NamedTuple):
    """The known classes of each row in ascending order, shape (..., k).

    Attributes:
        classes: their numbers; that of all classes where there is none.
        kept: where there is one, for the first time.
        values: its probability, or the logarithm of that, in float64.
        probs: its probability.
        tail: what the other classes have in sum, shape (...).
        invalid: rows that are no distributions, shape (...).
        drawn: whether it is known because it was drawn, and not because it is likely.
    """

    classes: Tensor
    kept: Tensor
    values: Tensor
    probs: Tensor
    tail: Tensor
    invalid: Tensor
    drawn: Tensor


def check_with_topk(p: object, q: object, options: Options) -> tuple[Tensor | TopK, Tensor | TopK]:
    """Check a pair of which one at least is a `TopK`; a tensor comes back with its classes last."""
    for name, value, reason in (
        ("temperature", options.temperature, "what normalises at another temperature is a sum over all classes"),
        ("eps", options.eps, "a floor is under single classes, and the tail is many"),
    ):
        usual = getattr(Options(), name)
        if value != usual:
            raise ValueError(
                f"`{name}` must be {usual:g} with a TopK: {reason}, of which k are known. Got {value:g}."
                + (" Have the teacher give log-probabilities at that temperature." if name == "temperature" else "")
            )
    found: list[Tensor | TopK] = []
    for name, x in (("p", p), ("q", q)):
        if isinstance(x, Distribution):
            raise TypeError(
                f"`{name}` must be a tensor or a TopK where the other one is a TopK. Got {type(x).__name__}. Give its"
                " `logits`, with input_format='logits'."
            )
        if not isinstance(x, TopK):
            check_one(name, x)
            assert isinstance(x, Tensor)
            check_data(name, x)
            check_axis(x, options.dim)
            x = first_classes(name, x, options)
            x = x if options.dim in (-1, x.ndim - 1) else x.movedim(options.dim, -1)
        elif options.classes not in (None, x.classes):
            raise ValueError(
                f"`classes` must be that of the TopK, whose probabilities cannot be normalised again. Got classes="
                f"{options.classes}, and `{name}` has {x.classes}. Of how many are its log-probabilities?"
            )
        found.append(x)
    first, second = found
    if first.shape != second.shape:
        raise ValueError(
            f"`q` must have the shape of `p`, with all classes. Got p {tuple(first.shape)} and q {tuple(second.shape)}."
            " Where one has padding behind its classes, say how many there are with `classes`."
        )
    if first.device != second.device:
        raise ValueError(
            f"`p` and `q` must share a device. Got p on {first.device}, q on {second.device}. Use q.to(p.device)."
        )
    return first, second


def _check(x: TopK) -> None:
    """Raise unless this can be a `TopK`."""
    for name, one in (("values", x.values), ("indices", x.indices)):
        if not isinstance(one, Tensor):
            raise TypeError(
                f"`{name}` must be a torch.Tensor. Got {type(one).__name__}. Convert it with torch.as_tensor."
            )
        check_storage(name, one)
        check_data(name, one)
    if x.values.dtype not in DTYPES:
        raise TypeError(
            f"`values` must be float16, bfloat16, float32 or float64. Got {x.values.dtype}. Are `values` and `indices`"
            " in the right order?"
        )
    if x.indices.is_floating_point() or x.indices.is_complex() or x.indices.dtype is torch.bool:
        raise TypeError(
            f"`indices` must be integers, the numbers of classes. Got {x.indices.dtype}. Convert it with .long()."
        )
    if x.input_format == "logits":
        raise ValueError(
            "`input_format` of a TopK must be 'log_probs' or 'probs'. Got 'logits': what normalises them is a sum over"
            " all classes, of which k are known. Take logits.log_softmax(-1).topk(k), in this order."
        )
    check_choice("input_format", x.input_format, ("log_probs", "probs"))
    if not isinstance(x.sampled, bool):
        raise TypeError(f"`sampled` must be a bool. Got {x.sampled!r}.")
    classes = as_int("classes", x.classes)
    if classes is None:
        raise TypeError(f"`classes` must be an int, how many classes there are (the vocabulary). Got {x.classes!r}.")
    x.classes = classes
    shape = tuple(x.values.shape)
    if shape != tuple(x.indices.shape):
        raise ValueError(
            f"`indices` must have the shape of `values`. Got values {shape} and indices {tuple(x.indices.shape)}. Are"
            " both of the same topk?"
        )
    if not shape or not shape[-1]:
        raise ValueError(f"`values` must have a last axis of k classes, at least 1. Got shape {shape}.")
    if classes < 1:
        raise ValueError(f"`classes` must be how many classes there are, at least 1. Got {classes}.")
    if x.values.device != x.indices.device:
        raise ValueError(
            f"`values` and `indices` must share a device. Got values on {x.values.device} and indices on"
            f" {x.indices.device}. Use indices.to(values.device)."
        )
    if x.indices.device.type == "cpu" and x.indices.numel() and may_look(x.indices):  # no other device is waited for
        largest = int(x.indices.max())
        if largest >= classes:
            raise ValueError(
                f"`indices` must be classes, from 0 to {classes - 1}, or negative for padding. Got {largest}. Are there"
                " more `classes`, those of another vocabulary, or padding by another number?"
            )
