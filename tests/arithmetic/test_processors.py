"""The bits of the kernel on another processor, which is emulated."""

import importlib.util
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import CLASSES, cases

from klmetric.arithmetic import native
from klmetric.arithmetic.level import LIBRARY, level
from klmetric.totals import sketch

ROWS = 800
HELPERS = Path(__file__).parents[1] / "helpers"


def raw(x):
    """The bytes of a tensor as it lies in memory, and its strides."""
    return bytes(torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).view(torch.uint8).numpy())


@pytest.mark.slow
@pytest.mark.skipif(level() is None, reason="there is no kernel here")
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="qemu-aarch64 (Debian: qemu-user) is not there")
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not there")
def test_the_same_bits_on_aarch64(tmp_path):
    kernel, program = LIBRARY.parent / "kernel", tmp_path / "processor"
    flags = runpy.run_path(str(kernel / "build.py"))["FLAGS"].split()
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static", "-fno-sanitize=all"]
    subprocess.run([*zig, *flags, "-I", kernel, HELPERS / "processor.cpp", "-o", program], check=True)
    asked = sketch.asked(32, 3)
    sent, expected = [], []
    for case in [*cases(ROWS, 0, CLASSES), *cases(6, 1, (1000, 1025, 5000))]:
        p, q = case.p, case.q
        here = native.measure(p, q, case.formats, temperature=case.temperature, agrees=True, totals=asked)
        sides = (p.stride(), p.dtype, case.formats[0]), (q.stride(), q.dtype, case.formats[1])
        job, _, rows = native._job(p.shape, sides, "forward", case.temperature, asked)
        assert p.storage_offset() == q.storage_offset() == 0
        data = (job, raw(p), raw(q))
        sent += [struct.pack("5q", *map(len, data), rows, len(here.totals)), *data]
        numbers, in_order = native.statistics(p, q, case.formats, case.temperature, measures=True)
        shares = native.shares(p, q, case.formats, case.temperature)
        all_of_it = here.kl, here.agrees, here.totals, numbers.T, in_order, shares.T
        expected += [x.numpy().tobytes() for x in all_of_it]
    done = subprocess.run(["qemu-aarch64", program], input=b"".join(sent), capture_output=True, check=True)
    assert done.stdout == b"".join(expected)
