"""Image files while they are downloaded and prepared: outside of the worker's heap, with a limit on their total
bytes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType

from autotag.errors import TaggingError, image_error

#: Bytes of a pocket, and the number of pockets. There are more pockets than files that are fetched at the same time.
POCKET, POCKETS = 300_000, 40
MAX_SECONDS = 120.0  # total time of one file; without it, a slow host could occupy a place for ever
MIN_RATE = 200_000  # bytes per second; files that are so large that they take longer get more time


class ImageFile:
    """A file in memory without a name, which is sealed when it is complete.

    It is not on disk, because /tmp is in memory in many deployments, where no limit would count it. It is not in the
    worker's heap, because it would have to be copied to the process that decodes it.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("autotag-image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            with tempfile.TemporaryFile(prefix="autotag-image-") as file:
                self.descriptor = os.dup(file.fileno())
        self.size = 0

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        at = 0
        while at < len(data):
            at += os.write(self.descriptor, data[at:] if at else data)
        self.size += len(data)

    def seal(self) -> None:
        """Makes the file unchangeable, even for the process that reads it."""
        if sys.platform == "linux":
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        """Frees the file."""
        os.close(self.descriptor)


class Space:
    """The memory for all files of a worker. Each file reserves its bytes before it is read.

    A download begins in a *pocket*, so small files wait for neither large nor slow ones. A file that does not fit into
    its pocket reserves all the bytes that it may need from the rest at once, and gives its pocket back. So a file that
    is being read already has all its memory, and no two files can wait for each other. A tenant may have half of the
    rest, or one file. Tenants that wait take turns.
    """

    def __init__(self, size: int, largest: int | None = None) -> None:
        """
        Args:
            size: bytes, at least those of the largest file.
            largest: bytes of the largest file; None: ``size``, so there are no pockets.
        """
        self._pockets = min(POCKETS, (size - (size if largest is None else largest)) // POCKET)
        self._free = size - self._pockets * POCKET
        self._share = self._free // 2
        self._held: dict[str, int] = {}  # bytes of the rest, by tenant
        #: The files that wait for bytes of the rest, by tenant, in the order of the tenants' turns.
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    def take_pocket(self) -> bool:
        """Reserves a pocket; False: there is none."""
        taken = self._pockets > 0
        self._pockets -= taken
        return taken

    def give_pocket(self) -> None:
        """Frees a pocket."""
        self._pockets += 1

    async def take(self, size: int, tenant: str) -> None:
        """Reserves bytes of the rest; waits until they are free."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append((size, turn))
        self._pass_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(size, tenant)
            else:
                self._pass_on()  # files behind it may fit
            raise

    def give(self, size: int, tenant: str) -> None:
        """Frees bytes."""
        self._add(-size, tenant)
        self._pass_on()

    def _add(self, size: int, tenant: str) -> None:
        self._free -= size
        self._held[tenant] = self._held.get(tenant, 0) + size
        if not self._held[tenant]:
            del self._held[tenant]

    def _pass_on(self) -> None:
        """Gives free bytes to waiting files. No file may pass the next one, because otherwise a large file would wait
        for small ones for ever. A tenant that already has its share is skipped."""
        for tenant, turns in [*self._waiting.items()]:
            while turns and turns[0][1].done():  # cancelled
                turns.popleft()
            if not turns:
                del self._waiting[tenant]
            elif not (held := self._held.get(tenant, 0)) or held + turns[0][0] <= self._share:
                break
        else:
            return
        size, turn = turns[0]
        if size > self._free:
            return
        self._add(size, tenant)
        turn.set_result(None)
        self._waiting[tenant] = self._waiting.pop(tenant)  # behind the other tenants
        self._pass_on()


class Download:
    """The file of one download and its reserved bytes, freed at the end of the context."""

    def __init__(self, space: Space, max_bytes: int, tenant: str = "") -> None:
        """
        Args:
            space: of all files.
            max_bytes: max size of a file.
            tenant: whose file it is.
        """
        self._space = space
        self._max_bytes = max_bytes
        self._tenant = tenant
        self._max_size = 0  # bytes that this file may have
        self._in_pocket = False
        self._reserved = 0  # bytes of the rest
        self._file: ImageFile | None = None
        self._limit: asyncio.Timeout | None = None

    async def __aenter__(self) -> Download:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    @contextlib.asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Limits the time of its block, which requests and reads the file. Waiting for space does not count.

        Raises:
            TimeoutError: it took too long.
        """
        async with asyncio.timeout(max(MAX_SECONDS, self._max_bytes / MIN_RATE)) as self._limit:
            try:
                yield
            finally:
                self._limit = None

    def clear(self) -> None:
        """Frees the file and its bytes."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._leave_pocket()
        self._space.give(self._reserved, self._tenant)
        self._reserved = 0

    @property
    def is_clear(self) -> bool:
        """Whether there is no file."""
        return self._file is None

    async def begin(self, size: int | None) -> None:
        """Begins a file. size: its bytes; None if they are not known.

        Raises:
            TaggingError: the file is too large.
        """
        self.clear()
        if size is not None:
            self.expect(size)
        self._max_size = self._max_bytes if size is None else size
        self._in_pocket = self._space.take_pocket()
        if not self._in_pocket:
            await self._reserve()
        self._file = ImageFile()

    async def _reserve(self) -> None:
        """Waits for all bytes that the file may need. The host's time does not run meanwhile, because nothing is
        read."""
        began = asyncio.get_running_loop().time()
        end = self._limit.when() if self._limit else None
        if self._limit:
            self._limit.reschedule(None)
        await self._space.take(self._max_size, self._tenant)
        self._reserved = self._max_size
        self._leave_pocket()
        if self._limit and end:
            self._limit.reschedule(end + asyncio.get_running_loop().time() - began)

    def _leave_pocket(self) -> None:
        if self._in_pocket:
            self._in_pocket = False
            self._space.give_pocket()

    def expect(self, size: int) -> None:
        """Refuses a file before it is read, if its host says that it is too large.

        Raises:
            TaggingError: the file is too large.
        """
        if size > self._max_bytes:
            raise self.too_large()

    async def write(self, data: bytes) -> None:
        """Appends bytes; waits for space for them.

        Raises:
            TaggingError: the file is larger than its host said, and larger than allowed.
        """
        size = len(data) + (self._file.size if self._file else 0)
        if self._file is None or size > self._max_size:
            raise self.too_large()
        if size > POCKET and self._in_pocket:
            await self._reserve()
        self._file.write(data)

    def finish(self) -> ImageFile:
        """The complete file."""
        if self._file is None:
            raise ValueError("no file was begun")
        self._file.seal()
        if not self._in_pocket:
            self._space.give(self._reserved - self._file.size, self._tenant)
            self._reserved = self._file.size
        return self._file

    def too_large(self) -> TaggingError:
        """The error of a file that is larger than the limit."""
        return image_error(
            "file_too_large", f"The file is larger than {self._max_bytes / 1_000_000:g} MB, which is the limit."
        )
