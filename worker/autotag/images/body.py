"""Reads HTTP response bodies, compressed ones included, up to a size limit."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from autotag.errors import image_error

GZIP_OR_ZLIB = 47  # zlib's wbits: max window (15), plus 32 to detect the header, gzip or zlib


class Response(Protocol):
    """A response of httpx or httpx2."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def aiter_bytes(self) -> AsyncIterator[bytes]: ...

    def aiter_raw(self) -> AsyncIterator[bytes]: ...


async def read_body(response: Response, max_bytes: int) -> bytes:
    """Reads an image file.

    Raises:
        TaggingError: the file is larger than ``max_bytes``, or its content encoding is not supported.
    """
    data = await read_up_to(response, max_bytes)
    if len(data) > max_bytes:
        raise image_error(
            "file_too_large", f"The file is larger than {max_bytes / 1_000_000:g} MB, which is the limit."
        )
    return data


async def read_up_to(response: Response, max_bytes: int) -> bytes:
    """Reads a body. A longer body is cut, but not below ``max_bytes + 1`` bytes, so that callers notice.

    Raises:
        TaggingError: ``image``: the content encoding is not supported, or the compressed data is damaged.
    """
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return await _read_first(response.aiter_bytes(), max_bytes)
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise image_error("unsupported_format", "The image's host sends it in an encoding that is not accepted.")
    return _decompress(await _read_first(response.aiter_raw(), max_bytes), max_bytes)


def _decompress(data: bytes, max_bytes: int) -> bytes:
    """Decompresses at most ``max_bytes + 1`` bytes. httpx would decompress whole chunks, and 64 kB of gzip can become
    64 MB."""
    if len(data) > max_bytes:
        return data  # too large even before it is decompressed
    decoder = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        decoded = decoder.decompress(data, max_bytes + 1)
    except zlib.error:
        decoded = b""
    if not decoder.eof and len(decoded) <= max_bytes:
        raise image_error("damaged_image", "The image file is damaged or incomplete.")
    return decoded


async def _read_first(parts: AsyncIterator[bytes], max_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in parts:
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            break
    return b"".join(chunks)
