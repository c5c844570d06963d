"""Estimates from drawn tokens: how often their intervals hold the truth, where k3 fails, and what others log as kl."""

import math
import sys
from collections.abc import Iterator

import torch
from side_by_side import report, table
from torch import Tensor

from klmetric import KLDivergenceEstimate

SEQUENCES, LONGEST, STATES, BLOCKS, AT_ONCE = 200, 64, 50, 5, 100
# How far the logits of q are from those of p.
NEAR, FAR = 0.1, 0.5
# KL(p‖q) where log r is normal; and how many tokens are drawn there.
NORMAL, TOKENS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0), 2000
CASES = [(estimator, mean) for mean in ("token", "sequence") for estimator in ("k1", "k3")]


class Chain:
    """Tokens that depend on the one before: a chain of blocks that it seldom leaves, each state with its own distance.

    Args:
        distance: of the logits of q from those of p, on the average.
    """

    def __init__(self, distance: float) -> None:
        generator = torch.Generator().manual_seed(0)
        block = torch.arange(STATES) % BLOCKS
        logits = torch.randn(STATES, STATES + 1, generator=generator, dtype=torch.float64)
        logits[:, :STATES] += 5.0 * (block[:, None] == block)
        logits[:, STATES] += 3 * torch.rand(STATES, generator=generator)  # the end of a sequence
        own = distance * 2 * block.double() / (BLOCKS - 1)
        noise = torch.randn(STATES, STATES + 1, generator=generator, dtype=torch.float64)
        self.log_p = logits.log_softmax(-1)
        self.log_q = (logits + own[:, None] * noise).log_softmax(-1)

    def truth(self) -> dict[str, float]:
        """KL(p‖q) of a token and of a sequence, by going through all states at every place."""
        kl = (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)
        here, tokens, total = torch.full((STATES,), 1 / STATES, dtype=torch.float64), 0.0, 0.0
        for _ in range(LONGEST):
            tokens += here.sum().item()
            total += (here * kl).sum().item()
            here = here @ self.log_p[:, :STATES].exp()
        return {"token": total / tokens, "sequence": total}

    def draw(self, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of drawn tokens under p and under q, and their mask, shape (sequences, LONGEST)."""
        steps, state = self.log_p.exp().cumsum(-1), torch.randint(STATES, (sequences,), generator=generator)
        goes_on, columns = torch.ones(sequences, dtype=torch.bool), []
        for _ in range(LONGEST):
            u = torch.rand(sequences, 1, generator=generator, dtype=torch.float64)
            token = torch.searchsorted(steps[state], u).squeeze(1).clamp(max=STATES)
            columns.append((self.log_p[state, token], self.log_q[state, token], goes_on))
            goes_on = goes_on & (token < STATES)
            state = torch.where(goes_on, token, state)
        log_p, log_q, mask = (torch.stack(x, 1) for x in zip(*columns, strict=True))
        return log_p, log_q, mask


def values(estimator: str, mean: str, *batch: Tensor) -> dict[str, float]:
    """Ours."""
    metric = KLDivergenceEstimate(estimator=estimator, mean=mean).set_dtype(torch.float64)
    metric.update(*batch)
    return {name: value.item() for name, value in metric.compute().items()}


def holds_if_independent(estimator: str, truth: float, log_p: Tensor, log_q: Tensor, mask: Tensor) -> bool:
    """Whether the interval holds it in which every token is independent of the others."""
    d = (log_p - log_q)[mask]
    k = d if estimator == "k1" else torch.expm1(-d) + d
    return abs(k.mean().item() - truth) <= 1.96 * k.std().item() / math.sqrt(len(k))


def of_sequences(draws: int) -> Iterator[dict[str, object]]:
    """How often the intervals hold the truth where the tokens of a sequence are alike."""
    for distance in (NEAR, FAR):
        chain, generator = Chain(distance), torch.Generator().manual_seed(0)
        truth = chain.truth()
        found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in CASES}
        independent = dict.fromkeys(CASES, 0)
        for _ in range(draws // AT_ONCE):
            for batch in zip(*(x.split(SEQUENCES) for x in chain.draw(AT_ONCE * SEQUENCES, generator)), strict=True):
                for case in CASES:
                    estimator, mean = case
                    found[case].append(values(*case, *batch))
                    if mean == "token":
                        independent[case] += holds_if_independent(estimator, truth[mean], *batch)
        for (estimator, mean), all_values in found.items():
            true = truth[mean]
            yield {
                "kl": true,
                "mean": mean,
                "estimator": estimator,
                "average": sum(x["mean"] for x in all_values) / draws,
                "stderr": sum(x["stderr"] for x in all_values) / draws,
                "held": sum(x["low"] <= true <= x["high"] for x in all_values) / draws,
                "held_if_independent": independent[estimator, mean] / draws if mean == "token" else None,
                "tokens": sum(x["tokens"] for x in all_values) / draws,
                "ess": sum(x["ess"] for x in all_values) / draws,
                "mismatch_beyond_3": sum(abs(x["mismatch"]) > 3 for x in all_values) / draws,
            }


def of_normal_log_ratios(draws: int) -> Iterator[dict[str, float]]:
    """Independent tokens with log r normal, of the variance s = 2 KL: that of k1, and that of k3 is e^s - 1 - s."""
    for kl in NORMAL:
        s, generator = 2 * kl, torch.Generator().manual_seed(0)
        held, below, beyond = {"k1": 0, "k3": 0}, 0, 0
        for _ in range(draws):
            log_r = math.sqrt(s) * torch.randn(TOKENS, generator=generator, dtype=torch.float64) - s / 2
            for estimator in held:
                found = values(estimator, "token", torch.zeros_like(log_r), log_r)
                held[estimator] += found["low"] <= kl <= found["high"]
            below += found["mean"] < kl
            beyond += abs(found["mismatch"]) > 3
        deviations = {"k1": math.sqrt(s), "k3": math.sqrt(math.expm1(s) - s)}
        needed = {name: (1.96 * deviation / (0.1 * kl)) ** 2 for name, deviation in deviations.items()}
        shares = {f"{name}_held": count / draws for name, count in held.items()}
        needs = {f"{name}_needed": number for name, number in needed.items()}
        yield {"kl": kl, **shares, **needs, "k3_below": below / draws, "mismatch_beyond_3": beyond / draws}


# Two sequences of an example, of two tokens and of six: log p and log q of each. The reference hardly knows the last.
EXAMPLE = (
    [[-0.4, -1.2], [-0.1, -2.3, -0.7, -0.2, -1.6, -1.3]],
    [[-0.9, -1.1], [-0.1, -2.0, -0.8, -0.3, -1.4, -13.9]],
)


def example() -> list[tuple[str, float]]:
    """What others make of the example, from their formulas, and ours."""
    log_p, log_q = (torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in xs], True).double() for xs in EXAMPLE)
    mask = torch.arange(log_p.shape[1]) < torch.tensor([len(x) for x in EXAMPLE[0]]).unsqueeze(1)
    d = log_p - log_q

    def k3(d: Tensor) -> Tensor:
        return torch.expm1(-d) + d

    def of_tokens(k: Tensor) -> float:
        return k[mask].mean().item()

    def of_sequences(k: Tensor) -> float:
        return (k * mask).sum(1).mean().item()

    def of_means(k: Tensor) -> float:
        return ((k * mask).sum(1) / mask.sum(1)).mean().item()

    clamped = k3(d.clamp(-20, 20)).clamp(-10, 10)
    ours = {case: values(*case, log_p, log_q, mask) for case in CASES}
    return [
        ("TRL, GRPO: `kl`", of_tokens(k3(d))),
        ("TRL, RLOO: `kl`", of_tokens(d)),
        ("TRL, PPO: `objective/kl`", of_sequences(d)),
        ("verl: `actor/reward_kl_penalty`", of_means(d)),
        ("verl: `kl_loss`", of_tokens(clamped)),
        ("NeMo-RL: `kl_penalty`", of_tokens(clamped)),
        ("OpenRLHF: `kl`", of_means(d.clamp(-10, 10))),
        ("Megatron-LM: `rl/kl_term`", of_tokens(k3(d))),
        *((f"klmetric: {estimator}, {mean} mean", ours[estimator, mean]["mean"]) for estimator, mean in CASES),
    ]


def main() -> None:
    """Print the tables; `--quick` takes a tenth of the draws."""
    draws = 200 if "--quick" in sys.argv else 2000
    sequences, normal, logged = list(of_sequences(draws)), list(of_normal_log_ratios(draws)), example()

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.1f} %"

    text = f"""{draws:,} draws of {SEQUENCES} sequences of up to {LONGEST} tokens, each of which depends on the one
before. How many 95 % intervals hold KL(p‖q), which is known.

"""
    text += table(
        ["KL(p‖q)", "mean", "estimator", "average", "standard error", "intervals that hold it",
         "with tokens for independent", "tokens", "effective sample size", "mismatch beyond 3"],
        [
            [f"{x['kl']:.5f}", x["mean"], x["estimator"], f"{x['average']:.5f}", f"{x['stderr']:.5f}",
             percent(x["held"]), percent(x["held_if_independent"]), f"{x['tokens']:.0f}", f"{x['ess']:.0f}",
             percent(x["mismatch_beyond_3"])]
            for x in sequences
        ],
    )  # fmt: skip
    text += f"""

{draws:,} draws of {TOKENS:,} independent tokens, where log r is normal, so that the variance of k1 is s = 2 KL and
that of k3 is e^s - 1 - s. Tokens needed: for an interval of ± 10 %.

"""
    text += table(
        ["KL(p‖q)", "needed by k1", "needed by k3", "k1 intervals that hold it", "k3 intervals that hold it",
         "k3 below KL(p‖q)", "mismatch beyond 3"],
        [
            [f"{x['kl']:g}", f"{x['k1_needed']:,.0f}", f"{x['k3_needed']:,.0f}", percent(x["k1_held"]),
             percent(x["k3_held"]), percent(x["k3_below"]), percent(x["mismatch_beyond_3"])]
            for x in normal
        ],
    )  # fmt: skip
    text += """

What is logged of two sequences of two and six tokens, of which the reference gives the last one a probability of 1e-6.
Computed from the formulas, not by running the libraries.

"""
    text += table(["logged", "value"], [[name, f"{value:.4f}"] for name, value in logged])
    report("Estimates from drawn tokens", text, {"sequences": sequences, "normal": normal, "example": logged})


if __name__ == "__main__":
    main()
