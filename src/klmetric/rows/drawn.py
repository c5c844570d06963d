"""The log-probabilities of drawn tokens under p and under q, as the log-ratio of each token."""

import math

import torch
from torch import Tensor

from klmetric.arithmetic.device import device_of_float64
from klmetric.arithmetic.tracing import may_look
from klmetric.options import Options
from klmetric.rows.rows import Rows
from klmetric.rows.tensors import DTYPES, check_data, check_storage, weight_of_rows


def log_ratios(log_p: Tensor, log_q: Tensor, weight: Tensor | None, options: Options) -> Rows:
    """Check the inputs and take log p - log q of each token, in float64.

    It is NaN where a token cannot have been drawn from p (log p is -inf), or has no log-probabilities: where one of
    them is NaN or +inf. Those of densities may be above 0.

    Args:
        log_p: of the drawn tokens under the distribution that they were drawn from, shape (samples, tokens) or
            (samples,).
        log_q: of the same tokens under the other one.
        weight: of each sample or token.
        options: see `klmetric.KLDivergenceEstimate`.
    """
    _check(log_p, log_q)
    if weight is not None:
        weight = weight_of_rows(weight, log_p.shape, log_p.device)
    device = device_of_float64(log_p.device)
    a, b = (x.detach().to(device, torch.float64) for x in (log_p, log_q))
    rows = Rows(torch.where(a.isfinite() & (b < math.inf), a - b, math.nan), weight)
    if options.nan_strategy == "error":
        _check_tokens(rows, log_p, log_q)
    return rows


def _check(log_p: Tensor, log_q: Tensor) -> None:
    """Raise unless these can be log-probabilities of the same tokens, as far as can be told without their data."""
    for name, x in (("log_p", log_p), ("log_q", log_q)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"`{name}` must be a torch.Tensor: the log-probability of each drawn token. Got {type(x).__name__}. Of"
                " a distribution take .log_prob(x), of x drawn from p."
            )
        check_storage(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(
                f"`{name}` must hold log-probabilities in float16, bfloat16, float32 or float64. Got {x.dtype}, shape"
                f" {tuple(x.shape)}. Are these the tokens? log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) takes"
                " their log-probabilities."
            )
        check_data(name, x)
        if x.ndim not in (1, 2):
            raise ValueError(
                f"`{name}` must have the shape (samples, tokens), or (samples,): one number for each drawn token. Got"
                f" {tuple(x.shape)}. With those of all classes, log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)"
                " takes the drawn ones; KLDivergence(input_format='log_probs') measures all of them, which is exact."
            )
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"`log_q` must have the shape of `log_p`. Got log_p {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}."
            " Are both of the same tokens?"
        )
    if log_p.device != log_q.device:
        raise ValueError(
            f"`log_p` and `log_q` must share a device. Got log_p on {log_p.device}, log_q on {log_q.device}. Use"
            " log_q.to(log_p.device)."
        )


def _check_tokens(rows: Rows, log_p: Tensor, log_q: Tensor) -> None:
    """Raise if a token that counts has no log-ratio."""
    if not may_look(rows.kl):
        raise ValueError(
            "nan_strategy='error' must look at the data. Got it where there are none to look at, as on the device"
            " 'meta'. Use 'propagate' or 'ignore' there."
        )
    invalid = rows.kl.isnan() & ~rows.left_out.to(rows.kl.device)
    if not bool(invalid.any()):
        return
    first = tuple(invalid.nonzero()[0].tolist())
    a, b = log_p[first].item(), log_q[first].item()
    raise ValueError(
        "Every token must have a finite log-probability under p, and one below +inf under q (nan_strategy='error')."
        f" {int(invalid.sum())} of {invalid.numel()} tokens have not; the first is token {first}: log p is {a:g}, log q"
        f" is {b:g}. Mask padding with `weight`, or use nan_strategy='ignore'."
    )
