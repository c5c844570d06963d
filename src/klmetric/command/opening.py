"""From the arguments, which have been checked, to the task: files are opened, and asked whether they go together."""

from dataclasses import replace
from pathlib import Path

import torch

from klmetric.command.arguments import Arguments, formats_of, options_of
from klmetric.command.checks import check_array, check_lengths, check_order, check_pair, looks_like
from klmetric.command.comparison import Task
from klmetric.command.fields import OF_LLAMA
from klmetric.command.limits import OF_TAIL, asked_for, quantile_of
from klmetric.command.top_k import check_top_k
from klmetric.options import Options
from klmetric.rows.fields import OF_CLASSES, OF_TAILS, OF_TARGETS
from klmetric.saved.array import Choice, Saved
from klmetric.saved.beside import OfRows, labels_of, targets_of, weights_of
from klmetric.saved.errors import InputError
from klmetric.saved.names import listed, suffix_of
from klmetric.saved.open import FORMATS, open_saved
from klmetric.saved.order import in_the_order_of
from klmetric.saved.topk import beside, with_all_classes
from klmetric.summary import QUANTILES

# What perplexities are made of.
OF_TOKENS = "--targets, a recording or a file of llama.cpp, and no --eps"
# What else is of all classes, and what the upper bound is made of.
OF_ALL = "files that have all classes"
OF_BOUND = "--indices of the reference, a model that has all classes, and --direction forward"
# Of language models, also these quantiles: llama.cpp has them.
LOWER_QUANTILES = (0.001, 0.01, 0.05, 0.1, 0.25)
# Of models with sizes, where the band of the picture begins.
BAND_BEGINS = 0.1


def open_task(arguments: Arguments, limits: dict[str, float]) -> Task:
    """What to compare, and how.

    Args:
        arguments: of the command.
        limits: of values, which may be quantiles that are to be measured.
    """
    reference, *models = _opened(arguments)
    formats = formats_of(arguments)
    formats = (*formats, formats[0]) if arguments.floor else formats
    for saved in (reference, *models):
        check_array(saved)
    check_top_k([reference, *models], formats)
    for model in models:
        if arguments.key is not None and (same := set(reference.arrays) & set(model.arrays)):
            name = min(name for *_, name in same)
            raise InputError(
                f"--key must not name the same array on both sides. Got {name!r} of one file as {reference.name} and"
                f" {model.name}: its divergence from itself is 0. Save the array of the model in a file of its own."
            )
        check_pair(reference, model, arguments.classes)
        if not (arguments.id_column or arguments.no_check):
            check_order(reference, model)
    if reference.ids is not None:
        models = [in_the_order_of(reference.ids, model) for model in models]
    for model in models:
        check_lengths(reference, model)
    targets, why_no_targets = _targets(arguments, [reference, *models])
    has_perplexity = targets is not None and why_no_targets is None
    fields = _fields(arguments, [reference, *models], has_perplexity, asked_for(limits))
    asked = (quantile_of(key.removeprefix(OF_TAIL)) for key in limits)
    quantiles = {*QUANTILES, *(q for q in asked if q is not None)}
    quantiles |= {*LOWER_QUANTILES} if has_perplexity else set()
    quantiles |= {BAND_BEGINS} if arguments.size else set()
    groups = arguments.groups
    labels, label_names = (None, []) if groups is None else labels_of(groups, reference, arguments.id_column)
    return Task(
        reference=reference,
        models=models,
        options=_options(arguments, [reference, *models]),
        formats=formats,
        base=arguments.base,
        quantiles=tuple(sorted(quantiles)),
        top=arguments.worst,
        weight=weights_of(arguments.mask, arguments.weight, reference, arguments.id_column),
        labels=labels,
        label_names=label_names,
        classes=arguments.classes,
        samples=min(reference.shape[0], arguments.limit or reference.shape[0]),
        batch_rows=arguments.batch_rows,
        is_checked=not arguments.no_check,
        has_floor=arguments.floor is not None,
        fields=fields,
        has_bands=arguments.more,
        targets=targets,
        why_no_targets=why_no_targets,
        sampled=arguments.sampled,
    )


