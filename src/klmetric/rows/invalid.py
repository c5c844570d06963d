"""Rows that are no distributions, and what is said of them."""

import math
from typing import TYPE_CHECKING

from torch import Tensor

from klmetric.arithmetic.tracing import may_look
from klmetric.options import Format, Options
from klmetric.rows.rows import Rows

if TYPE_CHECKING:
    from klmetric.rows.head import Head
    from klmetric.rows.topk import TopK

    Input = Tensor | Head | TopK


def check_rows(rows: Rows, inputs: "tuple[Input, Input] | None", options: Options) -> None:
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


def hint_for(kinds: tuple[type, type], options: Options) -> str:
    """What to look for where rows were no distributions, by what p and q are."""
    from klmetric.rows.head import Head
    from klmetric.rows.topk import TopK

    hints: dict[type, str] = {}
    for kind, input_format in zip(kinds, options.input_format, strict=True):
        if issubclass(kind, Tensor):
            if input_format == "probs":
                hints[kind] = " Were they logits or log-probabilities? Then say so with input_format."
        elif issubclass(kind, TopK):
            hints[kind] = (
                " Do the `values` of the TopK hold probabilities? Then say so with its input_format. Or logits? Then"
                " take logits.log_softmax(-1).topk(k)."
            )
        elif issubclass(kind, Head):
            hints[kind] = " Look for NaN in what the Head is made of."
        else:
            hints[kind] = " Look for NaN, and for values out of range, in their parameters."
    return "".join(hints.values())


def fault(row: "Tensor | TopK", input_format: Format) -> str | None:
    """What keeps one row from being a distribution, if anything does."""
    if not isinstance(row, Tensor):
        return row.fault()
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
