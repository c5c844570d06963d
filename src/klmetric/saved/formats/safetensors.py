"""Files of safetensors: tensors by their names."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from klmetric.saved.array import Arrays, Choice, of_tensor
from klmetric.saved.kept import Kept


def open_safetensors(path: Path, choice: Choice) -> Arrays:
    """The tensors, which stay in the file until their rows are read."""
    from safetensors import safe_open

    file: Kept[Any] = Kept(lambda: safe_open(path, "pt"))

    def tensor(name: str, size: int) -> Tensor:
        found: Tensor = file.get(size).get_tensor(name)
        return found

    return [(name, partial(of_tensor, name, partial(tensor, name))) for name in list(file.get().keys())]
