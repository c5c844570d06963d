"""How fast is the mean divergence of a batch of logits or probabilities, and how fast is everybody else?"""

import sys

from contenders import EVERYONE, PEERS, SHAPES
from side_by_side import Contenders, report, table

CASES = (
    ("float32", "near"),
    ("float32", "far"),
    ("float32", "near probs"),
    ("float32", "far probs"),
    ("bfloat16", "near"),
)
OF = {"near": "logits, q near p", "far": "logits, q far from p"}
OF |= {f"{kind} probs": text.replace("logits", "probabilities") for kind, text in OF.items()}


def main() -> None:
    """Time every contender on every shape; `--quick` takes fewer rounds, and float32 alone."""
    rounds, cases = (3, CASES[:4]) if "--quick" in sys.argv else (9, CASES)
    figures, texts = [], []
    with Contenders(EVERYONE) as contenders:
        for dtype, kind in cases:
            lines = []
            for shape in SHAPES:
                setups = {name: (setup, (shape, dtype, kind)) for name, setup in EVERYONE.items()}
                seconds = contenders.medians(setups, rounds=rounds)
                best = min(seconds[name] for name in PEERS if name.startswith("torchmetrics"))
                figures.append({"shape": shape, "dtype": dtype, "kind": kind, "seconds": seconds})
                ratios = [f"{best / seconds[name]:.1f}" for name in EVERYONE]
                lines.append([f"{shape[0]:,} x {shape[1]:,}", f"{1e3 * best:.1f}", *ratios])
                print(*lines[-1], file=sys.stderr)
            header = ["shape", "torchmetrics (ms)", *EVERYONE]
            texts.append(f"{dtype} {OF[kind]}:\n\n{table(header, lines)}")
    explained = (
        "Times faster than torchmetrics (the faster of its two ways, whose milliseconds stand first); below 1 is"
        " slower. A call makes the divergence from the inputs as named: what a library needs in between is included."
    )
    report("Speed", explained + "\n\n" + "\n\n".join(texts), figures)


if __name__ == "__main__":
    main()
