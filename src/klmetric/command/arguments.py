"""What `klmetric compare` was given, checked as far as can be without torch, whose import takes seconds."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from klmetric.command.limits import parsed
from klmetric.command.sizes import Sizes, parsed_sizes
from klmetric.command.whole import is_replaced, try_place
from klmetric.options import FORMATS, Options, check_base, check_choice, check_options
from klmetric.saved.errors import InputError, check_is_there

PICTURES = (".png", ".svg", ".pdf")
ROW_FILES = (".npy", ".parquet")
PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Arguments:
    """What the command was given; see `klmetric compare --help`."""

    paths: list[Path]  # of the reference and the models
    input_format: str | None
    key: list[str] | None
    columns: list[str] | None
    indices: list[str] | None
    sampled: bool
    header: bool | None
    id_column: str | None
    documents: bool | None
    classes: int | None
    direction: str
    temperature: float
    eps: float
    base: float | None
    mask: Path | None
    weight: Path | None
    targets: Path | None
    groups: Path | None
    more: bool
    floor: Path | None
    worst: int
    vocab: Path | None
    rows: Path | None
    fail_above: list[str] | None
    fail_below: list[str] | None
    json_file: Path | None
    csv_file: Path | None
    plot_file: Path | None
    html_file: Path | None
    size: list[str] | None
    markdown: bool
    limit: int | None
    batch_rows: int | None
    nan_strategy: str
    no_check: bool
    debug: bool


def check(arguments: Arguments) -> None:
    """Raise an InputError for what is wrong whatever the files hold, and where a report cannot be written."""
    limits_of(arguments)
    sizes_of(arguments)
    options_of(arguments)
    for twice, given in (("--key", arguments.key), ("--columns", arguments.columns)):
        if given is not None and len(given) > 2:
            raise InputError(f"{twice} must be given once, or twice: for the reference, and the models. Got {given}.")
    _check_top_k(arguments)
    if arguments.vocab is not None and not arguments.worst:
        raise InputError("--vocab is the text of the classes of the worst rows. Got it without --worst. Add --worst 5.")
    names = ("mask", "weight", "targets", "groups", "floor", "vocab")
    beside = {f"--{name}": getattr(arguments, name) for name in names}
    if arguments.eps and (arguments.more or arguments.targets):
        raise InputError(
            f"--eps must be 0 with {'--more' if arguments.more else '--targets'}, which are of q as it is. Got"
            f" {arguments.eps:g}. Leave one of them out."
        )
    of_indices = [path for path in map(Path, arguments.indices or []) if path.is_file()]
    named = [*((None, path) for path in arguments.paths), *beside.items()]
    read = [*of_indices, *(path for _, path in named if path is not None)]
    for option, path in named:
        if path is not None:
            check_is_there(path, option)
    reports = (arguments.json_file, arguments.csv_file, arguments.plot_file, arguments.html_file)
    files = (*reports, arguments.rows)
    written = [path for path in files if path is not None]
    printed = [path for path in written if str(path) == "-"]
    if len(printed) + arguments.markdown > 1:
        raise InputError("One report can be printed: --json -, --csv - or --markdown. Got more than one of them.")
    written = [path for path in written if str(path) != "-"]
    if arguments.plot_file is not None and arguments.plot_file.suffix not in PICTURES:
        raise InputError(f"--plot must name a picture, {', '.join(PICTURES)}. Got {arguments.plot_file}.")
    if arguments.rows is not None and arguments.rows.suffix not in ROW_FILES:
        raise InputError(f"--rows must name a file, {' or '.join(ROW_FILES)}. Got {arguments.rows}.")
    if arguments.html_file is not None and arguments.html_file.suffix not in PAGES:
        raise InputError(f"--html must name a page, {', '.join(PAGES)}. Got {arguments.html_file}.")
    for path in written:
        if not path.resolve().parent.is_dir():
            raise InputError(f"The folder of a file to write must be there. Got {path}. Make {path.parent} first.")
        if path.is_dir():
            raise InputError(f"A report must go into a file. Got {path}, which is a folder.")
        if any(path.is_file() and path.samefile(other) for other in read):
            raise InputError(f"A report must not take the place of what it is about. Got {path} for both.")
    for path, other in combinations(written, 2):
        if path.resolve() == other.resolve() and (path.is_file() or not path.exists()):
            raise InputError(f"Each report must go into a file of its own. Got {path} for two.")
    if arguments.rows is not None and not is_replaced(arguments.rows):
        raise InputError(
            f"--rows must name a file, which is replaced, or a new one. Got {arguments.rows}, which is a pipe or a"
            " device. Name a file, and copy it there."
        )
    for path in written:
        try_place(path)


def _check_top_k(arguments: Arguments) -> None:
    """Refuse what needs all classes of a row."""
    if arguments.sampled and not arguments.indices:
        raise InputError("--sampled is of the top k. Got it without --indices. Name what says which classes they are.")
    if not arguments.indices:
        return
    for option, value, usual, reason in (
        ("--temperature", arguments.temperature, 1, "what normalises at another one is a sum over all classes"),
        ("--eps", arguments.eps, 0, "a floor is under single classes, and those that are not known count as one"),
    ):
        if value != usual:
            hint = " Save the log-probabilities at that temperature." if option == "--temperature" else ""
            raise InputError(f"{option} must be {usual} with --indices: {reason}. Got {value:g}.{hint}")
    if arguments.more:
        raise InputError(
            "--more needs all classes: other divergences and orders are not known of the top k. Got it with --indices."
            " Leave one of them out."
        )


def limits_of(arguments: Arguments) -> tuple[dict[str, float], dict[str, float]]:
    """The limits of the values above which, and below which, the command fails."""
    return parsed(arguments.fail_above, min), parsed(arguments.fail_below, max)


def sizes_of(arguments: Arguments) -> Sizes | None:
    """The sizes of the models; None without any."""
    return parsed_sizes(arguments.size, names_of(arguments)[: len(arguments.paths) - 1])


def names_of(arguments: Arguments) -> list[str]:
    """Names that tell the models apart, as short as can be; the floor is the last."""
    paths = [*arguments.paths[1:], *([arguments.floor] if arguments.floor else [])]
    for name in (lambda path: path.stem, lambda path: path.name, str):
        names = [name(path) or str(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({k})" for k, path in enumerate(paths, 1)]


def formats_of(arguments: Arguments) -> tuple[Any, ...]:
    """Of the reference and of each model. Without any, files must know their own, which are log-probabilities."""
    given = [part.strip() for part in (arguments.input_format or "").split(",") if part.strip()] or ["log_probs"]
    files = len(arguments.paths)
    if len(given) not in (1, 2, files):
        raise InputError(
            "`--input-format` must be one format, or a pair for the reference and the models, or one for each file. Got"
            f" {len(given)} for {files} files: {','.join(given)}."
        )
    try:
        for one in given:
            check_choice("--input-format", one, FORMATS)
    except ValueError as error:
        raise InputError(str(error)) from error
    return tuple(given) if len(given) == files else (given[0], *[given[-1]] * (files - 1))


def options_of(arguments: Arguments) -> Options:
    """What is measured of a row; the formats are those of the reference and of the first model."""
    try:
        check_choice("--nan-strategy", arguments.nan_strategy, ("error", "ignore"))
        check_base(arguments.base)
        rest: Any = (arguments.direction, arguments.temperature, arguments.eps, arguments.nan_strategy)
        return check_options(False, formats_of(arguments)[:2], -1, *rest)
    except ValueError as error:
        raise InputError(str(error)) from error
