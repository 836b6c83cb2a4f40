"""Structured logs: one event per line, on stderr. Events that untrusted clients can cause are rate-limited."""

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

MAX_NOISY_LINES = 5  # lines per noisy event and window
WINDOW = 60.0  # seconds
MAX_MESSAGE_LENGTH = 4_000  # characters of a library's message, tracebacks included

#: Loggers of libraries whose messages untrusted clients can cause: invalid requests, too many connections, and Python's
#: warnings (Pillow warns about unusual files).
LIBRARY_LOGGERS = ("uvicorn.error", "asyncio", "py.warnings")


class Throttle:
    """Limits the lines of each event per window, and reports how many were dropped."""

    def __init__(self, on_dropped: Callable[[str, int], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``on_dropped`` is called at the end of a window with the event and the number of its dropped lines."""
        self._on_dropped = on_dropped
        self._clock = clock
        self._windows: dict[str, tuple[float, int]] = {}  # by event: start of the window, lines (dropped ones included)

    def admit(self, event: str) -> bool:
        """Whether to write another line of an event. The number of event names is limited by the program."""
        start, lines = self._windows.get(event, (float("-inf"), 0))
        if self._clock() - start >= WINDOW:
            self.close(event)
            start, lines = self._clock(), 0
        self._windows[event] = (start, lines + 1)
        if lines == MAX_NOISY_LINES:
            with contextlib.suppress(RuntimeError):  # without a loop, the event's next line closes the window
                asyncio.get_running_loop().call_later(start + WINDOW - self._clock(), self.close, event, start)
        return lines < MAX_NOISY_LINES

    def close(self, event: str, start: float | None = None) -> None:
        """Ends an event's current window; with ``start``, only if the window started then."""
        if start is not None and self._windows.get(event, (None, 0))[0] != start:
            return
        _, lines = self._windows.pop(event, (0.0, 0))
        if lines > MAX_NOISY_LINES:
            self._on_dropped(event, lines - MAX_NOISY_LINES)


def _log_dropped(event: str, lines: int) -> None:
    structlog.get_logger(__name__).warning("lines_dropped", of=event, lines=lines, seconds=WINDOW)


_throttle = Throttle(_log_dropped)


def throttle_noise(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Rate-limits ``log.warning("event", noisy=True, …)`` to `MAX_NOISY_LINES` per minute. A structlog processor."""
    if event.pop("noisy", False) and not _throttle.admit(str(event["event"])):
        raise structlog.DropEvent
    return event


class _LibraryHandler(logging.Handler):
    """Writes a library's log records as events. Each line of its source is rate-limited as one noisy event."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _throttle.admit(f"{record.name}:{record.lineno}"):
            return
        structlog.get_logger(record.name).log(
            record.levelno, record.name, message=self.format(record)[:MAX_MESSAGE_LENGTH], line=record.lineno
        )


def configure_logs(level: str, style: Literal["json", "console"]) -> None:
    """Configures the logs. Call it once per process, before the first log line."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            throttle_noise,
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
    for name in LIBRARY_LOGGERS:
        logging.getLogger(name).handlers = [_LibraryHandler()]
        logging.getLogger(name).propagate = False
