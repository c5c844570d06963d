"""Make docs/images/sizes.png: a model of Python's documentation, rounded to fewer and fewer bits a weight."""

import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "sizes.png"
CONTEXT, WINDOW, GROUP = 8, 32, 32


def data() -> tuple[Tensor, Tensor, int]:
    """Windows of eight characters and the next one, and the number of characters."""
    written = "".join(topics.values())[:300_000]
    characters = sorted(set(written))
    codes = torch.tensor([characters.index(c) for c in written])
    windows = codes[: len(codes) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return windows.unfold(1, CONTEXT, 1)[:, :-1], windows[:, CONTEXT:], len(characters)


def trained(x: Tensor, y: Tensor, characters: int) -> nn.Sequential:
    """A small model of the next character."""
    torch.manual_seed(0)
    layers = (nn.Linear(CONTEXT * 32, 256), nn.ReLU(), nn.Linear(256, characters))
    model = nn.Sequential(nn.Embedding(characters, 32), nn.Flatten(-2), *layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(600):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch]).flatten(0, -2), y[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """The nearest of 2^bits - 1 even steps, which are of each group of so many weights in a row."""
    groups = weight.reshape(-1, group)
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((groups / step).round() * step).reshape(weight.shape)


def main() -> None:
    """Train, round, measure and draw."""
    x, y, characters = data()
    model = trained(x[200:], y[200:], characters)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sizes = {}
    with TemporaryDirectory() as folder, torch.inference_mode():

        def save(name: str, logits: Tensor) -> None:
            np.save(Path(folder) / f"{name}.npy", logits.float().numpy())

        save("float32", model(x[:200]))
        for bits in (2, 3, 4, 5, 6, 8):
            for name, group in ((f"int{bits}-g{GROUP}", GROUP), (f"int{bits}", None)):
                if group is None and bits not in (4, 6):
                    continue
                for layer in ("2.weight", "4.weight"):
                    model.state_dict()[layer].copy_(rounded(weights[layer], bits, group or weights[layer].numel()))
                sizes[name] = bits + (16 / group if group else 0)  # a step has 16 bits
                save(name, model(x[:200]))
        model.load_state_dict(weights)
        save("bf16", model.bfloat16()(x[:200]))
        arguments = ["float32.npy", *(f"{name}.npy" for name in sizes), "--input-format", "logits"]
        arguments += [word for name, size in sizes.items() for word in ("--size", f"{name}={size:g}bpw")]
        arguments += ["--floor", "bf16.npy", "--plot", str(PICTURE), *sys.argv[1:]]
        subprocess.run([sys.executable, "-m", "klmetric", "compare", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
