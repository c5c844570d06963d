"""What is asked of predictions: are they such, of the same rows and classes, and in the format that was said?"""

import numpy as np
import torch
from torch import Tensor

from klmetric.command.comparison import Task, as_said
from klmetric.command.top_k import check_format_of_top_k, check_likeliest
from klmetric.command.top_k import looks_like as top_k_looks_like
from klmetric.options import Options
from klmetric.rows.invalid import fault
from klmetric.rows.topk import TopK
from klmetric.saved.array import Saved
from klmetric.saved.errors import InputError


def check_array(saved: Saved) -> None:
    """Raise unless the array may be of predictions."""
    if len(saved.shape) < 2:
        is_of_numbers = saved.dtype.is_floating_point and saved.shape
        hint = f"One row? Save it as (1, {saved.shape[0]})." if is_of_numbers else "Are they class indices?"
        raise InputError(
            f"Predictions must be of (rows, classes) or (samples, positions, classes). Got shape {saved.shape} in"
            f" {saved.name}. {hint}"
        )
    if saved.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        hint = "Convert them." if saved.dtype.is_floating_point else "Are they class indices?"
        raise InputError(
            "Predictions must be float16, bfloat16, float32 or float64. Got"
            f" {str(saved.dtype).removeprefix('torch.')} in {saved.name}. {hint}"
        )
    if saved.indices is None and saved.classes == 1:
        raise InputError(
            f"Predictions must have two classes or more. Got shape {saved.shape} in {saved.name}: with one, every"
            " divergence is 0. Of a sigmoid, save both classes: x and 1 - x, or the logits 0 and x."
        )
    if not saved.rows or not saved.width:
        raise InputError(f"Predictions must have rows and classes. Got shape {saved.shape} in {saved.name}.")


def check_pair(reference: Saved, model: Saved, classes: int | None) -> None:
    """Raise unless both are of the same classes and rows, as far as their shapes and tokens say."""
    fewest, most = sorted((reference.classes, model.classes))
    if classes is not None and classes > fewest:
        raise InputError(
            f"--classes must be no more than every file has. Got {classes}, and {reference.name} has"
            f" {reference.classes}, {model.name} {model.classes}."
        )
    if fewest != most and classes is None:
        hint = f"If the last {most - fewest} are padding, say --classes {fewest}."
        if 2 * fewest < most:  # which no padding is
            hint = f"Is one of them of the top {fewest}? Then name what says which classes they are with --indices."
        if reference.shape[:-1] != model.shape[:-1]:
            hint = "Is one of them transposed, or of other data?"
        raise InputError(
            f"Both must have the same classes. Got shape {reference.shape} in {reference.name} and {model.shape} in"
            f" {model.name}. {hint}"
        )
    if (reference.ids is None) != (model.ids is None):
        raise InputError(f"--id is for tables. Got {reference.name} and {model.name}, one of which is none.")
    if reference.shape[:-1] != model.shape[:-1] and reference.ids is None:
        hint = "Are they of the same data?"
        if reference.rows == model.rows:
            hint = f"Both have {reference.rows:,} rows: give one of them the shape of the other."
        raise InputError(
            f"Both must have the same rows. Got shape {reference.shape} in {reference.name} and {model.shape} in"
            f" {model.name}. {hint}"
        )
    if reference.tokens is not None and model.tokens is not None:
        if len(reference.tokens) != len(model.tokens):
            raise InputError(
                f"Both must have contexts of the same length. Got others in {reference.name} and {model.name}."
            )
        other = (reference.tokens != model.tokens).nonzero()[0]
        if len(other):
            raise InputError(
                f"Both must be of the same tokens. Got {reference.tokens[other[0]]} in {reference.name} and"
                f" {model.tokens[other[0]]} in {model.name} as token {other[0]}. Were they made from the same text?"
            )


def check_lengths(reference: Saved, model: Saved) -> None:
    """Of samples that are in the same order."""
    ours, theirs = (saved.lengths(0, saved.shape[0]) for saved in (reference, model))
    if len(other := (ours != theirs).nonzero()):
        k = int(other[0])
        raise InputError(
            f"Both must have samples of the same lengths. Got {ours[k]} and {theirs[k]} rows in sample {k} of"
            f" {reference.name} and {model.name}. Are they of the same data?"
        )


def check_order(reference: Saved, model: Saved) -> None:
    """Ask where a column that is no class says that the rows are the same, in another order."""
    for name in reference.others:
        if name in model.others:
            ours, theirs = reference.others[name](), model.others[name]()
            is_key = len(np.unique(ours)) == len(ours)
            if is_key and not np.array_equal(ours, theirs) and np.array_equal(np.sort(ours), np.sort(theirs)):
                raise InputError(
                    f"Rows must be in the same order. Got the same values of the column {name!r} in another order in"
                    f" {reference.name} and {model.name}. Align them with --id {name}; or --no-check."
                )


