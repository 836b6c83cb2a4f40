"""Image files while they are downloaded and prepared: outside of the worker's heap, within a number of bytes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import tempfile
from collections import deque
from types import TracebackType

from autotag.errors import TaggingError, image_error


class ImageFile:
    """A file that only its descriptor names: in memory, and sealed when it is complete.

    Not on disk, because /tmp is in memory in many deployments, and then nobody would count it. Not in the worker's
    heap, from where it would have to be copied to the process that decodes it.
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
        """Nothing can change the file from now on: neither its reader nor who takes it over."""
        if sys.platform == "linux":
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)

    def close(self) -> None:
        """Frees the file."""
        os.close(self.descriptor)


class Space:
    """The bytes of all files of a worker: each reserves its own before it is read, in the order in which they come."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: bytes, at least those of the largest file.
        """
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Reserves bytes; waits until they are free."""
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(size)
            else:
                self.give(0)  # those behind it may fit
            raise

    def give(self, size: int) -> None:
        """Frees bytes."""
        self._free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            needed, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= needed
                turn.set_result(None)


class Download:
    """The file of one download and its reserved bytes, freed at the end of the context."""

    def __init__(self, space: Space, max_bytes: int) -> None:
        """
        Args:
            space: of all files.
            max_bytes: max size of a file.
        """
        self._space = space
        self._max_bytes = max_bytes
        self._reserved = 0
        self._file: ImageFile | None = None

    async def __aenter__(self) -> Download:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Frees the file and its bytes."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._space.give(self._reserved)
        self._reserved = 0

    @property
    def is_clear(self) -> bool:
        """Whether there is no file."""
        return self._file is None

    async def begin(self, size: int | None) -> None:
        """Reserves the bytes of a file. size: None if it is not known.

        Raises:
            TaggingError: the file is too large.
        """
        self.clear()
        if size is not None:
            self.expect(size)
        reserved = self._max_bytes if size is None else size
        await self._space.take(reserved)
        self._reserved = reserved
        self._file = ImageFile()

    def expect(self, size: int) -> None:
        """Refuses a file that its host says to be too large, before it is read.

        Raises:
            TaggingError: it is.
        """
        if size > self._max_bytes:
            raise self.too_large()

    @property
    def room(self) -> int:
        """Bytes that may still be written."""
        return self._reserved - (self._file.size if self._file else 0)

    def write(self, data: bytes) -> None:
        """Appends bytes.

        Raises:
            TaggingError: the file is larger than its host said, and than is allowed.
        """
        if self._file is None or len(data) > self.room:
            raise self.too_large()
        self._file.write(data)

    def finish(self) -> ImageFile:
        """The complete file."""
        if self._file is None:
            raise ValueError("no file was begun")
        self._file.seal()
        self._space.give(self._reserved - self._file.size)
        self._reserved = self._file.size
        return self._file

    def too_large(self) -> TaggingError:
        """The error of a file that is larger than the limit."""
        return image_error(
            "file_too_large", f"The file is larger than {self._max_bytes / 1_000_000:g} MB, which is the limit."
        )
