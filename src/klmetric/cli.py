"""The command line. Exit status: 0 done, 1 a result that was asked to fail on, 2 bad input."""

from pathlib import Path
from typing import Annotated

import typer

from klmetric import __version__

OUT = Path("runs/demo")

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
        typer.echo(f"klmetric {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
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
    every epoch. Then the best checkpoint is evaluated with one process and with several: the same number.
    """
    try:
        from klmetric.demo import run
    except ModuleNotFoundError as error:
        typer.echo(f"The demo needs {error.name}: pip install 'klmetric[demo]'", err=True)
        raise typer.Exit(2) from error
    run(devices, epochs, seed, out)
