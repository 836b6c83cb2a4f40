"""Loads an image and prepares the JPEG that is sent to the provider.

The JPEG is sent inline, because the provider's own downloads of image URLs time out too often.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import httpx

from autotag.db import Image
from autotag.errors import TaggingError, image_error
from autotag.images.prepare import prepare_bytes
from autotag.images.storage import Storage, file_missing
from autotag.images.urls import Urls
from autotag.turns import Turns

PREPARE_THREADS = 2
UNREADABLE = "The image's row in the database cannot be read."
FETCHES = 32  # max files in memory, each of up to AUTOTAG_IMAGE_MAX_BYTES


class Images:
    """Fetches images from Storage and from allowed hosts, and prepares them."""

    def __init__(
        self,
        *,
        supabase_url: str | None,
        supabase_key: str | None,
        hosts: frozenset[str],
        max_bytes: int,
        max_pixels: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            supabase_url: the project's URL; None: Storage is not used.
            supabase_key: the project's secret key; None: Storage is not used.
            hosts: hosts that image URLs may use.
            max_bytes: max size of a file.
            max_pixels: max pixels of an image before it is scaled down.
            transport: replaces the network for image URLs, in tests.
        """
        self._max_pixels = max_pixels
        self._threads = Turns(PREPARE_THREADS)
        self._fetches = Turns(FETCHES)
        self._urls = Urls(hosts, max_bytes, transport)
        self._storage = Storage(supabase_url, supabase_key, max_bytes) if supabase_url and supabase_key else None

    async def __aenter__(self) -> Images:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._urls.__aexit__(kind, error, trace)
        if self._storage is not None:
            await self._storage.__aexit__(kind, error, trace)

    async def load(self, image: Image, max_side: int) -> bytes:
        """Fetches an image and returns it as a JPEG with sides of at most ``max_side`` pixels.

        Raises:
            TaggingError: ``image``, ``transient``, or ``account`` (Storage's key or address is wrong).
        """
        async with self._fetches.place(image.workspace):
            if image.refused == "foreign_file":
                raise image_error("foreign_file", "The image's row names a file that does not belong to its workspace.")
            if image.refused == "location_too_long":
                raise image_error("location_too_long", "The URL, path or bucket name of the image is too long.")
            if image.refused == "filtered":
                raise image_error(
                    "filtered", "The image's row is one that is not to be tagged (the project's row filter)."
                )
            if image.refused == "unreadable_row":
                raise image_error("unreadable_row", UNREADABLE)
            if image.refused == "unreadable_now":
                raise TaggingError("transient", "unreadable_row", UNREADABLE)
            if image.refused is not None:  # hidden_file: do not reveal whether the file exists
                raise file_missing()
            if image.path is not None and image.bucket is not None:
                data = await self._from_storage(image.bucket, image.path)
            elif image.url is not None:
                data = await self._urls.fetch(image.url)
            else:
                raise image_error("asset_missing", "The image was deleted.")
            async with self._threads.place(image.workspace):
                return (await asyncio.to_thread(prepare_bytes, data, max_side, 4 * self._max_pixels)).jpeg

    async def _from_storage(self, bucket: str, path: str) -> bytes:
        if self._storage is None:
            raise TaggingError(
                "account", "no_storage", "SUPABASE_URL and SUPABASE_SECRET_KEY are not set, so Storage cannot be read."
            )
        return await self._storage.read(bucket, path)
