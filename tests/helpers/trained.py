"""Predictions of models that were trained on real data, and of the same models quantised: what the command is for."""

import warnings
from functools import lru_cache
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sooner, for models as small as these
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch]).flatten(0, -2), y[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


@torch.inference_mode()
def predictions(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits in float32, of the model in bfloat16 and of its dynamic quantisation to int8."""
    full = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is about to move
        int8 = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)(x)
    narrow = x.bfloat16() if x.is_floating_point() else x
    return {"full": full, "int8": int8, "bf16": model.bfloat16()(narrow).float()}


@lru_cache(1)
def digits() -> dict[str, Tensor]:
    """Logits of 10 classes for 600 images, shape (600, 10)."""
    data = load_digits()
    x, y = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return predictions(train(model, x[600:].unsqueeze(1), y[600:].unsqueeze(1), 200), x[:600])


@lru_cache(1)
def text() -> dict[str, Tensor]:
    """Logits of the next character of Python's documentation, shape (60, 24, characters)."""
    written = "".join(topics.values())[:200_000]
    characters = sorted(set(written))
    codes = torch.tensor([characters.index(c) for c in written])
    windows = codes[: len(codes) // 32 * 32].reshape(-1, 32)
    contexts = windows.unfold(1, 8, 1)[:, :-1]  # eight characters, and then the next
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(len(characters), 16),
        nn.Flatten(-2),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, len(characters)),
    )
    return predictions(train(model, contexts[60:], windows[60:, 8:], 150), contexts[:60])
