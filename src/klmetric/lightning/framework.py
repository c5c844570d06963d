"""Lightning, by either of its names, and what it calls the stages of a run."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

__all__ = ["PREFIXES", "STEPS", "Callback", "LightningModule", "Source", "Stage", "Trainer"]

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    try:
        from pytorch_lightning import (  # type: ignore[assignment]
            Callback,
            LightningModule,
            Trainer,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "klmetric.lightning needs Lightning. Install it with: pip install 'klmetric[lightning]'"
        ) from error

Stage: TypeAlias = Literal["train", "validate", "test"]
Source: TypeAlias = str | Callable[[Any, Any], Any]

# The name of each stage in what is logged, as Lightning itself has it.
PREFIXES: dict[Stage, str] = {"train": "train", "validate": "val", "test": "test"}
STEPS: dict[Stage, str] = {"train": "training_step", "validate": "validation_step", "test": "test_step"}
