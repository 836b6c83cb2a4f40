"""Lets Supabase Storage scale images (``AUTOTAG_STORAGE_TRANSFORM``), so that the worker gets 60 KB of a 12 MB photo.

Storage's image transformations (an imgproxy behind ``/render/image/authenticated/…``) belong to the project's plan and
are billed by the number of different images. They turn images upright, and take files of up to 25 MB and 50 megapixels
(Supabase's guide "Image Transformations"; supabase/storage: src/storage/renderer/image.ts). If Storage refuses to
transform a file, the worker reads the original, so a transformation never fails an image.
"""

from __future__ import annotations

from time import monotonic

import structlog

from autotag.errors import TaggingError
from autotag.images.body import Response
from autotag.images.files import Download, ImageFile
from autotag.images.storage import Reply, Storage, object_path

QUALITY = 90  # of JPEG and WebP; the worker compresses it again
MAX_SIDE = 2500  # pixels, Storage's max
#: Kinds of results that are used. A GIF or WebP may be the first frame of an animation, but the worker selects the
#: frame itself. Storage returns an SVG unchanged.
KINDS = frozenset({"image/jpeg", "image/png", "image/avif"})
REFUSED_FOR = 3600.0  # seconds without another try, if the project's plan does not include transformations
TROUBLE_FOR = 60.0  # seconds without another try, if the service behind Storage fails or asks to wait
#: Statuses that are about this file only: too large, broken, of another kind, missing.
ABOUT_FILE = frozenset({400, 404, 406, 413, 415, 422})

log = structlog.get_logger(__name__)


class Renderer:
    """Reads scaled images from Storage."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pause_until = 0.0  # seconds, of monotonic()

    async def read(self, bucket: str, path: str, side: int, download: Download) -> ImageFile | None:
        """Reads an image of at most ``side`` pixels a side; None: the file itself has to be read."""
        if monotonic() < self._pause_until or side > MAX_SIDE:
            return None
        location = (
            f"/render/image/authenticated/{object_path(bucket, path)}"
            f"?width={side}&height={side}&resize=contain&quality={QUALITY}"
        )
        try:
            reply = await self._storage.fetch(location, download, wanted=_is_wanted)
        except TaggingError as error:
            if error.kind == "transient":
                self._pause(TROUBLE_FOR, error.code)
            return None
        if isinstance(reply, ImageFile):
            return reply
        self._learn(reply)
        return None

    def _learn(self, reply: Reply) -> None:
        if reply.code == "FeatureNotEnabled" or reply.status == 403 or reply.message.startswith("Route "):
            self._pause(REFUSED_FOR, reply.message or f"status {reply.status}")
        elif reply.status != 200 and reply.status not in ABOUT_FILE:
            self._pause(max(TROUBLE_FOR, reply.retry_after or 0.0), f"status {reply.status}")

    def _pause(self, seconds: float, reason: str) -> None:
        if monotonic() >= self._pause_until:
            log.warning(
                "transformations_refused", reason=reason, retry_in=seconds,
                hint="Storage does not scale images now, so the worker reads them as they are.",
            )  # fmt: skip
        self._pause_until = monotonic() + seconds


def _is_wanted(response: Response) -> bool:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() in KINDS
