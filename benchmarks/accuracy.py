"""How many digits are right, by the size of the divergence and the number of classes?"""

import math

import torch
from side_by_side import report, table
from torch import Tensor
from torchmetrics.functional.regression import kl_divergence as theirs

from klmetric import kl_divergence

DIVERGENCES = (1e-13, 1e-11, 1e-9, 1e-7, 1e-5, 1e-3, 1e-1, 1.0, 10.0)
CLASSES = (2, 10, 100, 1000, 32_000, 128_256)
ROWS = 8


def pair(classes: int, divergence: float) -> tuple[Tensor, Tensor]:
    """Float32 logits of about that divergence: q is p with noise, or, where that is large, tilted noise."""
    generator = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(ROWS, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    size = math.sqrt(2 * divergence) if divergence <= 0.5 else 2 + divergence
    p = p.float()
    return p, (p.double() + size * noise).float()


def exact(p: Tensor, q: Tensor) -> Tensor:
    """In float64, term by term."""
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    s = b - a
    near = torch.where(s.abs() < 1, s, 0)
    return torch.where(s.abs() < 1, a.exp() * (near.expm1() - near), b.exp() - a.exp() - a.exp() * s).sum(-1)


def worst(value: Tensor, reference: Tensor) -> float:
    """Largest relative error of any row."""
    return ((value.double() - reference).abs() / reference).max().item()


def main() -> None:
    """Print the largest relative error of any row, of the three on the same float32 logits."""
    names = ("klmetric", "klmetric, compiled form", "torchmetrics, log")
    figures: list[dict[str, object]] = []
    cells: dict[str, list[list[str]]] = {name: [] for name in names}
    for divergence in DIVERGENCES:
        row: dict[str, list[str]] = {name: [f"{divergence:.0e}"] for name in names}
        for classes in CLASSES:
            p, q = pair(classes, divergence)
            reference = exact(p, q)
            values = {
                names[0]: kl_divergence(p, q, input_format="logits", reduction="none"),
                names[1]: _plain(p, q),
                names[2]: theirs(p.log_softmax(-1), q.log_softmax(-1), log_prob=True, reduction="none"),
            }
            errors = {name: worst(value, reference) for name, value in values.items()}
            negative = {name: int((value < 0).sum()) for name, value in values.items()}
            figures.append({"kl": divergence, "classes": classes, "error": errors, "negative": negative})
            for name in names:
                row[name].append(f"{errors[name]:.0e}" + (" (negative)" if negative[name] else ""))
        for name in names:
            cells[name].append(row[name])
    header = ["KL about", *(f"{classes:,} classes" for classes in CLASSES)]
    tables = "\n\n".join(f"{name}:\n\n{table(header, cells[name])}" for name in names)
    text = f"Largest relative error of {ROWS} rows of float32 logits, against float64 on the same input.\n\n{tables}"
    report("Accuracy", text, figures)


def _plain(p: Tensor, q: Tensor) -> Tensor:
    from klmetric.arithmetic.plain import plain
    from klmetric.options import Options

    return plain(p, q, Options(input_format=("logits", "logits")))


if __name__ == "__main__":
    main()
