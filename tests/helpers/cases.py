"""Inputs with names, used by more than one test."""

import torch
from torch import Tensor

FORMATS = ("probs", "log_probs", "logits")
DIRECTIONS = ("forward", "reverse", "jeffreys", "jensen_shannon")

# Data sets and batch sizes of which every number of processes must make the same value, to the bit.
GRID = [(count, batch_size) for count in (7, 8, 100, 1001) for batch_size in (1, 3, 16)]


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape: int, input_format: str = "probs", seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two unrelated distributions in one format."""
    convert = {
        "probs": lambda x: x.softmax(-1),
        "log_probs": lambda x: x.log_softmax(-1),
        "logits": lambda x: x,
    }[input_format]
    return [convert(logits(*shape, seed=2 * seed + i, dtype=torch.float64)).to(dtype) for i in (0, 1)]


INVALID_ROWS = {
    "nan": ("probs", [0.5, float("nan"), 0.5], "has NaN at class 1"),
    "negative": ("probs", [0.7, 0.4, -0.1], "has a negative probability at class 2"),
    "all_zero": ("probs", [0.0, 0.0, 0.0], "is 0 in every class"),
    "infinite_probability": ("probs", [0.5, float("inf"), 0.0], "has inf at class 1"),
    "nan_logit": ("logits", [0.5, float("nan"), 0.5], "has NaN at class 1"),
    "infinite_logit": ("logits", [0.5, 0.0, float("inf")], "has inf at class 2"),
    "all_masked": ("log_probs", [-float("inf")] * 3, "is -inf in every class"),
}
