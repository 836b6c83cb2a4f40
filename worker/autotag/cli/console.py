"""Output of the commands. Text from outside is printed as text, and an error is one line on stderr."""

from __future__ import annotations

import json
import logging
from typing import Any

import typer
from rich.text import Text

from autotag.redact import redact
from autotag.texts import MAX_SHOWN, one_line, printable

MAX_LINE = 2000  # characters

_wanted = {"json": False}  # whether a program waits for JSON on stdout


def note_json(value: bool) -> bool:
    """The callback of every option ``--json``: `fail` prints JSON, too, if nothing else has."""
    _wanted["json"] = value
    return value


def say(line: str, *, err: bool = False) -> None:
    """Prints one line. Line breaks and control characters in it are replaced."""
    typer.echo(one_line(line[:MAX_LINE]), err=err)


def say_json(value: Any) -> None:
    """Prints a value as one line of JSON. It contains ASCII only, so nothing in it can control a terminal."""
    _wanted["json"] = False
    typer.echo(json.dumps(value, default=str).replace("\x7f", "\\u007f"))


def cell(text: object, style: str = "", length: int = MAX_SHOWN) -> Text:
    """Text from outside for a rich table, without markup and control characters, at most ``length`` characters."""
    return Text(printable(text, length), style)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def fail(message: str, code: int = 1) -> typer.Exit:
    """Prints an error to stderr, without secrets, and returns the exception to raise. With ``--json``, it also prints
    ``{"error": message}`` to stdout, for programs."""
    shown = printable(redact(message), MAX_LINE)
    typer.secho(f"autotag: {shown}", err=True, fg=typer.colors.RED)
    if _wanted["json"]:
        say_json({"error": shown})
    return typer.Exit(code)


class _OneLine(logging.Formatter):
    """Makes one line of a log record: what libraries log may contain what they received."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)), MAX_LINE)


def tame_libraries() -> None:
    """Removes secrets and control characters from the warnings that libraries log to stderr."""
    if logging.lastResort:
        logging.lastResort.setFormatter(_OneLine())
