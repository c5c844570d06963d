"""The command `klmetric`, also `python -m klmetric`."""

import sys


def main() -> None:
    """Run the command, or say what it needs."""
    try:
        from klmetric.cli import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("The command klmetric needs typer and rich: pip install 'klmetric[cli]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
