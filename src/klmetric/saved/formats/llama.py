"""The predictions that llama.cpp saves (`llama-perplexity --kl-divergence-base`), of the second half of each context.

The file: `_logits_`; the length of a context, the size of the vocabulary and the number of chunks as int32; the tokens
of all chunks as int32; then, for each position of each chunk that is evaluated, a float32 step, a float32 minimum and
one uint16 code for each class, padded to an even number. A log-probability is minimum + step * code.
(ggml-org/llama.cpp, tools/perplexity/perplexity.cpp.) The file is known by its first bytes, whatever it is called.

Chunks do not overlap. The positions of a chunk that are evaluated are n_ctx/2 ... n_ctx - 2, counted from 0, and each
predicts the next token: the targets are the tokens n_ctx/2 + 1 ... n_ctx - 1.

A row spans 65,535 steps. If its log-probabilities span more than 16 nats (24 in ik_llama.cpp, whose files look the
same), the lower ones are clipped: they get the code 0, and are only known to lie at the minimum or below. The others
are true log-probabilities, of a normaliser that has seen every class.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klmetric.saved.array import Choice, Saved
from klmetric.saved.errors import InputError

MAGIC = b"_logits_"
STEPS = 65535
# A row that has been clipped spans a whole number of nats, from so many on, but for rounding to float32. Another that
# does so by chance loses next to nothing if its smallest class is taken for clipped.
LEAST_WINDOW, ROUNDING = 16, 1e-3
# Numbers that are copied to float64 at once.
BLOCK = 2**18


def is_kld(path: Path) -> bool:
    """Whether a file begins as one of llama.cpp, and not as text that only has the same first letters."""
    with path.open("rb") as file:
        head = file.read(len(MAGIC) + 12)
    return head.startswith(MAGIC) and b"\0" in head


def open_kld(path: Path, choice: Choice) -> Saved:
    """Look at the header.

    Raises:
        InputError: if the file is of another kind, or not as long as its header says.
    """
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
        header = np.fromfile(file, "<i4", 3)
        if magic != MAGIC or len(header) < 3:
            raise InputError(
                f"A .kld file must begin with {MAGIC.decode()!r}. Got {magic!r} in {path}. Is it a GGUF file?"
            )
        context, classes, chunks = header.tolist()
        if context < 2 or classes < 1 or chunks < 1:
            raise InputError(
                f"A .kld file must have classes and chunks. Got n_ctx, n_vocab, n_chunk = {header} in {path}."
            )
    positions = context - 1 - context // 2
    begin = len(MAGIC) + 12 + 4 * context * chunks
    width = 4 + classes + classes % 2  # in units of two bytes, with the step and the minimum
    expected, size = begin + 2 * width * positions * chunks, path.stat().st_size
    if size < expected:
        raise InputError(
            f"{path} must have {expected:,} bytes for {chunks} chunks. Got {size:,}. Did llama.cpp end before the last?"
        )
    tokens = np.fromfile(path, "<i4", context * chunks, offset=len(MAGIC) + 12)

    def records(start: int, stop: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
        return np.memmap(path, "<u2", "r", begin + 2 * width * start, (stop - start, width))

    def scales(rows: "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]") -> Tensor:
        scale = torch.from_numpy(np.ascontiguousarray(rows[:, :4]).view("<f4").astype(np.float32))
        if bool((scale[:, 0] < 0).any()):
            raise InputError(
                f"The step of a row of a .kld file must not be negative. Got {scale[:, 0].min().item():g} in {path}."
                " Is it whole, and of that kind?"
            )
        return scale

    def read(start: int, stop: int) -> Tensor:
        rows = records(start, stop)
        scale = scales(rows)
        codes = torch.from_numpy(rows[:, 4 : 4 + classes].astype(np.float32))
        window = STEPS * scale[:, :1]
        is_clipped = (window > LEAST_WINDOW - ROUNDING) & ((window - window.round()).abs() < ROUNDING)
        if bool(is_clipped.any()):
            codes.masked_fill_(is_clipped & (codes == 0), -math.inf)
        return codes.mul_(scale[:, :1]).add_(scale[:, 1:])

    def grid(start: int, stop: int) -> Tensor:
        return scales(records(start, stop)).double()

    shape = (chunks, positions, classes)
    known: Any = {"tokens": tokens, "targets": tokens.reshape(chunks, context)[:, context - positions :].flatten()}
    return Saved(str(path), shape, torch.float32, read, input_format="log_probs", grid=grid, **known)


def their_estimate(log_p: Tensor, q: Tensor, log_mass: Tensor) -> Tensor:
    """The divergence of each row as `llama-perplexity --kl-divergence` has it, in float64.

    It is the sum of p (log p - log q) over the classes with log p > -16, of p as it is saved: it is not normalised, and
    what is clipped or below is left out, so that it may be negative.

    Args:
        log_p: as the file of the reference has it, shape (rows, classes).
        q: logits or log-probabilities of the model, likewise.
        log_mass: what to subtract from them for log-probabilities that are normalised, shape (rows,).
    """
    size = max(1, BLOCK // log_p.shape[1])
    found = []
    for p, b, mass in zip(*(torch.split(x, size) for x in (log_p, q, log_mass.unsqueeze(1))), strict=True):
        terms = p.double().exp() * (p.double() - (b.double() - mass))
        found.append(torch.where(p > -LEAST_WINDOW, terms, 0).sum(-1))
    return torch.cat(found)


def storage_error(step_of_p: float, step_of_q: float, mean: float) -> tuple[float, float]:
    r"""What rounding log-probabilities to steps adds to a divergence: as a rule, and at most.

    As a rule it is noise of variance step^2/12 in every log-ratio, and the divergence of near-equal rows grows by half
    of it. At most, with each log-probability off by half a step, and so by a step after normalisation,

    .. math:: |KL' - KL| \le s_p + s_q + (e^{s_p} - 1) \sum_c p_c |\log(p_c / q_c)|

    of which the last sum is at most KL + (2 KL)^{1/2} (by Pinsker's inequality). Where classes were clipped, the second
    bounds by how much the divergence is too large, not by how much it is too small.
    """
    usual = (step_of_p**2 + step_of_q**2) / 24
    return usual, step_of_p + step_of_q + math.expm1(step_of_p) * (mean + math.sqrt(2 * mean))
