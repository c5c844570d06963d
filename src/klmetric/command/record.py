"""`klmetric record`: what a causal language model predicts after each token of a text, into a folder.

The folder is made file by file, each of them whole or not at all, from the same batches whatever was there before. So
an interrupted recording is gone on with, and ends at the same bits.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from json import dumps, loads
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from klmetric.arithmetic.projection import Projection
from klmetric.command.ending import DONE, INTERRUPTED, interruptible
from klmetric.command.language_model import (
    fingerprint,
    fingerprint_of_tokenizer,
    head_of,
    hidden_states,
    loaded,
    loaded_model,
    logits,
    quantize_int8,
    windows_of,
)
from klmetric.command.progress import progress
from klmetric.saved.errors import InputError
from klmetric.saved.formats.recording import HEAD, SCHEMA, TOKENS, shards_of
from klmetric.saved.names import RECORDING

# Tokens in a window where nothing else is asked for: as many as llama.cpp takes.
WINDOW = 512
# Bytes in a file of rows, at most but for one batch, and files, at least but for small texts: one is lost with an
# interruption.
SHARD, SHARDS = 2**26, 32
# What may differ where a recording is gone on with: how its model is called.
NAMES = ("model", "revision")


@dataclass(frozen=True)
class Request:
    """What the command was given; see `klmetric record --help`."""

    model: str
    text: Path
    out: Path
    window: int | None
    windows: int | None
    dtype: str | None
    quantize: str | None
    logits: bool
    device: str | None
    batch: int
    revision: str | None


def run_record(request: Request) -> int:
    """Do what the command says, and return its exit status.

    Raises:
        InputError: for what cannot be recorded, or written.
    """
    device, dtype = _device_of(request), _dtype_of(request)
    known = _known(request.out)
    tokenizer, config = loaded(request.model, request.revision)
    tokens, left_out, of_text = _text(request, tokenizer, config)
    about = {
        "schema": SCHEMA,
        "model": request.model,
        "revision": getattr(config, "_commit_hash", None) or request.revision,
        "quantize": request.quantize,
        "device": str(device),
        "batch": request.batch,
        **of_text,
        "versions": {name: version(name) for name in ("klmetric", "torch", "transformers", "tokenizers")},
    }
    _check_is_the_same(about, known, request.out)  # before the model is loaded, which may take long
    with torch.inference_mode():
        model = loaded_model(request.model, request.revision, dtype, device)
        weights = fingerprint(model)
        if request.quantize is not None:
            model = quantize_int8(model)
        head = None if request.logits else head_of(model, tokens)
        about |= {**_rows(model, head, tokens, request.batch), "weights": weights}
        _check_is_the_same(about, known, request.out)
        _begin(request.out, about, tokens, head)
        there = _windows_there(request.out, about)
        status = _go_on(request.out, model, about, tokens)
    if status == DONE:
        _show(request, about, there, left_out)
    return status


def _text(request: Request, tokenizer: Any, config: Any) -> tuple[Tensor, int, dict[str, Any]]:
    """The windows, how many tokens at the end fill none, and what is to be said of the text."""
    try:
        text = request.text.read_bytes()
        window = _window_of(request, config)
        tokens, left_out = windows_of(tokenizer, text.decode(), window)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text must be a file of text in UTF-8. Got {request.text}: {error}") from error
    if not len(tokens):
        raise InputError(
            f"--text must fill a window of {window:,} tokens. Got {left_out:,} in {request.text}. Name a longer text,"
            " or a smaller --window."
        )
    if request.windows is not None and request.windows < len(tokens):
        tokens, left_out = tokens[: request.windows], 0
    about = {
        "window": window,
        "windows": len(tokens),
        "vocabulary": len(tokenizer),
        "text": sha256(text).hexdigest(),
        "tokenizer": fingerprint_of_tokenizer(tokenizer),
        "tokens": sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    return tokens, left_out, about


def _rows(model: Any, head: Projection | None, tokens: Tensor, batch: int) -> dict[str, Any]:
    """What is to be said of the rows."""
    one = (logits if head is None else hidden_states)(model, tokens[:1, :1])
    of_a_window = (tokens.shape[1] - 1) * one.nbytes
    most = min(SHARD // of_a_window, -(-len(tokens) // SHARDS))
    return {
        "rows": "logits" if head is None else "hidden",
        "dtype": str(one.dtype).removeprefix("torch."),
        "classes": one.shape[-1] if head is None else len(head.weight),
        "scale": None if head is None else head.scale,
        "softcap": None if head is None else head.softcap,
        "bytes": len(tokens) * of_a_window,
        "windows_in_a_shard": max(1, -(-most // batch)) * batch,  # so that batches are the same wherever one goes on
    }


def _begin(out: Path, about: dict[str, Any], tokens: Tensor, head: Projection | None) -> None:
    """Make the files that are not of rows, if they are not there."""
    _check_there_is_room(out, about["bytes"])
    files = {TOKENS: {"tokens": tokens}}
    if head is not None:
        files[HEAD] = {"weight": head.weight.contiguous()}
        if head.bias is not None:
            files[HEAD]["bias"] = head.bias
    _place(out / RECORDING, lambda place: place.write_text(dumps(about, indent=2) + "\n", encoding="utf-8"))
    for name, tensors in files.items():
        if not (out / name).exists():
            _place(out / name, partial(save_file, tensors))


def _windows_there(out: Path, about: dict[str, Any]) -> int:
    return sum(end - start for name, (start, end) in shards_of(about).items() if (out / name).exists())


def _go_on(out: Path, model: Any, about: dict[str, Any], tokens: Tensor) -> int:
    """Make the files of rows that are not there, and return the exit status."""
    states = logits if about["rows"] == "logits" else hidden_states
    batch, positions = about["batch"], tokens.shape[1] - 1
    left = (len(tokens) - _windows_there(out, about)) * positions
    with interruptible() as is_interrupted, progress(left, 0, 1, "Recording") as advance:
        for name, (start, end) in shards_of(about).items():
            if (out / name).exists():
                continue
            parts = []
            for some in torch.split(tokens[start:end], batch):
                if is_interrupted():
                    print(
                        f"Interrupted: {_windows_there(out, about):,} of {len(tokens):,} windows are in {out}. The same"
                        " command goes on from there.",
                        file=sys.stderr,
                    )
                    return INTERRUPTED
                parts.append(states(model, some)[:, :-1].cpu())
                advance(len(some) * positions)
            _place(out / name, partial(save_file, {about["rows"]: torch.cat(parts)}))
    return DONE


def _show(request: Request, about: dict[str, Any], there: int, left_out: int) -> None:
    """Say what is in the folder, of which so many windows were there before."""
    windows, window = about["windows"], about["window"]
    if there:
        print("It was whole before." if there == windows else f"{there:,} windows were there before.")
    size = sum(file.stat().st_size for file in request.out.iterdir()) / 2**20
    what = (
        f"logits in {about['dtype']}"
        if about["rows"] == "logits"
        else f"hidden states in {about['dtype']}, and the head"
    )
    print(
        f"{request.out}: {windows:,} windows of {window:,} tokens, {windows * (window - 1):,} rows of"
        f" {about['classes']:,} classes ({what}; {size:,.0f} MiB)."
    )
    if left_out:
        print(f"The last {left_out:,} tokens of {request.text} fill no window, and are left out.")
    if about["rows"] == "logits" and not request.logits:
        print("This model's logits are not its hidden states times a linear head, so they are saved themselves.")


def _device_of(request: Request) -> torch.device:
    is_cpu = request.quantize is not None or not torch.cuda.is_available()
    try:
        device = torch.device(request.device or ("cpu" if is_cpu else "cuda"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device must be one that torch has here. Got {request.device}: {reason}") from error
    if request.quantize is not None and device.type != "cpu":
        raise InputError(f"--quantize computes on the CPU. Got --device {device}. Leave it out.")
    return torch.empty(1, device=device).device  # cuda:0 for cuda


def _dtype_of(request: Request) -> torch.dtype | None:
    if request.quantize is not None:
        if request.dtype not in (None, "float32"):
            raise InputError(f"--quantize computes in float32 beside int8. Got --dtype {request.dtype}. Leave it out.")
        return torch.float32
    return None if request.dtype is None else getattr(torch, request.dtype)


def _window_of(request: Request, config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None)
    if request.window is None:
        return min(WINDOW, most or WINDOW)
    if most is not None and request.window > most:
        raise InputError(
            f"--window must be no more than the model has positions. Got {request.window:,}, and {request.model} has"
            f" {most:,}."
        )
    return request.window


def _known(out: Path) -> dict[str, Any]:
    """What is said of the recording that is in the folder; nothing where there is none, or only what it began with.

    Raises:
        InputError: if something else is there.
    """
    if (out / RECORDING).is_file():
        try:
            known = loads((out / RECORDING).read_text(encoding="utf-8"))
            if isinstance(known, dict):
                return known
        except ValueError:
            pass
    elif not out.exists() or (out.is_dir() and all(file.name.startswith(".") for file in out.iterdir())):
        return {}
    raise InputError(f"--out must be a new folder, or one of `klmetric record`. Got {out}. Name another.")


def _check_is_the_same(about: dict[str, Any], known: dict[str, Any], out: Path) -> None:
    for key, value in about.items():
        if known and key not in NAMES and known.get(key) != value:
            raise InputError(
                f"A recording must be gone on with as it was begun. Got {key} {value}, and {out} has {known.get(key)}."
                " Name another --out, or remove that folder."
            )


def _check_there_is_room(out: Path, size: int) -> None:
    there = sum(file.stat().st_size for file in out.glob("*")) if out.exists() else 0
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = disk_usage(folder).free
    if size - there > free:
        raise InputError(
            f"--out must have room for {size / 2**30:,.1f} GiB. Got {out} with {free / 2**30:,.1f} GiB. Take fewer"
            " --windows, or another folder."
        )


def _place(place: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place, and put into it when it is whole."""
    new = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.touch()
            mode = new.stat().st_mode & 0o777
            write(new)
            new.chmod(mode)  # safetensors' own is for the owner alone
            with new.open("r+b") as file:
                os.fsync(file.fileno())
            os.replace(new, place)
        finally:
            new.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"A recording must go where it can be written. Got {place}: {reason}. The same command goes on from there."
        ) from error
