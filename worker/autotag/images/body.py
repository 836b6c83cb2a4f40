"""Reads the bodies of HTTP answers up to a limit, also where they are compressed."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from autotag.errors import image_error

GZIP_OR_ZLIB = 47  # zlib's wbits: the largest window, and either header


class Response(Protocol):
    """An HTTP answer, of httpx or of httpx2."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def aiter_bytes(self) -> AsyncIterator[bytes]: ...

    def aiter_raw(self) -> AsyncIterator[bytes]: ...


async def read_body(response: Response, max_bytes: int) -> bytes:
    """The body of an image's file.

    Raises:
        TaggingError: it is larger than ``max_bytes``.
    """
    data = await read_up_to(response, max_bytes)
    if len(data) > max_bytes:
        raise image_error(
            "file_too_large", f"The file is larger than {max_bytes / 1_000_000:g} MB, the most that is accepted."
        )
    return data


async def read_up_to(response: Response, most: int) -> bytes:
    """A body, or a little more than its first ``most`` bytes; no more than that is ever decoded.

    Raises:
        TaggingError: of the image, when it is encoded in a way that was not asked for and is not understood.
    """
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return await _first(response.aiter_bytes(), most)
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise image_error("unsupported_format", "The image's host sends it in an encoding that is not accepted.")
    return _decoded(await _first(response.aiter_raw(), most), most)


def _decoded(data: bytes, most: int) -> bytes:
    """The first ``most`` bytes of what is compressed, and one more. httpx would decode a chunk as a whole, and 64 kB of
    gzip can become 64 MB."""
    if len(data) > most:
        return data  # too large even so
    decoder = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        decoded = decoder.decompress(data, most + 1)
    except zlib.error:
        decoded = b""
    if not decoder.eof and len(decoded) <= most:
        raise image_error("damaged_image", "The image file is damaged or incomplete.")
    return decoded


async def _first(parts: AsyncIterator[bytes], most: int) -> bytes:
    chunks, size = [], 0
    async for chunk in parts:
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            break
    return b"".join(chunks)
