"""The folder that `klmetric record` writes: what a causal language model predicts after each token of a text.

| file | what |
|---|---|
| `klmetric-record.json` | what was recorded, and how |
| `tokens.safetensors` | `tokens`, int32 of (windows, window) |
| `hidden-00001-of-00009.safetensors` ... | `hidden`, the last hidden states, of (windows, positions, width) |
| `head.safetensors` | `weight` of (classes, width) and `bias` of (classes,), in float32, that make logits of them |
| `logits-00001-of-00009.safetensors` ... | or, in place of these two, `logits` of (windows, positions, classes) |

The positions of a window are those whose next token stands in it: all but the last.
"""

from collections.abc import Mapping
from dataclasses import replace
from json import loads
from pathlib import Path
from typing import Any

import torch

from klmetric.arithmetic.projection import Projection, rows_at_once
from klmetric.saved.array import Choice, Saved
from klmetric.saved.errors import InputError
from klmetric.saved.formats.safetensors import open_safetensors
from klmetric.saved.joined import joined

SCHEMA = 1
TOKENS, HEAD = "tokens.safetensors", "head.safetensors"


def shards_of(about: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The names of the files with rows, and the windows that are in each of them: the first, and the end."""
    step, windows = about["windows_in_a_shard"], about["windows"]
    count = -(-windows // step)
    return {
        f"{about['rows']}-{k + 1:05}-of-{count:05}.safetensors": (k * step, min(windows, (k + 1) * step))
        for k in range(count)
    }


def open_recording(path: Path, choice: Choice) -> Saved:
    """The logits, which stay in the files, or uncomputed, until their rows are read.

    Raises:
        InputError: if some of it is not there yet.
    """
    from safetensors.torch import load_file

    about, folder = loads(path.read_text(encoding="utf-8")), path.parent
    if about["schema"] != SCHEMA:
        raise InputError(
            f"A recording must be of schema {SCHEMA}. Got {about['schema']} in {path}. Was it made by another klmetric?"
        )
    has_head = about["rows"] == "hidden"
    shards = [folder / name for name in shards_of(about)]
    missing = [file for file in (folder / TOKENS, *[folder / HEAD] * has_head, *shards) if not file.exists()]
    if missing:
        raise InputError(
            f"A recording must be whole. Got {folder} without {missing[0].name}. Was `klmetric record` interrupted? The"
            " same command goes on from there."
        )
    saved = joined([opened() for file in shards for _, opened in open_safetensors(file, choice)], None)
    tokens = load_file(folder / TOKENS)["tokens"].numpy()
    saved = replace(saved, tokens=tokens.flatten(), targets=tokens[:, 1:].flatten(), input_format="logits")
    if not has_head:
        return saved
    head = Projection(**load_file(folder / HEAD), scale=about["scale"], softcap=about["softcap"])
    classes, width = head.weight.shape
    return replace(
        saved,
        shape=(*saved.shape[:-1], classes),
        dtype=torch.float32,
        read=lambda start, stop: head(saved.read(start, stop)),
        at_once=rows_at_once(classes, width),
    )
