"""What is asked of each row besides its divergence: a line for each number, of which the totals keep the mean."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names are asked for before torch is imported, which takes seconds
    from torch import Tensor

    from klmetric.arithmetic.statistics import Statistics

# How many of the most likely classes are looked at, in order.
FIRST = (1, 5, 10)
# The largest probability of the reference, in bands that begin here.
BANDS = (0.0, 0.2, 0.4, 0.6, 0.8)
BAND_NAMES = tuple(f"{low:g} to {high:g}" for low, high in zip(BANDS, (*BANDS[1:], 1.0), strict=True))

# Of all classes.
OF_CLASSES: "dict[str, Callable[[Statistics], Tensor]]" = {
    "reverse": lambda row: row.reverse,
    "jensen_shannon": lambda row: row.jensen_shannon,
    "total_variation": lambda row: row.total_variation,
    "agreement_1": lambda row: row.agree[:, 0].double(),
    "agreement_5": lambda row: row.agree[:, 1].double(),
    "agreement_10": lambda row: row.agree[:, 2].double(),
}
# Of the logarithms of the probability of the target, in the reference and in the model. The products are for the
# correlation, and for the root of the mean square.
OF_TARGETS: "dict[str, Callable[[Tensor, Tensor], Tensor]]" = {
    "nll": lambda log_p, log_q: -log_p,
    "ln_ratio": lambda log_p, log_q: log_p - log_q,
    "nll_squared": lambda log_p, log_q: log_p.square(),
    "nll_by_ln_ratio": lambda log_p, log_q: -log_p * (log_p - log_q),
    "ln_ratio_squared": lambda log_p, log_q: (log_p - log_q).square(),
    "delta_p": lambda log_p, log_q: log_q.exp() - log_p.exp(),
    "delta_p_squared": lambda log_p, log_q: (log_q.exp() - log_p.exp()).square(),
}
# Where the reference is a file of llama.cpp, its own estimate of the divergence.
OF_LLAMA = ("llama_cpp",)

# Those of which the difference between two models is reported.
COMPARED = (*OF_CLASSES, "ln_ratio", "delta_p")
# Those in nats, which are reported in the unit of `base`.
IN_NATS = ("reverse", "jensen_shannon", *OF_LLAMA)
