"""A profile as a TOML or JSON file, for ``autotag profile``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from autotag.db.profiles import Profile, ProfileChanges

#: The keys of a file, each with its comment.
SETTINGS = {
    "instructions": "what to look for and how to word it, at most 2,000 characters",
    "language": "of tags and caption, for example German",
    "tag_count": "1 to 50; default: settings.max_tags",
    "min_confidence": "0 to 1; less sure tags are not stored",
    "vocabulary_mode": "open, prefer or only",
    "add_parents": "store the vocabulary's parents of a tag, too",
}
FIELD_KEYS = ("name", "kind", "values", "description")
FIELDS_COMMENT = """
# Up to 20 fields, asked in the same call and stored in tagging_result.fields. kind: enum, boolean, integer or text.
# [[fields]]
# name = "room"
# kind = "enum"
# values = ["kitchen", "bathroom"]
# description = "The room in which the picture was taken"
"""


def read_profile(path: Path) -> ProfileChanges:
    """Reads a file: JSON if its name ends in ``.json``, otherwise TOML. Keys that are not in the file are missing.

    Raises:
        ValueError: the file is neither.
        OSError: the file cannot be read.
    """
    return parse_profile(path.read_text("utf-8"), as_json=path.suffix.lower() == ".json")


def parse_profile(text: str, *, as_json: bool = False) -> ProfileChanges:
    """Parses a profile; the database checks its values (``autotag.save_profile``).

    Raises:
        ValueError: it is not TOML (or JSON), not an object, or has values that JSON lacks (dates, nan, inf).
    """
    try:
        parsed = json.loads(text) if as_json else tomllib.loads(text)
        json.dumps(parsed, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(parsed, dict):
        raise ValueError("it is not an object")
    return cast("ProfileChanges", parsed)


def whole_profile(text: str) -> ProfileChanges:
    """Parses a complete profile: missing keys get their defaults (the inverse of `write_profile`)."""
    parsed = cast("Mapping[str, Any]", parse_profile(text))
    return cast("ProfileChanges", {**dict.fromkeys((*SETTINGS, "fields")), **parsed})


def write_profile(profile: Profile) -> str:
    """A profile as TOML, with a comment for each key that is not set."""
    lines = []
    for name, comment in SETTINGS.items():
        value = cast("Mapping[str, Any]", profile)[name]
        lines.append(f"# {name}: {comment}")
        lines.append(f"# {name} =" if value in (None, "") else f"{name} = {_toml(value)}")
    for field in profile["fields"]:
        lines.append("\n[[fields]]")
        lines += [f"{key} = {_toml(field[key])}" for key in FIELD_KEYS if field.get(key)]  # type: ignore[literal-required]
    return "\n".join(lines) + "\n" + FIELDS_COMMENT


def _toml(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"""\n{escaped}"""'
    return json.dumps(value, ensure_ascii=False)  # TOML writes these texts, numbers and lists as JSON does
