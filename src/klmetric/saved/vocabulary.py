"""The text of each class: tokens by their numbers, out of the files that tokenizers are saved in.

| file | what |
|---|---|
| `tokenizer.json` | of Hugging Face: BPE, WordPiece, WordLevel or Unigram, and the tokens that were added |
| `vocab.json` | `{"token": number}` |
| any `.json` | one of these two, or a list of tokens |
| any other text | a token in each line, from 0 on, as BERT's `vocab.txt` |
| a folder | the first of `tokenizer.json`, `vocab.json` and `vocab.txt` that is in it |
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from klmetric.saved.errors import InputError, check_is_there

IN_FOLDERS = ("tokenizer.json", "vocab.json", "vocab.txt")
# What sentencepiece has for a space, and for a byte that is no character.
SPACE, BYTE = "▁", re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if it can be seen, or the next one from 256 on.

    (openai/gpt-2, encoder.py.)
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + k): byte for k, byte in enumerate(others)}


class Vocabulary:
    """The bytes of each token: one may be a part of a character, which only its neighbours make whole."""

    def __init__(self, pieces: dict[int, str], added: dict[int, str]) -> None:
        """Of the pieces of a model, as it writes them, and of tokens that stand for themselves."""
        bytes_of: Any = _of_text
        if any(piece.startswith(SPACE) for piece in pieces.values()):
            bytes_of = _of_sentencepiece
        elif "Ġ" in pieces.values():  # the space alone is one of the 256 bytes, all of which are there
            alphabet = _byte_alphabet()
            bytes_of = lambda piece: _of_bytes(piece, alphabet)  # noqa: E731
        self._bytes = {k: bytes_of(piece) for k, piece in pieces.items()}
        self._bytes |= {k: _of_text(text) for k, text in added.items()}

    def text(self, classes: Iterable[int]) -> str | None:
        """The text of tokens that follow one another; None where one of them is not known."""
        parts = [self._bytes.get(k) for k in classes]
        known = [part for part in parts if part is not None]
        return b"".join(known).decode("utf-8", "backslashreplace") if len(known) == len(parts) else None


def _of_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _of_sentencepiece(piece: str) -> bytes:
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _of_text(piece.replace(SPACE, " "))


def _of_bytes(piece: str, alphabet: dict[str, int]) -> bytes:
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return _of_text(piece)


def open_vocabulary(path: Path) -> Vocabulary:
    """The tokens in a file, or in a folder that has one.

    Raises:
        InputError: if there are none.
    """
    check_is_there(path, "--vocab")
    file = path
    if path.is_dir():
        there = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not there:
            raise InputError(f"--vocab must name a file, or a folder with {', '.join(IN_FOLDERS)}. Got {path}.")
        file = there[0]
    try:
        text = file.read_bytes().decode()
        if file.suffix.lower() != ".json":
            # Not `splitlines`: a token may be one of the other characters that end lines.
            lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
            return Vocabulary(dict(enumerate(lines)), {})
        return Vocabulary(*_of_json(json.loads(text)))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            "--vocab must be a tokenizer.json or a vocab.json of Hugging Face, or text in UTF-8 with a token in each"
            f" line. Got {file}: {reason}"
        ) from error


def _of_json(content: Any) -> tuple[dict[int, str], dict[int, str]]:
    """The pieces, and the tokens that were added."""
    added: dict[int, str] = {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or []}
        content = content["model"]["vocab"]
    if isinstance(content, dict):
        pieces = {number: piece for piece, number in content.items()}
    elif isinstance(content, list):  # of tokens, or each with its score
        pieces = {k: piece[0] if isinstance(piece, list) else piece for k, piece in enumerate(content)}
    else:
        raise ValueError(f"it holds a {type(content).__name__}")
    for number, piece in pieces.items():
        if type(number) is not int or not isinstance(piece, str):
            raise ValueError(f"it has {piece!r}: {number!r}, which is no token with its number")
    return pieces, added
