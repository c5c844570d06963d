"""Rows of a file that has the likeliest classes only: as a `klmetric.TopK`, and what is asked of them."""

import math

import torch
from torch import Tensor

from klmetric.options import Format
from klmetric.rows.looks import doubt_of_top
from klmetric.rows.topk import TopK
from klmetric.saved.array import Saved
from klmetric.saved.errors import InputError

# Up to here, what is known of a row may add up to 1 because it was normalised over the k.
NORMALISED = 1e-6


def check_top_k(every: list[Saved], formats: tuple[Format, ...]) -> None:
    """Raise where files cannot be compared because of some not all classes are known.

    Args:
        every: the reference and the models.
        formats: of each, where the file does not say its own.
    """
    top = [saved for saved in every if saved.indices is not None]
    if not top:
        return
    for saved, its_format in zip(every, formats, strict=True):
        if saved.indices is not None and its_format == "logits":
            raise InputError(
                f"--input-format of the top k must be log_probs or probs. Got logits for {saved.name}: what normalises"
                " them is a sum over all classes, of which k are known. Save logits.log_softmax(-1).topk(k), in this"
                " order. If only other files hold logits, say --input-format log_probs,logits, or one for each file."
            )
        if saved.grid is not None:
            raise InputError(
                f"A file of llama.cpp cannot be compared with the top k. Got {saved.name} and {top[0].name}: both leave"
                " classes out, each in its own way. Save the logits of one as an array."
            )


def rows_of(saved: Saved, values: Tensor, indices: Tensor, its_format: Format, sampled: bool, counts: Tensor) -> TopK:
    """What was read of some rows.

    Args:
        saved: of which file.
        values: shape (rows, k).
        indices: likewise.
        its_format: of the values.
        sampled: whether the first column is a drawn token.
        counts: which rows count; the others may have anything.
    """
    indices = indices.masked_fill(~counts.unsqueeze(-1), -1)
    if indices.numel() and (largest := int(indices.max())) >= saved.classes:
        assert saved.indices is not None
        raise InputError(
            f"--indices must be classes, from 0 to {saved.classes - 1}, or negative for padding. Got {largest} in"
            f" {saved.indices.name}. Are there more --classes, or are they of another vocabulary?"
        )
    return TopK(values, indices, saved.classes, its_format, sampled)


def check_format_of_top_k(saved: Saved, x: TopK, better: str, other: str) -> None:
    """Ask where the values look like another format than was said.

    Args:
        saved: of which file.
        x: some of its rows.
        better: the option that says it is of the other format.
        other: which that is.
    """
    known = x.known()
    kept = known.kept.any(-1) & ~torch.where(known.kept, known.values, 0).isnan().any(-1)
    values = known.values[known.kept & kept.unsqueeze(-1)]
    if not values.numel():
        return
    total = known.probs[kept].sum(-1)
    if x.input_format == "probs" and bool((values < 0).any()):
        raise InputError(
            f"Probabilities must not be negative. Got {values.min().item():g} in {saved.name}. Are they {other}? Then"
            f" say so with {better}."
        )
    if x.input_format == "log_probs" and bool((values >= 0).all() & (values <= 1).all() & (values > 0).any()):
        raise InputError(
            f"Log-probabilities must not be above 0. Got {values.max().item():g} in {saved.name}, and nothing below 0."
            f" Are they {other}? Then say so with {better}."
        )
    if bool((total > 1.5).any()):
        raise InputError(
            f"The top k must not add up to more than 1. Got {total.max().item():.4g} in {saved.name}. Are they logits?"
            " What normalises these is a sum over all classes: save logits.log_softmax(-1).topk(k), in this order."
        )
    is_part = known.kept[kept].sum(-1) < x.classes
    if bool((is_part & ((total - 1).abs() <= NORMALISED)).all()):
        raise InputError(
            f"The top k should leave something to the other classes. Got rows in {saved.name} that all add up to 1."
            " Were they normalised over the k? Then their own probabilities are lost: save log_softmax(-1) of all"
            " classes, and the top k of that. If the others have nothing indeed, say --no-check."
        )


def check_likeliest(saved: Saved, x: TopK) -> None:
    """Ask where what is known of the reference is not the likeliest, on which the upper bound rests."""
    doubt = doubt_of_top(x, torch.zeros(x.shape[:-1], dtype=torch.bool))
    if doubt is not None and bool(doubt.are_true.any()):
        raise InputError(
            f"The top k of the reference should be the likeliest classes. Got rows in {saved.name} where others must be"
            " likelier, or the first is not in its order. Is the first column a drawn token, as vLLM saves it? Then say"
            " --sampled; if not, --no-check."
        )


def looks_like(saved: Saved, values: Tensor) -> str:
    """What values look like for which no format was said, the first rows."""
    values = values[~values.isnan()]
    if bool((values >= 0).all() & (values <= 1).all()):
        return f"{saved.name} looks like probs: nothing is below 0, or above 1."
    if bool((values <= 0).all()):
        return f"{saved.name} looks like log_probs: nothing is above 0."
    return f"{saved.name} looks like logits, of which the top k are not enough: save log_softmax(-1) of all."


def log_probs_of(x: TopK, classes: Tensor) -> Tensor:
    """The logarithms of the probabilities of some classes of each row, shape (rows, some); NaN where not known."""
    known = x.known()
    logs = known.values.log() if x.input_format == "probs" else known.values
    same = (classes.unsqueeze(-1) == known.classes.unsqueeze(-2)) & known.kept.unsqueeze(-2)
    found = torch.where(same, logs.unsqueeze(-2), -math.inf).amax(-1)
    return torch.where(same.any(-1), found, math.nan)
