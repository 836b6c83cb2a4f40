"""Messages about vocabularies, between an operator's command and the database."""

from __future__ import annotations

from typing import TypedDict


class _Tag(TypedDict):
    tag: str


class Entry(_Tag, total=False):
    """A tag of a vocabulary. A missing part stays as it is; None removes it.

    uses: number of images that have the tag, when they were last counted.
    """

    aliases: list[str] | None
    description: str | None
    parent: str | None
    uses: int


class VocabularyChange(TypedDict):
    """The effect of a change (``autotag.edit_vocabulary``). tags: how many there are now."""

    tags: int
    added: int
    changed: int
    removed: int


class UsesCounted(TypedDict):
    """The effect of a count (``autotag.count_uses``). counted: entries whose number of images has changed. new: entries
    that were added, most frequent first."""

    tags: int
    added: int
    counted: int
    new: list[Entry]


class TagsInUse(TypedDict):
    """The tags of a page of images (``autotag.tags_in_use``). last: id of its last image; None: it has none."""

    images: int
    last: str | int | None
    tags: dict[str, int]
