"""Takes secrets out of messages before they are logged, stored or printed.

A provider, Storage, a proxy or a driver may repeat what it was sent. `redact` is applied where such messages come in
(`classify.read_complaint`, `storage.read_answer`, `said`) and again where messages leave (`console.fail`,
`redact_event`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from autotag.texts import one_line, printable

HIDDEN = "***"
SHORTEST = 8  # characters; a shorter secret ("none", "test") is a word that messages contain anyway
PUBLIC = frozenset({"postgres"})  # the password of every local Supabase stack, and a word of every message about it
LOGGED = 2000  # characters of a text in a log line …
TRACE = 20_000  # … and of a traceback
LONGEST = 100_000  # characters that are looked at; callers keep far less

#: What is a secret by its form, whoever it belongs to. Repetitions are bounded, so that no text takes long.
_SHAPES = (
    re.compile(
        r"(?<=://)([^\s/:@'\"]{0,100}):[^\s'\"]{0,300}@"
    ),  # a URL's user:password@, also with an unescaped @ or /
    re.compile(r"\b(password|passwd|pwd)\s*=\s*('[^']*'|\S+)", re.IGNORECASE),
    re.compile(r"\b(sk-|sb_secret_|whsec_)[\w./+=-]{12,}"),
    re.compile(r"\b(eyJ)[\w-]{8,500}\.[\w-]{8,3000}\.[\w-]*"),  # a JWT
)
_SHOWN = (rf"\1:{HIDDEN}@", rf"\1={HIDDEN}", rf"\1{HIDDEN}", HIDDEN)

_known: set[str] = set()
_pattern: re.Pattern[str] | None = None


def remember(*secrets: str | None) -> None:
    """From now on `redact` takes these out, and the forms that they have inside URLs, JSON and HTML."""
    global _pattern
    for secret in secrets:
        if secret and len(secret) >= SHORTEST and secret not in PUBLIC:
            _known.update(
                (secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], html.escape(secret))
            )
    if _known:
        _pattern = re.compile("|".join(re.escape(one) for one in sorted(_known, key=len, reverse=True)))


def remember_connection(url: str) -> None:
    """The same for the password of a connection string."""
    try:
        password = conninfo_to_dict(url).get("password")
    except ProgrammingError:
        return
    remember(str(password) if password else None)


def redact(text: str) -> str:
    """A text without the secrets of this process, and without what looks like anybody's."""
    text = text[:LONGEST]
    if _pattern:
        text = _pattern.sub(HIDDEN, text)
    for shape, shown in zip(_SHAPES, _SHOWN, strict=True):
        text = shape.sub(shown, text)
    return text


def said(error: BaseException) -> str:
    """What an error of a driver or library says, in one line that may be logged."""
    return printable(redact(str(error)), LOGGED)


def redact_event(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor of structlog: every text of an event without secrets and control characters.

    It goes behind ``format_exc_info``; a traceback keeps its lines.
    """
    for name, value in event.items():
        if name == "exception":
            event[name] = "\n".join(one_line(line) for line in redact(str(value))[:TRACE].split("\n"))
        elif isinstance(value, str):
            event[name] = printable(redact(value), LOGGED)
        elif isinstance(value, (list, tuple, dict, BaseException)):
            event[name] = printable(redact(str(value)), LOGGED)
    return event
