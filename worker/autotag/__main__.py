"""The command ``autotag``, also as ``python -m autotag``."""

from __future__ import annotations

import gc
import sys

import typer


def load() -> typer.Typer:
    """Imports the command's application. Garbage collection is off during the imports, because it would take a third of
    the start-up time."""
    gc.disable()
    from autotag.cli.app import app

    gc.freeze()  # the imported modules live until exit, so later collections can skip them
    gc.enable()
    return app


def main() -> None:
    """Runs the command. Ctrl-C works during the imports, too."""
    try:
        command = load()
    except KeyboardInterrupt:
        sys.exit(130)  # what shells expect
    command()


if __name__ == "__main__":
    main()
