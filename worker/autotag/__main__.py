"""The command ``autotag``, also as ``python -m autotag``."""

from __future__ import annotations

import gc

import typer


def load() -> typer.Typer:
    """The command's application, imported without collecting garbage meanwhile: that was a third of every start."""
    gc.disable()
    from autotag.cli.app import app

    gc.freeze()  # what was imported stays
    gc.enable()
    return app


def main() -> None:
    """Runs it."""
    load()()


if __name__ == "__main__":
    main()
