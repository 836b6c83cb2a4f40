"""Removes secrets from messages before they are logged, stored or printed.

Error messages of a provider, Storage, a proxy or a driver may repeat the request. `redact` is applied where such
messages are received (`classify.parse_error`, `storage.read_reply`, `safe_message`) and again where messages are
written (`console.fail`, `redact_event`).
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
MIN_SECRET_LENGTH = 8  # characters; shorter ones ("none", "test") also occur as ordinary words
PUBLIC = frozenset({"postgres"})  # password of every local Supabase stack, and a common word in messages
MAX_LOGGED = 2000  # characters of one text in a log line
MAX_TRACEBACK = 20_000  # characters of a traceback in a log line
MAX_READ = 100_000  # characters that are searched for secrets; callers keep far fewer

#: Texts that look like secrets. Repetitions are bounded, so that matching takes linear time.
_PATTERNS = (
    # user:password@ in a URL, also with an unescaped @ or /
    re.compile(r"(?<=://)([^\s/:@'\"]{0,100}):[^\s'\"]{0,300}@"),
    re.compile(r"\b(password|passwd|pwd)\s*=\s*('[^']*'|\S+)", re.IGNORECASE),
    re.compile(r"\b(sk-|sb_secret_|whsec_)[\w./+=-]{12,}"),
    re.compile(r"\b(eyJ)[\w-]{8,500}\.[\w-]{8,3000}\.[\w-]*"),  # a JWT
)
_REPLACEMENTS = (rf"\1:{HIDDEN}@", rf"\1={HIDDEN}", rf"\1{HIDDEN}", HIDDEN)

_secrets: set[str] = set()
_pattern: re.Pattern[str] | None = None


def remember(*secrets: str | None) -> None:
    """Registers secrets that `redact` removes from now on, also in the forms they have inside URLs, JSON and HTML."""
    global _pattern
    for secret in secrets:
        if secret and len(secret) >= MIN_SECRET_LENGTH and secret not in PUBLIC:
            _secrets.update(
                (secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], html.escape(secret))
            )
    if _secrets:
        _pattern = re.compile("|".join(re.escape(form) for form in sorted(_secrets, key=len, reverse=True)))


def remember_connection(url: str) -> None:
    """Registers the password of a connection string."""
    try:
        password = conninfo_to_dict(url).get("password")
    except ProgrammingError:
        return
    remember(str(password) if password else None)


def redact(text: str) -> str:
    """Replaces this process's secrets, and everything that looks like a secret, with ``***``."""
    text = text[:MAX_READ]
    if _pattern:
        text = _pattern.sub(HIDDEN, text)
    for pattern, replacement in zip(_PATTERNS, _REPLACEMENTS, strict=True):
        text = pattern.sub(replacement, text)
    return text


def safe_message(error: BaseException) -> str:
    """The message of a driver's or library's error as one line without secrets."""
    return printable(redact(str(error)), MAX_LOGGED)


def redact_event(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Removes secrets and control characters from every value of a log event.

    A structlog processor. It must come after ``format_exc_info``; a traceback keeps its line breaks.
    """
    for name, value in event.items():
        if name == "exception":
            event[name] = "\n".join(one_line(line) for line in redact(str(value))[:MAX_TRACEBACK].split("\n"))
        elif isinstance(value, str):
            event[name] = printable(redact(value), MAX_LOGGED)
        elif isinstance(value, (list, tuple, dict, BaseException)):
            event[name] = printable(redact(str(value)), MAX_LOGGED)
    return event
