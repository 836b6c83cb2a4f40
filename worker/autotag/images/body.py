"""Reads HTTP response bodies, compressed ones included, up to a size limit."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from autotag.errors import TaggingError, image_error
from autotag.images.files import Download, ImageFile

ENCODINGS = ("gzip", "x-gzip", "deflate")
PIECE = 65_536  # bytes that are decompressed at a time
GZIP_BEGIN = b"\x1f"
GZIP_OR_ZLIB = 47  # zlib's wbits: max window (15), plus 32 to detect the header, gzip or zlib


class Response(Protocol):
    """A response of httpx or httpx2."""

    @property
    def status_code(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def aiter_bytes(self) -> AsyncIterator[bytes]: ...

    def aiter_raw(self) -> AsyncIterator[bytes]: ...


async def receive(response: Response, download: Download) -> ImageFile:
    """Reads an image file into memory outside of the worker's heap, up to its limit.

    Raises:
        TaggingError: the file is larger than is allowed, its content encoding is not supported, or the compressed data
            is damaged.
    """
    encoding = response.headers.get("content-encoding", "").strip().lower()
    length = response.headers.get("content-length", "")
    size = int(length) if length.isdecimal() else None
    if encoding in ("", "identity"):
        await download.begin(size)
        async for chunk in response.aiter_bytes():
            await download.write(chunk)
    elif encoding in ENCODINGS:
        download.expect(size or 0)
        await download.begin(None)
        decoder = zlib.decompressobj(GZIP_OR_ZLIB)
        async for chunk in response.aiter_raw():
            decoder = await _decompress_into(download, decoder, chunk)
        if not decoder.eof:
            raise _damaged()
    else:
        raise _unknown_encoding()
    return download.finish()


async def _decompress_into(download: Download, decoder: zlib._Decompress, data: bytes) -> zlib._Decompress:
    """Decompresses piece by piece and returns the decoder for the next data. httpx would decompress whole chunks, and
    64 kB of gzip can become 64 MB."""
    while True:
        if decoder.eof:
            if data[:1] != GZIP_BEGIN:
                return decoder  # ignore data after the end of the file
            decoder = zlib.decompressobj(GZIP_OR_ZLIB)  # a file in several parts
        try:
            part = decoder.decompress(data, PIECE)
        except zlib.error:
            raise _damaged() from None
        await download.write(part)
        data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        if not data and len(part) < PIECE:
            return decoder


async def read_up_to(response: Response, max_bytes: int) -> bytes:
    """Reads a body that is not an image. A longer body is cut, but keeps at least ``max_bytes + 1`` bytes, so that
    callers notice. A body that cannot be decompressed counts as empty, because the status is enough."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return await _read_first(response.aiter_bytes(), max_bytes)
    if encoding not in ENCODINGS:
        return b""
    data = await _read_first(response.aiter_raw(), max_bytes)
    try:
        return zlib.decompressobj(GZIP_OR_ZLIB).decompress(data, max_bytes + 1)
    except zlib.error:
        return b""


async def _read_first(parts: AsyncIterator[bytes], max_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in parts:
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            break
    return b"".join(chunks)


def _damaged() -> TaggingError:
    return image_error("damaged_image", "The image file is damaged or incomplete.")


def _unknown_encoding() -> TaggingError:
    return image_error("unsupported_format", "The image's host sends it in an encoding that is not accepted.")
