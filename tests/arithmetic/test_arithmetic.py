"""The arithmetic on the CPU, by the kernel and by the plain expression: accuracy, memory, and the bits of a row."""

import ctypes
import math
import sys
from collections import Counter

import pytest
import torch
from cases import logits
from fuzz import cases, kl_of_logs, log_of
from processes import alone, peak, peak_from_now

from klmetric import kl_divergence
from klmetric.arithmetic import choose
from klmetric.arithmetic.level import level
from klmetric.arithmetic.plain import WIDTH

# What is promised of every format and dtype, for every divergence from 1e-13 on.
RTOL = 1e-6
CLASSES = (2, 3, 10, 64, 65, 255, 1000, 32_000, 128_256)
INF = math.inf


@pytest.fixture(params=["kernel", "plain"])
def way(request, monkeypatch):
    """The kernel, and what serves without it."""
    if request.param == "plain":
        monkeypatch.setattr(choose, "_serves", lambda *_: False)
    elif level() is None:
        pytest.skip("there is no kernel here")
    return request.param


def exact(p, q, input_format="logits"):
    """In float64, term by term."""
    return kl_of_logs(log_of(p, input_format), log_of(q, input_format))


def pair_at(classes, divergence, n=4, seed=0):
    """Float32 logits with about that divergence."""
    a = logits(n, classes, seed=seed, dtype=torch.float64)
    direction = logits(n, classes, seed=seed + 1, dtype=torch.float64)
    scale = math.sqrt(2 * divergence)
    if divergence > 0.5:
        # A steep tilt: a second distribution that has its peak elsewhere.
        return a.float(), (a + (2 + divergence) * direction).float()
    return a.float(), (a.float().double() + scale * direction).float()


