"""Nothing that was started here outlives this process, however it ends.

Every child belongs to the process group of a watchdog, from before its first instruction on. The watchdog holds the
read end of a pipe whose other end nobody but this process has: when that closes, also by SIGKILL, it ends the group and
removes the temporary folders it was told of. That needs nothing of Linux. SIGTERM and SIGHUP run the ordinary clean-up
(`run`, `tidy_signals`); the watchdog then finds nothing left to do.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
ENDINGS = (signal.SIGTERM, signal.SIGHUP)


class Watchdog:
    """The process that ends the others."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", Path(__file__).with_name("watchdog.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,
        )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._tell, self._lock = self._process.stdin, threading.Lock()
        self.group = int(self._process.stdout.readline())
        atexit.register(self.close)

    def folder(self, prefix: str) -> Path:
        """A new temporary folder, told of before it is made."""
        folder = Path(tempfile.gettempdir()) / f"{prefix}{secrets.token_hex(6)}"
        with self._lock:
            self._tell.write(os.fsencode(folder) + b"\0")
            self._tell.flush()
        folder.mkdir(mode=0o700)
        return folder

    def close(self) -> None:
        """Ends what is left, and waits for it."""
        self._process.communicate()


@cache
def watchdog() -> Watchdog:
    """This process's own; started when it is first needed."""
    return Watchdog()


def group() -> int:
    """The process group of whatever is started here, for ``process_group=`` of `subprocess` and `asyncio`."""
    return watchdog().group


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder that is removed at the end, whoever's end that is."""
    folder = watchdog().folder(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(job: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in which SIGTERM and SIGHUP cancel the job, as Ctrl-C does.

    Raises:
        SystemExit: with 128 and the signal's number, when one of them has ended the job.
    """
    received: list[int] = []

    async def cancellable() -> T:
        task = asyncio.ensure_future(job)
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in heeded():
            loop.add_signal_handler(number, end, number)
        return await task

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise


def tidy_signals() -> None:
    """Makes SIGTERM and SIGHUP raise SystemExit, so that what is not asyncio cleans up as well."""

    def end(number: int, _: FrameType | None) -> None:
        for each in heeded():
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in heeded():
        signal.signal(number, end)


def heeded() -> list[signal.Signals]:
    """The signals that end us: not those that whoever started us had ignored (nohup)."""
    return [number for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN]
