"""What do classes without probability cost: masks, soft labels, probabilities too small for half precision?

With `BEFORE` in the environment, the `src` folder of an earlier version, that one takes its turns, too.
"""

import math
import os
import sys

import torch
from contenders import Call, Shape
from side_by_side import Contenders, report, table
from torch import Tensor

SHAPES: tuple[Shape, ...] = ((200, 32_000), (20_000, 200), (50_000, 10))
BEFORE = os.environ.get("BEFORE")
# How p and q are made of logits and a mask of the classes; how they are read, at which temperature.
KINDS = {
    "soft labels": ("probs", 1.0),
    "half precision": ("probs", 1.0),
    "masked logits": ("logits", 1.0),
    "masked, T = 2": ("logits", 2.0),
    "masked, float64": ("logits", 1.0),
}


def inputs(kind: str, shape: Shape, has_zeros: bool) -> tuple[Tensor, Tensor]:
    """Unrelated rows; with zeros, 30 % of the classes have none in either."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < 0.3
    mask[:, :2] = False
    torch.set_grad_enabled(False)
    if kind == "masked, float64":
        p, q = p.double(), q.double()
    if has_zeros:
        # 20 nats below the others a probability is 0 in half precision.
        low = -20 if kind == "half precision" else -math.inf
        p, q = ((x + low * mask if kind == "half precision" else x.masked_fill(mask, low)) for x in (p, q))
    if KINDS[kind][0] == "probs":
        p, q = p.softmax(-1), q.softmax(-1)
    return (p.half(), q.half()) if kind == "half precision" else (p, q)


def ours(kind: str, shape: Shape, has_zeros: bool, path: str | None = None) -> Call:
    """`klmetric.kl_divergence`, from the folder `path` if there is one."""
    if path:
        sys.path.insert(0, path)
    from klmetric import kl_divergence

    p, q = inputs(kind, shape, has_zeros)
    input_format, temperature = KINDS[kind]
    return lambda: kl_divergence(p, q, input_format=input_format, temperature=temperature)


def theirs(kind: str, shape: Shape, has_zeros: bool) -> Call:
    """`torchmetrics` on probabilities in float32 (where both are 0 it makes NaN, in the same time)."""
    from torchmetrics.functional.regression import kl_divergence

    p, q = inputs(kind, shape, has_zeros)
    input_format, temperature = KINDS[kind]

    def call() -> Tensor:
        a, b = ((x / temperature).softmax(-1) if input_format == "logits" else x.float() for x in (p, q))
        return kl_divergence(a, b)

    return call


def main() -> None:
    """Time every kind on every shape, in milliseconds; `--quick` takes fewer rounds."""
    rounds = 3 if "--quick" in sys.argv else 9
    names = ["without", "zeros", *(["without, before", "zeros, before"] if BEFORE else []), "torchmetrics"]
    figures, lines = [], []
    with Contenders(names) as contenders:
        for shape in SHAPES:
            for kind in KINDS:
                setups = {
                    "without": (ours, (kind, shape, False)),
                    "zeros": (ours, (kind, shape, True)),
                    "without, before": (ours, (kind, shape, False, BEFORE)),
                    "zeros, before": (ours, (kind, shape, True, BEFORE)),
                    "torchmetrics": (theirs, (kind, shape, True)),
                }
                seconds = contenders.medians({name: setups[name] for name in names}, rounds=rounds)
                figures.append({"shape": shape, "kind": kind, "seconds": seconds})
                line = [f"{shape[0]:,} x {shape[1]:,}, {kind}"]
                for end in ("", ", before") if BEFORE else ("",):
                    without, zeros = seconds["without" + end], seconds["zeros" + end]
                    line += [f"{1e3 * without:.1f}", f"{1e3 * zeros:.1f}", f"{zeros / without:.1f}"]
                lines.append([*line, f"{1e3 * seconds['torchmetrics']:.1f}"])
                print(*lines[-1], file=sys.stderr)
    head = ["ms", "without", "with zeros", "ratio"]
    head += ["without, before", "with zeros, before", "ratio, before"] if BEFORE else []
    explained = "One call without and with classes of no probability in p and in q, three in ten of them."
    report("Zeros", f"{explained}\n\n{table([*head, 'torchmetrics'], lines)}", figures)


if __name__ == "__main__":
    main()
