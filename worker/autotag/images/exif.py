"""Reads the directories of TIFF files, which EXIF data also consists of. All values in them are untrusted.

EXIF 2.32 and TIFF 6.0, with the tags of BigTIFF and of GDAL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAX_DIRECTORIES = 200
MAX_ENTRIES = 4096
MAX_NUMBERS = 100_000
ORIENTATION = 0x0112
#: Size and ``struct`` format of the types of values.
TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q"}


@dataclass(frozen=True)
class Entry:
    """One field of a directory: where its values are."""

    type: int
    count: int
    at: int


@dataclass(frozen=True)
class Directory:
    """One directory.

    Attributes:
        at: its position.
        big: whether the file is a BigTIFF.
        order: ``<`` or ``>``.
        entries: its fields by their tags.
        raw: its fields as they are in the file, by their tags.
        next: the position of the next directory, as bytes.
    """

    data: bytes
    at: int
    big: bool
    order: str
    entries: dict[int, Entry]
    raw: dict[int, bytes]
    next: bytes

    def numbers(self, tag: int) -> tuple[int | float, ...]:
        """The values of a field; empty if it is missing or invalid."""
        entry = self.entries.get(tag)
        code = TYPES.get(entry.type) if entry else None
        if entry is None or code is None or not 0 < entry.count <= MAX_NUMBERS:
            return ()
        try:
            return struct.unpack_from(f"{self.order}{entry.count}{code}", self.data, entry.at)
        except struct.error:
            return ()

    def number(self, tag: int, default: int = 0) -> int:
        """The first value of a field."""
        values = self.numbers(tag)
        return int(values[0]) if values and isinstance(values[0], int) else default

    def block(self, tag: int, most: int = 4_000_000) -> bytes:
        """A field's bytes; empty if it is missing, damaged or longer than ``most``."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in (1, 2, 7) or entry.count > most:
            return b""
        found = bytes(self.data[entry.at : entry.at + entry.count])
        return found if len(found) == entry.count else b""

    @property
    def orientation(self) -> int:
        """1 to 8; 1 if none is given."""
        found = self.number(ORIENTATION, 1)
        return found if 1 <= found <= 8 else 1


def directories(data: bytes) -> Iterator[Directory]:
    """The chain of directories of a TIFF file or of EXIF data, up to the first invalid one."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if order is None or len(data) < 8:
        return
    big = data[2:4] in (b"+\0", b"\0+")
    at = _position(data, 8 if big else 4, big, order)
    seen: set[int] = set()
    while at and at not in seen and len(seen) < MAX_DIRECTORIES:
        seen.add(at)
        found = directory(data, at, big, order)
        if found is None:
            return
        yield found
        at = _position(found.next, 0, big, order)


def directory(data: bytes, at: int, big: bool, order: str) -> Directory | None:
    """The directory at a position; None if there is none."""
    size, head = (20, 8) if big else (12, 2)
    field = struct.Struct(order + ("HHQ" if big else "HHI"))
    try:
        [count] = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    except struct.error:
        return None
    if not 0 < count <= MAX_ENTRIES:
        return None
    entries: dict[int, Entry] = {}
    raw: dict[int, bytes] = {}
    start = at + head
    for position in range(start, start + count * size, size):
        if position + size > len(data):
            break
        tag, kind, number = field.unpack_from(data, position)
        value = position + field.size
        length = number * struct.calcsize(TYPES.get(kind, "d" if kind in (5, 10) else "B"))
        inline = length <= (8 if big else 4)
        entries.setdefault(tag, Entry(kind, number, value if inline else _position(data, value, big, order)))
        raw.setdefault(tag, bytes(data[position : position + size]))
    end = start + count * size
    return Directory(data, at, big, order, entries, raw, bytes(data[end : end + (8 if big else 4)]))


def _position(data: bytes, at: int, big: bool, order: str) -> int:
    try:
        [found] = struct.unpack_from(order + ("Q" if big else "I"), data, at)
    except struct.error:
        return 0
    return int(found)


def orientation(exif: bytes) -> int:
    """The orientation in EXIF data; 1 if it has none or is damaged."""
    return next((found.orientation for found in directories(exif.removeprefix(b"Exif\0\0"))), 1)
