"""Numbers as they are shown."""

import math


def number(x: float, margin: float = 0.0) -> str:
    """Counts in full, values with four digits, or as many as reach the second one of the `margin` to either side."""
    if isinstance(x, int):
        return f"{x:,}"
    known = math.log10(abs(x) / margin) if 0 < margin < abs(x) < math.inf else 0
    return f"{x:.{max(4, min(math.ceil(known) + 2, 15))}g}"
