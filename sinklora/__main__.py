"""`sinklora` and `python -m sinklora`."""

from __future__ import annotations

import sys

from .extras import MissingExtraError, require


def main() -> None:
    """Entry point of the command line; never returns, the exit status is the command's."""
    try:
        require("cli", "typer", "rich", "yaml")
    except MissingExtraError as error:
        print(f"sinklora: error: {error}", file=sys.stderr)
        sys.exit(1)
    from .cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
