"""Text from outside, made fit to be stored and shown."""

from __future__ import annotations

import re
import unicodedata


def clean_text(text: str) -> str:
    """Text without control and invisible characters (Postgres stores no NUL), runs of white space as one."""
    if text.isascii() and text.isprintable():
        return re.sub(r" +", " ", text).strip()
    normal = unicodedata.normalize("NFKC", text)
    visible = "".join(" " if c.isspace() else c for c in normal if c.isspace() or unicodedata.category(c)[0] != "C")
    return re.sub(r" +", " ", visible).strip()