def _opened(arguments: Arguments) -> list[Saved]:
    """The reference, the models and the floor, each with the numbers of its classes if it is of the top k."""
    keys, columns = arguments.key or [], arguments.columns or []
    named = arguments.indices or []
    files = [name for name in named if suffix_of(Path(name)) in FORMATS or Path(name).is_dir()]
    choice = Choice(
        next(iter(keys), None),
        next(iter(columns), None),
        arguments.id_column,
        arguments.header,
        documents=arguments.documents,
        indices=tuple(name for name in named if name not in files),
        is_checked=not arguments.no_check,
    )
    reference = open_saved(arguments.paths[0], choice)
    of_reference = replace(choice, classes=reference.columns)
    choice = replace(of_reference, key=next(reversed(keys), None), columns=next(reversed(columns), None))
    every = [reference, *(open_saved(path, choice) for path in arguments.paths[1:])]
    if arguments.floor is not None:
        every.append(open_saved(arguments.floor, of_reference))
    try:
        of_files = [(name, open_saved(Path(name), Choice(documents=arguments.documents))) for name in files]
    except InputError as error:
        raise InputError(f"--indices: {error}") from error
    every = beside(every, of_files)
    used = [saved.indices.source for saved in every if saved.indices is not None]
    if unused := [name for name in named if name not in used]:
        raise InputError(
            f"--indices must name an array, a column or a file. Got {unused[0]!r}, which is no file, and in none of"
            f" {listed(saved.name for saved in every)}."
        )
    return with_all_classes(every, arguments.classes)


def _targets(arguments: Arguments, every: list[Saved]) -> tuple[OfRows | None, str | None]:
    """Those that were given, or that a file has; or why the latter cannot be taken."""
    reference = every[0]
    classes = arguments.classes or reference.classes
    why_not = "of the top k not every token has a probability" if any(saved.indices for saved in every) else None
    if arguments.targets is not None:
        return targets_of(arguments.targets, reference, classes, arguments.id_column), why_not
    known = next((saved.targets for saved in every if saved.targets is not None), None)
    if known is None:
        return None, None
    if arguments.eps or why_not:
        return None, why_not or "--eps changes q"
    targets = torch.from_numpy(known.astype("int64"))
    if not bool(((targets >= 0) & (targets < classes)).all()):
        return None, f"a token is not among the {classes:,} classes"
    return lambda start, stop: targets[start:stop], None


def _fields(arguments: Arguments, every: list[Saved], has_targets: bool, asked: set[str]) -> tuple[str, ...]:
    """What is asked of each row, for what is to be shown and for limits of these values."""
    reference, *models = every
    is_top_k = any(saved.indices is not None for saved in every)
    fields: tuple[str, ...] = tuple(OF_CLASSES) if arguments.more or asked & OF_CLASSES.keys() else ()
    if has_targets:
        fields += tuple(OF_TARGETS)
    # It is of a sum over all classes, in one direction.
    has_theirs = reference.grid is not None and arguments.classes in (None, reference.classes)
    if has_targets and has_theirs and (arguments.direction, arguments.temperature) == ("forward", 1):
        fields += OF_LLAMA
    if is_top_k:
        is_pair = reference.indices is not None and any(model.indices is None for model in models)
        fields += OF_TAILS if is_pair and arguments.direction == "forward" else ("tail_mass",)
    missing = {
        **dict.fromkeys(("perplexity", "ln_ratio", "delta_p"), not has_targets and (OF_ALL if is_top_k else OF_TOKENS)),
        **dict.fromkeys(OF_CLASSES, is_top_k and OF_ALL),
        **dict.fromkeys(("at_least", "tail_mass"), not is_top_k and "--indices"),
        "at_most": "at_most" not in fields and OF_BOUND,
        "llama_cpp": "llama_cpp" not in fields and "a file of llama.cpp as the reference",
        "above_floor": arguments.floor is None and "--floor",
        "difference": len(arguments.paths) < 3 and "two models or more",
    }
    for part in sorted(asked):
        if missing.get(part):
            raise InputError(f"A limit of {part} needs {missing[part]}. Got none.")
    if arguments.eps and asked & OF_CLASSES.keys():
        names = ", ".join(sorted(asked & OF_CLASSES.keys()))
        raise InputError(f"--eps must be 0 with limits of {names}, which are of q as it is. Got {arguments.eps:g}.")
    return fields


def _options(arguments: Arguments, every: list[Saved]) -> Options:
    unknown = next((saved for saved in every if saved.input_format is None), None)
    if not (arguments.input_format or "").strip(" ,") and unknown is not None:
        hint = looks_like(unknown)
        raise InputError(f"--input-format must say what the files hold: logits, log_probs or probs. Got none. {hint}")
    return options_of(arguments)
