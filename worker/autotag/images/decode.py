"""Decodes images in child processes, within the worker's memory.

Two *common children* decode ordinary images, which take milliseconds. Tenants share them by time. An image is *heavy*
if it needs more memory than a common child may use, takes longer than `COMMON_CPU`, or ends its child. Heavy images are
decoded one at a time, each in a new child that replaces one of the two. So ordinary images pass heavy ones, and a
worker never decodes two heavy images at the same time.

A file that ends its child a second time fails as ``image_too_expensive``. The same worker makes the second try at once.
The database need not remember the first try, because no file can end the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator

import structlog

from autotag.errors import TaggingError, image_error
from autotag.images.children import FORK_SERVER, Child, ChildDied, Decoded, TooLarge
from autotag.images.files import POCKET, POCKETS, ImageFile
from autotag.turns import Turns

CHILDREN = 2  # common children
COMMON_CPU, COMMON_WALL = 2.0, 20.0  # seconds of processor time, and of time; a photo takes milliseconds
HEAVY_CPU, HEAVY_WALL = 20.0, 120.0
TRIES = 2  # how often a file may end its child
MAX_IMAGES = 500  # per child; then it is replaced
MAX_GROWTH = 24_000_000  # bytes that a child may keep of earlier images; then it is replaced

#: Bytes of a worker with its calls in flight, not counting images; of the fork server; and of an idle child. Measured
#: by ``./scripts/bench images``.
WORKER_IDLE, FORK_SERVER_IDLE, CHILD_IDLE = 140_000_000, 25_000_000, 12_000_000
FILES = 64_000_000  # bytes of all files that are downloaded or prepared at the same time, unless one file may be larger
COMMON_NEED = 64_000_000  # bytes that an image in a common child may need, if the worker has enough memory
MIN_COMMON_NEED = 44_000_000  # enough for a photo of two megapixels as a PNG

ROOM_PATIENCE = 60.0  # seconds that a heavy image waits until calls in flight free memory
ROOM_INTERVAL = 0.2  # seconds between two looks

log = structlog.get_logger(__name__)


class Budget:
    """How a worker's memory is divided.

    Attributes:
        files: bytes for image files.
        common: bytes that an image in a common child may need.
        heavy: bytes that any image may need.
    """

    def __init__(self, memory: int, max_bytes: int) -> None:
        """
        Args:
            memory: bytes of the worker and its children.
            max_bytes: max size of a file.
        """
        self.memory = memory
        self.files = max(FILES, max_bytes + POCKETS * POCKET)
        self._idle = FORK_SERVER_IDLE + CHILDREN * CHILD_IDLE
        left = memory - max(WORKER_IDLE, own_memory()) - self._idle - self.files
        self.common = min(COMMON_NEED, max(MIN_COMMON_NEED, left // CHILDREN))
        self.heavy = max(self.common, left - self.common)

    @property
    def room(self) -> int:
        """Bytes that a heavy image may need now, while one common child goes on."""
        return self.memory - own_memory() - self._idle - self.files - self.common


def own_memory() -> int:
    """Bytes of this process in memory; 0 if the system does not provide this."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


