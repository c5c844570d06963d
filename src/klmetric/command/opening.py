"""From the arguments, which have been checked, to the task: files are opened, and asked whether they go together."""

from dataclasses import replace
from pathlib import Path

from klmetric.command.arguments import Arguments, options_of
from klmetric.command.checks import check_array, check_lengths, check_order, check_pair, looks_like
from klmetric.command.comparison import Task
from klmetric.command.limits import quantile_of
from klmetric.options import Options
from klmetric.saved.array import Choice, Saved
from klmetric.saved.beside import labels_of, weights_of
from klmetric.saved.errors import InputError
from klmetric.saved.open import open_saved
from klmetric.saved.order import in_the_order_of
from klmetric.summary import QUANTILES


def open_task(arguments: Arguments, limits: dict[str, float]) -> Task:
    """What to compare, and how.

    Args:
        arguments: of the command.
        limits: of values, which may be quantiles that are to be measured.
    """
    columns = arguments.columns or []
    choice = Choice(
        arguments.key,
        next(iter(columns), None),
        arguments.id_column,
        arguments.header,
        documents=arguments.documents,
    )
    reference = open_saved(arguments.paths[0], choice)
    choice = replace(choice, columns=next(reversed(columns), None), classes=reference.columns)
    models = [open_saved(path, choice) for path in arguments.paths[1:]]
    for saved in (reference, *models):
        check_array(saved)
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
    quantiles = sorted({*QUANTILES, *(q for key in limits if (q := quantile_of(key)) is not None)})
    groups = arguments.groups
    labels, label_names = (None, []) if groups is None else labels_of(groups, reference, arguments.id_column)
    return Task(
        reference=reference,
        models=models,
        options=_options(arguments, [reference, *models]),
        base=arguments.base,
        quantiles=tuple(quantiles),
        top=arguments.worst,
        weight=weights_of(arguments.mask, arguments.weight, reference, arguments.id_column),
        labels=labels,
        label_names=label_names,
        classes=arguments.classes,
        samples=min(reference.shape[0], arguments.limit or reference.shape[0]),
        batch_rows=arguments.batch_rows,
        is_checked=not arguments.no_check,
    )


def _options(arguments: Arguments, every: list[Saved]) -> Options:
    unknown = next((saved for saved in every if saved.input_format is None), None)
    if not (arguments.input_format or "").strip(" ,") and unknown is not None:
        hint = looks_like(unknown)
        raise InputError(f"--input-format must say what the files hold: logits, log_probs or probs. Got none. {hint}")
    return options_of(arguments)


def names_of(paths: list[Path]) -> list[str]:
    """Names that tell the models apart, as short as can be."""
    for name in (lambda path: path.stem, lambda path: path.name, str):
        names = [name(path) or str(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({k})" for k, path in enumerate(paths, 1)]
