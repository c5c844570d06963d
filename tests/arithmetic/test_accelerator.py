"""The kernel of accelerators against sixty digits and itself: on one, or else on the CPU by Triton's interpreter."""

import math
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FORMATS, logits
from every_kind import LOGITS, cases_by_kind, check
from fuzz import LEAST, RTOL, kl_of_logs, log_of
from fuzz import cases as random_cases
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="Triton is not to be had here")

from klmetric.arithmetic import accelerator, choose, level, parts, tiles
from klmetric.arithmetic.level import on_accelerators
from klmetric.arithmetic.native import Measured
from klmetric.options import Options

DEVICE = "cpu" if parts.INTERPRETED else torch.accelerator.current_accelerator().type
# numpy's, of the infinities that the interpreter has it compute
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def measured(p, q, formats=LOGITS, direction="forward", temperature=1.0, agrees=False):
    kl, same = accelerator.measure(p.to(DEVICE), q.to(DEVICE), formats, direction, temperature, agrees=agrees)
    return Measured(kl.cpu(), None if same is None else same.cpu())


# One tile with room to spare, one that is full, and two that are merged. The interpreter takes some 10 ms for each.
CASES = cases_by_kind((3, 32, 4500))
every_kind = pytest.mark.parametrize("kind", CASES)


@every_kind
def test_to_a_millionth_down_to_1e_13(kind):
    def measure(*case):
        return measured(*case[:3], temperature=case[3], agrees=True)[:2]

    for p, q, formats, temperature in CASES[kind]:
        rows = 3 if p.shape[1] < 100 else 1
        check(measure, p[:rows], q[:rows], formats, temperature, places=range(rows))


@pytest.mark.parametrize("kind", ["logits 0.001", "masked in p, offset", "peaked", "zeros, log_probs"])
def test_a_row_has_its_bits_wherever_it_stands(kind):
    for p, q, formats, temperature in CASES[kind]:
        p, q = p[:3], q[:3]
        kl = measured(p, q, formats, temperature=temperature).kl

        def same(p, q, of=slice(None), kl=kl, options=(formats, "forward", temperature)):
            np.testing.assert_array_equal(measured(p, q, *options).kl.numpy(), kl[of].numpy())

        order = torch.arange(len(p)).flip(0)
        same(p[order], q[order], order)
        same(p[1:2], q[1:2], slice(1, 2))
        same(p.T.contiguous().T, q.repeat_interleave(2, 1)[:, ::2])


@pytest.mark.parametrize("divergence", [1e-13, 1e-9, 1e-4, 1.0])
@pytest.mark.parametrize("classes", [2, 1000, 128_256])
@pytest.mark.parametrize("input_format", ["logits", "probs"])
def test_every_size(classes, divergence, input_format):
    a, b = (logits(2, classes, seed=seed, dtype=torch.float64) for seed in (0, 1))
    p, q = a.float(), (a.float().double() + math.sqrt(2 * divergence) * b).float()
    if input_format == "probs":
        p, q = p.double().softmax(-1).float(), q.double().softmax(-1).float()
    true = kl_of_logs(log_of(p, input_format), log_of(q, input_format))
    value = measured(p, q, (input_format, input_format)).kl
    torch.testing.assert_close(value, true, rtol=RTOL, atol=0)


def test_random_rows():
    rows = 0
    for case in random_cases(10_000, seed=1, classes=(2, 3, 10, 33, 257)):
        p, q = case.p[:3], case.q[:3]
        value = measured(p, q, case.formats, temperature=case.temperature).kl
        true = case._replace(p=p, q=q).exact()
        near = (value - true).abs() <= RTOL * true.clamp_min(LEAST)
        assert (near | (value == true) | (value.isnan() & true.isnan())).all(), (case.kind, case.formats, value, true)
        rows += len(p)
    assert rows >= 150


@pytest.mark.parametrize("formats", [LOGITS, ("probs", "logits")])
@pytest.mark.parametrize("classes", [10, 4500])
@pytest.mark.parametrize("direction", ["reverse", "jeffreys"])
def test_directions(direction, classes, formats):
    p, q = logits(2, classes).softmax(-1), logits(2, classes, seed=1)
    back = measured(q, p, formats[::-1]).kl
    expected = back if direction == "reverse" else measured(p, q, formats).kl + back
    assert torch.equal(measured(p, q, formats, direction, agrees=True).kl, expected)


def test_the_first_of_equal_classes_in_whichever_tile():
    p, q = torch.zeros(4, 9000), torch.zeros(4, 9000)
    p[0, [20, 8000]], q[0, [20, 5000]] = 3.0, 3.0
    p[1, [5000, 8999]], q[1, 5000] = 3.0, 1.0
    p[2, 8999], q[2, 4096] = 3.0, 3.0
    p[3, 4095], q[3, 4095] = 3.0, 3.0
    for a, b in ((p, q), (p.double(), q.double()), (-p.flip(1), -q.flip(1))):
        assert torch.equal(measured(a, b, agrees=True).agrees, a.argmax(-1) == b.argmax(-1))


@pytest.mark.parametrize("classes", [5, 4500])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(1, 2, 0, 3)[:, 1:],
        lambda x: x[:, :, :, None].transpose(1, 3),
        lambda x: x[:1, :1].expand(2, 3, 2, x.shape[-1]),
        lambda x: x[0, 0, 0],
        lambda x: x[:0],
    ],
)
def test_any_axes_in_little_room(view, classes, monkeypatch):
    x, y = torch.randn(2, 3, 2, classes), torch.randn(2, 3, 2, classes).transpose(0, 2)
    expected = measured(view(x).contiguous(), view(y).contiguous()).kl
    monkeypatch.setattr(accelerator, "SCRATCH", 4000)
    kl = measured(view(x), view(y)).kl
    assert kl.shape == view(x).shape[:-1]
    assert torch.equal(kl, expected)


@pytest.mark.parametrize("of_p", [-1e7, -1e12, float(torch.finfo(torch.float32).min)])
@pytest.mark.parametrize("of_q", [-100, -1e9, -math.inf])
def test_tiles_that_are_masked(of_p, of_q):
    """In p by a number so large that beside it the logits of q have no digits."""
    p, q = (torch.randn(1, 10_000, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    p[:, 512:], q[:, 512:] = of_p, of_q
    log_p, log_q = (x.double().log_softmax(-1)[:, :512] for x in (p, q))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(measured(p, q)[0].double(), expected, rtol=1e-6, atol=0)


def test_more_parts_than_are_merged_at_once():
    p = logits(1, 40_000, dtype=torch.float64)
    q = p + 1e-5 * logits(1, 40_000, seed=1, dtype=torch.float64)
    p[0, 39_999], q[0, 39_998] = 20, 21
    value = measured(p, q, agrees=True)
    torch.testing.assert_close(value.kl, kl_of_logs(log_of(p, "logits"), log_of(q, "logits")), rtol=1e-12, atol=0)
    assert not value.agrees.any()


class TestTrust:
    @pytest.fixture(autouse=True)
    def _serves_here(self, monkeypatch):
        monkeypatch.setattr(accelerator, "DEVICES", (DEVICE,))
        monkeypatch.setattr(accelerator, "_RIGHT", {})
        monkeypatch.setattr(accelerator, "_PARTED", set())
        monkeypatch.setattr(accelerator, "on_accelerators", lambda: "triton")

    def pair(self, classes=10, dtype=torch.float32):
        return (logits(2, classes, seed=seed).softmax(-1).to(DEVICE, dtype) for seed in (0, 1))

    def served(self, classes=10, dtype=torch.float32, **options):
        return accelerator.measure_if_it_serves(*self.pair(classes, dtype), Options(**options), agrees=True) is not None

    @pytest.mark.parametrize("p_format", FORMATS)
    @pytest.mark.parametrize("q_format", FORMATS)
    def test_every_format_is_found_right(self, p_format, q_format):
        assert self.served(input_format=(p_format, q_format))

    def test_whatever_is_asked_for_is_found_right(self):
        options = {"direction": "jeffreys", "temperature": 2.0}
        assert self.served(classes=5000, dtype=torch.bfloat16, input_format=LOGITS, **options)

    def test_what_it_does_not_serve(self, monkeypatch):
        assert not self.served(eps=1e-6)
        assert accelerator.measure_if_it_serves(*torch.ones(2, 0, 3, device=DEVICE), Options()) is None
        p, q = self.pair()
        assert accelerator.measure_if_it_serves(p.to(torch.int32), q, Options()) is None
        assert accelerator.measure_if_it_serves(p.as_subclass(Subclass), q, Options()) is None
        monkeypatch.setattr(accelerator, "on_accelerators", lambda: None)
        assert not self.served()
        assert not accelerator._RIGHT

    def test_it_can_be_turned_off(self, monkeypatch):
        asked = on_accelerators.__wrapped__
        monkeypatch.setenv("KLMETRIC_KERNEL", "plain")
        assert asked() is None
        monkeypatch.delenv("KLMETRIC_KERNEL")
        assert asked() == f"triton {triton.__version__}"
        monkeypatch.setattr(level, "version", raises)
        assert asked() is None

    @pytest.mark.skipif(not parts.INTERPRETED, reason="a compiled kernel is not so easily broken")
    @pytest.mark.parametrize(
        ("name", "broken", "said"),
        [
            ("_series", lambda r: r * 0.0 + 0.4999, r"row \d+ of those it is checked with came to .* nats instead of"),
            ("_lost_in", lambda d, b, a: d * 0.0, r"row 5 of those it is checked with came to"),
            ("_first_of_largest", lambda x, before, n: (before * 0.0, before), r"row \d+ of those it is checked with"),
            ("careful", lambda *_: 1 / 0, r"it cannot be had: InterpreterError, ZeroDivisionError"),
        ],
    )
    def test_a_broken_kernel_is_caught_and_said_once(self, name, broken, said, monkeypatch):
        for module in (parts, tiles):
            monkeypatch.setattr(module, name, broken, raising=False)
        with pytest.warns(UserWarning, match=f"must give what the plain expression gives. On cpu, {said}") as caught:
            assert not self.served(input_format=LOGITS)
        (ours,) = (warning for warning in caught if warning.category is UserWarning)
        assert "KLMETRIC_KERNEL=plain does without" in str(ours.message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not self.served(input_format=LOGITS)
            monkeypatch.undo()  # and nothing else is tried there
            assert not accelerator.measure_if_it_serves(*self.pair(), Options())

    def test_it_is_checked_once_and_then_waits_for_nothing(self, monkeypatch):
        assert self.served(input_format=LOGITS)
        monkeypatch.setattr(accelerator, "_difference", lambda *_: pytest.fail("checked again"))
        p, q = self.pair()
        with Waits() as waits:
            for _ in range(3 if parts.INTERPRETED else 100):
                accelerator.measure_if_it_serves(p, q, Options(input_format=LOGITS), agrees=True)
            assert not waits.seen
            p.sum().item()
            assert waits.seen == ["aten::_local_scalar_dense"]

    def test_the_way_to_it(self, monkeypatch):
        p, found = torch.empty(3, 4, device="meta"), (torch.ones(3), None)
        monkeypatch.setattr(accelerator, "measure_if_it_serves", lambda *_: found)
        assert choose.measure_rows(p, p, Options()).kl is found[0]
        assert choose.measure_rows(p.requires_grad_(), p, Options()).kl is not found[0]
        monkeypatch.setattr(accelerator, "measure_if_it_serves", lambda *_: None)
        assert choose.measure_rows(p.detach(), p, Options()).kl.shape == (3,)


class Subclass(torch.Tensor):
    pass


def raises(name):
    raise PackageNotFoundError(name)


class Waits(TorchDispatchMode):
    """The operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_to_copy"):
            self.seen.append(function.name())
        return function(*args, **kwargs or {})


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from klmetric.arithmetic import tiles

def made(kernel, dtype, target, warps, **constants):
    pointers = {"p": dtype, "q": dtype, "kl": "*fp64", "same": "*i1", "parts": "*fp64"}
    signature = {
        x.name: "constexpr" if x.is_constexpr else x.annotation_type or pointers[x.name] for x in kernel.params
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=target, options={"num_warps": warps})

OF_LOGITS = dict(P=False, Q=False, UNIT_P=True, UNIT_Q=True, FIRST=0, END=1, AGREES=True, FAST=True, ONE=False)
OF_PROBS, OF_BOTH = {**OF_LOGITS, "P": True, "Q": True, "ONE": True}, {**OF_LOGITS, "P": True, "FAST": False}
A100, H100, MI300 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
for kernel in (
    made(tiles.measure_tiles, "*fp32", A100, 4, **OF_LOGITS, C=4096, CHUNK=1024),
    made(tiles.measure_tiles, "*bf16", H100, 4, **OF_LOGITS, C=4096, CHUNK=1024),
    made(tiles.measure_tiles, "*fp16", H100, 1, **OF_PROBS, C=32, CHUNK=32),
    made(tiles.measure_tiles, "*fp32", H100, 4, **OF_BOTH, C=1024, CHUNK=1024),
    made(tiles.merge_tiles, "", H100, 1, DIRECTIONS=1, AGREES=True, N=tiles.MERGED),
    made(tiles.measure_tiles, "*bf16", MI300, 2, **OF_LOGITS, C=1024, CHUNK=256),
):
    target = kernel.metadata.target
    print(target.backend, target.arch, len(kernel.asm["hsaco" if target.backend == "hip" else "cubin"]) > 1000)
"""


@pytest.mark.slow
def test_it_compiles_for_devices_that_are_not_here(tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cuda 80 True", *4 * ["cuda 90 True"], "hip gfx942 True"]


BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "accelerator.py"


@pytest.mark.slow
@pytest.mark.skipif(not parts.INTERPRETED, reason="there is an accelerator here")
def test_the_benchmark_runs_and_says_where_there_is_nothing_to_measure():
    done = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stdout.startswith("There is no accelerator here")
    command = [sys.executable, "-W", "ignore", BENCHMARK, "--interpreter"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^On Triton's interpreter: .*\n\n\| input .* klmetric .*\n.*\n\| 4 x 100, float32, near ", done.stdout
    )
    assert done.stdout.count("%") == 8 * done.stdout.splitlines()[2].count("|") - 8 * 3
