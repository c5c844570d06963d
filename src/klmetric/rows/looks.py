"""What a batch looks like: a word where that is another thing than was said.

The first batch of a metric is looked at, and never more than that. On an accelerator the answer is kept there until the
result is computed, so that no update waits for one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klmetric.arithmetic.plain import result_dtype
from klmetric.options import Options
from klmetric.rows.tensors import EXCESS, is_sharded, level_of_user

# So many rows of the batch, or a few more, are looked at.
ROWS = 16


@dataclass(frozen=True)
class Doubt:
    """What may be wrong with a batch.

    Attributes:
        texts: what to say, the first one that is true.
        are_true: of each of them, on the device of the batch.
    """

    texts: list[str]
    are_true: Tensor

    def __add__(self, other: "Doubt") -> "Doubt":
        """Both, of which the first is said that is true."""
        return Doubt(self.texts + other.texts, torch.cat([self.are_true, other.are_true]))

    def say(self) -> None:
        """Warn, at the user's line. It waits for the device."""
        said = [text for text, is_true in zip(self.texts, self.are_true.tolist(), strict=True) if is_true]
        if said:
            warnings.warn(said[0], stacklevel=level_of_user())


def doubt_of_formats(p: object, q: object, options: Options) -> Doubt | None:
    """Whether tensors look like probabilities where that was not said, or have their classes on another axis.

    Args:
        p: reference; what is no tensor is not looked at.
        q: approximation.
        options: how the two are read.
    """
    dim = options.dim
    tensors = {
        name: x
        for name, x in (("p", p), ("q", q))
        if isinstance(x, Tensor) and not is_sharded(x) and x.numel() and x.shape[dim] > 1
    }
    formats = dict(zip("pq", options.input_format, strict=True))
    are_probs = {name: _look_like_probs(x, dim) for name, x in tensors.items()}
    others = [name for name in tensors if formats[name] != "probs"]
    doubts = [(_of_format([name], options), are_probs[name]) for name in others]
    if len(others) > 1:
        doubts.insert(0, (_of_format(others, options), are_probs["p"] & are_probs["q"]))
    doubts += [
        (_of_axis(name, x, dim, axis), ~are_probs[name] & _look_like_probs(x, axis))
        for name, x in tensors.items()
        if formats[name] == "probs"
        for axis in range(x.ndim)
        if axis != dim % x.ndim and x.shape[axis] > 1
    ]
    return Doubt([text for text, _ in doubts], torch.stack([is_so for _, is_so in doubts])) if doubts else None


def doubt_of_logs(log_p: Tensor, log_q: Tensor, left_out: Tensor) -> Doubt | None:
    """Whether log-probabilities of drawn tokens are probabilities: all from 0 to 1, and not all the same.

    (Logarithms of densities may be above 0, but few of them are all below 1; those of a uniform one are all the same.)
    """
    if not log_p.numel():
        return None
    are_true, left_out = [], left_out.to(log_p.device)
    for x in (log_p.detach(), log_q.detach()):
        lowest, highest = x.masked_fill(left_out, torch.inf).amin(), x.masked_fill(left_out, -torch.inf).amax()
        are_true.append((lowest >= 0) & (highest <= 1) & (lowest < highest))
    text = (
        "`log_p` and `log_q` should be logarithms of probabilities. Got a first batch in which all values are from 0 to"
        " 1. Are they the probabilities themselves? Then take .log() of both."
    )
    return Doubt([text], torch.stack(are_true).all().unsqueeze(0))


def doubt_of_top(p: object, left_out: Tensor) -> Doubt | None:
    """Whether a drawn token stands among the likeliest classes, of which nobody has said so. On the CPU alone."""
    from klmetric.rows.topk import TopK  # the imports of every metric do not go so deep

    if not isinstance(p, TopK) or p.sampled or p.device.type != "cpu" or not p.values.numel():
        return None
    hint = "Is the first column a drawn token, as vLLM puts it there? Then say sampled=True."
    known = p.detach().known()
    least = known.probs.where(known.kept, torch.inf).amin(-1)
    others = p.classes - known.kept.sum(-1)
    too_much = (known.tail > others * least * (1 + EXCESS) + max(EXCESS, p.rounding)) & ~(known.invalid | left_out)
    if bool(too_much.any()):
        row = too_much.nonzero()[0].unbind()
        text = (
            "`values` should be of the k likeliest classes, so that no other has more than the least of them. Got a row"
            f" that leaves {known.tail[row].item():.3g} to {int(others[row])} other classes, and its least value is"
            f" {least[row].item():.3g}. {hint}"
        )
        return Doubt([text], torch.tensor([True]))
    values = p.values.detach().where(p.indices >= 0, -torch.inf)[~left_out]
    first, rest = values[..., :1], values[..., 1:]
    falls = (rest[..., 1:] <= rest[..., :-1]).all() if rest[..., 1:].numel() >= ROWS else torch.tensor(False)
    text = (
        "`values` should be of the k likeliest classes. Got columns that fall from the second on, and a first one that"
        f" is not the largest. {hint}"
    )
    return Doubt([text], (falls & (first < rest[..., :1]).any()).unsqueeze(0))


def say_other_classes(before: int, now: int) -> None:
    """Warn that a batch has another number of classes than the one before."""
    warnings.warn(
        f"All batches of a metric should have the same classes. Got {now} of them after {before}. Is `dim` right? If"
        " only padding differs, say with `classes` how many count. Give other data a metric of their own.",
        stacklevel=level_of_user(),
    )


def _look_like_probs(x: Tensor, axis: int) -> Tensor:
    """Whether the first rows along an axis are not negative and add up to 1."""
    x, left = x.detach().movedim(axis, -1), ROWS
    for k in range(x.ndim - 1):
        x = x.narrow(k, 0, min(left, x.shape[k]))
        left = -(-left // x.shape[k])
    sums = x.sum(-1, dtype=result_dtype(x, x))
    return (x >= 0).all() & ((sums - 1).abs() <= max(EXCESS, 8 * torch.finfo(x.dtype).eps)).all()


def _of_format(names: list[str], options: Options) -> str:
    said = options.input_format
    meant = ["probs" if name in names else its_format for name, its_format in zip("pq", said, strict=True)]
    who = " and ".join(f"`{name}`" for name in names)
    return (
        f"`input_format` should say what the tensors hold. Got {_as_option(said)}, but {who} look"
        f"{'s' if len(names) == 1 else ''} like probabilities: nothing is negative, and rows add up to 1 (the first"
        f" rows of the first batch). Did you mean input_format={_as_option(meant)}?"
    )


def _as_option(formats: Sequence[str]) -> str:
    return repr(formats[0] if len(set(formats)) == 1 else tuple(formats))


def _of_axis(name: str, x: Tensor, dim: int, axis: int) -> str:
    return (
        f"`dim` should be the axis of the classes, along which probabilities add up to 1. Got dim={dim} for shape"
        f" {tuple(x.shape)}, but in `{name}` they add up to 1 along dim={axis}. Did you mean dim={axis}?"
    )