def looks_like(saved: Saved) -> str:
    """What the first rows look like."""
    x = saved.read(0, min(saved.rows, 16)).double()
    if saved.indices is not None:
        return top_k_looks_like(saved, x)
    sums = x.sum(-1)
    if bool((x >= 0).all()) and bool(((sums - 1).abs() < 0.02).all()):
        return f"{saved.name} looks like probs: nothing is negative, and rows add up to 1."
    if bool((x <= 1e-3).all()) and bool((x.logsumexp(-1).abs() < 0.02).all()):
        return f"{saved.name} looks like log_probs: the exponentials of a row add up to 1."
    return f"{saved.name} looks like logits: rows do not add up to 1."


def check_format(task: Task, place: int, x: Tensor | TopK) -> None:
    """Ask where the numbers look like another format than was said: nothing is guessed.

    Args:
        task: of which the formats were said.
        place: of the file: 0 of the reference, from 1 on of the models.
        x: some of its rows.
    """
    saved, its_format = task.every[place], task.formats[place]

    def better(other: str) -> str:
        """The option with another format for this file; and for all models, if they have one format."""
        formats: list[str] = [*task.formats[: len(task.formats) - task.has_floor]]
        first, *others = formats
        if place in range(1, len(others) + 1):
            are_alike = len({*others}) == 1
            others = [other if are_alike or k == place else one for k, one in enumerate(others, 1)]
        else:  # that of the floor is the reference's
            first = other
        return f"--input-format {','.join(as_said([first, *others]) if {first} != {*others} else [first])}"

    if isinstance(x, TopK):
        other = ("probs", "probabilities") if its_format == "log_probs" else ("log_probs", "log-probabilities")
        check_format_of_top_k(saved, x, better(other[0]), other[1])
        if place == 0 and "at_most" in task.fields:
            check_likeliest(saved, x)
        return
    x = x.double()
    x = x[~x.isnan().any(-1)]
    if not x.numel():
        return
    negative, sums = bool((x < 0).any()), x.sum(-1)
    are_sums_1 = bool(((sums - 1).abs() < 0.02).all())
    if its_format == "probs" and negative:
        are_logs = bool((x <= 0).all())
        what = "log-probabilities" if are_logs else "logits"
        raise InputError(
            f"Probabilities must not be negative. Got {x.min().item():g} in {saved.name}. Are they {what}? Then say so"
            f" with {better('log_probs' if are_logs else 'logits')}."
        )
    if its_format == "probs" and not bool(((sums - 1).abs() < 0.5).all()):
        raise InputError(
            f"Probabilities should add up to 1. Got {sums[(sums - 1).abs().argmax()].item():g} in {saved.name}. Are"
            f" they logits? Then say so with {better('logits')}; if they are only not normalised, with --no-check."
        )
    total = x.exp().sum(-1) if its_format == "log_probs" else sums
    is_part = bool((total < 1.02).all()) and total.mean().item() < 0.98 and its_format != "logits"
    if is_part and task.classes is None:  # else what is missing is in the others
        raise InputError(
            f"Probabilities of all classes should add up to 1. Got {total.mean().item():.3g} (a mean) in {saved.name}."
            " Are they the top k? Then name what says which classes they are of with --indices; if they are only not"
            " normalised, say --no-check."
        )
    if its_format != "probs" and not negative and are_sums_1:
        raise InputError(
            f"{saved.name} looks like probabilities: nothing in it is negative, and rows add up to 1. If so, say"
            f" {better('probs')}; if they are {its_format} all the same, --no-check."
        )


def check_rows(
    reference: Saved,
    model: Saved,
    p: Tensor | TopK,
    q: Tensor | TopK,
    kl: Tensor,
    counts: Tensor,
    options: Options,
    start: int,
) -> None:
    """Raise for the first row, of those that count, which is no distribution; they are numbered from `start` on."""
    bad = (kl.isnan() & counts).nonzero()
    if not len(bad):
        return
    i = int(bad[0, 0])
    sample = reference.sample_at(start + i)
    position = start + i - reference.first_row(sample)
    where = f"sample {sample}, position {position}" if len(reference.shape) > 2 else f"row {sample}"
    both = zip((reference, model), (p, q), options.input_format, strict=True)
    faults = [(saved.name, fault(x[i], input_format)) for saved, x, input_format in both]
    name, reason = next(((name, text) for name, text in faults if text), (model.name, "has a divergence of NaN"))
    raise InputError(
        f"Every row must be a distribution. Got {where} of {name}, which {reason}. Leave such rows out with"
        " --nan-strategy ignore, or with --mask."
    )


def check_nothing_is_clipped(saved: Saved, is_clipped: Tensor, options: Options) -> None:
    """Raise where a temperature meets clipped classes."""
    if count := int(is_clipped.any(-1).sum()):
        raise InputError(
            "--temperature must be 1 where log-probabilities are clipped: their sum is known, and that of their powers"
            f" is not. Got {options.temperature:g}, and {count:,} such rows at once in {saved.name}. Save the logits"
            " themselves."
        )
