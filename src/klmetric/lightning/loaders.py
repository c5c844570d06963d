"""The dataloaders that the batches of a stage come from, and the names of their values."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from klmetric.distributed import deal_of
from klmetric.lightning.framework import Stage, Trainer


def loop_of(stage: Stage, trainer: Trainer) -> Any:
    """The loop that runs a stage."""
    if stage == "train":
        return trainer.fit_loop
    if stage == "test":
        return trainer.test_loop
    return trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop


def loaders_of(stage: Stage, trainer: Trainer) -> dict[str, Any]:
    """The dataloaders that batches of this stage come from, by what is appended to the names of their values."""
    # Not `trainer.val_dataloaders`: after a fit, that is the loader of the fit even in `trainer.validate`.
    combined = loop_of(stage, trainer)._combined_loader
    loaders = list(combined.flattened)
    if stage != "train" and combined._mode == "sequential":
        suffixes = [
            "/" + "/".join(map(str, path)) if is_named else f"/dataloader_idx_{index}" if len(loaders) > 1 else ""
            for index, (path, is_named) in enumerate(_paths(combined.iterables, loaders))
        ]
        if twice := [suffix for suffix in suffixes if suffixes.count(suffix) > 1]:
            raise ValueError(
                "The keys of the dataloaders name their values, and must differ. Got more than one"
                f" {twice[0][1:]!r}. Rename one of the keys."
            )
        return dict(zip(suffixes, loaders, strict=True))
    if len(loaders) == 1:
        return {"": loaders[0]}
    # Every batch is a combination of all loaders' batches, and no one loader's.
    if any(deal_of(loader) for loader in loaders):
        warnings.warn(
            "A batch combines several dataloaders, so the samples that DistributedSampler repeats cannot be left out:"
            " they count, and the value depends on the number of processes.",
            stacklevel=2,
        )
    return {"": None}


def _paths(tree: Any, leaves: list[Any], path: tuple[Any, ...] = (), is_named: bool = False) -> Iterator[Any]:
    """The keys and indices that lead to each leaf, and whether there is a key among them."""
    if any(tree is leaf for leaf in leaves):
        yield path, is_named
        return
    is_mapping = isinstance(tree, Mapping)
    for key, child in tree.items() if is_mapping else enumerate(tree):
        yield from _paths(child, leaves, (*path, key), is_named or is_mapping)
