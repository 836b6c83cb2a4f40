"""What the commands share: settings, errors in one sentence, options."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import typer

from autotag.config import Settings, SettingsError, load_settings

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def fail(message: str, code: int = 1) -> typer.Exit:
    """Says what is wrong; raise what it returns."""
    typer.secho(f"autotag: {message}", err=True, fg=typer.colors.RED)
    return typer.Exit(code)


S = TypeVar("S", bound=Settings)


def read_settings(kind: type[S], changes: dict[str, Any]) -> S:
    """The settings, or the sentence that says which is missing or wrong."""
    try:
        return load_settings(kind, **changes)
    except SettingsError as error:
        raise fail(str(error), 2) from None
