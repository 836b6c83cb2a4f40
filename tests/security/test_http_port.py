"""A client of a worker's ports can neither delay health checks nor fill the disk with logs.

The load is 1,000 connections that send a byte a second, each opened again when it is closed, beside 100 requests of rubbish
a second; the worker may have 1,024 files open, as processes usually may.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from structlog.testing import capture_logs

from autotag.http import guard, webhook
from autotag.http.health import Health, make_app
from autotag.http.serve import serve
from autotag.observability.logs import MAX_NOISY_LINES, WINDOW, Throttle
from autotag.observability.metrics import SystemMetrics
from autotag.openai.provider import Provider
from benchmarks import flood
from benchmarks.flood import MAX_FILES, flooded
from lab.openai_sim.webhooks import batch_event, make_secret, sign
from lab.postgres import LocalPostgres, free_port
from lab.stack import Stack, worker_process
from support import PATIENCE

HOST = "127.0.0.1"
SECONDS = 6  # of load
MAX_LOG = 1_000_000 / 60 * SECONDS  # bytes
SECRET = make_secret()
CHUNK = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
POST = b"POST /webhooks/openai HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Running:
    """A worker process and what it has written."""

    http: int
    webhook: int
    log: Path


@pytest.fixture
async def running(stack: Stack, tmp_path: Path) -> AsyncIterator[Running]:
    here = Running(free_port(), free_port(), tmp_path / "log")
    environment = stack.worker_environment() | {
        "AUTOTAG_HTTP": f"{HOST}:{here.http}", "AUTOTAG_WEBHOOK": f"{HOST}:{here.webhook}",
        "OPENAI_WEBHOOK_SECRET": SECRET,
    }  # fmt: skip
    with here.log.open("wb") as log:
        async with worker_process(environment, log) as process:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
            await _started(here.http)
            yield here
    assert "Traceback" not in here.log.read_text(), "an exception escaped"


async def _started(port: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(OSError):
                if b"200 OK" in await exchange(port, b"GET /healthz HTTP/1.0\r\n\r\n"):
                    return
            await asyncio.sleep(0.1)


async def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Sends these bytes, and returns what comes back until the server closes the connection or sends nothing more."""
    reader, writer = await asyncio.open_connection(HOST, port)
    answer = b""
    try:
        with contextlib.suppress(ConnectionError, TimeoutError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(1):
                while more := await reader.read(65536):
                    answer += more
    finally:
        writer.transport.abort()
    return answer


@pytest.mark.parametrize("loaded", ["http", "webhook"])
async def test_slow_connections_and_rubbish_hold_up_nobody(running: Running, loaded: str) -> None:
    waits: list[float] = []
    async with flooded(getattr(running, loaded)):
        for turn in range(SECONDS):
            await asyncio.sleep(1)
            body = batch_event("completed", f"batch_{turn}")
            async with httpx.AsyncClient(timeout=10) as client:  # a new connection each, as a probe's
                began = time.monotonic()
                health = await client.get(f"http://{HOST}:{running.http}/healthz")
                waits.append(time.monotonic() - began)
                delivery = await client.post(
                    f"http://{HOST}:{running.webhook}/webhooks/openai", content=body, headers=sign(SECRET, body)
                )
            assert (health.status_code, delivery.status_code) == (200, 204)
    assert max(waits) <= 1.0, f"/healthz took {[round(wait, 3) for wait in waits]} s"
    size = running.log.stat().st_size
    assert size <= MAX_LOG, f"{size:,} bytes of log in {SECONDS} s"
    print(f"healthz: at most {max(waits) * 1000:.0f} ms; log: {size:,} bytes")
    # Every line is an event, uvicorn's and asyncio's own ones too, and none fills the log.
    events = [json.loads(line) for line in running.log.read_text().splitlines()]
    kinds = Counter((event["event"], event.get("line")) for event in events if event["level"] != "info")
    assert max(kinds.values()) <= 2 * MAX_NOISY_LINES, kinds  # the seconds of load may touch two windows
    assert ("uvicorn.error" if loaded == "http" else "webhook_refused") in {event for event, _ in kinds}


@pytest.mark.long
async def test_tagging_goes_on_beside_the_flood(postgres: LocalPostgres, database: str) -> None:
    """Flooding either port does not stop the worker. How much it slows it is for `./scripts/bench flood` to measure.

    An unanswered health check ends a phase with an error. The bound leaves room for other programs on the machine.
    """
    console = Console(stderr=True)
    phases = await flood.phases_of(postgres, database, console, 4, (None, "health", "webhook"))
    assert min(phase.images for phase in phases) > 0, phases
    figures = flood.evaluate(phases).figures
    assert figures["tagging_ratio"].value >= 0.2, phases
    assert figures["log_bytes_per_minute"].ok, phases


BIG = guard.MAX_BODY_BYTES + 1


@pytest.mark.parametrize(
    ("port", "parts", "status"),
    [
        ("webhook", (POST + b"Content-Length: %d\r\n\r\n" % BIG,), b"413"),
        ("webhook", (POST + b"Content-Length: %d\r\n\r\n" % BIG, b"x" * BIG), b"413"),
        ("webhook", (POST + b"Content-Length: 99999999999999999999\r\n\r\n",), b"413"),
        ("webhook", (CHUNKED, *[CHUNK] * 3), b"413"),
        ("http", (CHUNKED.replace(b"POST /webhooks/openai", b"GET /healthz"), *[CHUNK] * 3), b"413"),
        ("http", (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",), b"431"),
        ("http", (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", *[b"X: " + b"x" * 5_000 + b"\r\n"] * 5), b"400"),
        ("http", (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",), b"400"),
        ("http", (b"GET /healthz HTTP/1.1\r\n\r\n",), b"400"),
        ("webhook", (CHUNKED, b"no size\r\n"), b"400"),
        ("webhook", (POST + b"Content-Length: 2\r\n\r\n{}",), b"400"),
        ("http", (b"GET /healthz/ HTTP/1.1\r\nHost: [\r\n\r\n",), b"404"),
        ("http", (POST + b"Content-Length: 2\r\n\r\n{}",), b"404"),
        ("webhook", (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",), b"404"),
        ("webhook", (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",), b"404"),
    ],
    ids=[
        "said to be too large", "too large", "said to be huge", "chunked and too large", "the same for health",
        "large headers", "large headers piece by piece", "no HTTP", "no host", "no chunk", "unsigned", "bad host",
        "no webhook on http", "no health on webhook", "no metrics on webhook",
    ],
)  # fmt: skip
async def test_what_no_port_takes(served: tuple[int, int], port: str, parts: tuple[bytes, ...], status: bytes) -> None:
    with capture_logs():
        answer = await exchange(served[("http", "webhook").index(port)], *parts, pause=0.02)
    assert answer.split(b" ")[1:2] == [status], answer


@pytest.fixture
async def served(caplog: pytest.LogCaptureFixture) -> AsyncIterator[tuple[int, int]]:
    """Runs both applications inside the test. No exception may leave them."""
    async with _served() as ports:
        yield ports
    # uvicorn logs even an answer that it cancels at the end.
    errors = [record for record in caplog.records if record.exc_info and record.exc_info[0] != asyncio.CancelledError]
    assert errors == []


@contextlib.asynccontextmanager
async def _served() -> AsyncIterator[tuple[int, int]]:
    async def receive(*_: str) -> str:
        return "accepted"

    async def never() -> dict[str, int]:
        return await asyncio.Future()

    http, hook = free_port(), free_port()
    apps = (
        make_app(Health(60), SystemMetrics(never)),
        webhook.make_app(Provider("none", "http://none.invalid/v1", 1), SECRET, receive),
    )
    async with serve(apps[0], HOST, http, guarded=True), serve(apps[1], HOST, hook, guarded=True):
        yield http, hook


@pytest.mark.parametrize(
    ("sent", "most"),
    [
        (b"", "REQUEST_SECONDS"), (b"GET /hea", "REQUEST_SECONDS"),
        (POST + b"Content-Length: 10\r\n\r\n{", "REQUEST_SECONDS"), (CHUNKED + b"2\r\n{", "REQUEST_SECONDS"),
        (POST + b"Content-Length: 100000\r\n\r\n{", "LINGER_SECONDS"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "KEEP_ALIVE_SECONDS"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /h", "REQUEST_SECONDS"),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "RESPONSE_SECONDS"),
    ],
    ids=["nothing", "headers", "body", "chunk", "refused body", "idle", "second request", "answer"],
)  # fmt: skip
async def test_a_connection_ends_by_its_deadline(
    served: tuple[int, int], sent: bytes, most: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUEST_SECONDS", "RESPONSE_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(guard, name, 0.5 if name == most else 60.0)
    most_seconds = guard.KEEP_ALIVE_SECONDS if most == "KEEP_ALIVE_SECONDS" else 0.5
    reader, writer = await asyncio.open_connection(HOST, served[sent.startswith(b"POST")])
    began = time.monotonic()
    writer.write(sent)
    async with asyncio.timeout(most_seconds + 1):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                if most == "REQUEST_SECONDS":
                    writer.write(b"t")  # bytes that come do not put the deadline off
    assert time.monotonic() - began >= most_seconds * 0.9
    writer.transport.abort()


async def test_the_longest_wait_makes_room(served: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 3)
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    for _ in range(5):
        streams.append(await asyncio.open_connection(HOST, served[0]))
        if len(streams) > 3:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(streams[-4][0].read(), PATIENCE)
    open_ones = [not reader.at_eof() and reader.exception() is None for reader, _ in streams]
    assert open_ones == [False, False, True, True, True]
    assert b"200 OK" in await exchange(served[0], b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    for _, writer in streams:
        writer.transport.abort()


async def test_garbage_after_an_answer_is_no_error_of_ours(served: tuple[int, int]) -> None:
    answer = await exchange(served[1], POST + b"Content-Length: 70000\r\nTransfer-Encoding: chunked\r\n\r\n", *[CHUNK] * 3,
                            b"garbage\r\n", pause=0.05)  # fmt: skip
    assert answer.count(b"HTTP/1.1") == 1


async def test_chunks_of_one_byte_end_the_connection(served: tuple[int, int]) -> None:
    """The server ends such a connection, because 64 KB in chunks of one byte would take 0.3 s of processor time."""
    reader, writer = await asyncio.open_connection(HOST, served[1])
    writer.write(CHUNKED + b"1\r\nx\r\n" * 1000)
    async with asyncio.timeout(1):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.transport.abort()


async def test_a_noisy_event_is_written_a_few_times_a_minute_and_the_rest_is_counted() -> None:
    now, told = 0.0, []
    throttle = Throttle(lambda *what: told.append(what), clock=lambda: now)
    assert [throttle.admit("a") for _ in range(100)].count(True) == MAX_NOISY_LINES
    assert throttle.admit("b"), "another event has lines of its own"
    now = WINDOW
    assert (throttle.admit("a"), told) == (True, [("a", 100 - MAX_NOISY_LINES)])


async def test_what_was_left_out_is_said_when_the_noise_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotag.observability.logs.WINDOW", 0.1)
    told: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    throttle = Throttle(lambda *what: told.set_result(what))
    for _ in range(MAX_NOISY_LINES + 2):
        throttle.admit("a")
    assert await asyncio.wait_for(told, PATIENCE) == ("a", 2)
