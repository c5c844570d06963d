"""A Lightning run of which the numbers are known, for the tests; as a script, one of `strategy devices out`."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from cases import GRID, pair
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from klmetric import KLDivergence, KLDivergenceSummary
from klmetric.lightning import KLDivergenceCallback

SIZES = (7, 5)


class Fixed(LightningModule):
    """Steps on a weight that nothing depends on, and predicts what its data say: p and q stand in the batch."""

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
        # The weight stays 1, so that q keeps its digits, also where spawned processes share its memory.
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SkipsFirst(Fixed):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx) if batch_idx else None


def loader(size: int, batch_size: int = 2, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(*pair(size, 5, seed=size)), batch_size=batch_size, shuffle=shuffle)


class Resumable(DataLoader):
    """Goes on where a checkpoint was made, as the loaders of torchdata do."""

    start = given = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for self.given, batch in enumerate(list(super().__iter__())[start:], start + 1):
            yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.start = state["given"] % len(self)


class WithResumableLoader(Fixed):
    def train_dataloader(self):
        data = TensorDataset(*pair(SIZES[0], 5, seed=SIZES[0]))
        world = self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False) if world > 1 else None
        return Resumable(data, batch_size=2, sampler=sampler)


def resumable_fit(root, metric=None, ckpt_path=None, **options) -> list:
    """The history of two epochs, with a checkpoint after every step; from the beginning or from one of them."""
    callback = KLDivergenceCallback(metric, stages=("train", "validate"))
    every = ModelCheckpoint(root, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options |= {"callbacks": [callback, every], "enable_checkpointing": True, "use_distributed_sampler": False}
    run = trainer(root, **options)
    run.fit(WithResumableLoader(), val_dataloaders=loader(3), ckpt_path=ckpt_path)
    return callback.history


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


def record_of(root: Path, strategy: Any, devices: int, only_fit: bool = False) -> dict:
    """What is logged when it is fitted, validated and tested; `only_fit`, when it is only fitted."""
    callback = KLDivergenceCallback(KLDivergence(), stages=("train", "validate", "test"))
    summary = KLDivergenceCallback(KLDivergenceSummary(), name="{stage}_summary")
    callbacks = [callback, summary]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        run = trainer(root, strategy=strategy, devices=devices, callbacks=callbacks, max_epochs=1)
        logged = {}
        grid = [loader(count, batch_size) for count, batch_size in GRID]
        run.fit(Fixed(), loader(SIZES[0], shuffle=True), grid)
        logged |= run.callback_metrics
        if not only_fit:
            validate_and_test(run, logged)
    return {"logged": {key: value.item() for key, value in logged.items()}, "history": callback.history}


def validate_and_test(run: Trainer, logged: dict) -> None:
    run.validate(Fixed(), loader(SIZES[0], batch_size=3), verbose=False)
    logged |= run.callback_metrics
    run.test(Fixed(), loader(SIZES[0], batch_size=16), verbose=False)
    logged |= run.callback_metrics
    run.validate(SkipsFirst(), {"skips": loader(SIZES[0])}, verbose=False)
    logged |= run.callback_metrics


def main(strategy: str, devices: str, out: str) -> None:
    # Every call of ddp_spawn starts its processes anew.
    record = record_of(Path(out).parent, strategy, int(devices), only_fit=strategy == "ddp_spawn")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(out).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
