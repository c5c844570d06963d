"""Top-k teachers: whether the bounds hold, in random and adversarial cases; and what others report, on one example."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import torch
from fuzz import kl_of_logs
from side_by_side import report, table
from tails import KINDS, pairs
from torch import Tensor

from klmetric import TopK, kl_divergence, kl_divergence_bounds

CASES, CLASSES, K = 100_000, 32_000, 20
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


def main() -> None:
    """Print both."""
    found = bounds(CASES // 100 if "--quick" in sys.argv else CASES)
    rows, names = side_by_side()
    parts = [
        f"`kl_divergence_bounds` against the divergence of all classes, term by term, in float64. Rows where a bound is"
        f" wrong by more than {RTOL:g} of it and {ATOL:g} nats:",
        table(["rows", "number", "at least is wrong", "at most is wrong", "at least, of all"], found),
        f"The {K} likeliest of {CLASSES:,} classes, in float32; means over 256 rows, in nats. What others report is"
        " computed from their formulas:",
        table(["reported", *names], rows),
    ]
    report("Top-k teachers", "\n\n".join(parts), {"bounds": found, "side by side": rows})


if __name__ == "__main__":
    main()
