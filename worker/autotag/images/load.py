"""Loads an image and prepares the JPEG that is sent to the provider.

The JPEG is sent inline, because the provider's own downloads of image URLs time out too often.
"""

from __future__ import annotations

import contextlib
from types import TracebackType

import httpx

from autotag.db import Image
from autotag.errors import TaggingError, image_error
from autotag.images.children import Decoded
from autotag.images.decode import Budget, Decoder
from autotag.images.files import Download, ImageFile, Space
from autotag.images.render import Renderer
from autotag.images.sent import Prepared
from autotag.images.storage import Storage, file_missing
from autotag.images.urls import Urls
from autotag.turns import Turns

UNREADABLE = "The image's row in the database cannot be read."
FETCHES = 32  # max files that are downloaded or prepared
#: Longer side ÷ shorter side. If a picture that Storage scaled is longer than this, the file itself is read, because it
#: has to be cropped.
MAX_ASPECT = 8
#: Why `Image.refused` fails an image. hidden_file: do not reveal whether the file exists.
REFUSALS = {
    "foreign_file": image_error("foreign_file", "The image's row names a file that does not belong to its workspace."),
    "location_too_long": image_error("location_too_long", "The URL, path or bucket name of the image is too long."),
    "filtered": image_error("filtered", "The image's row is one that is not to be tagged (the project's row filter)."),
    "unreadable_row": image_error("unreadable_row", UNREADABLE),
    "unreadable_now": TaggingError("transient", "unreadable_row", UNREADABLE),
}


class Images:
    """Fetches images from Storage and from allowed hosts, and prepares them."""

    def __init__(
        self,
        *,
        supabase_url: str | None,
        supabase_key: str | None,
        hosts: frozenset[str],
        max_bytes: int,
        memory: int,
        transform: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            supabase_url: the project's URL; None: Storage is not used.
            supabase_key: the project's secret key; None: Storage is not used.
            hosts: hosts that image URLs may use.
            max_bytes: max size of a file.
            memory: bytes that the worker tries to stay within.
            transform: let Storage scale the images, where it can.
            transport: replaces the network for image URLs, in tests.
        """
        self._max_bytes = max_bytes
        budget = Budget(memory, max_bytes)
        self._decoder = Decoder(budget)
        self._space = Space(budget.files, max_bytes)
        self._fetches = Turns(FETCHES, share=True)
        self._urls = Urls(hosts, transport)
        self._storage = Storage(supabase_url, supabase_key) if supabase_url and supabase_key else None
        self._renderer = Renderer(self._storage) if transform and self._storage else None

    async def __aenter__(self) -> Images:
        await self._decoder.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._decoder.__aexit__(kind, error, trace)
        await self._urls.__aexit__(kind, error, trace)
        if self._storage is not None:
            await self._storage.__aexit__(kind, error, trace)

    async def load(self, image: Image, max_side: int, places: Turns | None = None) -> Prepared:
        """Fetches an image and returns it as a JPEG with sides of at most ``max_side`` pixels.

        Args:
            image: where it is.
            max_side: in pixels.
            places: also hold one of these places while fetching the image, but not while a heavy image waits.

        Raises:
            TaggingError: ``image``, ``transient``, or ``account`` (Storage's key or address is wrong).
        """
        if image.refused is not None:
            raise _copy(REFUSALS[image.refused]) if image.refused in REFUSALS else file_missing()
        tenant = image.workspace
        async with contextlib.AsyncExitStack() as held:
            if places is not None:
                await held.enter_async_context(places.place(tenant))
            await held.enter_async_context(self._fetches.place(tenant))
            download = await held.enter_async_context(Download(self._space, self._max_bytes, tenant))
            decoded = await self._scaled(image, max_side, download)
            if decoded is None:
                decoded = await self._decode_file(image, max_side, download, held)
        return Prepared(decoded.jpeg, decoded.notes)

    async def _decode_file(
        self, image: Image, side: int, download: Download, held: contextlib.AsyncExitStack
    ) -> Decoded:
        """Reads and decodes the image's file. held: the places and the download that this image holds."""
        tenant = image.workspace
        file = await self._fetch(image, download)
        first = await self._decoder.decode(file, side, tenant)
        if isinstance(first, Decoded):
            return first
        self._decoder.check(first)
        if not self._decoder.heavy_free:
            # While a heavy image waits, it holds neither memory nor a place, so others can pass it. Later its file is
            # read again.
            await held.aclose()
        async with self._decoder.heavy_place(tenant), Download(self._space, self._max_bytes, tenant) as again:
            if download.is_clear:
                file = await self._fetch(image, again)
            return await self._decoder.decode_alone(file, side, tenant, first)

    async def shrink(self, jpeg: bytes, side: int) -> bytes:
        """Scales down a JPEG that `load` returned."""
        async with Download(self._space, len(jpeg)) as download:
            await download.begin(len(jpeg))
            await download.write(jpeg)
            decoded = await self._decoder.decode(download.finish(), side, "")
        if not isinstance(decoded, Decoded):
            raise TaggingError("transient", "internal_error", "The image could not be prepared.")
        return decoded.jpeg

    async def _scaled(self, image: Image, side: int, download: Download) -> Decoded | None:
        """The image as Storage scales it; None: the file itself has to be read."""
        if self._renderer is None or image.path is None or image.bucket is None:
            return None
        file = await self._renderer.read(image.bucket, image.path, side, download)
        if file is None:
            return None
        try:
            decoded = await self._decoder.decode(file, side, image.workspace)
        except TaggingError:
            return None
        if not isinstance(decoded, Decoded):
            return None
        if max(decoded.width, decoded.height) > MAX_ASPECT * min(decoded.width, decoded.height):
            return None
        return decoded

    async def _fetch(self, image: Image, download: Download) -> ImageFile:
        if image.path is not None and image.bucket is not None:
            if self._storage is None:
                raise TaggingError(
                    "account", "no_storage",
                    "SUPABASE_URL and SUPABASE_SECRET_KEY are not set, so Storage cannot be read.", origin="storage",
                )  # fmt: skip
            return await self._storage.read(image.bucket, image.path, download)
        if image.url is not None:
            return await self._urls.fetch(image.url, download)
        raise image_error("asset_missing", "The image was deleted.")


def _copy(error: TaggingError) -> TaggingError:
    """A new exception each time, because many images raise it concurrently."""
    return TaggingError(error.kind, error.code, error.message)
