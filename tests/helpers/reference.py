"""What the divergence is, computed independently: in 60 digits, straight from the definition."""

import mpmath
import numpy as np
import torch
from torch import Tensor

mpmath.mp.dps = 60


def distribution(row: Tensor, input_format: str, temperature: float = 1.0, floor: float = 0.0) -> list[mpmath.mpf]:
    values = [mpmath.mpf(x) for x in row.double().tolist()]
    if input_format != "probs":
        values = [mpmath.exp(x / mpmath.mpf(temperature)) if x != -mpmath.inf else mpmath.mpf(0) for x in values]
    elif temperature != 1:
        values = [x ** (1 / mpmath.mpf(temperature)) if x else x for x in values]
    total = mpmath.fsum(values)
    if floor:
        values = [max(x / total, mpmath.mpf(floor)) for x in values]
        total = mpmath.fsum(values)
    return [x / total for x in values]


def kl_of_row(
    p: Tensor,
    q: Tensor,
    input_format: str = "probs",
    temperature: float = 1.0,
    eps: float = 0.0,
    direction: str = "forward",
) -> float:
    formats = (input_format, input_format) if isinstance(input_format, str) else input_format
    if direction == "jensen_shannon":
        a, b = (distribution(x, form, temperature, eps) for x, form in zip((p, q), formats, strict=True))
        terms = [
            (x * mpmath.log(2 * x / (x + y)) if x else 0) for x, y in (*zip(a, b, strict=True), *zip(b, a, strict=True))
        ]
        return float(mpmath.fsum(terms) / 2)
    total = mpmath.mpf(0)
    for way, first, second in (("forward", 0, 1), ("reverse", 1, 0)):
        if direction in (way, "jeffreys"):
            rows = (p, q)
            a = distribution(rows[first], formats[first], temperature)
            b = distribution(rows[second], formats[second], temperature, eps)
            total += mpmath.fsum(
                (mpmath.inf if y == 0 else x * mpmath.log(x / y)) for x, y in zip(a, b, strict=True) if x != 0
            )
    return float(total)


def kl_rows(p: Tensor, q: Tensor, **options: object) -> Tensor:
    """One value per row of the last axis, in float64."""
    flat = zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), strict=True)
    values = [kl_of_row(a, b, **options) for a, b in flat]  # type: ignore[arg-type]
    return torch.from_numpy(np.array(values, dtype=np.float64)).reshape(p.shape[:-1])
