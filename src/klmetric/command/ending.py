"""How the command ends: its exit status, and what Ctrl-C does."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def leave(*_: object) -> NoReturn:
    """Say so and end at once.

    As an exception, Ctrl-C may be lost or come out as another: in an import of a library, or in one's own handling.
    """
    with suppress(OSError):
        # A progress bar may have hidden the cursor.
        os.write(2, b"\x1b[?25hInterrupted.\n" if os.isatty(2) else b"Interrupted.\n")
    os._exit(INTERRUPTED)


def on_ctrl_c(handler: Callable[..., object]) -> Any:
    """Have Ctrl-C call this, and return what it called before.

    Where it is ignored it stays so: that is how a shell starts what runs in the background.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    return before


@contextmanager
def ctrl_c(handler: Callable[..., object]) -> Iterator[None]:
    """Have Ctrl-C call this, for as long as it lasts."""
    before = on_ctrl_c(handler)
    try:
        yield
    finally:
        on_ctrl_c(before)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the measuring after the batch that is being read; a second one ends the program."""
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    with ctrl_c(interrupt):
        yield lambda: is_interrupted


def leave_with_processes() -> None:
    """From here on, Ctrl-C ends this process and all that it starts, of which only this one says so.

    None of them sees the signal, which they would each answer in their own way, but for a thread that waits for it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN or not hasattr(signal, "pthread_sigmask"):  # as on Windows
        return
    from multiprocessing import active_children, resource_tracker
    from threading import Thread

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        for process in active_children():
            process.kill()
        leave()

    # It starts with the first process, and lets the signal through again: so before. Of what those leave it warns.
    os.environ["PYTHONWARNINGS"] = "ignore"
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which threads and processes inherit
    Thread(target=wait, daemon=True).start()


def make_printable() -> None:
    """Names of files may be anything, and there may be nowhere to print to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="backslashreplace")


def discard_output(error: OSError) -> str | None:
    """Print nothing more, after this error; and what is to be said of it, if anything."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # or Python tries once more at its end
    if isinstance(error, BrokenPipeError):  # as of `| head`, which has seen enough
        return None
    return f"What is printed must have a place. Got standard output, which cannot be written: {error.strerror}."
