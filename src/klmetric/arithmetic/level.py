"""Which level of the kernel serves, told without torch."""

import ctypes
import os
import struct
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARY = Path(__file__).parent / f"kernel.{ {'win32': 'dll', 'darwin': 'dylib'}.get(sys.platform, 'so') }"
# A struct Job of kernel/job.h: p and q, then the rows and what is asked for. The pointers are left to the kernel.
JOB = struct.Struct("3q16x3q16x3qd6q24x")
LEVELS = ("baseline", "avx2", "avx512")  # of x86-64; there is one of aarch64


@cache
def level() -> str | None:
    """The level that serves: the best of this processor, or the one in KLMETRIC_KERNEL; None if there is no kernel."""
    asked = os.environ.get("KLMETRIC_KERNEL", "")
    if asked == "plain" or not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    best = library.klmetric_level(ctypes.c_int64(JOB.size))
    if best < 0:
        raise ImportError(f"{LIBRARY} belongs to another version of klmetric. Install klmetric once more.")
    if not hasattr(library, "klmetric_rows_avx2"):
        return "neon"
    if asked and (asked not in LEVELS or LEVELS.index(asked) > best):
        can = ", ".join(("plain", *LEVELS[: best + 1]))
        raise ValueError(f"KLMETRIC_KERNEL must be a level that this processor can run: {can}. Got {asked!r}.")
    return asked or LEVELS[best]


@cache
def on_accelerators() -> str | None:
    """What serves on an accelerator, should there be one: the kernel in Triton, of which version; None without it."""
    if os.environ.get("KLMETRIC_KERNEL") == "plain":
        return None
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return None
