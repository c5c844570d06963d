"""A teacher and a student on the handwritten digits of scikit-learn, and what trains and evaluates them."""

import logging
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from klmetric import kl_divergence

# Here and not in `run`, so that it holds in the processes that are spawned, too.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

VALIDATION = 397  # a prime: no number of processes divides it evenly


class Student(LightningModule):
    """A small network that learns the distribution of its teacher."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss is the divergence itself."""
        (images, _) = batch
        return kl_divergence(self.teacher(images), self.student(images), input_format="logits")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return what the callback measures."""
        (images, _) = batch
        return {"teacher": self.teacher(images), "student": self.student(images)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.student.parameters(), lr=5e-3)


class Beside(Student):
    """The same, with the metric of torchmetrics beside the callback, logged as its documentation says."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        self.theirs = torchmetrics.KLDivergence(log_prob=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Update and log it."""
        logits = super().validation_step(batch, batch_idx)
        self.theirs.update(logits["teacher"].log_softmax(-1), logits["student"].log_softmax(-1))
        self.log("torchmetrics", self.theirs)
        return logits


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8 x 8 pixels, shuffled and split (Alpaydin and Kaynak: UCI handwritten digits, 1998)."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    x = torch.from_numpy(images).float()[order] / 16
    y = torch.from_numpy(labels)[order]
    return TensorDataset(x[VALIDATION:], y[VALIDATION:]), TensorDataset(x[:VALIDATION], y[:VALIDATION])


def trained_teacher(data: TensorDataset) -> nn.Module:
    """Ordinary training on labels."""
    teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    images, labels = data.tensors
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return teacher


def cpu_trainer(devices: int, **options: Any) -> Trainer:
    """A Trainer on that many CPU processes."""
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )
