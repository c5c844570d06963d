"""How a value that is known already is handed to Lightning, which would rather reduce and name it by itself."""

from typing import Any

from torch import Tensor
from torchmetrics import Metric

from klmetric.lightning.framework import Trainer


class Reduced(Metric):
    """A value that all processes have already: logged as a plain tensor, Lightning would ask to reduce it again."""

    def __init__(self, value: Tensor) -> None:
        super().__init__(sync_on_compute=False)
        self.value = value.detach()
        self.update()

    def update(self) -> None:
        """Nothing to add."""

    def compute(self) -> Tensor:
        """The value."""
        return self.value


def names_in_use(trainer: Trainer) -> set[str]:
    """The names of what has been logged in this epoch."""
    # Not from `trainer.callback_metrics`: to read them computes them, for good, and the module may go on counting.
    results: Any = trainer._results
    return {name for one in results.values() if not one.has_reset for name in results._forked_name(one, on_step=False)}


def show_in_columns(loop: Any, have_batches: list[bool], values: list[dict[str, Tensor]]) -> None:
    """Have the table that Lightning prints show each dataloader's own values in its column.

    It leaves `/dataloader_idx_N` out of the names there, and of several values of one name shows the last.
    """
    # A column each for the first dataloader and all others that have a batch.
    seen = [own for k, (has_batch, own) in enumerate(zip(have_batches, values, strict=True)) if has_batch or k == 0]
    for own, column in zip(seen, loop._logged_outputs, strict=False):
        column |= {key: value for one in values for key, value in one.items() if one is not own} | own
