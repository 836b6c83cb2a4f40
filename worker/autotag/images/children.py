"""The worker's side of the processes that decode images (`child`).

A child is untrusted once it has read a file: its answers are data of bounded size, never code.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import structlog

from autotag.errors import TaggingError, image_error
from autotag.images.child import HEADER
from autotag.images.files import ImageFile
from autotag.images.sent import ImageNotes
from autotag.texts import clean_text

WATCH_INTERVAL = 0.05  # seconds between two looks at a child that is decoding
MAX_TEXT = 20_000  # bytes of an answer's JSON
MAX_NOTES = 1000  # characters of the notes' JSON, as in ``autotag.clean_image_notes``
#: The complete environment of the children. Threads would multiply the memory of a child, and a fork server with
#: threads cannot fork. A child keeps up to 8 MB of free memory for its next image: getting it from the system again
#: takes 2 ms of a photograph's 25 ms. (`MAX_GROWTH` of decode.py allows more.)
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "4000000", "MALLOC_TRIM_THRESHOLD_": "8000000",
    "OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1",
}  # fmt: skip
START_TIMEOUT = 60.0  # seconds until the fork server has forked its first child; with its imports it takes about one
MAX_MESSAGE = 300  # characters of an error's message
#: Bytes that a child may allocate in addition to an image's need: stacks of threads, tables, fragments of the heap.
DATA_MARGIN = 96_000_000
#: Bytes that may be in memory in addition to an image's need.
MEMORY_MARGIN = 24_000_000
MAX_LIFE = 600  # seconds of processor time, after which the system kills a child even if the worker does not
PR_SET_DUMPABLE = 4  # of linux/prctl.h
TICKS = os.sysconf("SC_CLK_TCK")

log = structlog.get_logger(__name__)


class ChildDied(Exception):
    """A child ended before it answered. reason: for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A prepared image. width, height: of the file. notes: on the file."""

    width: int
    height: int
    jpeg: bytes
    notes: ImageNotes = field(default_factory=ImageNotes)


@dataclass(frozen=True)
class TooLarge:
    """An image that needs more memory than its child may use. need: bytes. advice: what its user can do."""

    width: int
    height: int
    need: int
    advice: str = "Upload a smaller version of it"


class ForkServer:
    """The process that forks the children. Each worker process has one, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner = 0  # the process that started it; another one after a fork
        self._orders = asyncio.Lock()
        self._running: set[asyncio.Task[dict[str, Any]]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> socket.socket:
        """Starts the process if it is not running, and returns the line to it. The process is ready a moment later."""
        running = self._process is not None and self._owner == os.getpid() and self._process.poll() is None
        if self._control is not None and running:
            return self._control
        self.close()
        self._control, other = socket.socketpair()
        self._control.setblocking(False)
        self._owner = os.getpid()
        with other:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-m", "autotag.images.child", str(self._owner), str(other.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=True,
                pass_fds=[other.fileno()], cwd="/", env=ENVIRONMENT,
            )  # fmt: skip
        return self._control

    def close(self) -> None:
        """Ends the process and all its children."""
        if self._control is not None:
            self._control.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    @property
    def pid(self) -> int | None:
        """The process; None: there is none."""
        return self._process.pid if self._process else None

    async def fork(self, data: int) -> tuple[int, socket.socket]:
        """Forks a child that may allocate ``data`` bytes; returns its process and its line.

        Raises:
            ChildDied: the fork server has ended. The next call starts another one.
        """
        line, other = socket.socketpair()
        line.setblocking(False)
        order = {"data": data, "cpu": MAX_LIFE}
        with other:
            descriptor = os.dup(other.fileno())  # for the order, which continues even if its caller is cancelled
        ordered = self._start(self._order(order, [descriptor]))
        ordered.add_done_callback(lambda _: os.close(descriptor))
        try:
            answer = await asyncio.shield(ordered)
        except BaseException:
            line.close()  # the child ends
            ordered.add_done_callback(self._reap_unwanted)
            raise
        return int(answer["pid"]), line

    async def reap(self, pid: int, parent: int | None) -> None:
        """Ends a child of the process ``parent``; does nothing if ``parent`` has ended, because its children ended,
        too.

        Until the fork server waits for the child, no other process can get its id.
        """
        if parent != self.pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildDied):
            await asyncio.shield(self._start(self._order({"reap": pid}, [])))

    def _start(self, order: Coroutine[Any, Any, dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
        """Starts an order that is not cancelled with its caller: otherwise the next order would get its answer."""
        task = asyncio.create_task(order)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _reap_unwanted(self, ordered: asyncio.Task[dict[str, Any]]) -> None:
        if not ordered.cancelled() and ordered.exception() is None:
            self._start(self._order({"reap": int(ordered.result()["pid"])}, []))

    async def _order(self, order: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # in tests, several loops share it
            self._loop, self._orders = loop, asyncio.Lock()
        async with self._orders:
            control = self.start()
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    socket.send_fds(control, [json.dumps(order).encode()], descriptors)
                    answer = b""
                    while not answer.endswith(b"\n"):
                        part = await loop.sock_recv(control, 1000)
                        if not part:
                            raise ChildDied("the process that starts others has ended")
                        answer += part
                parsed: dict[str, Any] = json.loads(answer)
                return parsed
            except BaseException as error:
                self.close()
                if isinstance(error, OSError):  # TimeoutError is one
                    raise ChildDied("the process that starts others does not answer") from None
                raise


#: The fork server of this process. It knows nothing about a particular worker, so tests share it.
FORK_SERVER = ForkServer()
atexit.register(FORK_SERVER.close)


class Child:
    """A process that decodes images, one at a time."""

    def __init__(self, pid: int, line: socket.socket, max_need: int) -> None:
        self.pid = pid
        self._parent = FORK_SERVER.pid
        self.max_need = max_need
        self.images = 0
        self._line = line
        self._idle = anonymous_memory(pid)
        self._killed: str | None = None

    @classmethod
    async def start(cls, max_need: int) -> Child:
        """Starts a child for images that need at most ``max_need`` bytes.

        Raises:
            ChildDied: it could not be started.
        """
        pid, line = await FORK_SERVER.fork(max_need + DATA_MARGIN)
        return cls(pid, line, max_need)

    @property
    def broken(self) -> bool:
        """Whether it was killed while it was sending its answer."""
        return self._killed is not None

    @property
    def grown(self) -> int:
        """Bytes that it still holds from earlier images."""
        return anonymous_memory(self.pid) - self._idle

    async def close(self) -> None:
        """Ends the process."""
        self._line.close()
        await FORK_SERVER.reap(self.pid, self._parent)

    async def decode(self, file: ImageFile, side: int, most: int, *, cpu: float, wall: float) -> Decoded | TooLarge:
        """Prepares an image.

        Args:
            file: the image's file.
            side: max pixels of its longer side.
            most: bytes that any image may need. If there are several ways to decode the image, the best that fits is
                taken.
            cpu: seconds of processor time that it may take.
            wall: seconds that it may take.

        Raises:
            ChildDied: the child ended, or exceeded a limit and was killed.
            TaggingError: ``image``, as `prepare` raises it.
        """
        self.images += 1
        watch = asyncio.create_task(self._watch(cpu, wall))
        try:
            text, image = await self._ask(
                {"side": side, "max_need": self.max_need, "most": most}, file.descriptor, side
            )
        except (OSError, EOFError, ValueError) as error:
            raise ChildDied(self._killed or f"it ended: {type(error).__name__}") from None
        finally:
            watch.cancel()
        if text.get("memory"):
            raise ChildDied("it needs more memory than its headers say")
        try:
            return read_answer(text, image)
        except (KeyError, TypeError, ValueError):
            raise ChildDied("its answer cannot be read") from None

    async def _ask(self, request: dict[str, Any], descriptor: int, side: int) -> tuple[dict[str, Any], bytes]:
        socket.send_fds(self._line, [json.dumps(request).encode()], [descriptor])
        text_length, image_length = HEADER.unpack(await self._read(HEADER.size))
        if text_length > MAX_TEXT or image_length > 3 * side * side + 100_000:
            raise ValueError("an answer of this length is none")
        text = json.loads(await self._read(text_length))
        if not isinstance(text, dict):
            raise ValueError("not an object")
        return text, await self._read(image_length)

    async def _read(self, length: int) -> bytes:
        loop, data = asyncio.get_running_loop(), bytearray(length)
        view, at = memoryview(data), 0
        while at < length:
            count = await loop.sock_recv_into(self._line, view[at:])
            if not count:
                raise EOFError
            at += count
        return bytes(data)

    async def _watch(self, cpu: float, wall: float) -> None:
        """Kills the process when it exceeds a limit."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wall
        await asyncio.sleep(WATCH_INTERVAL)  # nearly every image is ready earlier
        cpu_end = cpu_seconds(self.pid) + cpu
        limit = self._idle + self.max_need + MEMORY_MARGIN
        while self._killed is None:
            if loop.time() > end:
                self._killed = f"it took longer than {wall:g} s"
            elif cpu_seconds(self.pid) > cpu_end:
                self._killed = f"it took more than {cpu:g} s of processor time"
            elif anonymous_memory(self.pid) > limit:
                self._killed = "it used more memory than its headers say"
            else:
                await asyncio.sleep(WATCH_INTERVAL)
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def read_answer(text: dict[str, Any], image: bytes) -> Decoded | TooLarge:
    """Reads a child's answer.

    Raises:
        TaggingError: ``image``: the child refused the file; ``transient``: a bug.
        KeyError, TypeError, ValueError: this is no answer.
    """
    if "bug" in text:
        log.error("unexpected_error_raised", error=clean_text(str(text["bug"])[:MAX_MESSAGE]))
        raise TaggingError("transient", "internal_error", "The image could not be prepared.")
    if "code" in text:
        code = str(text["code"])
        if not code.isidentifier() or len(code) > 50:
            raise ValueError("not a code")
        raise image_error(code, clean_text(str(text["message"])[:MAX_MESSAGE]))
    width, height = int(text["width"]), int(text["height"])
    if "notes" not in text:
        return TooLarge(width, height, int(text["need"]), clean_text(str(text["advice"])[:MAX_MESSAGE]))
    notes = text["notes"]
    if not isinstance(notes, dict) or len(json.dumps(notes)) > MAX_NOTES:
        raise ValueError("not notes")
    if not image.startswith(b"\xff\xd8\xff"):
        raise ValueError("not a JPEG")
    return Decoded(width, height, image, cast("ImageNotes", notes))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used; 0 if it has ended, or if the system does not provide this."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def anonymous_memory(pid: int | str) -> int:
    """Roughly the bytes in memory that a process does not share; 0 as in `cpu_seconds`."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


def hide_from_children() -> None:
    """Prevents other processes of the worker's user, including the children, from reading its memory and
    environment."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
