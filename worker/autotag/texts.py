"""Makes text from outside safe to store and to show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

MAX_SHOWN = 500  # characters of an untrusted text that are shown
JOINERS = "\u200c\u200d"  # zero-width joiners: Persian and many emojis need them; harmless in a terminal
#: Scripts whose letters look the same with a joiner between them: the first word of their characters' names.
WITHOUT_JOINERS = (
    "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "THAI",
    "LAO", "COMBINING",
)  # fmt: skip
#: Characters that start a formula in spreadsheets, also in their full-width forms.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def clean_text(text: str) -> str:
    """Removes control and invisible characters (Postgres cannot store NUL) and collapses runs of white space.

    Zero-width joiners stay where they change what a reader sees: in scripts that have them, and in emojis.
    """
    if text.isascii() and text.isprintable():
        return (re.sub(r" +", " ", text) if "  " in text else text).strip()
    normal = unicodedata.normalize("NFKC", text)
    visible = "".join(
        " " if c.isspace() else c
        for i, c in enumerate(normal)
        if c.isspace() or unicodedata.category(c)[0] != "C" or (c in JOINERS and _joins(normal, i))
    )
    return re.sub(r" +", " ", visible).strip()


def _joins(text: str, place: int) -> bool:
    """Whether the joiner at a place of a text stands between two characters that it changes."""
    return 0 < place < len(text) - 1 and _is_joined(text[place - 1]) and _is_joined(text[place + 1])


def _is_joined(character: str) -> bool:
    category = unicodedata.category(character)
    if category in ("So", "Sk"):  # emojis and their modifiers
        return True
    return category[0] in "LM" and unicodedata.name(character, "").split(" ")[0] not in WITHOUT_JOINERS


def printable(text: object, length: int = MAX_SHOWN) -> str:
    """Makes an untrusted text safe for a terminal: one line without control sequences or invisible characters.

    Runs of white space, including line breaks, become one blank. Control characters, bidirectional controls and
    invisible characters are escaped (``\\x1b``, ``\\u202e``), so that an operator sees the attempt.

    Args:
        text: anything; it is converted with ``str``.
        length: max characters of the result; a text that was cut off ends in “…”.
    """
    whole = str(text)
    # Only the beginning is processed, so megabytes of text cost no more than a short text.
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
    """Names for a sentence: at most ``most``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
