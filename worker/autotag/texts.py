"""Makes text from outside safe to store and to show."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

MAX_SHOWN = 500  # characters of an untrusted text that are shown
JOINERS = "\u200c\u200d"  # zero-width joiners: Persian and many emojis need them; harmless in a terminal
#: Emojis, and scripts in which a joiner between two letters changes what a reader sees (``autotag.joined``).
JOINED = (
    r"[\u0600-\u0dff\u0f00-\u10ff\u1200-\u1cff\u2190-\u2bff\ua800-\ua95f\ua980-\uabff\ufb50-\ufdff\ufe0f\ufe70-\ufefc"
    r"\U00010800-\U0001ffff]"
)
_IDLE_JOINER = re.compile(rf"(?<!{JOINED})[{JOINERS}]|[{JOINERS}](?!{JOINED})")
#: Letters and marks that are invisible, such as fillers.
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
#: Characters that start a formula in spreadsheets, also in their full-width forms.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def read_json(text: str | bytes) -> Any:
    """Parses JSON from outside.

    Raises:
        ValueError: the text is not JSON, or it is nested absurdly deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def clean_text(text: str) -> str:
    """Removes control and invisible characters (Postgres cannot store NUL) and collapses runs of white space.

    Zero-width joiners stay where they change what a reader sees: in scripts that have them, and in emojis.
    """
    if text.isascii() and text.isprintable():
        return (re.sub(r" +", " ", text) if "  " in text else text).strip()
    return visible_text(unicodedata.normalize("NFKC", text))


def visible_text(text: str) -> str:
    """Like `clean_text`, for words that people have written: compatibility characters (½, ﬁ) stay as they are. The
    database has the same function (``autotag.visible_text``)."""
    visible = "".join(
        " " if c.isspace() else c
        for c in _IDLE_JOINER.sub("", text)
        if c.isspace() or c in JOINERS or (unicodedata.category(c)[0] != "C" and c not in _FILLERS)
    )
    return re.sub(r" +", " ", unicodedata.normalize("NFC", visible)).strip()


def printable(text: object, length: int = MAX_SHOWN) -> str:
    """Makes an untrusted text safe for a terminal: one line without control sequences or invisible characters.

    Runs of white space, including line breaks, become one blank. Control characters, bidirectional controls and
    invisible characters are escaped (``\\x1b``, ``\\u202e``), so that an operator sees the attempt.

    Args:
        text: anything; it is converted with ``str``.
        length: max characters of the result; a text that was cut off ends in “…”.
    """
    whole = str(text)
    # Only the beginning is processed, so megabytes of text take no longer than a short text.
    begin = one_line(" ".join(whole[: 4 * length].split()))
    if len(begin) > length or len(whole) > 4 * length:
        return begin[: length - 1] + "…"
    return begin


def one_line(text: str) -> str:
    """Escapes every control and invisible character of a text. Blanks stay; tabs and line breaks become blanks."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_plain(c) else " " if c in "\t\r\n" else _escape(c) for c in text)


def printable_all(value: Any, length: int = MAX_SHOWN) -> Any:
    """Applies `printable` to every text in untrusted JSON, including the keys."""
    if isinstance(value, str):
        return printable(value, length)
    if isinstance(value, dict):
        return {printable(name, length): printable_all(item, length) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_all(item, length) for item in value]
    return value


def spreadsheet_cell(text: object) -> str:
    """A text as a CSV cell that spreadsheets do not run as a formula."""
    whole = str(text)
    shown = printable(whole)
    return f"'{shown}" if shown.startswith(FORMULA) or whole.startswith(("\t", "\r", "\n")) else shown


def _is_plain(character: str) -> bool:
    return unicodedata.category(character)[0] not in "CZ" or character in " " + JOINERS


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def name_some(names: Sequence[str], most: int = 20) -> str:
    """Lists at most ``most`` names for a sentence, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
