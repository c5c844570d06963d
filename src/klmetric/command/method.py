"""How a report was measured, in a few sentences for those who read it and nothing else."""

from typing import Any

from klmetric.command.tables import columns_of

Value = dict[str, Any]

_DIRECTIONS = {
    "forward": "KL(p‖q), the sum over all classes of p · log(p / q)",
    "reverse": "KL(q‖p), the sum over all classes of q · log(q / p)",
    "jeffreys": "KL(p‖q) + KL(q‖p), the divergence in both directions",
    "jensen_shannon": "that of Jensen and Shannon, the mean of KL(p‖m) and KL(q‖m) with m = (p + q) / 2",
}


def method_of(report: Value) -> list[str]:
    """The paragraphs, of what is in this report alone."""
    columns, _ = columns_of(report)
    paragraphs = [_rows(report), _errors(report)]
    if "perplexity" in columns[0]:
        paragraphs.append(
            "Perplexity is the exponential of the mean of -log of the probability of the token that came next. Δp is"
            " that probability in the model, less that in the reference. The interval of a ratio or a perplexity is"
            " that of its logarithm, carried over."
        )
    if "floor" in report:
        paragraphs.append(
            "The floor is the reference run a second time. What a model has more than that is measured over the same"
            " rows."
        )
    if any("storage_error" in model for model in columns):
        paragraphs.append(
            "The files store log-probabilities in steps of 16 bits. What rounding to these can add to the mean, usually"
            " and at most, stands in the table."
        )
    if "at_least" in columns[0]:
        paragraphs.append(
            "Of some files the likeliest classes of a row are known alone, and what the others have in sum, but not how"
            " they share it. All classes that are not known on both sides are taken for one, which never makes a"
            " divergence larger: it is at least what stands here, in every row, in the mean, and in the quantiles."
        )
    if "at_most" in columns[0]:
        paragraphs.append(
            "It is at most what it would be if the classes that are not known were those that the model likes least,"
            " each with as much as the least of the known ones."
        )
    if any("clipped" in model for model in columns):
        paragraphs.append(
            "The files clip all classes that are far below the most likely one, and only their sum is known. There p"
            " and q are taken for as near to each other as they can be, so that the divergence is a lower bound."
        )
    return paragraphs


def _rows(report: Value) -> str:
    options = report["options"]
    text = (
        f"p is the reference and q a model. A row is one prediction over {report['classes']:,} classes; of each the"
        f" divergence is {_DIRECTIONS[options['direction']]}, in {report['unit']}. It is 0 where both are the same, and"
        " never negative."
    )
    if not options["eps"]:
        text += (
            " It is computed in a form in which nothing cancels, so that from 1e-13 nats on it is right to 1 part in a"
            " million, for p and q as they were saved."
        )
    if options["temperature"] != 1:
        text += f" The logits of both were divided by a temperature of {options['temperature']:g}."
    if options["eps"]:
        text += f" The probabilities of q had a floor of {options['eps']:g}."
    if options["mask"] or options["weight"]:
        text += " Rows were weighted, or left out, as the files given for that say."
    return text


def _errors(report: Value) -> str:
    return (
        "Standard errors and 95 % intervals (1.96 standard errors to either side) take the samples (texts, chunks or"
        f" images; there are {report['samples']:,}) for independent, and the rows of one sample not. What a model has"
        " more than the best is the mean difference over the same rows, with its own interval. Quantiles are of the"
        " rows, and right to 1 %."
    )