class Decoder:
    """Decodes the images of one worker."""

    def __init__(self, budget: Budget) -> None:
        """
        Args:
            budget: the worker's memory.
        """
        self._budget = budget
        self._places = Turns(CHILDREN, by_time=True)
        self._heavy = Turns(1, by_time=True)
        self._children: set[Child] = set()  # the common children
        self._idle: list[Child] = []  # common children without an image

    async def __aenter__(self) -> Decoder:
        FORK_SERVER.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._idle:
            await self._end(self._idle.pop())

    async def decode(self, file: ImageFile, side: int, tenant: str) -> Decoded | TooLarge | None:
        """Decodes an image in a common child, unless it needs too much memory for that. None: it ended its child.

        Raises:
            TaggingError: ``image``: the file is not an image that can be tagged.
        """
        async with self._places.place(tenant):
            child = await self._child()
            try:
                decoded = await child.decode(file, side, self._budget.heavy, cpu=COMMON_CPU, wall=COMMON_WALL)
            except ChildDied as died:
                log.warning("image_child_ended", workspace=tenant, reason=died.reason, tries=1)
                await self._end(child)
                return None
            except TaggingError:
                await self._return(child)
                raise
            except BaseException:  # if cancelled: its answer would be taken for the next image's
                await self._end(child)
                raise
            await self._return(child)
            return decoded

    def check(self, decoded: TooLarge | None) -> None:
        """Refuses an image that can never be decoded.

        Raises:
            TaggingError: ``image_too_large``.
        """
        if decoded is not None and decoded.need > self._budget.heavy:
            raise image_error(
                "image_too_large",
                f"The image has {decoded.width} × {decoded.height} pixels. Decoding it takes {_mb(decoded.need)} of "
                f"memory, and {_mb(self._budget.heavy)} are allowed. {decoded.advice}, or raise AUTOTAG_MEMORY by "
                f"{_mb(decoded.need - self._budget.heavy + 1_000_000)}.",
            )

    @property
    def heavy_free(self) -> bool:
        """Whether a heavy image need not wait."""
        return self._heavy.free

    @contextlib.asynccontextmanager
    async def heavy_place(self, tenant: str) -> AsyncIterator[None]:
        """Waits for the only place for heavy images, and holds it for the body."""
        async with self._heavy.place(tenant):
            yield

    async def decode_alone(self, file: ImageFile, side: int, tenant: str, first: TooLarge | None) -> Decoded:
        """Decodes a heavy image. The caller holds `heavy_place`.

        Args:
            file: the image's file.
            side: max pixels of its longer side.
            tenant: its workspace.
            first: the answer of the common child.

        Raises:
            TaggingError: ``image``: as in `decode`, or ``image_too_expensive``; ``transient``: there is no memory now.
        """
        need = self._budget.common if first is None else first.need
        async with self._places.place(tenant):
            while self._idle and len(self._children) >= CHILDREN:
                await self._end(self._idle.pop())  # the new child takes its place and its memory
            for tries in range(1 if first else 2, TRIES + 1):
                await self._wait_for_room(need)
                try:
                    return await self._in_new_child(file, side, max(need, self._budget.common))
                except ChildDied as died:
                    log.warning("image_child_ended", workspace=tenant, reason=died.reason, tries=tries)
        raise image_error(
            "image_too_expensive",
            "Decoding this image takes too much time or memory. Save it again with another program, or upload a "
            "smaller version of it.",
        )

    async def _in_new_child(self, file: ImageFile, side: int, need: int) -> Decoded:
        child = await Child.start(need)
        try:
            decoded = await child.decode(file, side, self._budget.heavy, cpu=HEAVY_CPU, wall=HEAVY_WALL)
        finally:
            await child.close()
        if isinstance(decoded, TooLarge):
            raise ChildDied("it needs more than its headers said before")
        return decoded

    async def _wait_for_room(self, need: int) -> None:
        try:
            async with asyncio.timeout(ROOM_PATIENCE):
                while need > self._budget.room:  # noqa: ASYNC110 (there is no event for freed memory)
                    await asyncio.sleep(ROOM_INTERVAL)
        except TimeoutError:
            raise TaggingError(
                "transient", "no_memory", "The worker has no memory for this image now (AUTOTAG_MEMORY)."
            ) from None

    async def _child(self) -> Child:
        """An idle child, or a new one.

        Raises:
            TaggingError: ``transient``: none can be started.
        """
        if self._idle:
            return self._idle.pop()
        try:
            child = await Child.start(self._budget.common)
        except (ChildDied, OSError) as error:
            log.error("image_child_not_started", error=str(error))
            raise TaggingError("transient", "internal_error", "The image could not be prepared.") from None
        self._children.add(child)
        return child

    async def _end(self, child: Child) -> None:
        await child.close()
        self._children.discard(child)

    async def _return(self, child: Child) -> None:
        if child.broken or child.images >= MAX_IMAGES or child.grown > MAX_GROWTH:
            await self._end(child)
        else:
            self._idle.append(child)


def _mb(size: int) -> str:
    return f"{max(1, round(size / 1_000_000)):,} MB"
