"""Reads the boxes of HEIF and AVIF files (ISO/IEC 14496-12 and 23008-12). All values in them are untrusted."""

from __future__ import annotations

from collections.abc import Iterator

Property = tuple[bytes, bytes]


def primary_properties(data: bytes) -> list[Property]:
    """The properties of the primary picture in their order: types and contents. A colour profile by numbers comes
    last."""
    meta = dict(_boxes(data)).get(b"meta", b"")
    parts = dict(_boxes(meta[4:]))
    large = parts.get(b"pitm", b"")[:1] != b"\0"
    primary = int.from_bytes(parts.get(b"pitm", b"")[4 : 8 if large else 6])
    described = dict(_boxes(parts.get(b"iprp", b"")))
    every = list(_boxes(described.get(b"ipco", b"")))
    numbers = _associated(described.get(b"ipma", b""), primary)
    found = [every[number - 1] for number in numbers if 0 < number <= len(every)]
    return sorted(found, key=lambda one: one[0] == b"colr" and one[1][:4] == b"nclx")


def _associated(ipma: bytes, item: int) -> Iterator[int]:
    wide_items, wide_numbers = ipma[:1] != b"\0", bool(ipma[3:4] > b"\0" and ipma[3] & 1)
    at, left = 8, int.from_bytes(ipma[4:8])
    while left > 0 and at < len(ipma):
        size, each = (4 if wide_items else 2), (2 if wide_numbers else 1)
        this, count = int.from_bytes(ipma[at : at + size]), int.from_bytes(ipma[at + size : at + size + 1])
        at += size + 1
        if this == item:
            mask = 0x7FFF if wide_numbers else 0x7F
            yield from (int.from_bytes(ipma[n : n + each]) & mask for n in range(at, at + count * each, each))
        at += count * each
        left -= 1


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size, head = int.from_bytes(data[at : at + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        end = at + size if size else len(data)
        if end < at + head:
            return
        yield data[at + 4 : at + 8], data[at + head : end]
        at = end
