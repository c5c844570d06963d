"""Random rows of every kind against float64, term by term: how many are further off than promised.

`python benchmarks/fuzz.py [ROWS] [SEED]`; with KLMETRIC_KERNEL=plain the expression that serves without the kernel.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from fuzz import CLASSES, LEAST, RTOL, cases

from klmetric.arithmetic.level import level

DIRECTIONS = "forward", "jensen_shannon"


def main(rows: int = 10**6, seed: int = 0) -> None:
    """Print the number of rows and of those that are wrong, of few and of many classes."""
    print(
        f"kernel: {level() or 'plain'}; wrong by more than {RTOL:g} of the divergence (of {LEAST:g}, if that is more):"
    )
    for classes in (CLASSES, (1000, 1025, 5000, 32_000)):
        n = rows if classes == CLASSES else rows // 1000
        wrong = Counter()
        for case in cases(n, seed, classes):
            for direction in DIRECTIONS:
                what = direction, case.kind, case.formats, str(case.p.dtype), str(case.q.dtype)
                wrong[what] += int(case.wrong(direction).sum())
        print(f"{n:,} rows of {classes[0]:,} to {classes[-1]:,} classes: {wrong.total()} wrong")
        for what, number in (+wrong).most_common(10):
            print("   ", number, *what)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
