"""The command `klmetric`, also `python -m klmetric`."""

import sys


def main() -> None:
    """Run the command, or say what it needs."""
    try:
        from klmetric.command.ending import leave, on_ctrl_c

        on_ctrl_c(leave)
    except KeyboardInterrupt:  # which had no time yet
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    _run()


def _run() -> None:
    from klmetric.command.ending import BAD_INPUT, DONE, discard_output, make_printable

    make_printable()
    try:
        from klmetric.command.cli import app

        try:
            app()
        finally:
            sys.stdout.flush()  # here, where it can be told if it fails
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("The command klmetric needs typer and rich: pip install 'klmetric[cli]'", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except OSError as error:
        if error.filename is not None:
            raise
        told = discard_output(error)
        if told:
            print(f"Error: {told}", file=sys.stderr)
        sys.exit(BAD_INPUT if told else DONE)


if __name__ == "__main__":
    main()
