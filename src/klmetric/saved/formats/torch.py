"""What torch.save writes: a tensor, or a dict of them. Nothing else is loaded: it could run code."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from klmetric.saved.array import Arrays, Choice, of_tensor
from klmetric.saved.errors import InputError
from klmetric.saved.kept import Kept


def open_torch(path: Path, choice: Choice) -> Arrays:
    """The tensors, which stay in the file until their rows are read, unless the file is of the old kind."""
    file = Kept(partial(_load, path, is_mapped=True))
    try:
        content = file.get()
    except RuntimeError as error:
        if "mmap can only be used with files saved with" not in str(error):
            raise
        held = content = _load(path, is_mapped=False)
        file = Kept(lambda: held)
    if isinstance(content, Tensor):
        return [("", partial(of_tensor, "", lambda size: file.get(size).detach()))]
    if not isinstance(content, Mapping) or not any(isinstance(x, Tensor) for x in content.values()):
        raise InputError(
            f"A .pt file must hold a tensor, or a dict of tensors. Got a {type(content).__name__} in {path}. Save a"
            " dict that has the tensors by name."
        )

    def tensor(key: Any, size: int) -> Tensor:
        found: Tensor = file.get(size)[key]
        return found.detach()

    keys = [key for key, x in content.items() if isinstance(x, Tensor)]
    return [(str(key), partial(of_tensor, str(key), partial(tensor, key))) for key in keys]


def _load(path: Path, is_mapped: bool) -> Any:
    try:
        return torch.load(path, mmap=is_mapped, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        raise InputError(
            f"A .pt file must hold a tensor, or a dict of tensors. Got {path} with something else, which is not loaded:"
            " it could run code. Save the tensor alone."
        ) from error
