"""The values of a brief's fields in a model's answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from autotag.db.messages import Field, Value
from autotag.texts import clean_text

TEXT_LENGTH = 200  # max characters of a text; the database cuts it, too (autotag.clean_fields)
MAX_INTEGER = 2**53 - 1  # JavaScript's

_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
_INTEGER = re.compile(r"-?[0-9]{1,16}(?:\.0+)?")


def read_fields(answer: Any, fields: Sequence[Field]) -> dict[str, Value]:
    """The value of each field; None: unknown, or of the wrong kind.

    Args:
        answer: the value of ``fields``. Models that do not follow the schema may write numbers and booleans as texts,
            and enum values in another case.
        fields: the requested fields.
    """
    answer = answer if isinstance(answer, dict) else {}
    return {field["name"]: _value(answer.get(field["name"]), field) for field in fields}


def _value(value: Any, field: Field) -> Value:
    match field["kind"]:
        case "boolean":
            return value if isinstance(value, bool) else _BOOLEANS.get(_text(value).lower())
        case "integer":
            return _integer(value)
        case "enum":
            text = _text(value)
            values = field.get("values", [])
            same = (one for one in values if _spelled(one) == _spelled(text))
            return text if text in values else next(same, None)
        case "text":
            return clean_text(_text(value)[: 2 * TEXT_LENGTH])[:TEXT_LENGTH] or None


def _spelled(text: str) -> str:
    """The text without differences that do not count: case, and the composition of letters."""
    return unicodedata.normalize("NFKC", text).lower()


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = float(value) if _INTEGER.fullmatch(value.strip()) else None
    if not isinstance(value, (int, float)) or not -MAX_INTEGER <= value <= MAX_INTEGER or value != int(value):
        return None
    return int(value)
