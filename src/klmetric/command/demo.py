"""`klmetric demo`: knowledge distillation with `val_kl` at every epoch, and where torchmetrics has another number."""

import copy
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from klmetric import KLDivergence
from klmetric.command.distil import Beside, Student, cpu_trainer, digits, trained_teacher
from klmetric.lightning import KLDivergenceCallback

BATCH = 32


def run(devices: int, epochs: int, seed: int, out: Path) -> None:
    """Train the teacher, distil the student, and measure with 1 and with more processes, and of near-equal models."""
    console = Console()
    # Lightning advises on workers and samplers, which is of no use here, in this process and in those it spawns.
    warnings.simplefilter("ignore")
    os.environ["PYTHONWARNINGS"] = "ignore"
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    train, validation = digits()
    with console.status("The teacher learns the labels"):
        teacher = trained_teacher(train)
    images, labels = validation.tensors
    accuracy = (teacher(images).argmax(1) == labels).float().mean().item()
    console.print(f"Teacher: {len(train)} digits learnt, {accuracy:.1%} of {len(validation)} others read correctly.")

    console.print(f"The student learns from it, on {in_words(devices)}:")
    callback = distil(teacher, train, validation, devices, epochs, out)
    best = min(callback.history, key=lambda record: record["val_kl"])
    console.print(epoch_table(callback.history, best))
    console.print(f"Best: epoch {best['epoch']}, val_kl {best['val_kl']:.9g} nats.\n")

    console.print("Validated again by Lightning, with torchmetrics.KLDivergence logged in the same step:")
    show_processes(console, [(n, validate(teacher, validation, n, out)) for n in (1, max(2, devices))])

    console.print("Near-equal models, in float32: the teacher against itself with its weights rounded:")
    show_rounded(console, teacher, images)

    draw(callback, out / "val_kl.png")
    console.print(f"Written: {out / 'metrics.csv'}, {out / 'val_kl.png'}, best.ckpt and last.ckpt")
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")


def distil(
    teacher: nn.Module, train: TensorDataset, validation: TensorDataset, devices: int, epochs: int, out: Path
) -> KLDivergenceCallback:
    """Train the student, and return the callback with what it has logged."""
    callback = kl_callback()
    checkpoint = ModelCheckpoint(out, monitor="val_kl", filename="best", save_last=True, enable_version_counter=False)
    trainer = cpu_trainer(
        devices,
        max_epochs=epochs,
        callbacks=[callback, checkpoint, RichProgressBar(leave=False)],
        logger=CSVLogger(out.parent, name=out.name, version=""),
    )
    trainer.fit(Student(teacher), DataLoader(train, BATCH, shuffle=True), DataLoader(validation, BATCH))
    # The processes that trained are gone, but the checkpoint has the history.
    last = torch.load(out / "last.ckpt", weights_only=True)
    callback.load_state_dict(last["callbacks"][callback.state_key])
    return callback


def kl_callback() -> KLDivergenceCallback:
    """The one line that a Lightning user adds."""
    return KLDivergenceCallback(KLDivergence(input_format="logits"), p="teacher", q="student")


def validate(teacher: nn.Module, validation: TensorDataset, devices: int, out: Path) -> tuple[float, float]:
    """The number of klmetric and that of torchmetrics for the best checkpoint, from one run."""
    trainer = cpu_trainer(devices, callbacks=[kl_callback()], logger=False, enable_progress_bar=False)
    trainer.validate(Beside(teacher), DataLoader(validation, BATCH), ckpt_path=out / "best.ckpt", verbose=False)
    return trainer.callback_metrics["val_kl"].item(), trainer.callback_metrics["torchmetrics"].item()


def show_processes(console: Console, measured: list[tuple[int, tuple[float, float]]]) -> None:
    """A line for each number of processes, and what is to be seen in them."""
    table = Table("val_kl, in nats", "klmetric", "torchmetrics")
    for count, numbers in measured:
        table.add_row(f"with {in_words(count)}", *(f"{number:.9g}" for number in numbers))
    console.print(table)
    ours, theirs = zip(*(numbers for _, numbers in measured), strict=True)
    low, high = min(ours), max(ours)
    if high - low > 1e-6 * high:
        raise RuntimeError(f"The value must not depend on the number of processes. Got {ours}.")
    # The metric adds nothing, but a layer may round the same image differently in a batch of another size.
    console.print(f"klmetric: the same number{', to the last digit' if high == low else ''}.")
    console.print(
        f"torchmetrics: {theirs[1] / theirs[0] - 1:+.1%} with more processes. For two reasons: the processes that"
        " Lightning spawns share its count of rows in memory, and the digits that are repeated, to give each process"
        " equally many, are counted again.\n"
    )


def show_rounded(console: Console, teacher: nn.Module, images: Tensor) -> None:
    """A line for each dtype that the weights are rounded to, and what is to be seen in them."""
    table = Table("weights in", "KL in float64", "klmetric", "off by", "torchmetrics", "off by")
    for dtype in (torch.bfloat16, torch.float16):
        exact, *numbers = measure_rounded(teacher, images, dtype)
        cells = [cell for x in numbers for cell in (f"{x:.6g}", f"{100 * abs(x / exact - 1):.1g} %")]
        table.add_row(str(dtype).removeprefix("torch."), f"{exact:.6g}", *cells)
    console.print(table)
    console.print(
        "The nearer the models, the fewer digits are left where torchmetrics subtracts logarithms that are almost"
        " equal. klmetric adds up small terms of one sign instead, and keeps the digits.\n"
    )


def measure_rounded(teacher: nn.Module, images: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """KL of the teacher from itself with rounded weights: in float64, by klmetric and by torchmetrics."""
    rounded = copy.deepcopy(teacher).to(dtype).float()
    with torch.no_grad():
        p, q = teacher(images), rounded(images)
    log_p, log_q = (x.double().log_softmax(-1) for x in (p, q))
    exact = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    ours, theirs = KLDivergence(input_format="logits"), torchmetrics.KLDivergence(log_prob=True)
    return exact.item(), ours(p, q).item(), theirs(p.log_softmax(-1), q.log_softmax(-1)).item()


def draw(callback: KLDivergenceCallback, path: Path) -> None:
    """The curve of val_kl."""
    figure, axis = callback.plot()
    axis.set_ylabel("KL divergence (nats)")
    axis.set_title("Student against teacher, on digits that neither has learnt")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def epoch_table(history: list[dict[str, Any]], best: dict[str, Any]) -> Table:
    """One line for each epoch."""
    table = Table("epoch", "val_kl (nats)", "student against teacher")
    scale = 32 / max(record["val_kl"] for record in history)
    for record in history:
        style = "bold green" if record is best else ""
        bar = "█" * max(1, round(record["val_kl"] * scale))
        table.add_row(str(record["epoch"]), f"{record['val_kl']:.6f}", bar, style=style)
    return table


def in_words(count: int) -> str:
    """A number of processes."""
    return "1 process" if count == 1 else f"{count} processes"
