"""Messages about profiles, between an operator's command and the database."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from autotag.db.messages import Field


class ProfileChanges(TypedDict, total=False):
    """Changes of a profile, in the form that ``autotag.save_profile`` expects. None: back to the default."""

    instructions: str | None
    language: str | None
    tag_count: int | None
    min_confidence: float | None
    vocabulary_mode: str | None
    add_parents: bool | None
    fields: list[Field] | None


class Profile(TypedDict):
    """A version of a profile (``autotag.describe_profile``).

    version: 0: nobody has saved one. own: it is the workspace's own profile, not the one for all. created_at: ISO;
    None: version 0. has_vocabulary: there are tags to use, the workspace's own or general ones (missing in a history).
    For the other keys, see `ProfileChanges`.
    """

    version: int
    own: bool
    instructions: str
    language: str | None
    tag_count: int | None
    min_confidence: float
    vocabulary_mode: str
    add_parents: bool
    fields: list[Field]
    created_at: str | None
    has_vocabulary: NotRequired[bool]
