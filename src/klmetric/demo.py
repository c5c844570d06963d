"""Knowledge distillation on the handwritten digits of scikit-learn, with `val_kl` at every epoch."""

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from klmetric import KLDivergence, kl_divergence
from klmetric.lightning import KLDivergenceCallback

# Here and not in `run`, so that it holds in the processes that are spawned, too.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

VALIDATION = 397  # a prime: no number of processes divides it evenly
BATCH = 32


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


def run(devices: int, epochs: int, seed: int, out: Path) -> None:
    """Train the teacher, distil the student, and evaluate the best checkpoint with 1 and with more processes."""
    console = Console()
    # Lightning advises on workers and samplers, which is of no use here, in this process and in those it spawns.
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    train, validation = digits()

    teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with console.status("The teacher learns the labels"):
        train_teacher(teacher, train)
    images, labels = validation.tensors
    accuracy = (teacher(images).argmax(1) == labels).float().mean().item()
    console.print(f"Teacher: {len(train)} digits learnt, {accuracy:.1%} of {len(validation)} others read correctly.")

    callback = kl_callback()
    checkpoint = ModelCheckpoint(out, monitor="val_kl", filename="best", save_last=True, enable_version_counter=False)
    trainer = cpu_trainer(
        devices,
        max_epochs=epochs,
        callbacks=[callback, checkpoint, RichProgressBar(leave=False)],
        logger=CSVLogger(out.parent, name=out.name, version=""),
    )
    console.print(f"The student learns from it, on {processes(devices)}:")
    trainer.fit(
        Student(teacher),
        DataLoader(train, BATCH, shuffle=True),
        DataLoader(validation, BATCH),
    )
    # The processes that trained are gone, but the checkpoint has the history.
    last = torch.load(out / "last.ckpt", weights_only=True)
    callback.load_state_dict(last["callbacks"][callback.state_key])
    history = callback.history
    best = min(history, key=lambda record: record["val_kl"])
    console.print(epoch_table(history, best))
    console.print(f"Best: epoch {best['epoch']}, val_kl {best['val_kl']:.9g} nats.\n")

    console.print("That checkpoint, evaluated again:")
    values = {}
    for count in (1, max(2, devices)):
        again = cpu_trainer(count, callbacks=[kl_callback()], logger=False, enable_progress_bar=False)
        again.validate(Student(teacher), DataLoader(validation, BATCH), ckpt_path=out / "best.ckpt", verbose=False)
        values[count] = again.callback_metrics["val_kl"].item()
        console.print(f"  with {processes(count):<12}  val_kl = {values[count]:.9g}")
    low, high = min(values.values()), max(values.values())
    if high - low > 1e-6 * high:
        raise RuntimeError(f"The value must not depend on the number of processes. Got {values}.")
    # The metric adds nothing, but a layer may round the same image differently in a batch of another size.
    console.print(f"  The same number{', to the last digit' if high == low else ''}.\n")

    figure, axis = callback.plot()
    axis.set_ylabel("KL divergence (nats)")
    axis.set_title("Student against teacher, on digits that neither has learnt")
    figure.savefig(out / "val_kl.png", dpi=150, bbox_inches="tight")
    console.print(f"Written: {out / 'metrics.csv'}, {out / 'val_kl.png'}, best.ckpt and last.ckpt")
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 images of 8 x 8 pixels, shuffled and split (Alpaydin and Kaynak: UCI handwritten digits, 1998)."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    x = torch.from_numpy(images).float()[order] / 16
    y = torch.from_numpy(labels)[order]
    return TensorDataset(x[VALIDATION:], y[VALIDATION:]), TensorDataset(x[:VALIDATION], y[:VALIDATION])


def train_teacher(teacher: nn.Module, data: TensorDataset) -> None:
    """Ordinary training on labels."""
    images, labels = data.tensors
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def kl_callback() -> KLDivergenceCallback:
    """The one line that a Lightning user adds."""
    return KLDivergenceCallback(KLDivergence(input_format="logits"), p="teacher", q="student")


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


def epoch_table(history: list[dict[str, Any]], best: dict[str, Any]) -> Table:
    """One line for each epoch."""
    table = Table("epoch", "val_kl (nats)", "student against teacher")
    scale = 32 / max(record["val_kl"] for record in history)
    for record in history:
        style = "bold green" if record is best else ""
        bar = "█" * max(1, round(record["val_kl"] * scale))
        table.add_row(str(record["epoch"]), f"{record['val_kl']:.6f}", bar, style=style)
    return table


def processes(count: int) -> str:
    """In words."""
    return "1 process" if count == 1 else f"{count} processes"