class TestAccuracy:
    @pytest.mark.parametrize("divergence", [1e-13, 1e-11, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0, 4.0])
    @pytest.mark.parametrize("classes", CLASSES)
    @pytest.mark.parametrize("log_probs", [False, True], ids=["logits", "log_probs"])
    def test_every_row_of_logits(self, classes, divergence, log_probs):
        p, q = pair_at(classes, divergence)
        if log_probs:
            p, q = p.double().log_softmax(-1).float(), q.double().log_softmax(-1).float()
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)
        reverse = kl_divergence(p, q, input_format="logits", reduction="none", direction="reverse")
        torch.testing.assert_close(reverse.double(), exact(q, p), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("divergence", [1e-13, 1e-11, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0, 4.0])
    @pytest.mark.parametrize("classes", CLASSES)
    def test_every_row_of_probabilities(self, classes, divergence):
        p, q = (x.double().softmax(-1).float() for x in pair_at(classes, divergence))
        q = q * 3  # need not be normalised
        value = kl_divergence(p, q, reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q, "probs"), rtol=RTOL, atol=0)

    def test_a_hundred_thousand_random_rows(self, way):
        kinds = Counter()
        for case in cases(10**5):
            wrong = case.wrong()
            assert not wrong.any(), (case, case.measured()[wrong], case.exact()[wrong])
            kinds[case.kind] += len(wrong)
        assert min(kinds.values()) > 5000

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("classes", [2, 3, 10, 1000, 32_000])
    @pytest.mark.parametrize("other", ["log_probs", "logits"])
    def test_probabilities_against_logarithms(self, way, classes, dtype, other):
        p, q = pair_at(classes, 1e-4)
        p, q = p.double().softmax(-1).to(dtype), q.to(torch.bfloat16 if dtype == torch.float16 else dtype)
        for formats in (("probs", other), (other, "probs")):
            a, b = (p, q) if formats[0] == "probs" else (q, p)
            value = kl_divergence(a, b, input_format=formats, reduction="none")
            true = kl_of_logs(log_of(a, formats[0]), log_of(b, formats[1]))
            torch.testing.assert_close(value.double(), true, rtol=RTOL, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("classes", [2, 3, 10, 1000, 32_000])
    def test_every_dtype(self, classes, dtype):
        p, q = (x.to(dtype) for x in pair_at(classes, 1e-4))
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("classes", [3, 200, 5000])
    def test_rows_of_half_precision_that_go_the_careful_way(self, classes, dtype):
        p, q = pair_at(classes, 1.0)
        p[:, 0], q[:, 0] = 40.0, 40.0
        p[2], q[2] = 1 + p[2] / 1000, 1 + p[2] / 1000
        p, q = p.to(dtype), q.to(dtype)
        q[2, 1] = torch.nextafter(p[2, 1], p.new_tensor(9.0))
        q[3, 0] = -40
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=torch.finfo(torch.float32).tiny)

    @pytest.mark.parametrize("gap", [30.0, 100.0, 1000.0, 10_000.0])
    @pytest.mark.parametrize("classes", [3, 200, 5000])
    def test_peaked_rows(self, classes, gap):
        p, q = pair_at(classes, 1.0)
        p[0, 0] += gap
        q[1, 1] += gap
        p[2, 0], q[2, 0] = p[2, 0] + gap, q[2, 0] + gap
        p[3, 0], q[3, 1] = p[3, 0] + gap, q[3, 1] + gap
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=torch.finfo(torch.float32).tiny)

    @pytest.mark.parametrize("offset", [3.0, 100.0, 1e4])
    @pytest.mark.parametrize("classes", [3, 200, 5000])
    def test_a_constant_between_the_logits(self, way, classes, offset):
        p, q = pair_at(classes, 1e-6)
        q = q + offset
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("offset", [1e6, 1e9, 1e17, -1e17, 1e30])
    @pytest.mark.parametrize("classes", [3, 300])
    def test_a_constant_that_leaves_few_digits(self, classes, offset):
        p = torch.stack([1e-6 * logits(classes), logits(classes)])
        q = torch.full_like(p, offset)
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("peak", [1000.3, 1e4, 1e8, 1e30])
    @pytest.mark.parametrize("classes", [3, 300])
    def test_a_floor_far_below_the_peak(self, classes, peak):
        p, q = torch.zeros(2, classes), torch.zeros(2, classes)
        q[0, 0] = peak
        value = kl_divergence(p, q, input_format="logits", reduction="none", eps=1e-3)
        floored = torch.full((classes,), 1e-3, dtype=torch.float64)
        floored[0] = 1
        expected = -math.log(classes) - (floored / floored.sum()).log().mean()
        torch.testing.assert_close(value[0].double(), expected, rtol=RTOL, atol=0)

    @pytest.mark.parametrize("divergence", [1e-9, 1e-3, 1.0])
    @pytest.mark.parametrize("classes", [10, 1000])
    def test_an_outlier_among_near_equal_classes(self, classes, divergence):
        p, q = pair_at(classes, 1e-9)
        p[:, 3] -= 20
        q[:, 3] = p[:, 3] + math.log1p(divergence * 1e8)
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("largest", [0.34, 0.42, 2.0])  # where the kernel has one polynomial, and one more
    @pytest.mark.parametrize("input_format", ["logits", "probs"])
    def test_the_ends_of_the_series(self, input_format, largest):
        # Nearly all of the weight at the largest |t|, where a series cut too short is at its worst.
        p = logits(2, 1000)
        sign = torch.where(torch.arange(1000) % 2 == 0, 1.0, -1.0)
        q = p + 0.8 * largest * torch.stack([sign, -sign])
        if input_format == "probs":
            p = p.double().softmax(-1).float()
            q = p * (1 + 0.8 * min(largest, 0.9) * torch.stack([sign, -sign]))
        value = kl_divergence(p, q, input_format=input_format, reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q, input_format), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("divergence", [1e-6, 1.0])
    @pytest.mark.parametrize("classes", [10, 1000])
    def test_masked_classes(self, way, classes, divergence):
        p, q = pair_at(classes, divergence)
        p[:, 1::3] = q[:, 1::3] = -INF
        p[2, 0] = -INF  # in one alone
        q[3, 0] = -INF
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        assert value.isposinf().tolist() == [False, False, False, True]
        torch.testing.assert_close(value[:3].double(), exact(p[:3], q[:3]), rtol=RTOL, atol=0)
        probs = kl_divergence(p.double().softmax(-1).float(), q.double().softmax(-1).float(), reduction="none")
        assert probs.isposinf().tolist() == [False, False, False, True]

    @pytest.mark.parametrize("classes", [10, 1000])
    def test_a_bad_class_does_not_hide_behind_a_mask(self, classes):
        for bad in (math.nan, INF):
            p, q = pair_at(classes, 1e-6)
            p[:, 0] = q[:, 0] = -INF
            q[1, 0], q[2, 5], p[3, 0] = bad, bad, bad
            with pytest.warns(UserWarning, match="3 of 4"):
                value = kl_divergence(p, q, input_format="logits", reduction="none")
            assert value.isnan().tolist() == [False, True, True, True]

    @pytest.mark.parametrize("classes", [10, 1000])
    def test_soft_labels_with_zeros(self, classes):
        p, q = (x.double().softmax(-1).float() for x in pair_at(classes, 1.0))
        p[:, ::2] = 0
        p[0] = 0
        p[0, 1] = 1
        q[1, 0] = 0
        value = kl_divergence(p, q, reduction="none")
        a, b = p.double(), q.double()
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        torch.testing.assert_close(value.double(), torch.xlogy(a, a / b).nan_to_num(0).sum(-1), rtol=RTOL, atol=0)

    def test_flushed_denormals(self):
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormals")
        try:
            self.test_peaked_rows(200, 100.0)
        finally:
            torch.set_flush_denormal(False)

    @pytest.mark.parametrize("classes", CLASSES)
    def test_equal_rows(self, way, classes):
        p = logits(3, classes)
        assert (kl_divergence(p, p.clone(), input_format="logits", reduction="none") == 0).all()
        assert (kl_divergence(p.softmax(-1), p.softmax(-1), reduction="none") == 0).all()

    @pytest.mark.parametrize("classes", [WIDTH + 1, 2 * WIDTH + 5])
    @pytest.mark.parametrize("divergence", [1e-9, 1.0])
    def test_very_wide_rows(self, way, classes, divergence):
        p, q = pair_at(classes, divergence, n=2)
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)

    @pytest.mark.parametrize("temperature", [0.3, 0.7, 3.0])
    @pytest.mark.parametrize("offset", [8.0, 1024.0, 2.0**20])
    def test_a_constant_beside_a_temperature(self, way, offset, temperature):
        """Parts of a row that lie apart: the constant must be the same in each, to the last digit."""
        p = torch.zeros(1, 2048)
        q = p + offset
        q[:, :1024] += 0.25
        value = kl_divergence(p, q, input_format="logits", temperature=temperature, reduction="none")
        torch.testing.assert_close(
            value.double(), exact(p / temperature, (q - offset).double() / temperature), rtol=RTOL, atol=0
        )

    @pytest.mark.parametrize("part", [WIDTH, 1024, 3000])
    def test_a_part_without_weight(self, way, part):
        p, q = pair_at(part + 1, 1.0, n=2)
        p[:, :part] = -1e9  # it has logits all the same
        q[:, : part - 1] = -INF
        value = kl_divergence(p, q, input_format="logits", reduction="none")
        torch.testing.assert_close(value.double(), exact(p, q), rtol=RTOL, atol=0)


