"""What the commands share: settings, errors in one sentence, options, and output that shows text as text."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, TypeVar

import typer
from rich.text import Text

from autotag.config import Settings, SettingsError, load_settings
from autotag.redact import redact
from autotag.texts import SHOWN, one_line, printable

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
LINE = 2000  # characters of a line at most


def say(line: str, *, err: bool = False) -> None:
    """Prints one line, whatever stands in it."""
    typer.echo(one_line(line[:LINE]), err=err)


def say_json(value: Any) -> None:
    """Prints a value as one line of JSON. It contains ASCII only, so nothing in it can control a terminal."""
    typer.echo(json.dumps(value, default=str).replace("\x7f", "\\u007f"))


def cell(text: object, style: str = "", length: int = SHOWN) -> Text:
    """Text from outside as rich shows it: no markup, no control characters."""
    return Text(printable(text, length), style)


def fail(message: str, code: int = 1) -> typer.Exit:
    """Says what is wrong; raise what it returns."""
    typer.secho(f"autotag: {printable(redact(message), LINE)}", err=True, fg=typer.colors.RED)
    return typer.Exit(code)


class _OneLine(logging.Formatter):
    """What libraries log (the Realtime client, psycopg's pool) contains what they received."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)), LINE)


def tame_libraries() -> None:
    """Libraries' warnings, which Python prints to stderr as they are, become lines without control characters."""
    if logging.lastResort:
        logging.lastResort.setFormatter(_OneLine())


S = TypeVar("S", bound=Settings)


def read_settings(kind: type[S], changes: dict[str, Any]) -> S:
    """The settings, or the sentence that says which is missing or wrong."""
    try:
        return load_settings(kind, **changes)
    except SettingsError as error:
        raise fail(str(error), 2) from None
