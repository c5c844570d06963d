"""The command line. Exit status: 0 done, 1 a result that was asked to fail on, 2 bad input, 130 interrupted."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from klmetric import __version__
from klmetric.arithmetic.level import level, on_accelerators
from klmetric.command.arguments import Arguments, check
from klmetric.command.ending import BAD_INPUT, INTERRUPTED, leave_with_processes
from klmetric.command.limits import LIMIT
from klmetric.options import check_choice
from klmetric.saved.errors import InputError, check_is_there, said_of

# The options that take limits.
LIMITING = ("--fail-above", "--fail-below")

OUT = Path("runs/demo")
DTYPES, QUANTIZED = ("float32", "bfloat16", "float16"), ("int8",)


class _WithLimits(TyperCommand):
    """A command whose limits may follow one another: `--fail-above mean=0.01 p99=0.2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each limit, as click wants it."""
        given: list[str] = []
        for arg in args:
            if len(given) > 1 and LIMIT.fullmatch(arg) and LIMIT.fullmatch(given[-1]) and given[-2] in LIMITING:
                given.append(given[-2])
            given.append(arg)
        return super().parse_args(ctx, given)


app = typer.Typer(
    help="The KL divergence as a metric you can trust.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            kernels = f"kernel: {level() or 'plain'}, on accelerators: {on_accelerators() or 'plain'}"
            typer.echo(f"klmetric {__version__} ({kernels})")
        except ValueError as error:  # of KLMETRIC_KERNEL
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from error
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version, and which kernels serve.",
        ),
    ] = False,
) -> None:
    """The KL divergence as a metric you can trust."""


@app.command()
def demo(
    devices: Annotated[int, typer.Option(min=1, help="CPU processes to train with.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to train the student for.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split, the weights and the batches.")] = 0,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for metrics.csv, val_kl.png, weights.")] = OUT,
) -> None:
    """Distil a teacher into a student on real digits, and see val_kl fall.

    A teacher learns to read 1,797 handwritten digits (they come with scikit-learn: nothing is downloaded). A smaller
    student learns the teacher's distribution under Lightning, on several processes, while the callback logs val_kl
    every epoch. Then the best checkpoint is evaluated with one process and with several, and the teacher is compared
    with itself in fewer bits: in both, the number of torchmetrics stands beside.
    """
    leave_with_processes()
    try:
        from klmetric.command.demo import run
    except ModuleNotFoundError as error:
        typer.echo(f"The demo needs {error.name}: pip install 'klmetric[demo]'", err=True)
        raise typer.Exit(BAD_INPUT) from error
    run(devices, epochs, seed, out)


@app.command(name="compare", cls=_WithLimits, short_help="Measure saved predictions against a reference.")
def compare_command(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The predictions p to compare with.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="The predictions q of one or more models.")],
    input_format: Annotated[
        str | None,
        typer.Option(
            help="logits, log_probs or probs; or two of them, for the reference and the models: logits,probs; or one"
            " for each file."
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="The array to take of a file of several; logits.* for a row of them; twice as --columns."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="The classes in a table, as in 'a,b,c' or 'p_*'; twice if those of the models differ."),
    ] = None,
    indices: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Of files with the top k only: the array, the column or the file (.npy) that says which classes the"
            " values are of.",
        ),
    ] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="The first of the top k is a drawn token, as vLLM saves it.")
    ] = False,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether the first row of a table names its columns.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", help="The column of a table by which rows are aligned.")
    ] = None,
    documents: Annotated[
        bool | None,
        typer.Option("--documents/--no-documents", help="Whether each array of (rows, classes) is one sample."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many classes only; of the top k: how many there are.")
    ] = None,
    direction: Annotated[
        str, typer.Option(help="forward KL(p‖q), reverse KL(q‖p), their sum jeffreys, or jensen_shannon.")
    ] = "forward",
    temperature: Annotated[float, typer.Option(help="Divides the logits of both.")] = 1.0,
    eps: Annotated[float, typer.Option(help="A floor under the probabilities of q.")] = 0.0,
    base: Annotated[float | None, typer.Option(help="Of the logarithm: 2 for bits. Nats without it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="An array of 0 and 1, for each sample or row: what counts.")] = None,
    weight: Annotated[Path | None, typer.Option(help="An array of weights, for each sample or row.")] = None,
    targets: Annotated[
        Path | None,
        typer.Option(help="An array of the classes that came true, for each row, -100 for rows that do not count."),
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="A label for each sample or row (.txt, .csv, .npy): a breakdown by group.")
    ] = None,
    more: Annotated[
        bool,
        typer.Option("--more", help="Show other divergences, agreement in order, and bands of confidence, too."),
    ] = False,
    floor: Annotated[
        Path | None, typer.Option(help="The predictions of the reference, run a second time: what is no difference.")
    ] = None,
    worst: Annotated[
        int, typer.Option(min=0, help="Show so many of the worst rows: where they are, and what was likely there.")
    ] = 0,
    vocab: Annotated[
        Path | None,
        typer.Option(help="The text of classes for --worst: a tokenizer's folder or .json, or .txt with one a line."),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Write the values of each row into a .parquet, or the divergences into a .npy.")
    ] = None,
    fail_above: Annotated[
        list[str] | None, typer.Option(metavar="KEY=LIMIT...", help="Exit 1 if a value is larger: mean=0.01 p99=0.2.")
    ] = None,
    fail_below: Annotated[
        list[str] | None, typer.Option(metavar="KEY=LIMIT...", help="Exit 1 if a value is smaller: agreement=0.99.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - for the screen.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the report as CSV; - for the screen.")] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the distributions, or with --size these, into a .png, .svg or .pdf."),
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the report as a page of its own, with pictures and method.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SIZE", help="Of a model, to draw it against: int8=7.6GiB, or int8=4.5bpw."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many samples only.")] = None,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows that a thread reads at once; a few MiB without it.")
    ] = None,
    nan_strategy: Annotated[
        str, typer.Option(help="Rows that are no distributions: error, or ignore to leave them out.")
    ] = "error",
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not doubt --input-format.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Measure saved predictions against a reference: KL(p‖q) of every row, with p the reference.

    Each of REFERENCE and MODEL is a file, or a folder of shards: .npy, .npz, .safetensors, .pt, .parquet, .csv, .tsv,
    .arrow, a dataset of Hugging Face, a .kld file of llama.cpp, or what `klmetric record` wrote; with the axes (rows,
    classes) or (samples, positions, classes). They are read in pieces, so they may be larger than memory. Under
    torchrun (`torchrun --nproc-per-node 4 -m klmetric compare ...`) each process takes a share of the samples.

        klmetric compare float32.npy int8.npy bf16.npy --input-format logits --fail-above mean=0.01 p99=0.2

    Where it is known which token came next (by a .kld file, a recording, or --targets), the perplexities and the
    probabilities of the right token are compared as well.

    Of a teacher behind vLLM or an API the likeliest classes are known alone. --indices names what says which they are,
    and the report is of what the divergence is at least, and at most:

        klmetric compare teacher.npz student.npy --indices ids --input-format log_probs,logits

    The standard errors take samples for independent, and the positions in one (tokens of a text) not. The line "more
    than the best" is of the same rows, and so known better than the means themselves. Exit status: 0 done, 1 a limit
    is exceeded, 2 bad input, 130 interrupted (what was measured until then is reported).
    """
    given = {**locals(), "paths": [Path(reference), *map(Path, models)]}
    arguments = Arguments(**{name: given[name] for name in Arguments.__annotations__})

    def run() -> int:
        check(arguments)
        try:
            from klmetric.command.compare import run_compare
        except ModuleNotFoundError as error:
            raise InputError(f"compare needs {error.name}: pip install 'klmetric[compare]'.") from error
        return run_compare(arguments)

    raise typer.Exit(_status_of(run, debug))


@app.command(name="record", short_help="Save what a language model predicts, for `klmetric compare`.")
def record_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its folder, or its name on the hub.")],
    text: Annotated[Path, typer.Option(help="The text, in UTF-8.")],
    out: Annotated[Path, typer.Option(help="The folder to write. One that is not whole is gone on with.")],
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window: 512 without it, or fewer if the model sees fewer.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Take the first so many windows only.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16: what to compute in. Without it, as the weights are saved."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: compute linear layers, but for the head, in torch's dynamic int8.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Save logits, not hidden states and the head.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Without it, a GPU if there is one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows that are computed at once.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Save what a causal language model of Hugging Face predicts after each token of a text.

    The text is cut into windows that do not overlap. Of each, the last hidden states are saved, and once the head that
    makes logits of them: thousands of classes are made of them only as `klmetric compare` reads them.

        klmetric record ./model --text wiki.txt --out full
        klmetric record ./model --text wiki.txt --out int8 --quantize int8
        klmetric compare full int8

    The same command goes on with a recording that was interrupted, and ends at the same bits. Exit status: 0 done, 2
    bad input, 130 interrupted.
    """
    given = dict(locals())

    def run() -> int:
        check_is_there(text, "--text")
        try:
            check_choice("--dtype", dtype or DTYPES[0], DTYPES)
            check_choice("--quantize", quantize or QUANTIZED[0], QUANTIZED)
        except ValueError as error:
            raise InputError(str(error)) from error
        try:
            from klmetric.command.record import Request, run_record
        except ModuleNotFoundError as error:
            raise InputError(f"record needs {error.name}: pip install 'klmetric[record]'.") from error
        return run_record(Request(**{name: given[name] for name in Request.__annotations__}))

    raise typer.Exit(_status_of(run, debug))


def _status_of(run: Callable[[], int], debug: bool) -> int:
    """The exit status, after what is said of an error."""
    try:
        return run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"Error: {said_of(error)}", file=sys.stderr)
        return BAD_INPUT