class TestBits:
    @pytest.mark.parametrize("input_format", ["logits", "probs"])
    @pytest.mark.parametrize(
        "shape",
        [(5000, 2), (4001, 3), (4001, 4), (3000, 10), (700, 100), (300, 1000), (19, 32_000), (5, 128_256)],
        ids=str,
    )
    def test_a_row_is_the_same_in_any_batch(self, way, shape, input_format):
        n, classes = shape
        p, q = pair_at(classes, 0.01, n)
        # Rows of every kind among one another.
        q[::3] = p[::3] + 1e-4 * logits(len(p[::3]), classes, seed=5)
        q[1::4] = logits(len(p[1::4]), classes, seed=6)
        p[::5, 0] = q[::5, 0] = -INF
        q[::7] += 50
        p[::6, 1] += 200
        if input_format == "probs":
            p, q = p.softmax(-1), q.softmax(-1)

        def value(p, q):
            return kl_divergence(p, q, input_format=input_format, reduction="none")

        whole = value(p, q)
        for size in (1, 2, 7, n // 2 + 1):
            few = slice(0, 40 * size)
            parts = [value(*both) for both in zip(p[few].split(size), q[few].split(size), strict=True)]
            assert torch.equal(torch.cat(parts), whole[few])
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        assert torch.equal(value(p[order], q[order]), whole[order])

    @pytest.mark.parametrize("input_format", ["probs", "logits"])
    def test_a_floor_and_many_threads(self, input_format):
        p, q = (logits(8, 40_000, seed=seed, dtype=torch.float64) for seed in (0, 1))
        if input_format == "probs":
            p, q = p.softmax(-1), q.softmax(-1)
        options = {"input_format": input_format, "eps": 1e-3, "reduction": "none"}
        threads = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            whole = kl_divergence(p, q, **options)
            for i in range(8):
                assert torch.equal(kl_divergence(p[i : i + 1], q[i : i + 1], **options), whole[i : i + 1])
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("shape", [(6, 5, 7, 10), (6, 300, 7)], ids=str)
    def test_the_layout_in_memory_does_not_matter(self, way, shape):
        p, q = logits(*shape), logits(*shape, seed=1)
        whole = kl_divergence(p, q, input_format="logits", reduction="none")
        for dim in range(len(shape)):
            moved = [x.movedim(-1, dim).contiguous() for x in (p, q)]
            assert torch.equal(kl_divergence(*moved, dim=dim, input_format="logits", reduction="none"), whole)
        strided = [torch.stack([x, x], -1)[..., 0] for x in (p, q)]
        assert torch.equal(kl_divergence(*strided, input_format="logits", reduction="none"), whole)


def extra_memory(rows, classes, input_format, dtype, kind, limit):
    """MiB at the peak of a call, beyond the inputs: the least of three calls, or the first below the limit."""
    p, q = (torch.rand(rows, classes).softmax(-1).to(getattr(torch, dtype)) for _ in range(2))
    if kind == "masked":
        p[:, 0] = 0
    options = {"input_format": input_format, "direction": "jeffreys", "eps": 1e-9 if kind == "floor" else 0}
    kl_divergence(p[:2], q[:2], **options)

    def extra():
        ctypes.CDLL(None).malloc_trim(0)
        before = peak_from_now()
        kl_divergence(p, q, **options)
        return peak() - before

    least = math.inf
    for _ in range(3):  # what else the process does can only add
        least = min(least, extra())
        if least <= limit:
            break
    return least


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("kind", ["plain", "masked", "floor"])
@pytest.mark.parametrize(
    ("shape", "input_format", "dtype"),
    [
        # Of 31 MiB and more each in float32, so that a copy of one would be seen.
        ((256, 32_000), "logits", "float32"),
        ((256, 32_000), "probs", "float32"),
        ((256, 32_000), "logits", "bfloat16"),
        ((1_000_000, 10), "logits", "float32"),
        ((10, 1_000_000), "logits", "float32"),
    ],
    ids=str,
)
def test_memory_does_not_grow_with_the_input(shape, input_format, dtype, kind):
    is_by_kernel = level() is not None and kind != "floor"
    rows, classes = shape if is_by_kernel else (max(1, shape[0] // 8), shape[1])
    limit = rows * 8 / 2**20 + (1 if is_by_kernel else 16)  # one value per row
    assert alone(extra_memory, rows, classes, input_format, dtype, kind, limit) <= limit
