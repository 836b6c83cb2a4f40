"""Ends every child process and removes every temporary folder when this process ends, also after SIGKILL.

Every child starts in the process group of a watchdog. The watchdog reads from a pipe whose write end only this process
has. When the pipe closes, the watchdog kills the group and removes the temporary folders that it was sent. This works
on every Unix. SIGTERM and SIGHUP run the normal clean-up first (`run`, `exit_on_signals`), which leaves nothing for the
watchdog to do.
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
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Watchdog:
    """The watchdog process, as its parent sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", Path(__file__).with_name("watchdog.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0,
        )  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._pipe, self._lock = self._process.stdin, threading.Lock()
        self.group = int(self._process.stdout.readline())
        atexit.register(self.close)

    def folder(self, prefix: str, parent: Path | None = None) -> Path:
        """A new temporary folder. The watchdog gets its name before it exists, so a crash in between leaves none."""
        folder = (parent or Path(tempfile.gettempdir())) / f"{prefix}{secrets.token_hex(6)}"
        with self._lock:
            self._pipe.write(os.fsencode(folder) + b"\0")
            self._pipe.flush()
        folder.mkdir(mode=0o700)
        return folder

    def close(self) -> None:
        """Ends the group and waits for the watchdog."""
        self._process.communicate()


@cache
def watchdog() -> Watchdog:
    """The watchdog of this process, started at the first call."""
    return Watchdog()


def group() -> int:
    """The process group for child processes: ``process_group=`` of `subprocess` and `asyncio`."""
    return watchdog().group


@contextlib.contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder, by default in the system's temporary one, that is removed when the context or this process ends."""
    folder = watchdog().folder(prefix, parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(job: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, but SIGTERM and SIGHUP cancel the job, as Ctrl-C does.

    Raises:
        SystemExit: with 128 plus the signal's number, when a signal has cancelled the job.
    """
    received: list[int] = []

    async def cancellable() -> T:
        task = asyncio.ensure_future(job)
        loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in handled_signals():
            loop.add_signal_handler(number, end, number)
        return await task

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise


def exit_on_signals() -> None:
    """Makes SIGTERM and SIGHUP raise SystemExit, so that code outside asyncio cleans up too."""

    def end(number: int, _: FrameType | None) -> None:
        for signal_number in handled_signals():
            signal.signal(signal_number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in handled_signals():
        signal.signal(number, end)


def handled_signals() -> list[signal.Signals]:
    """The signals to handle, without those that the parent process ignores (nohup)."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
