"""The fuzz with AddressSanitizer and UndefinedBehaviorSanitizer in the kernel, at every level: `make sanitize`.

It takes gcc, which brings the two as libraries for Python to load. What they find ends the run with its place.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from klmetric.arithmetic import level

ROWS = 10_000
FLAGS = "-DANY_COMPILER -w -O1 -g -fsanitize=address,undefined -fno-sanitize-recover"
KERNEL = level.LIBRARY.parent / "kernel"


def fuzz() -> None:
    """Measure random rows; the library of this level has the sanitizers."""
    from fuzz import CLASSES, cases

    for classes in (CLASSES, (1000, 1025, 5000)):
        for case in cases(ROWS if classes == CLASSES else ROWS // 50, 0, classes):
            for direction in ("forward", "jensen_shannon"):
                assert not case.wrong(direction).any(), (direction, case)
    print(f"{level.level()}: {ROWS:,} rows, nothing found")


def beyond_the_end() -> None:
    """What the sanitizers must find: a row that is not there."""
    from klmetric import kl_divergence

    rows = np.lib.stride_tricks.as_strided(np.ones((10, 100), np.float32), (11, 100), (400, 4))
    kl_divergence(torch.from_numpy(rows), torch.ones(11, 100))


def main() -> None:
    """Compile the kernel, and run the fuzz at each level in a process that has loaded the sanitizers."""
    build = KERNEL / "build.py"
    names = [
        name for levels in runpy.run_path(str(build))["LEVELS"].values() if level.level() in levels for name in levels
    ]
    runtime = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/kernel.so"
        compiler = {"CXX": "g++", "CXXFLAGS": FLAGS}
        subprocess.run([sys.executable, build, library], env={**os.environ, **compiler}, check=True)
        for name in names[: names.index(str(level.level())) + 1]:
            env = {**os.environ, "LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
            env |= {"KLMETRIC_KERNEL": name, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, library]
            broken = subprocess.run([*command, "beyond_the_end"], env=env, capture_output=True, text=True)
            assert "heap-buffer-overflow" in broken.stderr, broken.stderr
            subprocess.run([*command, "fuzz"], env=env, check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
        level.LIBRARY = Path(sys.argv[1])
        {"fuzz": fuzz, "beyond_the_end": beyond_the_end}[sys.argv[2]]()
    else:
        main()
