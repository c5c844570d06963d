"""Top-k teachers: whether the bounds hold, in random and adversarial cases; what others report; time and memory."""

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import torch
from fuzz import kl_of_logs
from memory import peak
from side_by_side import report, table
from tails import KINDS, pairs
from torch import Tensor

from klmetric import KLDivergenceSummary, TopK, kl_divergence, kl_divergence_bounds

CASES, CLASSES, K = 100_000, 32_000, 20
# Of a batch whose cost is measured, and how often it is.
POSITIONS, VOCABULARY, ROUNDS = 4096, 128_256, 3
# What rounding may take from a bound in float64, of the divergence and in nats.
RTOL, ATOL = 1e-9, 1e-13


def bounds(cases: int) -> list[list[str]]:
    """Rows of each kind, with a k of their own, against the divergence of all classes, term by term in float64."""
    numbers: dict[str, Tensor] = {kind: torch.zeros(5, dtype=torch.float64) for kind in KINDS}
    for kind, p, q, k in pairs(cases):
        values, indices = p.topk(k)
        low, high, _ = kl_divergence_bounds(
            TopK(values, indices, p.shape[-1]), q, input_format="log_probs", reduction="none"
        )
        exact = kl_of_logs(p, q)
        below = (low > exact * (1 + RTOL) + ATOL).sum()
        above = (exact * (1 - RTOL) - ATOL > high).sum()
        finite = exact.isfinite() & (exact > 1e-9)
        share = torch.where(finite, low / exact, 0).sum()
        numbers[kind] += torch.tensor([len(p), below, above, share, finite.sum()])
    return [
        [kind, f"{int(n):,}", f"{below:.0f}", f"{above:.0f}", f"{100 * share / max(counted, 1):.0f} %"]
        for kind, (n, below, above, share, counted) in ((kind, x.tolist()) for kind, x in numbers.items())
    ]


def students() -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a teacher, and those of students, in float32."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(256, CLASSES, generator=generator)

    teacher = 4 * noise()
    is_kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, teacher.topk(K).indices, True)
    return teacher, {
        "trained": teacher + 0.5 * noise(),
        "converged": teacher + 1e-4 * noise(),
        "sharper": 1.2 * teacher,
        "strays": torch.where(is_kept, teacher, teacher + 2),
    }


def truncated(p: Tensor, q: Tensor) -> Tensor:
    """Of log-probabilities of the k classes."""
    return (p.exp() * (p - q)).sum(-1)


def renormalised(p: Tensor, q: Tensor) -> Tensor:
    """Both sides over the k classes."""
    return truncated(p.log_softmax(-1), q.log_softmax(-1))


def p_renormalised(p: Tensor, q: Tensor) -> Tensor:
    """The teacher over the k classes, the student over all."""
    return truncated(p.log_softmax(-1), q)


def with_tail_of_logsumexp(p: Tensor, q: Tensor) -> Tensor:
    """One class more on both sides, from the logarithm of the sum of the k, kept from 0."""
    tails = [(-x.logsumexp(-1, keepdim=True).clamp(max=-1e-7).expm1()).log() for x in (p, q)]
    return truncated(*(torch.cat(both, -1) for both in zip((p, q), tails, strict=True)))


def with_tail_of_1(p: Tensor, q: Tensor) -> Tensor:
    """One class more on both sides, from what the k leave of 1, kept from 0."""
    tails = [(1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-8).log() for x in (p, q)]
    return truncated(*(torch.cat(both, -1) for both in zip((p, q), tails, strict=True)))


OTHERS = {
    "verl `forward_kl_topk`: the k terms alone": truncated,
    "NeMo-RL; TRL, `loss_add_tail=False`: both sides renormalised": renormalised,
    "NeMo-RL, `zero_outside_topk=True`: the teacher renormalised": p_renormalised,
    "TRL: a tail from the log of the sum": with_tail_of_logsumexp,
    "Megatron-LM: a tail from 1 less the sum": with_tail_of_1,
}


def side_by_side() -> tuple[list[list[str]], list[str]]:
    """The means over rows that each of them has of the same students."""
    teacher, all_students = students()
    values, indices = teacher.log_softmax(-1).topk(K)
    top = TopK(values, indices, CLASSES)
    rows: dict[str, list[str]] = {name: [] for name in OTHERS}
    ours: dict[str, list[str]] = {"klmetric, at least": [], "klmetric, at most": [], "all classes": []}
    for student in all_students.values():
        q = student.log_softmax(-1).gather(-1, indices)
        for name, form in OTHERS.items():
            rows[name].append(f"{form(values, q).mean().item():.4g}")
        low, high, _ = kl_divergence_bounds(top, student, input_format="logits")
        exact = kl_divergence(teacher, student, input_format="logits")
        for name, x in zip(ours, (low, high, exact), strict=True):
            ours[name].append(f"{x.item():.4g}")
    return [[name, *numbers] for name, numbers in (rows | ours).items()], list(all_students)


def cost(positions: int) -> list[list[str]]:
    """Seconds of a teacher in full and of a top-k one beside the same student in full, and MiB beyond the inputs."""
    q = torch.randn(positions, VOCABULARY, generator=torch.Generator().manual_seed(0))
    values, indices = q.topk(K)
    p, top = 1.01 * q, TopK(values - q.logsumexp(-1, keepdim=True), indices, VOCABULARY)

    def value(teacher: Tensor | TopK) -> None:
        kl_divergence(teacher, q, input_format="logits")

    def summary(teacher: Tensor | TopK) -> None:
        KLDivergenceSummary(input_format="logits").update(teacher, q)

    def gradient(teacher: Tensor | TopK) -> None:
        kl_divergence(teacher, q.detach().requires_grad_(), input_format="logits").backward()

    lines = []
    for name, call in (("the mean", value), ("a summary", summary), ("the mean and its gradient", gradient)):
        full, ours = (min(_seconds_and_memory(call, x) for _ in range(ROUNDS)) for x in (p, top))
        lines.append([name, *(f"{x:.2f}" for x in (full[0], ours[0], ours[0] / full[0])), f"{ours[1]:.0f}"])
    return lines


def _seconds_and_memory(call: Callable[[Tensor | TopK], None], teacher: Tensor | TopK) -> tuple[float, float]:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = peak(), time.perf_counter()
    call(teacher)
    return time.perf_counter() - start, (peak() - before) / 1024


def main() -> None:
    """Print all three."""
    is_quick = "--quick" in sys.argv
    costs = cost(POSITIONS // 8 if is_quick else POSITIONS)
    found = bounds(CASES // 100 if is_quick else CASES)
    rows, names = side_by_side()
    parts = [
        f"`kl_divergence_bounds` against the divergence of all classes, term by term, in float64. Rows where a bound is"
        f" wrong by more than {RTOL:g} of it and {ATOL:g} nats:",
        table(["rows", "number", "at least is wrong", "at most is wrong", "at least, of all"], found),
        f"The {K} likeliest of {CLASSES:,} classes, in float32; means over 256 rows, in nats. What others report is"
        " computed from their formulas:",
        table(["reported", *names], rows),
        f"The {K} likeliest of {VOCABULARY:,} classes, or all of them, beside the logits of a student, for"
        f" {POSITIONS:,} positions in float32 ({POSITIONS * VOCABULARY * 4 / 2**20:,.0f} MiB each; a gradient is as"
        " large). The least of three:",
        table(["", "all classes, s", "top-k, s", "of that", "top-k, MiB beyond the inputs"], costs),
    ]
    report("Top-k teachers", "\n\n".join(parts), {"bounds": found, "side by side": rows, "cost": costs})


if __name__ == "__main__":
    main()
