"""Which files a path stands for: one, or the shards of a folder or of an index, in their order."""

import re
from collections.abc import Callable, Collection
from json import JSONDecodeError, loads
from pathlib import Path

from klmetric.saved.errors import InputError
from klmetric.saved.names import RECORDING, listed, natural


def files_of(path: Path, kind_of: Callable[[Path], str], kinds: Collection[str]) -> list[Path]:
    """The files, in order.

    Args:
        path: of a file, a folder or an index.
        kind_of: gives the kind of a file, as `klmetric.saved.open.kind_of`.
        kinds: that can be read.

    Raises:
        InputError: if it is not clear which they are, or one is missing.
    """
    if (recording := path / RECORDING).is_file():
        return [recording]
    if index := _index_of(path):
        return _shards_of_index(index)
    return _shards_of_folder(path, kind_of, kinds) if path.is_dir() else [path]


def _index_of(path: Path) -> Path | None:
    """The index of the shards, if there is one."""
    if not path.is_dir():
        return path if path.name.endswith(".index.json") else None
    state = path / "state.json"
    if state.exists() and (path / "dataset_info.json").exists():  # as a Dataset's save_to_disk writes them
        return state
    if (path / "dataset_dict.json").exists():
        splits = listed(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise InputError(
            f"A folder must hold one dataset. Got {path} with the splits {splits}. Name the folder of one."
        )
    indices = sorted(path.glob("*.index.json"))
    if len(indices) > 1:
        raise InputError(f"A folder must have one index. Got {', '.join(i.name for i in indices)} in {path}. Name one.")
    return indices[0] if indices else None


def _shards_of_folder(folder: Path, kind_of: Callable[[Path], str], kinds: Collection[str]) -> list[Path]:
    files = [file for file in folder.iterdir() if kind_of(file) in kinds and not file.name.startswith(".")]
    found = {kind_of(file) for file in files}
    if not files or len(found) > 1:
        what = "none" if not files else f"some of each of {sorted(found)}"
        raise InputError(
            f"A folder must hold shards of one kind ({', '.join(kinds)}). Got {what} in {folder}. Name a file?"
        )
    files.sort(key=lambda file: natural(file.name))
    for file in files:  # part-00002-of-00005
        if numbers := re.search(r"(\d+)-of-(\d+)\D*$", file.stem):
            expected, width = int(numbers[2]), len(numbers[1])
            there = {int(m[1]) for f in files if (m := re.search(r"(\d+)-of-(\d+)\D*$", f.stem))}
            first = 0 if 0 in there else 1
            if missing := [i for i in range(first, first + expected) if i not in there]:
                raise InputError(
                    f"Every shard must be there: {folder} has {len(there)} of {expected}. Missing is"
                    f" number {str(missing[0]).zfill(width)}. Was it not copied?"
                )
            break
    return files


def _shards_of_index(index: Path) -> list[Path]:
    is_dataset = index.name == "state.json"
    try:
        content = loads(index.read_text())
        if is_dataset:
            names = [file["filename"] for file in content["_data_files"]]
        else:
            names = sorted(set(content["weight_map"].values()), key=natural)
    except (JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        what = "_data_files, a list of files" if is_dataset else "a weight_map of names to files"
        raise InputError(f"An index must have {what}. Got {index}: {error!r}.") from error
    if is_dataset and (content.get("_indices_data_files") or content.get("_indices_files")):
        raise InputError(
            f"A dataset must hold its rows in their order. Got {index} with indices of rows. Save it once more, after"
            " flatten_indices()."
        )
    if not names:
        raise InputError(f"An index must name files. Got {index} with none.")
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(f"Every shard must be there. Got {index} that names {missing[0]}, and no such file.")
    return files
