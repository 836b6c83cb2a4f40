"""Output of the commands. Text from outside cannot control the terminal, and an error is one line on stderr."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.text import Text

from autotag.redact import redact
from autotag.texts import MAX_SHOWN, one_line, printable

MAX_LINE = 2000  # characters
_NOT_WRITTEN = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EPIPE)
#: Its class is private: Typer has its own copy of Click, and used Click itself before.
_USAGE_ERROR: Any = typer.BadParameter.__base__

_wanted = {"json": False}  # whether a program waits for JSON on stdout


def note_json(value: bool) -> bool:
    """The callback of every option ``--json``. It makes `fail` print JSON."""
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
    with suppress(OSError):  # stderr may be a full disk while stdout is a program
        typer.secho(f"autotag: {shown}", err=True, fg=typer.colors.RED)
    if _wanted["json"]:
        say_json({"error": shown})
    return typer.Exit(code)


@contextmanager
def wrong_usage_as_json() -> Iterator[None]:
    """Prints the parser's errors as `fail` does, if a program waits for JSON; for people, Typer prints them."""
    try:
        yield
    except _USAGE_ERROR as error:
        if not _wanted["json"]:
            raise
        raise fail(error.format_message(), error.exit_code) from None


@contextmanager
def output() -> Iterator[None]:
    """Replaces characters that the terminal's encoding lacks (on stderr, Python does), and explains output that cannot
    be written.

    Raises:
        SystemExit: stdout cannot be written. The message has been printed; a closed pipe has none.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:
        if error.filename or error.errno not in _NOT_WRITTEN:
            raise
        _forget_output()
        if error.errno != errno.EPIPE:
            with suppress(OSError):
                typer.echo(f"autotag: The output cannot be written ({error.strerror}).", err=True)
        sys.exit(1)


def _forget_output() -> None:
    """Drops what is left in stdout's buffer: Python would write it at exit, and fail again."""
    with suppress(OSError, AttributeError), open(os.devnull, "wb") as nothing:  # stdout may be None
        os.dup2(nothing.fileno(), sys.stdout.fileno())


class _OneLine(logging.Formatter):
    """Formats a log record as one safe line, because messages of libraries may contain data that they received."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)), MAX_LINE)


def tame_libraries() -> None:
    """Removes secrets and control characters from the warnings that libraries log to stderr."""
    if logging.lastResort:
        logging.lastResort.setFormatter(_OneLine())
