"""Structured logs: one event a line, on stderr. What strangers can cause is written a few times a minute at most."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

import structlog

from autotag.redact import redact_event

MAX_NOISY_LINES = 5  # lines of a noisy event in each window
WINDOW = 60.0  # seconds
MAX_MESSAGE_LENGTH = 4_000  # characters of a foreign library's message, tracebacks included

#: Libraries that log by themselves what a client's bytes, or too many clients, make them stumble over; the last one is
#: Python's warnings, as Pillow has for odd files.
FOREIGN = ("uvicorn.error", "asyncio", "py.warnings")


class Throttle:
    """Counts the lines of each event, and says how many it left out."""

    def __init__(self, tell: Callable[[str, int], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``tell`` writes at a window's end how many lines of an event are missing in it."""
        self._tell = tell
        self._clock = clock
        self._windows: dict[str, tuple[float, int]] = {}  # event: start, lines asked for

    def admit(self, event: str) -> bool:
        """Whether to write one more line of an event. Events are few: names that the program gives."""
        start, lines = self._windows.get(event, (float("-inf"), 0))
        if self._clock() - start >= WINDOW:
            self.close(event)
            start, lines = self._clock(), 0
        self._windows[event] = (start, lines + 1)
        if lines == MAX_NOISY_LINES:
            with contextlib.suppress(RuntimeError):  # no loop runs: the event's next line says it
                asyncio.get_running_loop().call_later(start + WINDOW - self._clock(), self.close, event, start)
        return lines < MAX_NOISY_LINES

    def close(self, event: str, start: float | None = None) -> None:
        """Ends an event's window: the one that began then, or any."""
        if start is not None and self._windows.get(event, (None, 0))[0] != start:
            return
        _, lines = self._windows.pop(event, (0.0, 0))
        if lines > MAX_NOISY_LINES:
            self._tell(event, lines - MAX_NOISY_LINES)


def _tell_left_out(event: str, lines: int) -> None:
    structlog.get_logger(__name__).warning("lines_left_out", of=event, lines=lines, seconds=WINDOW)


_throttle = Throttle(_tell_left_out)


def leave_out_noise(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The processor for ``log.warning("event", noisy=True, …)``: a few such lines a minute are enough."""
    if event.pop("noisy", False) and not _throttle.admit(str(event["event"])):
        raise structlog.DropEvent
    return event


class _Foreign(logging.Handler):
    """Writes a library's records as events, each place in it as a noisy event of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _throttle.admit(f"{record.name}:{record.lineno}"):
            return
        structlog.get_logger(record.name).log(
            record.levelno, record.name, message=self.format(record)[:MAX_MESSAGE_LENGTH], line=record.lineno
        )


def configure_logs(level: str, style: Literal["json", "console"]) -> None:
    """Call once per process, before anything logs."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            leave_out_noise,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact_event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.captureWarnings(True)
    for name in FOREIGN:
        logging.getLogger(name).handlers = [_Foreign()]
        logging.getLogger(name).propagate = False
