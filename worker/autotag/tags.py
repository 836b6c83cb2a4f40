"""Normalises tags of any language to the form in which they are stored."""

from __future__ import annotations

import re
import unicodedata

from autotag.texts import clean_text

#: Punctuation that is part of the word before it: C#, 100%.
_AFTER_A_WORD = "#%"
_CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
_MARKDOWN = "*_`~"
#: The style of the character before them: SQL's `tag_key()` leaves these out before it looks at a sign's neighbours.
_UNSEEN = re.compile("[\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def normalise(tag: str) -> str:
    """A tag as it is stored: lower case, without the punctuation around it; "" if nothing remains.

    Lower case is not case folding: ``Straße`` becomes ``straße``, and a final sigma stays final. Punctuation that is
    part of a name stays: ``c#``, ``.net``, ``it's``, ``100%``, ``cat (animal)``. A hash or a dash in front is removed.
    """
    text = clean_text(tag).replace("İ", "i").lower()  # the lower case of İ has a second dot, which Turkish does not
    before = None
    while text != before:
        before = text
        text = _without_end(_without_start(text.strip())).strip()
    return unicodedata.normalize("NFC", text)


def _without_start(text: str) -> str:
    """Removes one character from the start, if it is not part of the tag."""
    if not text:
        return text
    first, rest = text[0], text[1:]
    if first == ".":
        return text if _UNSEEN.sub("", rest)[:1].isalnum() else rest.lstrip(".")  # .net, but not ...
    if first in _CLOSED_BY:
        return text if _CLOSED_BY[first] in rest[:-1] else rest
    if first == "@":
        return text
    if first in _MARKDOWN or unicodedata.category(first)[0] == "P":  # also #, and the dash of a list
        return rest
    return text


def _without_end(text: str) -> str:
    """Removes one character from the end, if it is not part of the tag."""
    if not text:
        return text
    last, rest = text[-1], text[:-1]
    opened = next((opening for opening, closing in _CLOSED_BY.items() if closing == last), None)
    if opened is not None:
        return text if opened in rest else rest
    if last in _AFTER_A_WORD and _UNSEEN.sub("", rest)[-1:].isalnum():
        return text
    if last in _MARKDOWN or unicodedata.category(last)[0] == "P":
        return rest
    return text
