"""Text from outside, made fit to be stored and shown."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

SHOWN = 500  # characters of a text from outside that are shown
JOINERS = "\u200c\u200d"  # Persian words and many emojis need them, and they move nothing
#: What a spreadsheet takes for the beginning of a formula, also in the wide form of Japanese keyboards.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def clean_text(text: str) -> str:
    """Text without control and invisible characters (Postgres stores no NUL), runs of white space as one."""
    if text.isascii() and text.isprintable():
        return re.sub(r" +", " ", text).strip()
    normal = unicodedata.normalize("NFKC", text)
    visible = "".join(" " if c.isspace() else c for c in normal if c.isspace() or unicodedata.category(c)[0] != "C")
    return re.sub(r" +", " ", visible).strip()


def printable(text: object, length: int = SHOWN) -> str:
    """Anybody's text as a terminal may show it: one line that moves no cursor, hides nothing and forges nothing.

    White space, line ends included, becomes one blank. Control characters, those that turn the direction of writing,
    and all that are invisible are spelled out (``\\x1b``, ``\\u202e``), so that an operator sees the attempt.

    Args:
        text: whatever it is.
        length: characters of the result at most; what is cut ends in “…”.
    """
    whole = str(text)
    # What is cut off is never looked at: a text of megabytes costs no more than a short one.
    begin = one_line(" ".join(whole[: 4 * length].split()))
    if len(begin) > length or len(whole) > 4 * length:
        return begin[: length - 1] + "…"
    return begin


def one_line(text: str) -> str:
    """A text with its blanks as they are, and every character that is not to be seen spelled out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_plain(c) else " " if c in "\t\r\n" else _spelled(c) for c in text)


def printable_all(value: Any, length: int = SHOWN) -> Any:
    """JSON of anybody with every text in it made `printable`."""
    if isinstance(value, str):
        return printable(value, length)
    if isinstance(value, dict):
        return {printable(name, length): printable_all(one, length) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_all(one, length) for one in value]
    return value


def spreadsheet_cell(text: object) -> str:
    """A text as a cell of CSV that no spreadsheet takes for a formula."""
    whole = str(text)
    shown = printable(whole)
    return f"'{shown}" if shown.startswith(FORMULA) or whole.startswith(("\t", "\r", "\n")) else shown


def _is_plain(character: str) -> bool:
    return unicodedata.category(character)[0] not in "CZ" or character in " " + JOINERS


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
