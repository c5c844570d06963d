"""A Lightning run of which the numbers are known, for the tests; as a script, one of `strategy devices out`."""

import json
import sys
import warnings
from pathlib import Path

import torch
from cases import pair
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from klmetric import KLDivergence
from klmetric.lightning import KLDivergenceCallback

SIZES = (7, 5)


class Fixed(LightningModule):
    """Trains a weight that nothing depends on, and predicts what its data say: p and q stand in the batch."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        p, q = batch
        return {"loss": self.scale**2, "p": p, "q": q * self.scale}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"p": batch[0], "q": batch[1]}

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(size: int, batch_size: int = 2, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(*pair(size, 5, seed=size)), batch_size=batch_size, shuffle=shuffle)


def trainer(root, **options) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(root),
    }
    return Trainer(**defaults | options)


def main(strategy: str, devices: str, out: str) -> None:
    warnings.filterwarnings("ignore", module="lightning")
    callback = KLDivergenceCallback(KLDivergence(), stages=("train", "validate", "test"))
    run = trainer(
        Path(out).parent, strategy=strategy if int(devices) > 1 else "auto", devices=int(devices), callbacks=[callback]
    )
    logged = {}
    run.fit(Fixed(), loader(SIZES[0], shuffle=True), [loader(size) for size in SIZES])
    logged |= run.callback_metrics
    if strategy == "ddp":  # every call of ddp_spawn starts its processes anew
        validate_and_test(run, logged)
    if run.is_global_zero:
        record = {"logged": {key: value.item() for key, value in logged.items()}, "history": callback.history}
        Path(out).write_text(json.dumps(record))


def validate_and_test(run: Trainer, logged: dict) -> None:
    run.validate(Fixed(), loader(SIZES[0], batch_size=3), verbose=False)
    logged |= run.callback_metrics
    run.test(Fixed(), loader(SIZES[0], batch_size=16), verbose=False)
    logged |= run.callback_metrics


if __name__ == "__main__":
    main(*sys.argv[1:])
