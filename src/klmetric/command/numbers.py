"""Numbers as they are shown."""

# Of a normal distribution, this many standard deviations on either side hold 95 %.
Z = 1.96


def number(x: float) -> str:
    """Counts in full, values with four digits."""
    return f"{x:,}" if isinstance(x, int) else f"{x:.4g}"
